"""How the embedding of one request is made of its tokens' hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.request_error import RequestError

POOLINGS = ("mean", "last")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """Options of one embedding.

    pooling: "mean" of the final-normed hidden states of all prompt tokens, or the "last" token's.
    normalize: divide by the Euclidean norm. dimensions: keep only that many leading numbers, before
    the division; None keeps all. Raises ValueError naming the field, the value and what would do.
    """

    pooling: str = "mean"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pooling, str) or self.pooling not in POOLINGS:
            raise RequestError(
                f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}",
                param="pooling",
            )
        if not isinstance(self.normalize, bool):
            raise RequestError(
                f"normalize must be True or False, got {self.normalize!r}", param="normalize"
            )
        if self.dimensions is not None and (
            type(self.dimensions) is not int or self.dimensions < 1
        ):
            raise RequestError(
                f"dimensions must be a positive integer, got {self.dimensions!r}",
                param="dimensions",
            )

    def check_size(self, hidden_size: int) -> None:
        """Raises ValueError if the model has fewer numbers than are asked for."""
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise RequestError(
                f"dimensions must be between 1 and {hidden_size}, the model's hidden size, "
                f"got {self.dimensions}",
                param="dimensions",
            )

    def finish(self, pooled: np.ndarray) -> np.ndarray:
        """The embedding of a pooled hidden state [E] float32. Raises ArithmeticError for one that
        is not finite."""
        embedding = pooled[: self.dimensions].astype(np.float32)  # [dimensions], a copy
        if not np.isfinite(embedding).all():
            raise ArithmeticError("the hidden states are not finite")
        if self.normalize:
            norm = np.linalg.norm(embedding.astype(np.float64))  # squares may exceed float32
            embedding = (embedding / (norm or 1.0)).astype(np.float32)
        return embedding
