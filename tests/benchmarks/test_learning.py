import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from learning import best_of_n, jobs, plan, plots, report, runs, settings
from scipy import stats

from ppo_jax.models import DecoderConfig, PolicyValueNetwork
from ppo_jax.runs import seeds
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.errors import UsageError

# ---------------------------------------------------------------- statistics


def test_interval_of_five_numbers() -> None:
    mean, half = seeds.interval([1, 2, 3, 4, 5])
    assert mean == 3
    np.testing.assert_allclose(half, 2.7764451 * math.sqrt(2.5) / math.sqrt(5), rtol=1e-7)


def test_interval_of_one_number_is_not_known() -> None:
    assert seeds.interval([2.0]).mean == 2
    assert math.isnan(seeds.interval([2.0]).half)


def test_interval_covers_the_truth_19_times_in_20() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    intervals = [seeds.interval(row) for row in draws]
    covered = np.mean([x.low <= 3.0 <= x.high for x in intervals])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_pairs_are_made_by_seed() -> None:
    values, others = {2: 5.0, 0: 1.0, 1: 2.5, 9: 100.0}, {0: 0.5, 1: 1.5, 2: 3.0, 7: -100.0}
    result = seeds.paired(values, others)
    assert result is not None
    np.testing.assert_allclose(result[0].mean, (0.5 + 1.0 + 2.0) / 3)
    assert result[1] == pytest.approx(stats.ttest_rel([1, 2.5, 5], [0.5, 1.5, 3]).pvalue)


def test_pairs_that_do_not_differ() -> None:
    same = {0: 1.0, 1: 2.0}
    assert seeds.paired(same, same) == ((0.0, 0.0), 1.0)
    assert seeds.paired({0: 2.0, 1: 3.0}, same) == ((1.0, 0.0), 0.0)
    assert seeds.paired(same, {1: 2.0}) is None


def test_holm() -> None:
    assert seeds.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert seeds.holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])


def test_an_interval_that_excludes_zero_has_a_small_p() -> None:
    """The two ways to say "noise" agree."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = dict(enumerate(rng.normal(0.8, 1.0, 5)))
        result = seeds.paired(values, dict.fromkeys(range(5), 0.0))
        assert result is not None
        difference, p = result
        is_noise = difference.low <= 0 <= difference.high
        assert (seeds.verdict(p, p) == "noise") == is_noise
    assert seeds.verdict(0.01, 0.2) == "suggestive"


# ---------------------------------------------------------------- best of n


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(0)
    scores, gold = np.sort(rng.normal(size=7)), rng.normal(size=7)
    weights = best_of_n.best_of_n_weights(n, 7)
    subsets = [max(subset) for subset in itertools.combinations(range(7), n)]
    np.testing.assert_allclose(weights @ scores, scores[subsets].mean(), rtol=1e-10)
    np.testing.assert_allclose(weights @ gold, gold[subsets].mean(), rtol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_best_of_n_kl_bounds_the_exact_one_and_is_reached(n: int) -> None:
    """Of M equally likely responses, the i-th best wins with (iⁿ - (i-1)ⁿ) / Mⁿ."""
    for size, gap in ((3, math.inf), (100_000, 1e-3)):
        rank = np.arange(size + 1) / size
        p = np.diff(rank**n)
        exact = np.sum(p * np.log(np.maximum(p * size, 1e-300)))
        assert exact - 1e-12 <= best_of_n.best_of_n_kl(n) < exact + gap


# ---------------------------------------------------------------- settings and jobs


def test_settings_are_valid_and_have_what_they_are_compared_with() -> None:
    names = [setting.name for setting in settings.SETTINGS]
    assert len(set(names)) == len(names)
    baseline = settings.SETTINGS[0]
    assert baseline.name == settings.BASELINE
    for setting in settings.SETTINGS:
        assert setting.against in names
        config = setting.config(30, seed=3)
        assert config.run.seed == 3
        if setting is not baseline:
            assert config != baseline.config(30, seed=3)


def test_a_job_is_done_when_a_record_has_all_its_fields() -> None:
    [[frontier], [job, _]] = plan.jobs(["clip 0.1"], 2, 30)
    assert frontier.name == settings.FRONTIER
    record = {"name": "clip 0.1", "seed": 0, "iterations": 30, "changes": "clip_range 0.1"}
    assert jobs.is_record_of(record | {"curve": []}, job)
    for changed in ({"seed": 1}, {"iterations": 60}, {"changes": "clip_range 0.15"}):
        assert not jobs.is_record_of(record | changed, job)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no setting 'clip'; choose from: baseline, "):
        plan.jobs(["clip"], 1, 30)


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert jobs.read_records(path) == []
    path.write_text('{"seed": 0}\n{"seed": 1}\n{"se')
    assert jobs.read_records(path) == [{"seed": 0}, {"seed": 1}]
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'
    path.write_text('{"seed": 0}\n{"se\n{"seed": 1}\n')
    with pytest.raises(UsageError, match="line 2 is no JSON"):
        jobs.read_records(path)


# ---------------------------------------------------------------- measures


@pytest.fixture(scope="module")
def network() -> PolicyValueNetwork:
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8,
    )
    return PolicyValueNetwork(config, rngs=nnx.Rngs(0))


def test_kl_of_a_truncated_policy_from_itself_is_the_mass_cut_off(
    network: PolicyValueNetwork,
) -> None:
    """KL = -log of the probability kept, at every response token; without truncation it is 0."""
    state = mdp.State(
        tokens=jnp.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 0, 0, 0]]),
        prompt_length=jnp.array([2, 1]),
        length=jnp.array([5, 3]),
        terminated=jnp.array([True, True]),
        truncated=jnp.array([False, False]),
    )
    graphdef, params = nnx.split(network)
    whole = runs.kl_and_entropy(graphdef, params, params, state, Sampling())
    cut = runs.kl_and_entropy(graphdef, params, params, state, Sampling(top_k=3))
    attended = jnp.arange(6) < state.length[:, None]
    p = np.asarray(jax.nn.softmax(network(state.tokens, attended)[0]))
    behind = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # each response token's predecessor
    kept = [np.sort(p[row, place])[-3:].sum() for row, place in behind]
    assert whole["kl"] == 0
    np.testing.assert_allclose(cut["kl"], -np.log(kept).sum() / 2, rtol=1e-5)
    entropies = [-(p[at] * np.log(p[at])).sum() for at in behind]
    np.testing.assert_allclose(whole["entropy"], np.mean(entropies), rtol=1e-5)


# ---------------------------------------------------------------- report


def records() -> list[dict[str, Any]]:
    """Three seeds; "clip 0.1" lowers every measure by exactly 1, "clip 0.4" by noise."""
    rng = np.random.default_rng(0)
    metrics = [column.metric for column in report.COLUMNS] + ["greedy/length_mean"]
    metrics += ["greedy/grammatical"]
    made: list[dict[str, Any]] = []
    for seed in range(3):
        base = dict(zip(metrics, rng.normal(size=len(metrics)), strict=True))
        base |= {"kl": 1.5 + seed, "sampled/score": 0.9, "sampled/gold": 0.1}
        worse = {name: value - 1 - 0.001 * seed for name, value in base.items()}
        noisy = {name: value + rng.normal() for name, value in base.items()}
        for name, final in (
            ("baseline", base),
            ("twice as long", base),
            ("clip 0.1", worse),
            ("clip 0.4", noisy),
            ("SFT on best of 8", base),
        ):
            points = [{"iteration": i, "tokens": 1000 * i} | final for i in range(3)]
            made.append({"name": name, "seed": seed, "curve": points})
        rows = [
            {"n": n, "kl": math.log(n), "score": 0.1 * n, "gold": seed}
            | {"length_mean": 9, "grammatical": 1}
            for n in (1, 2)
        ]
        made.append({"name": "best of n", "seed": seed, "best_of": rows})
    # Lines: 2 of the score a nat of KL above 0, half of gold above -0.4.
    line = [{"kl": kl, "score": 2.0 * kl, "gold": 0.5 * kl - 0.4} for kl in (0, 1, 4)]
    return [*made, {"name": "best policies", "seed": 0, "frontier": line}]


def test_share_of_the_gain_that_is_possible_at_the_same_kl() -> None:
    frontier = records()[-1]["frontier"]
    point = {"kl": 2.0, "sampled/score": 3.0, "sampled/gold": 0.4}
    assert report.shares(point, frontier) == pytest.approx({"share/score": 0.75, "share/gold": 0.8})
    assert report.shares(point | {"kl": 4.5}, frontier) == {}  # nothing is known there
    assert report.shares(point, []) == {}
    finals = report.summarise(records()).finals["baseline"]
    shares = [0.9 / (2 * kl) for kl in (1.5, 2.5, 3.5)]
    assert finals["share/score"] == seeds.interval(shares)


def test_tables_and_plots_say_what_the_records_hold(tmp_path: Path) -> None:
    summary = report.summarise(records())
    verdicts = {
        name: {metric: change.verdict for metric, change in changes.items()}
        for name, changes in summary.differences.items()
    }
    assert set(verdicts["clip 0.1"].values()) == {"robust"}
    assert set(verdicts["clip 0.4"].values()) == {"noise"}
    assert set(verdicts["twice as long"].values()) == {"noise"}
    report.write_tables(summary, tmp_path)
    plots.plot_all(summary, tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "| clip 0.1 | clip_range 0.1 | -1.00 [-1.00, -1.00]\\*\\* |" in tables
    assert "| 2 | 0.69 | 0.20 ± 0.00 | 1.00 ± 2.48 |" in tables
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["differences"]["clip 0.1"]["kl"]["verdict"] == "robust"
    for name in ("curves", "ablations", "frontier"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_detectable_effect_is_found_as_often_as_it_says() -> None:
    """By simulation of the t-test that the study makes."""
    for power, alpha in ((0.8, 0.05), (0.5, 0.05), (0.8, 0.05 / 38)):
        effect = seeds.detectable_effect(5, power=power, alpha=alpha)
        differences = np.random.default_rng(0).normal(effect, 1, (100_000, 5))
        p = stats.ttest_1samp(differences, 0, axis=1).pvalue
        assert np.mean(p < alpha) == pytest.approx(power, abs=0.01)
