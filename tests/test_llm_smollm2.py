"""SmolLM2 through LLM against transformers on torch, in float32 and bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from torch_reference import TorchModel, assert_beams, assert_greedy

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.config import ModelConfig
from jaxllm.engine.engine import Engine
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.outputs import RequestOutput
from jaxllm.structured_outputs import StructuredOutputsParams

# torch reads 0.5 GB a token, which takes ten minutes on a slow machine
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "The first ten prime numbers are 2, 3, 5,",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils at a lower "
    "temperature, because the pressure of the air is lower there. Therefore, cooking",
    "1. Preheat the oven.\n2. Mix flour, sugar and butter.\n3.",
    "Die Hauptstadt von Deutschland ist",
]
LIMITS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "forbid_compile": True,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def float32(smollm2_path: Path, cache: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), dtype="float32", cache_dir=cache, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> TorchModel:
    """The model of the file's weights as transformers computes it, in float32."""
    file = GGUFFile(smollm2_path)
    source = file.source()
    weights = {name: torch.from_numpy(source.read(name)) for name in source.shapes}
    module = transformers.LlamaForCausalLM(_torch_config(file.config()))
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    module.tie_weights()
    return TorchModel(module.eval())


def _torch_config(config: ModelConfig) -> Any:
    llama_config: Any = transformers.LlamaConfig
    return llama_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


@pytest.fixture(scope="module")
def prompts(float32: LLM) -> list[list[int]]:
    return [float32.get_tokenizer().encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(reference: TorchModel, prompts: list[list[int]]) -> list[list[int]]:
    return reference.greedy_of_all(prompts, NUM_TOKENS)


@pytest.fixture(scope="module", autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def set_limits(llm: LLM, **limits: Any) -> None:
    """Gives the model's compiled programs a fresh scheduler with other, smaller limits, and an
    empty pool."""
    running = llm._running
    running.runner.reset()
    llm.engine = Engine(
        dataclasses.replace(running.engine.config, **limits),
        running.runner,
        vocab_size=running.model_config.vocab_size,
        tokenizer=running.tokenizer,
        eos_token_ids=running.model_config.eos_token_ids,
    )


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    pool = llm.engine.scheduler.pool
    pool.check_integrity([])
    return outputs


class TestFloat32EqualsTransformers:
    @pytest.fixture(autouse=True)
    def _context(
        self,
        float32: LLM,
        reference: TorchModel,
        prompts: list[list[int]],
        expected: list[list[int]],
    ) -> None:
        self.llm, self.reference = float32, reference
        self.prompts, self.expected = prompts, expected

    def check(self, outputs: list[RequestOutput]) -> None:
        assert len(outputs) == len(self.prompts)
        for prompt, output, expected in zip(self.prompts, outputs, self.expected, strict=True):
            assert_greedy(self.reference, prompt, output.outputs[0].token_ids, expected)

    def test_alone(self) -> None:
        set_limits(self.llm)
        self.prompts, self.expected = self.prompts[:3], self.expected[:3]  # the slowest way
        self.check([generate(self.llm, [prompt], GREEDY)[0] for prompt in self.prompts])

    def test_batched_then_with_a_warm_prefix_cache(self) -> None:
        set_limits(self.llm)
        self.check(generate(self.llm, self.prompts, GREEDY))
        assert self.llm.engine.stats().prefix_hits == 0
        warm = generate(self.llm, self.prompts, GREEDY)
        block_size = self.llm.engine.config.block_size
        cached = [(len(prompt) - 1) // block_size * block_size for prompt in self.prompts]
        assert [output.num_cached_tokens for output in warm] == cached
        assert sum(cached) > 0
        self.check(warm)

    def test_chunked(self) -> None:
        set_limits(self.llm, max_num_batched_tokens=8)
        assert max(map(len, self.prompts)) > 4 * 8
        self.check(generate(self.llm, self.prompts, GREEDY))

    def test_preempted(self) -> None:
        set_limits(self.llm, num_blocks=20)
        self.check(generate(self.llm, self.prompts, GREEDY))
        assert self.llm.engine.stats().num_preemptions > 0


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_search_is_that_of_transformers(
    float32: LLM, reference: TorchModel, prompts: list[list[int]], early_stopping: bool | str
) -> None:
    set_limits(float32)
    search = BeamSearchParams(
        beam_width=4, max_tokens=24, length_penalty=1.2, early_stopping=early_stopping
    )
    chosen = [prompts[0], prompts[4]]
    [eos] = float32.engine.eos_token_ids
    for prompt, output in zip(chosen, float32.beam_search(chosen, search), strict=True):
        expected = reference.beam_search(
            prompt, 24, [eos], num_beams=4, length_penalty=1.2, early_stopping=early_stopping
        )
        scored = [
            (answer.token_ids, (answer.cumulative_logprob or 0) / len(answer.token_ids) ** 1.2)
            for answer in output.outputs
        ]
        assert_beams(scored, expected)


def answer_rows(model: TorchModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """[number of answer tokens, V]: the logits that each token of the answer is chosen by."""
    return model.logits([*prompt, *answer])[len(prompt) - 1 : -1]


TEXT: dict[str, Any] = {"type": "string", "maxLength": 12}
CITY = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "climate": {"enum": ["mild", "dry", "wet"]},
        "rivers": {"type": "array", "items": TEXT, "maxItems": 2},
        "mayor": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["name", "inhabitants", "climate"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"born": {"type": "string", "pattern": "^[0-9]{4}$"}},
            "required": ["born"],
            "additionalProperties": False,
        }
    },
}
WHY = {"type": "object", "properties": {"why": TEXT}, "additionalProperties": False}
SCHEMAS: list[dict[str, Any]] = [
    CITY,
    {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, WHY]},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_answer_under_a_schema_is_an_instance_of_it(
    float32: LLM, prompts: list[list[int]], schema: dict[str, Any]
) -> None:
    set_limits(float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature,
            seed=7,
            max_tokens=110,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for output in generate(float32, [prompt[:16] for prompt in prompts], params):
            [answer] = output.outputs
            assert answer.finish_reason == "stop", answer.text
            jsonschema.validate(json.loads(answer.text), schema)


def margins(rows: list[np.ndarray], best: list[np.ndarray]) -> np.ndarray:
    """By how much column best[t, 0] is above best[t, 1], of the rows [t] of all answers."""
    pairs = [np.take_along_axis(r, b, axis=-1) for r, b in zip(rows, best, strict=True)]
    first, second = np.concatenate(pairs).T
    result: np.ndarray = first - second
    return result


def engine_margins(
    llm: LLM, prompts: list[list[int]], answers: list[list[int]], best: list[np.ndarray]
) -> np.ndarray:
    """The same of what the engine says when it is given the answers; NaN where one of the two is
    not among its 20 most likely tokens."""
    given = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)
    found = []
    for prompt, pairs, output in zip(prompts, best, generate(llm, given, params), strict=True):
        assert output.prompt_logprobs is not None
        for (first, second), entry in zip(
            pairs.tolist(), output.prompt_logprobs[len(prompt) :], strict=True
        ):
            both = [entry[i].logprob for i in (first, second) if entry and i in entry]
            found.append(both[0] - both[1] if len(both) == 2 else np.nan)
    return np.array(found)


def test_bfloat16_parts_from_float32_only_where_bfloat16_cannot_tell(
    smollm2_path: Path,
    cache: Path,
    reference: TorchModel,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """What bfloat16 cannot tell is measured in transformers: by how much computing in bfloat16
    changes the margin between the two most likely tokens, over the 512 tokens of the float32
    answers. The engine may change it as much and no more, and a token that it chooses instead of
    the best one must be nearer to it than that, at every token of its answers."""
    exact = [answer_rows(reference, *pair) for pair in zip(prompts, expected, strict=True)]
    best = [np.argsort(-rows, axis=-1)[:, :2] for rows in exact]
    half = TorchModel(copy.deepcopy(reference.module).bfloat16())
    rounded = [answer_rows(half, *pair) for pair in zip(prompts, expected, strict=True)]
    noise = margins(rounded, best) - margins(exact, best)

    with LLM(str(smollm2_path), dtype="bfloat16", cache_dir=cache, **LIMITS) as llm:
        answers = [output.outputs[0].token_ids for output in generate(llm, prompts, GREEDY)]
        set_limits(llm)
        engine_noise = engine_margins(llm, prompts, expected, best) - margins(exact, best)

    assert np.isfinite(engine_noise).mean() > 0.98
    assert np.nanstd(engine_noise) < 1.2 * noise.std()
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = answer_rows(reference, prompt, answer)  # float32, given what bfloat16 chose
        lost = rows.max(axis=-1) - np.take_along_axis(rows, np.array(answer)[:, None], -1)[:, 0]
        assert lost.max() < np.abs(noise).max()


def test_greedy_answers_with_speculation_are_those_without(
    float32: LLM, smollm2_path: Path, cache: Path
) -> None:
    """Texts that the model continues by repeating them, and one that it does not."""
    prompts = [
        "The cat sat on the mat, and the dog lay by the door. " * 3 + "The cat sat",
        "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2,",
        PROMPTS[2],
    ]
    expected = [float32.generate([p], GREEDY, use_tqdm=False)[0] for p in prompts]
    options = {**LIMITS, "forbid_compile": False, "compilation": "on_demand"}
    with LLM(
        str(smollm2_path), dtype="float32", cache_dir=cache, speculative="ngram", **options
    ) as llm:
        outputs = [llm.generate([p], GREEDY, use_tqdm=False)[0] for p in prompts]
        stats = llm.engine.stats().speculation
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert stats is not None
    assert stats.num_draft_tokens >= stats.num_accepted_tokens > NUM_TOKENS // 2
