"""From the records of all runs to means, intervals, differences and verdicts; and their tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from learning.settings import BEST_OF_N, FRONTIER, SETTINGS, Setting
from ppo_jax.generation.optimum import share_of_gain
from ppo_jax.runs.seeds import Interval, Verdict, holm, interval, paired, verdict

Record = dict[str, Any]


class Column(NamedTuple):
    title: str
    metric: str
    digits: int


COLUMNS = (
    Column("proxy, sampled", "sampled/score", 2),
    Column("greedy", "greedy/score", 2),
    Column("gold, sampled", "sampled/gold", 2),
    Column("greedy", "greedy/gold", 2),
    Column("KL", "kl", 1),
    Column("entropy", "entropy", 2),
    Column("length", "sampled/length_mean", 1),
    Column("grammatical", "sampled/grammatical", 3),
)
SHARES = (Column("share, proxy", "share/score", 3), Column("share, gold", "share/gold", 3))
"""Of the gain over the untrained model that is possible at one's own KL."""
COMPARED = (
    Column("proxy", "sampled/score", 2),
    Column("gold", "sampled/gold", 2),
    Column("KL", "kl", 1),
)
"""What differences are made of."""

Finals = Mapping[str, Mapping[int, Mapping[str, float]]]
"""By name, seed and metric."""

MARKS: dict[Verdict, str] = {"robust": "**", "suggestive": "*", "noise": ""}


@dataclass(frozen=True)
class Difference:
    """From the setting that differs by one knob, over the seeds; p is corrected for their number
    by Holm's method within one metric."""

    interval: Interval
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class Summary:
    """What the runs say. Measures are at the end of a run, by metric."""

    settings: Sequence[Setting]
    seeds: dict[str, int]  # by name: how many
    finals: dict[str, dict[str, Interval]]  # by name, metric; settings and SFT
    differences: dict[str, dict[str, Difference]]  # by name, metric
    curves: dict[str, list[dict[str, Interval]]]  # by name; a point holds every metric
    best_of: list[dict[str, Interval]]  # by n
    frontier: list[dict[str, float]]  # the best policies by KL, the untrained model first


def summarise(records: Sequence[Record]) -> Summary:
    by_name: dict[str, dict[int, Record]] = {}
    for record in records:
        by_name.setdefault(record["name"], {})[record["seed"]] = record
    best_of = by_name.pop(BEST_OF_N, {})
    frontier = by_name.pop(FRONTIER, {0: {"frontier": []}})[0]["frontier"]
    finals = {
        name: {
            seed: run["curve"][-1] | run.get("last_third", {}) | shares(run["curve"][-1], frontier)
            for seed, run in runs.items()
        }
        for name, runs in by_name.items()
    }
    settings = [setting for setting in SETTINGS if setting.name in by_name]
    return Summary(
        settings=settings,
        seeds={name: len(runs) for name, runs in by_name.items()} | {BEST_OF_N: len(best_of)},
        finals={name: _intervals(list(runs.values())) for name, runs in finals.items()},
        differences=_differences(settings, finals),
        curves={
            name: _pointwise([run["curve"] for run in runs.values()])
            for name, runs in by_name.items()
        },
        best_of=_pointwise([run["best_of"] for run in best_of.values()]),
        frontier=frontier,
    )


def shares(point: Mapping[str, float], frontier: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the gain that is possible at the point's KL, how much it has: by `SHARES`; nothing where
    its KL is beyond the frontier's."""
    kls = [best["kl"] for best in frontier]
    if not kls or point["kl"] > kls[-1]:
        return {}
    return {
        f"share/{name}": share_of_gain(
            point[f"sampled/{name}"],
            float(np.interp(point["kl"], kls, [best[name] for best in frontier])),
            frontier[0][name],
        )
        for name in ("score", "gold")
    }


def _pointwise(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, Interval]]:
    """The intervals of each place of curves that are all as long."""
    return [_intervals(points) for points in zip(*curves, strict=True)]


def _intervals(rows: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Of what all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: interval([row[name] for row in rows]) for name in names}


def _differences(settings: Sequence[Setting], finals: Finals) -> dict[str, dict[str, Difference]]:
    pairs = [(setting.name, setting.against) for setting in settings]
    differences: dict[str, dict[str, Difference]] = {}
    for _, metric, _ in COMPARED:
        for name, difference in differences_between(pairs, finals, metric).items():
            differences.setdefault(name, {})[metric] = difference
    return differences


def differences_between(
    pairs: Sequence[tuple[str, str]], finals: Finals, metric: str
) -> dict[str, Difference]:
    """Of each name from what it is paired with, where both have two seeds in common.

    Args:
        finals: by name, seed and metric.
    """

    def of(name: str) -> dict[int, float]:
        return {seed: final[metric] for seed, final in finals.get(name, {}).items()}

    tests = {
        name: test
        for name, against in pairs
        if name != against and (test := paired(of(name), of(against))) is not None
    }
    corrected = holm([p for _, p in tests.values()])
    return {
        name: Difference(change, raised, verdict(p, raised))
        for (name, (change, p)), raised in zip(tests.items(), corrected, strict=True)
    }


def table_of_differences(
    pairs: Sequence[tuple[str, str]], values: Finals, columns: Sequence[Column]
) -> Table:
    """Of each name from what it is paired with, by seed."""
    table = Table(
        title="Difference by seed: mean [95 % interval]; ** stands after Holm's correction for the "
        "number of comparisons, * does not; what has no mark is unresolved"
    )
    table.add_column("")
    table.add_column("against")
    for column in columns:
        table.add_column(column.title, justify="right")
    differences = {c.metric: differences_between(pairs, values, c.metric) for c in columns}
    for name, against in pairs:
        if name in differences[columns[0].metric]:
            texts = [difference_text(differences[c.metric][name], c.digits) for c in columns]
            table.add_row(name, against, *texts)
    return table


def brief(record: Record) -> str:
    """A run in a line."""
    if "frontier" in record:
        return f"up to a KL of {record['frontier'][-1]['kl']:.1f}"
    point = record["curve"][-1] if "curve" in record else record["best_of"][-1]
    score, gold = (point.get(f"sampled/{name}", point.get(name)) for name in ("score", "gold"))
    return f"proxy {score:.2f}, gold {gold:.2f}, KL {point['kl']:.2f}"


# ---------------------------------------------------------------- tables


def write_tables(summary: Summary, folder: Path) -> None:
    """Print the tables, and write them as tables.md and, with all else, as summary.json."""
    tables = [table for table in (_finals(summary), _best_of(summary), _changes(summary)) if table]
    console = Console()
    for table in tables:
        console.print(table)
    (folder / "tables.md").write_text("\n".join(markdown(table) for table in tables))
    (folder / "summary.json").write_text(json.dumps(_as_json(summary), indent=1))


def _finals(summary: Summary) -> Table:
    table = Table(title="At the end of a run: mean ± half of the 95 % confidence interval")
    table.add_column("setting")
    columns = (*COLUMNS, *SHARES) if summary.frontier else COLUMNS
    for column in columns:
        table.add_column(column.title, justify="right")
    for name, finals in summary.finals.items():
        known = ((finals.get(column.metric), column.digits) for column in columns)
        table.add_row(name, *("" if x is None else interval_text(x, digits) for x, digits in known))
    return table


def _best_of(summary: Summary) -> Table | None:
    if not summary.best_of:
        return None
    columns = (
        Column("proxy", "score", 2),
        Column("gold", "gold", 2),
        Column("length", "length_mean", 1),
        Column("grammatical", "grammatical", 3),
    )
    table = Table(title="The untrained model's best of n by the proxy")
    table.add_column("n", justify="right")
    table.add_column("KL at most", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right")
    for row in summary.best_of:
        texts = [interval_text(row[c.metric], c.digits) for c in columns]
        table.add_row(f"{row['n'].mean:.0f}", f"{row['kl'].mean:.2f}", *texts)
    return table


def _changes(summary: Summary) -> Table | None:
    if not summary.differences:
        return None
    table = Table(
        title="Difference from the setting without the change, by seed: mean [95 % interval]; "
        "** stands after Holm's correction for the number of settings, * does not; "
        "what has no mark is unresolved"
    )
    table.add_column("setting")
    table.add_column("change")
    for column in COMPARED:
        table.add_column(column.title, justify="right")
    for setting in summary.settings:
        if changes := summary.differences.get(setting.name):
            texts = [difference_text(changes[c.metric], c.digits) for c in COMPARED]
            table.add_row(setting.name, setting.changes, *texts)
    return table


def interval_text(x: Interval, digits: int) -> str:
    """For a table."""
    return f"{x.mean:.{digits}f} ± {x.half:.{digits}f}"


def difference_text(x: Difference, digits: int) -> str:
    """For a table, with its mark."""
    mean, low, high = (
        f"{y:+.{digits}f}" for y in (x.interval.mean, x.interval.low, x.interval.high)
    )
    return f"{mean} [{low}, {high}]{MARKS[x.verdict]}"


def markdown(table: Table) -> str:
    """The table, its title above it."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [
        [str(column.header) for column in table.columns],
        ["---:" if column.justify == "right" else "---" for column in table.columns],
        *([str(cell).replace("*", "\\*") for cell in row] for row in rows),
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{str(table.title).replace('*', chr(92) + '*')}**\n\n{body}\n"


def _as_json(summary: Summary) -> Record:
    def plain(x: Any) -> Any:
        if isinstance(x, Interval):
            return {"mean": x.mean, "half": None if x.half != x.half else x.half}
        if isinstance(x, Difference):
            return {**plain(x.interval), "p_corrected": x.p, "verdict": x.verdict}
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return [plain(value) for value in x] if isinstance(x, list) else x

    names = ("seeds", "finals", "differences", "curves", "best_of", "frontier")
    return {name: plain(getattr(summary, name)) for name in names}
