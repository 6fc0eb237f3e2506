"""A training run under way: iterations, evaluations, records, checkpoints, and how it ends.

What is trained, and how, is a `Trainer`'s: PPO's, or supervised learning's.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ppo_jax import hosts
from ppo_jax.config import RunSettings
from ppo_jax.files import folder_digest
from ppo_jax.learning.nonfinite import TooManyNonfiniteUpdates
from ppo_jax.runs.checkpoints import Checkpoints
from ppo_jax.runs.config_file import Settings, settings
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.interruption import EXIT_STATUS, stop_on_signal
from ppo_jax.runs.progress import Progress
from ppo_jax.runs.records import Record
from qwen_env.errors import RunError, UsageError, UserFacingError

NUM_SAMPLES = 8  # held-out texts that an evaluation leaves in samples.jsonl
SECONDS_BETWEEN_PLOTS = 20.0


class Source(NamedTuple):
    """What a run learns from, or is evaluated on."""

    what: str  # in words
    name: str | None  # in the settings
    digest: str


class Evaluation(NamedTuple):
    """What a model does with what is held out."""

    means: dict[str, float]  # by name
    samples: list[Record]  # lines of samples.jsonl
    score: float  # the model with the highest one is kept


class Trainer(Protocol):
    """What a run trains."""

    state: Any
    """A pytree: all that learning changes, with `iteration` and `nonfinite_in_a_row`."""
    num_iterations: int
    """Iterations of the whole run."""
    model: str
    """The model that it begins with, as the settings name it."""
    model_digest: str
    training: Source
    held_out: Source

    @property
    def config(self) -> RunSettings: ...

    @property
    def title(self) -> str:
        """In a word or two, what goes on."""

    def learn(self) -> Iterator[dict[str, Record]]:
        """Iterate until all is done; yields each iteration's records: `"metrics"` and, where there
        are any, `"distributions"` and `"tokens"`.

        Raises:
            TooManyNonfiniteUpdates: see `AdamWConfig.max_nonfinite_updates`.
        """

    def evaluate(self, progress: Progress) -> Evaluation:
        """The present model on what is held out."""

    def remark(self, metrics: Record) -> str | None:
        """What a person should be told after an iteration, if anything."""

    def save(self, folder: Path) -> None:
        """Write the present model to a folder in Hugging Face layout."""


@dataclass
class RunState:
    """What a run remembers beside the agent's state; JSON, in every checkpoint."""

    settings: Settings
    model_digest: str  # of the model that it began with
    prompts_digest: str  # of what it learns from
    eval_prompts_digest: str | None = None  # of what is held out, None in older checkpoints
    best_score: float | None = None
    best_iteration: int | None = None
    best_digest: str | None = None  # of best/, where it was not written since the last checkpoint
    unfinished: dict[str, Record] | None = None
    """What an iteration will record whose update is done and whose evaluation is not."""


class Run:
    """A run under way: the trainer, its files, and what is remembered between iterations.

    Args:
        trainer: taken to its `num_iterations`, from its present state if nothing was saved.
        folder: locked.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder):
        self.trainer, self.folder, self.config = trainer, folder, trainer.config.run
        self.checkpoints = Checkpoints(folder.checkpoints, self.config.keep_checkpoints)
        hosts.on_first(self.checkpoints.sweep)
        self.progress = Progress(trainer.num_iterations, trainer.title)
        self.state = RunState(
            settings=settings(trainer.config),
            model_digest=trainer.model_digest,
            prompts_digest=trainer.training.digest,
            eval_prompts_digest=trainer.held_out.digest,
        )
        self.plotted_at = -SECONDS_BETWEEN_PLOTS

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return int(self.trainer.state.iteration)

    def go(self, *, resume: bool) -> None:
        """Train from the start, or from the last checkpoint, to the end or an interruption.

        Raises:
            UserFacingError: the run cannot go on; what was saved before is still there, and named.
            SystemExit: it was interrupted, and is saved.
        """
        stopping = "Stopping after this iteration; a second Ctrl-C leaves at once, without saving."
        with (
            self.progress,
            stop_on_signal(lambda: self.progress.say(stopping), self.progress.leave) as should_stop,
        ):
            if resume:
                self._restore()
            recorded = self.iteration - (self.state.unfinished is not None)
            # The untrained model is evaluated again, if nothing was learnt since.
            self.folder.begin(recorded if self.iteration else -1, self.progress.say)
            try:
                self._learn(should_stop)
                self._save()
                if self.iteration < self.trainer.num_iterations:
                    self.progress.say(self._where_saved())
                    raise SystemExit(EXIT_STATUS)
                self._finish()
            except (Exception, KeyboardInterrupt) as error:  # a reward may take Ctrl-C for itself
                # An update that fails may leave no state to save, and a full disk no room for it.
                with suppress(Exception):
                    if self.iteration > 0 and hosts.is_everywhere(error):
                        self._save()
                if not self.checkpoints.iterations():
                    raise
                if isinstance(error, TooManyNonfiniteUpdates) and self.folder.best.exists():
                    error = RunError(f"{error} It can begin with --model {self.folder.best}.")
                if isinstance(error, UserFacingError):
                    raise RunError(f"{error} {self._where_saved()}") from error
                self.progress.say(self._where_saved())
                raise

    def _learn(self, should_stop: Callable[[], bool]) -> None:
        baseline: Record = {}
        if self.iteration == 0:
            self.progress.doing("compiling, and evaluating the untrained model ...")
            evaluation = self._evaluate()
            baseline = {f"baseline/{name}": mean for name, mean in evaluation.means.items()}
            self.progress.samples("Before training", _drawn(evaluation.samples))
            self.progress.doing("compiling ...")
        if self.state.unfinished is not None:
            self._finish_iteration()
        for records in self.trainer.learn():
            self.state.unfinished = records | {"metrics": records["metrics"] | baseline}
            baseline = {}
            self._finish_iteration()
            if hosts.any_of(should_stop()):
                break

    def _finish_iteration(self) -> None:
        """Evaluate, record and save what falls due after an iteration's update."""
        assert self.state.unfinished is not None
        iteration, metrics = self.iteration, self.state.unfinished["metrics"]
        is_last = iteration >= self.trainer.num_iterations
        evaluates = iteration % self.config.eval_every == 0 or is_last
        if evaluates:
            means = self._evaluate().means
            metrics = metrics | {f"eval/{name}": mean for name, mean in means.items()}
        if (tokens := self.state.unfinished.get("tokens")) is not None:
            self.folder.write_tokens(tokens)
        if (distributions := self.state.unfinished.get("distributions")) is not None:
            self.folder.write_distributions(distributions)
        self.folder.write_metrics(metrics)
        self.state.unfinished = None
        self.progress.iterated(metrics)
        if (remark := self.trainer.remark(metrics)) is not None:
            self.progress.say(remark)
        if evaluates and time.monotonic() - self.plotted_at > SECONDS_BETWEEN_PLOTS:
            self.folder.plot()
            self.plotted_at = time.monotonic()
        if iteration % self.config.save_every == 0:
            self._save()

    def _evaluate(self) -> Evaluation:
        """Evaluate the present model, and keep it if it is the best."""
        iteration, evaluation = self.iteration, self.trainer.evaluate(self.progress)
        self.folder.write_samples(evaluation.samples)
        self.progress.evaluated(iteration, evaluation.means)
        best, score = self.state.best_score, evaluation.score
        if iteration and self._is_sound() and (best is None or score > best):
            self.folder.sync()  # whoever finds another best/ than a checkpoint's finds out why
            self.trainer.save(self.folder.best)
            self.state.best_score, self.state.best_iteration = score, iteration
            self.state.best_digest = None
        return evaluation

    def _finish(self) -> None:
        self.trainer.save(self.folder.final)
        self.progress.samples("After training", _drawn(self.folder.last_samples()))
        best = (
            f"the best one (iteration {self.state.best_iteration}) in {self.folder.best}, "
            if self.folder.best.exists()
            else ""
        )
        self.progress.say(
            f"The trained model is in {self.folder.final}, {best}the curves in "
            f"{self.folder.plot()}."
        )

    def _restore(self) -> None:
        restored = self.checkpoints.restore(self.trainer.state, self.progress.say)
        if restored is None:
            if self.folder.final.exists():
                raise UsageError(
                    f"{self.folder.path} holds a finished run whose checkpoints are gone; its "
                    f"model is in {self.folder.final}; choose another --output-dir."
                )
            self.progress.say("Nothing was saved before the interruption: starting again.")
            return
        self.trainer.state = restored[0]
        now, self.state = self.state, RunState(**restored[1])
        iteration, total = self.iteration, self.trainer.num_iterations
        self.folder.check_unedited(self.state.settings)
        self.state.settings = now.settings
        if self.state.model_digest != now.model_digest:
            raise UsageError(
                f"{self.trainer.model} is not the model that the run in {self.folder.path} was "
                "started with: its weights have changed."
            )
        known = self.state.prompts_digest, self.state.eval_prompts_digest or now.eval_prompts_digest
        for source, before in zip(
            (self.trainer.training, self.trainer.held_out), known, strict=True
        ):
            if before != source.digest:
                raise UsageError(
                    f"{source.name} does not hold the {source.what} that the run in "
                    f"{self.folder.path} was started with; put those back, or start another run."
                )
        self.state.eval_prompts_digest = now.eval_prompts_digest
        if iteration > total:
            raise UsageError(
                f"num_iterations is {total}, but the run in {self.folder.path} has done "
                f"{iteration}; raise it, or leave it out."
            )
        self._check_best()
        self.progress.done = iteration
        self.progress.say(
            f"Continuing after iteration {iteration} of {total}, with the settings of the start."
            if iteration < total
            else f"All {total} iterations were done already; --num-iterations with a larger number "
            "goes on."
        )

    def _check_best(self) -> None:
        """Check that best/ is what the checkpoint knows, or was written after it.

        Raises:
            UsageError: it was changed.
        """
        if self.state.best_digest is None:
            return
        if not self.folder.best.exists():
            self.progress.say(f"{self.folder.best} is gone: the next evaluation makes it again.")
            self.state.best_score = self.state.best_iteration = self.state.best_digest = None
            return
        recorded = self.iteration - (self.state.unfinished is not None)
        is_same = folder_digest(self.folder.best) == self.state.best_digest
        if not is_same and not self.folder.evaluated_after(recorded):
            raise UsageError(
                f"{self.folder.best} was changed since iteration {self.state.best_iteration} wrote "
                "it; put it back, or move it away, and the next evaluation makes it again."
            )

    def _is_sound(self) -> bool:
        """Whether the last update was finite; where it was not, the policy may have diverged."""
        return not self.trainer.state.nonfinite_in_a_row

    def _save(self) -> None:
        if not self._is_sound():  # what is saved already is the better place to go on from
            return
        self.folder.sync()
        if self.state.best_iteration is not None and self.state.best_digest is None:
            self.state.best_digest = hosts.on_first(lambda: folder_digest(self.folder.best))
        self.checkpoints.save(self.trainer.state, dataclasses.asdict(self.state))

    def _where_saved(self) -> str:
        saved = self.checkpoints.iterations()
        if not saved:
            return "Nothing is saved: the updates were not finite."
        return (
            f"The run is saved as it was after iteration {saved[-1]}, in "
            f"{self.checkpoints.folder}; continue it with: {self.trainer.config.command} "
            f"--output-dir {self.folder.path} --resume"
        )


def _drawn(samples: Sequence[Record]) -> list[Record]:
    """Those that show what the model does by itself."""
    return [sample for sample in samples if sample["decoding"] != "greedy"]
