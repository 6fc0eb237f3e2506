"""The cursor, the recogniser and the sentiment against each other and against a plain parser."""

import functools
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_env import pocket
from qwen_env.pocket import grammar

SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


@functools.cache
def pieces(alternative: str) -> list[str]:
    return [piece for piece in re.split(r"(\{\^?\w+\})", alternative) if piece]


@functools.cache
def ends(symbol: str, text: str, start: int, capital: bool = False) -> frozenset[int]:
    """Where a text of `symbol` that begins at `start` may end; -1 where `text` runs out first.

    A recursive descent over the table, to check the compiled expression and to accept prefixes.
    """
    found: set[int] = set()
    for alternative in grammar.ALTERNATIVES[symbol]:
        at = {start}
        for i, piece in enumerate(pieces(alternative)):
            leads = capital and i == 0
            reached: set[int] = set()
            for position in at:
                if position < 0:
                    continue
                if piece.startswith("{"):
                    name = piece.strip("{^}")
                    reached |= ends(name, text, position, leads or "^" in piece)
                else:
                    literal = piece[0].upper() + piece[1:] if leads else piece
                    rest = text[position:]
                    if rest.startswith(literal):
                        reached.add(position + len(literal))
                    elif literal.startswith(rest):
                        found.add(-1)
            found |= reached & {-1}
            at = reached - {-1}
        found |= at
    return frozenset(found)


def is_of_table(text: str) -> bool:
    return len(text) in ends("review", text, 0)


def is_prefix(text: str) -> bool:
    return bool(ends("review", text, 0) & {-1, len(text)})


@settings(max_examples=60)
@given(SEEDS)
def test_what_is_sampled_is_recognised(seed: int) -> None:
    review = grammar.sample(np.random.default_rng(seed))
    assert grammar.is_grammatical(review)
    assert is_of_table(review)
    assert -1 < grammar.sentiment(review) < 1


@settings(max_examples=60)
@given(SEEDS, st.data())
def test_the_recogniser_agrees_with_a_plain_parser_on_damaged_reviews(
    seed: int, data: st.DataObject
) -> None:
    words = grammar.sample(np.random.default_rng(seed)).split(" ")
    others = grammar.sample(np.random.default_rng(seed + 1)).split(" ")
    at = data.draw(st.integers(0, len(words) - 1))
    damage = data.draw(st.sampled_from(["drop", "double", "replace", "join", "cut"]))
    damaged = " ".join(
        {
            "drop": words[:at] + words[at + 1 :],
            "double": words[: at + 1] + words[at:],
            "replace": [*words[:at], data.draw(st.sampled_from(others)), *words[at + 1 :]],
            "join": words[:at] + others[at:],
            "cut": words[:at],
        }[damage]
    )
    assert grammar.is_grammatical(damaged) == is_of_table(damaged)
    if not grammar.is_grammatical(damaged):
        assert grammar.sentiment(damaged) == grammar.OFF_GRAMMAR


@settings(max_examples=30)
@given(SEEDS)
def test_a_cut_review_is_a_prefix_and_no_review(seed: int) -> None:
    review = grammar.sample(np.random.default_rng(seed))
    cut = review[: len(review) // 2].rstrip(".")
    assert is_prefix(cut)
    assert not grammar.is_grammatical(cut)
    assert not is_prefix(cut + "#")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I loved the music.", 0.8),
        ("The plot was good.", 0.5),
        ("The plot was very good.", 0.5 * 1.35),
        ("The plot was not good at all.", -0.8 * 0.5),
        ("The plot was not very good.", -0.6 * 0.5),
        ("The plot was not silly at all.", 0.8 * 0.45),
        ("The jokes were anything but weak.", 0.9 * 0.5),
        ("The hero is utterly brilliant.", 1.2 * 0.83),
        ("I did not enjoy the lighting at all.", -0.9 * 0.6),
        ("It was a truly dreadful thriller.", -1.15 * 0.8),
        # agreement: the mean
        ("I loved the music, and the jokes made me smile.", (0.8 + 0.6) / 2),
        ("The pacing bored me. I left before the end.", (-0.6 - 0.7) / 2),
        ("We saw this at home and the plot moved me.", 0.7),
        # contrast: the later opinion weighs more
        ("I loved the music, but the pacing bored me.", 0.3 * 0.8 - 0.7 * 0.6),
        ("I loved the music, yet the pacing bored me.", 0.3 * 0.8 - 0.7 * 0.6),
        ("Although the pacing bored me, I loved the music.", -0.3 * 0.6 + 0.7 * 0.8),
        ("The pacing bored me. Still, I left with a smile.", -0.3 * 0.6 + 0.7 * 0.6),
    ],
)
def test_sentiments_worked_out_by_hand(text: str, expected: float) -> None:
    assert grammar.is_grammatical(text)
    assert grammar.sentiment(text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I loved",
        "I loved the music",
        "i loved the music.",
        "I loved the music. ",
        " I loved the music.",
        "I loved the music.\n",
        "I loved the music. I loved the music.",
        "I loved the music, and I loved the music, and I loved the music.",
        "I loved the music. I had a great time. I had a great time.",
        "The plot was wonderful wonderful wonderful.",
        "wonderful " * 40,
        "The plot are good.",
        "The end of the world.",
    ],
)
def test_everything_else_scores_lowest(text: str) -> None:
    assert not grammar.is_grammatical(text)
    assert grammar.sentiment(text) == grammar.OFF_GRAMMAR


def test_praise_said_twice_gains_nothing() -> None:
    once = grammar.sentiment("The plot was superb.")
    assert grammar.sentiment("The plot was superb, and the plot was superb.") == once


def test_every_value_times_every_factor_stays_above_the_score_of_text_off_the_grammar() -> None:
    values = [v for words in grammar.OPINION_VALUES.values() for v in words.values()]
    assert all(0 < abs(value) < 1 for value in values)
    factors = grammar.DEGREE_FACTORS
    for value, factor in itertools.chain(
        itertools.product(grammar.OPINION_VALUES["quality"].values(), factors["degree"].values()),
        itertools.product(
            grammar.OPINION_VALUES["extreme"].values(), factors["extreme_degree"].values()
        ),
        itertools.product(grammar.OPINION_VALUES["feeling"].values(), factors["really"].values()),
    ):
        assert -1 < value * factor < 1


def test_a_word_means_the_same_wherever_it_stands() -> None:
    for tables in (grammar.OPINION_VALUES, grammar.DEGREE_FACTORS):
        meanings: dict[str, set[float]] = {}
        for words in tables.values():
            for word, number in words.items():
                meanings.setdefault(word, set()).add(number)
        assert {word for word, numbers in meanings.items() if len(numbers) > 1} == set()


def test_every_symbol_is_used_and_defined() -> None:
    used = {
        name
        for alternatives in grammar.ALTERNATIVES.values()
        for alternative in alternatives
        for name in re.findall(r"\{\^?(\w+)\}", alternative)
    }
    assert used | {"review"} == set(grammar.ALTERNATIVES)


def test_sentiments_are_balanced_spread_and_diverse() -> None:
    rng = np.random.default_rng(0)
    reviews = [grammar.sample(rng) for _ in range(4000)]
    gold = np.array([grammar.sentiment(review) for review in reviews])
    assert abs(gold.mean()) < 0.06
    assert 0.4 < gold.std() < 0.6
    assert np.mean(np.abs(gold) > 0.6) > 0.15
    words = np.array([len(review.split()) for review in reviews])
    assert words.max() <= 26
    assert 10 < np.median(words) < 18
    assert len(set(reviews)) > 0.97 * len(reviews)


def test_the_entropy_is_that_of_the_samples() -> None:
    """A small symbol's exact entropy, against the one that counted samples estimate."""
    rng = np.random.default_rng(0)
    drawn = Counter(grammar._expand("film_praise", rng) for _ in range(40_000))
    shares = np.array(list(drawn.values())) / drawn.total()
    plug_in = -(shares * np.log(shares)).sum() + (len(shares) - 1) / (2 * drawn.total())
    assert grammar.entropy("film_praise") == pytest.approx(plug_in, abs=0.01)
    assert np.exp(grammar.entropy()) > 1e7  # reviews, were they equally probable


@pytest.mark.parametrize("path", [pocket.TRAIN_PROMPTS, pocket.HELDOUT_PROMPTS])
def test_every_shipped_prompt_begins_a_review(path: Path) -> None:
    for line in path.read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        assert is_prefix(prompt + " "), prompt
