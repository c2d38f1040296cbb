"""What LLM generates against transformers on torch: tiny models of every family, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch_reference import TorchModel, assert_greedy, log_softmax

from jaxllm import LLM, SamplingParams
from jaxllm.engine_setup import _keys_vary
from jaxllm.loading.config_json import model_config_from_hf
from jaxllm.outputs import RequestOutput, TokenLogprobs

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 13},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VARIANTS = [("switch", "xla"), ("scan", "reference")]  # of the layer loop, of attention
LIMITS = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT_LENS = (1, 7, 16, 17, 41)  # within a block, a block, past it, past the token budget


def rope(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **options}}


DYNAMIC = {"max_position_embeddings": 40, "head_dim": 96, **rope("dynamic", factor=3.0)}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear, D 128": ("Llama", {"head_dim": 128, **rope("linear", factor=4.0)}),
    "dynamic, D 96": ("Llama", DYNAMIC),
    "llama3, D 96": (
        "Llama",
        {
            "head_dim": 96,
            **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16),
        },
    ),
    "yarn, D 128": (
        "Qwen3",
        {
            "head_dim": 128,
            **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0,
                   mscale_all_dim=0.7),
        },
    ),
    "windows in some layers": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 13,
         "max_window_layers": 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(
    request: pytest.FixtureRequest,
    tiny_llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(f"tiny-{request.param.lower()}")
    save_model(request.param, FAMILIES[request.param], folder, tiny_llama_folder)
    return folder


def save_model(family: str, options: dict[str, Any], folder: Path, tokenizer_folder: Path) -> None:
    """A random model of the family as transformers saves it, with another one's tokenizer."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are constant at first
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())


def random_prompts(vocab_size: int, lens: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, vocab_size, length).tolist() for length in lens]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_every_family_is_greedy_as_transformers_in_each_variant(
    family_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    reference = TorchModel.from_folder(family_folder)
    prompts = random_prompts(TINY["vocab_size"], PROMPT_LENS)
    expected = [reference.greedy(prompt, 24) for prompt in prompts]
    for layer_loop, attention in VARIANTS:
        options = {**tiny_llm, **LIMITS, "layer_loop": layer_loop, "attention": attention}
        with LLM(str(family_folder), dtype="float32", **options) as llm:
            outputs = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
        for prompt, actual, wanted in zip(prompts, outputs, expected, strict=True):
            assert_greedy(reference, prompt, actual, wanted)


def test_log_probabilities_of_every_family_are_those_of_transformers(
    family_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    reference = TorchModel.from_folder(family_folder)
    prompts = random_prompts(TINY["vocab_size"], PROMPT_LENS, seed=1)
    params = SamplingParams(
        temperature=1, max_tokens=8, seed=3, ignore_eos=True, logprobs=5, prompt_logprobs=3
    )
    layer_loop, attention = VARIANTS[0]  # whose programs are compiled already
    options = {**tiny_llm, **LIMITS, "layer_loop": layer_loop, "attention": attention}
    with LLM(str(family_folder), dtype="float32", **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        expected = log_softmax(reference.logits([*prompt, *answer.token_ids]))
        assert output.prompt_logprobs is not None
        assert answer.logprobs is not None
        assert output.prompt_logprobs[0] is None
        for row, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            check_logprobs(entry, expected[row], prompt[row + 1], 3)
        for i, entry in enumerate(answer.logprobs):
            check_logprobs(entry, expected[len(prompt) - 1 + i], answer.token_ids[i], 5)
        total = sum(
            entry[t].logprob for t, entry in zip(answer.token_ids, answer.logprobs, strict=True)
        )
        assert answer.cumulative_logprob == pytest.approx(total)


def check_logprobs(entry: TokenLogprobs, expected: np.ndarray, chosen: int, num_top: int) -> None:
    """One position against log-probabilities [V]: the chosen token and the most likely ones."""
    order = np.argsort(-expected, kind="stable")
    assert next(iter(entry)) == chosen
    assert set(entry) == {chosen, *order[:num_top].tolist()}
    for token_id, found in entry.items():
        assert found.logprob == pytest.approx(expected[token_id], abs=1e-4)
        assert found.rank == 1 + int(np.flatnonzero(order == token_id)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rope_head_size_and_window_in_the_real_step(
    shape: str, tiny_llama_folder: Path, tiny_llm: dict[str, Any], tmp_path: Path
) -> None:
    """Batched, long prompts in chunks; and where RoPE varies with the length, also preempted."""
    family, model_options = SHAPES[shape]
    save_model(family, model_options, tmp_path, tiny_llama_folder)
    reference = TorchModel.from_folder(tmp_path)
    prompts = random_prompts(TINY["vocab_size"], (*PROMPT_LENS, 60))
    expected = [reference.greedy(prompt, 24) for prompt in prompts]
    is_dynamic = model_options is DYNAMIC
    options = {**tiny_llm, **LIMITS}
    if is_dynamic:  # 8 blocks, of 2 layers x 16 tokens x 2 x 2 heads x 96 floats
        options["kv_cache_memory_bytes"] = 8 * 2 * 16 * 2 * 2 * 96 * 4
    with LLM(str(tmp_path), dtype="float32", **options) as llm:
        outputs = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
        assert bool(llm.engine.stats().num_preemptions) == is_dynamic
        assert llm.engine.config.enable_prefix_caching != is_dynamic
    for prompt, actual, wanted in zip(prompts, outputs, expected, strict=True):
        if is_dynamic:  # without a cache, transformers would compute other keys
            assert actual == wanted
        else:
            assert_greedy(reference, prompt, actual, wanted)


def test_keys_of_dynamic_rope_can_be_shared_up_to_its_length(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    save_model("Llama", DYNAMIC, tmp_path, tiny_llama_folder)
    model: Any = SimpleNamespace(config=model_config_from_hf(tmp_path))
    assert [_keys_vary(model, max_model_len) for max_model_len in (40, 41)] == [False, True]
