"""The tokenizer inside a GGUF file: byte-level BPE from the file's metadata."""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from qwen_env.errors import UsageError
from qwen_env.gguf_file import Field, open_gguf
from qwen_env.tokenizer.tokenizer import Tokenizer, rust_errors

# Token types of the format.
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5  # fills a padded vocabulary: an id without text

_PADDING = re.compile(r"\[PAD\d+\]")
"""How converters up to 2024 filled a padded vocabulary: user-defined tokens of this text."""

_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # as the format spells it
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
"""transformers' name of a special token, and the format's."""

_END_TEXTS = {
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<EOT>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
}
"""Tokens that end a generation by their text, as in llama.cpp: a file has no field for a second
id, which `generation_config.json` of the same model names."""

_NO_ID = 2**32 - 1  # -1, as some converters write it

_KINDS = {
    bool: "true or false",
    int: "a number",
    str: "text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}

_HARMLESS = {
    "ggml.scores",
    "ggml.token_type_count",
    "ggml.prefix_token_id",
    "ggml.suffix_token_id",
    "ggml.middle_token_id",
    "ggml.fim_pre_token_id",
    "ggml.fim_suf_token_id",
    "ggml.fim_mid_token_id",
    "ggml.fim_pad_token_id",
    "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id",
    "huggingface.json",
}
"""Fields without a meaning for byte-level BPE that completes a prompt."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*first: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.Sequence:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, last])


def _split(digits: str) -> pre_tokenizers.Split:
    pattern = "|".join([_CONTRACTIONS, _WORDS, digits, _REST])
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_PRE_TOKENIZERS = {
    "gpt-2": _byte_level(use_regex=True),
    "smollm": _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "qwen2": _byte_level(_split(r"\p{N}"), use_regex=False),
    "llama-bpe": _byte_level(_split(r"\p{N}{1,3}"), use_regex=False),
}
"""How text is split into words, by the format's name for it (`tokenizer.ggml.pre`)."""


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Build the tokenizer that the metadata of the GGUF file at `path` describes.

    Raises:
        UsageError: no such file, not a GGUF file, no tokenizer in it, one of an unknown kind, or
            one with a setting that is not known here.
        gymnasium.error.DependencyNotInstalled: the `gguf` package is missing.
    """
    metadata = _Metadata(open_gguf(path).fields, str(path))
    kind = metadata.get("ggml.model", str)
    if kind != "gpt2":
        raise UsageError(
            f"{path} holds a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') can be read."
        )
    tokens: list[str] = metadata.get("ggml.tokens", list) or []
    if not tokens:
        raise UsageError(f"{path} holds no tokens (tokenizer.ggml.tokens); convert it again.")
    splits = metadata.get("ggml.pre", str)
    if splits is None:
        raise UsageError(
            f"{path} does not say how text is split (tokenizer.ggml.pre), as files of before May "
            "2024; convert it again."
        )
    if splits not in _PRE_TOKENIZERS:
        raise UsageError(
            f"{path} splits text as {splits!r}; only {', '.join(_PRE_TOKENIZERS)} can be read."
        )
    kinds = _kinds(metadata, tokens)
    ids = {name: metadata.token_id(key, tokens) for name, key in _ROLES.items()}
    end_roles = [metadata.token_id(role, tokens) for role in ("eos", "eot", "eom")]
    added = {i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
    end_ids = {i for i in end_roles if i is not None}
    end_ids |= {i for i in added if tokens[i] in _END_TEXTS}

    with rust_errors(f"{path} holds no tokenizer that can be used"):
        backend = _backend(splits, tokens, kinds, metadata.get("ggml.merges", list) or [])
        backend.add_tokens(
            [
                AddedToken(
                    tokens[i], special=kinds[i] == _CONTROL or i in end_ids, normalized=False
                )
                for i in sorted(added)
            ]
        )
        backend.post_processor = _post_processor(metadata, splits, tokens, ids)
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    config = special | _chat_templates(metadata)
    metadata.refuse_what_was_not_read()
    return Tokenizer(backend, eos_token_ids=sorted(end_ids), config=config)


class _Metadata:
    """The fields whose names begin with `tokenizer.`: used, known to be harmless, or refused."""

    def __init__(self, fields: Mapping[str, Field], path: str) -> None:
        prefix = "tokenizer."
        self.path = path
        self.values = {
            key.removeprefix(prefix): field.value
            for key, field in fields.items()
            if key.startswith(prefix)
        }
        self.unread = self.values.keys() - _HARMLESS

    def get(self, key: str, kind: type) -> Any:
        """The value of a field, which must be a `kind`, or None."""
        self.unread.discard(key)
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise UsageError(
                f"tokenizer.{key} in {self.path} is {reprlib.repr(value)}; it must be "
                f"{_KINDS[kind]}."
            )
        return value

    def token_id(self, role: str, tokens: list[str]) -> int | None:
        """The id that the file gives a role, or None."""
        i: int | None = self.get(f"ggml.{role}_token_id", int)
        if i is None or i == _NO_ID:
            return None
        if not 0 <= i < len(tokens):
            raise UsageError(
                f"tokenizer.ggml.{role}_token_id in {self.path} is {i}; there are only "
                f"{len(tokens)} tokens."
            )
        return i

    def refuse_what_was_not_read(self) -> None:
        for key in sorted(self.unread):
            value = self.values[key]
            if np.any(value) if isinstance(value, np.ndarray) else value:
                raise UsageError(
                    f"tokenizer.{key} in {self.path} is {reprlib.repr(value)}, a setting that is "
                    "not known here; the tokens would be others than the model's."
                )


def _kinds(metadata: _Metadata, tokens: list[str]) -> list[int]:
    """The type of each token."""
    declared = metadata.get("ggml.token_type", np.ndarray)
    kinds = [_NORMAL] * len(tokens) if declared is None else declared.tolist()
    if len(kinds) != len(tokens):
        raise UsageError(
            f"{metadata.path} holds {len(tokens)} tokens, but the types of {len(kinds)} "
            "(tokenizer.ggml.token_type)."
        )
    for i, token in enumerate(tokens):
        if not token or (kinds[i] == _USER_DEFINED and _PADDING.fullmatch(token)):
            kinds[i] = _UNUSED
    return kinds


def _backend(splits: str, tokens: list[str], kinds: list[int], merges: list[str]) -> Backend:
    vocab: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != _UNUSED and vocab.setdefault(token, i) != i:
            raise ValueError(f"tokens {vocab[token]} and {i} are both {token!r}")
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not first or not second or " " in second:
            raise ValueError(f"the merge {merge!r} is not one of two tokens")
        pairs.append((first, second))
    backend = Backend(models.BPE(vocab, pairs, ignore_merges=splits == "llama-bpe"))
    if splits == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[splits]
    backend.decoder = decoders.ByteLevel()
    return backend


def _post_processor(
    metadata: _Metadata, splits: str, tokens: list[str], ids: Mapping[str, int | None]
) -> processors.TemplateProcessing | None:
    """What goes around a text, as the file and llama.cpp's defaults say."""
    adds = {name: metadata.get(f"ggml.add_{name}_token", bool) for name in ("bos", "eos")}
    for name in adds:
        if adds[name] and ids[name] is None:
            raise ValueError(f"it adds a {name} token to each text, but does not say which")
    if adds["bos"] is None:
        adds["bos"] = splits == "llama-bpe" and ids["bos"] is not None
    if not any(adds.values()):
        return None
    around = {name: (tokens[i], i) for name, i in ids.items() if adds.get(name) and i is not None}
    texts = [around[name][0] if name in around else "" for name in ("bos", "eos")]
    return processors.TemplateProcessing(
        single=[text for text in (texts[0], "$A", texts[1]) if text],
        special_tokens=list(around.values()),
    )


def _chat_templates(metadata: _Metadata) -> dict[str, Any]:
    prefix = "chat_template."
    names = [key.removeprefix(prefix) for key in metadata.values if key.startswith(prefix)]
    metadata.get("chat_templates", list)  # those names again
    templates = {name: metadata.get(prefix + name, str) for name in names}
    default = metadata.get("chat_template", str)
    if default is not None:
        templates["default"] = default
    if not templates:
        return {}
    return {"chat_template": default if templates.keys() == {"default"} else templates}
