"""Train a Qwen2 with PPO: `python -m ppo_jax.train --preset pocket --output-dir runs/pocket`."""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax import cli
from ppo_jax.actor import Episodes
from ppo_jax.agent import PPOAgent
from ppo_jax.checkpoints import Checkpoints
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TaskConfig, TrainConfig, preset
from ppo_jax.config_checks import check_warmups
from ppo_jax.evaluation import evaluation_means, sample_record
from ppo_jax.interruption import EXIT_STATUS, stop_on_signal
from ppo_jax.models import load_pretrained, save_pretrained
from ppo_jax.progress import Progress
from ppo_jax.rewards import load_training_reward
from ppo_jax.run_folder import Record, RunFolder, distributions_record, read_config
from qwen_env.errors import UsageError
from qwen_env.prompts import PromptDataset, load_prompts
from qwen_env.task import make_task
from qwen_env.tokenizer import Tokenizer, load_tokenizer

PROG = "python -m ppo_jax.train"
NUM_SAMPLES = 8  # held-out prompts whose completions are kept in samples.jsonl
SECONDS_BETWEEN_PLOTS = 20.0


@dataclass(frozen=True)
class Arguments:
    """Train a Qwen2 with PPO. A preset gives every flag its default."""

    output_dir: Path
    """Folder of the run; runs/PRESET where it is not given."""
    task: TaskConfig
    ppo: PPOConfig
    optimizer: OptimizerConfig
    run: RunConfig
    preset: str = "pocket"
    """Where the defaults come from: pocket, smollm2, or qwen2.5-0.5b."""
    resume: bool = False
    """Continue the run that output-dir holds, with the settings it was started with."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, config = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        train(config, arguments.output_dir, resume=arguments.resume)


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainConfig]:
    """Flags over the preset's defaults or, with --resume, over the interrupted run's settings.

    Raises:
        UsageError: an unknown preset, flag or value, or settings that contradict each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--output-dir", "--output_dir", type=Path, nargs="?")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(argv)
    name = known.preset or "pocket"
    folder = known.output_dir or Path("runs", name)
    base = read_config(folder) if known.resume else preset(name)
    default = Arguments(folder, base.task, base.ppo, base.optimizer, base.run, preset=name)
    arguments = cli.parse(Arguments, argv, prog=PROG, default=default)
    return arguments, TrainConfig(arguments.task, arguments.ppo, arguments.optimizer, arguments.run)


def train(config: TrainConfig, output_dir: Path, *, resume: bool = False) -> None:
    """Run or resume a training run in `output_dir`; see `ppo_jax.run_folder` for what it leaves.

    Raises:
        UsageError: a setting, a file or the reward function is wrong. What was learnt is saved.
        SystemExit: a signal ended the run early; what was learnt is saved.
    """
    folder = RunFolder(output_dir, config, resume=resume)
    tokenizer = load_tokenizer(config.task.model)
    prompts, eval_prompts = load_all_prompts(config, tokenizer)
    iterations = num_iterations(config, len(prompts))
    settings = config.task
    reward = load_training_reward(settings.reward, tokenizer, settings.gold_reward)
    network = load_pretrained(
        settings.model, dtype=config.run.dtype, param_dtype=config.run.param_dtype
    )
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        reward=reward,
        max_prompt_length=settings.max_prompt_length,
        max_new_tokens=settings.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=settings.min_new_tokens,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    agent = PPOAgent(network, task, config, iterations)
    run = Run(agent, folder, eval_prompts[: config.run.eval_size])
    try:
        with closing(folder):
            run.go(resume=resume)
    except BaseException:
        if not resume and folder.is_blank():
            folder.discard()
        raise


def load_all_prompts(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[PromptDataset, PromptDataset]:
    """The training prompts and the held-out ones."""
    settings = config.task

    def load(path: str) -> PromptDataset:
        return load_prompts(
            path,
            tokenizer,
            max_prompt_length=settings.max_prompt_length,
            overflow=settings.prompt_overflow,
            chat_template=True if settings.chat else None,
            system_prompt=settings.system_prompt,
        )

    prompts = load(settings.prompts)
    if settings.eval_prompts is not None:
        return prompts, load(settings.eval_prompts)
    if len(prompts) < 2:
        raise UsageError(
            f"{settings.prompts} holds one prompt, so none can be set aside for evaluation; "
            "add prompts, or name others with --eval-prompts."
        )
    num_held_out = max(len(prompts) // 10, 1)
    return prompts[:-num_held_out], prompts[-num_held_out:]


def num_iterations(config: TrainConfig, num_prompts: int) -> int:
    """Iterations of the whole run; the last pass over the prompts may end within a batch.

    Raises:
        UsageError: a warm-up would last as long.
    """
    if config.run.num_iterations is not None:
        return config.run.num_iterations
    num_visits = config.run.num_prompt_epochs * num_prompts
    iterations = math.ceil(num_visits / config.ppo.prompts_per_batch)
    check_warmups(config.optimizer, iterations)
    return iterations


class Run:
    """A run under way: the agent, its files, and what is remembered between iterations."""

    def __init__(self, agent: PPOAgent, folder: RunFolder, eval_prompts: PromptDataset):
        self.agent, self.folder, self.eval_prompts = agent, folder, eval_prompts
        self.settings = agent.config.run
        self.plotted_at = -SECONDS_BETWEEN_PLOTS
        # What is saved beside the agent's state.
        self.facts: dict[str, Any] = {
            "model_fingerprint": fingerprint(agent.initial_backbone),
            "best_score": None,
            "best_iteration": None,
            "unfinished": None,  # what an iteration whose evaluation failed will record
        }

    def go(self, *, resume: bool) -> None:
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
            self.folder.open(agent.iteration - (self.facts["unfinished"] is not None))
            try:
                self._learn(should_stop)
            except UsageError as error:
                if agent.iteration == 0:
                    raise
                self._save()
                raise UsageError(f"{error} {self._where_saved()}") from error
            self._save()
            if agent.iteration < agent.num_iterations:
                self.progress.say(self._where_saved())
                raise SystemExit(EXIT_STATUS)
            self._finish()

    def _learn(self, should_stop: Callable[[], bool]) -> None:
        baseline: Record = {}
        if self.agent.iteration == 0:
            self.progress.doing("compiling, and evaluating the untrained model ...")
            means, samples = self._evaluate()
            baseline = {f"baseline/{name}": mean for name, mean in means.items()}
            self.progress.samples("Before training", samples)
            self.progress.doing("compiling ...")
        if self.facts["unfinished"] is not None:
            self._finish_iteration()
        for episodes, metrics in self.agent.learn():
            lengths = length_counts(episodes, self.agent.task.rules.max_new_tokens)
            distributions = self.agent.distributions | {"length": lengths}
            self.facts["unfinished"] = {
                "metrics": metrics | gold_spread(episodes) | baseline,
                "distributions": distributions_record(self.agent.iteration, distributions),
            }
            baseline = {}
            self._finish_iteration()
            if should_stop():
                break

    def _finish_iteration(self) -> None:
        """Evaluate, record and save what falls due after an iteration's update."""
        iteration, settings = self.agent.iteration, self.settings
        metrics: Record = self.facts["unfinished"]["metrics"]
        evaluates = iteration % settings.eval_every == 0 or iteration >= self.agent.num_iterations
        if evaluates:
            means, _ = self._evaluate()
            metrics = metrics | {f"eval/{name}": mean for name, mean in means.items()}
        self.folder.write_distributions(self.facts["unfinished"]["distributions"])
        self.folder.write_metrics(metrics)
        self.facts["unfinished"] = None
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
            episodes, outcomes = self.agent.evaluate(self.eval_prompts, greedy=decoding == "greedy")
            scored = evaluation_means(outcomes)
            means |= {f"{decoding}/{name}": mean for name, mean in scored.items()}
            samples[decoding] = [
                {"iteration": iteration, "decoding": decoding, **sample_record(episode, outcome)}
                for episode, outcome in zip(episodes[:NUM_SAMPLES], outcomes, strict=False)
            ]
        self.folder.write_samples(samples["greedy"] + samples["sampled"])
        self.progress.evaluated(iteration, means)
        best, score = self.facts["best_score"], means["sampled/score"]
        if iteration and (best is None or score > best):
            self.facts |= {"best_score": score, "best_iteration": iteration}
            save_pretrained(self.agent.network, self.folder.best, self.agent.task.tokenizer)
        return means, samples["sampled"]

    def _finish(self) -> None:
        save_pretrained(self.agent.network, self.folder.final, self.agent.task.tokenizer)
        self.progress.samples("After training", self.folder.last_samples())
        self.progress.say(
            f"The trained model is in {self.folder.final}, the best one (iteration "
            f"{self.facts['best_iteration']}) in {self.folder.best}, the curves in "
            f"{self.folder.plot()}."
        )

    def _restore(self) -> None:
        restored = self.checkpoints.restore(self.agent.state, self.progress.say)
        if restored is None:
            self.progress.say("Nothing was saved before the interruption: starting again.")
            return
        state, facts = restored
        if facts["model_fingerprint"] != self.facts["model_fingerprint"]:
            raise UsageError(
                f"{self.agent.config.task.model} is not the model that the run in "
                f"{self.folder.path} was started with: its weights have changed."
            )
        self.agent.state, self.facts = state, facts
        iteration, total = self.agent.iteration, self.agent.num_iterations
        self.progress.done = iteration
        self.progress.say(
            f"Continuing after iteration {iteration} of {total}."
            if iteration < total
            else f"All {total} iterations were done already."
        )

    def _save(self) -> None:
        self.checkpoints.save(self.agent.state, self.facts)

    def _where_saved(self) -> str:
        return (
            f"The run is saved as it was after iteration {self.agent.iteration}, in "
            f"{self.checkpoints.folder}; continue it with: {PROG} --output-dir "
            f"{self.folder.path} --resume"
        )


def length_counts(episodes: Episodes, limit: int) -> np.ndarray:
    """int [T]: how many responses have 1, 2, ..., T = `limit` tokens."""
    lengths = [len(episode.completion_ids) for episode in episodes.episodes]
    return np.bincount(lengths, minlength=limit + 1)[1:]


def gold_spread(episodes: Episodes) -> dict[str, float]:
    """The standard deviation of the gold score in a batch, where there is a gold score."""
    components = [outcome.info["reward_components"] for outcome in episodes.outcomes]
    if "gold" not in components[0]:
        return {}
    return {"reward/gold_std": float(np.std([row["gold"] for row in components]))}


def fingerprint(params: Any) -> str:
    """A digest of all parameters: tells whether a resumed run has the model it began with."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


if __name__ == "__main__":
    main()
