"""Supervised learning as what a run trains: a policy on answers, a reward model on preferences.

Shapes: M rows of a batch, S width, D hidden.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppo_jax import algorithm, hosts
from ppo_jax.compilation import jit
from ppo_jax.config import RewardModelConfig, SFTConfig, SupervisedRunConfig, total_iterations
from ppo_jax.examples import Example, Pair
from ppo_jax.learning.frozen import initial_state, join, network_of, partition
from ppo_jax.learning.metrics import fetch
from ppo_jax.learning.nonfinite import check_finite
from ppo_jax.learning.objectives import (
    CompletionObjective,
    CompletionOutputs,
    Objective,
    PreferenceObjective,
    PreferenceOutputs,
    Texts,
)
from ppo_jax.learning.supervised import SupervisedLearner, SupervisedState
from ppo_jax.mesh import make_mesh, place, replicate, replicated, shardings
from ppo_jax.models import (
    PolicyValueNetwork,
    RewardModel,
    save_pretrained,
    save_reward_model,
)
from ppo_jax.runs.checksums import digest
from ppo_jax.runs.progress import Progress
from ppo_jax.runs.records import Record
from ppo_jax.runs.run import NUM_SAMPLES, Evaluation, Source
from qwen_env.errors import UsageError
from qwen_env.prompt_order import prompt_indices
from qwen_env.tokenizer import Tokenizer

Item = TypeVar("Item", bound=Example | Pair)
Config = TypeVar("Config", bound=SupervisedRunConfig)


class _SupervisedTrainer(Generic[Config, Item]):
    """What both kinds of a `ppo_jax.runs.run.Trainer` share.

    Args:
        network: it learns, but for its value head and a separate critic.
        training: what is learnt from.
        held_out: `eval_size` of them are looked at in every evaluation.
    """

    title: ClassVar[str]

    def __init__(
        self,
        config: Config,
        network: PolicyValueNetwork | RewardModel,
        tokenizer: Tokenizer,
        training: Sequence[Item],
        held_out: Sequence[Item],
    ):
        self.config, self._tokenizer, self._items = config, tokenizer, training
        self._held_out = held_out[: config.run.eval_size]
        self._width = max(_longest(training), _longest(held_out), 2)
        if self._width > network.config.max_length:
            raise UsageError(
                f"{config.data.data} holds a text of {self._width} tokens, but the model has only "
                f"{network.config.max_length} positions; lower max_length."
            )
        self.num_iterations = total_iterations(config.learning, config.optimizer, len(training))
        self._mesh = mesh = make_mesh(config.run.num_devices, config.run.num_shards)
        graphdef, params, frozen = partition(network, config.optimizer, config.run.seed)
        params, others = nnx.split_state(params, _learns, ...)
        params, self._frozen = place(params, mesh), place(join(others, frozen), mesh)
        learning = config.learning
        self._learner = learner = SupervisedLearner(
            graphdef,
            self._objective(network),
            self._width,
            config.optimizer,
            self.num_iterations,
            num_microbatches=learning.num_microbatches,
            num_packed_sizes=learning.num_packed_sizes,
            mesh=mesh,
        )
        self.model = config.data.model
        self.model_digest = digest(join(params, self._frozen)["backbone"])
        self.training = Source("rows", config.data.data, _digest(training))
        self.held_out = Source(
            "held-out rows", config.data.eval_data or config.data.data, _digest(held_out)
        )
        self.state: SupervisedState = initial_state(learner.init, params, mesh)
        whole = replicated(mesh)
        self._update = jit(
            learner.update, donate_argnums=0, out_shardings=(shardings(self.state, mesh), whole)
        )
        self._outputs = jit(learner.outputs, out_shardings=whole)

    def _objective(self, network: Any) -> Objective:
        raise NotImplementedError

    @property
    def network(self) -> Any:
        """The network as it is now, on the state's own arrays: the next update consumes them."""
        return network_of(self._learner.graphdef, self.state.params, self._frozen)

    def learn(self) -> Iterator[dict[str, Record]]:
        size, seed = self.config.learning.batch_size, self.config.run.seed
        while (iteration := int(self.state.iteration)) < self.num_iterations:
            start = time.perf_counter()
            indices = prompt_indices(seed, iteration, size, len(self._items))
            batch = self._texts([self._items[i] for i in indices])
            self.state, on_device = self._update(self.state, batch, self._frozen)
            metrics, _ = fetch(on_device, {})
            seconds = time.perf_counter() - start
            yield {
                "metrics": {
                    "iteration": iteration + 1,
                    **metrics,
                    "time/iteration_s": seconds,
                    "throughput/tokens_per_s": metrics["train/tokens"] / seconds,
                }
            }
            check_finite(self.state, self.config.optimizer.max_nonfinite_updates, "data")

    def remark(self, metrics: Record) -> str | None:
        return None

    def _look(self, items: Sequence[Item], progress: Progress | None = None) -> Any:
        """The network's outputs for all of `items`, with a row for each text, as NumPy arrays."""
        size = self.config.learning.batch_size
        parts: list[Any] = []
        for start in range(0, len(items), size):
            some = list(items[start : start + size])
            batch = self._texts(some + [items[0]] * (size - len(some)))
            outputs = self._outputs(self.state.params, batch, self._frozen)
            rows = sum(len(_texts_of(item)) for item in some)
            parts.append(jax.tree.map(lambda x, rows=rows: np.asarray(x)[:rows], outputs))
            if progress is not None:
                progress.evaluating("held out", len(items), start + len(some))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _texts(self, items: Sequence[Item]) -> Texts:
        """A batch, on the devices."""
        examples = [example for item in items for example in _texts_of(item)]
        tokens = np.zeros((len(examples), self._width), np.int32)
        is_learnt = np.zeros(tokens.shape, bool)
        for row, learnt, example in zip(tokens, is_learnt, examples, strict=True):
            row[: len(example.ids)] = example.ids
            learnt[: len(example.ids)] = example.is_learnt
        lengths = np.array([len(example.ids) for example in examples], np.int32)
        margins = [_margin(item) for item in items for _ in _texts_of(item)]
        arrays = tokens, lengths, is_learnt, np.array(margins, np.float32)
        return Texts(*(replicate(x, self._mesh) for x in arrays))

    def _sample(self, example: Example, kind: str, score: float) -> Record:
        return {
            "iteration": int(self.state.iteration),
            "decoding": kind,
            "prompt": example.prompt,
            "completion": example.completion,
            "finish_reason": "eos",
            "score": score,
            "components": {},
        }


class SFTTrainer(_SupervisedTrainer[SFTConfig, Example]):
    """A policy that learns answers to prompts, by cross-entropy."""

    title = "SFT"

    def _objective(self, network: PolicyValueNetwork) -> Objective:
        return CompletionObjective(self._width, network.config.vocab_size, self.config.run.remat)

    def evaluate(self, progress: Progress) -> Evaluation:
        outputs: CompletionOutputs = self._look(self._held_out, progress)
        mask = np.zeros(outputs.logprobs.shape, bool)
        for row, example in zip(mask, self._held_out, strict=True):
            row[: len(example.ids) - 1] = example.is_learnt[1:]
        logprobs = np.where(mask, outputs.logprobs, 0.0).astype(np.float64)
        loss = -logprobs.sum() / mask.sum()
        means = {
            "loss": float(loss),
            "perplexity": float(np.exp(loss)),
            "entropy": float(np.where(mask, outputs.entropy, 0.0).sum() / mask.sum()),
            "num_texts": float(len(mask)),
        }
        of_each = logprobs.sum(axis=1) / mask.sum(axis=1)
        samples = [
            self._sample(example, "mean log-probability", float(score))
            for example, score in zip(self._held_out[:NUM_SAMPLES], of_each, strict=False)
        ]
        return Evaluation(means, samples, score=-float(loss))

    def save(self, folder: Path) -> None:
        network = hosts.whole(self.network)
        hosts.on_first(
            lambda: save_pretrained(network, folder, self._tokenizer, base_model=self.model)
        )


class RewardModelTrainer(_SupervisedTrainer[RewardModelConfig, Pair]):
    """A reward model that learns which of two answers people chose."""

    title = "Reward model"

    def _objective(self, network: RewardModel) -> Objective:
        return PreferenceObjective(self.config.learning.centring_coef, self.config.run.remat)

    def evaluate(self, progress: Progress) -> Evaluation:
        outputs: PreferenceOutputs = self._look(self._held_out, progress)
        scores = np.asarray(outputs.score, np.float64)
        chosen, rejected = scores[::2], scores[1::2]
        loss = float(np.logaddexp(0, rejected - chosen).mean())
        means = {
            "loss": loss,
            "accuracy": float(np.where(chosen == rejected, 0.5, chosen > rejected).mean()),
            "calibration_error": algorithm.calibration_error(chosen, rejected),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
            "num_pairs": float(len(chosen)),
        }
        samples = [
            self._sample(example, name, float(scores[2 * i + k]))
            for i, pair in enumerate(self._held_out[: NUM_SAMPLES // 2])
            for k, (name, example) in enumerate(zip(("chosen", "rejected"), pair[:2], strict=True))
        ]
        return Evaluation(means, samples, score=-loss)

    def save(self, folder: Path) -> None:
        model = hosts.whole(self.network)
        if self.config.learning.center:
            model = self._centred(model)
        hosts.on_first(
            lambda: save_reward_model(model, folder, self._tokenizer, base_model=self.model)
        )

    def _centred(self, model: RewardModel) -> RewardModel:
        """With scores of the held-out texts at mean 0 and standard deviation 1."""
        hidden = self._look(self._held_out).hidden
        try:
            weight = algorithm.centred_head(np.asarray(model.score.weight[0]), hidden)
        except ValueError as error:
            raise UsageError(
                f"{self.held_out.name}: the model gives all held-out texts one score, so that "
                "--center cannot scale it; hold out other texts, or leave --center out."
            ) from error
        graphdef, state = nnx.split(model)
        other: RewardModel = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
        other.score.weight = nnx.Param(jnp.asarray(weight)[None])
        return other


def _learns(path: tuple[Any, ...], _: Any) -> bool:
    """Not a value head, nor its backbone: supervised learning says nothing of values."""
    return path[0] in ("backbone", "score")


def _texts_of(item: Example | Pair) -> Sequence[Example]:
    return item[:2] if isinstance(item, Pair) else (item,)


def _margin(item: Example | Pair) -> float:
    return item.margin if isinstance(item, Pair) else 0.0


def _longest(items: Sequence[Example | Pair]) -> int:
    return max(len(example.ids) for item in items for example in _texts_of(item))


def _digest(items: Sequence[Example | Pair]) -> str:
    """Of all that a run takes from its rows."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        for example in _texts_of(item):
            digest.update(example.ids.tobytes() + example.is_learnt.tobytes())
        digest.update(f"{_margin(item)}\n".encode())
    return digest.hexdigest()
