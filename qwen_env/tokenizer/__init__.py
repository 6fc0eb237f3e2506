"""Text to token ids and back: the tokenizer, and where it is loaded from."""

from qwen_env.tokenizer.loading import load_tokenizer
from qwen_env.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
