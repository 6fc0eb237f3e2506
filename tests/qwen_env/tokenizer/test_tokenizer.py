import copy
import json
import pickle

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer, load_tokenizer

STRINGS = [
    "the film was good",
    "  two  spaces, tabs\tand\n\nlines ",
    "isn't it naïve? 世界 🙂",
    "a turn<|im_end|>\nand <|im_start|> another",
    "",
]
CHAT = [
    {"role": "user", "content": "is it good? <b>"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "naïve"},
]


def assert_same_tokenizer(ours, theirs):
    for text in STRINGS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.vocab_size == len(theirs)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids[0] == theirs.eos_token_id


def test_it_is_what_transformers_loads_also_after_saving(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder))
    assert_same_tokenizer(tokenizer, transformers.AutoTokenizer.from_pretrained(folder))
    tokenizer.save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert_same_tokenizer(tokenizer, again)
    assert_same_tokenizer(load_tokenizer(tmp_path / "again"), again)
    for chat in (CHAT, CHAT[:1]):
        for add_generation_prompt in (True, False):
            assert tokenizer.apply_chat_template(
                chat, add_generation_prompt=add_generation_prompt
            ) == again.apply_chat_template(
                chat, add_generation_prompt=add_generation_prompt, tokenize=False
            )


def test_the_pocket_tokenizer_is_what_transformers_loads(tmp_path):
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    assert_same_tokenizer(
        tokenizer, transformers.AutoTokenizer.from_pretrained(pocket.POLICY_FOLDER)
    )
    tokenizer.save(tmp_path)
    assert_same_tokenizer(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_of_transformers_is_taken_as_it_is(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(theirs)
    assert_same_tokenizer(ours, theirs)
    assert ours.chat_template == theirs.chat_template
    assert load_tokenizer(ours) is ours


def test_truncation_and_padding_are_left_behind(folder, tmp_path):
    """A tokenizer keeps those of its last call, and saves them."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a", "the film was good"]
    ids = [theirs(text).input_ids for text in texts]
    before = load_tokenizer(theirs)
    theirs(texts, truncation=True, padding="max_length", max_length=2)
    theirs.save_pretrained(tmp_path / "saved")
    for ours in (
        before,
        load_tokenizer(theirs),
        load_tokenizer(theirs.backend_tokenizer),
        load_tokenizer(tmp_path / "saved"),
    ):
        assert [ours.encode(text) for text in texts] == ids
    assert theirs.backend_tokenizer.padding["length"] == 2, "theirs is theirs"


def test_end_of_sequence_ids_come_from_the_nearest_file(folder):
    assert load_tokenizer(folder).eos_token_ids == (2, 0)
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (2,)
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(folder).eos_token_ids == (1,)
    (folder / "config.json").write_text("{}")
    assert load_tokenizer(folder).eos_token_ids == (2,), "tokenizer_config.json's eos_token"


def test_a_bare_backend_has_no_special_roles(backend):
    tokenizer = load_tokenizer(backend)
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.pad_token_id is None
    assert tokenizer.chat_template is None


def test_several_chat_templates(folder, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = {"tool_use": "t", "default": "d"}
    ours = load_tokenizer(theirs)
    assert ours.chat_template == "d"
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "d"
    theirs.chat_template = {"tool_use": "t"}
    assert load_tokenizer(theirs).chat_template is None


def test_where_the_chat_template_may_stand(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert load_tokenizer(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(folder).chat_template == "from a file"


def test_special_tokens_reach_the_template(folder):
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template(
        CHAT, chat_template="{{ eos_token }} {{ pad_token }} {{ mood }}", mood="fine"
    )
    assert text == "<|im_end|> <|endoftext|> fine"


def test_copies(folder):
    tokenizer = load_tokenizer(folder)
    assert copy.deepcopy(tokenizer) is tokenizer
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the film") == tokenizer.encode("the film")
    assert again.eos_token_ids == tokenizer.eos_token_ids


def test_ids_without_text_decode_to_nothing(backend):
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([*tokenizer.encode("a"), 10**6]) == "a"
    assert tokenizer.decode([]) == ""


def test_wrong_sources(folder, tmp_path):
    with pytest.raises(UsageError, match="tokenizer is a int"):
        load_tokenizer(3)
    with pytest.raises(UsageError, match=r"has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"generation_config.json is not JSON"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(UsageError, match="holds a list; it must hold an object"):
        load_tokenizer(folder)
    with pytest.raises(UsageError, match=r"tokenizer.json is a file; name the folder"):
        load_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"eos_token_id": "abc"}, r"eos_token_id in .*config.json is 'abc'; it"),
        ("config.json", {"eos_token_id": [0, None]}, "is None; it must be an integer"),
        ("config.json", {"eos_token_id": True}, "is True; it must be an integer"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template is a list; "),
        ("tokenizer_config.json", {"chat_template": ["a"]}, "chat_template is a list; each entry"),
    ],
)
def test_wrong_files(folder, name, content, message):
    (folder / "generation_config.json").unlink()
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        load_tokenizer(folder)


def test_tokenizers_that_cannot_be_used():
    untrained = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(UsageError, match="has no tokens; train it first"):
        load_tokenizer(untrained)
    untrained.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(UsageError, match=r"the tokenizer cannot be copied: .*Custom"):
        load_tokenizer(untrained)
