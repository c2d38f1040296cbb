"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share; what differs between them is data.

Modules only describe the parameters and the arithmetic. What runs is a plain nested dict of arrays:
graph definitions are made once, and a module is merged with its part of the dict while tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from jaxllm.models import merging, packing
from jaxllm.models.attention import Attention
from jaxllm.models.layers import PACKED, Call, Embedding, FeedForward, Head, RMSNorm
from jaxllm.models.rope import build_rope, rope_tables, rotated_heads
from jaxllm.quantization import int8, kv_scales
from jaxllm.quantization.kv_scales import KV_SCALES
from jaxllm.runtime.sharding import kv_repeats, with_repeated_kv_heads

LayerLoop = Literal["switch", "scan", "packed"]
Parameters = dict[str, Any]  # nested; the leaves are arrays or their shapes
Tables = tuple[jax.Array, jax.Array]  # cos, sin: each [T, D/2]
# attend(q[T,H,D], k[T,K,D], v[T,K,D], kv_pool, layer, window) -> (out[T,H,D], kv_pool)
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, Any, jax.Array, int | jax.Array], tuple[jax.Array, Any]
]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each on normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = FeedForward(config, dtype, rngs)

    def before(self, x: jax.Array, call: Call) -> jax.Array:
        """[T, E] -> [T, K, G+2, D]: queries, key and value of each group, not yet rotated."""
        return self.attention.heads(self.attention_norm(x), call)

    def after(self, x: jax.Array, mixed: jax.Array, call: Call) -> jax.Array:
        """The residual stream [T, E] with attention's result [T, H, D] and the feed-forward."""
        x = x + self.attention.output(mixed, call)
        return x + self.mlp(self.mlp_norm(x), call)


class Ends(nnx.Module):
    """What lies before the first layer and after the last."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embed = Embedding(config, dtype, rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tie_word_embeddings else Head(config, dtype, rngs)

    def logits(self, hidden: jax.Array, call: Call) -> jax.Array:
        """[R, E] -> [R, V] float32."""
        head = self.embed.attend if self.head is None else self.head
        return head(hidden, call)


def can_pack(config: ModelConfig, dtype: DTypeLike) -> bool:
    """Whether a model can have layer_loop "packed"."""
    is_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16
    return is_bfloat16 and not config.mlp_bias and packing.can_pack(config)


class Model:
    """A decoder as pure functions of its parameters.

    Layers run in a loop, so that what has no weights is compiled once. layer_loop says where the
    weights are. "switch": parameters["layers"] holds one dict a layer under "0", "1", ..., and the
    loop's body switches between them; for the CPU, where XLA would copy and convert each slice of a
    stacked array. "scan": one dict whose leaves are stacked along a leading axis of L; for
    accelerators, where the slices are free. "packed": the same with kernels in the layout of the
    CPU's own products (see packing.py), which read a layer's kernel in the stacked array; only in
    bfloat16.

    num_devices: that share the model. Where they are more than its key and value heads, config has
    as many copies of each head, one after the other, as devices share it.

    quantization: "int8" for the kernels of quantization/int8.py, or None. kv_dtype: of stored keys
    and values, None for dtype; one of 8 bits has scales, which are parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_loop: LayerLoop,
        dtype: DTypeLike,
        num_devices: int = 1,
        *,
        quantization: str | None = None,
        kv_dtype: DTypeLike | None = None,
    ) -> None:
        if layer_loop not in get_args(LayerLoop):
            raise ValueError(f"layer_loop must be 'switch', 'scan' or 'packed', got {layer_loop!r}")
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
        if layer_loop == "packed" and not can_pack(config, dtype):
            raise ValueError(
                f"layer_loop 'packed' needs bfloat16 (got {jnp.dtype(dtype).name}), even sizes and "
                f"a feed-forward without bias; use 'switch'"
            )
        if layer_loop == "packed" and num_devices > 1:
            raise ValueError("layer_loop 'packed' is for one device; use 'scan'")
        if quantization not in (None, "int8"):
            raise ValueError(f"quantization must be 'int8' or None, got {quantization!r}")
        if layer_loop == "packed" and quantization is not None:
            raise ValueError("layer_loop 'packed' has no quantized kernels; use 'switch'")
        self.loaded_config = config  # as in the checkpoint
        self.num_devices = num_devices
        self._kv_repeats = kv_repeats(config, num_devices)
        self.config = with_repeated_kv_heads(config, self._kv_repeats)
        self.layer_loop = layer_loop
        self.dtype = jnp.dtype(dtype)
        self.quantization = quantization
        # What several devices share is for XLA to divide, which cannot divide quantized_matmul.
        self._in_place = (
            quantization is not None
            and layer_loop == "scan"
            and num_devices == 1
            and self.dtype == jnp.bfloat16
        )
        self.kv_dtype = jnp.dtype(self.dtype if kv_dtype is None else kv_dtype)
        self._rope = build_rope(config)
        self._ends_def, self._abstract_ends = self._abstract(Ends, config)
        _, self._abstract_layer = self._abstract(DecoderLayer, config)
        self._layer_def, _ = self._abstract(DecoderLayer, self.config)

    def _abstract(
        self, module: Callable[..., nnx.Module], config: ModelConfig
    ) -> tuple[nnx.GraphDef[Any], Parameters]:
        def build() -> nnx.Module:
            return module(config, self.dtype, rngs=nnx.Rngs(0))

        graphdef, state = nnx.split(nnx.eval_shape(build))
        return graphdef, nnx.to_pure_dict(state)

    def abstract_parameters(self) -> Parameters:
        """The tree of parameters as it is loaded, with a jax.ShapeDtypeStruct for each leaf;
        allocates nothing."""
        num_layers = self.config.num_layers
        if self.layer_loop == "switch":
            layers = {str(i): _shapes(self._abstract_layer) for i in range(num_layers)}
        else:
            layers = _shapes(self._abstract_layer, leading=(num_layers,))
        return {**_shapes(self._abstract_ends), "layers": layers}

    def stored_parameters(self) -> Parameters:
        """The same tree with the shapes that `forward` takes, and the scales of keys and values of
        8 bits, which are measured when all else is there."""
        stored = jax.tree.map_with_path(
            lambda path, leaf: self._stored_shape(leaf, _names(path)), self.abstract_parameters()
        )
        if kv_scales.has_scales(self.kv_dtype):
            stored[KV_SCALES] = kv_scales.abstract_scales(self.config)
        return stored

    def _stored_shape(
        self, leaf: Any, path: tuple[Any, ...]
    ) -> jax.ShapeDtypeStruct | int8.Int8Kernel:
        if self.layer_loop == "packed":
            return packing.stored_shape(leaf, path, self.config)
        shape = merging.stored_shape(leaf, path[-1], self._kv_repeats, self.num_devices)
        return int8.quantized_shape(shape) if self._is_quantized(path) else shape

    def stored(self, array: np.ndarray, path: tuple[Any, ...]) -> np.ndarray | int8.Int8Kernel:
        """A leaf that was loaded as `forward` takes it. path: its keys from the root of the
        tree."""
        if self.layer_loop == "packed":
            return packing.stored(array, path, self.config)
        kernel = merging.stored(array, path[-1], self._kv_repeats, self.num_devices)
        return int8.quantized(kernel) if self._is_quantized(path) else kernel

    def _is_quantized(self, path: tuple[Any, ...]) -> bool:
        return self.quantization is not None and path[-1] in int8.KERNELS

    def init_parameters(self, key: jax.Array) -> Parameters:
        """Parameters for tests and benchmarks: random kernels, norms of one, biases of zero.

        All layer loops draw the same values from a key.
        """
        stored = jax.tree.map_with_path(
            lambda path, leaf: self.stored(np.asarray(leaf), _names(path)),
            self._random_parameters(key),
        )
        return jax.tree.map(jnp.asarray, stored)

    def _random_parameters(self, key: jax.Array) -> Parameters:
        ends_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_layers)
        if self.layer_loop == "switch":
            init_layer = jax.jit(lambda k: self._random(DecoderLayer, k))
            layers = {str(i): init_layer(layer_key) for i, layer_key in enumerate(layer_keys)}
        else:
            layers = jax.jit(jax.vmap(lambda k: self._random(DecoderLayer, k)))(layer_keys)
        return {**jax.jit(lambda k: self._random(Ends, k))(ends_key), "layers": layers}

    def _random(self, module: Callable[..., nnx.Module], key: jax.Array) -> Parameters:
        built = module(self.loaded_config, self.dtype, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(built, nnx.Param))

    def forward(
        self,
        params: Parameters,
        token_ids: jax.Array,
        positions: jax.Array,
        rope_lens: jax.Array,
        kv_pool: Any,
        attend: Attend,
        num_tokens: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Any]:
        """The normed hidden states [T, E] of token_ids [T], and the pool with their keys, values.

        positions [T]: a token's index in its sequence. rope_lens [T]: max(prompt length of its
        sequence, position + 1). attend gets a layer's queries, keys and values with the pool, the
        layer's number, which is traced, and its window (0: none), which is traced only if layers
        differ in it. num_tokens: those that are no padding, None: all; padding may cost less. Call
        it inside a trace.
        """
        num_rows = token_ids.shape[0] if num_tokens is None else num_tokens
        ends = nnx.merge(self._ends_def, _of_ends(params))
        tables = rope_tables(self._rope, positions, rope_lens)
        x = ends.embed(token_ids)  # [T, E]
        run_layers = self._switch if self.layer_loop == "switch" else self._scan
        x, kv_pool = run_layers(params["layers"], x, num_rows, tables, kv_pool, attend)
        return ends.final_norm(x), kv_pool

    def logits(
        self, params: Parameters, hidden: jax.Array, num_rows: jax.Array | int | None = None
    ) -> jax.Array:
        """The logits [R, V] float32 of rows [R, E] that `forward` returned. num_rows: those that
        are wanted, None: all."""
        ends = nnx.merge(self._ends_def, _of_ends(params))
        wanted = hidden.shape[0] if num_rows is None else num_rows
        return ends.logits(hidden, Call(0, wanted, self._in_place))

    def _switch(
        self,
        layers: Parameters,
        x: jax.Array,
        num_rows: jax.Array | int,
        tables: Tables,
        kv_pool: Any,
        attend: Attend,
    ) -> tuple[jax.Array, Any]:
        modules = [
            nnx.merge(self._layer_def, layers[str(i)]) for i in range(self.config.num_layers)
        ]

        def body(
            carry: tuple[jax.Array, Any], scanned: tuple[jax.Array, jax.Array | None]
        ) -> tuple[tuple[jax.Array, Any], None]:
            x, kv_pool = carry
            i, window = scanned
            call = Call(i, num_rows)
            qkv = lax.switch(i, [partial(m.before, call=call) for m in modules], x)
            mixed, kv_pool = self._attend(qkv, tables, kv_pool, attend, i, window)
            after = [partial(m.after, call=call) for m in modules]
            return (lax.switch(i, after, x, mixed), kv_pool), None

        carry, _ = lax.scan(body, (x, kv_pool), self._layer_numbers())
        return carry

    def _scan(
        self,
        layers: Parameters,
        x: jax.Array,
        num_rows: jax.Array | int,
        tables: Tables,
        kv_pool: Any,
        attend: Attend,
    ) -> tuple[jax.Array, Any]:
        leaves, tree = jax.tree.flatten(layers, is_leaf=_is_int8)
        is_whole = [self._is_read_in_place(leaf) for leaf in leaves]
        sliced = [leaf for leaf, whole in zip(leaves, is_whole, strict=True) if not whole]

        def body(
            carry: tuple[jax.Array, Any],
            scanned: tuple[list[jax.Array], tuple[jax.Array, jax.Array | None]],
        ) -> tuple[tuple[jax.Array, Any], None]:
            x, kv_pool = carry
            slices, (i, window) = iter(scanned[0]), scanned[1]
            own = [
                leaf if whole else next(slices)
                for leaf, whole in zip(leaves, is_whole, strict=True)
            ]
            layer = nnx.merge(self._layer_def, jax.tree.unflatten(tree, own))
            call = Call(i, num_rows, self._in_place)
            qkv = layer.before(x, call)
            mixed, kv_pool = self._attend(qkv, tables, kv_pool, attend, i, window)
            return (layer.after(x, mixed, call), kv_pool), None

        carry, _ = lax.scan(body, (x, kv_pool), (sliced, self._layer_numbers()))
        return carry

    def _is_read_in_place(self, leaf: Any) -> bool:
        """Whether products read a layer's kernel in the stacked array, and no slice of it."""
        return self._in_place if _is_int8(leaf) else leaf.dtype == PACKED

    def _layer_numbers(self) -> tuple[jax.Array, jax.Array | None]:
        """What a loop scans beside weights: layer [L], and window [L] where layers differ in it."""
        num_layers = self.config.num_layers
        windows = [self.config.window(i) for i in range(num_layers)]
        indices = jnp.arange(num_layers, dtype=jnp.int32)
        return indices, jnp.asarray(windows, jnp.int32) if len(set(windows)) > 1 else None

    def _attend(
        self,
        qkv: jax.Array,
        tables: Tables,
        kv_pool: Any,
        attend: Attend,
        layer: jax.Array,
        window: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Rotation and attention: [T, H, D] in the model's type, and the new pool."""
        q, k, v = rotated_heads(qkv, *tables)
        # A window that all layers share stays a Python int, which lets a kernel leave masks out.
        shared = self.config.window(0)
        mixed, kv_pool = attend(q, k, v, kv_pool, layer, shared if window is None else window)
        return mixed.astype(self.dtype), kv_pool


def _shapes(tree: Parameters, leading: tuple[int, ...] = ()) -> Parameters:
    """A copy of a tree of shapes, with axes put in front of every leaf's own."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leading + leaf.shape, leaf.dtype), tree)


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, int8.Int8Kernel)


def _of_ends(params: Parameters) -> Parameters:
    return {name: part for name, part in params.items() if name not in ("layers", KV_SCALES)}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path)
