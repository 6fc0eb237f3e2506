"""Two processes on this machine, each with a CPU device, joined as those of two hosts are."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import ppo_jax
from ppo_jax import hosts, reward_model, sft
from ppo_jax.models import load_pretrained
from ppo_jax.train import main

Start = Callable[..., list[subprocess.Popen[str]]]

PROGRAM = """
import os, signal, sys, time
from ppo_jax import cli, hosts
from qwen_env.errors import RewardError
address, process = sys.argv[1], int(sys.argv[2])
hosts.JOIN_WITHIN, hosts._DEAD_AFTER, hosts._GRACE, hosts._PERIOD = 20, 4.0, 1.0, 0.2

def fails():
    if process == 1:
        raise RewardError("The reward is broken.")

with cli.errors_as_sentences(), hosts.joined(address, 2, process):
"""


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(arguments: list[str], *paths: Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    places = [str(Path(ppo_jax.__file__).parents[1]), *map(str, paths)]
    environment = {"PYTHONPATH": os.pathsep.join(places), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def ended(*processes: subprocess.Popen[str], within: float = 240) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    try:
        said = [process.communicate(timeout=within) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def both(address: str, body: str) -> list[tuple[int, str, str]]:
    """Two processes that run `body`, joined."""
    program = PROGRAM + "".join(f"    {line}\n" for line in body.splitlines())
    return ended(*(start(["-c", program, address, str(i)]) for i in range(2)))


@pytest.mark.slow
def test_what_one_says_all_know(address: str) -> None:
    body = """
print(hosts.together(lambda: {"from": process}), hosts.on_first(lambda: 7 * process + 5))
print(hosts.any_of(process == 1), hosts.any_of(False), hosts.own_part([1, 2, 3, 4, 5]))
print([len(text) for text in hosts.together(lambda: process * 5_000_000 * "x")])
hosts.check_alike(lambda: {"jax": "1.0", "seed": process})
"""
    parts = ["[1, 2]", "[3, 4, 5]"]
    for (status, said, error), part in zip(both(address, body), parts, strict=True):
        assert said.splitlines() == [
            "[{'from': 0}, {'from': 1}] 5",
            f"True False {part}",
            "[0, 5000000]",
        ]
        assert status == 2
        assert "Process 1 has seed 1, but process 0 has 0; start all" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "statuses", "said_by_0"),
    [
        pytest.param(
            "hosts.together(fails)", [2, 2], "error: Process 1: The reward is broken.", id="agreed"
        ),
        pytest.param(
            "if process == 1: raise KeyError('a bug')\ntime.sleep(60)",
            [2, 2],
            "error: Process 1 has failed: KeyError",
            id="on its own",
        ),
        pytest.param(
            "if process == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
            [2, -signal.SIGKILL],
            "error: Process 1 has given no sign of life for 4 s",
            id="killed",
        ),
    ],
)
def test_an_error_on_one_ends_all(
    address: str, body: str, statuses: list[int], said_by_0: str
) -> None:
    since = time.monotonic()
    results = both(address, body)
    assert [status for status, *_ in results] == statuses
    assert said_by_0 in results[0][2]
    assert "Traceback" not in results[0][2]
    assert time.monotonic() - since < 55


@pytest.mark.slow
def test_the_end_of_process_0_ends_all(address: str) -> None:
    body = "hosts.together(lambda: 1)\nif process == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)"
    _, (status, _, said) = both(address, body)
    assert status == 2
    assert "is gone. Start all of them again with --resume." in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.slow
def test_nobody_there(address: str) -> None:
    body = PROGRAM.replace("= 20,", "= 3,") + "    pass"
    [(status, _, said)] = ended(start(["-c", body, address, "1"]))
    assert status == 2
    assert f"error: Process 1 found no 2 processes at {address} within 3 s" in said
    assert "Traceback" not in said


def test_alone_nothing_changes() -> None:
    assert hosts.together(lambda: (1, 2)) == [(1, 2)], "the object itself, not its JSON"
    assert hosts.own_part("abc") == "abc"
    assert hosts.is_first()
    assert hosts.is_everywhere(ValueError())
    with pytest.raises(KeyError):
        hosts.on_first(lambda: dict[str, int]()["x"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--process-id", "1"], "process_id is 1, but nothing says where"),
        (["--coordinator", "here"], "coordinator is 'here'; it must be HOST:PORT"),
        (
            ["--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"],
            "process_id is 2, but there are 2 processes",
        ),
    ],
)
def test_wrong_flags(
    flags: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in (main, sft.main):
        with pytest.raises(SystemExit) as exit:
            command([*flags, "--output-dir", str(tmp_path / "run")])
        assert exit.value.code == 2
        assert message in capfd.readouterr().err


REWARD = """
import os, signal, sys
import numpy as np

calls = 0

def count_e(batch):
    global calls
    calls += 1
    if calls == 3 and sys.argv[-2:] == ["--process-id", "1"]:  # in the first iteration
        signal.raise_signal(signal.SIGTERM)
    with open(os.environ["CALLS"] + str(os.getpid()), "a") as file:
        file.writelines(f"{text!r}\\n" for text in batch.completions)
    scores = np.array([text.count("e") for text in batch.completions], np.float32)
    return scores / 4, {"gold": scores - np.array([len(text) / 20 for text in batch.completions])}
"""


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(
    inputs: Path, flags: list[str], tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard on the device of each; each scores its half; a signal to the second stops both, and
    one process goes on."""
    (tmp_path / "rewards_on_hosts.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = [*flags, "--reward", "rewards_on_hosts:count_e", "--num-minibatches", "1"]
    flags += ["--num-iterations", "2", "--eval-every", "2"]

    def scored(name: str) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(tmp_path.glob(f"{name}.*"))]

    monkeypatch.setenv("CALLS", str(tmp_path / "alone."))
    alone, run = tmp_path / "run_of_one", tmp_path / "run_of_two"
    main([*flags, "--output-dir", str(alone)])

    monkeypatch.setenv("CALLS", str(tmp_path / "together."))
    flags += ["--num-devices", "2", "--num-shards", "2", "--output-dir", str(run)]
    flags += ["--coordinator", address, "--num-processes", "2", "--process-id"]
    results = ended(*(start(["-m", "ppo_jax.train", *flags, f"{i}"], tmp_path) for i in range(2)))
    for _, _, error in results:
        print(error)
    assert [status for status, *_ in results] == [130, 130]
    assert "The run is saved as it was after iteration 1" in results[0][2]
    assert results[1][2] == ""
    one, other = scored("together")
    assert len(one) == len(other)

    monkeypatch.setenv("CALLS", str(tmp_path / "rest."))
    main(["--output-dir", str(run), "--resume", "--num-devices", "1", "--num-shards", "1"])
    [rest], [all_of_them] = scored("rest"), scored("alone")
    assert sorted(one + other + rest) == sorted(all_of_them)
    assert (run / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    assert_alike_but_for_rounding(run, alone)


def assert_alike_but_for_rounding(run: Path, other: Path) -> None:
    """In their metrics, and in all files of tensors of their last models."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4, nan_ok=True), name
    files = [
        {path.relative_to(folder) for path in (folder / "final").rglob("*") if path.is_file()}
        for folder in (run, other)
    ]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix == ".safetensors":
            tensors, others = load_file(run / path), load_file(other / path)
            for name, tensor in tensors.items():
                np.testing.assert_allclose(tensor, others[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_adapters_on_two_processes_are_those_of_one(
    inputs: Path, flags: list[str], tmp_path: Path, address: str
) -> None:
    """A shard of the frozen backbone on the device of each; the first writes the adapters whole."""
    flags = [*flags, "--lora-rank", "2", "--learning-rate", "1e-3", "--num-minibatches", "1"]
    flags += ["--num-iterations", "1", "--reward", "qwen_env.rewards.sentiment:pocket_sentiment"]
    alone, run = tmp_path / "run_of_one", tmp_path / "run_of_two"
    main([*flags, "--output-dir", str(alone)])
    flags += ["--num-devices", "2", "--num-shards", "2", "--output-dir", str(run)]
    flags += ["--coordinator", address, "--num-processes", "2", "--process-id"]
    results = ended(*(start(["-m", "ppo_jax.train", *flags, f"{i}"]) for i in range(2)))
    assert [status for status, *_ in results] == [0, 0], results
    assert_alike_but_for_rounding(run, alone)
    policy, adapted = (load_pretrained(run / name) for name in ("final", "final/adapter"))
    first = inputs / "model" / "model.safetensors"
    assert np.abs(load_file(run / "final" / first.name)[_QUERY] - load_file(first)[_QUERY]).max()
    for ours, theirs in zip(*map(jax.tree.leaves, map(nnx.state, (policy, adapted))), strict=True):
        if ours.ndim > 2 or len(ours) > 1:  # a value head is no part of an adapter
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


_QUERY = "model.layers.0.self_attn.q_proj.weight"


LEARNING = """
import importlib, signal, sys
from ppo_jax.runs import supervised

def stop(self, metrics):
    if metrics["iteration"] == 3 and sys.argv[-2:] == ["--process-id", "1"]:
        signal.raise_signal(signal.SIGINT)

supervised._SupervisedTrainer.remark = stop
importlib.import_module("ppo_jax." + sys.argv.pop(1)).main()
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Rows that are answers to learn as well as pairs."""
    words = ["fine", "dull", "good", "bad", "superb"]
    answers = [f" was {a} and {b}." for a in words for b in words]
    rows = [
        {"prompt": "The plot", "completion": a, "chosen": f"{a} I liked it.", "rejected": a}
        for a in answers
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"), [(sft, ["--lora-rank", "2"]), (reward_model, ["--center"])]
)
def test_learning_from_texts_on_two_processes_is_that_of_one(
    command: ModuleType, more: list[str], inputs: Path, texts: Path, tmp_path: Path, address: str
) -> None:
    """A shard on the device of each; Ctrl-C on the second stops both, and one process goes on."""
    flags = ["--model", str(inputs / "model"), "--data", str(texts), "--batch-size", "4", *more]
    flags += ["--num-iterations", "5", "--learning-rate", "1e-2", "--eval-every", "2"]
    alone, run = tmp_path / "run_of_one", tmp_path / "run_of_two"
    command.main([*flags, "--output-dir", str(alone)])
    flags += ["--num-devices", "2", "--num-shards", "2", "--output-dir", str(run)]
    flags += ["--coordinator", address, "--num-processes", "2", "--process-id"]
    name = command.__name__.rpartition(".")[2]
    results = ended(*(start(["-c", LEARNING, name, *flags, f"{i}"]) for i in range(2)))
    assert [status for status, *_ in results] == [130, 130], results
    assert "The run is saved as it was after iteration 3" in results[0][2]
    assert results[1][2] == "", "process 0 alone speaks"
    command.main(["--output-dir", str(run), "--resume", "--num-devices", "1", "--num-shards", "1"])
    assert_alike_but_for_rounding(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a"}', "Process 1 has failed: line 26 of texts.jsonl has no 'completion'"),
        ('{"prompt": "a", "completion": "b"}', "Process 1 has rows "),
    ],
)
def test_texts_that_differ_end_both(
    line: str, sentence: str, inputs: Path, texts: Path, tmp_path: Path, address: str
) -> None:
    """The name is the same, in another folder."""
    folders = [tmp_path, tmp_path / "elsewhere"]
    folders[1].mkdir()
    (folders[1] / texts.name).write_text(f"{texts.read_text()}{line}\n")
    flags = ["--model", str(inputs / "model"), "--data", texts.name, "--num-devices", "2"]
    flags += ["--output-dir", str(tmp_path / "run"), "--coordinator", address]
    flags += ["--num-processes", "2", "--process-id"]
    results = ended(
        *(start(["-m", "ppo_jax.sft", *flags, f"{i}"], cwd=folders[i]) for i in range(2))
    )
    assert [status for status, *_ in results] == [2, 2], results
    assert f"error: {sentence}" in results[0][2]
    assert all("Traceback" not in said for _, _, said in results)


TURNS = """
import os, sys
from qwen_env.tasks.guess_the_number import GuessTheNumber, guess_the_number

class Game(GuessTheNumber):
    def reply(self, batch):
        with open(os.environ["CALLS"] + str(os.getpid()), "a") as file:
            file.writelines(f"{turn.seed} {turn.number} {turn.completion!r}\\n" for turn in batch)
        if os.environ.get("SHUT") and sys.argv[-2:] == ["--process-id", "1"]:
            raise LookupError("the door is shut")
        return super().reply(batch)

def task():
    from dataclasses import replace
    return replace(guess_the_number(1, 7), interaction=Game(1, 7))
"""


@pytest.fixture
def games(
    inputs: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Flags of two iterations of guessing numbers, in turns."""
    (tmp_path / "games_on_hosts.py").write_text(TURNS)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    words = " ".join(flags)
    others = ("model", "prompts", "eval-prompts", "reward", "max-prompt-length", "max-new-tokens")
    for name in (*others, "kl-target", "kl-horizon"):
        words = re.sub(rf"--{name} \S+", "", words)
    return [
        *words.split(), "--model", str(model), "--task", "games_on_hosts:task",
        "--max-new-tokens", "96", "--num-minibatches", "1", "--num-iterations", "2",
        "--eval-every", "2",
    ]  # fmt: skip


@pytest.mark.slow
def test_turns_on_two_processes_are_those_of_one(
    games: list[str], tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks about the turns of its half; all know what was replied."""

    def asked(name: str) -> list[list[str]]:
        return [path.read_text().splitlines() for path in sorted(tmp_path.glob(f"{name}.*"))]

    monkeypatch.setenv("CALLS", str(tmp_path / "alone."))
    alone, run = tmp_path / "run_of_one", tmp_path / "run_of_two"
    main([*games, "--output-dir", str(alone)])

    monkeypatch.setenv("CALLS", str(tmp_path / "together."))
    games += ["--num-devices", "2", "--output-dir", str(run), "--coordinator", address]
    games += ["--num-processes", "2", "--process-id"]
    results = ended(*(start(["-m", "ppo_jax.train", *games, f"{i}"], tmp_path) for i in range(2)))
    assert [status for status, *_ in results] == [0, 0], results
    one, other = asked("together")
    [all_of_them] = asked("alone")
    assert one and other and sorted(one + other) == sorted(all_of_them)
    assert any(line.split()[1] == "2" for line in all_of_them), "there are second turns"
    samples = (run / "samples.jsonl").read_text()
    assert samples == (alone / "samples.jsonl").read_text()
    talks = [json.loads(line)["messages"] for line in samples.splitlines() if "messages" in line]
    assert max(len(talk) for talk in talks) > 2, "replies are kept"


@pytest.mark.slow
def test_an_interaction_that_fails_on_one_process_ends_both(
    games: list[str], tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALLS", str(tmp_path / "together."))
    monkeypatch.setenv("SHUT", "1")
    games += ["--num-devices", "2", "--output-dir", str(tmp_path / "run")]
    games += ["--coordinator", address, "--num-processes", "2", "--process-id"]
    results = ended(*(start(["-m", "ppo_jax.train", *games, f"{i}"], tmp_path) for i in range(2)))
    assert [status for status, *_ in results] == [2, 2], results
    sentence = "The interaction games_on_hosts.Game raised LookupError: the door is shut"
    assert f"error: Process 1: {sentence}" in results[0][2]
    assert all("Traceback" not in said for _, _, said in results)
