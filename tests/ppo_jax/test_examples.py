"""Rows as texts to learn from: which tokens, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from ppo_jax.examples import Example, ExampleEncoder, load_examples, set_apart
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.prompts import PromptEncoder
from qwen_env.tokenizer import Tokenizer, load_tokenizer

# As Qwen2.5's, with the pocket task's end of sequence behind each message.
CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
<assistant>
    {%- generation -%}
    {{ message.content }}<|endoftext|>
    {%- endgeneration %}
{% else %}
<{{ message.role }}>{{ message.content }}
{% endif %}
{%- endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def with_template() -> Callable[[str | None], Tokenizer]:
    plain = load_tokenizer(pocket.POLICY_FOLDER)

    def make(template: str | None) -> Tokenizer:
        config = plain.config | ({} if template is None else {"chat_template": template})
        return Tokenizer(plain.backend, eos_token_ids=plain.eos_token_ids, config=config)

    return make


def encoder(tokenizer: Tokenizer, max_length: int | None = None, **settings: Any) -> ExampleEncoder:
    return ExampleEncoder(PromptEncoder(tokenizer, 1000, **settings), max_length)


def learnt(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.ids[example.is_learnt], skip_special_tokens=False)


def whole(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.ids, skip_special_tokens=False)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [
    message("user", "The plot"),
    message("assistant", "was dull."),
    message("user", "And the songs?"),
    message("assistant", "I liked them."),
]


def test_an_answer_follows_its_prompt_and_ends(with_template: Any) -> None:
    tokenizer = with_template(None)
    row = {"prompt": "The plot", "completion": " was dull."}
    example = encoder(tokenizer).example(row, "here")
    prompt = PromptEncoder(tokenizer, 100).encode({"prompt": "The plot"}, 0, "here")
    assert prompt is not None
    np.testing.assert_array_equal(example.ids[: len(prompt.ids)], prompt.ids)
    assert not example.is_learnt[: len(prompt.ids)].any()
    assert learnt(tokenizer, example) == " was dull.<|endoftext|>"
    ended = {"prompt": "The plot", "completion": " was dull.<|endoftext|>"}
    again = encoder(tokenizer).example(ended, "here")
    np.testing.assert_array_equal(again.ids, example.ids)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT[:2]},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": "The plot", "completion": "was dull."},
    ],
    ids=["messages", "lists of messages", "texts"],
)
def test_a_chat_is_rendered_as_the_environment_does(row: Any, with_template: Any) -> None:
    tokenizer = with_template(CHATML)
    example = encoder(tokenizer, chat_template=True).example(row, "here")
    prompt = PromptEncoder(tokenizer, 100).encode({"messages": CHAT[:1]}, 0, "here")
    assert prompt is not None
    np.testing.assert_array_equal(example.ids[: len(prompt.ids)], prompt.ids)
    assert learnt(tokenizer, example) == "was dull.<|endoftext|>"
    assert whole(tokenizer, example).endswith("<assistant>was dull.<|endoftext|>")


def test_all_of_the_assistants_turns_are_learnt(with_template: Any) -> None:
    tokenizer = with_template(CHATML)
    row = {"messages": [*CHAT, message("user", "Thanks")]}
    example = encoder(tokenizer, system_prompt="Be brief").example(row, "here")
    assert learnt(tokenizer, example) == "was dull.<|endoftext|>I liked them.<|endoftext|>"
    text = tokenizer.apply_chat_template([message("system", "Be brief"), *CHAT])
    assert text.startswith(whole(tokenizer, example))
    answers = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    last = encoder(tokenizer, system_prompt="Be brief").example(answers, "here")
    assert learnt(tokenizer, last) == "I liked them.<|endoftext|>"
    np.testing.assert_array_equal(last.ids, example.ids)


def test_turns_that_a_template_rewrites_are_only_read(with_template: Any) -> None:
    """As Qwen3's, which drops what was thought in earlier turns."""
    only_last = "{{ message.content if loop.last or message.role == 'user' else '' }}"
    forgets = CHATML.replace("{{ message.content }}", only_last)
    tokenizer = with_template(forgets)
    example = encoder(tokenizer).example({"messages": CHAT}, "here")
    assert learnt(tokenizer, example) == "I liked them.<|endoftext|>"


def test_a_template_that_writes_no_end_is_given_one(with_template: Any) -> None:
    tokenizer = with_template(CHATML.replace("<|endoftext|>", ""))
    example = encoder(tokenizer).example({"messages": CHAT[:2]}, "here")
    assert learnt(tokenizer, example) == "was dull.<|endoftext|>"


def test_generation_marks_say_the_same_as_in_transformers(
    with_template: Any, tmp_path: Path
) -> None:
    tokenizer = with_template(MARKED)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encoder(tokenizer).example({"messages": CHAT}, "here")
    count = len(example.ids)  # theirs goes on with what nobody learns
    assert example.ids.tolist() == theirs["input_ids"][:count]
    assert example.is_learnt.tolist() == [x == 1 for x in theirs["assistant_masks"][:count]]
    assert not any(theirs["assistant_masks"][count:])
    assert learnt(tokenizer, example) == "was dull.<|endoftext|>I liked them.<|endoftext|>"


def test_a_text_that_is_too_long_loses_its_end(with_template: Any) -> None:
    tokenizer = with_template(None)
    row = {"prompt": "The plot", "completion": " was dull, and I liked the songs."}
    example = encoder(tokenizer).example(row, "here")
    cut = encoder(tokenizer, max_length=4).example(row, "here")
    np.testing.assert_array_equal(cut.ids, example.ids[:4])
    assert cut.is_cut and not example.is_cut


def test_pairs_keep_their_end(with_template: Any) -> None:
    tokenizer = with_template(None)
    row = {"prompt": "The plot", "chosen": " was fine.", "rejected": " was dull.", "margin": 2}
    pair = encoder(tokenizer).pair(row, "here")
    assert whole(tokenizer, pair.chosen) == "The plot was fine.<|endoftext|>"
    assert pair.margin == 2.0
    cut = encoder(tokenizer, max_length=3).pair(row, "here")
    np.testing.assert_array_equal(cut.chosen.ids, pair.chosen.ids[-3:])
    texts = {"chosen": "The plot was fine.", "rejected": "The plot was dull."}
    alone = encoder(tokenizer).pair(texts, "here", ends=lambda: False)
    assert whole(tokenizer, alone.rejected) == "The plot was dull."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": [message("assistant", "was fine.")]},
        {"messages": CHAT[:1], "chosen": "was dull.", "rejected": "was fine."},
        {"chosen": CHAT[:2], "rejected": [CHAT[0], message("assistant", "was fine.")]},
    ],
)
def test_pairs_of_chats(row: Any, with_template: Any) -> None:
    tokenizer = with_template(CHATML)
    pair = encoder(tokenizer).pair(row, "here")
    expected = "<user>The plot<|endoftext|>\n<assistant>was {}.<|endoftext|>"
    assert whole(tokenizer, pair.chosen) == expected.format("dull")
    assert whole(tokenizer, pair.rejected) == expected.format("fine")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", "is a str; it must be an object with 'prompt' and 'completion'"),
        ({"prompt": "The plot"}, "has no 'completion'; its keys are 'prompt'"),
        ({"completion": " was dull."}, "has no 'prompt'"),
        ({"prompt": "The plot", "completion": " "}, "holds an empty answer"),
        ({"prompt": 7, "completion": "x"}, "both must be text, or lists of messages"),
        ({"messages": []}, "answers nothing in this chat"),
        ({"messages": [message("user", "a")]}, "answers nothing in this chat"),
        ({"messages": [message("assistant", "a")]}, "answers nothing in this chat"),
        ({"messages": "a"}, "a chat is a list of messages"),
        ({"messages": [message("user", "a"), message("assistant", "")]}, "message 1.* is empty"),
        ({"prompt": "The plot was very good", "completion": "x"}, r"within max_length \(4\)"),
    ],
)
def test_rows_that_teach_nothing(row: Any, words: str, with_template: Any) -> None:
    with pytest.raises(UsageError, match=rf"^line 3 of a\.jsonl.*{words}"):
        encoder(with_template(CHATML), max_length=4).example(row, "line 3 of a.jsonl")


def test_a_chat_without_a_template(with_template: Any) -> None:
    with pytest.raises(UsageError, match=r"line 3 of a\.jsonl: the tokenizer has no chat template"):
        encoder(with_template(None)).example({"messages": CHAT}, "line 3 of a.jsonl")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "holds an empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "'margin' of -1"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "'margin' of 'x'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}, "'margin' of inf"),
        (
            {"chosen": "I liked the music.", "rejected": "You liked the music."},
            r"differ only beyond max_length \(3\)",
        ),
    ],
)
def test_pairs_without_a_difference(row: Any, words: str, with_template: Any) -> None:
    with pytest.raises(UsageError, match=rf"^line 3 of a\.jsonl.*{words}"):
        encoder(with_template(None), max_length=3).pair(row, "line 3 of a.jsonl")


def test_rows_of_a_file_are_named(with_template: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    encode = encoder(with_template(None)).example
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + '\n\n{"prompt": "a"}\n')
    with pytest.raises(UsageError, match=rf"line 3 of {path} has no 'completion'"):
        load_examples(path, encode)
    with pytest.raises(UsageError, match=r"data\[0\] has no 'completion'"):
        load_examples([{"prompt": "a"}], encode)
    path.write_text("")
    with pytest.raises(UsageError, match="holds no rows"):
        load_examples(path, encode)
    with pytest.raises(UsageError, match="no such file"):
        load_examples(tmp_path / "b.jsonl", encode)


def test_the_last_tenth_is_held_out(with_template: Any) -> None:
    encode = encoder(with_template(None)).example
    items = load_examples([{"prompt": "a", "completion": f"b{i}"} for i in range(25)], encode)
    training, held_out = set_apart(items, "data")
    assert (training, held_out) == (items[:23], items[23:])
    with pytest.raises(UsageError, match="holds one row"):
        set_apart(items[:1], "data")
