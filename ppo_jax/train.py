"""Train a Qwen2 with PPO: `python -m ppo_jax.train --preset pocket --output-dir runs/pocket`."""

import argparse
import hashlib
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import tyro

from ppo_jax import cli
from ppo_jax.agent import PPOAgent
from ppo_jax.checkpoints import Checkpoints
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TaskConfig, TrainConfig, preset
from ppo_jax.evaluation import evaluation_means, sample_record
from ppo_jax.models import load_pretrained, save_pretrained
from ppo_jax.progress import Progress
from ppo_jax.rewards import load_training_reward
from ppo_jax.run_folder import Record, RunFolder, read_config
from qwen_env.errors import UsageError
from qwen_env.prompts import Prompt, PromptDataset, load_prompts
from qwen_env.task import TextTask, make_task
from qwen_env.tokenizer import load_tokenizer

PROG = "python -m ppo_jax.train"
NUM_SAMPLES = 8  # held-out prompts whose completions are kept in samples.jsonl


@dataclass(frozen=True)
class Arguments:
    """Train a Qwen2 with PPO. A preset gives every flag its default."""

    output_dir: Path
    """Folder of the run."""
    task: TaskConfig
    ppo: PPOConfig
    optimizer: OptimizerConfig
    run: RunConfig
    preset: str = "pocket"
    """Where the defaults come from: pocket, smollm2, or qwen2.5-0.5b."""
    resume: bool = False
    """Continue the run that output-dir holds, with the settings it was started with."""


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainConfig]:
    """Flags over the preset's defaults or, with --resume, over the interrupted run's settings.

    Raises:
        UsageError: an unknown preset, flag or value, or settings that contradict each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="pocket")
    first.add_argument("--output-dir", type=Path, nargs="?")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(argv)
    base = (
        read_config(known.output_dir) if known.resume and known.output_dir else preset(known.preset)
    )
    default = Arguments(
        tyro.MISSING, base.task, base.ppo, base.optimizer, base.run, preset=known.preset
    )
    arguments = cli.parse(Arguments, argv, prog=PROG, default=default)
    return arguments, TrainConfig(arguments.task, arguments.ppo, arguments.optimizer, arguments.run)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, config = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        train(config, arguments.output_dir, resume=arguments.resume)


def train(config: TrainConfig, output_dir: Path, *, resume: bool = False) -> None:
    """Run or resume a training run in `output_dir`; see `ppo_jax.run_folder` for what it leaves.

    Raises:
        UsageError: a setting, a file or the reward function is wrong. What was done is saved.
    """
    folder = RunFolder(output_dir, config, resume=resume)
    network = load_pretrained(config.task.model, dtype=config.run.dtype)
    task, eval_prompts = build_task(config, network.config.vocab_size)
    agent = PPOAgent(network, task, config, num_iterations(config, len(task.prompts)))
    folder.create(config)
    run = _Run(agent, folder, eval_prompts)
    try:
        run.go(resume=resume)
    finally:
        run.close()


def build_task(config: TrainConfig, vocab_size: int) -> tuple[TextTask, PromptDataset]:
    """The training task, and the held-out prompts."""
    settings = config.task
    tokenizer = load_tokenizer(settings.model)
    chat_template = True if settings.chat else None
    task = make_task(
        tokenizer=tokenizer,
        prompts=settings.prompts,
        reward=load_training_reward(settings.reward, tokenizer, settings.gold_reward),
        max_prompt_length=settings.max_prompt_length,
        max_new_tokens=settings.max_new_tokens,
        vocab_size=vocab_size,
        chat_template=chat_template,
        system_prompt=settings.system_prompt,
        prompt_overflow=settings.prompt_overflow,
        min_new_tokens=settings.min_new_tokens,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    if settings.eval_prompts is not None:
        held_out = load_prompts(
            settings.eval_prompts,
            tokenizer,
            max_prompt_length=settings.max_prompt_length,
            overflow=settings.prompt_overflow,
            chat_template=chat_template,
            system_prompt=settings.system_prompt,
        )
        return task, held_out[: config.run.eval_size]
    if len(task.prompts) < 2:
        raise UsageError(
            f"{settings.prompts} holds one prompt, so none can be set aside for evaluation; "
            "add prompts, or name others with --eval-prompts."
        )
    num_held_out = min(max(len(task.prompts) // 10, 1), config.run.eval_size)
    prompts = task.prompts
    return replace(task, prompts=prompts[:-num_held_out]), prompts[-num_held_out:]


def num_iterations(config: TrainConfig, num_prompts: int) -> int:
    """Iterations of the whole run; the last pass over the prompts may end within a batch."""
    if config.run.num_iterations is not None:
        return config.run.num_iterations
    return math.ceil(config.run.num_prompt_epochs * num_prompts / config.ppo.batch_size)


class _Run:
    """A run under way: the agent, its files, and what is remembered between iterations."""

    def __init__(self, agent: PPOAgent, folder: RunFolder, eval_prompts: Sequence[Prompt]):
        self.agent, self.folder, self.eval_prompts = agent, folder, eval_prompts
        self.settings = agent.config.run
        self.checkpoints = Checkpoints(folder.checkpoints, self.settings.keep_checkpoints)
        # What the state does not know, saved beside it.
        self.facts: dict[str, Any] = {
            "best_score": None,
            "best_iteration": None,
            "model_fingerprint": fingerprint(agent.ref_params),
        }
        self.stop_requested = False

    def go(self, *, resume: bool) -> None:
        if resume:
            self._restore()
        agent = self.agent
        self.folder.open(agent.iteration)
        with Progress(agent.num_iterations, agent.iteration) as progress, self._stop_on_signal():
            if agent.iteration >= agent.num_iterations:
                progress.say(f"All {agent.num_iterations} iterations were done already.")
            before: Record = {}
            if agent.iteration == 0:
                means, samples = self._evaluate(progress)
                before = {f"baseline/{name}": mean for name, mean in means.items()}
                progress.samples("Before training", samples)
            try:
                for _, metrics in agent.learn():
                    self._finish_iteration(metrics | before, progress)
                    before = {}
                    if self.stop_requested:
                        break
            except UsageError:
                self._save()
                progress.say(self._where_saved())
                raise
            self._save()
            if agent.iteration < agent.num_iterations:
                progress.say(self._where_saved())
                raise SystemExit(130)
            save_pretrained(agent.network, self.folder.final, agent.task.tokenizer)
            progress.samples("After training", self.folder.last_samples())
            progress.say(
                f"The trained model is in {self.folder.final}, the best one "
                f"(iteration {self.facts['best_iteration']}) in {self.folder.best}, "
                f"the curves in {self.folder.plot()}."
            )

    def close(self) -> None:
        self.checkpoints.close()
        self.folder.close()

    def _finish_iteration(self, metrics: Record, progress: Progress) -> None:
        iteration = self.agent.iteration
        is_last = iteration == self.agent.num_iterations
        evaluates = is_last or iteration % self.settings.eval_every == 0
        if evaluates:
            means, _ = self._evaluate(progress)
            metrics |= {f"eval/{name}": mean for name, mean in means.items()}
        self.folder.write_metrics(metrics)
        progress.iterated(metrics)
        if evaluates:
            self.folder.plot()
        if iteration % self.settings.save_every == 0:
            self._save()

    def _evaluate(self, progress: Progress) -> tuple[dict[str, float], list[Record]]:
        """Held-out means and samples of a greedy and a sampled pass; keeps the best model."""
        iteration = self.agent.iteration
        means: dict[str, float] = {}
        samples: list[Record] = []
        for name, greedy in (("greedy", True), ("sampled", False)):
            episodes, outcomes = self.agent.evaluate(self.eval_prompts, greedy=greedy)
            means |= {f"{name}/{key}": mean for key, mean in evaluation_means(outcomes).items()}
            samples += [
                {"iteration": iteration, "decoding": name, **sample_record(episode, outcome)}
                for episode, outcome in zip(episodes, outcomes, strict=True)
            ]
        shown = [s for i in range(NUM_SAMPLES) for s in samples[i :: len(self.eval_prompts)]]
        self.folder.write_samples(shown)
        progress.evaluated(iteration, {k: v for k, v in means.items() if "length" not in k})
        best, score = self.facts["best_score"], means["sampled/score"]
        if iteration and (best is None or score > best):
            self.facts |= {"best_score": score, "best_iteration": iteration}
            save_pretrained(self.agent.network, self.folder.best, self.agent.task.tokenizer)
        return means, [s for s in shown if s["decoding"] == "sampled"]

    def _restore(self) -> None:
        if self.checkpoints.latest() is None:
            return  # interrupted before its first checkpoint: it starts again
        self.agent.state, facts = self.checkpoints.restore(self.agent.state)
        if facts["model_fingerprint"] != self.facts["model_fingerprint"]:
            raise UsageError(
                f"{self.agent.config.task.model} is not the model that the run in "
                f"{self.folder.path} was started with: its weights have changed."
            )
        self.facts = facts

    def _save(self) -> None:
        self.checkpoints.save(self.agent.state, self.facts)

    def _where_saved(self) -> str:
        return (
            f"Stopped after iteration {self.agent.iteration}; saved in {self.checkpoints.folder}. "
            f"Continue with: {PROG} --output-dir {self.folder.path} --resume"
        )

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run behind its iteration, the second at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True

        old = {number: signal.signal(number, request_stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def fingerprint(params: Any) -> str:
    """A digest of all parameters: tells whether a resumed run has the model it began with."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).data)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
