"""What a user may say about an engine. No jax: the command line reads it before it starts one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NGRAM, DRAFT = "ngram", "draft:"  # the latter before a model's name
DEFAULT_SPECULATIVE_TOKENS = 7  # with the token before them as many rows as products are padded to
MAX_SPECULATIVE_TOKENS = 31
KV_CACHE_DTYPES = {
    "int8": "int8", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may say about an engine; None or "auto" is resolved by `start_engine`.

    dtype: "auto" (float32 for a float32 checkpoint, else bfloat16), "bfloat16" or "float32".
    quantization: "int8" (weights of 8 bits with a scale a channel, see quantization/int8.py) or
        None.
    kv_cache_dtype: of stored keys and values: "auto" (dtype), "int8", "fp8" (or "fp8_e4m3") or
        "fp8_e5m2", with scales that are measured at start-up (quantization/kv_scales.py).
    max_model_len: longest sequence in tokens; None: what the model was made for.
    max_num_seqs: most sequences of a step; None: 64 on CPU, else 256.
    max_num_batched_tokens: token budget of a step; None: 512 on CPU, else 2048.
    block_size: tokens of a block, the unit that the prefix cache shares; None: 32 on TPU, else 16.
    kv_cache_memory_bytes: size of the block pool on each device; None: what memory allows (see
        runtime/memory.py).
    tensor_parallel_size: devices that share the model (see runtime/sharding.py).
    overlap: schedule and dispatch a step while the one before it runs.
    max_steps_per_dispatch: most tokens of each sequence that the device decodes at a time, while
        nothing waits; None: 1 on CPU, else 4.
    speculative: "ngram" (guess that what came after the last few tokens before comes again, and
        verify several such tokens in one step), "draft:MODEL" (what a smaller model with the same
        vocabulary, named like any model, says) or None.
    num_speculative_tokens: most tokens of a sequence that a step verifies; None: 7.
    compilation: "background" (start with the first few buckets; the others follow after the first
        step), "ahead" (start when all are compiled) or "on_demand" (only what is used).
    compiled: folder of programs that `jaxllm compile` made; nothing is compiled then. Such files
        are code: name only a folder that you trust.
    forbid_compile: compile all ahead; from then on a compilation during a step is an error.
    attention: implementation of attention; None: the best of the platform.
    layer_loop: "auto" ("packed" on CPU in bfloat16, if its kernels were built, and "switch" if not;
        else "scan"), "packed", "switch" or "scan".
    cache_dir: folder for fetched models and compiled programs; None: the user's cache folder.
    program_cache: keep compiled programs on disk.
    profile_dir: folder for a trace of the run, written when the engine is closed: timeline.json
        (what the engine did when) and JAX's profile.

    Raises ValueError naming the option, its value and what would do.
    """

    tokenizer: str | Path | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_memory_bytes: int | None = None
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    max_num_waiting: int | None = None
    seed: int = 0
    overlap: bool = True
    max_steps_per_dispatch: int | None = None
    speculative: str | None = None
    num_speculative_tokens: int | None = None
    compilation: str = "background"
    compiled: str | Path | None = None
    forbid_compile: bool = False
    attention: str | None = None
    layer_loop: str = "auto"
    cache_dir: str | Path | None = None
    program_cache: bool = True
    profile_dir: str | Path | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_speculation()

    def _check_types(self) -> None:
        def check(name: str, is_right: bool, expected: str) -> None:
            if not is_right:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("enable_prefix_caching", "overlap", "forbid_compile", "program_cache"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        for name in ("revision", "attention"):
            check(name, isinstance(getattr(self, name), str | None), "a string or None")
        for name in ("tokenizer", "cache_dir", "profile_dir", "compiled"):
            check(name, isinstance(getattr(self, name), str | Path | None), "a path or None")
        check("seed", type(self.seed) is int, "an integer")

    def _check_choices(self) -> None:
        for name, choices in (
            ("dtype", ("auto", "bfloat16", "float32")),
            ("quantization", (None, "int8")),
            ("kv_cache_dtype", ("auto", *KV_CACHE_DTYPES)),
            ("layer_loop", ("auto", "packed", "switch", "scan")),
            ("scheduling_policy", ("fcfs", "priority")),
            ("compilation", ("background", "ahead", "on_demand")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
            "kv_cache_memory_bytes", "tensor_parallel_size", "max_num_waiting",
            "max_steps_per_dispatch", "num_speculative_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value is not None and not is_count:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def _check_speculation(self) -> None:
        if self.speculative not in (NGRAM, None) and not self.draft_model:
            raise ValueError(
                f"speculative must be 'ngram', 'draft:MODEL' with the name of a smaller model, or "
                f"None, got {self.speculative!r}"
            )
        if self.draft_model and self.compiled is not None:
            raise ValueError(
                "compiled is for one model, so it cannot be combined with a draft model; leave one "
                "of them out, or use speculative='ngram'"
            )
        count = self.num_speculative_tokens
        if count is not None and self.speculative is None:
            raise ValueError(
                f"num_speculative_tokens {count} has no effect without speculation; set "
                f"speculative='ngram'"
            )
        if count is not None and count > MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {count}"
            )

    @property
    def draft_model(self) -> str | None:
        """The name of the model that makes drafts, if one does."""
        method = self.speculative
        if not isinstance(method, str) or not method.startswith(DRAFT):
            return None
        return method.removeprefix(DRAFT).strip() or None

    @property
    def max_drafts(self) -> int:
        """Most drafts of a sequence in a step."""
        if self.speculative is None:
            return 0
        return self.num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS
