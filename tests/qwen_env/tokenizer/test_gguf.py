import itertools
import json

import gguf
import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen_env.errors import UsageError
from qwen_env.tokenizer import load_tokenizer
from qwen_env.tokenizer.gguf import load_gguf_tokenizer

TEXT = "In 1234 it's 'T IS  naïve,\n\n  won't\tdo!! 世界  "
SPECIAL = ["<|endoftext|>", "<|im_end|>"]
UNUSED = gguf.TokenType.UNUSED
KINDS = gguf.GGUFValueType
NUMBERS = itertools.count()


def write_gguf(
    path, backend, *, pre="qwen2", padding=3, model="gpt2", padding_kind=UNUSED, change=None
):
    """A GGUF file with no tensors, and the vocabulary of `backend` padded by `padding` ids.

    `change` is called with the metadata before they are written: a dict of `GGUFValue`s by key.
    """
    bpe = json.loads(backend.to_str())["model"]
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get) + [f"[PAD{i}]" for i in range(padding)]
    kinds = [
        gguf.TokenType.CONTROL
        if token in SPECIAL
        else padding_kind
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
    if change is not None:
        change(writer.kv_data[0])
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


@pytest.fixture(scope="module")
def backend():
    return train(byte_level())


@pytest.fixture
def load(backend, tmp_path):
    """The tokenizer of a file whose metadata were changed: `{key: value or None}`."""

    def load(changes=None, *, path="m.gguf", **arguments):
        def change(metadata):
            for key, value in (changes or {}).items():
                key = f"tokenizer.{key}"
                if value is None:
                    metadata.pop(key, None)
                else:
                    metadata[key] = gguf.gguf_writer.GGUFValue(*value)

        return load_tokenizer(write_gguf(tmp_path / path, backend, change=change, **arguments))

    return load


def flag(value):
    return value, KINDS.BOOL


def number(value):
    return value, KINDS.UINT32


def texts(*values):
    return values, KINDS.ARRAY, KINDS.STRING


def test_every_end_of_generation_is_known(backend, load):
    """llama.cpp knows them by their texts too: a file has no field for a second id."""
    no_eot = {"ggml.eot_token_id": None}
    assert load(no_eot).eos_token_ids == (0, 1)
    assert load({"ggml.eos_token_id": None, **no_eot}).eos_token_ids == (0, 1)
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    plain = [*tokens]
    plain[:2] = ["<a>", "<b>"]
    tokens_field = {"ggml.tokens": texts(*plain, "[PAD0]", "[PAD1]", "[PAD2]")}
    ids = {"ggml.eos_token_id": number(5), "ggml.eom_token_id": number(7)}
    assert load(tokens_field | no_eot | ids).eos_token_ids == (5, 7)
    # A token with such a text that is no control token is the word itself.
    plain[0] = "</s>"
    kinds = [gguf.TokenType.NORMAL] * (len(plain) + 3)
    changes = {
        "ggml.tokens": texts(*plain, "[PAD0]", "[PAD1]", "[PAD2]"),
        "ggml.token_type": (kinds, KINDS.ARRAY, KINDS.INT32),
    }
    assert load(changes | no_eot).eos_token_ids == (1,)


def test_padding_of_old_converters_has_no_text_either(backend, load):
    tokenizer = load(padding_kind=gguf.TokenType.USER_DEFINED)
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.decode([backend.get_vocab_size()]) == ""
    assert tokenizer.encode("[PAD1]") == backend.encode("[PAD1]").ids


@pytest.mark.parametrize(
    ("pre", "adds", "bos", "expected"),
    [
        ("gpt-2", None, 0, ()),
        ("gpt-2", False, 0, ()),
        ("gpt-2", True, 0, (0,)),
        ("llama-bpe", None, 0, (0,)),  # llama.cpp's default
        ("llama-bpe", None, None, ()),
        ("llama-bpe", False, 0, ()),
    ],
)
def test_what_goes_before_a_text(load, tmp_path, pre, adds, bos, expected):
    changes = {
        "ggml.bos_token_id": None if bos is None else number(bos),
        "ggml.add_bos_token": None if adds is None else flag(adds),
        "ggml.add_eos_token": flag(True),  # a prompt goes on, so none goes after it
    }
    tokenizer = load(changes, pre=pre)
    assert tokenizer.prefix_ids == expected
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the").input_ids == [*expected, *tokenizer.encode("the"), 1]


def test_chat_templates_by_name(load):
    tokenizer = load(
        {
            "chat_templates": texts("rag"),
            "chat_template.rag": ("R{{ messages[0].content }}", KINDS.STRING),
        }
    )
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat) == "hi<|im_end|>"
    assert tokenizer.apply_chat_template(chat, chat_template="rag") == "Rhi"


HARMLESS = {
    "ggml.scores": ([0.0], KINDS.ARRAY, KINDS.FLOAT32),
    "ggml.token_type_count": number(2),
    "ggml.fim_pre_token_id": number(1),
    "ggml.fim_pad_token_id": number(1),
    "ggml.suffix_token_id": number(1),
    "huggingface.json": ("{}", KINDS.STRING),
    "ggml.add_space_prefix": flag(False),
    "ggml.remove_extra_whitespaces": flag(False),
    "ggml.mask_token_id": number(1),
    "ggml.bos_token_id": number(2**32 - 1),  # -1: none
    "ggml.new_setting": flag(False),
}


@pytest.mark.parametrize("key", HARMLESS)
def test_fields_that_change_nothing(load, key):
    plain, with_it = load(), load({key: HARMLESS[key]}, path="b.gguf")
    assert with_it.encode(TEXT) == plain.encode(TEXT)
    assert with_it.eos_token_ids == plain.eos_token_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ggml.add_space_prefix": flag(True)},
            "add_space_prefix in .* is True, a setting",
        ),
        ({"ggml.add_sep_token": flag(True)}, "add_sep_token in .* not known here"),
        ({"ggml.normalizer.lowercase": flag(True)}, "normalizer.lowercase"),
        ({"ggml.suppress_tokens": ([3], KINDS.ARRAY, KINDS.INT32)}, "suppress_tokens"),
        ({"ggml.precompiled_charsmap": ([1], KINDS.ARRAY, KINDS.UINT8)}, "precompiled_charsmap"),
        ({"ggml.new_setting": ("x", KINDS.STRING)}, "new_setting in .* is 'x'"),
        ({"ggml.pre": None}, "does not say how text is split .* convert it again"),
        ({"ggml.pre": number(3)}, "pre in .* is 3; it must be text"),
        ({"ggml.model": None}, "tokenizer of kind None"),
        ({"ggml.tokens": None}, "holds no tokens"),
        ({"ggml.tokens": number(3)}, "tokens in .* is 3; it must be a list of texts"),
        ({"ggml.tokens": texts("a", "b")}, "holds 2 tokens, but the types of"),
        ({"ggml.token_type": texts("a")}, "token_type in .* it must be a list of numbers"),
        ({"ggml.merges": texts("ab")}, "the merge 'ab' is not one of two tokens"),
        ({"ggml.merges": texts("a b c")}, "the merge 'a b c' is not one of two"),
        ({"ggml.merges": texts("a 世")}, "out of vocabulary"),
        ({"ggml.bos_token_id": ("x", KINDS.STRING)}, "bos_token_id in .* is 'x'; it must be a num"),
        ({"ggml.eos_token_id": number(10**6)}, "eos_token_id in .* is 1000000; there are only"),
        ({"ggml.eot_token_id": (-1, KINDS.INT32)}, "eot_token_id in .* is -1; there are only"),
        ({"ggml.eos_token_id": flag(True)}, "eos_token_id in .* is True; it must be a number"),
        ({"ggml.add_bos_token": number(1)}, "add_bos_token in .* is 1; it must be true or false"),
        ({"ggml.add_bos_token": flag(True)}, "adds a bos token to each text, but does not say"),
        ({"chat_template": number(3)}, "chat_template in .* is 3; it must be text"),
        ({"chat_template.x": number(3)}, "chat_template.x in .* is 3; it must be text"),
    ],
)
def test_fields_that_cannot_be_followed(load, changes, message):
    with pytest.raises(UsageError, match=message):
        load(changes)


def test_two_tokens_of_one_text(backend, load):
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    tokens[9] = tokens[8]
    pads = [f"[PAD{i}]" for i in range(3)]
    with pytest.raises(UsageError, match=r"tokens 8 and 9 are both"):
        load({"ggml.tokens": texts(*tokens, *pads)})


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_metadata(load, data):
    """A sentence, or a tokenizer that can be used."""
    values = st.one_of(
        st.booleans().map(flag),
        st.integers(0, 2**32 - 1).map(number) | st.integers(0, 400).map(number),
        st.text(max_size=5).map(lambda text: (text, KINDS.STRING)),
        st.lists(st.text(max_size=3), min_size=1, max_size=5).map(lambda lines: texts(*lines)),
        st.lists(st.integers(-9, 9), min_size=1, max_size=5).map(
            lambda items: (items, KINDS.ARRAY, KINDS.INT32)
        ),
    )
    roles = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls")
    keys = [f"ggml.{role}_token_id" for role in roles] + [
        "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template",
        "ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix", "chat_template.tool",
    ]  # fmt: skip
    changes = data.draw(
        st.dictionaries(st.sampled_from(keys), st.none() | values, min_size=1, max_size=3)
    )
    pre = data.draw(st.sampled_from(["gpt-2", "qwen2", "llama-bpe", "smollm"]))
    try:
        tokenizer = load(changes, path=f"{next(NUMBERS)}.gguf", pre=pre)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    ids = tokenizer.encode(TEXT)
    assert tokenizer.ids.issuperset([*ids, *tokenizer.prefix_ids, *tokenizer.eos_token_ids])
    assert tokenizer.decode(np.array(ids)) == tokenizer.backend.decode(ids)
