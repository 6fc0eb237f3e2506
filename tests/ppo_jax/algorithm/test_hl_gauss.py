"""HL-Gauss against the PyTorch code of its paper, and against the normal distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ppo_jax.algorithm import Bins, expected_value, hl_gauss_loss, hl_gauss_targets, token_weights


class HLGaussLoss(torch.nn.Module):
    """Appendix A of arXiv:2403.03950, transcribed, in float64."""

    def __init__(self, min_value: float, max_value: float, num_bins: int, sigma: float):
        super().__init__()
        self.sigma = sigma
        self.support = torch.linspace(min_value, max_value, num_bins + 1, dtype=torch.float64)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits, self.transform_to_probs(target), reduction="none"
        )

    def transform_to_probs(self, target: torch.Tensor) -> torch.Tensor:
        cdf_evals = torch.special.erf(
            (self.support - target.unsqueeze(-1))
            / (torch.sqrt(torch.tensor(2.0, dtype=torch.float64)) * self.sigma)
        )
        z = cdf_evals[..., -1] - cdf_evals[..., 0]
        bin_probs = cdf_evals[..., 1:] - cdf_evals[..., :-1]
        return bin_probs / z.unsqueeze(-1)

    def transform_from_probs(self, probs: torch.Tensor) -> torch.Tensor:
        centers = (self.support[:-1] + self.support[1:]) / 2
        return torch.sum(probs * centers, dim=-1)


CASES = [Bins(-2.0, 3.0, 51), Bins(0.0, 1.0, 5), Bins(-10.0, -1.0, 2)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("bins", CASES, ids=str)
def test_loss_and_gradient_are_the_papers(bins, rng):
    """Over the real tokens of a ragged batch, with the weights of a mean."""
    theirs = HLGaussLoss(*bins, sigma=0.75 * bins.width)
    shape = (4, 6)
    mask = np.arange(6) < np.array([6, 1, 4, 3])[:, None]
    logits = 3 * rng.normal(size=(*shape, bins.number)).astype(np.float32)
    returns = rng.uniform(bins.low, bins.high, shape).astype(np.float32)
    weights = np.asarray(token_weights(mask, "sequence"))

    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    flat = theirs(x.reshape(-1, bins.number), torch.tensor(returns, dtype=torch.float64).ravel())
    expected = (flat.reshape(shape) * torch.tensor(weights)).sum()
    expected.backward()

    spoilt = np.where(mask, returns, np.nan), np.where(mask[..., None], logits, np.inf)
    loss, gradient = jax.value_and_grad(
        lambda logits: hl_gauss_loss(logits, spoilt[0], mask, bins, weights=weights)
    )(jnp.asarray(spoilt[1]))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradient)[~mask].any()
    plain = hl_gauss_loss(logits, returns, mask, bins)
    assert plain == pytest.approx(flat.reshape(shape)[torch.tensor(mask)].mean().item(), rel=1e-5)


@pytest.mark.parametrize("bins", CASES, ids=str)
def test_values_are_the_papers(bins, rng):
    theirs = HLGaussLoss(*bins, sigma=0.75 * bins.width)
    logits = 2 * rng.normal(size=(7, bins.number)).astype(np.float32)
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)
    expected = theirs.transform_from_probs(probabilities)
    np.testing.assert_allclose(expected_value(logits, bins), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(-2, 3))
def test_targets_are_a_normal_distribution_between_the_ends(value):
    bins = Bins(-2.0, 3.0, 25)
    targets = np.asarray(hl_gauss_targets(jnp.float32(value), bins))
    edges = np.linspace(-2, 3, 26)
    cdf = norm.cdf(edges, loc=value, scale=0.75 * 0.2)
    np.testing.assert_allclose(targets, np.diff(cdf) / (cdf[-1] - cdf[0]), atol=2e-6)
    if -1 < value < 2:  # away from the ends, the mean is the value
        np.testing.assert_allclose(targets @ np.asarray(bins.centers), value, atol=1e-4)


@pytest.mark.parametrize("value", [3.5, 1e30, np.inf, -np.inf, -40.0])
def test_beyond_the_range_the_end_is_meant(value):
    bins = Bins(-2.0, 3.0, 25)
    end = 3.0 if value > 0 else -2.0
    np.testing.assert_array_equal(
        hl_gauss_targets(jnp.float32(value), bins), hl_gauss_targets(jnp.float32(end), bins)
    )


def test_the_least_loss_is_the_entropy_of_the_target():
    bins = Bins(-2.0, 3.0, 51)
    target = np.asarray(hl_gauss_targets(jnp.float32(0.4), bins), np.float64)
    logits = np.log(np.maximum(target, 1e-30))
    loss = hl_gauss_loss(logits[None, None], np.full((1, 1), 0.4), np.ones((1, 1)), bins)
    entropy = -(target * logits).sum()
    assert loss == pytest.approx(entropy, rel=1e-5)
    assert entropy == pytest.approx(1.2, abs=0.02)  # as the docstring says
