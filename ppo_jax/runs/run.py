"""A training run under way: iterations, evaluations, records, checkpoints, and how it ends."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from flax import nnx

from ppo_jax import hosts
from ppo_jax.agent import PPOAgent, TooManyNonfiniteUpdates
from ppo_jax.files import folder_digest
from ppo_jax.generation.episode_metrics import (
    evaluation_means,
    gold_spread,
    length_counts,
    sample_record,
)
from ppo_jax.models import Generation, save_pretrained
from ppo_jax.runs.checkpoints import Checkpoints
from ppo_jax.runs.checksums import digest
from ppo_jax.runs.config_file import Settings, settings
from ppo_jax.runs.distributions import distributions_record
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.interruption import EXIT_STATUS, stop_on_signal
from ppo_jax.runs.progress import Progress
from ppo_jax.runs.records import Record
from qwen_env.errors import RunError, UsageError, UserFacingError
from qwen_env.prompts import PromptDataset

PROG = "ppo-train"
NUM_SAMPLES = 8  # held-out prompts whose completions are kept in samples.jsonl
SECONDS_BETWEEN_PLOTS = 20.0
ALIKE = 3  # iterations in a row in which all scores are alike, before that is said


@dataclass
class RunState:
    """What a run remembers beside the agent's state; JSON, in every checkpoint."""

    settings: Settings
    model_digest: str  # of the model that it began with
    prompts_digest: str  # of the training prompts
    eval_prompts_digest: str | None = None  # of the held-out ones, None in older checkpoints
    best_score: float | None = None
    best_iteration: int | None = None
    best_digest: str | None = None  # of best/, where it was not written since the last checkpoint
    unfinished: dict[str, Record] | None = None
    """What an iteration will record whose update is done and whose evaluation is not."""


class Run:
    """A run under way: the agent, its files, and what is remembered between iterations.

    Args:
        agent: trained to its `num_iterations`, from its present state if nothing was saved.
        folder: locked.
        eval_prompts: held out; `eval_size` of them are answered at every evaluation.
    """

    def __init__(self, agent: PPOAgent, folder: RunFolder, eval_prompts: PromptDataset):
        self.agent, self.folder, self.config = agent, folder, agent.config.run
        self.eval_prompts = eval_prompts[: self.config.eval_size]
        self.checkpoints = Checkpoints(folder.checkpoints, self.config.keep_checkpoints)
        hosts.on_first(self.checkpoints.sweep)
        self.progress = Progress(agent.num_iterations)
        self.state = RunState(
            settings=settings(agent.config),
            model_digest=digest(agent.initial_backbone),
            prompts_digest=prompts_digest(agent.task.prompts),
            eval_prompts_digest=prompts_digest(eval_prompts),
        )
        self.plotted_at = -SECONDS_BETWEEN_PLOTS
        self.num_alike, self.told_alike = 0, False  # iterations in a row whose scores are alike

    def go(self, *, resume: bool) -> None:
        """Train from the start, or from the last checkpoint, to the end or an interruption.

        Raises:
            UserFacingError: the run cannot go on; what was saved before is still there, and named.
            SystemExit: it was interrupted, and is saved.
        """
        agent = self.agent
        stopping = "Stopping after this iteration; a second Ctrl-C leaves at once, without saving."
        with (
            self.progress,
            stop_on_signal(lambda: self.progress.say(stopping), self.progress.leave) as should_stop,
        ):
            if resume:
                self._restore()
            recorded = agent.iteration - (self.state.unfinished is not None)
            # The untrained model is evaluated again, if nothing was learnt since.
            self.folder.begin(recorded if agent.iteration else -1, self.progress.say)
            try:
                self._learn(should_stop)
                self._save()
                if agent.iteration < agent.num_iterations:
                    self.progress.say(self._where_saved())
                    raise SystemExit(EXIT_STATUS)
                self._finish()
            except (Exception, KeyboardInterrupt) as error:  # a reward may take Ctrl-C for itself
                # An update that fails may leave no state to save, and a full disk no room for it.
                with suppress(Exception):
                    if agent.iteration > 0 and hosts.is_everywhere(error):
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
        if self.state.unfinished is not None:
            self._finish_iteration()
        for experience, metrics in self.agent.learn():
            lengths = length_counts(experience, self.agent.task.rules.max_new_tokens)
            distributions = self.agent.distributions | {"length": lengths}
            self.state.unfinished = {
                "metrics": metrics | gold_spread(experience) | baseline,
                "distributions": distributions_record(self.agent.iteration, distributions),
            }
            if self.agent.tokens is not None:
                self.state.unfinished["tokens"] = self.agent.tokens
            baseline = {}
            self._finish_iteration()
            if hosts.any_of(should_stop()):
                break

    def _finish_iteration(self) -> None:
        """Evaluate, record and save what falls due after an iteration's update."""
        assert self.state.unfinished is not None
        iteration = self.agent.iteration
        metrics, distributions = (self.state.unfinished[x] for x in ("metrics", "distributions"))
        is_last = iteration >= self.agent.num_iterations
        evaluates = iteration % self.config.eval_every == 0 or is_last
        if evaluates:
            means, _ = self._evaluate()
            metrics = metrics | {f"eval/{name}": mean for name, mean in means.items()}
        if (tokens := self.state.unfinished.get("tokens")) is not None:
            self.folder.write_tokens(tokens)
        self.folder.write_distributions(distributions)
        self.folder.write_metrics(metrics)
        self.state.unfinished = None
        self.progress.iterated(metrics)
        self._warn_of_scores_alike(metrics)
        if evaluates and time.monotonic() - self.plotted_at > SECONDS_BETWEEN_PLOTS:
            self.folder.plot()
            self.plotted_at = time.monotonic()
        if iteration % self.config.save_every == 0:
            self._save()

    def _evaluate(self) -> tuple[dict[str, float], list[Record]]:
        """Held-out means and samples of a greedy and a sampled pass; keeps the best model."""
        iteration = self.agent.iteration
        means: dict[str, float] = {"num_prompts": len(self.eval_prompts)}
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
        best, score = self.state.best_score, means["sampled/score"]
        if iteration and self._is_sound() and (best is None or score > best):
            self.folder.sync()  # whoever finds another best/ than a checkpoint's finds out why
            self._save_model(self.folder.best)
            self.state.best_score, self.state.best_iteration = score, iteration
            self.state.best_digest = None
        return means, samples["sampled"]

    def _warn_of_scores_alike(self, metrics: Record) -> None:
        score, spread = metrics["objective/score"], metrics["objective/score_std"]
        self.num_alike = self.num_alike + 1 if spread <= 1e-6 * abs(score) else 0
        if self.num_alike == ALIKE and not self.told_alike:
            self.told_alike = True
            self.progress.say(
                f"All responses of {ALIKE} iterations in a row scored {score:g}, and PPO learns "
                "only from differences. See samples.jsonl for what was written, and whether the "
                "reward is right; if it is, try easier prompts, a reward with more steps, a larger "
                "batch_size or a higher temperature."
            )

    def _finish(self) -> None:
        self._save_model(self.folder.final)
        self.progress.samples("After training", self.folder.last_samples())
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
        restored = self.checkpoints.restore(self.agent.state, self.progress.say)
        if restored is None:
            if self.folder.final.exists():
                raise UsageError(
                    f"{self.folder.path} holds a finished run whose checkpoints are gone; its "
                    f"model is in {self.folder.final}; choose another --output-dir."
                )
            self.progress.say("Nothing was saved before the interruption: starting again.")
            return
        self.agent.state = restored[0]
        now, self.state = self.state, RunState(**restored[1])
        iteration, total = self.agent.iteration, self.agent.num_iterations
        self.folder.check_unedited(self.state.settings)
        self.state.settings = now.settings
        if self.state.model_digest != now.model_digest:
            raise UsageError(
                f"{self.agent.config.task.model} is not the model that the run in "
                f"{self.folder.path} was started with: its weights have changed."
            )
        source = self.agent.config.task
        for what, name, before, after in (
            (
                "prompts",
                source.task or source.prompts,
                self.state.prompts_digest,
                now.prompts_digest,
            ),
            (
                "held-out prompts",
                source.eval_prompts or source.task or source.prompts,
                self.state.eval_prompts_digest or now.eval_prompts_digest,
                now.eval_prompts_digest,
            ),
        ):
            if before != after:
                raise UsageError(
                    f"{name} does not hold the {what} that the run in {self.folder.path} was "
                    "started with; put those back, or start another run."
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
        recorded = self.agent.iteration - (self.state.unfinished is not None)
        is_same = folder_digest(self.folder.best) == self.state.best_digest
        if not is_same and not self.folder.evaluated_after(recorded):
            raise UsageError(
                f"{self.folder.best} was changed since iteration {self.state.best_iteration} wrote "
                "it; put it back, or move it away, and the next evaluation makes it again."
            )

    def _is_sound(self) -> bool:
        """Whether the last update was finite; where it was not, the policy may have diverged."""
        return not self.agent.state.nonfinite_in_a_row

    def _save(self) -> None:
        if not self._is_sound():  # what is saved already is the better place to go on from
            return
        self.folder.sync()
        if self.state.best_iteration is not None and self.state.best_digest is None:
            self.state.best_digest = hosts.on_first(lambda: folder_digest(self.folder.best))
        self.checkpoints.save(self.agent.state, dataclasses.asdict(self.state))

    def _save_model(self, folder: Path) -> None:
        config, task = self.agent.config, self.agent.task
        generation = Generation(*config.ppo.sampling, max_new_tokens=task.rules.max_new_tokens)
        network = self.agent.network
        if jax.process_count() > 1:  # an array at a time, since some devices may not hold them all
            graphdef, arrays = nnx.split(network)
            network = nnx.merge(graphdef, jax.tree.map(hosts.fetch, arrays))
        hosts.on_first(
            lambda: save_pretrained(
                network,
                folder,
                task.tokenizer,
                generation=generation,
                base_model=config.task.model,
            )
        )

    def _where_saved(self) -> str:
        saved = self.checkpoints.iterations()
        if not saved:
            return "Nothing is saved: the updates were not finite."
        return (
            f"The run is saved as it was after iteration {saved[-1]}, in "
            f"{self.checkpoints.folder}; continue it with: {PROG} --output-dir "
            f"{self.folder.path} --resume"
        )


def prompts_digest(prompts: PromptDataset) -> str:
    """A digest of all that a run takes from its prompts: tokens, and the rows that rewards see."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        row = json.dumps(dict(prompt.row), sort_keys=True, default=repr)
        digest.update(f"{prompt.ids.tolist()} {row}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()
