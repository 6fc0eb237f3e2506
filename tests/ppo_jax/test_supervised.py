"""`ppo-sft` and `ppo-reward-model` as whole commands: what they leave, resumption, bad input."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch_supervised
import transformers

from ppo_jax import evaluate, generate, reward_model, sft, train
from ppo_jax.models import PolicyValueNetwork, load_pretrained, load_reward_model, save_pretrained
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.run import Run
from ppo_jax.runs.supervised import RewardModelTrainer, SFTTrainer
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer

MAINS = {"sft": sft.main, "reward-model": reward_model.main}
TRAINERS: dict[str, Any] = {"sft": SFTTrainer, "reward-model": RewardModelTrainer}
LAST = 6


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches or cleans up after it."""


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer to draw than the rest of such a small run."""
    monkeypatch.setattr(RunFolder, "plot", lambda self: self.path / "curves.png")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(
    make_network: Callable[..., PolicyValueNetwork],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(make_network(num_hidden_layers=1), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    words = ["fine", "dull", "good", "bad", "superb"]
    answers = [f" was {a} and {b}." for a in words for b in words]
    rows = [{"prompt": "The plot", "completion": answer} for answer in answers]
    pairs = [
        {"prompt": "The plot", "chosen": f"{answer} I liked it.", "rejected": answer}
        for answer in answers
    ]
    return {
        "sft": write(folder / "answers.jsonl", rows),
        "reward-model": write(folder / "pairs.jsonl", pairs),
    }


@pytest.fixture(scope="module")
def flags(model: Path, data: dict[str, Path]) -> Callable[[str], list[str]]:
    def of(kind: str) -> list[str]:
        settings = {
            "model": model,
            "data": data[kind],
            "batch-size": 4,
            "num-iterations": LAST,
            "learning-rate": 0.01,
            "eval-every": 2,
            "save-every": 2,
            "num-packed-sizes": 2,
            "seed": 3,
        }
        return [word for name, x in settings.items() for word in (f"--{name}", str(x))]

    return of


@pytest.fixture(scope="module")
def finished(
    flags: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "plot", lambda self: self.path / "curves.png")
        runs = {kind: tmp_path_factory.mktemp("runs") / kind for kind in MAINS}
        for kind, run in runs.items():
            more = ["--center"] if kind == "reward-model" else []
            MAINS[kind]([*flags(kind), *more, "--output-dir", str(run)])
    return runs


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    is_timed = ("time/", "throughput/")
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith(is_timed)}
        for line in lines
    ]


def assert_same_run(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    for name in ("samples.jsonl", "best/model.safetensors", "final/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    with ocp.StandardCheckpointer() as checkpointer:
        ours, theirs = (
            checkpointer.restore(folder / "checkpoints" / str(LAST) / "arrays")
            for folder in (run, other)
        )
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", MAINS)
def test_a_run_learns_and_leaves_what_ppos_runs_leave(kind: str, finished: dict[str, Path]) -> None:
    run = finished[kind]
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "best"}
    records = metrics(run)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["eval/loss"] < records[0]["baseline/loss"]
    wanted = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"}
    if kind == "reward-model":
        wanted |= {"train/accuracy", "train/chosen", "train/rejected"}
        assert {"eval/accuracy", "eval/calibration_error", "eval/score_std"} <= records[1].keys()
    assert all(wanted <= record.keys() for record in records)


def test_the_policy_is_one_for_everything_else(
    finished: dict[str, Path], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished["sft"]
    ours = load_pretrained(run / "final")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    ids = np.array([[5, 300, 301, 302]], np.int32)
    logits, _ = ours(ids, np.ones_like(ids))
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    before = load_pretrained(model)
    np.testing.assert_array_equal(ours.value_head.weight[...], before.value_head.weight[...])
    generate.main(["--model", str(run), "--max-new-tokens", "4", "The plot"])
    assert capfd.readouterr().out.startswith("The plot")
    arguments, found = evaluate.parse_arguments(["--model", str(run)])
    assert found is None and arguments.task.model == str(run / "final")
    _, config = train.parse_arguments(["--model", str(run)])
    assert config.task.model == str(run / "final")


@pytest.mark.slow
def test_the_reward_model_is_one_for_everything_else(
    finished: dict[str, Path], data: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """transformers gives the same scores, centred on what is held out, and PPO trains on it."""
    run = finished["reward-model"]
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    rows = [json.loads(line) for line in data["reward-model"].read_text().splitlines()]
    texts = [
        tokenizer.encode(row["prompt"]) + tokenizer.encode(row[name]) + [0]
        for row in rows[-2:]
        for name in ("chosen", "rejected")
    ]
    expected = torch_supervised.scores(run / "final", texts)
    width = max(map(len, texts))
    ids = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
    mask = np.arange(width) < np.array([[len(text)] for text in texts])
    scores = np.asarray(load_reward_model(run / "final")(ids, mask))
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, rel=1e-4)
    for name in ("hf", "flax"):
        train.main(
            f"--reward {name}:{run}/final --model {finished['sft']} --num-iterations 1 "
            f"--batch-size 4 --eval-size 4 --output-dir {tmp_path / name}".split()
        )
        assert np.isfinite(metrics(tmp_path / name)[0]["objective/score"])


@pytest.mark.parametrize("kind", MAINS)
def test_ctrl_c_saves_and_the_run_goes_on_bit_for_bit(
    kind: str, finished: dict[str, Path], flags: Any, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    def interrupt(self: Any, metrics: Any) -> None:
        if metrics["iteration"] == 3:
            signal.raise_signal(signal.SIGINT)

    run, more = tmp_path / "run", ["--center"] if kind == "reward-model" else []
    with monkeypatch.context() as patch:
        patch.setattr(TRAINERS[kind], "remark", interrupt)
        with pytest.raises(SystemExit) as exit:
            MAINS[kind]([*flags(kind), *more, "--output-dir", str(run)])
    assert exit.value.code == 130
    said = capfd.readouterr().err
    assert f"continue it with: ppo-{kind} --output-dir {run} --resume" in said
    MAINS[kind](["--output-dir", str(run), "--resume"])
    said = capfd.readouterr().err
    assert "Continuing after iteration 3 of 6" in said and "has no record" not in said
    assert_same_run(run, finished[kind])


@pytest.mark.parametrize("kind", MAINS)
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str, finished: dict[str, Path], flags: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def die(self: Any) -> None:
        if self.iteration == 5:
            raise Killed

    run, more = tmp_path / "run", ["--center"] if kind == "reward-model" else []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish_iteration", _before(Run._finish_iteration, die))
        patch.setattr(Run, "_save", _unless_killed(Run._save))
        with pytest.raises(Killed):
            MAINS[kind]([*flags(kind), *more, "--output-dir", str(run)])
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["2", "4"]
    MAINS[kind](["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished[kind])


def _before(function: Any, first: Callable[[Any], None]) -> Any:
    def both(self: Any) -> None:
        first(self)
        function(self)

    return both


def _unless_killed(save: Any) -> Any:
    def function(self: Any) -> None:
        if not isinstance(sys.exc_info()[1], Killed):
            save(self)

    return function


@pytest.mark.slow
def test_kill_minus_9(finished: dict[str, Path], flags: Any, tmp_path: Path) -> None:
    """A process of its own, killed by the system in the middle of things."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "ppo_jax.sft", *flags("sft"), "--output-dir", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not (run / "checkpoints" / "2").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
        process.kill()
    sft.main(["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished["sft"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAINS)
def test_adapters_alone_learn(kind: str, flags: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    MAINS[kind]([*flags(kind), "--lora-rank", "2", "--output-dir", str(run)])
    MAINS[kind](["--output-dir", str(run), "--resume", "--num-iterations", "8"])
    records = metrics(run)
    assert records[-1]["eval/loss"] < records[0]["baseline/loss"]
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(run / "checkpoints" / "8" / "arrays")
    learnt = {name for name in arrays if name.startswith(".params")}
    assert learnt and all("adapter" in name or "score" in name for name in learnt)
    assert (run / "final" / "adapter").is_dir()


def fails(main: Any, argv: list[str], capfd: Any) -> str:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    said: str = capfd.readouterr().err
    assert exit.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("sft", [{"prompt": "a", "completion": ""}], "line 1 of {path} holds an empty answer"),
        ("sft", [{"prompt": "a"}], "line 1 of {path} has no 'completion'"),
        ("sft", [{"messages": [{"role": "user", "content": "a"}]}], "line 1 of {path}: the assist"),
        ("sft", [], "{path} holds no rows"),
        ("sft", [{"prompt": "a", "completion": "b"}], "{path} holds one row"),
        (
            "reward-model",
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            "line 1 of {path}: 'chosen' and 'rejected' are the same",
        ),
        ("reward-model", [{"prompt": "a", "chosen": "b"}], "line 1 of {path} has no 'rejected'"),
    ],
)
def test_bad_rows_end_with_one_sentence(
    kind: str, rows: Any, words: str, flags: Any, tmp_path: Path, capfd: Any
) -> None:
    path = write(tmp_path / "data.jsonl", rows)
    argv = [*flags(kind), "--data", str(path), "--output-dir", str(tmp_path / "run")]
    assert words.format(path=path) in fails(MAINS[kind], argv, capfd)
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_together(
    finished: dict[str, Path], flags: Any, data: dict[str, Path], tmp_path: Path, capfd: Any
) -> None:
    run = finished["sft"]
    said = fails(sft.main, [*flags("sft"), "--output-dir", str(run)], capfd)
    assert "holds another run; add --resume to continue it" in said
    for main in (reward_model.main, train.main):
        said = fails(main, ["--output-dir", str(run), "--resume"], capfd)
        assert f"{run} holds a run of another command" in said
    said = fails(sft.main, ["--output-dir", str(run), "--resume", "--seed", "4"], capfd)
    assert "seed = 3, not 4" in said
    new = ["--output-dir", str(tmp_path / "run")]
    said = fails(sft.main, [*flags("sft"), "--max-length", "2", *new], capfd)
    assert "lies within max_length (2)" in said
    said = fails(sft.main, [*flags("sft"), "--num-microbatches", "3", *new], capfd)
    assert "batch_size (4) must be a multiple of num_microbatches x num_devices (3 x 1)" in said
    with pytest.raises(UsageError, match="is not PPO's; name it as --model"):
        generate.parse_arguments(["--run", str(run), "x"])


def test_data_that_has_changed_is_noticed(
    finished: dict[str, Path], flags: Any, data: dict[str, Path], tmp_path: Path, capfd: Any
) -> None:
    path, run = tmp_path / "data.jsonl", tmp_path / "run"
    lines = data["sft"].read_text().splitlines(keepends=True)
    path.write_text("".join(lines))
    sft.main(
        [*flags("sft"), "--data", str(path), "--num-iterations", "2", "--output-dir", str(run)]
    )
    path.write_text("".join(lines[1:]))
    argv = ["--output-dir", str(run), "--resume", "--num-iterations", "4"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        sft.main(argv)
    assert exit.value.code == 2
    assert f"{path} does not hold the rows that the run" in capfd.readouterr().err
