"""Drafts from another model on real steps: answers are those without it, whatever it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_llm_speculation import CASES, GREEDY, NO_DRAFTS, PROMPTS, contents

from jaxllm import LLM, SamplingParams, draft_setup
from jaxllm.engine.speculation import SpeculationStats
from jaxllm.engine_options import EngineOptions

CHEAP = 0.02  # as if a draft cost so little, in steps


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller random model with the same vocabulary size and without a tokenizer."""
    return save_model(tmp_path_factory.mktemp("other"), vocab_size=320)


def save_model(folder: Path, vocab_size: int) -> Path:
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tiny_llm: dict[str, Any]) -> dict[str, Any]:
    """Those of a small engine that compiles no more than it needs."""
    return {**tiny_llm, "forbid_compile": False, "compilation": "on_demand"}


@pytest.fixture(scope="module")
def expected(
    tiny_llama_folder: Path, options: dict[str, Any]
) -> Iterator[Callable[[list[list[int]], SamplingParams], list[Any]]]:
    with LLM(str(tiny_llama_folder), **options) as llm:
        yield lambda prompts, params: contents(llm.generate(prompts, params, use_tqdm=False))


def drafting(model: Path, draft: Path, **options: Any) -> LLM:
    """An engine whose drafts seem cheap. Its first programs are there when it begins."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(draft_setup, "draft_cost", lambda *_: CHEAP)
        llm = LLM(str(model), **options, speculative=f"draft:{draft}")
    runner = llm._running.draft_runner
    assert runner is not None
    for bucket in runner.programs.order[:2]:
        runner._compiler.get(bucket)
    return llm


@pytest.fixture(scope="module")
def same_model(tiny_llama_folder: Path, options: dict[str, Any]) -> Iterator[LLM]:
    """The model makes its own drafts, so all are right."""
    more = {"num_speculative_tokens": 3, "max_steps_per_dispatch": 4}
    with drafting(tiny_llama_folder, tiny_llama_folder, **options, **more) as llm:
        yield llm


@pytest.fixture(scope="module")
def other_model(
    tiny_llama_folder: Path, other_folder: Path, options: dict[str, Any]
) -> Iterator[LLM]:
    with drafting(tiny_llama_folder, other_folder, **options, overlap=False) as llm:
        yield llm


def stats_of(llm: LLM) -> SpeculationStats:
    stats = llm.engine.stats().speculation
    assert stats is not None
    return stats


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_without_drafts(
    expected: Any, same_model: LLM, other_model: LLM, name: str
) -> None:
    wanted = expected(PROMPTS, CASES[name])
    for llm in (same_model, other_model):
        before = stats_of(llm).num_draft_tokens
        assert contents(llm.generate(PROMPTS, CASES[name], use_tqdm=False)) == wanted
        has_drafts = stats_of(llm).num_draft_tokens > before
        assert has_drafts or CASES[name].structured_outputs  # which excludes most guesses
        assert llm.engine.speculator is not None
        assert not llm.engine.speculator.has_failed
        llm.engine.scheduler.pool.check_integrity([])


@pytest.mark.parametrize("name", ["greedy", "drawn", "filters"])
def test_a_model_guesses_itself_right_at_any_temperature(same_model: LLM, name: str) -> None:
    """It draws with the same random numbers."""
    before, num_steps = stats_of(same_model), same_model.engine.meter.num_steps
    [output] = same_model.generate([PROMPTS[1]], CASES[name], use_tqdm=False)
    stats = stats_of(same_model)
    num_drafts = stats.num_draft_tokens - before.num_draft_tokens
    num_accepted = stats.num_accepted_tokens - before.num_accepted_tokens
    num_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    assert num_accepted >= 0.95 * num_drafts
    assert num_accepted > 0.6 * num_tokens
    assert same_model.engine.meter.num_steps - num_steps < 16  # of 40 tokens
    assert output.metrics is not None
    assert output.metrics.num_accepted_tokens == num_accepted


def test_a_cached_prompt_is_not_trusted_to_be_the_draft_models(
    expected: Any, same_model: LLM
) -> None:
    """It was computed without drafts, so the draft model has not seen it; and then it has."""
    prompt = [300 - i for i in range(70)]
    same_model.generate([prompt], NO_DRAFTS["prompt_logprobs"], use_tqdm=False)
    wanted = expected([prompt], GREEDY)
    for _ in range(2):
        before = stats_of(same_model)
        [output] = outputs = same_model.generate([prompt], GREEDY, use_tqdm=False)
        assert contents(outputs) == wanted
        assert output.num_cached_tokens == 64
        stats = stats_of(same_model)
        num_drafts = stats.num_draft_tokens - before.num_draft_tokens
        assert stats.num_accepted_tokens - before.num_accepted_tokens == num_drafts > 20


def test_memory_counts_both_models(other_model: LLM) -> None:
    plan, draft = other_model._running.memory_plan, other_model._running.draft_runner
    assert draft is not None
    assert draft.config.num_blocks == other_model.engine.config.num_blocks
    assert 0 < plan.draft_model < plan.parameters + plan.pool + plan.state
    assert plan.total > plan.parameters + plan.pool + plan.state + plan.draft_model
    assert "draft model" in str(plan)


def test_a_draft_costs_what_has_to_be_read(other_model: LLM) -> None:
    draft, speculator = other_model._running.draft_runner, other_model.engine.speculator
    assert draft is not None
    assert 0.1 < draft_setup.draft_cost(draft, other_model._running.runner) < 0.3
    assert speculator is not None
    assert speculator.proposer.max_len == 128


@pytest.mark.parametrize("speculative", ["draft:", "draft: ", "draft", "ngram:x", "medusa", 3])
def test_what_is_no_method_is_refused(speculative: Any) -> None:
    with pytest.raises(ValueError, match="speculative must be 'ngram', 'draft:MODEL' with"):
        EngineOptions(speculative=speculative)


def test_compiled_programs_are_not_for_a_draft_model() -> None:
    with pytest.raises(ValueError, match="compiled is for one model"):
        EngineOptions(speculative="draft:x", compiled="folder")


def test_a_draft_model_that_is_not_there(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no model 'nosuch': give a folder"):
        LLM(str(tiny_llama_folder), **tiny_llm, speculative="draft:nosuch")


def test_another_vocabulary_is_refused(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any], tmp_path: Path
) -> None:
    smaller = save_model(tmp_path / "smaller", vocab_size=300)
    with pytest.raises(ValueError, match="its vocabulary has 300 tokens and the model's has 320"):
        LLM(str(tiny_llama_folder), **tiny_llm, speculative=f"draft:{smaller}")
    swapped = Path(shutil.copytree(tiny_llama_folder, tmp_path / "swapped"))
    path = swapped / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its tokenizer is for another vocabulary: 2 tokens"):
        LLM(str(tiny_llama_folder), **tiny_llm, speculative=f"draft:{swapped}")
