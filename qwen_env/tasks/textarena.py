"""Games of the package `textarena`, for one player: each turn of the policy is a move.

A row's prompt is how the game begins that its `game_seed` makes: the rules, and what there is to
see. A reply is what the game shows after a move. The score is what the game itself pays at its end,
1 for one that was won; one that was not played to its end is worth 0.

What a game has come to depends on its seed and the moves alone: it is played again from there, and
what has been played is kept for a while, since it costs time and not truth. A move on which the
package fails, as some of its games do on odd ones, ends the game and is worth 0; the component
`game_error` says how often.
"""

import contextlib
import copy
import io
import math
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qwen_env.arguments import integer
from qwen_env.errors import InteractionError, RewardError, UsageError
from qwen_env.extras import import_extra
from qwen_env.interaction import Reply, TurnBatch, turn_name
from qwen_env.rewards.base import RewardBatch, describe, is_ctrl_c, row_name
from qwen_env.tasks.base import NamedTask, perhaps
from qwen_env.tasks.options import parsed
from qwen_env.watchdog import watched

_SEEDS = 2**32
_HELD_OUT = 2**31  # between the seed of the games to train on and that of the held-out ones
_OWN_OPTIONS: Mapping[str, Any] = {"size": int, "held_out_size": int, "seed": int}
_KEPT = 512  # games as they stand, so that a batch's are not played again at every turn
_LONGEST_REPLY = 4000  # characters


class _Played(NamedTuple):
    """What a game has come to."""

    env: Any  # of the package; never stepped, but copies of it
    chances: Any  # of its generators
    said: str  # since the last move
    pays: float | None = None  # None: it goes on
    failed: bool = False


class Game:
    """The interaction and the reward of a game.

    Args:
        game: its id in `textarena`, such as "GuessTheNumber-v0".
        options: of the game itself.

    Raises:
        UsageError: no such game, an option that it does not take (near names are named), or one
            that a single player cannot begin here.
        gymnasium.error.DependencyNotInstalled: `textarena` is missing.
    """

    def __init__(self, game: str, options: Mapping[str, Any]):
        hints = _hints(game)
        known = [*hints, *_OWN_OPTIONS]
        for option in options:
            if option not in hints:
                raise UsageError(
                    f"textarena:{game} has no option {option!r}; {perhaps(option, known)}it takes "
                    f"{', '.join(known)}."
                )
        self.__qualname__ = f"textarena:{game}"  # the name in messages
        self._game, self._options = game, dict(options)
        self._played = lru_cache(maxsize=_KEPT)(self._play)
        try:
            first = self._played(0, ())
            self.max_turns = _most_turns(first.env)
        except BaseException as error:  # of the game, and of what it needs and finds missing
            if is_ctrl_c(error) or isinstance(error, UsageError):
                raise
            raise UsageError(
                f"textarena:{game} cannot be begun by one player ({describe(error)}); name another "
                "game, such as 'textarena:GuessTheNumber-v0'."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Game, (self._game, self._options)  # without what has been played

    def opening(self, seed: int) -> str:
        """How the game of that seed begins."""
        return self._played(seed, ()).said

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """What the game shows after each turn's move."""
        replies = []
        for turn in batch:
            if (moves := _moves(turn.row, turn.messages)) is None:
                raise InteractionError(
                    f"{turn_name(turn)} has no 'game_seed' there, so {self.__qualname__} cannot be "
                    "played; leave the prompts to the task."
                )
            played = self._played(*moves)
            replies.append(Reply(text=played.said, done=played.pays is not None))
        return replies

    def __call__(self, batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the games paid, float32 [N]; whether they were won, how many moves were made, and
        whether the package failed.

        Raises:
            RewardError: a row has no game.
        """
        scores, num_moves, failed = np.zeros((3, len(batch)), np.float32)
        for i, (row, messages) in enumerate(zip(batch.rows, batch.messages, strict=True)):
            if (moves := _moves(row, messages)) is None:
                raise RewardError(
                    f"{row_name(batch, i)} has no 'game_seed', so {self.__qualname__} cannot say "
                    "what was won; leave the prompts to the task."
                )
            seed, texts = moves
            if batch.finish_reasons[i] == "length":  # the last turn never became a move
                texts = texts[:-1]
            played = self._played(seed, texts)
            scores[i], num_moves[i], failed[i] = played.pays or 0.0, len(texts), played.failed
        won = (scores >= 1).astype(np.float32)
        return scores, {"accuracy": won, "turns": num_moves, "game_error": failed}

    def _play(self, seed: int, moves: tuple[str, ...]) -> _Played:
        """The game of that seed after these moves."""
        if not moves:
            return self._begun(seed)
        before = self._played(seed, moves[:-1])
        if before.pays is not None:
            return before
        try:
            with _by_itself(before.chances):
                env = copy.deepcopy(before.env)
                is_over, _ = env.step(action=moves[-1])
                return _Played(env, _chances(), _said(env), _paid(env) if is_over else None)
        except BaseException as error:  # whatever it makes of odd moves, and if it never ends
            if is_ctrl_c(error):
                raise
            return _Played(None, None, f"Error: {describe(error)}", pays=0.0, failed=True)

    def _begun(self, seed: int) -> _Played:
        package = _package()
        with _by_itself(_chances()):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (it is the games' generator)
            env = package.make(self._game, **self._options)
            env.reset(num_players=1, seed=seed)
            if not isinstance(_inner(env).state, package.SinglePlayerState):
                raise UsageError(
                    f"textarena:{self._game} is a game of several players; name one of a single "
                    "player, such as 'textarena:GuessTheNumber-v0'."
                )
            return _Played(env, _chances(), _said(env))


def textarena(
    game: str, *, size: int = 256, held_out_size: int = 64, seed: int = 0, **options: Any
) -> NamedTask:
    """The task of playing a game, from `size` beginnings.

    Args:
        game: its id in `textarena`, such as "GuessTheNumber-v0".
        size: the number of games to train on.
        held_out_size: the number of games that are held out.
        seed: decides which games.
        options: the game's own, such as `max_number=50`.

    Raises:
        UsageError: no such game, or a wrong option; see `Game`.
        gymnasium.error.DependencyNotInstalled: `textarena` is missing.
    """
    size = integer("size", size, at_least=1)
    held_out_size = integer("held_out_size", held_out_size, at_least=1)
    if not 0 <= integer("seed", seed) < _SEEDS:
        raise UsageError(f"seed is {seed}; it must be at least 0 and below 2**32.")
    play = Game(game, options)
    rows, held_out = (
        [
            {"prompt": play.opening(number % _SEEDS), "game_seed": number % _SEEDS}
            for number in range(first, first + count)
        ]
        for first, count in ((seed, size), (seed + _HELD_OUT, held_out_size))
    )
    return NamedTask(
        name=f"textarena:{game}",
        prompts=rows,
        held_out=held_out,
        reward=play,
        interaction=play,
        max_turns=play.max_turns,
    )


def textarena_from_text(game: str, options: Mapping[str, str]) -> NamedTask:
    """From the name of a game and options as text, each of the type that the game gives it."""
    hints = {**_hints(game), **_OWN_OPTIONS}
    values = {
        option: parsed(f"{option} of textarena:{game}", text, hints.get(option, str))
        for option, text in options.items()
    }
    return textarena(game, **values)


def _package() -> Any:
    return import_extra("textarena", package="textarena")


def _hints(game: str) -> dict[str, Any]:
    """The types of the options that `game` takes.

    Raises:
        UsageError: there is no such game, or it cannot be imported.
    """
    games = _package().envs.registration.ENV_REGISTRY
    if game not in games:
        way_out = perhaps(game, games) or "its documentation lists them; "
        raise UsageError(
            f"textarena has no game {game!r}; {way_out}name one as in "
            "'textarena:GuessTheNumber-v0'."
        )
    module, _, name = games[game].entry_point.partition(":")
    try:
        with _by_itself(_chances()):
            kind = getattr(import_extra(module, package="textarena"), name)
            hints = typing.get_type_hints(kind.__init__)
    except BaseException as error:  # some games look for data of other packages as they are read
        if is_ctrl_c(error):
            raise
        raise UsageError(
            f"textarena:{game} cannot be imported ({describe(error)}); install what it needs, or "
            "name another game."
        ) from error
    return {option: hint for option, hint in hints.items() if option != "return"}


def _moves(
    row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> tuple[int, tuple[str, ...]] | None:
    """The seed of a game, and what the policy has said in it; None where the row has no seed."""
    if "game_seed" not in row:
        return None
    return int(row["game_seed"]), tuple(m["content"] for m in messages if m["role"] == "assistant")


def _inner(env: Any) -> Any:
    """The game inside of its wrappers."""
    while isinstance(env, _package().Wrapper):
        env = env.env
    return env


def _said(env: Any) -> str:
    """What the game shows since it was last asked, without the move itself. Its wrappers would
    repeat the whole game."""
    _, shown = _inner(env).get_observation()
    own = _package().ObservationType.PLAYER_ACTION
    texts = [str(text) for _, text, kind in shown if kind is not own]
    texts.append(_inner(env).state.game_info[0].get("reason") or "")  # why it is over, if it is
    return "\n".join(texts).strip()[:_LONGEST_REPLY] or "(The game shows nothing.)"


def _paid(env: Any) -> float:
    """What the player got."""
    rewards, _ = env.close()
    pays = float((rewards or {}).get(0) or 0.0)
    return pays if math.isfinite(pays) else 0.0


def _most_turns(env: Any) -> int:
    """Enough for each move that the game counts, and for one before it that it refuses."""
    limit = _inner(env).state.max_turns
    return 2 * (limit + 1) if isinstance(limit, int) else _MANY_TURNS


_MANY_TURNS = 100


def _chances() -> Any:
    """Where Python's and NumPy's own generators stand, from which games draw."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


@contextlib.contextmanager
def _by_itself(chances: Any) -> Iterator[None]:
    """Run a game with these chances, within limits of time and memory, and leave no traces: neither
    in the generators nor on the screen."""
    before, unseen = _chances(), io.StringIO()
    try:
        with watched(), contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            random.setstate(chances[0])
            np.random.set_state(chances[1])  # noqa: NPY002
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
