"""From the architecture that a checkpoint names to the model that runs it."""

from __future__ import annotations

from jax.typing import DTypeLike

from jaxllm.config import ModelConfig, ModelError
from jaxllm.models.decoder import LayerLoop, Model

# One decoder serves them all: biases, head norms, windows and rotation are fields of ModelConfig.
ARCHITECTURES: dict[str, type[Model]] = {
    "LlamaForCausalLM": Model,
    "MistralForCausalLM": Model,
    "Qwen2ForCausalLM": Model,
    "Qwen3ForCausalLM": Model,
}


def build_model(config: ModelConfig, *, layer_loop: LayerLoop, dtype: DTypeLike) -> Model:
    """The model of config.architecture with parameters and activations in dtype (float32 or
    bfloat16). Raises ModelError for an architecture that is not supported."""
    model = ARCHITECTURES.get(config.architecture)
    if model is None:
        raise ModelError(
            f"architecture {config.architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return model(config, layer_loop, dtype)
