import json
import os
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pandas
import pytest
import tokenizers
import transformers
from tokenizers import processors

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
        ('{"prompt": "a", "prompt": "b"}', "line 2 of .* holds 'prompt' twice; leave one out"),
        ('{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "line 2 of .* holds 'y' twice"),
        ('{"prompt": "a", "x": ' + "[" * 10**5, "line 2 of .* is not JSON: it is nested too deep"),
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
    words = r"There is a system_prompt, but prompts\[0\] is plain text .*--chat"
    with pytest.raises(UsageError, match=words):
        load(["a"], system_prompt="b")
    with pytest.raises(UsageError, match=r"prompts\[0\] holds chat messages"):
        load([{"messages": CHAT}], chat_template=False)
    with pytest.raises(UsageError, match=r"prompts\[0\]: the tokenizer has no chat template"):
        load_prompts([{"messages": CHAT}], PromptEncoder(load_tokenizer(backend), 9))
    for name in ("self", "template", "messages", "tokenize", "padding", "return_dict"):
        with pytest.raises(UsageError, match=f"holds '{name}', which is set elsewhere"):
            load([{"messages": CHAT}], chat_template_kwargs={name: "x"})


def with_bos(backend):
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return backend


def test_a_text_begins_as_its_model_expects_and_never_twice(backend):
    backend = with_bos(backend)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>"
    )
    tokenizer = load_tokenizer(theirs)

    def ids(source, **arguments):
        encoder = PromptEncoder(tokenizer, **({"max_prompt_length": 30} | arguments))
        (prompt,) = load_prompts(source, encoder)
        return prompt.ids.tolist()

    text = "the film was good"
    expected = theirs(text).input_ids
    assert ids([text]) == ids(["<|endoftext|>" + text]) == expected
    assert expected[0] == 0 != expected[1]
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        chat = theirs.apply_chat_template(CHAT, chat_template=template, return_dict=False)
        assert ids([{"messages": CHAT}], chat_template=template) == chat
    limit = len(expected) - 2
    with pytest.raises(UsageError, match=f"of {len(expected)} tokens, over the limit of {limit}"):
        ids([text], max_prompt_length=limit)
    theirs.truncation_side = "left"
    cut = theirs(text, truncation=True, max_length=limit).input_ids
    for written in (text, "<|endoftext|>" + text):
        assert ids([written], max_prompt_length=limit, overflow="truncate_left") == cut
    with pytest.raises(UsageError, match="whose last character alone is over the limit of 1"):
        ids([text], max_prompt_length=1, overflow="truncate_left")


def test_a_cut_prompt_begins_with_a_whole_character(load):
    text = "a\N{GRINNING FACE} the plot"
    whole = load([text])[0].ids.tolist()
    rest = load.tokenizer.encode(" the plot")
    for limit in range(len(rest), len(whole)):
        (prompt,) = load([text], max_prompt_length=limit, overflow="truncate_left")
        assert prompt.ids.tolist() == load.tokenizer.encode(prompt.text)
        assert text.endswith(prompt.text)
    assert prompt.text == text[1:], "the last one keeps all but the first letter"
    (prompt,) = load(["a\ufffd\ufffdb"], max_prompt_length=4, overflow="truncate_left")
    assert prompt.text == "\ufffdb", "written as such"
    with pytest.raises(UsageError, match=r"prompts\[0\] .* last character alone .* limit of 3"):
        load(["a\N{GRINNING FACE}"], max_prompt_length=3, overflow="truncate_left")


def test_the_last_message_may_be_left_open(load):
    messages = [*CHAT, {"role": "assistant", "content": "The plot"}]
    (prompt,) = load(
        [{"messages": messages}], chat_template_kwargs={"continue_final_message": True}
    )
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe plot"


def test_tools_may_stand_in_a_column_of_their_own(load):
    template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{{ messages[0].content }}"
    rows = [
        {"messages": CHAT, "tools": [{"name": "look"}]},
        {"messages": CHAT, "tools": None},
        {"messages": CHAT, "tools": ["a column of somebody's own"]},
        {
            "messages": CHAT,
            "tools": [{"name": "look"}],
            "chat_template_kwargs": {"tools": [{"name": "run"}]},
        },
    ]
    prompts = load(rows, chat_template=template)
    assert [prompt.text for prompt in prompts] == ["look hi", "hi", "hi", "run hi"]


def test_what_a_dataset_fills_in_is_left_out(load, tmp_path):
    """Its objects all have the keys of all; a template would print None for those left out."""

    def tool(name, **properties):
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    rows = [
        {
            "messages": [*CHAT, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "tools": [tool("look", place={"type": "string"})],
            "chat_template_kwargs": {"mood": {"a": 1}},
        },
        {
            "messages": CHAT,
            "tools": [tool("wait", time={"type": "number"}, unit={"enum": ["s"]})],
            "chat_template_kwargs": {"mood": {"b": 2}},
        },
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = datasets.Dataset.from_list(rows)
    arguments = {
        "chat_template": "{{ [tools, mood, messages] | tojson(sort_keys=true) }}",
        "max_prompt_length": 999,
    }
    expected = [prompt.text for prompt in load(rows, **arguments)]
    assert "null" not in expected[0]
    for source in (path, dataset, dataset.to_iterable_dataset()):
        prompts = load(source, **arguments)
        assert [prompt.text for prompt in prompts] == expected
        assert [prompt.row for prompt in prompts] == rows


@pytest.mark.parametrize("overflow", ["drop", "error", "truncate_left"])
def test_a_huge_prompt_takes_no_more_than_a_few_times_its_size(tmp_path, overflow):
    size = 2 * 10**7
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "the plot " * (size // 9)}) + '\n{"prompt": "a"}\n')
    code = f"""
        import resource
        from qwen_env import pocket
        from qwen_env.prompts import PromptEncoder, load_prompts
        from qwen_env.tokenizer import load_tokenizer
        encoder = PromptEncoder(load_tokenizer(pocket.POLICY_FOLDER), 64, overflow={overflow!r})
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        try:
            print([prompt.text[-9:] for prompt in load_prompts({str(path)!r}, encoder)])
        except ValueError as error:
            print(error)
        print((peak() - before) * 1024 // {size})
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    said, growth = run.stdout.splitlines()
    assert int(growth) < 10
    assert {"drop": "['a']", "truncate_left": "['the plot ', 'a']", "error": "at least"}[
        overflow
    ] in said


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "link"])
def test_what_is_no_file(load, tmp_path, kind):
    path = tmp_path / "p.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "none")
    else:
        path = kind
    with pytest.raises(UsageError, match=r"is a (pipe|device|link .*); name a .jsonl file"):
        load(path)


def test_odd_names_of_files(load, tmp_path):
    path = tmp_path / "tést 😀 [x] %20 .jsonl"
    path.write_text('{"prompt": "a"}')
    assert load(path)[0].text == "a"
    for name, message in (
        ("~nobody-here/p.jsonl", "no such user"),
        ("x" * 999, "too long"),
        ("a\0", "null"),
    ):
        with pytest.raises(UsageError, match=message):
            load(name)
