"""A tokenizer from wherever it is: a folder, the hub, a GGUF file, or another package's object."""

import copy
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_env.arguments import integer
from qwen_env.errors import UsageError, reason
from qwen_env.files import is_file, read_json, read_text
from qwen_env.hub import resolve
from qwen_env.tokenizer.chat import import_transformers
from qwen_env.tokenizer.gguf import load_gguf_tokenizer
from qwen_env.tokenizer.slow import SlowBackend
from qwen_env.tokenizer.tokenizer import (
    Tokenizer,
    named_tokens,
    rust_errors,
    special_token_id,
)

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "config.json",
    # Instead of tokenizer.json, which transformers makes of them.
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
]
"""What a Hugging Face folder may hold that says something about its tokenizer."""

_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def load_tokenizer(source: Any) -> Tokenizer:
    """The tokenizer that `source` names or is.

    Args:
        source: a folder in Hugging Face layout, a hub id, a `.gguf` file, a
            `tokenizers.Tokenizer`, a tokenizer of `transformers`, or a `Tokenizer`.

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
    transformers = sys.modules.get("transformers")  # imported, if this is one of its tokenizers
    if transformers and isinstance(source, transformers.PreTrainedTokenizerBase):
        return _from_transformers(_copy(source))
    raise UsageError(
        f"tokenizer is a {type(source).__name__}; give a folder, a hub id, a .gguf file, or a "
        "tokenizer of the tokenizers or transformers packages."
    )


def _load_folder(folder: Path) -> Tokenizer:
    config = _config(folder)
    path = folder / "tokenizer.json"
    backend = None
    if is_file(path):
        with rust_errors(f"{path} is not a tokenizer"):
            backend = tokenizers.Tokenizer.from_file(str(path))
    listed = config.get("added_tokens_decoder") or {}
    renderer = None
    if backend is None or not _says_it_all(backend, config, folder):
        renderer = _load_with_transformers(folder)
        backend, config = _backend(renderer), _config_of(renderer)
    for i, token in listed.items():
        text = token["content"]
        if str(backend.token_to_id(text)) != i:
            raise UsageError(
                f"tokenizer_config.json of {folder} says that {reprlib.repr(text)} has the id {i}, "
                f"but the tokenizer has given it {backend.token_to_id(text)}; save it again."
            )
    eos_token_ids = _eos_token_ids(folder, backend, config)
    return Tokenizer(backend, eos_token_ids=eos_token_ids, config=config, renderer=renderer)


def _config(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` holds, with what belongs to it in files of their own."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if "added_tokens_decoder" not in config:  # as old versions of transformers wrote it
        config |= read_json(folder / "special_tokens_map.json")
    if config.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
        raise UsageError(f"{path} names fast_tokenizer_files; only tokenizer.json can be read.")
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping) or not all(
        isinstance(token, Mapping) and isinstance(token.get("content"), str)
        for token in listed.values()
    ):
        raise UsageError(f"added_tokens_decoder in {path} must give each id an object of a token.")
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and not isinstance(text, str):
            raise UsageError(
                f"{name} in {path} is {reprlib.repr(token)}; it must be the text of a token."
            )
    templates = {
        file.stem: read_text(file)
        for file in sorted(folder.glob("additional_chat_templates/*.jinja"))
        if is_file(file)
    }
    if is_file(template := folder / "chat_template.jinja"):
        templates["default"] = read_text(template)
    if templates:
        has_one = templates.keys() == {"default"}
        config["chat_template"] = templates["default"] if has_one else templates
    return config


def _says_it_all(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the tokenizer proper has every token that its configuration asks for, as it asks.

    Mostly it has. Otherwise transformers adds what is missing, but it takes a second to import.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    try:
        special = list(named_tokens(config).values())
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(name) or ()
            special += () if isinstance(more, Mapping) else more
        wanted = [_flags(token) for token in listed.values()]
        names = {flags["content"] for flags in wanted} or known.keys()
        for token in special:
            if isinstance(token, str):
                token = known[token].__getstate__() if token in names else {}
            if token is not None:
                wanted.append(_flags(token) | {"special": True})
        has_all = all(flags == known[flags["content"]].__getstate__() for flags in wanted)
    except (AttributeError, KeyError, TypeError):  # an unknown token, or no token at all
        return False
    if "added_tokens_decoder" not in config:
        has_all &= read_json(folder / "added_tokens.json").keys() <= known.keys()
    begins_with_space = config.get("add_prefix_space")
    if begins_with_space is not None:
        state = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
        has_all &= bool(begins_with_space) == (b'"add_prefix_space":true' in state)
    return has_all and not config.get("split_special_tokens")


def _flags(token: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a token in a configuration, of which some may have been left out."""
    known = tokenizers.AddedToken("").__getstate__().keys()
    fields = {name: value for name, value in token.items() if name in known}
    state: dict[str, Any] = tokenizers.AddedToken(**fields).__getstate__()
    return state


def _load_with_transformers(folder: Path) -> Any:
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # there are many ways to be malformed
        if is_file(folder / "tokenizer.json"):
            raise UsageError(
                f"{folder} holds a tokenizer that transformers cannot load: {reason(error)}."
            ) from error
        raise _no_tokenizer(folder, reason(error)) from error
    # Some classes are content without the files that they are made of: with no vocabulary.
    sources = {n: folder / file for n, file in type(tokenizer).vocab_files_names.items()}
    whole = sources.pop("tokenizer_file", folder / "tokenizer.json")
    missing = [file.name for file in sources.values() if not is_file(file)]
    if missing and not is_file(whole):
        raise _no_tokenizer(folder, f"there is no {missing[0]}")
    return tokenizer


def _no_tokenizer(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"{folder} has no tokenizer.json, and transformers cannot make it of the other files "
        f"({why}); AutoTokenizer.from_pretrained(...).save_pretrained(folder) puts one there."
    )


def _from_transformers(tokenizer: Any) -> Tokenizer:
    config = _config_of(tokenizer)
    ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return Tokenizer(_backend(tokenizer), eos_token_ids=ids, config=config, renderer=tokenizer)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, tokenizers.Tokenizer) else SlowBackend(tokenizer)


def _config_of(tokenizer: Any) -> dict[str, Any]:
    """What there is to know about a tokenizer of transformers beyond its backend."""
    names = ("chat_template", "clean_up_tokenization_spaces", "split_special_tokens")
    return {**tokenizer.special_tokens_map, **{name: getattr(tokenizer, name) for name in names}}


def _eos_token_ids(folder: Path, backend: Any, config: Mapping[str, Any]) -> list[int]:
    """What the model's files say, or else the tokenizer's `eos_token`."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(path).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            return [integer(f"eos_token_id in {path}", i) for i in ids]
    eos = special_token_id(backend, config, "eos_token")
    return [] if eos is None else [eos]


def _copy(tokenizer: Any) -> Any:
    """A copy that nobody else changes."""
    with rust_errors("the tokenizer cannot be copied"):
        return copy.deepcopy(tokenizer)
