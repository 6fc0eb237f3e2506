"""A Hugging Face sequence-classification model as the reward, run by `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_env.arguments import integer
from qwen_env.errors import UsageError
from qwen_env.extras import import_extra
from qwen_env.hub import resolve
from qwen_env.rewards.base import RewardBatch
from qwen_env.rewards.progress import with_progress

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_NO_LIMIT = 10**9  # transformers writes 1e30 or -1


class HuggingFaceReward:
    """Scores an episode with a reward model, its own tokenizer and its own chat template.

    With a chat template, the model reads the row's `"messages"` (or its prompt, as a user's
    message) and the completion as the assistant's answer; without one, prompt and completion as
    one text. An end-of-sequence token follows a text that the policy ended with one, where the
    tokenizer puts nothing of its own at the end of every text. Batches are sorted by length, so
    that little is padded.

    Args:
        model: a folder, or a hub id; weights are read from safetensors only, and no code of the
            repository is run.
        label: of a classifier with several labels, the one whose logit is the reward.
        device: a `torch` device; by default the GPU if there is one.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: rows per forward pass.
        max_length: tokens, special ones included; longer texts lose their left end. No more than
            the tokenizer's and the model's own limits, which are the default.
        use_chat_template: False reads prompt and completion as one text even if there is a chat
            template.

    Raises:
        UsageError: no such model, or not a reward model.
        gymnasium.error.DependencyNotInstalled: `torch` or `transformers` is missing.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        label: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        max_length: int | None = None,
        use_chat_template: bool = True,
    ) -> None:
        torch: Any = import_extra("torch", package="torch")
        transformers = import_extra("transformers", package="torch")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16.")
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        folder = resolve(model, allow_patterns=_FILES)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config._attn_implementation = None  # it may name a repository of kernels
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False
            )
            self.model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise UsageError(
                    f"hf:{model} needs code of its own, and code of a repository is never run; "
                    "write a reward function that runs it (package.module:callable)."
                ) from error
            raise UsageError(f"hf:{model} cannot be loaded: {error}") from error
        if missing := sorted(loaded["missing_keys"]):
            raise UsageError(
                f"hf:{model} has no tensor {missing[0]!r}; it is not a sequence-classification "
                "model, or not a complete one."
            )
        self._column = _label_column(self.model.config, label, str(model))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model.to(self.device, getattr(torch, dtype)).eval()
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"hf:{model} cannot be moved to the device {self.device!r}: {reason}"
            ) from error
        self.max_length = _max_length(max_length, self.tokenizer, self.model)
        self.tokenizer.truncation_side = "left"
        self._end = _end_of_text(self.tokenizer)
        self.use_chat_template = use_chat_template and self.tokenizer.chat_template is not None
        self.__qualname__ = f"hf:{model}"  # the name in messages

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """The reward of each row, float32 [N]."""
        if not len(batch):
            return np.zeros(0, np.float32)
        ids = [self._encode(batch, row) for row in range(len(batch))]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rewards = np.zeros(len(ids), np.float32)
        for rows in with_progress(chunks, "scoring"):
            rewards[rows] = self._forward([ids[row] for row in rows])
        return rewards

    def __deepcopy__(self, memo: dict[int, Any]) -> "HuggingFaceReward":
        return self  # Gymnasium copies the arguments of an environment, and a model is large

    def _encode(self, batch: RewardBatch, row: int) -> list[int]:
        if self.use_chat_template:
            text = self.tokenizer.apply_chat_template(_conversation(batch, row), tokenize=False)
            end = []
        else:
            text = batch.prompts[row] + _continuation(batch, row)
            end = self._end if batch.finish_reasons[row] == "eos" else []
        ids: list[int] = self.tokenizer.encode(
            text,
            add_special_tokens=not self.use_chat_template,  # a template writes its own
            truncation=self.max_length is not None,
            max_length=self.max_length and self.max_length - len(end),
        )
        return ids + end

    def _forward(self, rows: list[list[int]]) -> np.ndarray:
        import torch  # not kept: an environment is copied and pickled with its reward

        pad = self._pad_token_id(rows)
        width = max(len(ids) for ids in rows)
        input_ids = [ids + [pad] * (width - len(ids)) for ids in rows]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor(input_ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
            ).logits
        rewards: np.ndarray = logits[:, self._column].float().cpu().numpy()
        return rewards

    def _pad_token_id(self, rows: list[list[int]]) -> int:
        """An id to pad with, told to the model.

        Decoders read their score at the last token that is not `pad_token_id`, which is wrong for
        a text that ends with it (many models pad with the end-of-sequence token); any id that ends
        none of the texts will then do, since padding is masked.
        """
        last_ids = {ids[-1] for ids in rows}
        pad: int | None = self.tokenizer.pad_token_id
        if pad is None or pad in last_ids:
            pad = next(i for i in range(len(last_ids) + 1) if i not in last_ids)
        self.model.config.pad_token_id = pad
        return pad


def _conversation(batch: RewardBatch, row: int) -> list[Mapping[str, Any]]:
    """The chat with the completion, before any chat template was applied."""
    if batch.has_turns:
        return list(batch.messages[row])
    columns = batch.rows[row]
    said = columns.get("messages")
    if said is None:
        said = [{"role": "user", "content": columns.get("prompt", batch.prompts[row])}]
    return [*said, {"role": "assistant", "content": batch.completions[row]}]


def _continuation(batch: RewardBatch, row: int) -> str:
    """What follows the prompt: the completion, or with several turns all that was said, with line
    breaks between."""
    if not batch.has_turns:
        return batch.completions[row]
    whole, asked = batch.messages[row], batch.rows[row].get("messages") or [{}]
    has_system_prompt = whole[0]["role"] == "system" and asked[0].get("role") != "system"
    return "\n".join(message["content"] for message in whole[len(asked) + has_system_prompt :])


def _end_of_text(tokenizer: Any) -> list[int]:
    """The end-of-sequence id, unless there is none or the tokenizer ends every text by itself."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    ends_texts = whole[-1:] != plain[-1:]
    return [] if ends_texts or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _max_length(wanted: int | None, tokenizer: Any, model: Any) -> int | None:
    """The lowest of the limits, in tokens; None without one."""
    if wanted is not None:
        least = tokenizer.num_special_tokens_to_add() + len(_end_of_text(tokenizer)) + 1
        wanted = integer("max_length", wanted, at_least=least)
    limits = (wanted, tokenizer.model_max_length, _usable_positions(model))
    return min((n for n in limits if n is not None and 0 < n < _NO_LIMIT), default=None)


def _usable_positions(model: Any) -> int | None:
    """How many tokens have a position of their own; None where the config names no limit.

    RoBERTa and its kin number positions from behind the padding's, so the first rows of their table
    are never a token's.
    """
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limit = min(limit, len(module.weight) - padding - 1)
    return limit


def _label_column(config: Any, label: str | None, model: str) -> int:
    if label is None:
        if config.num_labels == 1:
            return 0
    elif label in config.label2id:
        return int(config.label2id[label])
    raise UsageError(
        f"hf:{model} has the labels {', '.join(map(repr, config.label2id))}; name one of them as "
        "label (in a string, 'hf:FOLDER?label=LABEL')."
    )
