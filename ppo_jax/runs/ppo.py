"""PPO as what a run trains: an agent, and the prompts that are held out for its evaluations."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ppo_jax import hosts
from ppo_jax.agent import PPOAgent
from ppo_jax.generation.episode_metrics import (
    evaluation_means,
    gold_spread,
    length_counts,
    sample_record,
)
from ppo_jax.models import Generation, save_pretrained
from ppo_jax.runs.checksums import digest
from ppo_jax.runs.distributions import distributions_record
from ppo_jax.runs.progress import Progress
from ppo_jax.runs.records import Record
from ppo_jax.runs.run import NUM_SAMPLES, Evaluation, Source
from qwen_env.prompts import PromptDataset

ALIKE = 3  # iterations in a row in which all scores are alike, before that is said


class PPOTrainer:
    """A `ppo_jax.runs.run.Trainer`.

    Args:
        agent: trained to its `num_iterations`, from its present state if nothing was saved.
        held_out: prompts; `eval_size` of them are answered at every evaluation.
    """

    title = "PPO"

    def __init__(self, agent: PPOAgent, held_out: PromptDataset):
        self.agent, task = agent, agent.config.task
        self.eval_prompts = held_out[: agent.config.run.eval_size]
        self.config, self.num_iterations = agent.config, agent.num_iterations
        self.model, self.model_digest = task.model, digest(agent.initial_backbone)
        self.training = Source(
            "prompts", task.task or task.prompts, prompts_digest(agent.task.prompts)
        )
        self.held_out = Source(
            "held-out prompts",
            task.eval_prompts or task.task or task.prompts,
            prompts_digest(held_out),
        )
        self._num_alike, self._told_alike = 0, False  # iterations in a row whose scores are alike

    @property
    def state(self) -> Any:
        return self.agent.state

    @state.setter
    def state(self, state: Any) -> None:
        self.agent.state = state

    def learn(self) -> Iterator[dict[str, Record]]:
        for experience, metrics in self.agent.learn():
            agent = self.agent
            lengths = length_counts(experience, agent.task.rules.max_new_tokens)
            distributions = agent.distributions | {"length": lengths}
            yield {
                "metrics": metrics | gold_spread(experience),
                "distributions": distributions_record(agent.iteration, distributions),
                **({} if agent.tokens is None else {"tokens": agent.tokens}),
            }

    def evaluate(self, progress: Progress) -> Evaluation:
        """A greedy and a sampled pass over the held-out prompts."""
        iteration = self.agent.iteration
        means: dict[str, float] = {"num_prompts": len(self.eval_prompts)}
        samples: list[Record] = []
        for decoding in ("greedy", "sampled"):
            episodes, outcomes = self.agent.evaluate(
                self.eval_prompts,
                greedy=decoding == "greedy",
                on_batch=partial(progress.evaluating, decoding, len(self.eval_prompts)),
            )
            scored = evaluation_means(outcomes)
            means |= {f"{decoding}/{name}": mean for name, mean in scored.items()}
            samples += [
                {"iteration": iteration, "decoding": decoding, **sample_record(episode, outcome)}
                for episode, outcome in zip(episodes[:NUM_SAMPLES], outcomes, strict=False)
            ]
        return Evaluation(means, samples, score=means["sampled/score"])

    def remark(self, metrics: Record) -> str | None:
        """That all scores are alike, once."""
        score, spread = metrics["objective/score"], metrics["objective/score_std"]
        self._num_alike = self._num_alike + 1 if spread <= 1e-6 * abs(score) else 0
        if self._num_alike < ALIKE or self._told_alike:
            return None
        self._told_alike = True
        return (
            f"All responses of {ALIKE} iterations in a row scored {score:g}, and PPO learns "
            "only from differences. See samples.jsonl for what was written, and whether the "
            "reward is right; if it is, try easier prompts, a reward with more steps, a larger "
            "batch_size or a higher temperature."
        )

    def save(self, folder: Path) -> None:
        config, task = self.agent.config, self.agent.task
        generation = Generation(*config.ppo.sampling, max_new_tokens=task.rules.max_new_tokens)
        network = hosts.whole(self.agent.network)
        hosts.on_first(
            lambda: save_pretrained(
                network,
                folder,
                task.tokenizer,
                generation=generation,
                base_model=config.task.model,
            )
        )


def prompts_digest(prompts: PromptDataset) -> str:
    """A digest of all that a run takes from its prompts: tokens, and the rows that rewards see."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        row = json.dumps(dict(prompt.row), sort_keys=True, default=repr)
        digest.update(f"{prompt.ids.tolist()} {row}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()
