"""The one exception for a mistake that the user can fix."""


class UsageError(ValueError):
    """A wrong input: its message names the thing, the place and the way out.

    Entry points print the message on stderr and exit with status 2, without a traceback. It is a
    `ValueError`, so library users need not know about it.
    """
