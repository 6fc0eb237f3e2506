"""A tokenizer from wherever it is: a folder, the hub, a GGUF file, or another package's object."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_env.arguments import integer
from qwen_env.errors import UsageError
from qwen_env.hub import resolve
from qwen_env.tokenizer.gguf import load_gguf_tokenizer
from qwen_env.tokenizer.tokenizer import Tokenizer, special_token_id

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
]
"""What a Hugging Face folder may hold that says something about its tokenizer."""


def load_tokenizer(source: Any) -> Tokenizer:
    """The tokenizer that `source` names or is.

    Args:
        source: a folder in Hugging Face layout, a hub id, a `.gguf` file, a
            `tokenizers.Tokenizer`, a fast tokenizer of `transformers`, or a `Tokenizer`.

    Raises:
        UsageError: it is none of these, or its files are missing or malformed.
        gymnasium.error.DependencyNotInstalled: a `.gguf` file without the `gguf` package.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, tokenizers.Tokenizer):
        return Tokenizer(_copy(source))
    if isinstance(source, str | Path):
        if Path(source).suffix == ".gguf":
            return load_gguf_tokenizer(source)
        return _load_folder(resolve(source, allow_patterns=TOKENIZER_FILES))
    if isinstance(getattr(source, "backend_tokenizer", None), tokenizers.Tokenizer):
        return _from_transformers(source)
    raise UsageError(
        f"tokenizer is a {type(source).__name__}; give a folder, a hub id, a .gguf file, or a "
        "tokenizer of the tokenizers or transformers packages."
    )


def _load_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json; save the tokenizer there with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(folder)) to make one."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exceptions
        raise UsageError(f"{path} is not a tokenizer: {error}.") from error
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    eos_token_ids = _eos_token_ids(folder, backend, config)
    return Tokenizer(backend, eos_token_ids=eos_token_ids, config=config)


def _eos_token_ids(
    folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any]
) -> list[int]:
    """What the model's files say, or else the tokenizer's `eos_token`."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = _read_json(path).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            return [integer(f"eos_token_id in {path}", i) for i in ids]
    eos = special_token_id(backend, config, "eos_token")
    return [] if eos is None else [eos]


def _from_transformers(fast: Any) -> Tokenizer:
    names = ("eos_token", "pad_token", "bos_token", "unk_token", "chat_template")
    config = {name: value for name in names if (value := getattr(fast, name, None)) is not None}
    ids = () if fast.eos_token_id is None else (fast.eos_token_id,)
    return Tokenizer(_copy(fast.backend_tokenizer), eos_token_ids=ids, config=config)


def _copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that nobody else changes."""
    try:
        return copy.deepcopy(backend)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise UsageError(f"the tokenizer cannot be copied: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; it must hold an object.")
    return content
