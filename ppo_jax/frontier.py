"""How much any policy could earn: `ppo-frontier --run runs/pocket`, or `--model FOLDER ...`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.frontier()
    raise SystemExit

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from ppo_jax import cli, flags
from ppo_jax.assembly import assemble
from ppo_jax.config import DevicesConfig, SamplingConfig, TaskConfig
from ppo_jax.config.fields import Checked, Count, Rate, Seed, part_of
from ppo_jax.files import atomic, write_json
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.optimum import Optimum, optimum, optimum_at, share_of_gain
from ppo_jax.mesh import make_mesh
from ppo_jax.runs.curves import plot_curves
from ppo_jax.runs.folder import FRONTIER, read_records
from ppo_jax.runs.progress import counting
from ppo_jax.runs.records import RecordFile
from ppo_jax.runs.trained import TrainedRun, named_run
from qwen_env.episodes import Outcome
from qwen_env.errors import UsageError

PROG = "ppo-frontier"

KLS = 0.25, 0.5, 1.0, 2.0, 3.0, 4.0
"""Nats a response that the table has a row for."""


@dataclass(frozen=True)
class Arguments(Checked):
    """Say how much any policy could earn at each KL from the untrained model, and which of them a
    KL coefficient aims at.

    The untrained model answers some of the training prompts several times; its answers, weighted by
    what they earn, are those of the best policy. With a run, the settings are that run's, and its
    own way is measured against the best.
    """

    run: str | None = None
    """Folder of a training run, whose task, sampling and KL coefficient are taken."""
    task: TaskConfig = field(default_factory=TaskConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    kl_coef: Rate | None = None
    """Say what this KL coefficient aims at; None takes that of the run."""
    num_prompts: Count = 128
    """Training prompts to answer; all if there are fewer."""
    samples: Count = 128
    """Answers to each of them. The KL that can be told is below their logarithm."""
    batch_size: Count = 512
    """Responses generated at a time; all samples of a prompt are generated together."""
    seed: Seed = 0
    """Seed of the answers."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Reached(NamedTuple):
    """Where a run has come to, over the last tenth of its iterations."""

    kl: float
    reward: float
    gold: float | None


class Frontier(NamedTuple):
    """The best policies, and what a run has of them."""

    reference: Optimum  # of an infinite β: the untrained model
    best: list[Optimum]  # by KL
    aim: Optimum | None  # what the KL coefficient aims at
    reached: Reached | None
    best_there: Optimum | None  # at the run's KL
    num_prompts: int
    samples: int

    @property
    def shares(self) -> dict[str, float]:
        """Of the gain that was possible at the run's own KL, how much the run has."""
        if self.reached is None or self.best_there is None:
            return {}
        rewards = self.reached.reward, self.best_there.reward, self.reference.reward
        shares = {"reward": share_of_gain(*rewards)}
        if self.reached.gold is not None and "gold" in self.best_there.others:
            gold = self.best_there.others["gold"], self.reference.others["gold"]
            shares["gold"] = share_of_gain(self.reached.gold, *gold)
        return shares

    def as_json(self) -> dict[str, Any]:
        """All of it; β of the untrained model is null."""

        def of(point: Optimum | None) -> dict[str, Any] | None:
            return None if point is None else point._asdict()

        return {
            "reference": self.reference._asdict() | {"beta": None},
            "best": [of(point) for point in self.best],
            "aim": of(self.aim),
            "reached": None if self.reached is None else self.reached._asdict(),
            "best_there": of(self.best_there),
            "share_of_gain": self.shares,
            "num_prompts": self.num_prompts,
            "samples": self.samples,
        }

    def as_table(self) -> Table:
        """A row a KL, the untrained model first."""
        names = list(self.reference.others)
        table = Table(
            "",
            *("KL", "beta", "reward", *names, "effective samples"),
            title=f"The best policy at each KL; {self.num_prompts} prompts, {self.samples} "
            "answers to each",
            title_justify="left",
            title_style="",
            box=box.SIMPLE_HEAD,
        )

        def add(label: str, point: Optimum) -> None:
            beta = "" if point is self.reference else f"{point.beta:.3g}"
            cells = (f"{x:.3f}" for x in (point.reward, *(point.others[name] for name in names)))
            table.add_row(label, f"{point.kl:.2f}", beta, *cells, f"{point.effective_samples:.0f}")

        add("untrained", self.reference)
        for point in self.best:
            add("", point)
        if self.aim is not None:
            add("aim of kl_coef", self.aim)
        if self.best_there is not None:
            add("best at the run's KL", self.best_there)
        if self.reached is not None:
            earned = {"reward": self.reached.reward, "gold": self.reached.gold}
            known = (earned[name] for name in ("reward", *names))
            cells = ["" if x is None else f"{x:.3f}" for x in known]
            table.add_row("the run", f"{self.reached.kl:.2f}", "", *cells, "")
        if shares := self.shares:
            cells = [f"{shares.get(name, float('nan')):.2f}" for name in ("reward", *names)]
            table.add_row("share of the gain", "", "", *cells, "")
        return table


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, run = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        metrics = [] if run is None else RecordFile(run.folder / "metrics.jsonl").read()
        found = measure(arguments, reached(metrics))
        if arguments.json:
            print(json.dumps(found.as_json()))
        else:
            Console(markup=False).print(found.as_table())
        if run is not None:
            with atomic(run.folder / FRONTIER) as partial:  # a run that goes on reads it
                write_json(partial, found.as_json())
            curves = run.folder / "curves.png"
            plot_curves(read_records(run.folder), curves)
            cli.say(f'"Gain against KL" in {curves} now has the best policies beside the run.')


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainedRun | None]:
    """The flags, over the settings of the run where they name one.

    Raises:
        UsageError: a wrong flag, or no such run.
    """
    run = named_run(argv)
    if run is None:
        return flags.parse(Arguments(), argv, prog=PROG), None
    ppo = run.config.ppo
    default = Arguments(
        task=run.config.task,
        sampling=part_of(ppo, SamplingConfig),
        kl_coef=ppo.kl_coef or None,
    )
    return flags.parse(default, argv, prog=PROG), run


def reached(metrics: Sequence[dict[str, Any]]) -> Reached | None:
    """Where a run is, by the means of its last tenth of iterations."""
    last = metrics[-max(len(metrics) // 10, 1) :]
    if not last:
        return None

    def mean(name: str) -> float:
        return float(np.mean([record[name] for record in last]))

    gold = mean("reward/gold") if "reward/gold" in last[-1] else None
    return Reached(mean("objective/kl"), mean("objective/score"), gold)


def measure(arguments: Arguments, so_far: Reached | None = None) -> Frontier:
    """Let the untrained model answer training prompts, and say what the best policies earn.

    Raises:
        UserFacingError: an argument, the model, the prompts or the reward is wrong.
    """
    if arguments.sampling.sampling.is_truncated:
        raise UsageError(
            "With top_k or top_p the reference, which knows all tokens, cannot be sampled from; "
            "leave them out."
        )
    devices = arguments.devices
    mesh = make_mesh(devices.num_devices, devices.num_shards)
    network, task, _ = assemble(arguments.task, mesh=mesh, say=cli.say)
    actor = Actor(network, task, arguments.sampling.sampling, mesh=mesh)
    asked, samples = list(task.prompts)[: arguments.num_prompts], arguments.samples
    with counting("untrained", len(asked)) as count:
        _, outcomes = actor.respond_to_all(
            nnx.state(network),
            asked,
            jax.random.key(arguments.seed),
            batch_size=max(arguments.batch_size // samples, 1),
            completions_per_prompt=samples,
            on_batch=count,
        )
    rewards = np.array([outcome.reward for outcome in outcomes]).reshape(-1, samples)
    others = _gold(outcomes, samples)
    reachable: list[Optimum | None] = []
    for kl in (*KLS, *([] if so_far is None else [so_far.kl])):
        try:
            reachable.append(optimum_at(kl, rewards, others))
        except ValueError:  # too many nats for so few samples
            reachable.append(None)
    best = [point for point in reachable[: len(KLS)] if point is not None]
    return Frontier(
        reference=optimum(rewards, np.inf, others),
        best=best,
        aim=None if arguments.kl_coef is None else optimum(rewards, arguments.kl_coef, others),
        reached=so_far,
        best_there=None if so_far is None else reachable[-1],
        num_prompts=len(asked),
        samples=samples,
    )


def _gold(outcomes: Sequence[Outcome], samples: int) -> dict[str, np.ndarray]:
    components = [outcome.info["reward_components"] for outcome in outcomes]
    if "gold" not in components[0]:
        return {}
    return {"gold": np.array([row["gold"] for row in components]).reshape(-1, samples)}
