from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.stop_strings import make_stop_strings


@st.composite
def games(draw):
    """Rules, a batch of prompts, and more actions than any episode can take."""
    vocab_size = draw(st.integers(4, 9))
    prompt_limit, response_limit = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ids = st.integers(0, vocab_size - 1)
    texts = [draw(st.text("ab", max_size=3)) for _ in range(vocab_size)]
    responses = ["".join(some) for some in product(set(texts), repeat=response_limit)]
    strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=2, unique=True)
    strings = [string for string in draw(strings) if any(string in text for text in responses)]
    rules = mdp.Rules(
        max_prompt_length=prompt_limit,
        max_new_tokens=response_limit,
        vocab_size=vocab_size,
        eos_token_ids=tuple(draw(st.sets(ids, min_size=1, max_size=2))),
        min_new_tokens=draw(st.integers(0, response_limit)),
        forbidden_token_ids=tuple(draw(st.sets(ids, max_size=1))),
        stop=make_stop_strings(
            tuple(strings),
            dict(enumerate(map(str.encode, texts))),
            vocab_size=vocab_size,
            usable_ids=range(vocab_size),
            max_new_tokens=response_limit,
        )
        if strings
        else None,
    )
    rows = draw(st.integers(1, 4))
    prompts = draw(
        st.lists(st.lists(ids, min_size=1, max_size=prompt_limit), min_size=rows, max_size=rows)
    )
    padded = np.full((rows, prompt_limit), vocab_size - 1, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    actions = np.array(
        draw(
            st.lists(
                st.lists(ids, min_size=rows, max_size=rows),
                min_size=response_limit + 2,
                max_size=response_limit + 2,
            )
        )
    )
    return rules, texts, prompts, padded, actions


@settings(max_examples=100, deadline=None)
@given(games())
def test_it_is_the_obvious_game_played_with_lists(game):
    rules, spelling, prompts, padded, actions = game
    state = mdp.initial_state(padded, [len(p) for p in prompts], rules, np)
    texts = [list(p) for p in prompts]
    flags = [(False, False) for _ in prompts]
    was_stopped = [False for _ in prompts]
    for action in actions:
        state = mdp.step(state, action, rules, np)
        for i, token in enumerate(action):
            if any(flags[i]):
                continue
            texts[i].append(int(token))
            response = texts[i][len(prompts[i]) :]
            written = "".join(spelling[token] for token in response)
            holds_one = bool(rules.stop) and any(s in written for s in rules.stop.strings)
            is_stop = holds_one and len(response) >= rules.min_new_tokens
            is_end = token in rules.eos_token_ids or is_stop
            flags[i] = (is_end, len(response) == rules.max_new_tokens and not is_end)
            was_stopped[i] = is_end and holds_one
        for i, text in enumerate(texts):
            padding = [mdp.PAD_TOKEN_ID] * (rules.max_length - len(text))
            assert state.tokens[i].tolist() == text + padding
            assert mdp.attention_mask(state, np)[i].sum() == len(text)
            assert state.length[i] == len(text)
            assert (state.terminated[i], state.truncated[i]) == flags[i]
            assert mdp.was_stopped(state)[i] == was_stopped[i]
            written = len(text) - len(prompts[i])
            assert mdp.response_length(state)[i] == written
            allowed = set(range(rules.vocab_size)) - set(rules.forbidden_token_ids)
            if written < rules.min_new_tokens:
                allowed -= set(rules.eos_token_ids)
            mask = mdp.action_mask(mdp.response_length(state), rules, np)[i]
            assert set(np.flatnonzero(mask)) == allowed
    assert mdp.has_ended(state).all()


@settings(max_examples=15, deadline=None)  # each compiles
@given(games())
def test_numpy_jax_and_single_rows_agree(game):
    rules, _, prompts, padded, actions = game
    lengths = np.array([len(p) for p in prompts])
    batch = mdp.initial_state(padded, lengths, rules, np)
    on_jax = mdp.initial_state(jnp.asarray(padded), jnp.asarray(lengths), rules, jnp)
    single = mdp.initial_state(padded[0], lengths[0], rules, np)
    step = jax.jit(lambda state, action: mdp.step(state, action, rules, jnp))
    for action in actions:
        batch = mdp.step(batch, action, rules, np)
        on_jax = step(on_jax, jnp.asarray(action))
        single = mdp.step(single, int(action[0]), rules, np)
        for name in mdp.State._fields:
            expected = getattr(batch, name)
            if expected is None:  # there are no stop strings
                assert getattr(on_jax, name) is getattr(single, name) is None
                continue
            np.testing.assert_array_equal(expected, getattr(on_jax, name))
            np.testing.assert_array_equal(expected[0], getattr(single, name))
            assert expected.dtype == getattr(on_jax, name).dtype == getattr(single, name).dtype
        for mask_of in (
            lambda s, xp: mdp.attention_mask(s, xp),
            lambda s, xp: mdp.action_mask(mdp.response_length(s), rules, xp),
        ):
            np.testing.assert_array_equal(mask_of(batch, np), mask_of(on_jax, jnp))
            np.testing.assert_array_equal(mask_of(batch, np)[0], mask_of(single, np))


def test_step_leaves_the_old_state_as_it_was():
    rules = mdp.Rules(2, 3, 5, (4,))
    state = mdp.initial_state([[1, 2]], [2], rules, np)
    before = mdp.at(state, [0])
    mdp.step(state, np.array([4]), rules, np)
    for old, new in zip(before, state, strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_end_of_sequence_id_in_the_prompt_ends_nothing():
    rules = mdp.Rules(3, 2, 5, (4,))
    state = mdp.initial_state([[4, 1, 4]], [3], rules, np)
    assert not mdp.has_ended(mdp.step(state, np.array([1]), rules, np)).any()


def test_end_of_sequence_at_the_limit_is_termination():
    rules = mdp.Rules(1, 1, 5, (4,))
    state = mdp.initial_state([[1], [1]], [1, 1], rules, np)
    state = mdp.step(state, np.array([4, 3]), rules, np)
    assert state.terminated.tolist() == [True, False]
    assert state.truncated.tolist() == [False, True]


def test_action_mask_by_hand():
    rules = mdp.Rules(1, 4, 6, (1, 5), forbidden_token_ids=(0, 5), min_new_tokens=2)
    mask = mdp.action_mask(np.array([0, 1, 2, 3]), rules, np)
    early, late = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]
    assert mask.astype(int).tolist() == [early, early, late, late]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 4}, r"max_new_tokens \(3\)"),
        ({"eos_token_ids": ()}, "eos_token_ids is empty"),
        ({"eos_token_ids": (5,)}, "eos_token_ids holds 5"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; it must be an integer"),
        ({"vocab_size": "5"}, "vocab_size is '5'; it must be an integer"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must be at most 2147483647"),
        ({"max_new_tokens": 2**31 - 2}, "max_prompt_length . max_new_tokens is 2147483648"),
        ({"eos_token_ids": ("4",)}, "eos_token_ids is .*; it must be a list of token ids"),
        ({"forbidden_token_ids": (-1,)}, "forbidden_token_ids holds -1"),
        ({"forbidden_token_ids": range(5)}, "every token is forbidden"),
        ({"forbidden_token_ids": range(4), "min_new_tokens": 1}, "every token is forbidden"),
    ],
)
def test_wrong_rules(changes, message):
    right = {"max_prompt_length": 2, "max_new_tokens": 3, "vocab_size": 5, "eos_token_ids": (4,)}
    mdp.Rules(**right)
    with pytest.raises(UsageError, match=message):
        mdp.Rules(**(right | changes))
