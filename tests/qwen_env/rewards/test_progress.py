import sys

import pytest

from qwen_env.rewards import progress, score
from qwen_env.rewards.http import HTTPReward
from qwen_env.rewards.huggingface import HuggingFaceReward
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


def test_rewards_that_may_take_time_show_it(monkeypatch, capsys, make_batch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    batch = make_batch(["a", "bb", "ccc"])
    server = HTTPReward("http://127.0.0.1:9", batch_size=2)
    monkeypatch.setattr(
        server,
        "_post",
        lambda body: b'{"rewards": [1, 1]}' if b"bb" in body else b'{"rewards": [1]}',
    )
    model = HuggingFaceReward.__new__(HuggingFaceReward)
    model.batch_size = 2
    model._encode = lambda batch, row: [row]
    model._forward = lambda rows: [1.0] * len(rows)
    for reward, name in ((server, "reward server"), (model, "scoring")):
        assert list(score(reward, batch).values) == [1, 1, 1]
        assert f"{name}: 1/2 batches" in capsys.readouterr().err
