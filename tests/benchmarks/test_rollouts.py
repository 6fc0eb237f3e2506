"""What `benchmarks/rollouts.py` counts, by hand."""

import numpy as np
import rollouts


def counted(**changes: int) -> dict[str, tuple[float, float, float]]:
    work = rollouts.Arguments(rows=4, slots=2, **changes)
    lengths = np.array([3, 1, 2, 4])
    return {
        name: (count["steps"], count["rows_of_steps"], count["prefills"])
        for name, way in rollouts.ways(work).items()
        for count in [rollouts.moved(work, way, lengths)]
    }


def test_steps_and_rows_of_responses_of_3_1_2_and_4_tokens() -> None:
    """The first token of each comes from reading its prompt."""
    always = {
        "batches of 2": (2 + 3, 2 * (2 + 3), 2),
        "batches of 2, shrinking": (2 + 3, (1 + 1) + (2 + 1 + 1), 2),
        "all 4 at once": (3, 3 * 4, 1),
        "all 4 at once, shrinking": (3, 3 + 2 + 1, 1),
    }
    # Two begin together, once both slots are free; or each does, as soon as one is.
    together = {"2 slots, refilled": (5, 10, 2), "2 slots, refilled, then shrinking": (5, 8, 2)}
    alone = {"2 slots, refilled": (4, 8, 4), "2 slots, refilled, then shrinking": (4, 6, 4)}
    assert counted(response_length=4) == always | together
    assert counted(response_length=100) == always | alone


def test_lengths_have_the_mean_that_is_asked_for() -> None:
    work = rollouts.Arguments(rows=4000, response_length=512, mean_response_length=278)
    lengths = rollouts.lengths_by_chance(work)
    assert abs(lengths.mean() - 278) < 10
    assert lengths.min() >= 1 and lengths.max() == 512
