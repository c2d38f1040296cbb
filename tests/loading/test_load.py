"""Whole checkpoints into the parameter tree, against torch's own tensors."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxllm.config import ModelError
from jaxllm.loading.config_json import model_config_from_hf
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.loading.load import LEAF_BYTES_AHEAD, load_parameters
from jaxllm.loading.safetensors_source import SafetensorsSource

FAMILIES = [
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Llama", {"num_key_value_heads": 4, "head_dim": 16}),
    ("Mistral", {"num_key_value_heads": 1}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16, "attention_bias": True}),
]


def keep(array: np.ndarray, path: tuple[Any, ...]) -> np.ndarray:
    return array


def check_layer(layer: dict[str, Any], state: dict[str, np.ndarray], i: int, config: Any) -> None:
    """Head by head, from the definition of the tree."""
    attention, mlp = layer["attention"], layer["mlp"]
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    tensors = {
        name.removeprefix(f"model.layers.{i}."): value
        for name, value in state.items()
        if name.startswith(f"model.layers.{i}.")
    }

    def heads(name: str, kind: str) -> np.ndarray:
        value = tensors[f"self_attn.{name}_proj.{kind}"]
        return value.reshape(-1, dim, *value.shape[1:])  # [heads, D, ...]

    kinds = [("weight", "qkv_kernel")] + [("bias", "qkv_bias")] * config.qkv_bias
    for kind, leaf in kinds:
        qkv = attention[leaf]
        for k in range(config.num_kv_heads):
            for g in range(group):
                query = heads("q", kind)[k * group + g]
                np.testing.assert_array_equal(qkv[..., k, g, :], query.T)
            np.testing.assert_array_equal(qkv[..., k, group, :], heads("k", kind)[k].T)
            np.testing.assert_array_equal(qkv[..., k, group + 1, :], heads("v", kind)[k].T)
    for h in range(config.num_heads):
        columns = tensors["self_attn.o_proj.weight"][:, h * dim : (h + 1) * dim]
        np.testing.assert_array_equal(attention["o_kernel"][h], columns.T)
    expected = [
        (layer["attention_norm"]["scale"], "input_layernorm.weight"),
        (layer["mlp_norm"]["scale"], "post_attention_layernorm.weight"),
        (mlp["gate_up_kernel"][:, 0], "mlp.gate_proj.weight"),
        (mlp["gate_up_kernel"][:, 1], "mlp.up_proj.weight"),
        (mlp["down_kernel"], "mlp.down_proj.weight"),
    ]
    if config.attention_output_bias:
        expected.append((attention["o_bias"], "self_attn.o_proj.bias"))
    if config.qk_norm:
        expected.append((attention["q_norm"]["scale"], "self_attn.q_norm.weight"))
        expected.append((attention["k_norm"]["scale"], "self_attn.k_norm.weight"))
    if config.mlp_bias:
        expected.append((mlp["gate_up_bias"][0], "mlp.gate_proj.bias"))
        expected.append((mlp["gate_up_bias"][1], "mlp.up_proj.bias"))
        expected.append((mlp["down_bias"], "mlp.down_proj.bias"))
    for found, name in expected:
        np.testing.assert_array_equal(found, tensors[name].T, err_msg=name)


@pytest.mark.parametrize("form", ["dict", "list", "stacked"])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_each_family_in_each_form(
    save_tiny_model: Callable[..., Any],
    abstract_tree: Callable[..., Any],
    family: str,
    options: dict[str, Any],
    form: str,
) -> None:
    shard = "20KB" if form == "list" else "1GB"
    folder, state = save_tiny_model(family, shard=shard, **options)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    config = model_config_from_hf(folder)
    abstract = abstract_tree(config, form=form)
    tree = load_parameters(config, abstract, SafetensorsSource(folder), put=keep)
    np.testing.assert_array_equal(tree["embed"]["embedding"], arrays["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tree["final_norm"]["scale"], arrays["model.norm.weight"])
    assert ("head" in tree) == (not config.tie_word_embeddings)
    if "head" in tree:
        np.testing.assert_array_equal(tree["head"]["kernel"], arrays["lm_head.weight"].T)
    for i in range(config.num_layers):
        if form == "stacked":
            layer = at_layer(tree["layers"], i)
        else:
            layer = tree["layers"][i if form == "list" else str(i)]
        check_layer(layer, arrays, i, config)


def at_layer(tree: Any, i: int) -> Any:
    return {k: at_layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_values_are_rounded_as_torch_rounds_them(
    save_tiny_model: Callable[..., Any],
    abstract_tree: Callable[..., Any],
    stored: str,
    wanted: str,
) -> None:
    import torch

    folder, state = save_tiny_model("Llama", dtype=getattr(torch, stored))
    config = model_config_from_hf(folder)
    assert config.checkpoint_dtype == stored
    abstract = abstract_tree(config, getattr(ml_dtypes, wanted, None) or wanted)
    tree = load_parameters(config, abstract, SafetensorsSource(folder), put=keep)
    expected = state["lm_head.weight"].to(getattr(torch, wanted)).float().numpy()
    assert tree["head"]["kernel"].dtype.name == wanted
    np.testing.assert_array_equal(tree["head"]["kernel"].astype(np.float32).T, expected)


def test_put_gets_every_leaf_once_and_decides_what_is_kept(
    save_tiny_model: Callable[..., Any], abstract_tree: Callable[..., Any]
) -> None:
    folder, _ = save_tiny_model("Llama")
    config = model_config_from_hf(folder)
    seen: list[Any] = []

    def put(array: np.ndarray, path: tuple[Any, ...]) -> str:
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0
        seen.append((array.nbytes, path))
        return "/".join(map(str, path))

    tree = load_parameters(config, abstract_tree(config), SafetensorsSource(folder), put=put)
    assert tree["layers"]["1"]["mlp"]["down_kernel"] == "layers/1/mlp/down_kernel"
    assert len(seen) == len({path for _, path in seen}) == 3 + 3 * 6
    sizes = [nbytes for nbytes, _ in seen]
    assert sizes == sorted(sizes, reverse=True)


def test_pieces_of_a_group_and_several_groups_at_once_give_the_same(
    save_tiny_model: Callable[..., Any],
    abstract_tree: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = save_tiny_model("Qwen2")
    config = model_config_from_hf(folder)
    trees = []
    for size in (1, 7 * 32, 20 * 32, 1 << 20):
        monkeypatch.setattr("jaxllm.loading.load.CHUNK_ELEMENTS", size)
        monkeypatch.setattr("jaxllm.loading.load.LEAF_BYTES_AHEAD", 1 if size == 1 else 1 << 20)
        abstract = abstract_tree(config, form="stacked")
        trees.append(load_parameters(config, abstract, SafetensorsSource(folder), put=keep))
    for other in trees[1:]:
        for name in ("qkv_kernel", "qkv_bias", "o_kernel"):
            expected = trees[0]["layers"]["attention"][name]
            np.testing.assert_array_equal(other["layers"]["attention"][name], expected)


class FakeSource:
    """Shapes, and values that are all one."""

    description = "fake"

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.nbytes = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if "up_proj" in name:
            raise ModelError("the file ends early")
        start, stop, _ = slice(start, stop).indices(self.shapes[name][0])
        return np.ones((stop - start, *self.shapes[name][1:]), np.float32)


def test_all_that_does_not_fit_is_in_one_error(
    save_tiny_model: Callable[..., Any], abstract_tree: Callable[..., Any]
) -> None:
    folder, state = save_tiny_model("Llama")
    config = model_config_from_hf(folder)
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for i in range(3):
        del shapes[f"model.layers.{i}.mlp.up_proj.weight"]
        shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (4,)  # harmless
    shapes["model.layers.0.self_attn.q_proj.bias"] = (32,)
    shapes["model.layers.2.self_attn.q_proj.bias"] = (32,)
    del shapes["model.norm.weight"]
    shapes["lm_head.weight"] = (97, 32)
    shapes["model.layers.1.self_attn.k_proj.weight"] = (16, 32, 1)
    with pytest.raises(ModelError) as error:
        load_parameters(config, abstract_tree(config), FakeSource(shapes), put=keep)
    assert str(error.value) == (
        "fake: the tensors are not those of the configured model; "
        "missing: model.layers.{0-2}.mlp.up_proj.weight, model.norm.weight; "
        "extra: model.layers.{0,2}.self_attn.q_proj.bias; "
        "misshapen: lm_head.weight [97, 32] instead of [96, 32], "
        "model.layers.1.self_attn.k_proj.weight [16, 32, 1] instead of [16, 32]"
    )


def test_a_tied_model_ignores_the_copy_of_its_embedding(
    save_tiny_model: Callable[..., Any], abstract_tree: Callable[..., Any]
) -> None:
    folder, state = save_tiny_model("Llama", tie_word_embeddings=True)
    config = model_config_from_hf(folder)
    shapes = {n: tuple(t.shape) for n, t in state.items() if "up_proj" not in n}
    shapes["lm_head.weight"] = (96, 32)
    with pytest.raises(ModelError) as error:
        load_parameters(config, abstract_tree(config), FakeSource(shapes), put=keep)
    assert "lm_head" not in str(error.value)


def test_a_read_error_reaches_the_caller(
    save_tiny_model: Callable[..., Any], abstract_tree: Callable[..., Any]
) -> None:
    folder, state = save_tiny_model("Llama")
    config = model_config_from_hf(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(ModelError, match="the file ends early"):
        load_parameters(config, abstract_tree(config), FakeSource(shapes), put=keep)


@pytest.mark.long
def test_smollm2_as_transformers_reads_it(
    smollm2_path: Path, abstract_tree: Callable[..., Any]
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    start = time.process_time()
    file = GGUFFile(smollm2_path)
    config = file.config()
    assert time.process_time() - start < 2  # 0.04 s; the package's own reader takes 4
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.vocab_size, config.rms_norm_eps, config.rope.theta) == (49152, 1e-5, 1e5)
    tree = load_parameters(config, abstract_tree(config), file.source(), put=keep)
    # what from_pretrained(gguf_file=...) calls, which itself asks for one package more; the model
    # is only asked for its tensors' names
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, vocab_size=8, hidden_size=32))
    state = load_gguf_checkpoint(str(smollm2_path), return_tensors=True, model_to_load=model)
    arrays = {name: tensor.numpy() for name, tensor in state["tensors"].items()}
    np.testing.assert_array_equal(tree["embed"]["embedding"], arrays["model.embed_tokens.weight"])
    for i in (0, 13, 29):
        check_layer(tree["layers"][str(i)], arrays, i, config)


PEAK_PROBE = """
import sys
from pathlib import Path
from types import SimpleNamespace as Leaf
import ml_dtypes, numpy as np
sys.path.insert(0, {tests!r})
import conftest
from jaxllm.loading.config_json import model_config_from_hf
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.loading import load
from jaxllm.loading.safetensors_source import SafetensorsSource
load.LEAF_BYTES_AHEAD = {ahead}
path = Path({path!r})
file = None if path.is_dir() else GGUFFile(path)
config = model_config_from_hf(path) if file is None else file.config()
source = SafetensorsSource(path) if file is None else file.source()
abstract = conftest.abstract_tree.__wrapped__()(config, ml_dtypes.bfloat16, {form!r})
def peak():  # unlike ru_maxrss, not inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
load.load_parameters(config, abstract, source, put=lambda array, path: {put})
print(source.nbytes, before, peak())
"""


def peak_memory(
    path: Path, form: str, put: str, ahead: int = LEAF_BYTES_AHEAD
) -> tuple[int, int, int]:
    """The checkpoint's bytes, and the process's peak before and after loading it."""
    tests = str(Path(__file__).parent)
    script = PEAK_PROBE.format(tests=tests, path=str(path), form=form, put=put, ahead=ahead)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    stored, before, after = map(int, result.stdout.split())
    return stored, before, after


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of random bfloat16 in several files."""
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, initializer_range=0.02,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder, max_shard_size="60MB")
    return folder


@pytest.mark.parametrize("form", ["dict", "stacked"])
def test_peak_memory_of_a_sharded_checkpoint(large_checkpoint: Path, form: str) -> None:
    assert len(list(large_checkpoint.glob("*.safetensors"))) > 3
    stored, _, peak = peak_memory(large_checkpoint, form, "array")
    assert stored > 280e6
    assert peak < 1.3 * stored + 2**30


@pytest.mark.parametrize("form", ["dict", "stacked"])
def test_leaves_that_put_does_not_keep_take_no_memory(large_checkpoint: Path, form: str) -> None:
    stored, before, peak = peak_memory(large_checkpoint, form, "None", ahead=64 << 20)
    assert stored > 290 << 20  # so much it would be if they were kept
    # what is under way, or one leaf of 96 MiB; the one that is put, of 63; and a few chunks
    assert peak - before < 170 << 20


def test_peak_memory_of_smollm2(smollm2_path: Path) -> None:
    stored, _, peak = peak_memory(smollm2_path, "dict", "array")
    assert stored < 98362432
    assert peak < 1.3 * stored + 2**30


def test_modules_for_gguf_and_safetensors_load_only_when_needed() -> None:
    script = "import sys, jaxllm.loading.hub; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = "gguf|transformers|huggingface_hub|jax|torch|numpy|safetensors"
    assert not re.search(rf"(?:^|\s)(?:{heavy})(?:\s|$)", result.stdout)
