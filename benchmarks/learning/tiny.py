"""Models small enough to learn a task of several turns in a minute, and what they know before.

A tokenizer of characters, and of whole phrases that the task repeats; a transformer of two layers;
and demonstrations of a task by a player who does not play well, which it imitates.
"""

import string
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest

import numpy as np
import optax
from flax import nnx
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from learning.imitation import in_random_order, maximise_likelihood
from ppo_jax.models import DecoderConfig, PolicyValueNetwork
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.conversation import Conversation
from qwen_env.prompts import Prompt
from qwen_env.task import TextTask
from qwen_env.tokenizer import Tokenizer

Player = Callable[[Conversation, np.random.Generator], str]
"""Says the next turn of a conversation."""

END = "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(phrases: Sequence[str], characters: str = string.printable) -> Tokenizer:
    """Every phrase is a token, and so is every one of the other characters; id 0 ends a turn."""
    backend = Backend(models.BPE({c: i for i, c in enumerate((END, *characters))}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END])
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return Tokenizer(backend, eos_token_ids=(0,), config={"chat_template": _TEMPLATE})


def make_network(task: TextTask, hidden_size: int, seed: int) -> PolicyValueNetwork:
    """A random one of two layers, as wide as told."""
    config = DecoderConfig(
        vocab_size=task.rules.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=task.rules.max_length,
    )
    return PolicyValueNetwork(config, rngs=nnx.Rngs(seed))


def demonstrate(
    task: TextTask, prompts: Sequence[Prompt], player: Player, rng: np.random.Generator
) -> mdp.State:
    """Episodes that `player` plays, one for each prompt, in the MDP and with its interaction."""
    partner, state = task.partner, task.initial_state(prompts)
    talks = [
        Conversation(prompt, seed, ()) if partner is None else partner.start(prompt, seed)
        for prompt, seed in zip(prompts, rng.integers(2**32, size=len(prompts)), strict=True)
    ]
    while (running := np.flatnonzero(mdp.is_running(state))).size:
        some = mdp.at(state, running)
        turns = [task.tokenizer.encode(player(talks[i], rng) + END) for i in running]
        for actions in zip_longest(*turns, fillvalue=0):  # what comes after a turn is not taken
            some = mdp.step(some, np.array(actions), task.rules, np)
        if partner is not None:
            spoke = np.flatnonzero(mdp.turns_ended(some) > mdp.turns_ended(mdp.at(state, running)))
            after, answers = partner.answer([talks[i] for i in running[spoke]], mdp.at(some, spoke))
            for i, talk in zip(running[spoke], after, strict=True):
                talks[i] = talk
            some = mdp.put(some, spoke, mdp.reply(mdp.at(some, spoke), *answers, task.rules, np))
        state = mdp.put(state, running, some)
    return state


def imitate(
    network: PolicyValueNetwork,
    episodes: mdp.State,
    task: TextTask,
    *,
    num_epochs: int,
    learning_rate: float,
    rng: np.random.Generator,
) -> None:
    """Maximise the likelihood of the policy's tokens; the learning rate falls linearly to 0."""
    batches = in_random_order(len(episodes.length), num_epochs=num_epochs, batch_size=64, rng=rng)
    graphdef, params = nnx.split(network)
    learnt = maximise_likelihood(
        graphdef,
        params,
        episodes,
        batches,
        rules=task.rules,
        sampling=Sampling(),
        optimizer=_adam(learning_rate, len(batches)),
    )
    nnx.update(network, learnt)


@cache  # one object, so that what is compiled for it is found again
def _adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(learning_rate, 0.0, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
