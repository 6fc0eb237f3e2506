"""Rewards that need the learner's side: a Flax reward model, and a gold score to watch."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from gymnasium.error import DependencyNotInstalled

from ppo_jax.compilation import jit
from ppo_jax.models import load_reward_model
from ppo_jax.models.loading import model_in, tokenizer_place
from qwen_env.errors import UsageError, UserFacingError
from qwen_env.rewards import RewardBatch, RewardError, RewardFn, Scores, load_reward, score
from qwen_env.rewards.addresses import shown
from qwen_env.rewards.base import describe, is_ctrl_c, place, row_name
from qwen_env.tokenizer import Tokenizer, load_tokenizer

_LENGTH_BUCKET = 64


def load_training_reward(spec: str, tokenizer: Tokenizer, gold: str | None = None) -> RewardFn:
    """The reward function that `spec` names, reporting `gold` beside it where there is one.

    Args:
        spec: as in `qwen_env.rewards.load_reward`, or `"flax:FOLDER"`, a `FlaxReward`.
        tokenizer: the policy's.
        gold: likewise; its scores become the component `"gold"`.

    Raises:
        UsageError: no such reward, one of its files is wrong, or its own code fails on import.
        gymnasium.error.DependencyNotInstalled: it needs an extra that is not installed.
    """

    def load(spec: str) -> RewardFn:
        try:
            return load_reward(spec, {"flax": lambda folder: FlaxReward(folder, tokenizer)})
        except (UserFacingError, DependencyNotInstalled):
            raise
        except BaseException as error:  # whatever the user's module may raise
            if is_ctrl_c(error):
                raise
            raise UsageError(
                f"The reward {shown(spec)} cannot be loaded: {describe(error)}{place(error)}."
            ) from error

    if not spec:
        raise UsageError("There is no reward; name one, such as --reward my_rewards:my_function.")
    reward = load(spec)
    return reward if gold is None else WithGold(reward, load(gold))


class FlaxReward:
    """A sequence classifier as a reward model, run by our own port on the device.

    If it shares the policy's vocabulary, it reads the tokens as they were chosen, the
    end-of-sequence id included; otherwise the text in its own tokens, with its own end-of-sequence
    id where the policy chose one. `HuggingFaceReward` without a chat template reads the same.

    Args:
        folder: a folder in Hugging Face layout, or a hub id; or that of a run, whose last model
            it is.
        policy_tokenizer: the policy's.

    Raises:
        UsageError: no such model, or its tokenizer belongs to another one.
    """

    def __init__(self, folder: str, policy_tokenizer: Tokenizer):
        self.__qualname__ = f"flax:{folder}"  # the name in messages
        folder = model_in(folder)
        model = load_reward_model(folder)
        self._tokenizer = load_tokenizer(tokenizer_place(folder))
        # JAX clamps an index that is out of range: the scores would be wrong, and nothing said.
        if self._tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"flax:{folder}: the tokenizer has {self._tokenizer.vocab_size} ids, but the model "
                f"a vocabulary of {model.config.vocab_size}; put the model's own tokenizer there."
            )
        self._end = _end_of_text(self._tokenizer)
        self._max_length = model.config.max_length
        graphdef, self._params = nnx.split(model)
        self._score = jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
        ours, theirs = self._tokenizer.backend, policy_tokenizer.backend
        self._shares_vocabulary = ours.get_vocab() == theirs.get_vocab()

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """The score of each row, float32 [N].

        Raises:
            RewardError: a row is longer than the model can read.
        """
        sequences = self._sequences(batch)
        lengths = np.array([len(sequence) for sequence in sequences])
        if lengths.max() > self._max_length:
            row = int(lengths.argmax())
            raise RewardError(
                f"The reward model {self.__qualname__} has {self._max_length} positions, but "
                f"{row_name(batch, row)} comes to {lengths[row]} tokens; lower max_new_tokens or "
                "max_prompt_length."
            )
        # Few widths, so that few programs are compiled.
        width = -(-lengths.max() // _LENGTH_BUCKET) * _LENGTH_BUCKET
        ids = np.zeros((len(sequences), width), np.int32)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        mask = np.arange(width) < lengths[:, None]
        return np.asarray(self._score(self._params, jnp.asarray(ids), jnp.asarray(mask)))

    def _sequences(self, batch: RewardBatch) -> Sequence[Sequence[int] | np.ndarray]:
        if self._shares_vocabulary:
            return [
                np.concatenate(ids)
                for ids in zip(batch.prompt_ids, batch.response_ids, strict=True)
            ]
        rows = zip(batch.prompts, batch.completions, batch.finish_reasons, strict=True)
        return [
            self._tokenizer.encode(prompt + completion, add_special_tokens=True)
            + (self._end if reason == "eos" else [])
            for prompt, completion, reason in rows
        ]


def _end_of_text(tokenizer: Tokenizer) -> list[int]:
    """The end-of-sequence id, unless there is none or the tokenizer ends every text by itself."""
    eos = tokenizer.special_token("eos_token")
    eos_id = None if eos is None else tokenizer.backend.token_to_id(eos)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    return [] if eos_id is None or whole[-1:] != plain[-1:] else [eos_id]


class WithGold:
    """A reward function that reports a second one as its component `"gold"`.

    The gold score is what the reward stands for; a policy that earns more of the reward and less
    of the gold score over-optimises. It is never trained on.
    """

    def __init__(self, reward: RewardFn, gold: RewardFn):
        self._reward, self._gold = reward, gold

    def __call__(
        self, batch: RewardBatch
    ) -> tuple[np.ndarray | Sequence[np.ndarray], Mapping[str, np.ndarray]]:
        scores: Scores = score(self._reward, batch)
        gold = score(self._gold, batch)
        if "gold" in scores.components:
            raise RewardError(
                "The reward already has a component named 'gold'; leave out gold_reward."
            )
        return scores.rewards, {**scores.components, "gold": gold.values}
