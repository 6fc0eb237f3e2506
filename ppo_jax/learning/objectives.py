"""What supervised learning minimises: a network's outputs for rows of a batch, and their loss.

Both are told of a part of a batch and give sums by the whole batch's weights, so that the parts'
results add up (`learning.parts`).

Shapes: M rows, N = M / 2 pairs, S width, T = S - 1, D hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax import algorithm
from ppo_jax.learning.packing import Layout, pack
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.models import PolicyValueNetwork, RewardModel
from ppo_jax.sampling import Sampling
from qwen_env import mdp


class Texts(NamedTuple):
    """M texts, padded on the right."""

    tokens: Int[Array, "M S"]
    length: Int[Array, "M"]
    is_learnt: Bool[Array, "M S"]  # of each token, whether it is to be predicted
    margin: Float[Array, "M"]  # of the pair that it belongs to, where texts come in pairs


Sums = dict[str, Array]
"""Scalars, by the names that they have in `metrics.jsonl`."""


class Objective(Protocol):
    """What is minimised."""

    def outputs(self, network: Any, texts: Texts, layout: Layout | None) -> Any:
        """What a network says, with a row for each row."""

    def weights(self, texts: Texts) -> Float[Array, "M ..."]:
        """Of a whole batch, what each row, or each of its tokens, counts for."""

    def loss(
        self, outputs: Any, texts: Texts, weights: Float[Array, "M ..."]
    ) -> tuple[Float[Array, ""], Sums]:
        """The loss, and what to watch."""


class CompletionOutputs(NamedTuple):
    """Of every token but the first."""

    logprobs: Float[Array, "M T"]
    entropy: Float[Array, "M T"]


@dataclass(frozen=True)
class CompletionObjective:
    """Cross-entropy of the tokens that are learnt, each counting alike.

    Args:
        width: S.
        vocab_size: of the network: ids without a text are predicted, too, to be never.
    """

    width: int
    vocab_size: int
    remat: bool = False

    def outputs(
        self, network: PolicyValueNetwork, texts: Texts, layout: Layout | None
    ) -> CompletionOutputs:
        """As of responses to a prompt of one token, since the first is never predicted."""
        rules = mdp.Rules(1, self.width - 1, self.vocab_size, eos_token_ids=(0,))
        new = response_outputs(
            network,
            texts.tokens,
            jnp.ones_like(texts.length),
            texts.length,
            None,
            texts.is_learnt[:, 1:],
            rules=rules,
            sampling=Sampling(1.0, None, None),
            remat=self.remat,
            layout=layout,
        )
        return CompletionOutputs(new.logprobs, new.entropy)

    def weights(self, texts: Texts) -> Float[Array, "M T"]:
        return algorithm.token_weights(texts.is_learnt[:, 1:])

    def loss(
        self, outputs: CompletionOutputs, texts: Texts, weights: Float[Array, "M T"]
    ) -> tuple[Float[Array, ""], Sums]:
        mask = texts.is_learnt[:, 1:]
        loss = algorithm.cross_entropy(outputs.logprobs, mask, weights=weights)
        entropy = algorithm.masked_mean(outputs.entropy, mask, weights=weights)
        return loss, {"train/loss": loss, "train/entropy": entropy}


class PreferenceOutputs(NamedTuple):
    score: Float[Array, "M"]
    hidden: Float[Array, "M D"]  # of the last token, which the head reads


@dataclass(frozen=True)
class PreferenceObjective:
    """Bradley and Terry's loss of pairs: every even row was chosen, and not the one behind it."""

    centring_coef: float = 0.0
    remat: bool = False

    def outputs(
        self, network: RewardModel, texts: Texts, layout: Layout | None
    ) -> PreferenceOutputs:
        packed = pack(texts.tokens, texts.length, layout)
        hidden, _ = network.backbone(packed.tokens, packed.mask, remat=self.remat)
        last = hidden.reshape(-1, hidden.shape[-1])[packed.start + texts.length - 1]
        return PreferenceOutputs(network.score(last), last)

    def weights(self, texts: Texts) -> Float[Array, "M"]:
        return jnp.full(texts.length.shape, 2 / len(texts.length), jnp.float32)

    def loss(
        self, outputs: PreferenceOutputs, texts: Texts, weights: Float[Array, "M"]
    ) -> tuple[Float[Array, ""], Sums]:
        chosen, rejected = outputs.score[::2], outputs.score[1::2]
        margin, weights = texts.margin[::2], weights[::2]
        loss = algorithm.bradley_terry_loss(
            chosen,
            rejected,
            margin=margin,
            centring_coef=self.centring_coef,
            weights=weights,
        )
        return loss, {
            "train/loss": loss,
            "train/accuracy": (weights * (chosen > rejected)).sum(),
            "train/chosen": (weights * chosen).sum(),
            "train/rejected": (weights * rejected).sum(),
        }
