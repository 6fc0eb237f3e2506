"""What tokens stand for, against the decoders of the `tokenizers` package."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from qwen_env.errors import UsageError
from qwen_env.tokenizer import load_tokenizer
from qwen_env.tokenizer.token_bytes import special_tokens, token_bytes


def joined(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    spelling = token_bytes(backend)
    return b"".join(spelling[i] for i in ids).decode(errors="replace")


def sentencepiece(decoder: decoders.Decoder, *texts: str) -> tokenizers.Tokenizer:
    """One whose tokens are `texts`, and all bytes."""
    vocab = {token: i for i, token in enumerate([*texts, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


LLAMA = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


@given(ids=st.lists(st.integers(0, 293), max_size=12))
def test_byte_level(backend, ids):
    assert joined(backend, ids) == backend.decode(ids, skip_special_tokens=True)


def test_every_byte_has_its_token(backend):
    spelling = token_bytes(backend)
    single = {text for text in spelling.values() if len(text) == 1}
    assert single == {bytes([byte]) for byte in range(256)}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for text in ("naïve, 好", "\n\t\x00~"):
        ids = backend.encode(text).ids
        assert set("".join(map(backend.id_to_token, ids))) <= set(alphabet)
        assert b"".join(spelling[i] for i in ids) == text.encode()


def test_added_tokens_are_spelled_as_they_are(backend):
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.add_tokens([AddedToken("<tool call>"), AddedToken("é"), AddedToken("好")])
    ids = [backend.token_to_id(text) for text in ("<tool call>", "é", "好", "<|im_end|>")]
    assert joined(backend, ids) == backend.decode(ids)
    assert special_tokens(backend) == {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}


@pytest.mark.parametrize(
    "decoder", [LLAMA, GEMMA, decoders.Metaspace("▁"), decoders.Metaspace("▁", "never")]
)
def test_sentencepiece_behind_a_prompt(decoder):
    backend = sentencepiece(decoder, "▁film", "▁", "s", "▁▁", "<")
    if decoder is LLAMA or decoder is GEMMA:
        ids = [0, 2, *(5 + byte for byte in "好\n".encode()), 1, 3, backend.token_to_id("<s>"), 0]
    else:
        ids = [0, 2, 1, 3, backend.token_to_id("<s>"), 0]
    before, both = backend.decode([4]), backend.decode([4, *ids])
    assert before == "<"
    assert joined(backend, ids) == both[1:]
    assert both[1:].startswith(" films")


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (None, "None"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]), "Replace"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "ByteLevel"),
    ],
)
def test_other_decoders_are_refused(decoder, name):
    backend = sentencepiece(GEMMA, "a")
    if decoder is not None:
        backend.decoder = decoder
    else:
        backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UsageError, match=f"decoder is {name}; leave stop out"):
        token_bytes(backend)


def test_the_pocket_tokenizer_s(tokenizer_of_the_pocket):
    backend = tokenizer_of_the_pocket.backend
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, tokenizer_of_the_pocket.vocab_size, (50, 20)).tolist():
        assert joined(backend, ids) == tokenizer_of_the_pocket.decode(ids)


@pytest.fixture(scope="module")
def tokenizer_of_the_pocket():
    from qwen_env import pocket

    return load_tokenizer(pocket.POLICY_FOLDER)
