"""What LLM generates against transformers on torch: tiny models of every family, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch_reference import TorchModel, assert_greedy, log_softmax

from jaxllm import LLM, SamplingParams
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


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(
    request: pytest.FixtureRequest,
    tiny_llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A random model of the family as transformers saves it, with the tiny Llama's tokenizer."""
    family = request.param
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are constant at first
            parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp(f"tiny-{family.lower()}")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_folder / name).read_bytes())
    return folder


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
