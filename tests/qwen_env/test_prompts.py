import os

import datasets
import numpy as np
import pandas
import pytest

from qwen_env.errors import UsageError
from qwen_env.prompts import PromptEncoder, load_prompts
from qwen_env.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def load(folder):
    tokenizer = load_tokenizer(folder)

    def load(source, **arguments):
        encoder = PromptEncoder(tokenizer, **({"max_prompt_length": 30} | arguments))
        return load_prompts(source, encoder)

    load.tokenizer = tokenizer
    return load


def test_jsonl_keeps_every_column(load, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the film", "stars": 4}\n\n{"prompt": "é"}\n')
    first, second = load(str(path))
    assert (first.text, first.row, first.index) == (
        "the film", {"prompt": "the film", "stars": 4}, 0,
    )  # fmt: skip
    assert (first.ids.dtype, first.ids.tolist()) == ("int32", load.tokenizer.encode("the film"))
    assert (second.text, second.index) == ("é", 1)
    assert len(load(path)) == 2


def test_the_same_rows_from_a_list_and_from_a_dataset(load):
    rows = [{"prompt": "the film", "stars": 4}, {"prompt": "a plot", "stars": 1}]
    for source in (rows, datasets.Dataset.from_list(rows), iter(rows)):
        prompts = load(source)
        assert [prompt.row for prompt in prompts] == rows
        assert [prompt.text for prompt in prompts] == ["the film", "a plot"]
    assert [prompt.text for prompt in load(["the film", "a plot"])] == ["the film", "a plot"]
    assert [prompt.text for prompt in load(rows)[1:]] == ["a plot"]


def test_chats_go_through_the_template(load):
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (prompt,) = load([{"messages": CHAT}])
    assert prompt.text == expected
    assert prompt.ids.tolist() == load.tokenizer.encode(expected)
    (prompt,) = load([{"messages": CHAT}], system_prompt="yes", max_prompt_length=60)
    assert prompt.text == "<|im_start|>system\nyes<|im_end|>\n" + expected


def test_a_prompt_keeps_its_row_whatever_becomes_of_the_source(load):
    rows = [{"prompt": "the film", "stars": 4}]
    (prompt,) = load(rows)
    rows[0]["stars"] = 1
    assert prompt.row == {"prompt": "the film", "stars": 4}


def test_a_limit_of_a_small_integer_type(load):
    assert load(["the film"], max_prompt_length=np.uint8(32))[0].text == "the film"
    with pytest.raises(UsageError, match="over the limit of 32"):
        load(["it is " * 200], max_prompt_length=np.uint8(32))


def test_text_becomes_a_message_only_on_request(load):
    assert load(["hi"])[0].text == "hi"
    assert load(["hi"], chat_template=True)[0].text == load([{"messages": CHAT}])[0].text
    template = "Q: {{ messages[0].content }}\nA:"
    assert load(["hi"], chat_template=template)[0].text == "Q: hi\nA:"


def test_rows_may_hold_variables_for_the_template(load):
    template = "{{ mood }} {{ messages[0].content }}"
    row = {"messages": CHAT, "chat_template_kwargs": {"mood": "good"}}
    assert load([row], chat_template=template)[0].text == "good hi"


def test_variables_for_every_template_which_a_row_may_change(load):
    template = "{{ mood }} {{ place }} {{ messages[0].content }}"
    rows = [{"messages": CHAT}, {"messages": CHAT, "chat_template_kwargs": {"mood": "bad"}}]
    prompts = load(
        rows, chat_template=template, chat_template_kwargs={"mood": "good", "place": "here"}
    )
    assert [prompt.text for prompt in prompts] == ["good here hi", "bad here hi"]


def test_chats_from_a_dataset_whose_rows_differ(load):
    """A dataset has every column in every row; what a row does not have is None."""
    rows = [
        {
            "messages": CHAT,
            "prompt": None,
            "stars": 4,
            "chat_template_kwargs": {"mood": "good"},
        },
        {"prompt": "plain"},
        {"messages": [{"role": "system", "content": "s"}, *CHAT]},
    ]
    prompts = load(
        datasets.Dataset.from_list(rows), chat_template="{{ mood }}{{ messages | length }}"
    )
    assert [prompt.text for prompt in prompts] == ["good1", "1", "2"]
    assert prompts[0].row["stars"] == 4
    assert prompts[1].row["prompt"] == "plain"


def test_a_file_with_a_byte_order_mark(load, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "é"}', encoding="utf-8-sig")
    assert load(tmp_path / "p.jsonl")[0].text == "é"


def test_prompts_that_are_encoded_already_keep_the_limit_too(load):
    prompts = load(["the film was good"])
    assert load(prompts) is prompts
    with pytest.raises(UsageError, match=r"a prompt of .* tokens, over the limit of 1; raise"):
        load(prompts, max_prompt_length=1)


def test_overflow(load):
    source = ["the film was good", "bad"]
    full = load(source)[0].ids
    limit = len(full) - 2
    kept = load(source, max_prompt_length=limit, overflow="drop")
    assert ([p.index for p in kept], kept.num_dropped) == ([1], len(source) - 1)
    assert load(source, max_prompt_length=30, overflow="drop").num_dropped == 0
    cut = load(source, max_prompt_length=limit, overflow="truncate_left")[0]
    assert cut.ids.tolist() == full[2:].tolist()
    assert load.tokenizer.encode(cut.text) == cut.ids.tolist()
    message = f"prompts.0. holds a prompt of {len(full)} tokens, over the limit of {limit}"
    with pytest.raises(UsageError, match=message):
        load(source, max_prompt_length=limit)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .*p.jsonl is not JSON"),
        ("3", "line 2 of .*p.jsonl is a int"),
        (
            '{"text": "a", "stars": 1}',
            "line 2 of .*'prompt'.*'messages'.*its keys are 'text'",
        ),
        ("{}", "its keys are none"),
        ('{"prompt": 3}', "line 2 of .* has a 'prompt' that is 3; it must be text"),
        ('{"prompt": null}', "line 2 of .* has a 'prompt' that is None"),
        (
            '{"prompt": [{"role": "user", "content": "hi"}]}',
            "line 2 of .* it must be text .a chat goes under 'messages'.",
        ),
        ('{"prompt": "\\ud800"}', "line 2 of .* not valid Unicode text"),
        ('{"messages": "hi"}', "line 2 of .*: messages is a str; it must be a list"),
        ('{"messages": {"role": "user"}}', "line 2 of .*: messages is a dict; it must be a list"),
        (
            '{"messages": [{"role": "user"}], "chat_template_kwargs": 3}',
            "chat_template_kwargs of line 2",
        ),
        ('{"prompt": ""}', "line 2 of .* holds an empty prompt"),
        ('{"messages": []}', "line 2 of .*: messages is empty"),
        ('{"messages": [{}]}', "line 2 of .*: message 0"),
        ('{"prompt": "\u00e9"}', "line 2 of .*p.jsonl is not UTF-8 text: .*0xe9"),
        ('\u00ef\u00bb\u00bf{"prompt": "b"}', "line 2 of .*p.jsonl is not JSON: .*BOM"),
    ],
)
def test_wrong_lines_are_named(load, tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match=message):
        load(path)


def test_long_values_are_not_printed_whole(load):
    long = ["word " * 10_000] * 50
    for source, arguments in (
        ([{"prompt": long}], {}),
        (["a"], {"system_prompt": long}),
        (["a"], {"chat_template": long}),
        (["a"], {"chat_template_kwargs": long}),
    ):
        with pytest.raises(UsageError) as caught:
            load(source, **arguments)
        assert len(str(caught.value)) < 400


def test_a_pipe_is_a_file(load):
    """As in --prompts <(head -5 prompts.jsonl)."""
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "the film"}\n{"prompt": "a"}\n')
    os.close(writer)
    try:
        assert [p.text for p in load(f"/dev/fd/{reader}")] == ["the film", "a"]
    finally:
        os.close(reader)


def test_wrong_sources(load, tmp_path):
    with pytest.raises(UsageError, match=rf"{tmp_path} is a folder; name a .jsonl file"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"none.jsonl: no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"empty.jsonl holds no prompts.$"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="prompts holds no prompts of at most 1 tokens"):
        load(["the film was"], max_prompt_length=1, overflow="drop")
    with pytest.raises(UsageError, match="prompts is a dict"):
        load({"prompt": "a"})
    with pytest.raises(UsageError, match="prompts is a set, whose order no seed can repr"):
        load({"a", "b"})
    frame = pandas.DataFrame({"prompt": ["a", "b"]})
    with pytest.raises(UsageError, match=r"prompts is a DataFrame; .* df.to_dict\('records'\)"):
        load(frame)
    assert [prompt.text for prompt in load(frame.to_dict("records"))] == ["a", "b"]
    assert [prompt.text for prompt in load(frame["prompt"])] == ["a", "b"]
    with pytest.raises(UsageError, match="prompts is a int"):
        load(3)
    with pytest.raises(UsageError, match=r"prompts\[1\] is a int"):
        load(["a", 3])


def test_wrong_arguments(load, backend):
    with pytest.raises(UsageError, match="prompt_overflow is 'cut'; it must be one of 'error'"):
        load(["a"], overflow="cut")
    with pytest.raises(UsageError, match=r"prompts\[0\] is plain text, which takes no system"):
        load(["a"], system_prompt="b")
    with pytest.raises(UsageError, match=r"prompts\[0\] holds chat messages"):
        load([{"messages": CHAT}], chat_template=False)
    with pytest.raises(UsageError, match=r"prompts\[0\]: the tokenizer has no chat template"):
        load_prompts([{"messages": CHAT}], PromptEncoder(load_tokenizer(backend), 9))
    for name in ("self", "template"):
        with pytest.raises(UsageError, match=f"holds '{name}', which is set elsewhere"):
            load([{"messages": CHAT}], chat_template_kwargs={name: "x"})
