"""Errors that a user can act on.

The message of each is one sentence that names the thing, the place and the way out. Entry points
print it on stderr and exit with status 2, without a traceback.
"""

_LONGEST_REASON = 300


class UserFacingError(Exception):
    """What all of them have in common; raised only as one of the kinds below."""


class UsageError(UserFacingError, ValueError):
    """A wrong input: an argument, a setting or a file. A `ValueError` to those who look for one."""


class RewardError(UserFacingError, RuntimeError):
    """A reward function raised, or returned something that cannot be a reward."""


class InteractionError(UserFacingError, RuntimeError):
    """An interaction raised, took too long, or returned something that cannot be a reply."""


class RunError(UserFacingError, RuntimeError):
    """A run that cannot go on, whatever its settings: a full disk, damage, updates that diverge."""


def reason(error: BaseException) -> str:
    """What another package's error says, to go into a sentence: short, in one line."""
    text = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0]
    text = text.rstrip(".:") or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
