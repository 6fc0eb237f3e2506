"""A small grammar of film reviews that knows how much each review likes its film.

One table says everything: `RULES` are the productions, the `*_VALUES` and `*_FACTORS` tables beside
them the words that carry meaning. `sample` expands the table at random; the recogniser is a regular
expression compiled from the same table (no rule refers back to itself, so the language is
regular), so the two cannot disagree.

The sentiment of an opinion is the value of its word times the factor in front of it ("very",
"not ... at all"). A review's is the mean of its opinions; after a word of contrast ("but",
"although", "still") the later one weighs more, because that is the one the reviewer ends on.
Nothing is summed, so saying more, or saying it twice, gains nothing. Text that is not a
complete review of the grammar scores -1.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

OFF_GRAMMAR = -1.0
"""The sentiment of text outside the grammar, cut-off reviews included: no review scores less."""

CONTRAST_WEIGHTS = (0.3, 0.7)

# ---------------------------------------------------------------- words that carry meaning

OPINION_VALUES: dict[str, dict[str, float]] = {
    "quality": {  # said of a thing or, after "a", of the film: so none starts with a vowel
        "good": 0.5, "decent": 0.35, "fine": 0.3, "strong": 0.5, "memorable": 0.6,
        "clever": 0.55, "charming": 0.6, "lively": 0.5, "fresh": 0.45, "beautiful": 0.65,
        "bad": -0.55, "bland": -0.35, "plain": -0.3, "weak": -0.5, "forgettable": -0.5,
        "silly": -0.45, "clumsy": -0.55, "dull": -0.55, "tired": -0.45, "lifeless": -0.65,
    },
    "extreme": {
        "superb": 0.8, "wonderful": 0.78, "brilliant": 0.83,
        "terrible": -0.83, "dreadful": -0.8, "horrible": -0.78,
    },
    "feeling": {
        "loved": 0.8, "enjoyed": 0.6, "liked": 0.5, "admired": 0.55,
        "hated": -0.8, "disliked": -0.5, "grew tired of": -0.5, "could not stand": -0.7,
    },
    "denied_feeling": {"enjoy": 0.6, "like": 0.5, "care for": 0.45},
    "effect": {
        "moved me": 0.7, "made me smile": 0.6, "won me over": 0.6, "kept me guessing": 0.55,
        "left me cold": -0.55, "let me down": -0.6, "put me to sleep": -0.8, "bored me": -0.6,
    },
    "verdict": {
        "I would happily watch it again": 0.7, "I would recommend it to anyone": 0.75,
        "I left with a smile": 0.6, "it is well worth a look": 0.45, "I had a great time": 0.75,
        "I would not watch it again": -0.5, "I would not recommend it to anyone": -0.75,
        "I left before the end": -0.7, "it is not worth a look": -0.55,
        "I want my money back": -0.8,
    },
}  # fmt: skip
"""Category -> phrase -> value, in (-1, 1)."""

DEGREE_FACTORS: dict[str, dict[str, float]] = {
    "degree": {
        "very": 1.35, "really": 1.2, "quite": 0.85, "rather": 0.8, "fairly": 0.7,
        "not very": -0.6, "anything but": -0.9,
    },
    "plain_degree": {"very": 1.35, "really": 1.2, "rather": 0.8, "fairly": 0.7},
    "extreme_degree": {"truly": 1.15, "simply": 1.1, "utterly": 1.2},
    "not": {"not": -0.8},
    "did_not": {"did not": -0.9},
    "really": {"really": 1.2},
}  # fmt: skip
"""Category -> phrase -> factor on the opinion value that follows."""

CONTRASTS: dict[str, tuple[str, ...]] = {
    "but": ("but", "yet"),
    "although": ("although",),
    "still": ("still",),
}

# ---------------------------------------------------------------- productions

RULES: dict[str, tuple[str, ...]] = {
    "review": (
        "{^opinion}{more}.",
        "{^opening} {opinion}{more}.",
        "{^scene} {opinion}{ending}.",
        "{^although} {opinion}, {opinion}.",
    ),
    "more": ("{ending}", ", and {opinion}", ", {but} {opinion}"),
    "ending": ("", ". {^verdict}", ". {^still}, {verdict}"),
    "opening": (
        "for a {genre},",
        "to my surprise,",
        "all in all,",
        "in the end,",
        "for once,",
        "after all the talk,",
        "on a second viewing,",
        "on the big screen,",
    ),
    "scene": (
        "I watched this with {company} and",
        "I saw this with {company} and",
        "we saw this {occasion} and",
        "we watched this {occasion} and",
    ),
    "company": ("my sister", "my brother", "my parents", "a friend", "two friends"),
    "occasion": (
        "last night",
        "on a rainy Sunday",
        "on a long flight",
        "at home",
        "in a full house",
    ),
    "genre": ("comedy", "thriller", "drama", "western", "musical", "mystery"),
    "movie": ("film", "movie", "{genre}"),
    "opinion": (
        "the {one} {is} {predicate}",
        "the {one} in this {movie} {is} {predicate}",
        "the {many} {are} {predicate}",
        "the {many} in this {movie} {are} {predicate}",
        "I found the {thing} {predicate}",
        "it {film_is} a {film_praise} {movie}",
        "I {feeling} the {thing}",
        "I {really} {feeling} the {thing}",
        "I {did_not} {denied_feeling} the {thing} at all",
        "the {thing} {effect}",
    ),
    "predicate": (
        "{quality}",
        "{degree} {quality}",
        "{not} {quality} at all",
        "{extreme}",
        "{extreme_degree} {extreme}",
    ),
    "thing": ("{one}", "{many}"),
    "one": (
        "plot", "story", "script", "ending", "dialogue", "acting", "cast", "hero", "villain",
        "music", "score", "camera work", "lighting", "pacing", "editing", "first act",
    ),
    "many": ("jokes", "songs", "effects", "characters", "action scenes", "costumes"),
    "is": ("is", "was", "seemed", "felt"),
    "are": ("are", "were", "seemed", "felt"),
    "film_is": ("is", "was", "seemed"),
    "film_praise": (
        "{quality}",
        "{plain_degree} {quality}",
        "{extreme}",
        "truly {extreme}",
    ),
}  # fmt: skip
"""Symbol -> alternatives, each as likely as the next. `{x}` expands x; `{^x}` capitalises it.

Words that carry meaning are not written here: their categories are symbols too (`ALTERNATIVES`).
"""

ALTERNATIVES: dict[str, tuple[str, ...]] = {
    **RULES,
    **{name: tuple(words) for name, words in (OPINION_VALUES | DEGREE_FACTORS).items()},
    **CONTRASTS,
}
"""The whole context-free grammar: the rules and the words."""

# ---------------------------------------------------------------- sampling


def sample(rng: np.random.Generator) -> str:
    """One review of one or two sentences, for example "The music felt rather bland." """
    return _expand("review", rng)


def entropy(symbol: str = "review") -> float:
    """The entropy of what `symbol` writes, in nats: each text has one expansion, so it is exact.

    H(symbol) = log n + 1/n Σ H(symbols of alternative i), i = 1..n.
    """
    alternatives = _PARSED[symbol]
    inner = sum(entropy(name) for parts in alternatives for _, _, name in parts if name)
    return float(np.log(len(alternatives)) + inner / len(alternatives))


_SYMBOL = re.compile(r"\{(\^?)(\w+)\}")


def _parts(alternative: str) -> Iterator[tuple[str, bool, str]]:
    """(literal, False, "") and ("", is capitalised, symbol) in the order of the text."""
    position = 0
    for match in _SYMBOL.finditer(alternative):
        if match.start() > position:
            yield alternative[position : match.start()], False, ""
        yield "", bool(match[1]), match[2]
        position = match.end()
    if position < len(alternative):
        yield alternative[position:], False, ""


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


_PARSED = {
    symbol: tuple(tuple(_parts(alternative)) for alternative in alternatives)
    for symbol, alternatives in ALTERNATIVES.items()
}


def _expand(symbol: str, rng: np.random.Generator) -> str:
    alternatives = _PARSED[symbol]
    text = ""
    for literal, is_capital, name in alternatives[int(rng.random() * len(alternatives))]:
        piece = _expand(name, rng) if name else literal
        text += _capitalise(piece) if is_capital else piece
    return text


# ---------------------------------------------------------------- recognition and meaning


class Meaning(NamedTuple):
    """What a text says, in its order. `start` is where the first opinion or degree word begins."""

    opinions: tuple[float, ...]
    is_contrast: bool
    start: int


def is_grammatical(text: str) -> bool:
    """Whether `sample` can write exactly `text`."""
    return _REVIEW.fullmatch(text) is not None


def sentiment(text: str) -> float:
    """How much `text` likes its film, from -1 to 1; `OFF_GRAMMAR` if it is not a review."""
    if not is_grammatical(text):
        return OFF_GRAMMAR
    said = meaning(text)
    if said.is_contrast:
        return CONTRAST_WEIGHTS[0] * said.opinions[0] + CONTRAST_WEIGHTS[1] * said.opinions[1]
    return sum(said.opinions) / len(said.opinions)


def meaning(text: str) -> Meaning:
    """The words of `text` that carry meaning; it need not be a review."""
    opinions: list[float] = []
    is_contrast = False
    start = len(text)
    factor = 1.0
    for match in _MEANING_WORD.finditer(text):
        word = _lower_initial(match[0])
        if word in _CONTRAST_WORDS:
            is_contrast = True
        else:
            start = min(start, match.start())
            if word in _FACTOR:
                factor *= _FACTOR[word]
            else:
                opinions.append(factor * _VALUE[word])
                factor = 1.0
    return Meaning(tuple(opinions), is_contrast, start)


def _pattern(symbol: str, is_capital: bool = False) -> str:
    """The regular expression of what `symbol` can write."""
    branches = []
    for parts in _PARSED[symbol]:
        branch = ""
        for i, (literal, capitalises, name) in enumerate(parts):
            leads = is_capital and i == 0
            if name:
                branch += _pattern(name, capitalises or leads)
            else:
                branch += re.escape(_capitalise(literal) if leads else literal)
        branches.append(branch)
    return f"(?:{'|'.join(branches)})"


def _lower_initial(text: str) -> str:
    return text if text.startswith("I ") else text[0].lower() + text[1:]


_REVIEW = re.compile(_pattern("review"))

# A word means the same wherever it stands, so that one scan reads the meaning.
_VALUE = {word: value for words in OPINION_VALUES.values() for word, value in words.items()}
_FACTOR = {word: factor for words in DEGREE_FACTORS.values() for word, factor in words.items()}
_CONTRAST_WORDS = frozenset(word for words in CONTRASTS.values() for word in words)
_MEANING_WORD = re.compile(
    r"\b(?:"
    + "|".join(
        re.escape(form)
        for word in sorted({*_VALUE, *_FACTOR, *_CONTRAST_WORDS}, key=len)[::-1]
        for form in dict.fromkeys((word, _capitalise(word)))
    )
    + r")\b"
)
