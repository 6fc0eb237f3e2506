"""PPO as a PyTorch user would write it from the papers, in float64: what whole iterations of this
project are compared with.

It shares the settings with `ppo_jax` and nothing that computes. It is not fast: rewards and
advantages are loops over tokens.

Shapes: B batch, M minibatch, P prompt limit, T response limit, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from ppo_jax.config import OptimizerConfig, PPOConfig
from qwen_env.mdp import Rules

Tensors = dict[str, torch.Tensor]


class TorchPPO:
    """A policy, its reference, a value function and AdamW.

    Args:
        folder: the network at the start, as `ppo_jax` saves it; a separate critic starts as the
            policy.
        num_iterations: over which the learning rate is scheduled.
    """

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        ppo: PPOConfig,
        optimizer: OptimizerConfig,
        num_iterations: int,
    ):
        self.rules, self.ppo, self.optimizer = rules, ppo, optimizer
        self.num_iterations = num_iterations
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.reference = copy.deepcopy(self.model)
        is_separate = ppo.critic == "separate"
        self.critic = copy.deepcopy(self.model.model) if is_separate else None
        self.parameters: Tensors = dict(self.model.named_parameters())
        for name, x in parameters_in(folder).items():
            if name.startswith("value_head"):
                self.parameters[name] = torch.nn.Parameter(x.double())
        if self.critic is not None:
            named = self.critic.named_parameters()
            self.parameters |= {f"critic.{name}": x for name, x in named}
        self.mu = {name: torch.zeros_like(x) for name, x in self.parameters.items()}
        self.nu = {name: torch.zeros_like(x) for name, x in self.parameters.items()}
        self.num_steps = dict.fromkeys(self.parameters, 0)  # that each parameter has learnt by
        self.num_iterations_done = 0
        self.kl_coef = ppo.kl_coef
        self.scores: list[float] = []
        self.stop_margin = math.inf  # how near a KL came to target_kl: rounding may decide there

    def iteration(
        self, episodes: Tensors, scores: np.ndarray, orders: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Learn from `episodes`; `orders` has the rows of each minibatch of each epoch."""
        batch, metrics = self.prepare(episodes, torch.tensor(np.float64(scores)))
        metrics |= self.update(batch, orders)
        if (decay := self.ppo.ref_ema_decay) is not None:
            for old, new in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                old.data = decay * old.data + (1 - decay) * new.data
        self.num_iterations_done += 1
        return metrics

    @torch.no_grad()
    def prepare(self, episodes: Tensors, score: torch.Tensor) -> tuple[Tensors, dict[str, float]]:
        """The batch to learn from, and what to say of it; adapts the KL coefficient."""
        ppo = self.ppo
        written = episodes["length"] - episodes["prompt_length"]
        mask = torch.arange(self.rules.max_new_tokens) < written[:, None]
        old, entropy, values, last_value = self._outputs(self.model, episodes)
        # The policy is what is sampled from, truncated or not; the reference is never truncated.
        untruncated = {name: x for name, x in episodes.items() if name != "sampling_mask"}
        ref_logprobs = self._outputs(self.reference, untruncated)[0]
        log_ratio = torch.where(mask, old - ref_logprobs, 0.0)
        penalty = {
            "k1": log_ratio,
            "k2": log_ratio**2 / 2,
            "k3": torch.exp(-log_ratio.clamp(min=-10)) - 1 + log_ratio.clamp(min=-10),
        }[ppo.kl_penalty]
        self.scores += score.tolist()
        if ppo.scale_scores:
            score = score / np.std(self.scores)
        if ppo.score_clip is not None:
            score = score.clamp(-ppo.score_clip, ppo.score_clip)
        goes_on = episodes["truncated"] & (ppo.length_limit == "bootstrap")
        rewards = -self.kl_coef * penalty
        for row, count in enumerate(written):
            rewards[row, count - 1] += 0.0 if goes_on[row] else score[row]
        reward_sum = rewards.sum(1).mean().item()
        if ppo.whiten_rewards:
            mean = rewards[mask].mean()
            rewards = torch.where(mask, whitened(rewards, mask) + mean, 0.0)
        advantages = torch.zeros_like(rewards)
        for row, count in enumerate(written):
            advantage, next_value = 0.0, last_value[row] if goes_on[row] else 0.0
            for t in reversed(range(count)):
                delta = rewards[row, t] + ppo.gamma * next_value - values[row, t]
                advantage = delta + ppo.gamma * ppo.gae_lambda * advantage
                advantages[row, t], next_value = advantage, values[row, t]
        returns = advantages + values
        kl = log_ratio.sum(1).mean().item()
        unexplained = (returns - values)[mask].var(correction=0)
        variance = returns[mask].var(correction=0)
        is_constant = variance < 1e-12 * (returns[mask] ** 2 + values[mask] ** 2).mean()
        metrics = {
            "objective/reward": reward_sum,
            "objective/kl": kl,
            "objective/kl_coef": self.kl_coef,
            "policy/entropy": entropy[mask].mean().item(),
            "value/mean": values[mask].mean().item(),
            "objective/kl_clamped_fraction": (
                (log_ratio[mask] < -10).double().mean().item() if ppo.kl_penalty == "k3" else 0.0
            ),
            "value/explained_variance": (
                math.nan if is_constant else (1 - unexplained / variance).item()
            ),
        }
        if ppo.whitening == "batch":
            advantages = whitened(advantages, mask)
        if ppo.kl_target is not None:
            error = np.clip(kl / ppo.kl_target - 1, -0.2, 0.2)
            self.kl_coef *= 1 + error * len(score) / ppo.kl_horizon
        batch = {"mask": mask, "logprobs": old, "values": values}
        return episodes | batch | {"advantages": advantages, "returns": returns}, metrics

    def update(self, batch: Tensors, orders: Sequence[np.ndarray]) -> dict[str, float]:
        """One step a minibatch, until the KL early stop; means of what the minibatches said."""
        ppo, said, epoch_kls, num_applied, stops = self.ppo, [], [], 0, False
        for number, rows in enumerate(orders):
            taken = torch.tensor(np.asarray(rows))
            loss, metrics, stop_kl = self._loss({name: x[taken] for name, x in batch.items()})
            gradients, norm = self._gradients(loss)
            said.append(metrics | {"policy/grad_norm": norm})
            epoch_kls = [stop_kl] if number % ppo.num_minibatches == 0 else [*epoch_kls, stop_kl]
            kl, is_asked = stop_kl, True
            if ppo.target_kl_grain == "epoch":
                kl, is_asked = np.mean(epoch_kls), len(epoch_kls) == ppo.num_minibatches
            if ppo.target_kl is not None and is_asked:
                self.stop_margin = min(self.stop_margin, abs(kl - ppo.target_kl))
                stops = kl > ppo.target_kl
            if not (stops and ppo.target_kl_grain == "minibatch"):
                self._step(gradients, norm)
                num_applied += 1
            if stops:
                break
        is_cut_short = stops and (ppo.target_kl_grain == "minibatch" or len(said) < len(orders))
        return {name: float(np.mean([x[name] for x in said])) for name in said[0]} | {
            "policy/learning_rate": self._learning_rate(),
            "update/epochs": num_applied / ppo.num_minibatches,
            "update/early_stopped": float(is_cut_short),
        }

    def _outputs(self, model: Any, episodes: Tensors) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies and values [M, T] of the responses, the last values [M]."""
        tokens, length = episodes["tokens"].long(), episodes["length"].long()
        rows, steps = torch.arange(len(tokens)), torch.arange(self.rules.max_new_tokens)
        at = (episodes["prompt_length"].long()[:, None] + steps).clamp(max=tokens.shape[1] - 1)
        places = rows[:, None], at - 1
        attention_mask = (torch.arange(tokens.shape[1]) < length[:, None]).long()
        hidden = model.model(tokens, attention_mask=attention_mask).last_hidden_state
        allowed = torch.ones(*at.shape, self.rules.vocab_size, dtype=torch.bool)
        allowed[..., list(self.rules.forbidden_token_ids)] = False
        eos = torch.zeros(self.rules.vocab_size, dtype=torch.bool)
        eos[list(self.rules.eos_token_ids)] = True
        allowed &= ~(eos & (steps < self.rules.min_new_tokens)[:, None])
        if "sampling_mask" in episodes:
            allowed &= episodes["sampling_mask"]
        logits = model.lm_head(hidden[places]) / self.ppo.temperature
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(~allowed, 0.0)).sum(-1)
        logprobs = log_p.gather(-1, tokens[rows[:, None], at][..., None])[..., 0]
        if self.critic is not None:
            hidden = self.critic(tokens, attention_mask=attention_mask).last_hidden_state
        if self.ppo.critic == "stopped":
            hidden = hidden.detach()
        weight, bias = (self.parameters[f"value_head.{name}"] for name in ("weight", "bias"))
        values = hidden @ weight[0] + bias
        return logprobs, entropy, values[places], values[rows, length - 1]

    def _loss(self, batch: Tensors) -> tuple[torch.Tensor, dict[str, float], float]:
        """The loss of a minibatch, what to say of it, and the KL that may stop the updates."""
        ppo, mask = self.ppo, batch["mask"]
        new, entropy, values, _ = self._outputs(self.model, batch)
        if ppo.loss_aggregation == "token":
            weights = mask / mask.sum()
        else:
            weights = mask / mask.sum(1, keepdim=True) / len(mask)

        def mean(x: torch.Tensor) -> torch.Tensor:
            return (weights[mask] * x[mask]).sum()

        advantages, returns, old_values = (
            batch[name] for name in ("advantages", "returns", "values")
        )
        if ppo.whitening == "minibatch":
            advantages = whitened(advantages, mask)
        log_ratio = torch.where(mask, new - batch["logprobs"], 0.0)
        ratio = log_ratio.clamp(-20, 20).exp()
        high = ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high
        clipped = ratio.clamp(1 - ppo.clip_range, 1 + high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        if ppo.dual_clip is not None:
            bounded = torch.maximum(surrogate, ppo.dual_clip * advantages)
            surrogate = torch.where(advantages < 0, bounded, surrogate)
        policy_loss = -mean(surrogate)
        error = (values - returns) ** 2
        if ppo.value_clip_range is not None:
            change = (values - old_values).clamp(-ppo.value_clip_range, ppo.value_clip_range)
            error = torch.maximum(error, (old_values + change - returns) ** 2)
        value_loss = mean(error)
        loss = policy_loss + ppo.value_coef * value_loss - ppo.entropy_coef * mean(entropy)
        kls = {
            "k1": mean(-log_ratio).item(),
            "k2": mean(log_ratio**2 / 2).item(),
            "k3": mean(ratio - 1 - log_ratio).item(),
            "reference": mean(-log_ratio * ratio).item(),
        }
        metrics = {
            "policy/loss": policy_loss.item(),
            "policy/clip_fraction": mean((ratio != clipped).double()).item(),
            "policy/clip_active_fraction": mean((surrogate != ratio * advantages).double()).item(),
            "policy/clamped_fraction": mean((log_ratio.abs() > 20).double()).item(),
            "policy/approx_kl": kls["k3"],
            "value/loss": value_loss.item(),
        }
        return loss, metrics, kls[ppo.target_kl_estimator]

    def _gradients(self, loss: torch.Tensor) -> tuple[Tensors, float]:
        """Of the parameters that learn, and their norm."""
        gradients = torch.autograd.grad(
            loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True
        )
        named = {
            name: gradient
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if self._learns(name)
        }
        return named, math.sqrt(sum((x**2).sum().item() for x in named.values()))

    def _learns(self, name: str) -> bool:
        if _is_critic(name):
            return True
        frozen = [f"model.layers.{i}." for i in range(self.optimizer.num_frozen_layers)]
        frozen += ["model.embed_tokens"] * self.optimizer.freeze_embeddings
        in_warmup = self.num_iterations_done < self.optimizer.critic_warmup_iterations
        return not (in_warmup or name.startswith(tuple(frozen)))

    def _step(self, gradients: Tensors, norm: float) -> None:
        """AdamW on clipped gradients."""
        config = self.optimizer
        b1, b2 = config.adam_b1, config.adam_b2
        clip = 1.0 if norm <= config.max_grad_norm else config.max_grad_norm / norm
        for name, gradient in gradients.items():
            self.num_steps[name] += 1
            x, clipped = self.parameters[name], clip * gradient
            self.mu[name] = b1 * self.mu[name] + (1 - b1) * clipped
            self.nu[name] = b2 * self.nu[name] + (1 - b2) * clipped**2
            mu = self.mu[name] / (1 - b1 ** self.num_steps[name])
            nu = self.nu[name] / (1 - b2 ** self.num_steps[name])
            step = mu / (nu.sqrt() + config.adam_eps)
            if "norm" not in name and "bias" not in name:
                step = step + config.weight_decay * x.data
            rate = self._learning_rate()
            if _is_critic(name) and config.critic_learning_rate is not None:
                rate *= config.critic_learning_rate / config.learning_rate
            x.data -= rate * step

    def _learning_rate(self) -> float:
        config = self.optimizer
        done = self.num_iterations_done - config.critic_warmup_iterations
        length = self.num_iterations - config.critic_warmup_iterations - config.warmup_iterations
        if done < 0:
            return config.learning_rate
        if done < config.warmup_iterations:
            return config.learning_rate * (done + 1) / config.warmup_iterations
        part = (done - config.warmup_iterations) / length
        left = {"constant": 1, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}
        return config.learning_rate * left[config.schedule]


def whitened(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """To mean 0 and variance 1 where `mask` holds."""
    real = x[mask]
    return torch.where(mask, (x - real.mean()) / (real.var(correction=0) + 1e-8).sqrt(), 0.0)


def parameters_in(folder: Path) -> Tensors:
    """Those of a saved network, by the names that they have in `TorchPPO.parameters`."""
    named = load_file(folder / "model.safetensors")
    head = load_file(folder / "critic" / "value_head.safetensors")
    named |= {f"value_head.{name}": x for name, x in head.items()}
    if (critic := folder / "critic" / "model.safetensors").exists():
        named |= {name.replace("model.", "critic.", 1): x for name, x in load_file(critic).items()}
    return named


def as_tensors(arrays: NamedTuple, sampling_mask: np.ndarray | None, vocab_size: int) -> Tensors:
    """The arrays of a rollout's state or of a batch, and the ids that its tokens were drawn from.

    Args:
        sampling_mask: uint8 [B, T, V/8], eight ids a byte.
    """
    named = {name: np.asarray(x) for name, x in arrays._asdict().items() if x is not None}
    if sampling_mask is not None:
        named["sampling_mask"] = np.unpackbits(sampling_mask, axis=-1, count=vocab_size).astype(
            bool
        )
    return {name: torch.tensor(x) for name, x in named.items()}


def _is_critic(name: str) -> bool:
    return name.startswith(("value_head", "critic"))
