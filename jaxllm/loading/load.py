"""From a checkpoint to a parameter tree, leaf by leaf, so that host memory holds few leaves."""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig, ModelError
from jaxllm.loading.mapping import Row, is_harmless, mapping_table
from jaxllm.loading.source import TensorSource

Path = tuple[Any, ...]  # keys and list positions from the root of the tree
Put = Callable[[np.ndarray, Path], Any]

NUM_THREADS = 2  # reading and converting; more compete for memory bandwidth
LEAF_BYTES_AHEAD = 256 << 20  # leaves under way beside the one that is being put
CHUNK_ELEMENTS = 1 << 19  # read and converted at a time
ALIGNMENT = 64  # what JAX's CPU backend needs to take a buffer without a copy


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint and the leaf (or layer of a stacked leaf) that it fills."""

    tensor: str
    row: Row
    layer: int | None  # of a stacked leaf

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The place in the leaf: [groups, rows of a group, ...]."""
        return self.row.turn(leaf if self.layer is None else leaf[self.layer])


@dataclass(frozen=True)
class LeafPlan:
    """How one leaf is made."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[Part]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_parameters(
    config: ModelConfig, abstract: dict[str, Any], source: TensorSource, *, put: Put
) -> dict[str, Any]:
    """The tree of `abstract` (whose leaves have .shape and .dtype), each leaf replaced by
    put(array, path). The array is put's to keep; nothing else refers to it.

    The tree has a subtree a layer (a list, or a dict with the numbers as keys) or one with stacked
    leaves under "layers". Raises ModelError listing every missing, extra and misshapen tensor.
    """
    plans = plan_leaves(config, abstract, source)
    leaves = {}
    # largest first: the peak is then not above the finished tree by more than a small leaf
    plans.sort(key=lambda plan: -plan.nbytes)
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load") as threads:
        try:
            for plan, array in _filled_leaves(plans, source, threads):
                leaves[plan.path] = put(array, plan.path)
                del array
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return _rebuild(abstract, leaves, ())


def check_num_layers(config: ModelConfig, source: TensorSource) -> None:
    """Raises ModelError for more layers than tensors: for a config that lies, before the model that
    it describes takes time and memory. `plan_leaves` compares the tensors themselves."""
    if config.num_layers > len(source.shapes):
        raise ModelError(
            f"{source.description}: has {len(source.shapes)} tensors, too few for the "
            f"{config.num_layers} layers of the configuration"
        )


def plan_leaves(
    config: ModelConfig, abstract: dict[str, Any], source: TensorSource
) -> list[LeafPlan]:
    """Each leaf's parts. Raises one ModelError with all that does not fit."""
    table = mapping_table(config)
    plans, wanted, misshapen = [], set(), []
    for path, leaf in _flatten(abstract, ()):
        parts = _parts(path, leaf, table)
        plan = LeafPlan(path, tuple(leaf.shape), np.dtype(leaf.dtype), parts)
        plans.append(plan)
        for part in parts:
            wanted.add(part.tensor)
            expected, found = _tensor_shape(plan, part), source.shapes.get(part.tensor)
            if found is not None and found != expected:
                misshapen.append(f"{part.tensor} {list(found)} instead of {list(expected)}")
    extra = [n for n in source.shapes if n not in wanted and not is_harmless(n, config)]
    missing = [name for name in wanted if name not in source.shapes]
    _report(source, missing, extra, misshapen)
    return plans


def _parts(path: Path, leaf: Any, table: dict[tuple[str, ...], list[Row]]) -> list[Part]:
    keys = tuple(str(key) for key in path)
    in_layer = keys[0] == "layers"
    numbered = in_layer and keys[1].isdecimal()
    rows = table.get(("layers", *keys[2:]) if numbered else keys)
    if rows is None:
        raise ModelError(f"the model has a parameter {'/'.join(keys)} that no tensor maps to")
    if numbered or not in_layer:
        layer = keys[1] if numbered else ""
        return [Part(row.tensor.format(i=layer), row, None) for row in rows]
    return [
        Part(row.tensor.format(i=layer), row, layer)
        for layer in range(leaf.shape[0])
        for row in rows
    ]


def _tensor_shape(plan: LeafPlan, part: Part) -> tuple[int, ...]:
    zero = np.zeros((), np.uint8)
    num_groups, num_rows, *rest = part.view(np.broadcast_to(zero, plan.shape)).shape
    return (num_groups * num_rows, *rest)


def _report(
    source: TensorSource, missing: list[str], extra: list[str], misshapen: list[str]
) -> None:
    problems = [
        f"{kind}: {', '.join(_fold_layers(found))}"
        for kind, found in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if found
    ]
    if problems:
        raise ModelError(
            f"{source.description}: the tensors are not those of the configured model; "
            f"{'; '.join(problems)}"
        )


def _fold_layers(names: list[str]) -> list[str]:
    """model.layers.0.x, model.layers.1.x -> model.layers.{0-1}.x"""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<=layers\.)\d+", name)
        pattern = name if match is None else name.replace(match[0], "{}", 1)
        layers.setdefault(pattern, []).extend([int(match[0])] if match else [])
    return sorted(
        pattern.replace("{}", _ranges(sorted(numbers)), 1) if numbers else pattern
        for pattern, numbers in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return "{" + ",".join(runs) + "}"


def _filled_leaves(
    plans: list[LeafPlan], source: TensorSource, threads: ThreadPoolExecutor
) -> Iterator[tuple[LeafPlan, np.ndarray]]:
    """Leaves in order, while the threads work ahead within LEAF_BYTES_AHEAD."""
    under_way: deque[tuple[LeafPlan, np.ndarray, list[Future[None]]]] = deque()
    bytes_under_way = 0
    for plan in plans:
        while under_way and bytes_under_way + plan.nbytes > LEAF_BYTES_AHEAD:
            bytes_under_way -= under_way[0][0].nbytes
            yield _finish(*under_way.popleft())
        leaf = _aligned_empty(plan.shape, plan.dtype)
        under_way.append((plan, leaf, _start(plan, leaf, source, threads)))
        bytes_under_way += plan.nbytes
    while under_way:
        yield _finish(*under_way.popleft())


def _finish(
    plan: LeafPlan, leaf: np.ndarray, futures: list[Future[None]]
) -> tuple[LeafPlan, np.ndarray]:
    for future in futures:
        future.result()
    return plan, leaf


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    data = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -data.ctypes.data % ALIGNMENT
    return data[start : start + nbytes].view(dtype).reshape(shape)


def _start(
    plan: LeafPlan, leaf: np.ndarray, source: TensorSource, threads: ThreadPoolExecutor
) -> list[Future[None]]:
    # numpy moves bfloat16 element by element, but integers of its size in bulk
    bits = leaf.view(f"u{plan.dtype.itemsize}")
    futures = []
    for part in plan.parts:
        place = part.view(bits)
        assert np.may_share_memory(place, bits), part.tensor
        for groups, rows in _chunks(place.shape):
            futures.append(
                threads.submit(_copy, source, part.tensor, place, groups, rows, plan.dtype)
            )
    return futures


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Groups and rows of about CHUNK_ELEMENTS: whole groups, or a piece of one."""
    num_groups, num_rows, *rest = shape
    rows_at_once = max(1, CHUNK_ELEMENTS // math.prod(rest))
    if rows_at_once >= num_rows:
        step = rows_at_once // num_rows
        for group in range(0, num_groups, step):
            yield slice(group, min(group + step, num_groups)), slice(0, num_rows)
        return
    for group in range(num_groups):
        for row in range(0, num_rows, rows_at_once):
            yield slice(group, group + 1), slice(row, min(row + rows_at_once, num_rows))


def _copy(
    source: TensorSource,
    tensor: str,
    place: np.ndarray,
    groups: slice,
    rows: slice,
    dtype: np.dtype,
) -> None:
    """Reads the chunk's rows, rounds them to dtype and writes their bits into place."""
    num_rows = place.shape[1]
    target = place[groups, rows]
    first = groups.start * num_rows + rows.start
    values = source.read(tensor, first, first + target.shape[0] * target.shape[1])
    target[...] = values.astype(dtype, copy=False).view(place.dtype).reshape(target.shape)


def _flatten(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, child in items:
        yield from _flatten(child, (*path, key))


def _rebuild(tree: Any, leaves: dict[Path, Any], path: Path) -> Any:
    if isinstance(tree, dict):
        return {key: _rebuild(child, leaves, (*path, key)) for key, child in tree.items()}
    if isinstance(tree, list):
        return [_rebuild(child, leaves, (*path, i)) for i, child in enumerate(tree)]
    return leaves[path]
