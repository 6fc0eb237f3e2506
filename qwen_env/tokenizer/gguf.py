"""The tokenizer inside a GGUF file: byte-level BPE from the file's metadata."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qwen_env.errors import UsageError
from qwen_env.gguf_file import open_gguf
from qwen_env.tokenizer.tokenizer import Tokenizer

# Token types of the format.
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5  # fills a padded vocabulary: an id without text

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
        UsageError: no such file, not a GGUF file, no tokenizer in it, or one of an unknown kind.
        gymnasium.error.DependencyNotInstalled: the `gguf` package is missing.
    """
    fields = open_gguf(path).fields

    def read(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    kind = read("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UsageError(
            f"{path} holds a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') can be read."
        )
    splits = read("tokenizer.ggml.pre", "gpt-2")
    if splits not in _PRE_TOKENIZERS:
        raise UsageError(
            f"{path} splits text as {splits!r}; only {', '.join(_PRE_TOKENIZERS)} can be read."
        )
    tokens: list[str] = read("tokenizer.ggml.tokens", [])
    if not tokens:
        raise UsageError(f"{path} holds no tokens (tokenizer.ggml.tokens); convert it again.")
    types: list[int] = read("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges", [])]

    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    backend = Backend(models.BPE(vocab, merges, ignore_merges=splits == "llama-bpe"))
    if splits == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[splits]
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {
        f"{name}_token": tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if (i := read(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    template = read("tokenizer.chat_template")
    config = special | ({} if template is None else {"chat_template": template})
    eos_ids = {
        i for name in ("eos", "eot") if (i := read(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    return Tokenizer(backend, eos_token_ids=sorted(eos_ids), config=config)
