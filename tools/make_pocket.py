"""Makes the pocket task's files: `python tools/make_pocket.py [--output-dir FOLDER]`.

Reviews from the grammar -> tokenizer, prompts -> a policy, by next-token cross-entropy -> its own
samples, compared two by two -> a reward model, by the Bradley-Terry loss.

The reward model starts as the policy's backbone and never sees a sentiment, only which of two
samples won, and the better one does not always win: P(i beats j) = sigmoid(β (gold_i - gold_j)).
It is good and not perfect, as reward models are, and the gold score tells when a policy exploits
the difference.

Shapes: B batch, S sequence, V vocabulary, N texts.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ppo_jax import flags
from ppo_jax.cli import errors_as_sentences, find_devices
from ppo_jax.compilation import jit
from ppo_jax.config.fields import Checked, Count, Rate, Seed
from ppo_jax.generation.rollout import rollout
from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    RewardModel,
    save_pretrained,
    save_reward_model,
)
from qwen_env import mdp, pocket
from qwen_env.pocket import corpus, grammar
from qwen_env.tokenizer import Tokenizer

MODEL = DecoderConfig(
    vocab_size=corpus.VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    max_position_embeddings=256,
)
"""0.89 million parameters."""

RULES = mdp.Rules(
    max_prompt_length=pocket.MAX_PROMPT_LENGTH,
    max_new_tokens=pocket.MAX_NEW_TOKENS,
    vocab_size=corpus.VOCAB_SIZE,
    eos_token_ids=(corpus.EOS_ID,),
)

SAMPLE_BATCH = 256
CENTRE_COEF = 0.01  # of the mean score in the Bradley-Terry loss, which itself sees only gaps


@dataclass(frozen=True)
class Settings(Checked):
    """How the pocket task's files are made."""

    output_dir: Path = pocket.POLICY_FOLDER.parent
    """Folder that gets policy/, reward/, train_prompts.jsonl and heldout_prompts.jsonl."""
    seed: Seed = 0
    """Root of every random choice."""
    tokenizer_reviews: Count = 20_000
    """Reviews that the tokenizer is trained on."""
    num_train_prompts: Count = 512
    """Prompts to train on."""
    num_heldout_prompts: Count = 128
    """Other prompts, for evaluation."""
    policy_steps: Count = 2500
    """Optimizer steps of the policy."""
    policy_batch: Count = 32
    """Reviews per step."""
    policy_learning_rate: Rate = 2e-3
    """Its peak."""
    reward_samples: Count = 16_384
    """Samples of the policy that are compared."""
    reward_steps: Count = 1000
    """Optimizer steps of the reward model."""
    reward_batch: Count = 32
    """Pairs per step."""
    reward_learning_rate: Rate = 5e-4
    """Its peak."""
    preference_beta: Rate = 4.0
    """β: how surely the better of two samples wins."""
    report_samples: Count = 2048
    """Held-out texts that each reported number is measured on."""


class Texts(NamedTuple):
    """N token sequences, padded on the right."""

    ids: Any  # int32 [N, S]
    mask: Any  # bool [N, S]


def run(settings: Settings) -> dict[str, float]:
    """Write the files, and measure what was made on held-out texts."""
    start = time.perf_counter()
    text_rng, policy_rng, reward_rng, report_rng = np.random.default_rng(settings.seed).spawn(4)
    train_key, heldout_key = jax.random.split(jax.random.key(settings.seed))
    folder = settings.output_dir
    tokenizer, train_prompts, heldout_prompts = write_texts(settings, text_rng)

    policy = train_policy(settings, tokenizer, policy_rng)
    save_pretrained(policy, folder / "policy", tokenizer)
    train = draw_samples(policy, tokenizer, train_prompts, settings.reward_samples, train_key)
    heldout = draw_samples(policy, tokenizer, heldout_prompts, settings.report_samples, heldout_key)

    reward = train_reward(settings, policy, tokenizer, train, reward_rng)
    save_reward_model(reward, folder / "reward", tokenizer)
    return {
        **report_policy(policy, tokenizer, heldout, report_rng),
        **report_reward(reward, tokenizer, heldout, report_rng),
        "time_s": time.perf_counter() - start,
    }


# ---------------------------------------------------------------- texts


def write_texts(
    settings: Settings, rng: np.random.Generator
) -> tuple[Tokenizer, list[str], list[str]]:
    """Make the tokenizer and the prompts, and write the prompts."""
    tokenizer = corpus.train_tokenizer(corpus.reviews(rng, settings.tokenizer_reviews))
    total = settings.num_train_prompts + settings.num_heldout_prompts
    prompts = corpus.openings(rng, tokenizer, total)
    train, heldout = prompts[: settings.num_train_prompts], prompts[settings.num_train_prompts :]
    corpus.write_prompts(train, settings.output_dir / pocket.TRAIN_PROMPTS.name)
    corpus.write_prompts(heldout, settings.output_dir / pocket.HELDOUT_PROMPTS.name)
    return tokenizer, train, heldout


def encode(tokenizer: Tokenizer, texts: list[str], ends: bool | list[bool]) -> Texts:
    """Token ids of `texts`, with the end-of-sequence id after those that `ends` says."""
    ends = [ends] * len(texts) if isinstance(ends, bool) else ends
    rows = [
        (tokenizer.encode(text) + [corpus.EOS_ID] * end)[: RULES.max_length]
        for text, end in zip(texts, ends, strict=True)
    ]
    ids = np.zeros((len(rows), RULES.max_length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return Texts(ids, np.arange(RULES.max_length) < lengths[:, None])


def trim(texts: Texts) -> Texts:
    """Less padding: S becomes the next multiple of 12, so that there are few shapes to compile."""
    longest = int(texts.mask.sum(axis=1).max())
    size = -(-longest // 12) * 12
    return Texts(texts.ids[:, :size], texts.mask[:, :size])


def draw_samples(
    policy: PolicyValueNetwork, tokenizer: Tokenizer, prompts: list[str], count: int, key: Array
) -> list[str]:
    """`count` reviews that the policy writes from `prompts`, taken in turn."""
    graphdef, params = nnx.split(policy)
    limit = RULES.max_prompt_length
    encoded = encode(tokenizer, prompts, ends=False)
    lengths = encoded.mask.sum(axis=1)

    @jit
    def sample(params: nnx.State, ids: Array, length: Array, key: Array) -> mdp.State:
        return rollout(nnx.merge(graphdef, params), ids, length, key, rules=RULES).state

    texts: list[str] = []
    while len(texts) < count:
        rows = (len(texts) + np.arange(SAMPLE_BATCH)) % len(prompts)
        batch_key = jax.random.fold_in(key, len(texts))
        state = sample(params, encoded.ids[rows, :limit], lengths[rows], batch_key)
        tokens, length = np.asarray(state.tokens), np.asarray(state.length)
        texts += [tokenizer.decode(row[:end]) for row, end in zip(tokens, length, strict=True)]
    return texts[:count]


# ---------------------------------------------------------------- training


def train_policy(
    settings: Settings, tokenizer: Tokenizer, rng: np.random.Generator
) -> PolicyValueNetwork:
    """Minimise the cross-entropy of the next token on fresh reviews, each seen once."""
    policy = PolicyValueNetwork(MODEL, rngs=nnx.Rngs(settings.seed))
    graphdef, params = nnx.split(policy)

    def batches() -> Iterator[Texts]:
        """Reviews of like length go together, so that little of a batch is padding."""
        while True:
            reviews = corpus.reviews(rng, 16 * settings.policy_batch)
            texts = encode(tokenizer, reviews, ends=True)
            by_length = np.argsort(texts.mask.sum(axis=1)).reshape(16, -1)
            for rows in rng.permutation(by_length):
                yield trim(Texts(texts.ids[rows], texts.mask[rows]))

    def loss(params: nnx.State, batch: Texts) -> Float[Array, ""]:
        losses = token_losses(nnx.merge(graphdef, params), batch)
        return losses.sum() / batch.mask[:, 1:].sum()

    steps, learning_rate = settings.policy_steps, settings.policy_learning_rate
    params = _fit("policy", loss, params, batches(), steps, learning_rate)
    return nnx.merge(graphdef, params)


def token_losses(policy: PolicyValueNetwork, texts: Texts) -> Float[Array, "N S-1"]:
    """-log p of every token but the first; 0 on padding."""
    logits, _ = policy(texts.ids, texts.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], texts.ids[:, 1:])
    return jnp.where(texts.mask[:, 1:], losses, 0.0)


def train_reward(
    settings: Settings,
    policy: PolicyValueNetwork,
    tokenizer: Tokenizer,
    samples: list[str],
    rng: np.random.Generator,
) -> RewardModel:
    """Minimise -log sigmoid(r_winner - r_loser) on pairs of the policy's samples.

    Each text ends with the end-of-sequence id half of the time, so that the model may be asked with
    it or without. At the end the scores are scaled to unit standard deviation on `samples`.
    """
    reward = RewardModel(MODEL, rngs=nnx.Rngs(settings.seed))
    nnx.update(reward.backbone, nnx.state(policy.backbone))
    graphdef, params = nnx.split(reward)
    gold = np.array([grammar.sentiment(text) for text in samples])

    def batches() -> Iterator[Texts]:
        """Winners in the first half of the rows, the losers they beat in the second."""
        while True:
            first, second = rng.integers(len(samples), size=(2, settings.reward_batch))
            chance = 1 / (1 + np.exp(-settings.preference_beta * (gold[first] - gold[second])))
            first_wins = rng.random(settings.reward_batch) < chance
            winner, loser = np.where(first_wins, (first, second), (second, first))
            texts = [samples[i] for i in (*winner, *loser)]
            yield trim(encode(tokenizer, texts, ends=(rng.random(len(texts)) < 0.5).tolist()))

    def loss(params: nnx.State, batch: Texts) -> Float[Array, ""]:
        scores = nnx.merge(graphdef, params)(batch.ids, batch.mask)
        winner, loser = jnp.split(scores, 2)
        return -jax.nn.log_sigmoid(winner - loser).mean() + CENTRE_COEF * scores.mean() ** 2

    steps, learning_rate = settings.reward_steps, settings.reward_learning_rate
    params = _fit("reward model", loss, params, batches(), steps, learning_rate)
    reward = nnx.merge(graphdef, params)
    std = scores_of(reward, tokenizer, samples[: settings.report_samples]).std()
    reward.score.weight[...] = reward.score.weight[...] / std
    return reward


def _fit(
    label: str,
    loss: Callable[[nnx.State, Texts], Float[Array, ""]],
    params: nnx.State,
    batches: Iterator[Texts],
    num_steps: int,
    learning_rate: float,
) -> nnx.State:
    """`num_steps` of AdamW; the learning rate warms up over a twentieth, then falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(num_steps // 20, 1), num_steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )

    @partial(jit, donate_argnums=(0, 1))
    def step(params: nnx.State, opt_state: Any, batch: Texts) -> tuple[nnx.State, Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.tree.map(jnp.copy, params)  # the caller's arrays are not ours to donate
    opt_state = optimizer.init(params)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=num_steps, loss=float("nan"))
        for i in range(num_steps):
            params, opt_state, value = step(params, opt_state, next(batches))
            if i % 20 == 0 or i == num_steps - 1:
                progress.update(task, completed=i + 1, loss=float(value))
    return params


# ---------------------------------------------------------------- what was made


def report_policy(
    policy: PolicyValueNetwork,
    tokenizer: Tokenizer,
    samples: list[str],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Cross-entropy on fresh reviews beside the least possible, and how good `samples` are.

    The floor is the entropy of the grammar, less that of the first token, which nobody predicts.
    """
    reviews = encode(tokenizer, corpus.reviews(rng, len(samples)), ends=True)
    graphdef, params = nnx.split(policy)
    losses = jit(lambda params, texts: token_losses(nnx.merge(graphdef, params), texts))
    num_tokens = reviews.mask[:, 1:].sum()
    shares = np.bincount(reviews.ids[:, 0]) / len(samples)
    first_token_entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)))
    floor = (grammar.entropy() - first_token_entropy) * len(samples) / num_tokens
    gold = np.array([grammar.sentiment(text) for text in samples])
    return {
        "policy/cross_entropy": float(losses(params, reviews).sum() / num_tokens),
        "policy/cross_entropy_floor": float(floor),
        "policy/grammatical": float(np.mean([grammar.is_grammatical(text) for text in samples])),
        "policy/gold_mean": float(gold.mean()),
        "policy/gold_std": float(gold.std()),
    }


def report_reward(
    reward: RewardModel, tokenizer: Tokenizer, samples: list[str], rng: np.random.Generator
) -> dict[str, float]:
    """How well the model orders fresh reviews by their gold scores, and its scale on `samples`."""
    reviews = corpus.reviews(rng, len(samples))
    gold = np.array([grammar.sentiment(text) for text in reviews])
    scores = scores_of(reward, tokenizer, reviews)
    first, second = rng.integers(len(reviews), size=(2, 10 * len(reviews)))
    differ = gold[first] != gold[second]
    agree = (gold[first] > gold[second]) == (scores[first] > scores[second])
    of_samples = scores_of(reward, tokenizer, samples)
    return {
        "reward/pair_accuracy": float(agree[differ].mean()),
        "reward/gold_correlation": float(np.corrcoef(gold, scores)[0, 1]),
        "reward/mean": float(of_samples.mean()),
        "reward/std": float(of_samples.std()),
    }


def scores_of(
    reward: RewardModel, tokenizer: Tokenizer, texts: list[str]
) -> Float[np.ndarray, "N"]:
    """The reward model's scores of `texts`, ended by the end-of-sequence id."""
    graphdef, params = nnx.split(reward)
    score = jit(lambda params, texts: nnx.merge(graphdef, params)(texts.ids, texts.mask))
    return np.asarray(score(params, encode(tokenizer, texts, ends=True)))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    with errors_as_sentences():
        arguments = sys.argv[1:] if argv is None else argv
        settings = flags.parse(Settings(), arguments, prog="python tools/make_pocket.py")
        find_devices()
        report = run(settings)
    for name, value in report.items():
        print(f"{name:28} {value:.4g}")


if __name__ == "__main__":
    main()
