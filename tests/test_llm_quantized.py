"""Weights and keys and values of 8 bits, through LLM, against transformers with rounded ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch_reference import TorchModel, assert_greedy, log_softmax

from jaxllm import LLM, SamplingParams
from jaxllm.quantization.kv_scales import KV_SCALES, MARGIN

PROMPTS = [[5 + i] * (3 + 9 * i) + [7 * i + 1, 9, 30] for i in range(4)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
FORMATS = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": (torch.float8_e5m2, 57344.0),
}


def round_weights(module: torch.nn.Module) -> None:
    """Each kernel becomes what it is in 8 bits with a scale an output channel."""
    with torch.no_grad():
        for name, linear in module.named_modules():
            if isinstance(linear, torch.nn.Linear):
                assert linear.weight.ndim == 2, name
                scale = linear.weight.abs().amax(1, keepdim=True) / 127
                linear.weight.copy_(torch.round(linear.weight / scale) * scale)


class RoundedCache(transformers.DynamicCache):
    """Keys and values as a cache of 8 bits returns them. scales: [L, 2, K]."""

    def __init__(self, kind: str, scales: np.ndarray) -> None:
        super().__init__()
        (self.dtype, self.largest), self.scales = FORMATS[kind], torch.tensor(scales)

    def update(self, keys: Any, values: Any, layer: int, *rest: Any, **more: Any) -> Any:
        """New ones [1, K, T, D] rounded; all that there are by now."""
        rounded = []
        for new, scale in zip((keys, values), self.scales[layer], strict=True):
            scaled = new / scale[None, :, None, None]
            if self.dtype == torch.int8:
                scaled = torch.round(scaled)
            stored = scaled.clamp(-self.largest, self.largest).to(self.dtype)
            rounded.append(stored.to(new.dtype) * scale[None, :, None, None])
        return super().update(*rounded, layer, *rest, **more)


@dataclass(frozen=True)
class RoundedCacheModel(TorchModel):
    """With such a cache in each call."""

    kind: str
    scales: np.ndarray

    def logits(self, token_ids: Any) -> np.ndarray:
        cache = RoundedCache(self.kind, self.scales)
        with torch.no_grad():
            ids = torch.tensor([list(token_ids)])
            array: np.ndarray = self.module(ids, past_key_values=cache).logits[0].numpy()
        return array

    def greedy(self, prompt: Any, num_tokens: int) -> list[int]:
        return self.greedy_changed(prompt, num_tokens, lambda logits, _: logits)


def stored_scales(runner: Any) -> np.ndarray:
    """Those that an engine measured, [2, 2, 2], the only parameter of that shape."""
    (scales,) = (leaf for leaf in runner._params if leaf.shape == (2, 2, 2))
    return np.asarray(scales)


def check(folder: Path, reference: Any, **options: Any) -> None:
    """Tokens and log-probabilities of all prompts."""
    options |= {"forbid_compile": False, "compilation": "on_demand"}
    with LLM(folder, **options) as llm:
        model = reference(llm._running.runner)
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert_greedy(model, prompt, tokens, model.greedy(prompt, len(tokens)))
        expected = log_softmax(model.logits(prompt))
        rows = output.prompt_logprobs[1:]
        found = [row[token].logprob for row, token in zip(rows, prompt[1:], strict=True)]
        wanted = [expected[i, token] for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_weights_of_8_bits(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> None:
    model = TorchModel.from_folder(tiny_llama_folder)
    round_weights(model.module)
    check(tiny_llama_folder, lambda _: model, quantization="int8", **tiny_llm)


@pytest.mark.parametrize("kind", FORMATS)
def test_keys_and_values_of_8_bits(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any], kind: str
) -> None:
    plain = TorchModel.from_folder(tiny_llama_folder)

    def reference(runner: Any) -> TorchModel:
        assert runner._state.kv_pool.dtype.itemsize == 1
        number = list(runner.programs.parameters).index(KV_SCALES)
        assert number == 3  # behind embed, final_norm and head
        return RoundedCacheModel(plain.module, kind, stored_scales(runner))

    check(tiny_llama_folder, reference, kv_cache_dtype=kind, **tiny_llm)


def test_scales_are_those_of_the_largest_elements(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    """What transformers' cache holds of the same tokens, drawn as kv_scales.py says."""
    tokens = np.random.default_rng(0).integers(320, size=512)
    module = TorchModel.from_folder(tiny_llama_folder).module
    with torch.no_grad():
        cache = module(torch.tensor(tokens[None])).past_key_values
    largest = [[x.abs().amax((0, 2, 3)).numpy() for x in (layer.keys, layer.values)]
               for layer in cache.layers]  # fmt: skip
    for kind, (_, limit) in FORMATS.items():
        options = {**tiny_llm, "forbid_compile": False, "compilation": "on_demand"}
        with LLM(tiny_llama_folder, kv_cache_dtype=kind, **options) as llm:
            scales = stored_scales(llm._running.runner)
            np.testing.assert_allclose(scales, np.array(largest) * MARGIN / limit, rtol=1e-4)


@pytest.mark.long
def test_a_real_model_loses_little(smollm2_path: Path) -> None:
    """The mean log-probability of a text, in types of 8 bits beside bfloat16."""
    text = (Path(__file__).parents[1] / "docs" / "engine.md").read_text()[:1500]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def mean(**options: Any) -> float:
        common = {"max_model_len": 1024, "max_num_seqs": 8, "compilation": "on_demand"}
        with LLM(smollm2_path, **common, **options) as llm:
            [output] = llm.generate([text], params, use_tqdm=False)
        rows = [next(iter(row.values())).logprob for row in output.prompt_logprobs if row]
        return -float(np.mean(rows))

    plain = mean()
    assert abs(mean(quantization="int8", kv_cache_dtype="int8") - plain) < 0.05
    assert abs(mean(kv_cache_dtype="fp8") - plain) < 0.02
