"""When updates are not finite: each is skipped, and too many in a row end a run."""

from typing import Any, Protocol

from qwen_env.errors import RunError


class TooManyNonfiniteUpdates(RunError):
    """Loss or gradient was not finite too many times in a row, and nothing was learnt from them."""


class _Counts(Protocol):
    @property
    def iteration(self) -> Any: ...

    @property
    def nonfinite_in_a_row(self) -> Any: ...


def check_finite(state: _Counts, limit: int, suspects: str) -> None:
    """Check how many of a training state's last updates were not finite.

    Args:
        limit: see `AdamWConfig.max_nonfinite_updates`.
        suspects: where to look for the cause.

    Raises:
        TooManyNonfiniteUpdates: `limit` or more in a row.
    """
    if (in_a_row := int(state.nonfinite_in_a_row)) >= limit:
        raise TooManyNonfiniteUpdates(
            f"The loss or its gradient was not finite in {in_a_row} updates in a row, up to "
            f"iteration {int(state.iteration)}; look at the {suspects}, or start another run with "
            "a lower learning_rate."
        )
