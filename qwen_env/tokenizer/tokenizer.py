"""Text to token ids and back, with the few facts about special tokens that the task needs."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from qwen_env.errors import UsageError, reason
from qwen_env.tokenizer.chat import Message, import_transformers, render_chat
from qwen_env.tokenizer.slow import SlowBackend
from qwen_env.tokenizer.token_bytes import special_tokens

_LARGEST_ID = 2**22
"""No vocabulary is near it; a damaged file could name an id that takes all the memory."""

_WINDOW = 2**16
"""Characters. Longer texts are encoded whole only where that is needed."""
_SHIFT = 10_007
_TEXTS = 1024  # prompts whose texts are kept
"""Characters, a prime: of a run that is cut into groups of n, the end tells where it began."""


class Tokenizer:
    """A `tokenizers.Tokenizer`, its end-of-sequence ids and its chat template. Immutable.

    Args:
        backend: the tokenizer proper, taken over: its truncation and padding are switched off.
        eos_token_ids: the ids that end a response; empty when the source names none.
        config: what `tokenizer_config.json` holds: `eos_token`, `pad_token`, `bos_token`,
            `chat_template`, ...
        renderer: the tokenizer of `transformers` that renders chats. Default: one with the same
            special tokens and chat template.

    Raises:
        UsageError: it has no tokens, or its chat templates are malformed.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | SlowBackend,
        *,
        eos_token_ids: Sequence[int] = (),
        config: Mapping[str, Any] | None = None,
        renderer: Any = None,
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
        plain = backend.get_vocab(with_added_tokens=False)
        if len(set(plain.values())) < len(plain):  # an added token may rename one of these
            raise UsageError("the tokenizer has two tokens with one id; its files are damaged.")
        self.vocab_size: int = max(self.ids) + 1
        if self.vocab_size > _LARGEST_ID:
            raise UsageError(
                f"the tokenizer has a token with the id {self.vocab_size - 1}, over the limit of "
                f"{_LARGEST_ID - 1}; its files are damaged."
            )
        self._templates = _chat_templates(self.config.get("chat_template"))
        templates = self._templates
        self.chat_template = templates.get("default") if isinstance(templates, dict) else templates
        """The one that is used where none is named."""
        if renderer is not None:
            self.__dict__["_renderer"] = renderer

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; special tokens written in the text are recognised.

        Args:
            add_special_tokens: add those that the tokenizer puts around a text, as
                `tokenizer(text)` of `transformers` does.

        Raises:
            UsageError: the text is no valid Unicode, or the tokenizer has no token for a part.
        """
        with rust_errors("the text cannot be encoded"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_end(self, text: str, at_least: int) -> tuple[list[int], bool]:
        """The last ids of `text`, no fewer than `at_least` of them, and whether these are all.

        Encoding takes 150 times the memory of the text, so of a long text only the end is encoded:
        from two places, further and further back until the ids agree, which are then those of the
        whole text.
        """
        window = max(_WINDOW, 8 * at_least)
        while window + _SHIFT < len(text):
            ids, more = (self.encode(text[-size:]) for size in (window, window + _SHIFT))
            if len(ids) > at_least and ids[-at_least:] == more[-at_least:]:
                return more, False
            window *= 4
        return self.encode(text), True

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """What goes before a text: the beginning-of-sequence id where its model expects one."""
        if not self.backend.num_special_tokens_to_add(False):
            return ()
        text = self.decode(sorted(self.ids - self._special_ids)[:8])
        bare, added = self.encode(text), self.encode(text, add_special_tokens=True)
        starts = (n for n in range(len(added)) if added[n : n + len(bare)] == bare)
        return tuple(added[: next(starts, 0)])

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without text are left out."""
        return self._decode(np.asarray(ids).tolist(), skip_special_tokens)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        with rust_errors("the tokens cannot be decoded"):
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if self.config.get("clean_up_tokenization_spaces") and not self._is_bpe:
            text = import_transformers().PreTrainedTokenizerBase.clean_up_tokenization(self, text)
        return text

    def decode_after(self, prompt_ids: np.ndarray, ids: np.ndarray) -> str:
        """The text that `ids` add to that of `prompt_ids`, their special tokens left out.

        It can be another than that of `ids` alone: tokenizers of SentencePiece's kind leave out
        the space before the first word.
        """
        # Lists, since these few ids take NumPy longer, and every episode passes here.
        prompt = prompt_ids.tolist()
        written = [i for i in ids.tolist() if i not in self._special_ids]
        before = self._text_before(tuple(prompt))
        both = self._decode(prompt + written, False)
        if both.startswith(before):
            return both[len(before) :]
        return self._decode(written, False)  # they complete a character

    def _text_before(self, prompt: tuple[int, ...]) -> str:
        """The text of a prompt, which is most often one that was asked before."""
        text = self._texts.get(prompt)
        if text is None:
            if len(self._texts) >= _TEXTS:
                self._texts.clear()
            text = self._texts[prompt] = self._decode(list(prompt), False)
        return text

    @cached_property
    def _texts(self) -> dict[tuple[int, ...], str]:
        return {}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(special_tokens(self.backend))

    @cached_property
    def _is_bpe(self) -> bool:
        return isinstance(self.backend.model, tokenizers.models.BPE)

    def special_token(self, name: str) -> str | None:
        """The text of `"eos_token"`, `"pad_token"`, `"bos_token"` or `"unk_token"`, or None."""
        text: str | None = _text(self.config.get(name))
        return text

    @property
    def pad_token_id(self) -> int | None:
        return special_token_id(self.backend, self.config, "pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return special_token_id(self.backend, self.config, "bos_token")

    def apply_chat_template(self, messages: Sequence[Message], **arguments: Any) -> str:
        """The text of a chat; see `qwen_env.tokenizer.chat.render_chat` for the arguments.

        Raises:
            UsageError: there is no template, or it refuses the messages.
        """
        return render_chat(self._renderer, messages, **arguments)

    @cached_property
    def _renderer(self) -> Any:
        special = {name: _text(token) for name, token in named_tokens(self.config).items()}
        return import_transformers().PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),  # rendering needs none
            chat_template=self._templates,
            **special,
        )

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, for `AutoTokenizer` and for us.

        End-of-sequence ids beyond `eos_token` belong to `generation_config.json`, which is
        written with the model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.backend, SlowBackend):
            self.backend.tokenizer.save_pretrained(folder)
            return
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        if "eos_token" not in config and self.eos_token_ids:
            config["eos_token"] = self.backend.id_to_token(self.eos_token_ids[0])
        if isinstance(self._templates, dict):
            named = self._templates.items()
            config["chat_template"] = [{"name": name, "template": text} for name, text in named]
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self  # immutable, and Gymnasium deep-copies the arguments of an environment


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Whatever the Rust library raises in the block becomes a sentence that begins with `what`."""
    try:
        yield
    except TypeError as error:  # what it says of half a surrogate pair
        raise UsageError(f"{what}: it is not valid Unicode text.") from error
    except Exception as error:  # it raises bare ones
        raise UsageError(f"{what}: {reason(error)}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{what}: the tokenizer's files are damaged.") from error


def named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens with a name, which chat templates know them by: `eos_token`, and also a
    model's own, such as `image_token`."""
    more = config.get("extra_special_tokens")
    named = {**config, **(more if isinstance(more, Mapping) else {})}
    return {
        name: token
        for name, token in named.items()
        if name.endswith("_token") and isinstance(token, str | Mapping)
    }


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def special_token_id(
    backend: tokenizers.Tokenizer | SlowBackend, config: Mapping[str, Any], name: str
) -> int | None:
    token = _text(config.get(name))
    return None if token is None else backend.token_to_id(token)


def _chat_templates(template: Any) -> str | dict[str, str] | None:
    """A template, or several by name: a mapping, or the list that a file holds."""
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError) as error:
            raise UsageError(
                "the tokenizer's chat_template is a list; each entry must have a 'name' and a "
                "'template'."
            ) from error
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, dict) and all(isinstance(text, str) for text in template.values()):
        return template
    raise UsageError(
        f"the tokenizer's chat_template is {reprlib.repr(template)}; it must be a template, or "
        "several by name."
    )
