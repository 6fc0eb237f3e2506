"""Which runs of the pocket task there are, and what does them."""

from collections.abc import Sequence

from learning.jobs import Job, Record, Tick, Worker
from learning.settings import BEST_OF_N, FRONTIER, SETTINGS, SFT
from qwen_env.errors import UsageError

PPO_SETTINGS = {setting.name: setting for setting in SETTINGS}
NAMES = (*PPO_SETTINGS, BEST_OF_N, *SFT)


def jobs(names: Sequence[str], num_seeds: int, iterations: int) -> list[list[Job]]:
    """One list a name (all of them, if none is given), with a job a seed; and before them what all
    are measured against.

    Raises:
        UsageError: there is no such name.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"There is no setting {name!r}; choose from: {', '.join(NAMES)}.")

    def of_name(name: str) -> list[Job]:
        changes = PPO_SETTINGS[name].changes if name in PPO_SETTINGS else ""
        return [Job(name, seed, iterations, changes) for seed in range(num_seeds)]

    chosen = [of_name(name) for name in NAMES if name in names or not names]
    return [[Job(FRONTIER, 0, iterations, "")], *chosen]


def cost(job: Job) -> int:
    """About how long it takes, in iterations."""
    if job.name in PPO_SETTINGS:
        return PPO_SETTINGS[job.name].length * job.iterations
    return {FRONTIER: 250, BEST_OF_N: 40}.get(job.name) or 30 + 3 * SFT[job.name]


def start() -> Worker:
    """What does jobs in a process; it keeps what they share."""
    from learning import baselines
    from learning.runs import Bench

    bench = Bench()

    def work(job: Job, tick: Tick) -> Record:
        if job.name in PPO_SETTINGS:
            return bench.train(PPO_SETTINGS[job.name], job.iterations, job.seed, tick)
        if job.name == FRONTIER:
            record = baselines.best_policies(bench, job.seed)
        elif job.name == BEST_OF_N:
            record = baselines.best_of_n(bench, job.seed)
        else:
            record = baselines.sft(bench, SFT[job.name], job.seed)
        tick(cost(job))
        return record

    return work
