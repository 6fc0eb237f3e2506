"""Every wrong input of the training command: one sentence, exit status 2, and nothing is made."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.runs.config_file import read_config
from ppo_jax.runs.folder import RunFolder
from ppo_jax.train import main

Damage = Callable[[Path], object]


def fails(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence that `argv` ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(argv)
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == ""
    err = err.removeprefix("compiling, and evaluating the untrained model ...\n")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def edit_config(**changes: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_norm(weight: np.ndarray) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        save_file(load_file(path) | {"model.norm.weight": weight}, path)

    return edit


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def cut_off(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def nothing(folder: Path) -> None:
    pass


# flags that are added, what is done to the inputs, and words of the sentence
CASES: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "unknown preset": ("--preset tiny", nothing, ("'tiny'", "pocket")),
    "unknown flag": ("--batchsize 4", nothing, ("--batchsize", "meant --batch-size", "--help")),
    "unknown preset of a run that is resumed": ("--preset tiny --resume", nothing, ("'tiny'",)),
    "resume with a value": ("--resume=True", nothing, ("no run to resume",)),
    "value of another type": ("--batch-size four", nothing, ("--batch-size", "four")),
    "value that is not a choice": ("--schedule slow", nothing, ("--schedule", "'slow'", "linear")),
    "value out of range": ("--gamma 2", nothing, ("gamma is 2.0", "between 0 and 1")),
    "number below its range": ("--seed -1", nothing, ("seed is -1", "at least 0")),
    "contradiction": ("--num-minibatches 3", nothing, ("batch_size (4)", "num_minibatches")),
    "limit below one": ("--max-new-tokens -5", nothing, ("max_new_tokens is -5", "at least 1")),
    "contradiction of limits": ("--min-new-tokens 9", nothing, ("min_new_tokens", "(8)")),
    "more tokens than positions": ("--max-new-tokens 60", nothing, ("68", "64 positions")),
    "task beside prompts": ("--task gsm8k", nothing, ("task is 'gsm8k'", "prompts", "leave one")),
    "missing prompts": ("", remove("prompts.jsonl"), ("prompts.jsonl", "no such file")),
    "prompts that are not JSON": (
        "",
        write("prompts.jsonl", '{"prompt": "a"}\n\n{"prompt": \n'),
        ("line 3 of", "prompts.jsonl", "not JSON"),
    ),
    "prompts without a prompt": (
        "",
        write("prompts.jsonl", '{"prompt": "a"}\n{"text": "b"}\n'),
        ("line 2 of", "'prompt'", "'text'"),
    ),
    "empty prompts file": ("", write("prompts.jsonl", "\n"), ("prompts.jsonl", "no prompts")),
    "prompts that are not text": (
        "",
        lambda folder: (folder / "prompts.jsonl").write_bytes(b"\xff\xfe\x00"),
        ("prompts.jsonl", "UTF-8"),
    ),
    "long prompt": (
        "",
        write("held_out.jsonl", json.dumps({"prompt": "The plot was " * 9})),
        ("line 1 of", "held_out.jsonl", "over the limit of 8", "prompt_overflow"),
    ),
    "chat without a template": ("--chat", nothing, ("line 1 of", "chat template")),
    "reward without a module": ("--reward nowhere:f", nothing, ("nowhere:f", "no module")),
    "reward without a function": (
        "--reward rewards_of_tests:g",
        nothing,
        ("rewards_of_tests", "no callable 'g'"),
    ),
    "reward in no known form": ("--reward good", nothing, ("'good'", "module:callable")),
    "reward model that is not there": ("--reward flax:./rm", nothing, ("./rm", "no such folder")),
    "reward model that is a policy": (
        "--reward flax:{inputs}/model",
        nothing,
        ("score.weight", "missing"),
    ),
    "gold reward without a module": ("--gold-reward nowhere:f", nothing, ("nowhere:f",)),
    "adapter of no rank": ("--lora-rank 0", nothing, ("lora_rank is 0", "at least 1")),
    "alpha without a rank": ("--lora-alpha 16", nothing, ("lora_alpha is 16.0", "set lora_rank")),
    "target that no layer has": (
        "--lora-rank 2 --lora-targets q_proj up_porj",
        nothing,
        ("lora_targets has 'up_porj'", "perhaps you meant up_proj"),
    ),
    "adapter without a base model": (
        "",
        write("model/adapter_config.json", '{"base_model_name_or_path": null}'),
        ("adapter_config.json", "names no base model"),
    ),
    "adapter on an adapter": (
        "--lora-rank 2",
        write("model/adapter_config.json", '{"base_model_name_or_path": "somewhere"}'),
        ("model is an adapter of somewhere", "merge it into its model first"),
    ),
    "model that is not there": ("--model ./nothing", nothing, ("./nothing", "no such folder")),
    "model without weights": ("", remove("model/model.safetensors"), ("no model.safetensors",)),
    "model without config": ("", remove("model/config.json"), ("no config.json",)),
    "model without tokenizer": ("", remove("model/tokenizer.json"), ("no tokenizer.json",)),
    "model of another architecture": ("", edit_config(model_type="gpt2"), ("'gpt2'", "qwen2")),
    "shapes that do not match": (
        "",
        edit_norm(np.ones(7, np.float32)),
        ("model.norm.weight", "(7,)", "(16,)", "config.json"),
    ),
    "weights that are not finite": (
        "",
        edit_norm(np.full(16, np.nan, np.float32)),
        ("model.norm.weight", "not finite", "diverged"),
    ),
    "truncated weights": (
        "",
        cut_off("model/model.safetensors"),
        ("model.safetensors", "not a readable safetensors file"),
    ),
    "tokenizer of a larger vocabulary": ("", edit_config(vocab_size=600), ("600",)),
    "hub that cannot be reached": (
        "--model some/model",
        nothing,
        ("some/model", "cannot be reached", "local folder", ".gguf", "pocket"),
    ),
    "output folder that is a file": (
        "--output-dir {inputs}/prompts.jsonl",
        nothing,
        ("prompts.jsonl is a file",),
    ),
    "output folder below a file": (
        "--output-dir {inputs}/prompts.jsonl/run",
        nothing,
        ("prompts.jsonl is a file",),
    ),
    "output folder with other things": (
        "--output-dir {inputs}",
        nothing,
        ("not empty", "no run", "--output-dir"),
    ),
    "resuming nothing": ("--resume", nothing, ("no run to resume", "leave out --resume")),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(
    case: str,
    inputs: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added, damage, words = CASES[case]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "inputs"
    shutil.copytree(inputs, mine)
    damage(mine)
    before = sorted(tmp_path.rglob("*"))
    argv = [flag.replace(str(inputs), str(mine)) for flag in flags]
    error = fails(
        [*argv, "--output-dir", str(tmp_path / "run"), *added.format(inputs=mine).split()], capfd
    )
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before, "nothing is made, nothing is lost"


# Answers of a reward function that cannot be rewards, and words of the sentence.
ANSWERS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "raises": (lambda batch: 1 / 0, ("ZeroDivisionError: division by zero",)),
    "NaN": (
        lambda batch: np.array([0, 1, float("nan"), 2]),
        ("returned nan for row 2", "finite"),
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_reward_function_is_named(
    answer: str,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    function, words = ANSWERS[answer]
    rewards.on_call = {1: function}
    error = fails([*flags, "--output-dir", str(tmp_path / "run")], capfd)
    for word in ("The reward function rewards_of_tests.scripted", *words):
        assert word in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("x = 1\nraise RuntimeError('broken')", "({folder}/broken_reward.py, line 2)."),
        ("import nowhere", "({folder}/broken_reward.py, line 1)."),
        ("import sys\nsys.exit('usage')", "usage ({folder}/broken_reward.py, line 2)."),
        ("def f(:", "(broken_reward.py, line 1)"),
    ],
)
def test_a_reward_module_that_cannot_be_imported(
    source: str,
    place: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_reward.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = [*flags, "--output-dir", str(tmp_path / "run"), "--reward", "broken_reward:f"]
    error = fails(argv, capfd)
    assert "broken_reward:f cannot be loaded: " in error
    assert place.format(folder=tmp_path) in error


def test_a_folder_that_holds_another_run(
    finished_run: Path, flags: list[str], rewards: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    error = fails([*flags, "--output-dir", str(finished_run)], capfd)
    assert "holds another run; add --resume to continue it" in error
    assert (finished_run / "final" / "model.safetensors").exists()


def test_a_run_that_another_process_writes(
    finished_run: Path, rewards: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "checkpoints" / "7.partial").mkdir()
    before = sorted(run.rglob("*"))
    with RunFolder(run, read_config(run), resume=True).locked():
        error = fails(["--output-dir", str(run), "--resume"], capfd)
    assert f"{run} is in use by another process" in error
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("--seed 3", "seed = 0, not 3"),
        ("--learning-rate 0.5", "learning_rate = 0.01, not 0.5"),
        ("--reward a:b", "reward = 'rewards_of_tests:scripted', not 'a:b'"),
        ("--model ./other", "model = "),
    ],
)
def test_resuming_with_another_setting(
    changed: str,
    words: str,
    finished_run: Path,
    rewards: ModuleType,
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = fails(["--output-dir", str(finished_run), "--resume", *changed.split()], capfd)
    assert words in error


def with_task(finished_run: Path, tmp_path: Path, **changes: Path) -> Path:
    """A copy of the run whose config names another model, or other prompts."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    content = json.loads((run / "config.json").read_text())
    content["task"] |= {name: str(path) for name, path in changes.items()}
    (run / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return run


def test_resuming_with_another_model_at_the_same_place(
    finished_run: Path,
    rewards: ModuleType,
    untouched: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The trained model now lies where the untrained one was."""
    model = finished_run / "final"
    run = with_task(finished_run, tmp_path, model=model)
    flags = ["--resume", "--num-iterations", "9", "--model", str(model)]
    with untouched(run):
        error = fails(["--output-dir", str(run), *flags], capfd)
    assert "is not the model that the run" in error


@pytest.mark.parametrize("change", ["another word", "another order", "one less"])
def test_resuming_with_other_prompts_at_the_same_place(
    finished_run: Path,
    inputs: Path,
    rewards: ModuleType,
    untouched: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: str,
) -> None:
    lines = (inputs / "prompts.jsonl").read_text().splitlines(keepends=True)
    if change == "another word":
        lines[0] = lines[0].replace("plot", "cast")
    elif change == "another order":
        lines = lines[::-1]
    else:
        lines = lines[:-1]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(lines))
    run = with_task(finished_run, tmp_path, prompts=prompts)
    flags = ["--resume", "--num-iterations", "9", "--prompts", str(prompts)]
    with untouched(run):
        error = fails(["--output-dir", str(run), *flags], capfd)
    assert f"{prompts} does not hold the prompts that the run" in error


def test_resuming_with_other_held_out_prompts_at_the_same_place(
    finished_run: Path,
    inputs: Path,
    rewards: ModuleType,
    untouched: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of those too that no evaluation has used so far: a resumed run may use more."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((inputs / "held_out.jsonl").read_text() + '{"prompt": "More"}\n')
    run = with_task(finished_run, tmp_path, eval_prompts=held_out)
    flags = ["--resume", "--num-iterations", "9", "--eval-size", "4"]
    flags += ["--eval-prompts", str(held_out)]
    with untouched(run):
        error = fails(["--output-dir", str(run), *flags], capfd)
    assert f"{held_out} does not hold the held-out prompts that the run" in error


def test_a_damaged_checkpoint_is_passed_over(
    finished_run: Path,
    inputs: Path,
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = with_task(finished_run, tmp_path, model=inputs / "model")
    for path in (run / "checkpoints" / "6" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    main(["--output-dir", str(run), "--resume"])
    said = capfd.readouterr().err
    assert f"The checkpoint {run}/checkpoints/6 is damaged: " in said
    assert "Continuing from iteration 3 instead." in said
    assert (run / "final" / "model.safetensors").read_bytes() == (
        finished_run / "final" / "model.safetensors"
    ).read_bytes()


def test_all_checkpoints_damaged(
    finished_run: Path,
    inputs: Path,
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = with_task(finished_run, tmp_path, model=inputs / "model")
    for path in (run / "checkpoints").glob("*/checkpoint.json"):
        path.write_text("")
    with pytest.raises(SystemExit) as exit:
        main(["--output-dir", str(run), "--resume"])
    assert exit.value.code == 2
    *notes, error = capfd.readouterr().err.splitlines()
    assert len(notes) == 2
    assert error.startswith("error: Every checkpoint in ")
    assert (run / "metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
