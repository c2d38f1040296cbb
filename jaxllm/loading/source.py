"""What a checkpoint of any format looks like to the loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Named tensors under Hugging Face names, read when asked for; safe to read from threads."""

    @property
    def description(self) -> str:
        """The file or folder, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape; linear weights are [out, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of a tensor's first axis: float32, float16 or bfloat16 as stored, float32
        where the file has quantised values. Raises ModelError when the file cannot give them."""
