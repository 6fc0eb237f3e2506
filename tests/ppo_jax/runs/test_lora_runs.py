"""A run that trains adapters: resumed bit for bit, and what it leaves for whom."""

import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch
import transformers

from ppo_jax import generate
from ppo_jax.models import load_pretrained
from ppo_jax.runs.folder import RunFolder
from ppo_jax.train import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "plot", lambda self: self.path / "curves.png")


@pytest.fixture
def lora_flags(flags: list[str]) -> list[str]:
    return [
        *flags,
        "--lora-rank",
        "2",
        "--lora-targets",
        "q_proj",
        "down_proj",
        "--learning-rate",
        "0.1",
    ]


def arrays(run: Path, iteration: int) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(run / "checkpoints" / str(iteration) / "arrays")
    return dict(restored)


def answers(*argv: str) -> list[dict[str, str]]:
    return generate.generate(
        *generate.parse_arguments([*argv, "--max-new-tokens", "8", "--greedy", "The plot"])
    )


def test_it_is_resumed_bit_for_bit_and_loaded_by_all(
    lora_flags: list[str], inputs: Path, rewards: ModuleType, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    main([*lora_flags, "--output-dir", str(whole)])
    rewards.calls = 0

    def interrupt(batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return rewards.count_e(batch)

    rewards.on_call[8] = interrupt  # in the fourth iteration
    with pytest.raises(SystemExit):
        main([*lora_flags, "--output-dir", str(run)])
    rewards.on_call.clear()
    main(["--output-dir", str(run), "--resume"])
    ours, theirs = arrays(run, 6), arrays(whole, 6)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    large = {name for name, array in ours.items() if array.size > 17}
    assert all("adapter" in name for name in large), "no weight is in a checkpoint"
    assert {part for name in large for part in ("mu", "nu", "reference") if part in name} == {
        "mu",
        "nu",
        "reference",
    }
    files = "final/model.safetensors", "final/adapter/adapter_model.safetensors", "samples.jsonl"
    for file in (*files, "best/adapter/adapter_config.json", "final/critic/value_head.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file

    expected = answers("--run", str(run))
    assert expected != answers("--model", str(inputs / "model")), "or it has learnt nothing"
    for argv in (
        ("--run", str(run), "--which", "6"),
        ("--model", str(run / "final")),
        ("--model", str(run / "final" / "adapter")),
    ):
        assert answers(*argv) == expected, argv

    settings = json.loads((run / "final" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(inputs / "model")
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    adapted = peft.PeftModel.from_pretrained(base, run / "final" / "adapter").eval()
    ids = np.arange(1, 13).reshape(1, 12)
    logits = load_pretrained(run / "final")(ids, np.ones_like(ids))[0]
    with torch.no_grad():
        theirs = adapted(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-5)
