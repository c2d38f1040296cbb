"""From the files of a model to an engine: what ends an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.startup import _end_tokens
from jaxllm.structured_outputs import StructuredOutputsParams

END = 1  # of the tiny tokenizer


@pytest.fixture(scope="module")
def llm(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """A model whose tokenizer alone says what ends an answer."""
    folder = tmp_path_factory.mktemp("no-eos") / "model"
    shutil.copytree(tiny_llama_folder, folder)
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    options = tiny_llm | {"forbid_compile": False, "compilation": "on_demand"}
    with LLM(str(folder), **options) as llm:
        assert llm._running.model_config.eos_token_ids == ()
        yield llm


@pytest.mark.parametrize(
    ("ignore_eos", "reason", "count"), [(False, "stop", 1), (True, "length", 4)]
)
def test_the_tokenizer_s_end_token_ends_an_answer(
    llm: LLM, ignore_eos: bool, reason: str, count: int
) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=4, logit_bias={END: 100}, ignore_eos=ignore_eos
    )
    [answer] = llm.generate("The fox", params, use_tqdm=False)[0].outputs
    assert (answer.finish_reason, answer.token_ids) == (reason, [END] * count)


def test_an_answer_of_a_given_form_may_end_with_it(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="fox( dog)*")
    params = SamplingParams(
        temperature=0, max_tokens=20, logit_bias={END: 100}, structured_outputs=form
    )
    [answer] = llm.generate("The", params, use_tqdm=False)[0].outputs
    assert (answer.text, answer.finish_reason) == ("fox", "stop")
    assert answer.token_ids[-1] == END


def test_it_comes_after_those_of_the_configuration_and_only_if_the_model_has_it(
    llm: LLM,
) -> None:
    config, tokenizer = llm._running.model_config, llm.get_tokenizer()
    assert _end_tokens(config, tokenizer) == (END,)
    assert _end_tokens(replace(config, eos_token_ids=(7, 9)), tokenizer) == (7, 9, END)
    assert _end_tokens(replace(config, eos_token_ids=(END, 9)), tokenizer) == (END, 9)
    assert _end_tokens(replace(config, vocab_size=END), tokenizer) == ()
