"""How tokens are drawn, and how PPO learns from them."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from ppo_jax.algorithm import (
    AdvantageEstimator,
    Aggregation,
    Bins,
    ClipSides,
    KlEstimator,
    KlLevel,
    RatioLevel,
)
from ppo_jax.config.fields import (
    Checked,
    Count,
    Decay,
    Factor,
    Finite,
    Limit,
    LimitAboveOne,
    Probability,
    Share,
    Temperature,
)
from ppo_jax.sampling import Sampling
from qwen_env.errors import UsageError


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """How tokens are drawn."""

    temperature: Temperature = 1.0
    """Divide the logits by this before sampling, and in every log-probability."""
    top_k: Count | None = None
    """Sample from the k most probable tokens only."""
    top_p: Probability | None = None
    """Sample from the smallest set of most probable tokens that together have this probability."""

    @property
    def sampling(self) -> Sampling:
        """The same, for compiled functions."""
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class PPOConfig(SamplingConfig):
    """The algorithm."""

    batch_size: Count = 64
    """Episodes per iteration (B)."""
    completions_per_prompt: Count = 1
    """Responses to each prompt; an iteration has batch_size / this many prompts."""

    kl_coef: Factor = 0.05
    """Weight β of the per-token KL penalty against the reference model; where it adapts, its first
    value."""
    kl_penalty: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty in the reward."""
    kl_level: KlLevel = "token"
    """Whether each token pays its own KL penalty, or the last one that of the whole sequence, with
    which the best policy's returns are the same for all answers to a prompt."""
    kl_target: Limit | None = None
    """Adapt kl_coef so that the KL from the reference approaches this, in nats per response; None
    keeps kl_coef constant."""
    kl_horizon: Count | None = None
    """Episodes over which an adaptive kl_coef changes by about a fifth; at least batch_size. None
    makes it what lets kl_coef change tenfold over the run."""
    ref_ema_decay: Decay | None = None
    """Let the reference model follow the policy: after each iteration it keeps this share of
    itself. None keeps it as it was at the start."""
    scale_scores: bool = False
    """Divide scores by the standard deviation of all scores so far."""
    score_clip: Limit | None = None
    """Clip scores (after scaling, if they are scaled) to ± this."""
    whiten_rewards: bool = False
    """Scale the token rewards of a batch to variance 1, keeping their mean."""
    length_limit: Literal["score", "bootstrap"] = "score"
    """What a response that the length limit cut off earns: its score, or the value of its last
    state."""
    advantage: AdvantageEstimator = "gae"
    """What an answer is measured against: the value function, token by token (gae), or, without a
    value function, the other answers to its prompt (group is GRPO's, leave_one_out RLOO's) or all
    answers of the batch (reinforce_plus_plus)."""
    gamma: Share = 1.0
    """Discount γ per token."""
    gae_lambda: Share = 0.95
    """λ of generalized advantage estimation."""
    gae_lambda_alpha: Limit | None = None
    """Make λ of the advantages 1 - 1 / (α l) for a response of l tokens, where this is α, in place
    of gae_lambda; VAPO takes 0.05 for thousands of tokens."""
    critic_gae_lambda: Share | None = None
    """λ of the returns that the value function learns; None makes it that of the advantages."""
    advantage_whitening: Literal["batch", "minibatch", "none"] | None = None
    """Scale advantages to mean 0 and variance 1, over the batch or over each minibatch; None makes
    it batch, or none where a prompt's other answers are the measure."""
    drop_equal_groups: bool = False
    """Learn nothing from a prompt whose answers all earned the same score."""

    num_epochs: Count = 4
    """Passes over the batch per iteration, unless the KL early stop ends them."""
    critic_epochs: Count | None = None
    """Passes of the value function over the batch, which no KL early stop ends; None makes it the
    policy's. More of them cost the critic's pass alone."""
    num_minibatches: Count = 1
    """Optimizer steps per pass."""
    num_microbatches: Count = 1
    """Compute each minibatch in this many parts, to save memory; the result does not change."""
    num_packed_sizes: Count = 1
    """Let short sequences share rows, in programs compiled for this many sizes: with 4, a
    micro-batch that fits into half its rows costs half. Above 1, generation too goes on in fewer
    rows once most have ended. More sizes follow the lengths more closely and compile longer."""
    old_logprobs: Literal["learner", "rollout"] = "learner"
    """Whose log-probabilities the ratio is taken to: the learner's, computed again from the whole
    response, or those that the rollout noted when it drew each token."""
    importance_cap: LimitAboveOne | None = None
    """Weigh each token's advantage by its probability for the learner over that of the rollout, but
    by this at most (truncated importance sampling)."""
    ratio_level: RatioLevel = "token"
    """Take the probability ratio of each token, or GSPO's, one for a whole response."""
    loss_aggregation: Aggregation = "token"
    """What counts equally in the mean loss of a minibatch: every token, or every sequence."""
    clip_range: Limit = 0.2
    """Clip the probability ratio to 1 ± this (ε)."""
    clip_range_high: Limit | None = None
    """Clip the ratio to 1 + this from above; None makes it clip_range."""
    clip_sides: ClipSides = "one"
    """Clip where a token has moved the way its advantage points (one, PPO's), or leave out every
    token whose ratio is out of the range (both, SAO's)."""
    dual_clip: LimitAboveOne | None = None
    """Bound the ratio's weight by this where the advantage is negative; None does not bound it."""
    value_clip_range: Limit | None = None
    """Clip the change of the value to ± this, in units of value; None does not clip."""
    value_coef: Factor = 0.1
    """Weight of the value loss, the mean of (V - G)². It has no factor 1/2: 0.1 here is 0.2 where
    the loss has one."""
    entropy_coef: Factor = 0.0
    """Weight of the entropy bonus."""
    value_loss: Literal["squared", "hl_gauss"] = "squared"
    """Loss of the value function: the squared error, or the cross-entropy of bins that a return is
    spread over (HL-Gauss), whose mean is then the value."""
    value_range: tuple[Finite, Finite] | None = None
    """Least and greatest return that the bins of hl_gauss reach to, such as -5 5; a return beyond
    counts as the end."""
    value_bins: Count = 51
    """Bins of hl_gauss."""
    critic: Literal["shared", "stopped", "separate"] = "shared"
    """Backbone of the value head: the policy's, the policy's without a gradient into it, or one of
    its own."""
    critic_model: str | None = None
    """What a separate critic begins as: a reward model (such as RUN/final of ppo-reward-model), or
    a saved policy, whose critic it takes; None makes it the policy with values of zero."""
    target_kl: Limit | None = None
    """End an iteration's updates once KL(old‖new) exceeds this, in nats per token."""
    target_kl_estimator: KlEstimator = "k3"
    """Estimator of KL(old‖new) for target_kl."""
    target_kl_grain: Literal["minibatch", "epoch"] = "minibatch"
    """Stop before the minibatch that exceeds target_kl, or after the epoch whose mean does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches > self.batch_size:
            raise UsageError(
                f"num_minibatches ({self.num_minibatches}) is larger than batch_size "
                f"({self.batch_size}): a minibatch would have no episode; lower num_minibatches."
            )
        if self.top_k == 1:
            raise UsageError(
                "top_k is 1, so every token is certain and there is no gradient to learn from; "
                "raise top_k, or leave it out."
            )
        self._check_advantage()
        if self.length_limit == "bootstrap":
            for name, meaning in (("gamma", "counts for nothing"), ("value_coef", "is untrained")):
                if getattr(self, name) == 0:
                    raise UsageError(
                        f"length_limit is 'bootstrap', but with {name} 0 the value of the last "
                        f"state {meaning}; raise {name}, or set length_limit to 'score'."
                    )
        if self.target_kl is None:
            self._refuse_set(
                ("target_kl_estimator", "target_kl_grain"),
                "without target_kl nothing stops early; set target_kl",
            )
        if self.kl_coef == 0:
            self._refuse_set(
                ("kl_penalty", "kl_target", "ref_ema_decay"),
                "kl_coef is 0, so the reference model has no influence; raise kl_coef",
            )
        self._check_bins()
        if self.critic_epochs is not None and self.critic == "shared":
            raise UsageError(
                f"critic_epochs is {self.critic_epochs}, but critic is 'shared', whose passes are "
                "the policy's too; set critic to 'separate' or 'stopped', or leave critic_epochs "
                "out."
            )
        if self.critic_model is not None and self.critic != "separate":
            raise UsageError(
                f"critic_model is {self.critic_model!r}, but critic is {self.critic!r}; set critic "
                "to 'separate', or leave critic_model out."
            )
        if self.value_coef == 0 and self.has_value_function:
            self._refuse_set(
                ("critic", "value_clip_range", "value_loss"),
                "value_coef is 0, so the value function never learns; raise value_coef",
            )
        if self.kl_target is None:
            self._refuse_set(
                ("kl_horizon",), "without kl_target kl_coef does not adapt; set kl_target"
            )
        elif self.kl_horizon is not None and self.kl_horizon < self.batch_size:
            raise UsageError(
                f"kl_horizon ({self.kl_horizon}) is below batch_size ({self.batch_size}), so "
                "kl_coef would change by more than a fifth in one iteration; raise kl_horizon."
            )

    def for_run(self, num_iterations: int) -> "PPOConfig":
        """The same with the horizon of an adaptive KL coefficient, for a run of so many iterations.

        Raises:
            UsageError: the horizon is so long that the coefficient would hardly change.
        """
        if self.kl_target is None:
            return self
        episodes = self.batch_size * num_iterations
        tenfold = max(round(0.2 * episodes / math.log(10)), self.batch_size)
        if self.kl_horizon is None:
            return replace(self, kl_horizon=tenfold)
        change = (1 + 0.2 * self.batch_size / self.kl_horizon) ** num_iterations - 1
        if change < 0.1:
            raise UsageError(
                f"kl_horizon is {self.kl_horizon}, with which kl_coef can change by at most "
                f"{100 * change:.0f} % over {num_iterations} iterations of {self.batch_size} "
                f"episodes, too little to reach kl_target {self.kl_target}; leave it out, which "
                f"makes it {tenfold}, for a change of up to ten times, or leave kl_target out."
            )
        return self

    def _check_advantage(self) -> None:
        if not self.has_value_function:
            self._refuse_set(
                (
                    *("gae_lambda", "gae_lambda_alpha", "critic_gae_lambda", "critic"),
                    *("value_coef", "value_clip_range", "value_loss", "length_limit"),
                    *("critic_model", "critic_epochs"),
                ),
                f"advantage is {self.advantage!r}, which has no value function; set it to 'gae'",
            )
        if self.compares_answers:
            self._refuse_set(
                ("gamma", "kl_level"),
                f"advantage is {self.advantage!r}, which compares whole answers",
            )
        if self.completions_per_prompt == 1 and (self.compares_answers or self.drop_equal_groups):
            name = "advantage" if self.compares_answers else "drop_equal_groups"
            raise UsageError(
                f"{name} is {getattr(self, name)!r}, which compares the answers to a prompt, but "
                "completions_per_prompt is 1; raise it."
            )
        if self.gae_lambda_alpha is not None:
            self._refuse_set(
                ("gae_lambda",), "gae_lambda_alpha makes it depend on the length; leave one out"
            )
        if self.clip_sides == "both":
            self._refuse_set(("dual_clip",), "clip_sides is 'both', which leaves nothing to bound")
            if self.old_logprobs != "rollout":
                raise UsageError(
                    "clip_sides is 'both', which is meant for the ratio to what the rollout drew "
                    "from; set old_logprobs to 'rollout'."
                )
        if self.importance_cap is not None:
            if self.old_logprobs == "rollout":
                raise UsageError(
                    f"importance_cap is {self.importance_cap}, but with old_logprobs 'rollout' the "
                    "ratio itself is to the rollout; leave one of them out."
                )
            if self.whitening == "minibatch":
                raise UsageError(
                    f"importance_cap is {self.importance_cap}, but advantage_whitening 'minibatch' "
                    "would scale its weights away; set advantage_whitening to 'batch' or 'none'."
                )

    def _check_bins(self) -> None:
        if self.value_loss == "squared":
            self._refuse_set(
                ("value_range", "value_bins"),
                "value_loss is 'squared', which has no bins; set it to 'hl_gauss'",
            )
            return
        if self.value_range is None:
            raise UsageError(
                "value_loss is 'hl_gauss', but value_range is None; set it to the least and the "
                "greatest return that there can be, such as -5 5."
            )
        low, high = self.value_range
        if low >= high:
            raise UsageError(f"value_range is {low:g} {high:g}; the first must be the lower.")
        if self.value_bins == 1:
            raise UsageError("value_bins is 1, so every value would be the same; raise it.")
        self._refuse_set(
            ("value_clip_range",),
            "value_loss is 'hl_gauss', and the clip is the squared error's; set it to 'squared'",
        )

    @property
    def bins(self) -> Bins | None:
        """The bins of the value head; None where it says one number."""
        return None if self.value_range is None else Bins(*self.value_range, self.value_bins)

    @property
    def has_value_function(self) -> bool:
        """Whether advantages are measured against values."""
        return self.advantage == "gae"

    @property
    def compares_answers(self) -> bool:
        """Whether advantages are measured against the other answers to the prompt."""
        return self.advantage in ("group", "leave_one_out")

    @property
    def whitening(self) -> Literal["batch", "minibatch", "none"]:
        """What `advantage_whitening` comes to."""
        return self.advantage_whitening or ("none" if self.compares_answers else "batch")

    def _refuse_set(self, names: tuple[str, ...], why: str) -> None:
        """Refuse fields that differ from their defaults, since they would change nothing."""
        for name in names:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise UsageError(f"{name} is {value!r}, but {why}, or leave {name} out.")

    @property
    def prompts_per_batch(self) -> int:
        """Different prompts per iteration."""
        return self.batch_size // self.completions_per_prompt
