"""Every setting of a run.

One frozen dataclass a concern, which refuses what its fields cannot be; `TrainConfig` refuses what
two concerns contradict each other in. Each field is a flag of `ppo-train` under its own name, and
the text below it is the flag's help.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints, overload

from ppo_jax.algorithm import (
    AdvantageEstimator,
    Aggregation,
    ClipSides,
    KlEstimator,
    RatioLevel,
)
from ppo_jax.config.fields import (
    Checked,
    Count,
    Decay,
    Factor,
    Limit,
    LimitAboveOne,
    Natural,
    Probability,
    Rate,
    Seed,
    Share,
    Temperature,
)
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.prompts import Overflow

Schedule = Literal["constant", "linear", "cosine"]
ComputeType = Literal["float32", "bfloat16"]
TrackerName = Literal["trackio", "wandb", "mlflow"]


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which model, and how it is written to."""

    model: str = str(pocket.POLICY_FOLDER)
    """The model: a folder in Hugging Face layout, a hub id, or a .gguf file."""
    chat: bool = False
    """Wrap each prompt in the tokenizer's chat template, as a user's message."""
    system_prompt: str | None = None
    """System message for every chat that has none of its own."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the chat template, each a name and a JSON value, such as enable_thinking=false,
    with which Qwen3 answers at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.template_arguments  # refuses what is none

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs` by name."""
        arguments: dict[str, Any] = {}
        for given in self.chat_template_kwargs:
            name, is_given, value = given.partition("=")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                is_given = ""
            if not is_given or not name.isidentifier():
                raise UsageError(
                    f"chat_template_kwargs has {given!r}; it must be a name and a JSON value, such "
                    "as enable_thinking=false or language='\"English\"'."
                )
        return arguments


@dataclass(frozen=True)
class ResponseConfig(ModelConfig):
    """Which model answers, and how it is asked."""

    max_new_tokens: Count = pocket.MAX_NEW_TOKENS
    """Longest response, in tokens."""
    min_new_tokens: Natural = 0
    """Forbid the end-of-sequence token before a response has this many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response as soon as it contains one of them, such as "</answer>"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens "
                f"({self.max_new_tokens}); lower it."
            )


@dataclass(frozen=True)
class TaskConfig(ResponseConfig):
    """What the model is asked, and what its answers are worth."""

    task: str | None = None
    """A task by name, which brings prompts, held-out prompts, and the reward that verifies the
    answers: "gsm8k", "gsm8k:FOLDER_OR_FILE", "reasoning_gym:NAME" with options as in
    "reasoning_gym:chain_sum?min_terms=3&size=2000", "textarena:GAME", "guess_the_number",
    "calculator", or "package.module:callable"."""
    prompts: str | None = str(pocket.TRAIN_PROMPTS)
    """Prompts to train on: a .jsonl file whose objects hold "prompt" (text) or "messages" (a
    chat)."""
    eval_prompts: str | None = str(pocket.HELDOUT_PROMPTS)
    """Held-out prompts (.jsonl); None sets the last tenth of the training prompts aside."""
    reward: str | None = f"flax:{pocket.REWARD_FOLDER}"
    """Reward function: "package.module:callable", "hf:MODEL" (run by transformers), "flax:FOLDER"
    (a Qwen2, Qwen3 or Llama reward model, run on the device), "http://..." (a reward server), or a
    weighted sum, "1.0 * a.b:c + 0.5 * d.e:f"."""
    gold_reward: str | None = None
    """A second reward, reported beside the first and never trained on."""
    interaction: str | None = None
    """What replies between the policy's turns: "package.module:name", a function of a TurnBatch or
    an object with a method reply; None leaves it to the task."""
    max_turns: Count | None = None
    """Most turns of an episode, whose replies count towards max_new_tokens; None leaves it to the
    task, or makes it 1."""
    max_prompt_length: Count | None = pocket.MAX_PROMPT_LENGTH
    """Longest prompt, in tokens; None makes it that of the longest prompt there is."""
    prompt_overflow: Overflow = "error"
    """What to do with a longer prompt: refuse it, drop it, or cut off its beginning."""
    missing_eos_penalty: Factor = 0.0
    """Subtract this from the score of a response that the length limit cut off."""
    keep_solvable: tuple[Share, Share] | None = None
    """Train only on prompts of which the untrained model answers a share within these two limits
    right, such as 0.1 0.9. It is measured once, before training, by the reward's accuracy."""

    replaces: ClassVar[Mapping[str, Sequence[str]]] = {
        "task": ("prompts", "eval_prompts", "reward", "gold_reward", "max_prompt_length"),
        "prompts": ("task",),
    }
    """What a flag makes None unless it is given too: what the preset says of another task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_solvable is not None and self.keep_solvable[0] > self.keep_solvable[1]:
            low, high = self.keep_solvable
            raise UsageError(
                f"keep_solvable is {low} {high}; the first limit must not be above the second."
            )
        if self.task is None:
            return
        for name in self.replaces["task"]:  # the defaults are the pocket task's
            if getattr(self, name) == getattr(type(self), name):
                object.__setattr__(self, name, None)
        for name in ("prompts", "reward"):
            if (value := getattr(self, name)) is not None:
                raise UsageError(
                    f"task is {self.task!r}, which brings prompts and a reward of its own, but "
                    f"{name} is {value!r}; leave one of the two out, or give both prompts and "
                    "reward in the task's place."
                )


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
    critic: Literal["shared", "stopped", "separate"] = "shared"
    """Backbone of the value head: the policy's, the policy's without a gradient into it, or one of
    its own."""
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
        if self.value_coef == 0 and self.has_value_function:
            self._refuse_set(
                ("critic", "value_clip_range"),
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
        if change < 0.25:
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
                    *("value_coef", "value_clip_range", "length_limit"),
                ),
                f"advantage is {self.advantage!r}, which has no value function; set it to 'gae'",
            )
        if self.compares_answers:
            self._refuse_set(
                ("gamma",), f"advantage is {self.advantage!r}, which compares whole answers"
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


@dataclass(frozen=True)
class AdamWConfig(Checked):
    """AdamW and its schedule."""

    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """How the learning rate falls over the run: not at all, to zero linearly, or to zero along a
    cosine."""
    warmup_iterations: Natural = 0
    """Iterations over which the learning rate rises from zero, counted from when the policy
    learns."""
    adam_b1: Decay = 0.9
    """Decay of Adam's first moment."""
    adam_b2: Decay = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Rate = 1e-5
    """Adam's ε, added to the root of the second moment."""
    weight_decay: Factor = 0.0
    """Decoupled weight decay of the matrices; norms and biases have none."""
    max_grad_norm: Limit = 1.0
    """Clip gradients to this global norm."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings (nor the output projection, where the two are tied)."""
    num_frozen_layers: Natural = 0
    """Do not train this many of the lowest layers."""
    lora_rank: Count | None = None
    """Train low-rank adapters (LoRA) of this rank and the value head, and nothing else; None trains
    the model itself."""
    lora_alpha: Rate | None = None
    """Scale the adapters by this over lora_rank; None makes it twice lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get adapters, such as q_proj v_proj; none named means all of them."""
    max_nonfinite_updates: Count = 5
    """Stop the run after this many losses or gradients in a row that were not finite; each is
    skipped."""

    _warmups: ClassVar[Sequence[str]] = ("warmup_iterations",)  # one after the other

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_alpha", "lora_targets"):
            if self.lora_rank is None and (value := getattr(self, name)):
                raise UsageError(
                    f"{name} is {value!r}, but there are no adapters; set lora_rank, or leave "
                    f"{name} out."
                )

    def check_warmups(self, num_iterations: int) -> None:
        """Refuse warm-ups that would last for a whole run.

        Raises:
            UsageError: names the warm-up.
        """
        warmups = {name: getattr(self, name) for name in self._warmups if getattr(self, name)}
        if sum(warmups.values()) >= num_iterations:
            raise UsageError(
                f"{' + '.join(warmups)} ({' + '.join(map(str, warmups.values()))}) must be below "
                f"num_iterations ({num_iterations}); otherwise the learning rate would never fall."
            )


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """AdamW and its schedule, for a policy and its critic."""

    critic_learning_rate: Rate | None = None
    """Peak learning rate of the value head, and of its backbone if separate; None makes it
    learning_rate."""
    critic_warmup_iterations: Natural = 0
    """First iterations in which only the value function learns, at the peak learning rate; the
    schedule begins after them."""

    _warmups: ClassVar[Sequence[str]] = ("critic_warmup_iterations", "warmup_iterations")

    def check_warmups(self, num_iterations: int) -> None:
        """Likewise, of the critic's warm-up too."""
        if self.critic_warmup_iterations >= num_iterations:
            raise UsageError(
                f"critic_warmup_iterations ({self.critic_warmup_iterations}) must be below "
                f"num_iterations ({num_iterations}); otherwise the policy would never learn."
            )
        super().check_warmups(num_iterations)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """What a computation is split over."""

    num_devices: Count = 1
    """Split each batch over this many devices, such as GPUs."""
    num_shards: Count = 1
    """Cut each copy of the parameters, and of moments and reference, over this many of the
    devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_devices % self.num_shards:
            raise UsageError(
                f"num_shards ({self.num_shards}) does not divide num_devices ({self.num_devices}); "
                "choose a number that does."
            )


@dataclass(frozen=True)
class DevicesConfig(MeshConfig):
    """What a computation is split over, and how much of it is done at a time."""

    rollout_slots: Count | None = None
    """Write so many responses at a time on each device, which bounds the memory of generation: as
    responses end, the next prompts take their places. None writes a whole batch at once. Either
    way, the tokens are the same."""

    def check_slots(self, batch_size: int) -> None:
        """Refuse more slots than a device has responses of a batch.

        Raises:
            UsageError: names both.
        """
        if self.rollout_slots is not None and self.rollout_slots * self.num_devices > batch_size:
            devices = f" on each of {self.num_devices} devices" if self.num_devices > 1 else ""
            raise UsageError(
                f"rollout_slots is {self.rollout_slots}{devices}, but a batch has only "
                f"{batch_size} response{'s' if batch_size > 1 else ''}; lower it, or leave it out."
            )


@dataclass(frozen=True)
class SessionConfig(MeshConfig):
    """How often, with what precision, on what."""

    seed: Seed = 0
    """Seed of every random choice."""
    dtype: ComputeType = "float32"
    """Type that activations and matrix products are computed in."""
    param_dtype: ComputeType = "float32"
    """Type that parameters and first moments are kept in; bfloat16 halves their memory and rounds
    small steps away."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them: slower, with less
    memory."""
    eval_every: Count = 10
    """Iterations between evaluations on what is held out."""
    save_every: Count = 25
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep."""
    log_to: tuple[TrackerName, ...] = ()
    """Trackers to log to as well: trackio, wandb, mlflow. The run folder's own records and
    tensorboard/ are always written."""


@dataclass(frozen=True)
class RunConfig(SessionConfig, DevicesConfig):
    """How long, how often, with what precision, on what."""

    num_iterations: Count | None = None
    """Iterations in all; None makes num_prompt_epochs passes over the prompts."""
    num_prompt_epochs: Count = 3
    """Passes over the training prompts, where num_iterations is None."""
    eval_size: Count = 64
    """Held-out prompts per evaluation."""
    inspect_size: Natural = 8
    """Training episodes whose tokens, and all that PPO knows of each, are kept at the first
    iteration and at each evaluation for ppo-inspect, in tokens.jsonl: about 200 bytes a token of a
    response. 0 keeps none."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Raises:
        UsageError: two settings contradict each other; it names both and the way out.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        ppo, optimizer, run = self.ppo, self.optimizer, self.run
        parts = {"num_minibatches": ppo.num_minibatches, "num_microbatches": ppo.num_microbatches}
        for factors in (parts, {"completions_per_prompt": ppo.completions_per_prompt}):
            factors = factors | {"num_devices": run.num_devices}
            if ppo.batch_size % math.prod(factors.values()):
                named = {name: factor for name, factor in factors.items() if factor > 1}
                raise UsageError(
                    f"batch_size ({ppo.batch_size}) must be a multiple of {' x '.join(named)} "
                    f"({' x '.join(map(str, named.values()))})."
                )
        run.check_slots(ppo.batch_size)
        if ppo.length_limit == "bootstrap" and (penalty := self.task.missing_eos_penalty):
            raise UsageError(
                f"missing_eos_penalty ({penalty}) is subtracted from the score of a response that "
                "the limit cut off, but with length_limit 'bootstrap' that score is never paid; "
                "leave one of them out."
            )
        if ppo.value_coef == 0 or not ppo.has_value_function:
            cause = (
                "value_coef is 0" if ppo.has_value_function else f"advantage is {ppo.advantage!r}"
            )
            for name in ("critic_warmup_iterations", "critic_learning_rate"):
                if getattr(optimizer, name):
                    raise UsageError(
                        f"{name} is {getattr(optimizer, name)}, but {cause}, so no value function "
                        f"learns; change that, or leave {name} out."
                    )
        if run.num_iterations is not None:
            optimizer.check_warmups(run.num_iterations)
            ppo.for_run(run.num_iterations)

    def total_iterations(self, num_prompts: int) -> int:
        """Iterations of a whole run on so many prompts; the last pass may end within a batch.

        Raises:
            UsageError: a warm-up would last as long.
        """
        if self.run.num_iterations is not None:
            return self.run.num_iterations
        num_visits = self.run.num_prompt_epochs * num_prompts
        iterations = math.ceil(num_visits / self.ppo.prompts_per_batch)
        self.optimizer.check_warmups(iterations)
        return iterations


class RunSettings(Protocol):
    """The settings of a run of any kind: a frozen dataclass of groups."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run(self) -> SessionConfig: ...

    @property
    def optimizer(self) -> AdamWConfig: ...


Config = TypeVar("Config", bound=RunSettings)


def as_json(config: RunSettings) -> dict[str, dict[str, Any]]:
    """What `config.json` of a run folder holds: the fields of each group of settings."""
    return dataclasses.asdict(config)


@overload
def from_json(content: Mapping[str, Any]) -> TrainConfig: ...
@overload
def from_json(content: Mapping[str, Any], kind: type[Config]) -> Config: ...
def from_json(content: Mapping[str, Any], kind: type[Any] = TrainConfig) -> Any:
    """The inverse of `as_json`, for a dataclass of groups of settings."""
    groups = get_type_hints(kind)
    return kind(**{name: group(**content[name]) for name, group in groups.items()})
