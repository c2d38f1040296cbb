"""The programs that an engine consists of, each with the shapes of its arguments: what the runner
calls, and what can be compiled, planned and stored without weights or devices."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import Bucket, PackedLayout
from jaxllm.engine.sequence import mask_len
from jaxllm.models.decoder import Model
from jaxllm.quantization.kv_scales import KV_SCALES, measured_scales
from jaxllm.runtime import kv_cache
from jaxllm.runtime.buckets import plan_buckets
from jaxllm.runtime.ranking import Candidates
from jaxllm.runtime.sampler import Logprobs
from jaxllm.runtime.sharding import Placement, device_bytes
from jaxllm.runtime.step import (
    State,
    StepOptions,
    StepOutputs,
    abstract_tables,
    make_step,
    write_table_row,
)

ALLOCATE = "allocate state"
MEASURE_SCALES = "measure scales of keys and values"
WRITE_ROW = "write sampling table row"
FIRST_PROMPT_TOKENS = 128  # the mixed bucket that is compiled first


@dataclass(frozen=True)
class Program:
    """A function and the shapes, with shardings, of its arguments. out: a tree of the result's
    structure, whose leaves are shardings on a mesh. donate: the argument that is given up. key:
    what else decides what it is."""

    name: Hashable
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out: Any
    donate: int | None
    key: tuple[Any, ...]


class StepPrograms:
    """All programs of an engine, for the devices of a placement."""

    def __init__(
        self, model: Model, config: EngineConfig, placement: Placement, options: StepOptions
    ) -> None:
        self.model = model
        self.config = config
        self.placement = placement
        self.buckets = plan_buckets(
            config.max_num_rows,
            config.max_num_batched_tokens,
            with_drafts=config.num_speculative_tokens > 0,
            on_cpu=placement.platform == "cpu",
        )
        self.layouts = {bucket: self._layout(bucket) for bucket in self.buckets}
        self.options = options._replace(mesh=placement.mesh)

    @cached_property
    def parameters(self) -> Any:
        """The tree of parameters as shapes."""
        return self.placement.parameters(self.model.stored_parameters())

    @property
    def weights_read(self) -> int:
        """Bytes of a device's parameters that each step reads: not those of an embedding that is
        only looked up."""
        parameters = self.parameters
        if self.model.config.tie_word_embeddings:
            return device_bytes(parameters)
        return device_bytes({n: p for n, p in parameters.items() if n != "embed"})

    @cached_property
    def state(self) -> State:
        """The device state as shapes."""
        config, model, placement = self.config, self.model, self.placement
        pool = kv_cache.abstract_pool(
            model.config, config.num_blocks, config.block_size, model.kv_dtype, placement.platform,
            self.options.attention,
        )  # fmt: skip
        tables = abstract_tables(model.config, config.max_num_seqs)
        placed = placement.pool(pool, model.config)
        return State(placed, *placement.whole(tables))  # type: ignore[arg-type]

    @cached_property
    def order(self) -> list[Bucket]:
        """The buckets in the order of compilation: first what the first request needs, then the
        one that can run anything."""
        largest = self.largest_bucket
        first_tokens = min(FIRST_PROMPT_TOKENS, largest.num_tokens)
        few = {
            kind: min(b.num_seqs for b in self.buckets if b.decode_only == kind)
            for kind in (False, True)
        }

        def rank(bucket: Bucket) -> tuple[Any, ...]:
            small = bucket.num_seqs == few[bucket.decode_only]
            if small and (bucket.decode_only or bucket.num_tokens == first_tokens):
                return 0, bucket.decode_only
            return 1, bucket != largest, bucket.num_tokens, bucket.decode_only

        return sorted(self.buckets, key=rank)

    @property
    def largest_bucket(self) -> Bucket:
        """The one whose step needs most memory."""
        return max(self.buckets, key=lambda b: (not b.decode_only, b.num_tokens, b.num_seqs))

    @property
    def measured_buckets(self) -> list[Bucket]:
        """Those whose needs stand for all: the one with most tokens, and of those that decode the
        largest and the smallest. A compiler may lay out weights anew for a program that loops, or
        for few rows, and that takes more than activations do."""
        decode = sorted((b for b in self.buckets if b.decode_only), key=lambda b: b.num_seqs)
        return list(dict.fromkeys([self.largest_bucket, decode[-1], decode[0]]))

    def all(self) -> list[Program]:
        """Every program, in the order of compilation."""
        first = [self.allocate()]
        if KV_SCALES in self.parameters:
            first.append(self.measure_scales())
        return [*first, *map(self.step, self.order), self.write_row()]

    def allocate(self) -> Program:
        """() -> the device state with nothing in it."""
        pool: Any
        pool, *tables = state = self.state

        def new_state() -> State:
            zeros = (jnp.zeros(table.shape, table.dtype) for table in tables)
            return State(kv_cache.new_pool(pool), *zeros)

        return Program(ALLOCATE, new_state, (), _shardings(state), None, (*self._key, state))

    def measure_scales(self) -> Program:
        """The leaves of the parameters but for the scales -> the scales."""
        parameters = dict(self.parameters)
        scales = parameters.pop(KV_SCALES)
        leaves, tree = jax.tree.flatten(parameters)

        def measure(leaves: tuple[jax.Array, ...]) -> jax.Array:
            return measured_scales(self.model, jax.tree.unflatten(tree, leaves))

        out = _shardings(scales)
        return Program(MEASURE_SCALES, measure, (tuple(leaves),), out, None, self._key)

    def pool(self) -> Program:
        """() -> the block pool alone; its size is what a device stores, padding included."""
        pool: Any = self.state.kv_pool

        def new_pool() -> jax.Array:
            return kv_cache.new_pool(pool)

        return Program("pool", new_pool, (), _shardings(pool), None, (pool,))

    def step(self, bucket: Bucket) -> Program:
        """The step of a bucket."""
        layout = self.layouts[bucket]
        packed = self._whole((layout.size,), jnp.int32)
        masks = self._whole((bucket.num_seqs, mask_len(self.model.config.vocab_size)), jnp.int32)
        leaves = tuple(jax.tree.leaves(self.parameters))
        logprobs = Logprobs(0, 0, 0, 0)  # type: ignore[arg-type]
        candidates = Candidates(0, 0)  # type: ignore[arg-type]
        outputs = StepOutputs(0, 0, logprobs, logprobs, candidates)  # type: ignore[arg-type]
        out = (_shardings(self.state), jax.tree.map(lambda _: packed.sharding or False, outputs))
        step = make_step(self.model, layout, self.options)
        key = (*self._key, layout)
        return Program(bucket, step, (leaves, self.state, packed, masks), out, 1, key)

    def write_row(self) -> Program:
        """write_table_row"""
        state = self.state
        row = (
            self._whole((), jnp.int32),
            self._whole(state.token_info.shape[1:], jnp.int32),
            self._whole(state.logit_bias.shape[1:], jnp.float32),
        )
        out = _shardings(state)
        return Program(WRITE_ROW, write_table_row, (state, *row), out, 0, self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        model = self.model
        types = (str(model.dtype), model.quantization, str(model.kv_dtype))
        return (model.config, model.layer_loop, *types, self.options)

    def _layout(self, bucket: Bucket) -> PackedLayout:
        max_steps = self.config.max_steps_per_dispatch if bucket.decode_only else 1
        max_drafts = 0 if bucket.decode_only else self.config.num_speculative_tokens
        return PackedLayout(bucket, self.config.max_blocks_per_seq, max_steps, max_drafts)

    def _whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return self.placement.whole(jax.ShapeDtypeStruct(shape, dtype))


def _shardings(tree: Any) -> Any:
    """None is no leaf to jax.tree, and an array on one device has no sharding: False stands in."""
    return jax.tree.map(lambda leaf: leaf.sharding or False, tree)
