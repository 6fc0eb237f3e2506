import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithm import no_moments
from ppo_jax.learning.batch import Controls
from ppo_jax.learning.learner import TrainState
from ppo_jax.mesh import make_mesh, place
from ppo_jax.runs.checkpoints import Checkpoints
from qwen_env.errors import RunError, UsageError

FACTS = {"best_score": 0.1, "best_iteration": None}


def state(iteration: int, width: int = 3) -> TrainState:
    """A state whose arrays all tell of its iteration."""
    params = {
        "weight": jnp.full((2, width), iteration + 0.1, jnp.float32),
        "half": jnp.full((width,), iteration, jnp.bfloat16),
    }
    return TrainState(
        params=params,
        opt_state=(jnp.asarray(iteration, jnp.int32), jax.tree.map(jnp.sqrt, params)),
        controls=Controls(jnp.float32(0.05 + iteration), no_moments()),
        warmup=None,
        reference=None,
        root_key=jax.random.key_data(jax.random.key(7)),
        iteration=jnp.asarray(iteration, jnp.int32),
        nonfinite_in_a_row=jnp.asarray(0, jnp.int32),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for iteration in (3, 6, 9):
        checkpoints.save(state(iteration), FACTS | {"best_score": float(iteration)})
    return checkpoints


def assert_is(restored: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert got.weak_type == want.weak_type
        assert got.committed == want.committed, "or the resumed run would compile anew"
        np.testing.assert_array_equal(got, want)


def test_restores_the_latest_bit_for_bit(saved: Checkpoints) -> None:
    restored = saved.restore(state(0))
    assert restored is not None
    assert_is(restored[0], state(9))
    assert restored[1] == FACTS | {"best_score": 9.0}


def test_keeps_the_latest_few(saved: Checkpoints) -> None:
    assert saved.iterations() == [6, 9]
    assert sorted(p.name for p in saved.folder.iterdir()) == ["6", "9"]


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", keep=2).restore(state(0)) is None


def test_saving_again_changes_nothing(saved: Checkpoints) -> None:
    saved.save(state(9), FACTS | {"best_score": -1.0})
    restored = saved.restore(state(0))
    assert restored is not None
    assert restored[1]["best_score"] == 9.0


def test_what_a_killed_save_left_is_cleared_away(saved: Checkpoints) -> None:
    shutil.copytree(saved.folder / "9", saved.folder / "12.partial")
    again = Checkpoints(saved.folder, keep=2)
    assert again.iterations() == [6, 9]
    assert (saved.folder / "12.partial").exists(), "whoever only reads may find a run that saves"
    again.sweep()
    assert not (saved.folder / "12.partial").exists()


def damages(content: bytes) -> list[bytes | None]:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return [None, b"", content[:middle], content[:middle] + flipped + content[middle + 1 :]]


def test_every_damage_is_noticed_and_the_one_before_is_used(
    saved: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each file of the latest checkpoint missing, empty, cut off, or with one bit flipped."""
    latest = saved.folder / "9"
    intact = saved.folder.with_name("intact")
    shutil.copytree(latest, intact)
    files = [path.relative_to(intact) for path in intact.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for name in files:
        for damaged in damages((intact / name).read_bytes()):
            shutil.rmtree(latest, ignore_errors=True)
            shutil.copytree(intact, latest)
            (latest / name).unlink()
            if damaged is not None:
                (latest / name).write_bytes(damaged)
            said: list[str] = []
            restored = saved.restore(state(0), said.append)
            assert restored is not None
            assert_is(restored[0], state(6))
            assert f"{latest} is damaged" in said[0]
            assert "iteration 6" in said[1]
            assert not latest.exists(), "it would be taken for the latest again"
    assert capfd.readouterr().err == ""


def test_all_damaged(saved: Checkpoints) -> None:
    for iteration in (6, 9):
        (saved.folder / str(iteration) / "checkpoint.json").write_text("")
    with pytest.raises(RunError, match=r"Every checkpoint in .* is damaged"):
        saved.restore(state(0), lambda _: None)
    assert saved.iterations() == [6, 9], "evidence is not removed"


def test_another_format_is_refused(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_jax.runs.checkpoints._FORMAT", 6)
    with pytest.raises(UsageError, match=r"has format 5, but .* reads format 6"):
        saved.restore(state(0))


def test_a_moving_reference_is_saved_and_a_fixed_one_is_not(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    moving = state(3)._replace(reference={"weight": jnp.full((2, 3), 7.0, jnp.float32)})
    checkpoints.save(moving, FACTS)
    restored = checkpoints.restore(state(0)._replace(reference={"weight": jnp.zeros((2, 3))}))
    assert restored is not None
    assert_is(restored[0], moving)
    with pytest.raises(UsageError, match=r"reference.*needs none of that name"):
        checkpoints.restore(state(0))


def test_another_model_is_named_by_its_array(saved: Checkpoints) -> None:
    with pytest.raises(UsageError, match=r"'half'.* has shape \(3,\).* needs shape \(4,\)"):
        saved.restore(state(0, width=4))
    smaller = state(0)._replace(params={"weight": state(0).params["weight"]})
    with pytest.raises(UsageError, match=r"'half'.* needs none of that name"):
        saved.restore(smaller)
    larger = state(0)._replace(params=state(0).params | {"new": jnp.zeros(1)})
    with pytest.raises(UsageError, match=r"'new'.* is missing"):
        saved.restore(larger)


def test_restored_on_other_meshes_bit_for_bit(tmp_path: Path) -> None:
    """Saved on 2 x 4 devices, restored and saved on one, restored on eight shards."""
    table = jax.random.normal(jax.random.key(1), (6, 16))
    start = state(1)._replace(params={"embed_tokens": table, "norm": jnp.ones(16)})
    last = start
    for folder, mesh in (("2x4", make_mesh(8, 4)), ("1", None), ("8", make_mesh(8, 8))):
        like = place(jax.tree.map(jnp.zeros_like, start), mesh)
        if folder != "2x4":
            restored = Checkpoints(tmp_path, keep=1).restore(like, only=int(last.iteration))
            assert restored is not None
            last = restored[0]
            shard = last.params["embed_tokens"].addressable_shards[0].data
            assert shard.shape == ((6, 16) if mesh is None else (6, 2))
        else:
            last = place(start, mesh)
        jax.tree.map(np.testing.assert_array_equal, last.params, start.params)
        last = last._replace(iteration=last.iteration + 1)
        Checkpoints(tmp_path, keep=1).save(last, FACTS)
