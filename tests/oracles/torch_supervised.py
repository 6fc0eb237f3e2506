"""Supervised fine-tuning and reward models as a PyTorch user would write them, in float64.

It reads what `ppo_jax` saves, with transformers, and shares nothing that computes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers


class Result(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]  # by Hugging Face name


def fine_tuning(folder: Path, texts: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Result:
    """Cross-entropy of what is learnt of each text, ids beside flags, over all texts together."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, is_learnt in texts:  # one at a time: nothing is padded
        logits = model(torch.tensor([list(ids)])).logits[0]
        labels = torch.tensor(
            [i if learnt else -100 for i, learnt in zip(ids, is_learnt, strict=True)]
        )
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
        )
        count += int((labels[1:] != -100).sum())
    return _result(model, total / count)


def preferences(
    folder: Path,
    pairs: Sequence[tuple[Sequence[int], Sequence[int], float]],
    centring_coef: float,
) -> Result:
    """Bradley and Terry's loss of pairs: the chosen text, the rejected one, the margin."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64
    )
    losses = []
    for chosen, rejected, margin in pairs:
        better, worse = (_score(model, ids) for ids in (chosen, rejected))
        loss = -torch.log(torch.sigmoid(better - worse - margin))
        losses.append(loss + centring_coef * (better + worse) ** 2)
    return _result(model, torch.stack(losses).mean())


def scores(folder: Path, texts: Sequence[Sequence[int]]) -> list[float]:
    """What transformers' own class says of texts, in float32."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        return [float(_score(model, ids)) for ids in texts]


def _score(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    model.config.pad_token_id = next(i for i in range(2) if i != ids[-1])
    score: torch.Tensor = model(torch.tensor([list(ids)])).logits[0, 0]
    return score


def _result(model: torch.nn.Module, loss: torch.Tensor) -> Result:
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Result(loss.item(), gradients)
