"""The genuine model against transformers, where its file is at hand.

    QWEN_GGUF=qwen2.5-0.5b-instruct-q4_k_m.gguf pytest -m slow -rP THIS_FILE

Any GGUF file of a Qwen2.5 with a chat template will do. The file is read a second time by the gguf
package, the reference implementation; model and tokenizer are transformers' own classes. It takes
some two minutes of two cores and 6 GiB of memory for 0.5 B parameters; `-rP` prints what was
measured.
"""

import json
import os
import random
import subprocess
import sys
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from ppo_jax.generation.rollout import rollout
from ppo_jax.models import load_pretrained
from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.tokenizer import load_tokenizer

FILE = os.environ.get("QWEN_GGUF", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FILE, reason="the real weights are not at hand: set QWEN_GGUF to a GGUF file of Qwen2.5"
    ),
]

PROMPTS = (
    "The capital of France is",
    'def fibonacci(n):\n    """The n-th number of Fibonacci."""\n',
    "<|im_start|>user\nWas ist 17 + 25? Nur die Zahl.<|im_end|>\n<|im_start|>assistant\n",
)
NEW_TOKENS = 16


def test_loading_is_fast_and_takes_little_memory():
    """In a process of its own: under 20 s, and under 1.5 times the size of the parameters."""
    program = """
import json, resource, sys, time
import jax
from ppo_jax.models import load_pretrained
import gguf
from flax import nnx
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
state = nnx.state(load_pretrained(sys.argv[1]))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
size = sum(x.nbytes for x in jax.tree.leaves(state))
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak() - before, "size": size}))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, FILE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    ratio = found["peak"] / found["size"]
    print(
        f"loading: {found['seconds']:.1f} s ({found['cpu']:.1f} s of CPU), peak "
        f"{found['peak'] / 2**30:.2f} GiB, {ratio:.2f} times the {found['size'] / 2**30:.2f} GiB "
        "of the parameters"
    )
    assert found["cpu"] < 20  # not of the clock, for the machine may be busy
    assert ratio < 1.5


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(FILE)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FILE)


class Ours(NamedTuple):
    ids: list[np.ndarray]
    """Each prompt and its greedy continuation."""
    prompt_lengths: list[int]
    logits: list[np.ndarray]
    """[S, V] of each."""


@pytest.fixture(scope="module")
def ours(tokenizer) -> Ours:
    """Of a model that is gone when theirs is loaded."""
    prompt_ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    prompt_lengths = [len(ids) for ids in prompt_ids]
    prompts = np.zeros((len(prompt_ids), max(prompt_lengths)), np.int32)
    for row, ids in zip(prompts, prompt_ids, strict=True):
        row[: len(ids)] = ids
    network = load_pretrained(FILE)
    rules = mdp.Rules(
        max_prompt_length=prompts.shape[1],
        max_new_tokens=NEW_TOKENS,
        vocab_size=network.config.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    graphdef, params = nnx.split(network)

    @jax.jit
    def greedy(params: Any) -> tuple[mdp.State, jax.Array]:
        policy, key = nnx.merge(graphdef, params), jax.random.key(0)
        lengths = jnp.array(prompt_lengths)
        state = rollout(policy, prompts, lengths, key, rules=rules, greedy=True).state
        return state, policy(state.tokens, mdp.attention_mask(state, jnp))[0]

    state, logits = jax.tree.map(np.asarray, greedy(params))
    return Ours(
        [tokens[:length] for tokens, length in zip(state.tokens, state.length, strict=True)],
        prompt_lengths,
        [of_row[:length] for of_row, length in zip(logits, state.length, strict=True)],
    )


@pytest.fixture(scope="module")
def their_logits(reader, ours) -> list[np.ndarray]:
    """[S, V] of the same ids."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = Qwen2Config(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["qwen2.embedding_length"],
        intermediate_size=fields["qwen2.feed_forward_length"],
        num_hidden_layers=fields["qwen2.block_count"],
        num_attention_heads=fields["qwen2.attention.head_count"],
        num_key_value_heads=fields["qwen2.attention.head_count_kv"],
        rms_norm_eps=fields["qwen2.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["qwen2.rope.freq_base"]},
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).eval()
    names = get_gguf_hf_weights_map(model, TensorProcessor(config.to_dict()))
    state = {
        names[tensor.name]: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # no parameters, not on `meta`
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        return [model(torch.tensor(ids[None]).long()).logits[0].numpy() for ids in ours.ids]


def test_logits(ours, their_logits):
    of_logits = of_logprobs = 0.0
    for found, expected in zip(ours.logits, their_logits, strict=True):
        of_logits = max(of_logits, np.abs(found - expected).max())
        found, expected = (np.asarray(jax.nn.log_softmax(x)) for x in (found, expected))
        of_logprobs = max(of_logprobs, np.abs(found - expected)[expected > np.log(1e-6)].max())
    print(f"largest difference: {of_logits:.1e} of logits, {of_logprobs:.1e} nats")
    assert of_logits < 1e-3
    assert of_logprobs < 1e-4


def test_greedy_tokens(ours, their_logits, tokenizer):
    """Each is the likeliest to transformers after those before it: it would write the same."""
    for ids, length, logits in zip(ours.ids, ours.prompt_lengths, their_logits, strict=True):
        print(repr(tokenizer.decode(ids[length:], skip_special_tokens=False)))
        np.testing.assert_array_equal(ids[length:], logits[length - 1 : -1].argmax(axis=-1))


@pytest.fixture(scope="module")
def their_tokenizer(reader):
    """transformers' own class, with the words of the file."""
    fields = reader.fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    control, user_defined = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)
    added = [i for i, kind in enumerate(kinds) if kind in (control, user_defined)]
    words = {token: i for i, token in enumerate(tokens) if kinds[i] == gguf.TokenType.NORMAL}
    made = Qwen2Tokenizer(
        vocab=words | {tokens[i]: i for i in added},
        merges=[tuple(merge.split(" ")) for merge in merges],
        chat_template=fields["tokenizer.chat_template"].contents(),
    )
    made.add_tokens([AddedToken(tokens[i], special=kinds[i] == control) for i in added])
    return made


PIECES = (
    *("a", "Z", "the", "don't", "I'LL", "naïve", "e\u0301", "n\u0303o", "Å", "\u212b", "ﬁ", "ß"),
    *("привет", "γειά", "שלום", "مرحبا", "हिन्दी", "ภาษาไทย", "漢字かな", "한국어", "각"),
    *(
        "👩\u200d👩\u200d👧\u200d👦",
        "🏳️\u200d🌈",
        "👍🏽",
        "🇫🇷",
        "e\u0301\u0302\u0303\u0304",
        "\u200b",
        "\ufeff",
    ),
    *("0", "1234567890", "3.14", "٣٤", "½", "²", "Ⅳ", "１２"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u2003", "\u3000", "\u2028"),
    *("\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufffd", "\ue000", "\U0010ffff", "\U000e0041"),
    *(
        ".",
        ",",
        "...",
        "!?",
        "—",
        "«»",
        "()[]{}",
        "<>",
        "$%&",
        "\\n",
        "://",
        "__init__",
        "=>",
        "#!",
    ),
    *(
        "def f(x):\n    return x",
        "for(;;){}",
        "<div class='a'>",
        "SELECT *\nFROM t;",
        "\t\tif",
        "'s",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|", "|im_end|>", "<|IM_END|>"),
    *(
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|im_ start|>",
        "<s>",
        "</s>",
        "[PAD151936]",
    ),
)


def nasty_strings(count: int) -> list[str]:
    """Of the pieces above, and of characters from everywhere in Unicode."""
    draw = random.Random(0)

    def character() -> str:
        while True:
            code = draw.randrange(draw.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000]))
            if not 0xD800 <= code < 0xE000:  # halves of surrogate pairs are no text
                return chr(code)

    def piece() -> str:
        if draw.random() < 0.7:
            return draw.choice(PIECES) * draw.choice([1, 1, 1, 1, 2, 7])
        return "".join(character() for _ in range(draw.randrange(1, 6)))

    return [
        *PIECES,
        *("".join(piece() for _ in range(draw.randrange(1, 12))) for _ in range(count)),
    ]


def test_nasty_strings(tokenizer, their_tokenizer):
    strings = nasty_strings(5000)
    for text in strings:
        expected = their_tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenizer.encode(text)
        assert found == expected, ascii(text)
        for skip in (False, True):
            back = their_tokenizer.decode(expected, skip_special_tokens=skip)
            assert tokenizer.decode(found, skip_special_tokens=skip) == back, ascii(text)
    print(f"{len(strings)} strings, {sum(map(len, strings))} characters: the same tokens")


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_no_text(text, tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.encode(text)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <today> & tomorrow, in °C.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CHATS = {
    "a question": ([{"role": "user", "content": "Hi 👋"}], {}),
    "with a system prompt": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        {},
    ),
    "with tools": ([{"role": "user", "content": "Weather?"}], {"tools": [WEATHER]}),
    "a tool is called and answers": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Zürich?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"celsius": -3.5}'},
            {"role": "tool", "content": "snow"},
        ],
        {"tools": [WEATHER, WEATHER]},
    ),
    "an answer is begun": (
        [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "It is "}],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
}


@pytest.mark.parametrize(("chat", "arguments"), CHATS.values(), ids=CHATS.keys())
def test_chat_template(chat, arguments, tokenizer, their_tokenizer):
    arguments = {"add_generation_prompt": True} | arguments
    expected = their_tokenizer.apply_chat_template(chat, tokenize=False, **arguments)
    found = tokenizer.apply_chat_template(chat, **arguments)
    assert found == expected
    ids = their_tokenizer.apply_chat_template(chat, return_dict=False, **arguments)
    assert tokenizer.encode(found) == ids
    for message in chat:
        assert message["content"].strip() in found
    if "tools" in arguments:
        assert json.dumps(WEATHER, ensure_ascii=False) in found
