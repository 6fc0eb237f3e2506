"""The losses of supervised learning: values and gradients against PyTorch, and closed forms."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import bradley_terry_loss, calibration_error, centred_head, cross_entropy


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_cross_entropy_is_pytorchs(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    token = rng.integers(7, size=(3, 5))
    mask = rng.random((3, 5)) < 0.6

    def ours(logits: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)
        chosen = np.arange(3)[:, None], np.arange(5), token
        return cross_entropy(logprobs[chosen], mask)

    theirs = torch.tensor(logits, requires_grad=True)
    labels = torch.tensor(np.where(mask, token, -100))
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    loss.backward()
    value, gradient = jax.value_and_grad(ours)(logits)
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.7, "of each pair"])
@pytest.mark.parametrize("centring_coef", [0.0, 0.3])
def test_bradley_terry_is_pytorchs(
    margin: float | str, centring_coef: float, rng: np.random.Generator
) -> None:
    scores = 4 * rng.normal(size=(2, 6)).astype(np.float32)
    margins = rng.random(6).astype(np.float32) if isinstance(margin, str) else margin

    def ours(scores: jax.Array) -> jax.Array:
        return bradley_terry_loss(*scores, margin=margins, centring_coef=centring_coef)

    theirs = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    gap = theirs[0] - theirs[1] - torch.as_tensor(margins)
    losses = torch.log(1 + torch.exp(-gap)) + centring_coef * (theirs[0] + theirs[1]) ** 2
    losses.mean().backward()
    value, gradient = jax.value_and_grad(ours)(scores)
    assert float(value) == pytest.approx(losses.mean().item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)


def test_parts_of_a_batch_add_up(rng: np.random.Generator) -> None:
    chosen, rejected = rng.normal(size=(2, 8)).astype(np.float32)
    weights = np.full(8, 1 / 8, np.float32)
    whole = bradley_terry_loss(chosen, rejected)
    parts = [
        bradley_terry_loss(chosen[part], rejected[part], weights=weights[part])
        for part in (slice(3), slice(3, 8))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_a_hopeless_pair_has_a_finite_loss_and_gradient() -> None:
    chosen, rejected = np.float32([-1e4]), np.float32([1e4])
    value, gradient = jax.value_and_grad(bradley_terry_loss)(chosen, rejected)
    assert float(value) == pytest.approx(2e4) and float(gradient[0]) == -1.0


def test_calibration_error_is_the_mean_of_the_bins(rng: np.random.Generator) -> None:
    chosen, rejected = rng.normal(size=(2, 500))
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    expected = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        inside = (low <= confidence) & (confidence < low + 0.05)
        if inside.any():
            accuracy = (chosen > rejected)[inside].mean()
            expected += inside.mean() * abs(accuracy - confidence[inside].mean())
    assert calibration_error(chosen, rejected) == pytest.approx(expected, abs=1e-9)


def test_probabilities_that_come_true_are_calibrated(rng: np.random.Generator) -> None:
    gap = rng.normal(size=100_000)
    is_right = rng.random(len(gap)) < 1 / (1 + np.exp(-gap))
    gap = np.where(is_right, gap, -gap)
    assert calibration_error(gap, np.zeros_like(gap)) < 0.01
    assert calibration_error(3 * gap, np.zeros_like(gap)) > 0.1, "overconfident"
    assert calibration_error(np.zeros(4), np.zeros(4)) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([3, 40]), st.floats(-3, 3), st.floats(0.1, 10))
def test_a_centred_head_has_mean_0_and_standard_deviation_1(
    seed: int, count: int, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    hidden = (rng.normal(size=(count, 8)) + 1).astype(np.float32)
    weight = (scale * (rng.normal(size=8) + shift)).astype(np.float32)
    scores = hidden @ centred_head(weight, hidden)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, rel=1e-4)


def test_centring_keeps_the_gaps_where_a_constant_is_in_reach(rng: np.random.Generator) -> None:
    """One of the hidden numbers is the same for all texts, and so a bias."""
    hidden = np.concatenate([rng.normal(size=(200, 5)), np.full((200, 1), 2.0)], axis=1)
    weight = rng.normal(size=6)
    before, after = hidden @ weight, hidden @ centred_head(weight, hidden, ridge=1e-9)
    expected = (before - before.mean()) / before.std()
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_scores_that_are_all_one_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="one score"):
        centred_head(np.ones(3), np.ones((4, 3)))
