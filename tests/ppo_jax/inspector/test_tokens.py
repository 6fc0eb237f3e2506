"""What a run keeps of single tokens agrees with its metrics, its texts and its model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ppo_jax.inspector.tokens import NUMBERS, pieces, rows_to_keep, tokens_record
from ppo_jax.learning.batch import TokenNumbers
from ppo_jax.learning.inspection import Look
from qwen_env import pocket
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import Prompt
from qwen_env.tokenizer import load_tokenizer


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def kept(finished_run: Path) -> list[dict[str, Any]]:
    return records(finished_run, "tokens.jsonl")


def test_there_is_a_record_of_the_first_iteration_and_each_evaluation(
    kept: list[dict[str, Any]],
) -> None:
    assert [record["iteration"] for record in kept] == [1, 2, 4, 6]
    for record in kept:
        scores = [episode["score"] for episode in record["episodes"]]
        assert len(scores) == 4, "a batch has no more"
        assert scores == sorted(scores)
        np.testing.assert_allclose(sorted(record["batch"]["score"]), scores, rtol=1e-3)
        for episode in record["episodes"]:
            lengths = {len(episode[x]) for x in (*NUMBERS, "text", "ids", "alternatives")}
            assert lengths == {len(episode["ids"])}
            assert len(episode["prompt"]) == len(episode["prompt_ids"])


def test_the_numbers_come_to_those_of_the_metrics(
    kept: list[dict[str, Any]], finished_run: Path
) -> None:
    """All four episodes of a batch are kept, so that means over them are those of the batch."""
    metrics = {line["iteration"]: line for line in records(finished_run, "metrics.jsonl")}
    for record in kept:
        line, episodes = metrics[record["iteration"]], record["episodes"]
        flat = {name: np.concatenate([e[name] for e in episodes]) for name in NUMBERS}
        near = {"rel": 2e-3, "abs": 1e-4}
        assert flat["kl"].sum() / 4 == pytest.approx(line["objective/kl"], **near)
        assert np.mean(record["batch"]["kl"]) == pytest.approx(line["objective/kl"], **near)
        assert flat["entropy"].mean() == pytest.approx(line["policy/entropy"], **near)
        assert flat["value"].mean() == pytest.approx(line["value/mean"], **near)
        assert flat["reward"].sum() / 4 == pytest.approx(line["objective/reward"], **near)
        assert flat["advantage"].mean() == pytest.approx(0, abs=1e-3), "whitened"
        assert np.mean(record["batch"]["length"]) == line["rollout/length_mean"]
        assert abs(flat["ratio"] - 1).max() > 1e-3, "the policy has learnt"


def test_texts_and_alternatives(kept: list[dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    for record in kept:
        for episode in record["episodes"]:
            assert "".join(episode["prompt"]) == tokenizer.decode(episode["prompt_ids"], False)
            assert "".join(episode["text"]) == tokenizer.decode(episode["ids"], False)
            for i, likely in enumerate(episode["alternatives"]):
                logprobs = [logprob for _, logprob in likely]
                assert len(likely) == 5
                assert logprobs == sorted(logprobs, reverse=True)
                assert np.exp(logprobs).sum() < 1.001
                if "�" in episode["text"][i]:
                    continue  # it is the text of many tokens
                if episode["text"][i] in dict(likely):
                    found = dict(likely)[episode["text"][i]]
                    assert found == pytest.approx(episode["logprob"][i], rel=2e-3, abs=1e-4)
                else:
                    assert episode["logprob"][i] <= logprobs[-1] + 1e-4


def test_the_ratio_leads_to_the_trained_model(
    kept: list[dict[str, Any]], finished_run: Path
) -> None:
    """final/ is the policy after the last update: transformers gives its log-probabilities."""
    model = transformers.AutoModelForCausalLM.from_pretrained(finished_run / "final")
    for episode in kept[-1]["episodes"]:
        prompt, ids = episode["prompt_ids"], episode["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        theirs = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]
        ours = np.array(episode["logprob"]) + np.log(episode["ratio"])
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [2]), (2, [2, 1]), (3, [2, 4, 1]), (9, [2, 0, 4, 3, 1])]
)
def test_rows_from_the_lowest_score_to_the_highest(count: int, expected: list[int]) -> None:
    scores = np.array([1, 9, -3, 4, 2], np.float32)
    assert rows_to_keep(scores, count).tolist() == expected


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    ids = tokenizer.encode("a 世é<|endoftext|>")
    texts = pieces(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, False)
    assert "" in texts, "one of them is a part"
    assert texts[-1] == "<|endoftext|>"
    assert pieces(tokenizer, ids[:3])[-1].endswith("�"), "cut off within a character"


def test_replies_are_told_apart() -> None:
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    ids = np.array(tokenizer.encode("The plot was"), np.int32)
    own = np.array([True, *[False] * (len(ids) - 2), True])
    prompt = Prompt("A", np.array(tokenizer.encode("A"), np.int32), {}, 0)
    episode = Episode(prompt, ids, "done", own)
    info = {"reward_components": {}, "completion_length": 2}
    zeros = np.zeros((1, len(ids)), np.float32)
    looks = [Look(zeros, np.zeros((1, len(ids), 5), int), np.zeros((1, len(ids), 5)))] * 2
    record = tokens_record(
        3,
        tokenizer,
        np.array([0]),
        [episode],
        [Outcome(1.0, info)],
        (TokenNumbers(*[zeros] * 6), *looks),
    )
    [kept] = record["episodes"]
    assert kept["own"] == own.astype(int).tolist()
    assert "".join(kept["text"]) == "The plot was"
    assert record["batch"]["length"] == [2], "of the tokens that the policy chose"
