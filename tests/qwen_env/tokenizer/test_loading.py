"""Folders, changed one thing at a time: what transformers loads, or a sentence."""

import copy
import itertools
import json
import logging
import os

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from qwen_env.errors import UsageError
from qwen_env.prompts import PromptEncoder, load_prompts
from qwen_env.tokenizer import load_tokenizer

TEXTS = [
    "the film was good",
    "  two  spaces, tabs\tand\n\nlines ",
    "isn't it naïve? 世界 🙂",
    "a turn<|im_end|>\nand <|im_start|> another <new>",
]
CHAT = [{"role": "user", "content": "hi"}]
VARIABLES = "|".join(
    f"{{{{ {name}_token }}}}" for name in ("bos", "eos", "pad", "unk", "sep", "image")
)
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def quiet():
    """transformers warns of what the tests put into the files."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def change(folder):
    """Write a file of the folder again, with changes."""

    def change(changes, name="tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    change({"bos_token": "<|endoftext|>", "unk_token": None, "chat_template": VARIABLES})
    (folder / "config.json").unlink()  # whose model_type chooses a class of tokenizers
    (folder / "generation_config.json").unlink()
    return change


def assert_like_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    encoder = PromptEncoder(ours, 10_000)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
        assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids
        (prompt,) = load_prompts([text], encoder)
        assert prompt.ids.tolist() == [*ours.prefix_ids, *ids]
    assert ours.vocab_size == len(theirs)
    assert (ours.pad_token_id, ours.bos_token_id) == (theirs.pad_token_id, theirs.bos_token_id)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    if theirs.chat_template:
        assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )


def added(backend, changes=None, **more):
    """`added_tokens_decoder` as it is written, with changed flags of some."""
    listed = {str(i): t.__getstate__() for i, t in backend.get_added_tokens_decoder().items()}
    for i, flags in (changes or {}).items():
        listed[i] = listed[i] | flags
    return {"added_tokens_decoder": listed | more}


NEW = {"content": "<new>", "special": True}
FIRST = {"content": "<|endoftext|>", "special": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"additional_special_tokens": ["the"]},
        {"additional_special_tokens": ["<|im_start|>"]},
        {"additional_special_tokens": ["<new>"]},
        {"extra_special_tokens": ["the", "<new>"]},
        {"extra_special_tokens": {"image_token": "<|im_start|>"}},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"image_token": "<|im_start|>"},
        {"image_token": "<new>"},
        {"pad_token": "<new>"},
        {"eos_token": "<new>"},
        {"eos_token": "the"},
        {"eos_token": None},
        {"sep_token": {"content": "<|im_start|>", "lstrip": True, "__type": "AddedToken"}},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 2},
        {"chat_template": None},
        {"chat_template": {"default": "D", "tool_use": "T"}},
        {"chat_template": [{"name": "default", "template": "D"}]},
        {"add_prefix_space": True},
        {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"},
        {"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "NoSuchTokenizer"},
        {"tokenizer_class": None},
        {"processor_class": "NoSuchProcessor", "legacy": False, "errors": "replace"},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
    ],
)
@pytest.mark.parametrize("ends", [None, "bos", "both"])
def test_configurations(folder, change, backend, changes, ends):
    change(changes)
    with_ends = tokenizers.Tokenizer.from_str(backend.to_str())
    if ends is not None:
        single = "<|endoftext|> $A" + " <|im_end|>" * (ends == "both")
        with_ends.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
        )
    with_ends.save(str(folder / "tokenizer.json"))
    assert_like_transformers(folder)


@pytest.mark.parametrize("flags", [{}, {"special": False}, {"lstrip": True}, {"normalized": True}])
def test_added_tokens(folder, change, backend, flags):
    change(added(backend, {"1": flags}))
    assert_like_transformers(folder)
    load_tokenizer(folder).save(folder)
    assert_like_transformers(folder)


def test_files_of_old_versions(folder, change):
    change({"eos_token": {"content": "<|endoftext|>"}}, "special_tokens_map.json")
    assert load_tokenizer(folder).eos_token_ids == (0,)
    assert_like_transformers(folder)
    change({"<new>": 294}, "added_tokens.json")
    assert "<new>" in load_tokenizer(folder).backend.get_vocab()
    assert_like_transformers(folder)


def test_chat_templates_in_files(folder, change):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(folder).apply_chat_template(CHAT, chat_template="rag") == "R"
    with pytest.raises(UsageError, match="multiple chat templates with no default"):
        load_tokenizer(folder).apply_chat_template(CHAT)  # the one in the configuration is outdone
    (folder / "chat_template.jinja").write_text("D")
    assert_like_transformers(folder)
    assert load_tokenizer(folder).apply_chat_template(CHAT) == "D"


@pytest.mark.parametrize(
    "kind", [models.WordPiece, models.Unigram, models.WordLevel, models.BPE], ids=str
)
@pytest.mark.parametrize("cleans", [True, False])
def test_tokenizers_of_other_kinds(tmp_path, kind, cleans):
    words = [
        "<unk>",
        "</s>",
        "▁the",
        "▁film",
        "▁",
        "the",
        "film",
        "##s",
        "was",
        "▁was",
        ".",
        "'",
        "n",
    ]
    vocab = {word: i for i, word in enumerate(words)}
    if kind is models.Unigram:
        backend = tokenizers.Tokenizer(kind([(word, -1.0) for word in words], 0, False))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind is models.BPE:
        backend = tokenizers.Tokenizer(kind(vocab, [], unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Replace("▁", " ")
    else:
        backend = tokenizers.Tokenizer(kind(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if kind is models.WordPiece:
            backend.decoder = decoders.WordPiece(cleanup=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": cleans}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert_like_transformers(tmp_path)
    text = "the film was . the films </s> n ' t"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(text).input_ids
    assert load_tokenizer(tmp_path).decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_folder_without_tokenizer_json(folder, backend, tmp_path):
    """transformers makes it of the older files."""
    model = json.loads(backend.to_str())["model"]
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"no tokenizer.json, and .*there is no vocab.json"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    with pytest.raises(UsageError, match=r"no tokenizer.json, and .*must be both"):
        load_tokenizer(folder)
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text) for text in TEXTS] == theirs(TEXTS).input_ids
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again.encode(text) for text in TEXTS] == theirs(TEXTS).input_ids


def test_a_tokenizer_written_in_python(tmp_path):
    theirs = transformers.ByT5Tokenizer()
    ours = load_tokenizer(theirs)
    ours.save(tmp_path)
    for tokenizer in (ours, load_tokenizer(tmp_path)):
        for text in ("naïve 世界", "a</s>b"):
            ids = tokenizer.encode(text)
            assert ids == theirs(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert (tokenizer.eos_token_ids, tokenizer.pad_token_id) == ((1,), 0)
        assert tokenizer.vocab_size == len(theirs)
        assert tokenizer.prefix_ids == ()
        with pytest.raises(UsageError, match="the text cannot be encoded"):
            tokenizer.encode("\ud83d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 5}, r"eos_token in .*_config.json is 5; it must be the text of a token"),
        ({"pad_token": ["a"]}, r"pad_token in .* is \['a'\]; it must be"),
        ({"bos_token": {"content": 3}}, "bos_token in .* must be the text"),
        ({"added_tokens_decoder": {"0": 5}}, "added_tokens_decoder in .* must give each id an"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder in .* must give each id an"),
        ({"added_tokens_decoder": {"5": FIRST}}, "'<|endoftext|>' has the id 5, but .* it 0"),
        ({"added_tokens_decoder": {"0": FIRST, "999": NEW}}, "'<new>' has the id 999, but"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "names fast_tokenizer_files; only"),
        ({"extra_special_tokens": 5}, "that transformers cannot load: extra_special_tokens must"),
        ({"extra_special_tokens": [5]}, "that transformers cannot load: "),
        ({"chat_template": 3}, "chat_template is 3; it must be a template"),
        ({"chat_template": [1]}, "chat_template is a list; each entry must have a 'name'"),
        ({"chat_template": {"default": 3}}, "it must be a template, or several by name"),
    ],
)
def test_configurations_that_cannot_be_followed(folder, change, changes, message):
    change(changes)
    with pytest.raises(UsageError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/x.jinja",
    ],
)
def test_files_that_are_none(folder, change, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UsageError, match=f"{name} is a pipe; it must be a file"):
        load_tokenizer(folder)
    path.unlink()
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UsageError, match=f"{name} is not"):
        load_tokenizer(folder)


def test_two_tokens_with_one_id(folder, backend):
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["twin"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="the tokenizer has two tokens with one id"):
        load_tokenizer(folder)


def test_an_id_that_would_take_all_the_memory(folder, backend):
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["far"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="a token with the id 4294967295, over the limit"):
        load_tokenizer(folder)


def places(content, place=()):
    """Where something is in nested objects and lists."""
    if place:
        yield place
    if isinstance(content, dict):
        items = sorted(content.items())
    else:
        items = list(enumerate(content)) if isinstance(content, list) else []
    for key, value in items[:20]:
        yield from places(value, (*place, key))


VALUES = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**31, 2**40, 1e308, "", "a", "<|im_end|>", "▁", "(a+)+$", "[",
     [], {}, [1], ["a"], "ByteLevel", "Metaspace"]
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_random_changes(folder, backend, tmp_path, data):
    """A sentence, or a tokenizer that can be used, saved and loaded again."""
    files = {
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": json.loads((folder / "tokenizer_config.json").read_text())
        | added(backend)
        | {"additional_special_tokens": ["<|im_start|>"], "extra_special_tokens": {}},
        "generation_config.json": {"eos_token_id": [2, 0]},
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
    }
    where = tmp_path / str(next(NUMBERS))
    where.mkdir()
    changed = data.draw(st.sampled_from(list(files)))
    for name, content in files.items():
        content = copy.deepcopy(content)
        for _ in range(data.draw(st.integers(1, 2)) if name == changed else 0):
            *path, last = data.draw(st.sampled_from(list(places(content))))
            target = content
            for key in path:
                target = target[key]
            if data.draw(st.booleans()):
                target[last] = copy.deepcopy(data.draw(VALUES))  # it may be changed in turn
            else:
                del target[last]
            if not content:
                break
        (where / name).write_text(json.dumps(content))
    try:
        ours = load_tokenizer(where)
        (prompt, _) = load_prompts(TEXTS[:2], PromptEncoder(ours, 10_000))
    except UsageError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    ours.decode(prompt.ids)
    ours.save(where / "again")
    assert load_tokenizer(where / "again").encode(TEXTS[0]) == ours.encode(TEXTS[0])
