"""Makes the pocket task's files: `python tools/make_pocket.py [--output-dir FOLDER]`.

Reviews from the grammar -> tokenizer, prompts -> a policy, by `ppo_jax.sft` -> its own samples,
compared two by two -> a reward model, by `ppo_jax.reward_model`.

The reward model starts as the policy's backbone and never sees a sentiment, only which of two
samples won, and the better one does not always win: P(i beats j) = sigmoid(β (gold_i - gold_j)).
It is good and not perfect, as reward models are, and the gold score tells when a policy exploits
the difference.

Shapes: B batch, S sequence, N texts.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ppo_jax import flags, reward_model, sft
from ppo_jax.cli import errors_as_sentences, find_devices
from ppo_jax.compilation import jit
from ppo_jax.config import (
    AdamWConfig,
    CompletionsConfig,
    LearningConfig,
    PreferenceLossConfig,
    PreferencesConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)
from ppo_jax.config.fields import Checked, Count, Rate, Seed
from ppo_jax.generation.actor import Actor
from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    RewardModel,
    load_pretrained,
    load_reward_model,
    save_pretrained,
)
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.pocket import corpus, grammar
from qwen_env.task import make_task
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

MAX_LENGTH = pocket.MAX_PROMPT_LENGTH + pocket.MAX_NEW_TOKENS
SAMPLE_BATCH = 256


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
    reviews = corpus.reviews(report_rng, settings.report_samples)
    with tempfile.TemporaryDirectory() as work:
        loss = train_policy(settings, tokenizer, reviews, policy_rng, Path(work))
        policy = load_pretrained(folder / "policy")
        count, report_count = settings.reward_samples, settings.report_samples
        train = draw_samples(policy, tokenizer, train_prompts, count, train_key)
        heldout = draw_samples(policy, tokenizer, heldout_prompts, report_count, heldout_key)
        train_reward(settings, train, heldout, reward_rng, Path(work))
    reward = load_reward_model(folder / "reward")
    return {
        "policy/cross_entropy": loss,
        **report_policy(tokenizer, reviews, heldout),
        **report_reward(reward, tokenizer, reviews, heldout, report_rng),
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


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Texts:
    """Token ids of texts, each with the end-of-sequence id behind it."""
    rows = [[*tokenizer.encode(text), corpus.EOS_ID][:MAX_LENGTH] for text in texts]
    ids = np.zeros((len(rows), MAX_LENGTH), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Texts(ids, np.arange(MAX_LENGTH) < np.array([len(row) for row in rows])[:, None])


def draw_samples(
    policy: PolicyValueNetwork, tokenizer: Tokenizer, prompts: list[str], count: int, key: Array
) -> list[str]:
    """At least `count` reviews that the policy writes, equally many from each prompt."""
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        max_prompt_length=pocket.MAX_PROMPT_LENGTH,
        max_new_tokens=pocket.MAX_NEW_TOKENS,
        vocab_size=corpus.VOCAB_SIZE,
    )
    of_each = -(-count // len(prompts))
    episodes, outcomes = Actor(policy, task, Sampling(1.0, None, None)).respond_to_all(
        nnx.state(policy),
        task.prompts,
        key,
        batch_size=max(SAMPLE_BATCH // of_each, 1),
        completions_per_prompt=of_each,
    )
    pairs = zip(episodes, outcomes, strict=True)
    return [episode.prompt.text + outcome.info["completion"] for episode, outcome in pairs]


# ---------------------------------------------------------------- training


def train_policy(
    settings: Settings,
    tokenizer: Tokenizer,
    heldout: Sequence[str],
    rng: np.random.Generator,
    work: Path,
) -> float:
    """Learn fresh reviews, each seen once, from a random network on; writes policy/.

    Returns the cross-entropy of `heldout`, in nats a token.
    """
    save_pretrained(
        PolicyValueNetwork(MODEL, rngs=nnx.Rngs(settings.seed)), work / "start", tokenizer
    )
    reviews = corpus.reviews(rng, settings.policy_steps * settings.policy_batch)
    config = SFTConfig(
        CompletionsConfig(
            model=str(work / "start"),
            data=write_rows(work / "reviews.jsonl", map(as_answer, reviews)),
            eval_data=write_rows(work / "heldout.jsonl", map(as_answer, heldout)),
            max_length=MAX_LENGTH,
        ),
        SupervisedConfig(settings.policy_batch, num_epochs=1),
        optimizer(settings.policy_learning_rate, settings.policy_steps),
        learning(settings, settings.policy_steps),
    )
    sft.train(config, work / "sft")
    place(work / "sft", settings.output_dir / "policy")
    last = (work / "sft" / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["eval/loss"])


def train_reward(
    settings: Settings,
    samples: Sequence[str],
    heldout: Sequence[str],
    rng: np.random.Generator,
    work: Path,
) -> None:
    """Learn which of two of the policy's samples won, from the policy on; writes reward/.

    Each text ends with the end-of-sequence id half of the time, so that the model may be asked with
    it or without. Its scores have mean 0 and standard deviation 1 on `heldout`.
    """
    pairs = compared(settings, samples, settings.reward_steps * settings.reward_batch, rng)
    others = compared(settings, heldout, len(heldout) // 2, rng)
    config = RewardModelConfig(
        PreferencesConfig(
            model=str(settings.output_dir / "policy"),
            data=write_rows(work / "pairs.jsonl", pairs),
            eval_data=write_rows(work / "heldout_pairs.jsonl", others),
            eos_share=0.5,
        ),
        PreferenceLossConfig(settings.reward_batch, num_epochs=1, center=True),
        optimizer(settings.reward_learning_rate, settings.reward_steps),
        learning(settings, settings.reward_steps),
    )
    reward_model.train(config, work / "reward_model")
    place(work / "reward_model", settings.output_dir / "reward")


def compared(
    settings: Settings, texts: Sequence[str], count: int, rng: np.random.Generator
) -> list[dict[str, str]]:
    """`count` pairs of different texts, of which the better one more often won."""
    gold = np.array([grammar.sentiment(text) for text in texts])
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        first, second = rng.integers(len(texts), size=2)
        chance = 1 / (1 + np.exp(-settings.preference_beta * (gold[first] - gold[second])))
        won, lost = (first, second) if rng.random() < chance else (second, first)
        if texts[won].strip() != texts[lost].strip():
            pairs.append({"chosen": texts[won], "rejected": texts[lost]})
    return pairs


def as_answer(review: str) -> dict[str, str]:
    """A row of which everything is learnt."""
    return {"prompt": "", "completion": review}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> str:
    """A .jsonl file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def optimizer(learning_rate: float, num_steps: int) -> AdamWConfig:
    """The learning rate warms up over a twentieth, then falls to zero."""
    return AdamWConfig(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_iterations=num_steps // 20,
        adam_b2=0.98,
        adam_eps=1e-8,
        weight_decay=0.01,
    )


def learning(settings: Settings, num_steps: int) -> LearningConfig:
    """Evaluated now and then, saved at the end."""
    every, size = max(num_steps // 10, 1), settings.report_samples
    return LearningConfig(
        seed=settings.seed, eval_every=every, eval_size=size, save_every=num_steps
    )


def place(run: Path, folder: Path) -> None:
    """The last model of a run, in the place of what `folder` holds."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "final", folder)


# ---------------------------------------------------------------- what was made


def report_policy(tokenizer: Tokenizer, reviews: list[str], samples: list[str]) -> dict[str, float]:
    """The least possible cross-entropy of `reviews`, and how good `samples` are.

    The floor is the entropy of the grammar, less that of the first token, which nobody predicts.
    """
    encoded = encode(tokenizer, reviews)
    shares = np.bincount(encoded.ids[:, 0]) / len(reviews)
    first_token_entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)))
    per_review = grammar.entropy() - first_token_entropy
    gold = np.array([grammar.sentiment(text) for text in samples])
    return {
        "policy/cross_entropy_floor": float(per_review * len(reviews) / encoded.mask[:, 1:].sum()),
        "policy/grammatical": float(np.mean([grammar.is_grammatical(text) for text in samples])),
        "policy/gold_mean": float(gold.mean()),
        "policy/gold_std": float(gold.std()),
    }


def report_reward(
    reward: RewardModel,
    tokenizer: Tokenizer,
    reviews: list[str],
    samples: list[str],
    rng: np.random.Generator,
) -> dict[str, float]:
    """How well the model orders fresh reviews by their gold scores, and its scale on `samples`."""
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
    return np.asarray(score(params, encode(tokenizer, texts)))


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
