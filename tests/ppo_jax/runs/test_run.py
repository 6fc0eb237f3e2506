"""What a run says and refuses by itself. Whole runs: see test_resume.py and test_faults.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_jax.files import folder_digest
from ppo_jax.runs.ppo import ALIKE, PPOTrainer
from ppo_jax.runs.run import Run
from qwen_env.errors import UsageError


def test_scores_that_are_all_alike_are_said_once() -> None:
    said: list[str] = []
    trainer: Any = SimpleNamespace(_num_alike=0, _told_alike=False)

    def iterate(score: float, spread: float) -> None:
        metrics = {"objective/score": score, "objective/score_std": spread}
        if (remark := PPOTrainer.remark(trainer, metrics)) is not None:
            said.append(remark)

    for _ in range(ALIKE - 1):
        iterate(0.5, 0.0)
    iterate(0.5, 0.1)  # once they differ, counting begins anew
    for _ in range(ALIKE - 1):
        iterate(0.5, 1e-8)
    assert said == []
    for _ in range(2 * ALIKE):
        iterate(0.5, 0.0)
    [sentence] = said
    assert sentence.startswith(f"All responses of {ALIKE} iterations in a row scored 0.5, and PPO")


@pytest.fixture
def resumed(tmp_path: Path) -> Any:
    """What `_check_best` looks at: a best/ as its checkpoint knows it."""
    best = tmp_path / "best"
    best.mkdir()
    (best / "model.safetensors").write_text("weights")
    state = SimpleNamespace(
        best_digest=folder_digest(best), best_score=1.0, best_iteration=4, unfinished=None
    )
    said: list[str] = []
    return SimpleNamespace(
        state=state,
        said=said,
        progress=SimpleNamespace(say=said.append),
        iteration=6,
        folder=SimpleNamespace(best=best, evaluated_after=lambda iteration: False),
    )


def test_the_best_model_is_what_the_checkpoint_knows(resumed: Any) -> None:
    Run._check_best(resumed)
    (resumed.folder.best / "model.safetensors").write_text("other weights")
    with pytest.raises(UsageError, match=r"best was changed since iteration 4 wrote it"):
        Run._check_best(resumed)
    # An evaluation after the checkpoint may have replaced it before the run was killed.
    resumed.folder.evaluated_after = lambda iteration: iteration == 6
    Run._check_best(resumed)


def test_a_best_model_that_is_gone_is_made_again(resumed: Any) -> None:
    (resumed.folder.best / "model.safetensors").unlink()
    resumed.folder.best.rmdir()
    Run._check_best(resumed)
    assert resumed.state.best_score is None and resumed.state.best_digest is None
    [sentence] = resumed.said
    assert "is gone" in sentence
