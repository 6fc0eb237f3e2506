import sys

import pytest

from qwen_env.rewards import progress
from qwen_env.rewards.progress import with_progress


@pytest.mark.parametrize(("is_terminal", "quiet_seconds"), [(True, 60.0), (False, -1.0)])
def test_it_is_silent_when_fast_or_when_nobody_watches(
    monkeypatch, capsys, is_terminal, quiet_seconds
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(progress, "QUIET_SECONDS", quiet_seconds)
    assert list(with_progress([1, 2], "scoring")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_it_counts_and_cleans_up(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    assert list(with_progress([1, 2], "scoring")) == [1, 2]
    assert capsys.readouterr().err == "\rscoring: 0/2 batches\rscoring: 1/2 batches\r\033[K"
