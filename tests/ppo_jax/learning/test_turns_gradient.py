"""The learner against the exact policy gradient of a game of two turns whose episodes are listed.

    J(θ) = Σ_y π(y) (what y's turns earn + score(y) - β log(π(y) / π_ref(y)))

where π(y) is the product over the tokens that the policy chose: what answers it is a function of
what it wrote, and no part of the product.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.generation.rollout import Rollout
from qwen_env import mdp

EOS, PROMPT, T = 0, (2, 1), 5
BETA, TEMPERATURE = 0.3, 0.8
# Three tokens may be chosen; a turn has at least two.
RULES = mdp.Rules(2, T, 7, (EOS,), forbidden_token_ids=(3, 4, 5, 6), min_new_tokens=1, max_turns=2)


def reply_to(turn):
    """Longer to some; its end-of-sequence id ends nothing."""
    return [5, EOS] if 1 in turn else [6]


class Game:
    """Every episode, one a row."""

    def __init__(self):
        self.rows = []  # of (tokens behind the prompt, own, number in the turn, turns ended, how)
        self._extend([], [], [], [], 0)
        count = len(self.rows)
        tokens = np.zeros((count, 2 + T), np.int32)
        self.own, self.number = np.zeros((count, T), bool), np.zeros((count, T), int)
        for i, (response, own, number, _, _) in enumerate(self.rows):
            tokens[i, : 2 + len(response)] = (*PROMPT, *response)
            self.own[i, : len(own)], self.number[i, : len(own)] = own, number
        turns, how = zip(*(row[3:] for row in self.rows), strict=True)
        length = jnp.asarray([2 + len(row[0]) for row in self.rows])
        self.state = mdp.State(
            tokens=jnp.asarray(tokens),
            prompt_length=jnp.full(count, 2),
            length=length,
            terminated=jnp.asarray([reason == "eos" for reason in how]),
            truncated=jnp.asarray([reason != "eos" for reason in how]),
            own=jnp.pad(jnp.asarray(self.own), ((0, 0), (2, 0))),
            turn_start=length,  # nobody asks
            num_turns=jnp.asarray(turns),
            turn_ended=jnp.asarray([reason == "overflow" for reason in how]),
        )
        rng = np.random.default_rng(0)
        earned: dict[tuple[int, ...], float] = {}  # by a turn in what came before it
        self.rewards = np.zeros((count, T), np.float32)
        self.score = np.zeros(count, np.float32)
        for i, (response, own, _, _, _) in enumerate(self.rows):
            for end in range(len(response)):
                if own[end] and response[end] == EOS:
                    so_far = tuple(response[: end + 1])
                    self.rewards[i, end] = earned.setdefault(so_far, rng.normal())
            self.rewards[i, len(response) - 1] += rng.normal()
            self.score[i] = self.rewards[i].sum()

    def _extend(self, response, own, number, turn, turns):
        for token in (1, 2, EOS):
            if token == EOS and not turn:
                continue
            longer = [*response, token], [*own, True], [*number, len(turn)]
            if token != EOS:
                if len(longer[0]) == T:
                    self.rows.append((*longer, turns, "length"))
                else:
                    self._extend(*longer, [*turn, token], turns)
                continue
            reply = reply_to(turn)
            if turns == 1:
                self.rows.append((*longer, 2, "eos"))
            elif len(longer[0]) + len(reply) >= T:
                self.rows.append((*longer, 1, "overflow"))
            else:
                heard = zip(longer, (reply, [False] * len(reply), [0] * len(reply)), strict=True)
                self._extend(*(a + b for a, b in heard), [], 1)

    def log_p(self, network):
        """log π(y) [N]."""
        mask = jnp.arange(2 + T) < self.state.length[:, None]
        logits = network(self.state.tokens, mask)[0][:, 1:-1] / TEMPERATURE
        allowed = np.array([[i < 3 and (i != EOS or n > 0) for i in range(7)] for n in range(T)])
        log_p = jax.nn.log_softmax(jnp.where(allowed[self.number], logits, -1e9), axis=-1)
        chosen = jnp.take_along_axis(log_p, self.state.tokens[:, 2:, None], axis=-1)[..., 0]
        return jnp.where(self.own, chosen, 0.0).sum(-1)


@pytest.fixture(scope="module")
def game():
    return Game()


@pytest.fixture(scope="module")
def network(make_tiny_network):
    return make_tiny_network()


def test_the_list_of_episodes_is_complete(game, network):
    assert {row[-1] for row in game.rows} == {"eos", "length", "overflow"}
    assert (~game.own & (np.asarray(game.state.tokens[:, 2:]) > 0)).any(), "there are replies"
    assert np.exp(np.asarray(game.log_p(network), np.float64)).sum() == pytest.approx(1, abs=1e-6)


def test_turns_replies_and_their_rewards_make_the_exact_gradient(game, network, learner_of):
    """Any baseline does: here the values of a random head."""
    learner = learner_of(
        network,
        RULES,
        batch_size=len(game.rows),
        kl_coef=BETA,
        gamma=1.0,
        gae_lambda=1.0,
        advantage_whitening="none",
        value_coef=0.0,
        entropy_coef=0.0,
        temperature=TEMPERATURE,
    )
    start = learner.start
    graphdef, params = nnx.split(network)
    reference = nnx.merge(graphdef, nnx.State({**params, "backbone": learner.reference}))
    log_ref = game.log_p(reference)

    def objective(params):
        log_p = game.log_p(nnx.merge(graphdef, params))
        return jnp.sum(jnp.exp(log_p) * (game.score - BETA * (log_p - log_ref)))

    expected = jax.grad(objective)(params)
    prepared, _ = learner.compile(learner.learner.prepare)(
        start.params,
        learner.reference,
        start.controls,
        Rollout(game.state, jnp.zeros(game.own.shape)),
        game.score,
        game.rewards,
    )
    batch = prepared.batch
    assert jnp.abs(batch.values).max() > 0.3
    np.testing.assert_array_equal(batch.mask, game.own)
    weight = jnp.exp(game.log_p(network)) * batch.mask.sum()
    batch = batch._replace(advantages=batch.advantages * weight[:, None])
    gradients = learner.compile(lambda *a: learner.learner.gradients(*a)[0])(start.params, batch)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert scale > 0.01
    negative = jax.tree.map(jnp.negative, expected)
    chex.assert_trees_all_close(gradients, negative, rtol=0, atol=1e-5 * scale)
