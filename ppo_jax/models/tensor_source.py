"""What models are read from."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ppo_jax.models.config import DecoderConfig


class TensorSource(Protocol):
    """Tensors by Hugging Face name, wherever they come from."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, out: np.ndarray, /) -> None:
        """Fill `out`, a contiguous array of the tensor's shape, in its own type."""

    def are_equal(self, first: str, second: str, /) -> bool:
        """Whether two tensors are stored alike, to the last bit."""

    @property
    def where(self) -> str:
        """How messages call the place of the tensors."""

    @property
    def config_where(self) -> str:
        """How messages call the place of the config."""
