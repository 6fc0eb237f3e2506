import gguf
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen_env.errors import UsageError
from qwen_env.tokenizer import load_tokenizer
from qwen_env.tokenizer.gguf import load_gguf_tokenizer

TEXT = "In 1234 it's 'T IS  naïve,\n\n  won't\tdo!! 世界  "
SPECIAL = ["<|endoftext|>", "<|im_end|>"]


def write_gguf(path, backend, *, pre="qwen2", padding=3, model="gpt2"):
    """A GGUF file with no tensors, and the vocabulary of `backend` padded by `padding` ids."""
    import json

    bpe = json.loads(backend.to_str())["model"]
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get) + [f"[PAD{i}]" for i in range(padding)]
    kinds = [
        gguf.TokenType.CONTROL
        if token in SPECIAL
        else gguf.TokenType.UNUSED
        if token.startswith("[PAD")
        else gguf.TokenType.NORMAL
        for token in tokens
    ]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_eot_token_id(tokens.index("<|endoftext|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template("{{ messages[0].content }}{{ eos_token }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def train(pre_tokenizer, normalizer=None):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 5, trainer)
    return backend


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def test_it_is_the_tokenizer_that_the_file_was_made_from(tmp_path):
    backend = train(byte_level())
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, pre="gpt-2"))
    for text in (TEXT, "<|im_end|>" + TEXT, "1 22 333"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.eos_token_ids == (0, 1)
    assert tokenizer.pad_token_id == 0
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "hi<|im_end|>"


def test_padding_ids_have_no_text(tmp_path):
    backend = train(byte_level())
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, padding=4))
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.encode("[PAD1]") != [backend.get_vocab_size() + 1]


def test_smollm_cuts_numbers_into_digits(tmp_path):
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = train(pre_tokenizers.Sequence([digits, byte_level()]))
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, pre="smollm"))
    assert tokenizer.encode(TEXT) == backend.encode(TEXT).ids


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("qwen2", ["In", " ", "1", "2", "3", "4", " it", "'s", " '", "T", " IS", " "]),
        ("llama-bpe", ["In", " ", "123", "4", " it", "'s", " '", "T", " IS", " "]),
        ("gpt-2", ["In", " 1234", " it", "'s", " '", "T", " IS", " "]),
        ("smollm", ["In", " ", "1", "2", "3", "4", " it", "'s", " '", "T", " IS", " "]),
    ],
)
def test_words_by_hand(tmp_path, pre, expected):
    backend = train(byte_level())
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, pre=pre))
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in words][: len(expected)] == expected


def test_qwen2_is_split_as_transformers_splits_it(tmp_path):
    qwen = transformers.Qwen2Tokenizer(vocab={"a": 0}, merges=[])
    split, normalizer = qwen.backend_tokenizer.pre_tokenizer, normalizers.NFC()
    backend = train(split, normalizer)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend, pre="qwen2"))
    decomposed = TEXT + "nai\u0308ve"
    for text in (TEXT, decomposed, "IT'S  \r\n x=1;\n\ty  "):
        assert tokenizer.backend.pre_tokenizer.pre_tokenize_str(text) == split.pre_tokenize_str(
            text
        )
        assert tokenizer.encode(text) == backend.encode(text).ids


def test_a_folder_saved_from_it_is_what_transformers_loads(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", train(byte_level())))
    tokenizer.save(tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.eos_token == "<|im_end|>"


def test_wrong_files(tmp_path):
    backend = train(byte_level())
    with pytest.raises(UsageError, match="no such file"):
        load_gguf_tokenizer(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all")
    with pytest.raises(UsageError, match="is not a GGUF file"):
        load_gguf_tokenizer(tmp_path / "text.gguf")
    with pytest.raises(UsageError, match=r"splits text as 'dbrx'; only gpt-2, .* can be read"):
        load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", backend, pre="dbrx"))
    with pytest.raises(UsageError, match="tokenizer of kind 'llama'"):
        load_gguf_tokenizer(write_gguf(tmp_path / "b.gguf", backend, model="llama"))
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"c.gguf holds no tokens \(tokenizer.ggml.tokens\)"):
        load_gguf_tokenizer(tmp_path / "c.gguf")
