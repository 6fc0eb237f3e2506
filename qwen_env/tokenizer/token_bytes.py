"""The bytes that each token stands for, whatever stands around it."""

import json
from collections.abc import Callable
from typing import Any

from qwen_env.errors import UsageError


def token_bytes(backend: Any) -> dict[int, bytes]:
    """What each id adds to a decoded text: part of a character, perhaps. Special tokens add none.

    Of SentencePiece's tokenizers, a leading space is the token's own: decoding leaves it out only
    at the beginning of a text, which a response is not.

    Args:
        backend: a `tokenizers.Tokenizer`.

    Raises:
        UsageError: the tokenizer is of a kind whose tokens have other text beside other tokens.
    """
    to_bytes = _decoder(backend)
    special = special_tokens(backend)
    return {
        i: b"" if i in special else to_bytes(token)
        for token, i in backend.get_vocab(with_added_tokens=True).items()
    }


def special_tokens(backend: Any) -> dict[int, str]:
    """The tokens that decoding leaves out."""
    added = backend.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special}


def _decoder(backend: Any) -> Callable[[str], bytes]:
    """From a token, as the vocabulary spells it, to its bytes."""
    decoder = getattr(backend, "decoder", None)
    whole: Any = {"type": None} if decoder is None else json.loads(decoder.__getstate__())
    steps: list[Any] = whole["decoders"] if whole["type"] == "Sequence" else [whole]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _from_byte_level
    spellings: list[tuple[str, str]] = []
    has_bytes = is_joined = False
    for step in steps:
        match step:
            case {"type": "Metaspace", "replacement": spelling}:
                spellings.append((spelling, " "))
            case {"type": "Replace", "pattern": {"String": spelling}, "content": text} if (
                not is_joined
            ):
                spellings.append((spelling, text))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                is_joined = True
            case {"type": "Strip", "stop": 0} if is_joined:
                pass  # of the text's first characters
            case _:
                raise UsageError(
                    "stop needs a tokenizer whose tokens stand for fixed text (byte-level, or "
                    f"SentencePiece's), but this one's decoder is {step['type']}; leave stop out."
                )

    def from_sentencepiece(token: str) -> bytes:
        if has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for spelling, text in spellings:
            token = token.replace(spelling, text)
        return token.encode()

    return from_sentencepiece


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:  # an added token, which is spelled as it is
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others come from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_level_alphabet()
