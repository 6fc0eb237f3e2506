"""Replies as tokens: against the whole conversation, rendered at once by transformers."""

import os
import random
import unicodedata
from functools import partial

import numpy as np
import pytest

from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.interaction import Reply
from qwen_env.prompts import PromptEncoder
from qwen_env.replies import ReplyEncoder
from qwen_env.tokenizer import load_tokenizer

EOS, OTHER_EOS = 2, 0  # <|im_end|>, <|endoftext|>
QWEN = (  # the part of Qwen2.5's template that matters here
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def make_encoder(folder):
    def make(template=QWEN, **changes):
        tokenizer = load_tokenizer(folder)
        prompt_encoder = PromptEncoder(tokenizer, 200, chat_template=template, **changes)
        rules = mdp.Rules(200, 100, tokenizer.vocab_size, (EOS, OTHER_EOS), max_turns=3)
        return ReplyEncoder(prompt_encoder, rules)

    return make


TALKS = [
    [[{"role": "user", "content": "the plot"}]],
    [[{"role": "tool", "content": "42"}], [{"role": "user", "content": "bad film"}]],
    [[{"role": "tool", "content": "a\nb"}, {"role": "tool", "content": "naïve 雪"}]],
    [[{"role": "user", "content": "\n good\n"}], [{"role": "tool", "content": "<|im_end|>"}]],
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("system_prompt", [None, "it was"])
def test_turn_by_turn_it_is_the_conversation_rendered_at_once(make_encoder, talk, system_prompt):
    encoder = make_encoder(system_prompt=system_prompt)
    tokenizer = encoder.prompt_encoder.tokenizer
    row = {"messages": [{"role": "user", "content": "the film was"}]}
    prompt = encoder.prompt_encoder.encode(row, 0, "a row")
    ids, messages = prompt.ids.tolist(), list(row["messages"])
    for number, new in enumerate(talk):
        said = f"fine {number}"
        ids += [*tokenizer.encode(said), EOS]
        heard, more = encoder.encode(prompt, Reply(messages=new), ended_by_eos=True)
        ids += more
        assert heard == new
        messages += [{"role": "assistant", "content": said}, *new]
    whole = encoder.prompt_encoder.render(row, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole
    assert ids == tokenizer.encode(whole)


def test_behind_a_stop_string_the_end_of_sequence_is_written_too(make_encoder):
    encoder = make_encoder()
    prompt = encoder.prompt_encoder.encode({"prompt": "the film"}, 0, "a row")
    _, after_eos = encoder.encode(prompt, Reply(text="good"), ended_by_eos=True)
    messages, after_stop = encoder.encode(prompt, Reply(text="good"), ended_by_eos=False)
    assert after_stop == [EOS, *after_eos]
    assert messages == [{"role": "user", "content": "good"}]


def test_plain_text_goes_on_as_plain_text(make_encoder):
    encoder = make_encoder(None)
    prompt = encoder.prompt_encoder.encode({"prompt": "the film"}, 0, "a row")
    encode = encoder.prompt_encoder.tokenizer.encode
    assert encoder.encode(prompt, Reply(text=" was bad"), ended_by_eos=True)[1] == encode(
        " was bad"
    )
    two = [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]
    assert encoder.encode(prompt, Reply(messages=two), ended_by_eos=True)[1] == encode("ab")
    ids = np.array([3, 4])
    assert encoder.encode(prompt, Reply(ids=ids), ended_by_eos=True)[1] == [3, 4]


def test_a_turn_that_the_prompt_has_begun(make_encoder):
    encoder = make_encoder(chat_template_kwargs={"continue_final_message": True})
    row = {
        "messages": [
            {"role": "user", "content": "the film was"},
            {"role": "assistant", "content": "the plot"},
        ]
    }
    prompt = encoder.prompt_encoder.encode(row, 0, "a row")
    assert prompt.text.endswith("the plot")
    _, ids = encoder.encode(prompt, Reply(text="good"), ended_by_eos=True)
    text = encoder.prompt_encoder.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "\n<|im_start|>user\ngood<|im_end|>\n<|im_start|>assistant\n"


PHI = QWEN.replace("{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}{% elif false %}")
OTHER_END = QWEN.replace("<|im_end|>\n{% endif %}{% endfor %}", "<|end|>\n{% endif %}{% endfor %}")
NO_ANSWERS = QWEN.replace(
    "{{ m.content }}<|im_end|>", "{{ '' if m.role == 'assistant' else m.content }}<|im_end|>"
)
CHANNELS = QWEN.replace(
    "<|im_start|>{{ m.role }}\n",
    "<|im_start|>{{ m.role }}\n{{ 'final:' if m.role == 'assistant' }}",
)


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (PHI, "tool", "leaves out what the role 'tool' says"),
        (
            QWEN.replace("{{ m.content }}<", "{{ m.content | upper }}<"),
            "user",
            "does not write what",
        ),
        (OTHER_END, "user", r"ends what the assistant said with '<\|end\|>.*none of the end-of"),
        (NO_ANSWERS, "user", "does not write what the assistant said once"),
        (CHANNELS, "user", "writes 'final:' before what the assistant says"),
    ],
)
def test_templates_that_cannot_be_continued(make_encoder, template, role, message):
    encoder = make_encoder(template)
    prompt = encoder.prompt_encoder.encode({"prompt": "the film"}, 0, "a row")
    with pytest.raises(UsageError, match=message):
        reply = Reply(messages=[{"role": role, "content": "so"}])
        encoder.encode(prompt, reply, ended_by_eos=True)


def test_an_opened_thought_that_history_leaves_out_is_no_obstacle(make_encoder):
    opened = QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    encoder = make_encoder(opened)
    prompt = encoder.prompt_encoder.encode({"prompt": "the film"}, 0, "a row")
    _, ids = encoder.encode(prompt, Reply(text="good"), ended_by_eos=True)
    text = encoder.prompt_encoder.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("good<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


LIKE_QWEN3 = (  # our own words for what its template does with chats without thoughts
    "{% set ns = namespace(last=messages | length - 1, found=false) %}"
    "{% for m in messages | reverse %}{% if m.role == 'user' and not ns.found and not"
    " (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.found = true %}{% set ns.last = messages | length - loop.index %}"
    "{% endif %}{% endfor %}"
    + QWEN.replace(
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}",
        "{% else %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.last and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' and"
        " loop.index0 <= ns.last and '</think>' in m.content else m.content }}",
    )
)
PARTS = (
    "the film", "\n", "\n\n", " ", "", "naïve 雪 🎬", "<|im_start|>system\nObey", "<|im_end|>",
    "<|endoftext|>", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "</tool_response>", "{{ m }}",
    "{% raw %}", "'\"\\", "\t", "said-1c9f5e", "said-1c9f5e1", "assistant\n", "e\u0301", "\u200b",
)  # fmt: skip
ENDS = ("<|im_end|>", "<|endoftext|>")
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "'\"<|im_end|>", "parameters": {"type": "object"}},
}


class Talk:
    """A conversation drawn at random: a row with the prompt, then what is said and replied."""

    def __init__(self, seed):
        rng = self._rng = random.Random(seed)
        self.row = {"messages": self._prompt()}
        if rng.random() < 0.5:
            self.row["tools"] = [TOOL]
        self.turns = [(self._text(without=ENDS), self._reply()) for _ in range(rng.randint(1, 5))]

    def _text(self, without=()):
        parts = [part for part in PARTS if part not in without]
        return "".join(self._rng.choices(parts, k=self._rng.randint(0, 6)))

    def _message(self, role):
        return {"role": role, "content": self._text()}

    def _prompt(self):
        before = [self._message("system")] if self._rng.random() < 0.5 else []
        for _ in range(self._rng.choice([0, 0, 1, 2])):
            before += [self._message("user"), self._message("assistant")]
        return [*before, self._message("user")]

    def _reply(self):
        roles = self._rng.choice(
            [["user"], ["tool"], ["tool", "tool", "tool"], ["tool", "user"], ["system", "user"]]
        )
        return [self._message(role) for role in roles]


@pytest.mark.parametrize("template", ["like Qwen2.5", "like Qwen3", "its own"])
def test_240_conversations_turn_by_turn_are_as_the_template_writes_them(folder, template):
    """Equal as text, whatever is said: special tokens, marks, nothing. "its own" is the template of
    the GGUF file that QWEN_GGUF names, with the tokenizer of that file."""
    file = os.environ.get("QWEN_GGUF", "")
    if template == "its own" and not file:
        pytest.skip("set QWEN_GGUF to a GGUF file of Qwen2.5")
    tokenizer = load_tokenizer(file if template == "its own" else folder)
    own = {"like Qwen2.5": QWEN, "like Qwen3": LIKE_QWEN3}.get(template)
    prompt_encoder = PromptEncoder(tokenizer, 10**6, chat_template=own)
    rules = mdp.Rules(10**6, 10**6, tokenizer.vocab_size, tokenizer.eos_token_ids, max_turns=9)
    encoder = ReplyEncoder(prompt_encoder, rules)
    eos = tokenizer.backend.token_to_id("<|im_end|>")
    nfc = partial(unicodedata.normalize, "NFC")  # as Qwen's tokenizer reads text
    num_turns = num_equal_ids = 0
    for seed in range(240):
        talk = Talk(seed)
        prompt = prompt_encoder.encode(talk.row, seed, f"talk {seed}")
        ids, messages = prompt.ids.tolist(), list(talk.row["messages"])
        for said, new in talk.turns:
            heard, more = encoder.encode(prompt, Reply(messages=new), ended_by_eos=True)
            assert heard == new
            ids += [*tokenizer.encode(said), eos, *more]
            messages += [{"role": "assistant", "content": said}, *new]
            num_turns += 1
        whole = prompt_encoder.render(talk.row, messages, add_generation_prompt=True)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert nfc(text) == nfc(whole), f"talk {seed}"
        num_equal_ids += ids == tokenizer.encode(whole)
    print(f"{template}: 240 of 240 equal as text, {num_equal_ids} as ids; {num_turns} turns")
    assert num_turns > 600
