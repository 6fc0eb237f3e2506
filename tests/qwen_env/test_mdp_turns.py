"""Turns in the MDP: against the same game played with lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.stop_strings import make_stop_strings

VOCAB_SIZE = 6  # spelt "a" to "f"; f is the end of sequence
STOP = make_stop_strings(
    ("ab",),
    {i: bytes([97 + i]) for i in range(5)},
    vocab_size=VOCAB_SIZE,
    usable_ids=range(5),
    max_new_tokens=9,
)


class Row:
    """One episode, played with lists."""

    def __init__(self, prompt, rules):
        self.rules, self.prompt, self.response = rules, prompt, []
        self.own, self.turn = [], []
        self.num_turns, self.status, self.was_cut_off = 0, "running", False

    def act(self, token):
        if self.status != "running":
            return
        self.turn.append(token)
        self.response.append(token)
        self.own.append(True)
        spelt = "".join(chr(97 + i) for i in self.turn)
        stopped = self.rules.stop is not None and "ab" in spelt
        if token == 5 or (stopped and len(self.turn) >= self.rules.min_new_tokens):
            self.num_turns += 1
            self.status = "waits" if self.num_turns < self.rules.max_turns else "terminated"
        elif len(self.response) == self.rules.max_new_tokens:
            self.status, self.was_cut_off = "truncated", True

    def hear(self, reply, done):
        if self.status != "waits":
            return
        if done:
            self.status = "terminated"
        elif len(self.response) + len(reply) >= self.rules.max_new_tokens:
            self.status = "truncated"
        else:
            self.response += reply
            self.own += [False] * len(reply)
            self.turn, self.status = [], "running"


@st.composite
def games(draw):
    prompt_limit, response_limit = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rules = mdp.Rules(
        max_prompt_length=prompt_limit,
        max_new_tokens=response_limit,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(5,),
        min_new_tokens=draw(st.integers(0, min(response_limit, 3))),
        stop=draw(st.sampled_from([None, STOP])),
        max_turns=draw(st.integers(2, 4)),
    )
    ids = st.lists(st.integers(0, 5), min_size=1, max_size=prompt_limit)
    prompts = draw(st.lists(ids, min_size=1, max_size=4))
    return rules, prompts, draw(st.integers(0, 2**32 - 1))


def play(game, xp):
    """Yield the rows and the state before the first action, and after each thing that happens."""
    rules, prompts, seed = game
    rng = np.random.default_rng(seed)
    rows = [Row(list(prompt), rules) for prompt in prompts]
    padded = np.full((len(rows), rules.max_prompt_length), 3)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = mdp.initial_state(xp.asarray(padded), [len(p) for p in prompts], rules, xp)
    yield rows, state
    while any(row.status in ("running", "waits") for row in rows):
        actions = rng.choice(VOCAB_SIZE, len(rows), p=[0.2, 0.3, 0.1, 0.1, 0.1, 0.2])
        for row, action in zip(rows, actions.tolist(), strict=True):
            if action == 5 and len(row.turn) < rules.min_new_tokens:
                action = 2  # the end of sequence is not allowed yet
                actions[rows.index(row)] = 2
            row.act(action)
        state = mdp.step(state, xp.asarray(actions), rules, xp)
        yield rows, state
        if rng.random() < 0.5:
            continue  # rows may wait for some time
        replies = [rng.integers(0, 6, rng.integers(1, 5)).tolist() for _ in rows]
        ids = np.full((len(rows), rules.max_new_tokens), 4)
        for some, reply in zip(ids, replies, strict=True):
            some[: len(reply)] = reply[: rules.max_new_tokens]
        done = rng.random(len(rows)) < 0.2
        for row, reply, ends in zip(rows, replies, done.tolist(), strict=True):
            row.hear(reply, ends)
        lengths = np.array([len(reply) for reply in replies])
        state = mdp.reply(state, *map(xp.asarray, (ids, lengths, done)), rules, xp)
        yield rows, state


@settings(max_examples=150, deadline=None)
@given(games())
def test_it_is_the_same_game_played_with_lists(game):
    rules = game[0]
    for rows, state in play(game, np):
        own, response = mdp.own_mask(state, np), mdp.response_mask(state, rules.max_new_tokens, np)
        for i, row in enumerate(rows):
            text = row.prompt + row.response
            padding = [mdp.PAD_TOKEN_ID] * (rules.max_length - len(text))
            assert state.tokens[i].tolist() == text + padding
            assert state.length[i] == len(text)
            assert own[i, len(row.prompt) : len(text)].tolist() == row.own
            assert own[i].sum() == sum(row.own) == response[i].sum()
            assert response[i, : len(row.own)].tolist() == row.own
            assert state.num_turns[i] == mdp.turns_ended(state)[i] == row.num_turns
            assert mdp.turn_length(state)[i] == len(row.turn)
            assert mdp.waits(state)[i] == (row.status == "waits")
            assert mdp.is_running(state)[i] == (row.status == "running")
            assert state.terminated[i] == (row.status == "terminated")
            assert state.truncated[i] == (row.status == "truncated")
            if row.status == "truncated":
                assert row.own[-1], "an episode's last token is an action"
                assert mdp.was_cut_off(state)[i] == row.was_cut_off


@settings(max_examples=8, deadline=None)  # each compiles
@given(games())
def test_jax_and_single_rows_agree(game):
    rules, prompts, _ = game
    for (_, state), (_, on_jax) in zip(play(game, np), play(game, jnp), strict=True):
        for name in mdp.State._fields:
            expected = getattr(state, name)
            if expected is not None:
                assert expected.dtype == getattr(on_jax, name).dtype, name
                np.testing.assert_array_equal(expected, getattr(on_jax, name))
        one = mdp.at(state, 0)
        ids, length = np.array([1] * rules.max_new_tokens), np.int32(1)
        alone = mdp.reply(one, ids, length, np.False_, rules, np)
        count = len(prompts)
        together = mdp.reply(
            state, np.tile(ids, (count, 1)), np.ones(count, int), np.zeros(count, bool), rules, np
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, mdp.at(together, 0), alone))


def test_with_one_turn_a_state_holds_nothing_more():
    rules = mdp.Rules(2, 3, 5, (4,))
    state = mdp.step(mdp.initial_state([[1, 2]], [2], rules, np), np.array([4]), rules, np)
    assert all(field is None for field in state[-4:])
    assert mdp.turns_ended(state).tolist() == [1]
    assert not mdp.waits(state).any()


def test_putting_rows_leaves_the_batch_as_it_was():
    rules = mdp.Rules(2, 4, 6, (5,), max_turns=2)
    state = mdp.initial_state([[1, 2], [3, 4]], [2, 2], rules, np)
    other = mdp.step(mdp.at(state, [1]), np.array([5]), rules, np)
    whole = mdp.put(state, np.array([1]), other)
    assert whole.length.tolist() == [2, 3] and whole.turn_ended.tolist() == [False, True]
    assert state.length.tolist() == [2, 2] and not state.turn_ended.any()


def test_wrong_numbers_of_turns():
    with pytest.raises(UsageError, match="max_turns is 0; it must be at least 1"):
        mdp.Rules(2, 3, 5, (4,), max_turns=0)
