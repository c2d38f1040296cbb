"""jaxllm: an inference engine for large language models on TPU, GPU and CPU, written in JAX.

Names are imported when they are first used: `import jaxllm` loads neither jax nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.async_engine import AsyncEngine
    from jaxllm.beam_search_params import BeamSearchParams
    from jaxllm.config import ModelError
    from jaxllm.llm import LLM
    from jaxllm.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestFailedError,
        RequestMetrics,
        RequestOutput,
    )
    from jaxllm.pooling_params import PoolingParams
    from jaxllm.sampling_params import RequestOutputKind, SamplingParams
    from jaxllm.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "jaxllm.async_engine",
    "BeamSearchParams": "jaxllm.beam_search_params",
    "CompletionOutput": "jaxllm.outputs",
    "EmbeddingOutput": "jaxllm.outputs",
    "EmbeddingRequestOutput": "jaxllm.outputs",
    "LLM": "jaxllm.llm",
    "Logprob": "jaxllm.outputs",
    "ModelError": "jaxllm.config",
    "PoolingParams": "jaxllm.pooling_params",
    "RequestFailedError": "jaxllm.outputs",
    "RequestMetrics": "jaxllm.outputs",
    "RequestOutput": "jaxllm.outputs",
    "RequestOutputKind": "jaxllm.sampling_params",
    "SamplingParams": "jaxllm.sampling_params",
    "StructuredOutputsParams": "jaxllm.structured_outputs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "ModelError",
    "PoolingParams",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
