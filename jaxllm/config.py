"""What a model is and how an engine is set up: frozen dataclasses, no jax.

Everything that is "auto" for the user is resolved before one of these is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Far above every model there is. A file that claims more is wrong, and is told so before anything
# as large is made; the products of these stay below 2 ** 63.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_layers": 1 << 12,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 27,
}
LARGEST_ROPE_FACTOR = 1 << 20


class ModelError(ValueError):
    """A model's files cannot be used; the message says which file, what is wrong, what would do."""


def check_size(name: str, value: int, largest: int) -> None:
    """Raises ModelError unless value is an integer from 1 to largest."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive integer, got {value!r}")
    if value > largest:
        raise ModelError(f"{name} must be at most {largest}, got {value}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, in the terms of Hugging Face's ``rope_parameters``.

    ``factor`` is used by every type but ``default``; ``low_freq_factor`` and ``high_freq_factor``
    by ``llama3``; ``beta_*``, ``attention_factor``, ``mscale*`` and ``truncate`` by ``yarn``.
    ``original_max_position_embeddings`` is the context length of the pre-training.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ModelError(
                f"rope_type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        if not 0 < self.theta < math.inf:
            raise ModelError(f"rope_theta must be positive and finite, got {self.theta}")
        if not 0 < self.factor <= LARGEST_ROPE_FACTOR:
            raise ModelError(
                f"rope scaling factor must be positive and at most {LARGEST_ROPE_FACTOR}, "
                f"got {self.factor}"
            )
        if self.original_max_position_embeddings is not None:
            check_size(
                "original_max_position_embeddings",
                self.original_max_position_embeddings,
                LARGEST["max_position_embeddings"],
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Letters as everywhere: L layers, E model width, F feed-forward width,
    H query heads, K key/value heads, D head size, V vocabulary.

    Raises ModelError when the sizes contradict each other or are beyond LARGEST.
    """

    architecture: str  # the name in config.json's "architectures"
    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each query and key head (Qwen3)
    sliding_windows: tuple[int, ...] = ()  # one a layer, 0 = no window; () = no layer has one
    eos_token_ids: tuple[int, ...] = ()
    checkpoint_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            check_size(name, getattr(self, name), largest)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not 0 < self.rms_norm_eps < 1:
            raise ModelError(f"rms_norm_eps must be in (0, 1), got {self.rms_norm_eps!r}")
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ModelError(
                f"sliding_windows has {len(self.sliding_windows)} entries for "
                f"{self.num_layers} layers"
            )
        if any(window < 0 for window in self.sliding_windows):
            raise ModelError(f"sliding_windows must not be negative, got {self.sliding_windows}")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(
                    f"eos_token_id {token_id} is outside the vocabulary of {self.vocab_size}"
                )

    @property
    def max_context_len(self) -> int:
        """The longest sequence that the positions are made for. ``linear`` and ``dynamic`` stretch
        max_position_embeddings, ``yarn`` the original length; ``llama3`` checkpoints already say
        the stretched length. Never more than LARGEST allows for max_position_embeddings."""
        longest, rope = self.max_position_embeddings, self.rope
        if rope.rope_type in ("linear", "dynamic"):
            longest = max(1, int(longest * rope.factor))
        if rope.rope_type == "yarn":
            original = rope.original_max_position_embeddings or longest
            longest = max(longest, int(original * rope.factor))
        return min(longest, LARGEST["max_position_embeddings"])

    def window(self, layer: int) -> int:
        """The sliding window of a layer in tokens; 0 means that it sees the whole context."""
        return self.sliding_windows[layer] if self.sliding_windows else 0


@dataclass(frozen=True)
class EngineConfig:
    """The limits of one engine, all resolved to numbers.

    num_blocks: blocks of the pool, N; block 0 .. N-1 are all usable.
    block_size: tokens of a block, B.
    max_model_len: longest sequence, prompt and output together, in tokens.
    max_num_seqs: most sequences in one step, and the number of slots.
    max_num_batched_tokens: token budget of one step.
    policy: "fcfs" or "priority" (a smaller priority runs earlier, ties by arrival).
    overlap: schedule and dispatch a step while the one before it runs.
    max_steps_per_dispatch: how many tokens of each sequence the device may decode at a time.
    num_speculative_tokens: how many drafts of a sequence one step may verify; 0: no speculation.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    seed: int = 0
    overlap: bool = True
    max_steps_per_dispatch: int = 1
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        for name in (
            "num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            "max_steps_per_dispatch",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.num_speculative_tokens, int) or self.num_speculative_tokens < 0:
            raise ValueError(
                f"num_speculative_tokens must not be negative, got {self.num_speculative_tokens!r}"
            )
        if self.policy not in ("fcfs", "priority"):
            raise ValueError(f"policy must be 'fcfs' or 'priority', got {self.policy!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or a step could not decode them all"
            )
        if self.max_num_batched_tokens <= self.num_speculative_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be more than "
                f"num_speculative_tokens ({self.num_speculative_tokens}), or no step could verify "
                f"them all"
            )
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"the block pool holds {self.num_blocks * self.block_size} tokens, fewer than one "
                f"sequence of max_model_len {self.max_model_len}; lower max_model_len or give the "
                f"pool more memory"
            )

    @property
    def max_num_rows(self) -> int:
        """How many tokens a step may sample: one for each sequence, or for one with its drafts."""
        return max(self.max_num_seqs, 1 + self.num_speculative_tokens)

    @property
    def max_blocks_per_seq(self) -> int:
        """M, the width of a block table."""
        return -(-self.max_model_len // self.block_size)
