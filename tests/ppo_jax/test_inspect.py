import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.inspect import inspect_run, main


def data_in(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().split("\n")[:-1]]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_page_of_an_iteration(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    argv = ["--run", str(finished_run), "--iteration", "4", "--output", str(page)]
    main([*argv, "--compare", str(finished_run)])
    assert capsys.readouterr().out == f"The page is in {page}.\n"
    data = data_in(page)
    kept = records(finished_run, "tokens.jsonl")[2]
    assert data["iteration"] == kept["iteration"] == 4
    assert data["episodes"] == kept["episodes"]
    metrics = records(finished_run, "metrics.jsonl")
    assert dict(data["facts"])["score"] == metrics[3]["objective/score"]
    ratio = data["distributions"]["histograms"][0]
    assert ratio["counts"] == records(finished_run, "distributions.jsonl")[3]["ratio"]
    assert data["runs"] == [str(finished_run)] * 2
    scores = next(c for c in data["curves"] if c["unit"] == "of training")["series"]
    assert scores[0] == scores[1] == [[m["iteration"], m["objective/score"]] for m in metrics]
    assert [answer["prompt"] for answer in data["answers"]] == [
        "The acting",
        "I liked",
        "All in all",
        "So",
    ]


def test_the_last_iteration_in_the_folder_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("checkpoints", "best"))
    main(["--run", str(run)])
    data = data_in(run / "inspect.html")
    assert (data["iteration"], data["answers"]) == (6, [])
    assert inspect_run(run).html() == (run / "inspect.html").read_text()


def test_bad_input(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no run to look at; name its folder" in fails([], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv in (["--run", str(empty)], ["--run", str(finished_run), "--compare", str(empty)]):
        assert f"{empty} holds no run; name a folder that ppo-train" in fails(argv, capsys)
    argv = ["--run", str(finished_run), "--iteration", "3"]
    assert "is 3, but the run in" in (line := fails(argv, capsys))
    assert line.endswith("has kept tokens of 1, 2, 4, 6; name one of these.")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished_run / "config.json", bare)
    assert f"{bare} has kept no tokens" in fails(["--run", str(bare)], capsys)
    (bare / "tokens.jsonl").write_text("{}\n{}\n")
    assert f"line 1 of {bare}/tokens.jsonl" in fails(["--run", str(bare)], capsys)
    argv = ["--run", str(finished_run), "--output", str(tmp_path)]
    assert f"{tmp_path} is a folder" in fails(argv, capsys)
    argv = ["--run", str(finished_run), "--output", str(tmp_path / "nowhere" / "page.html")]
    assert f"{tmp_path}/nowhere/page.html cannot be written" in fails(argv, capsys)
    assert not (finished_run / "inspect.html").exists()
