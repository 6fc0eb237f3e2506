"""Text in its context: what goes before a prompt, a completion after it, the end of a long text."""

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from qwen_env.task import make_task
from qwen_env.tokenizer import load_tokenizer
from qwen_env.tokenizer import tokenizer as module

MANY = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sentencepiece(marks_words="normalizer"):
    """The layout of Llama 2's and Mistral's tokenizer.json: BPE over text marked with ▁."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz.!"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for word in ("the", "film", "was", "great", "not", "good"):
        left = "▁"
        for letter in word:
            merges.append((left, letter))
            left += letter
            vocab.setdefault(left, len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    if marks_words == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def word_pieces():
    vocab = {
        t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "film", "##s", "do", "n't"])
    }
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return backend


def words():
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "the", "film"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


BACKENDS = {
    "normalizer": sentencepiece,
    "metaspace": lambda: sentencepiece("metaspace"),
    "word pieces": word_pieces,
    "words": words,
}


@pytest.fixture(params=["byte level", *BACKENDS])
def any_backend(request, backend):
    return backend if request.param == "byte level" else BACKENDS[request.param]()


def test_prompt_and_completion_are_the_text_of_all_the_tokens():
    backend = sentencepiece()
    vocab = backend.get_vocab()
    seen = []
    task = make_task(
        tokenizer=backend,
        prompts=["the film was"],
        reward=lambda batch: seen.append(batch.completions[0]) or [0.0],
        eos_token_ids=2,
        max_new_tokens=4,
    )
    (prompt,) = task.prompts
    ids = np.array([vocab["▁not"], vocab["▁great"], 2], np.int32)
    both = backend.decode([*prompt.ids, *ids])
    assert prompt.text + task.tokenizer.decode_after(prompt.ids, ids) == both
    assert both == "the film was not great"


@MANY
@given(data=st.data())
def test_any_completion_in_the_context_of_any_prompt(any_backend, data):
    tokenizer = load_tokenizer(any_backend)
    text = data.draw(st.sampled_from(["the film", "a 世", "😀", "do", "<s>the", "n't the film. "]))
    prompt = np.array(tokenizer.encode(text), np.int64)
    ids = data.draw(st.lists(st.sampled_from(sorted(tokenizer.ids)), max_size=8))
    plain = [i for i in ids if i not in tokenizer._special_ids]
    before = any_backend.decode(prompt.tolist(), skip_special_tokens=False)
    both = any_backend.decode([*prompt, *plain], skip_special_tokens=False)
    after = tokenizer.decode_after(prompt, np.array(ids, np.int64))
    if both.startswith(before):
        assert before + after == both
    else:  # bytes that are no character turned the prompt's last one into something else
        assert "\ufffd" in both
        assert after == any_backend.decode(plain, skip_special_tokens=False)


def test_a_character_in_pieces_after_one_in_pieces():
    """ByteFallback makes all bytes in a row one character or none."""
    tokenizer = load_tokenizer(sentencepiece())
    prompt, character = (np.array(tokenizer.encode(text)[1:]) for text in ("世", "界"))
    assert tokenizer.decode_after(prompt, character) == "界"
    assert tokenizer.decode_after(prompt, character[:2]) == "\ufffd\ufffd"
    assert tokenizer.decode_after(prompt, character[:0]) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("normalizer", (1,)), ("metaspace", (1,)), ("word pieces", (1,)), ("words", ())],
)
def test_what_goes_before_a_text(name, expected):
    assert load_tokenizer(BACKENDS[name]()).prefix_ids == expected


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("<s> $A", (0,)),
        ("<s> $A </s>", (0,)),
        ("$A </s>", ()),
        ("<s> </s> $A", (0, 1)),
        ("$A", ()),
    ],
)
@pytest.mark.parametrize("in_sequence", [False, True])
def test_what_other_templates_put_before_a_text(single, expected, in_sequence):
    backend = words()
    processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    if in_sequence:  # as in Llama 3
        processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processor])
    backend.post_processor = processor
    assert load_tokenizer(backend).prefix_ids == expected


PIECES = st.sampled_from(
    [
        "the film was good ",
        "\n\n",
        " ",
        "1234567890",
        "naïve",
        "世界",
        "😀",
        "a",
        "<|im_end|>",
        "  \t",
    ]
)


@MANY
@given(
    pieces=st.lists(st.tuples(PIECES, st.integers(1, 60)), min_size=1, max_size=6),
    at_least=st.integers(1, 20),
)
def test_the_end_of_a_long_text(any_backend, pieces, at_least, monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", 8)
    monkeypatch.setattr(module, "_SHIFT", 11)
    tokenizer = load_tokenizer(any_backend)
    text = "".join(piece * count for piece, count in pieces)
    whole = any_backend.encode(text, add_special_tokens=False).ids
    ids, are_all = tokenizer.encode_end(text, at_least)
    if are_all:
        assert ids == whole
    else:
        assert len(ids) > at_least
        assert ids[-at_least:] == whole[-at_least:]


def test_a_run_whose_cut_depends_on_its_beginning():
    """Digits in threes from the left: from no place inside do they come out the same."""
    vocab = {"<unk>": 0, "111": 1, "1": 2, "11": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\d{1,3}"), "isolated")
    tokenizer = load_tokenizer(backend)
    for length, last in ((300_000, 1), (300_001, 2), (300_002, 3)):
        ids, are_all = tokenizer.encode_end("1" * length, 9000)
        assert are_all
        assert ids == [1] * 100_000 + [last] * (last != 1)
