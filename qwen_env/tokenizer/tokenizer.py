"""Text to token ids and back, with the few facts about special tokens that the task needs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from qwen_env.errors import UsageError
from qwen_env.tokenizer.chat_template import Message, render_chat


class Tokenizer:
    """A `tokenizers.Tokenizer`, its end-of-sequence ids and its chat template. Immutable.

    Args:
        backend: the tokenizer proper, taken over: its truncation and padding are switched off.
        eos_token_ids: the ids that end a response; empty when the source names none.
        config: what `tokenizer_config.json` holds: `eos_token`, `pad_token`, `bos_token`,
            `chat_template`, ...

    Raises:
        UsageError: it has no tokens, or its chat templates are malformed.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        # A tokenizer keeps, and saves, what the last call asked for.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config: dict[str, Any] = dict(config or {})
        self.eos_token_ids = tuple(int(i) for i in eos_token_ids)
        self.ids: frozenset[int] = frozenset(backend.get_vocab(with_added_tokens=True).values())
        """Every id that has text. A padded vocabulary has more."""
        if not self.ids:
            raise UsageError("the tokenizer has no tokens; train it first.")
        self.vocab_size: int = max(self.ids) + 1
        self.chat_template: str | None = _default_template(self.config.get("chat_template"))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No token is added; special tokens written in the text are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without text are left out."""
        id_list = np.asarray(ids).tolist()
        return self.backend.decode(id_list, skip_special_tokens=skip_special_tokens)

    def special_token(self, name: str) -> str | None:
        """The text of `"eos_token"`, `"pad_token"`, `"bos_token"` or `"unk_token"`, or None."""
        return _special_token(self.config, name)

    @property
    def pad_token_id(self) -> int | None:
        return special_token_id(self.backend, self.config, "pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return special_token_id(self.backend, self.config, "bos_token")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        system_prompt: str | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat; see `qwen_env.tokenizer.chat_template.render_chat`.

        Args:
            chat_template: used instead of the tokenizer's own.

        Raises:
            UsageError: there is no template, or it refuses the messages.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise UsageError(
                "the tokenizer has no chat template; pass one as chat_template, "
                "or give plain text and leave chat_template out."
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special_tokens = {n: token for n in names if (token := self.special_token(n)) is not None}
        return render_chat(
            template,
            messages,
            system_prompt=system_prompt,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens | variables),
        )

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, for `AutoTokenizer` and for us.

        End-of-sequence ids beyond `eos_token` belong to `generation_config.json`, which is
        written with the model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        if "eos_token" not in config and self.eos_token_ids:
            config["eos_token"] = self.backend.id_to_token(self.eos_token_ids[0])
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self  # immutable, and Gymnasium deep-copies the arguments of an environment


def _special_token(config: Mapping[str, Any], name: str) -> str | None:
    token = config.get(name)
    return token.get("content") if isinstance(token, Mapping) else token


def special_token_id(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str
) -> int | None:
    token = _special_token(config, name)
    return None if token is None else backend.token_to_id(token)


def _default_template(template: Any) -> str | None:
    """A template, or the one named "default" of several: a mapping, or the list in a file."""
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError) as error:
            raise UsageError(
                "the tokenizer's chat_template is a list; each entry must have a 'name' and a "
                "'template'."
            ) from error
    return template.get("default") if isinstance(template, Mapping) else template
