"""Programs compiled into a folder: used by another process that compiles nothing, or refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main
from jaxllm.compile_ahead import compile_ahead
from jaxllm.engine_options import EngineOptions
from jaxllm.loading.read_config import read_model_config
from jaxllm.runtime.compiled_folder import CompiledFolderError
from jaxllm.runtime.sharding import Placement

LIMITS = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 32}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
PROMPTS = [[5 + i] * (3 + 11 * i) for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1,
                        repetition_penalty=1.1)  # fmt: skip
PROGRAM = """
import json, sys
import jax
from jaxllm import LLM, SamplingParams
from jaxllm.runtime.compilation import COMPILE_EVENT

compiled = []
def listener(event, duration_secs, **_):
    if event == COMPILE_EVENT:
        compiled.append(event)

jax.monitoring.register_event_duration_secs_listener(listener)
model, folder, cache, limits, prompts = sys.argv[1:]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1,
                        repetition_penalty=1.1)
with LLM(model, compiled=folder, cache_dir=cache, forbid_compile=True, **json.loads(limits)) as llm:
    outputs = llm.generate(json.loads(prompts), params, use_tqdm=False)
    figures = llm._running.runner.figures()
print(json.dumps([len(compiled), figures.num_compiled, figures.num_loaded,
                  [o.outputs[0].token_ids for o in outputs]]))
"""


@pytest.fixture(scope="module")
def programs(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "programs"
    assert main(["compile", str(tiny_llama_folder), "--out", str(folder), *FLAGS]) == 0
    return folder


@pytest.fixture
def copied(programs: Path, tmp_path: Path) -> Path:
    """The same programs, to be spoilt."""
    return Path(shutil.copytree(programs, tmp_path / "programs"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.bin"))


@pytest.mark.long
def test_another_process_compiles_nothing(
    tiny_llama_folder: Path, programs: Path, tmp_path: Path
) -> None:
    arguments = [tiny_llama_folder, programs, tmp_path, json.dumps(LIMITS), json.dumps(PROMPTS)]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    num_events, num_compiled, num_loaded, tokens = json.loads(child.stdout)
    assert (num_events, num_compiled) == (0, 0)
    assert num_loaded == len(list(programs.glob("*.bin"))) == 4
    assert not (tmp_path / "programs").exists() or not any((tmp_path / "programs").iterdir())
    with LLM(str(tiny_llama_folder), program_cache=False, compilation="on_demand", **LIMITS) as llm:
        expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens == [output.outputs[0].token_ids for output in expected]


@pytest.mark.long
def test_programs_for_a_mesh_of_one_device_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """As those for a single chip are, which was only described when they were compiled."""
    options = EngineOptions(**LIMITS)
    placement = Placement.on(jax.devices()[:1], on_mesh=True)
    config = read_model_config(str(tiny_llama_folder))
    out = tmp_path / "programs"
    done: list[str] = []
    compile_ahead(config, options, placement, out, device_memory=None, progress=done.append)
    assert len(done) == 1 + 4
    outputs = []
    for given in ({"compiled": out}, {"layer_loop": "scan", "program_cache": False}):
        with LLM(str(tiny_llama_folder), compilation="on_demand", **LIMITS, **given) as llm:
            outputs.append(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    tokens, expected = ([o.outputs[0].token_ids for o in each] for each in outputs)
    assert tokens == expected


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is made for Linux on x86-64 only"
)
def test_programs_for_a_tpu_are_stored(tiny_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "programs"
    flags = [*FLAGS, "--chip", "v6e", "--chips", "2", "--dtype", "bfloat16"]
    flags += ["--kv-cache-memory-bytes", str(2**20)]
    assert main(["compile", str(tiny_llama_folder), "--out", str(out), *flags]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["device"]["kind"] == "TPU v6 lite"
    assert manifest["device"]["number"] == 2
    assert "libtpu" in manifest["versions"]
    assert manifest["num_blocks"] == 32  # 8 sequences of 128 tokens in blocks of 32
    assert len(list(out.glob("*.bin"))) == len(manifest["programs"]) == 4
    with pytest.raises(CompiledFolderError, match="device: platform was 'tpu' and is 'cpu' now"):
        LLM(str(tiny_llama_folder), compiled=out, **LIMITS)


def test_the_manifest_says_what_the_programs_are_for(programs: Path) -> None:
    manifest = json.loads((programs / "manifest.json").read_text())
    assert set(manifest["versions"]) == {"jaxllm", "jax", "jaxlib", "flax"}
    assert manifest["device"]["platform"] == "cpu"
    assert manifest["options"]["max_num_seqs"] == 8
    assert set(manifest["programs"]) == {
        "allocate state", "mixed 32x8", "decode 8x8", "write sampling table row",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 4}, "options: max_num_seqs was 8 and is 4 now"),
        ({"max_model_len": 64}, "options: max_model_len was 128 and is 64 now"),
        ({"block_size": 32}, "options: block_size was 16 and is 32 now"),
        ({"max_steps_per_dispatch": 3}, "options: max_steps_per_dispatch was 1 and is 3 now"),
        ({"speculative": "ngram"}, "options: num_speculative_tokens was 0 and is 7 now"),
        ({"dtype": "bfloat16"}, "options: dtype was 'float32' and is 'bfloat16' now"),
        ({"quantization": "int8"}, "options: quantization was None and is 'int8' now"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype was 'float32' and is 'int8' now"),
        ({"layer_loop": "scan"}, "options: layer_loop was 'switch' and is 'scan' now"),
        ({"attention": "reference"}, "options: attention was .* and is 'reference' now"),
    ],
)
def test_other_options_are_refused(
    tiny_llama_folder: Path, programs: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompiledFolderError, match=message):
        LLM(str(tiny_llama_folder), compiled=programs, **{**LIMITS, **options})


def test_another_model_is_refused(tiny_llama_folder: Path, programs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CompiledFolderError, match="it was compiled for another model"):
        LLM(str(other), compiled=programs, **LIMITS)


def flip_a_bit(folder: Path) -> None:
    content = bytearray(first_file(folder).read_bytes())
    content[len(content) // 2] ^= 1
    first_file(folder).write_bytes(content)


def move_a_file_out(folder: Path) -> None:
    moved = shutil.move(first_file(folder), folder.parent / "x.bin")
    name = f"../{Path(moved).name}"
    edit(folder, lambda m: m["programs"]["allocate state"].update(file=name))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, "00-allocate-state.bin is not the file of the manifest"),
        (lambda f: first_file(f).unlink(), "00-allocate-state.bin cannot be read: No such file"),
        (move_a_file_out, "the file of allocate state is outside the folder"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read: No such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not one of `jaxllm compile`"),
        (lambda f: edit(f, lambda m: m.pop("programs")), "is not one of `jaxllm compile`"),
        (lambda f: edit(f, lambda m: m.update(num_blocks="8")), "is not one of `jaxllm compile`"),
        (
            lambda f: edit(f, lambda m: m["programs"]["decode 8x8"].pop("sha256")),
            "is not one of `jaxllm compile`",
        ),
        (lambda f: edit(f, lambda m: m.update(format=0)), "format was 0 and is 1 now"),
        (
            lambda f: edit(f, lambda m: m["versions"].update(jaxlib="0.1")),
            "versions: jaxlib was '0.1' and is",
        ),
        (
            lambda f: edit(f, lambda m: m["device"].update(kind="TPU v6 lite")),
            "device: kind was 'TPU v6 lite' and is 'cpu' now",
        ),
        (
            lambda f: edit(f, lambda m: m["device"].update(processor="other")),
            "device: processor was 'other'",
        ),
        (lambda f: edit(f, lambda m: m.update(source="x")), "another state of jaxllm's source"),
        (lambda f: f.chmod(0o777), "others may write to it"),
    ],
)  # fmt: skip
def test_a_folder_that_was_changed_is_refused(
    tiny_llama_folder: Path, copied: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(copied)
    with pytest.raises(CompiledFolderError, match=message):
        LLM(str(tiny_llama_folder), compiled=copied, **LIMITS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f, lambda m: m["programs"].pop("decode 8x8")), "has no program decode 8x8"),
        (
            lambda f: edit(f, lambda m: m.update(num_blocks=m["num_blocks"] + 1)),
            "allocate state was compiled for other shapes",
        ),
    ],
)
def test_programs_that_do_not_fit_are_not_loaded(
    tiny_llama_folder: Path, copied: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(copied)
    with pytest.raises(CompiledFolderError, match=message):
        LLM(str(tiny_llama_folder), compiled=copied, forbid_compile=True, **LIMITS)


def test_a_folder_that_is_not_empty_is_not_written_to(
    tiny_llama_folder: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(programs.iterdir())
    assert main(["compile", str(tiny_llama_folder), "--out", str(programs), *FLAGS]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
    assert sorted(programs.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chips", "2"], "--chips needs --chip"),
        (["--chip", "h100"], "chip must be one of v5e, v5p, v6e, v7x, got 'h100'"),
        (["--chip", "v6e", "--chips", "3"], "chips must be one of 1, 2, 4, .* got 3"),
        (["--compiled", "x"], "unrecognized arguments: --compiled x"),
        (["--speculative", "draft:x"], "programs for a draft model cannot be compiled ahead"),
    ],
)
def test_flags_that_make_no_sense(
    tiny_llama_folder: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["compile", str(tiny_llama_folder), "--out", str(out), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()
