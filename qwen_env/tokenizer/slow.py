"""Tokenizers of transformers that are written in Python."""

from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken


class SlowBackend:
    """One of them, with the methods of a `tokenizers.Tokenizer` that a `Tokenizer` calls."""

    model = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def no_truncation(self) -> None:
        """Nothing is kept of the last call."""

    def no_padding(self) -> None:
        """Nothing is kept of the last call."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        vocab: dict[str, int] = self.tokenizer.get_vocab()
        return vocab

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        special = self.tokenizer.all_special_ids
        tokens = self.tokenizer.convert_ids_to_tokens(special)
        return {i: AddedToken(t, special=True) for i, t in zip(special, tokens, strict=True)}

    def token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def id_to_token(self, i: int) -> str | None:
        token: str | None = self.tokenizer.convert_ids_to_tokens(i)
        return token

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        return int(self.tokenizer.num_special_tokens_to_add(is_pair))

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return SimpleNamespace(ids=ids)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
