"""A reward model of what people think, and how well it agrees with them on texts it never saw.

    python benchmarks/human_ratings.py --ratings movie_review_ratings.jsonl --model MODEL

`--ratings` is a .jsonl file of {"text": ..., "rating": ...}, such as the snippets of film reviews
that VADER was checked with, each with the mean of people's judgements from -4 to 4 (Hutto and
Gilbert, ICWSM 2014). Pairs of texts become preferences for the better rated one, with which
`ppo_jax.reward_model` trains. The texts that are held out are in no pair; of these, the correlation
of scores and ratings is printed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.stats import pearsonr, spearmanr

from ppo_jax import cli, flags, reward_model
from ppo_jax.compilation import jit
from ppo_jax.config import (
    AdamWConfig,
    LearningConfig,
    PreferenceLossConfig,
    PreferencesConfig,
    RewardModelConfig,
)
from ppo_jax.config.fields import Checked, Count, Factor, Natural, Rate, Seed
from ppo_jax.models import load_reward_model
from qwen_env.prompts import read_jsonl
from qwen_env.tokenizer import load_tokenizer

AT_ONCE = 32  # texts that are scored together


@dataclass(frozen=True)
class Settings(Checked):
    """How well a reward model agrees with people."""

    ratings: str
    """Texts and what people think of them, a .jsonl file of "text" and "rating"."""
    model: str = PreferencesConfig().model
    """The language model to begin with."""
    output_dir: Path = Path("runs/human_ratings")
    """Folder of the pairs and of the run."""
    num_pairs: Count = 2000
    """Pairs to learn from."""
    num_held_out: Count = 500
    """Texts that are in no pair."""
    least_gap: Factor = 0.5
    """Take no pair whose ratings are closer than this."""
    batch_size: Count = 16
    """Pairs per step."""
    max_length: Count = 48
    """Longest text, in tokens."""
    learning_rate: Rate = 5e-5
    """Its peak."""
    num_frozen_layers: Natural = 0
    """Lowest layers that do not learn, nor do the embeddings then."""
    seed: Seed = 0
    """Of pairs and training."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    with cli.errors_as_sentences():
        argv = sys.argv[1:] if argv is None else argv
        settings = flags.parse(Settings(""), argv, prog="python benchmarks/human_ratings.py")
        cli.keep_compiled_programs()
        cli.find_devices()
        rng = np.random.default_rng(settings.seed)
        rows = [row for _, row in read_jsonl(Path(settings.ratings))]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        held_out, training = rows[: settings.num_held_out], rows[settings.num_held_out :]
        folder = settings.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        count = max(settings.num_pairs // 10, 1)
        config = RewardModelConfig(
            PreferencesConfig(
                model=settings.model,
                data=write_pairs(training, settings.num_pairs, settings, rng, folder / "train"),
                eval_data=write_pairs(held_out, count, settings, rng, folder / "held_out"),
                max_length=settings.max_length,
            ),
            PreferenceLossConfig(batch_size=settings.batch_size, num_epochs=1),
            AdamWConfig(
                learning_rate=settings.learning_rate,
                warmup_iterations=5,
                freeze_embeddings=settings.num_frozen_layers > 0,
                num_frozen_layers=settings.num_frozen_layers,
            ),
            LearningConfig(seed=settings.seed, eval_every=20, save_every=20),
        )
        resume = (folder / "run" / "config.json").exists()  # the pairs are the same again
        reward_model.train(config, folder / "run", resume=resume)
        scores = scores_of(folder / "run" / "final", [row["text"] for row in held_out], settings)
        ratings = np.array([row["rating"] for row in held_out])
        print(f"held-out texts        {len(ratings)}")
        print(f"Pearson's r           {pearsonr(scores, ratings).statistic:.3f}")
        print(f"Spearman's rho        {spearmanr(scores, ratings).statistic:.3f}")


def write_pairs(
    rows: Sequence[dict[str, object]],
    count: int,
    settings: Settings,
    rng: np.random.Generator,
    path: Path,
) -> str:
    """`count` pairs of texts, the better rated one chosen; returns the file's name."""
    ratings = np.array([row["rating"] for row in rows], np.float64)
    lines: list[str] = []
    while len(lines) < count:
        first, second = rng.integers(len(rows), size=2)
        if abs(ratings[first] - ratings[second]) < max(settings.least_gap, 1e-9):
            continue
        better, worse = (first, second) if ratings[first] > ratings[second] else (second, first)
        if str(rows[better]["text"]).strip() != str(rows[worse]["text"]).strip():
            pair = {"chosen": rows[better]["text"], "rejected": rows[worse]["text"]}
            lines.append(json.dumps(pair) + "\n")
    path = path.with_suffix(".jsonl")
    path.write_text("".join(lines))
    return str(path)


def scores_of(folder: Path, texts: Sequence[str], settings: Settings) -> np.ndarray:
    """The reward model's scores, each text ended as in training."""
    tokenizer = load_tokenizer(folder)
    end = list(tokenizer.eos_token_ids[:1])
    encoded = [
        ([*tokenizer.prefix_ids, *tokenizer.encode(text), *end])[-settings.max_length :]
        for text in texts
    ]
    graphdef, params = nnx.split(load_reward_model(folder))
    score = jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
    scores: list[float] = []
    for start in range(0, len(texts), AT_ONCE):
        rows = encoded[start : start + AT_ONCE]
        ids = np.zeros((AT_ONCE, settings.max_length), np.int32)
        mask = np.zeros(ids.shape, bool)
        mask[:, 0] = True  # of what fills up the last batch
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        of_batch = score(params, jnp.asarray(ids), jnp.asarray(mask))
        scores += np.asarray(of_batch)[: len(rows)].tolist()
    return np.array(scores)


if __name__ == "__main__":
    main()
