"""A training run under way: iterations, evaluations, records, checkpoints, and how it ends."""

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import numpy as np

from ppo_jax.agent import PPOAgent, TooManyNonfiniteUpdates
from ppo_jax.generation.episode_metrics import (
    evaluation_means,
    gold_spread,
    length_counts,
    sample_record,
)
from ppo_jax.models import save_pretrained
from ppo_jax.runs.checkpoints import Checkpoints
from ppo_jax.runs.folder import Record, RunFolder, distributions_record
from ppo_jax.runs.interruption import EXIT_STATUS, stop_on_signal
from ppo_jax.runs.progress import Progress
from qwen_env.errors import RunError, UsageError, UserFacingError
from qwen_env.prompts import PromptDataset

PROG = "python -m ppo_jax.train"
NUM_SAMPLES = 8  # held-out prompts whose completions are kept in samples.jsonl
SECONDS_BETWEEN_PLOTS = 20.0


class Run:
    """A run under way: the agent, its files, and what is remembered between iterations."""

    def __init__(self, agent: PPOAgent, folder: RunFolder, eval_prompts: PromptDataset):
        self.agent, self.folder, self.eval_prompts = agent, folder, eval_prompts
        self.settings = agent.config.run
        self.plotted_at = -SECONDS_BETWEEN_PLOTS
        # What is saved beside the agent's state.
        self.metadata: dict[str, Any] = {
            "model_fingerprint": fingerprint(agent.initial_backbone),
            "prompts_fingerprint": fingerprint(ids_and_lengths(agent.task.prompts)),
            "best_score": None,
            "best_iteration": None,
            "unfinished": None,  # what an iteration whose evaluation failed will record
        }

    def go(self, *, resume: bool) -> None:
        """Train from the start, or from the last checkpoint, to the end or an interruption.

        Raises:
            UserFacingError: the run cannot go on; what was saved before is still there, and named.
            SystemExit: it was interrupted, and is saved.
        """
        agent = self.agent
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.settings.keep_checkpoints)
        self.progress = Progress(agent.num_iterations)
        stopping = "Stopping after this iteration; a second Ctrl-C leaves at once, without saving."
        with (
            self.progress,
            stop_on_signal(lambda: self.progress.say(stopping), self.progress.leave) as should_stop,
        ):
            if resume:
                self._restore()
            self.folder.create()
            recorded = agent.iteration - (self.metadata["unfinished"] is not None)
            self.folder.open(recorded, starts_anew=agent.iteration == 0)
            try:
                self._learn(should_stop)
                self._save()
                if agent.iteration < agent.num_iterations:
                    self.progress.say(self._where_saved())
                    raise SystemExit(EXIT_STATUS)
                self._finish()
            except Exception as error:
                # An update that fails may leave no state to save, and a full disk no room for it.
                with suppress(Exception):
                    if agent.iteration > 0:
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
        if self.agent.iteration == 0:
            self.progress.doing("compiling, and evaluating the untrained model ...")
            means, samples = self._evaluate()
            baseline = {f"baseline/{name}": mean for name, mean in means.items()}
            self.progress.samples("Before training", samples)
            self.progress.doing("compiling ...")
        if self.metadata["unfinished"] is not None:
            self._finish_iteration()
        for experience, metrics in self.agent.learn():
            lengths = length_counts(experience, self.agent.task.rules.max_new_tokens)
            distributions = self.agent.distributions | {"length": lengths}
            self.metadata["unfinished"] = {
                "metrics": metrics | gold_spread(experience) | baseline,
                "distributions": distributions_record(self.agent.iteration, distributions),
            }
            baseline = {}
            self._finish_iteration()
            if should_stop():
                break

    def _finish_iteration(self) -> None:
        """Evaluate, record and save what falls due after an iteration's update."""
        iteration, settings = self.agent.iteration, self.settings
        metrics: Record = self.metadata["unfinished"]["metrics"]
        evaluates = iteration % settings.eval_every == 0 or iteration >= self.agent.num_iterations
        if evaluates:
            means, _ = self._evaluate()
            metrics = metrics | {f"eval/{name}": mean for name, mean in means.items()}
        self.folder.write_distributions(self.metadata["unfinished"]["distributions"])
        self.folder.write_metrics(metrics)
        self.metadata["unfinished"] = None
        self.progress.iterated(metrics)
        if evaluates and time.monotonic() - self.plotted_at > SECONDS_BETWEEN_PLOTS:
            self.folder.plot()
            self.plotted_at = time.monotonic()
        if iteration % settings.save_every == 0:
            self._save()

    def _evaluate(self) -> tuple[dict[str, float], list[Record]]:
        """Held-out means and samples of a greedy and a sampled pass; keeps the best model."""
        iteration = self.agent.iteration
        means: dict[str, float] = {}
        samples: dict[str, list[Record]] = {}
        for decoding in ("greedy", "sampled"):
            episodes, outcomes = self.agent.evaluate(
                self.eval_prompts,
                greedy=decoding == "greedy",
                on_batch=partial(self.progress.evaluating, decoding, len(self.eval_prompts)),
            )
            scored = evaluation_means(outcomes)
            means |= {f"{decoding}/{name}": mean for name, mean in scored.items()}
            samples[decoding] = [
                {"iteration": iteration, "decoding": decoding, **sample_record(episode, outcome)}
                for episode, outcome in zip(episodes[:NUM_SAMPLES], outcomes, strict=False)
            ]
        self.folder.write_samples(samples["greedy"] + samples["sampled"])
        self.progress.evaluated(iteration, means)
        best, score = self.metadata["best_score"], means["sampled/score"]
        if iteration and self._is_sound() and (best is None or score > best):
            self.metadata |= {"best_score": score, "best_iteration": iteration}
            save_pretrained(self.agent.network, self.folder.best, self.agent.task.tokenizer)
        return means, samples["sampled"]

    def _finish(self) -> None:
        save_pretrained(self.agent.network, self.folder.final, self.agent.task.tokenizer)
        self.progress.samples("After training", self.folder.last_samples())
        best = (
            f"the best one (iteration {self.metadata['best_iteration']}) in {self.folder.best}, "
            if self.folder.best.exists()
            else ""
        )
        self.progress.say(
            f"The trained model is in {self.folder.final}, {best}the curves in "
            f"{self.folder.plot()}."
        )

    def _restore(self) -> None:
        restored = self.checkpoints.restore(self.agent.state, self.progress.say)
        if restored is None:
            if self.folder.final.exists():
                raise UsageError(
                    f"{self.folder.path} holds a finished run whose checkpoints are gone; its "
                    f"model is in {self.folder.final}; choose another --output-dir."
                )
            self.progress.say("Nothing was saved before the interruption: starting again.")
            return
        state, metadata = restored
        metadata = self.metadata | metadata  # an earlier version may not have noted all of them
        if metadata["model_fingerprint"] != self.metadata["model_fingerprint"]:
            raise UsageError(
                f"{self.agent.config.task.model} is not the model that the run in "
                f"{self.folder.path} was started with: its weights have changed."
            )
        if metadata["prompts_fingerprint"] != self.metadata["prompts_fingerprint"]:
            raise UsageError(
                f"{self.agent.config.task.prompts} does not hold the prompts that the run in "
                f"{self.folder.path} was started with; put those back, or start another run."
            )
        iteration, total = int(state.iteration), self.agent.num_iterations
        if iteration > total:
            raise UsageError(
                f"num_iterations is {total}, but the run in {self.folder.path} has done "
                f"{iteration}; raise it, or leave it out."
            )
        self.agent.state, self.metadata = state, metadata
        self.progress.done = iteration
        self.progress.say(
            f"Continuing after iteration {iteration} of {total}, with the settings of the start."
            if iteration < total
            else f"All {total} iterations were done already."
        )

    def _is_sound(self) -> bool:
        """Whether the last update was finite; where it was not, the policy may have diverged."""
        return not self.agent.state.nonfinite_in_a_row

    def _save(self) -> None:
        if self._is_sound():  # or what is saved already is the better place to go on from
            self.checkpoints.save(self.agent.state, self.metadata)

    def _where_saved(self) -> str:
        saved = self.checkpoints.iterations()
        if not saved:
            return "Nothing is saved: the updates were not finite."
        return (
            f"The run is saved as it was after iteration {saved[-1]}, in "
            f"{self.checkpoints.folder}; continue it with: {PROG} --output-dir "
            f"{self.folder.path} --resume"
        )


def ids_and_lengths(prompts: PromptDataset) -> list[np.ndarray]:
    """The ids of each prompt, and int [prompts] how many: together they tell where one ends."""
    ids = [prompt.ids for prompt in prompts]
    return [*ids, np.array([len(row) for row in ids])]


def fingerprint(arrays: Any) -> str:
    """A digest of all arrays of a tree: tells whether a resumed run has what it began with."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.asarray(leaf).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()
