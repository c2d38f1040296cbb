"""The command line: flags, configuration files, generate, models. See test_cli_chat.py for chat."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from held_command import hold

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.cli import main
from jaxllm.cli.flags import ENGINE, SAMPLING
from jaxllm.cli.settings import read_config
from jaxllm.engine_options import EngineOptions
from jaxllm.loading.packages import BUILTIN_MODELS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
GREEDY_FLAGS = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command in this process: its exit code, stdout and stderr."""

    def run(*argv: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.delenv("JAXLLM_CACHE", raising=False)
    return run


@pytest.fixture(scope="session")
def tiny_flags(tiny_llm: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in tiny_llm.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@pytest.fixture
def generate(cli: Cli, tiny_llama_folder: Path, tiny_flags: list[str]) -> Cli:
    def run(*argv: object, stdin: str = "") -> tuple[int, str, str]:
        return cli("generate", tiny_llama_folder, *tiny_flags, *argv, stdin=stdin)

    return run


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm


def text_of(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> str:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def objects(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


# ---- flags and settings


def settings_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[str, EngineOptions]:
    """What the engine would be started with."""
    seen = []

    def start_engine(model: str, options: EngineOptions) -> Any:
        seen.append((model, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxllm.startup.start_engine", start_engine)
    assert main(argv) == 130
    return seen[0]


def test_every_option_has_a_flag_with_help() -> None:
    names = {field.name for field in fields(SamplingParams)} - {"output_kind"}
    assert set(SAMPLING.options()) == set(SAMPLING.help) == names
    assert set(ENGINE.options()) == set(ENGINE.help) == {f.name for f in fields(EngineOptions)}


def test_flags_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = settings_of(
        monkeypatch, "generate", "m", "--prompt", "a", "--dtype", "float32", "--max-model-len",
        "100", "--no-enable-prefix-caching", "--engine-seed", "7", "--seed", "8",
        "--cache-dir", "~/there", "--max-num-waiting", "none", "--forbid-compile",
    )  # fmt: skip
    assert model == "m"
    assert options == EngineOptions(
        dtype="float32",
        max_model_len=100,
        max_num_seqs=1,
        enable_prefix_caching=False,
        seed=7,
        cache_dir=Path.home() / "there",
        compilation="on_demand",
        forbid_compile=True,
    )


def test_sampling_flags_are_parsed() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    SAMPLING.add_flags(parser)
    words = (
        "--n 2 --top-p 0.5 --max-tokens none --stop a --stop b --stop-token-ids 5,17 "
        "--logit-bias 5:1.5,7:-100 --presence-penalty -1.5 --no-detokenize --ignore-eos"
    )
    assert SAMPLING.given(parser.parse_args(words.split())) == {
        "n": 2,
        "top_p": 0.5,
        "max_tokens": None,
        "stop": ["a", "b"],
        "stop_token_ids": [5, 17],
        "logit_bias": {5: 1.5, 7: -100.0},
        "presence_penalty": -1.5,
        "detokenize": False,
        "ignore_eos": True,
    }
    assert SAMPLING.given(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", "a"], 1),
        (["--prompt", "a", "--n", "2"], 8),
        (["--prompt", "a", "--best-of", "2"], 8),
        (["--prompt", "a", "--beam-width", "8"], 8),
        (["--prompt", "a", "--beam-width", "9"], None),
        (["--prompt", "a"] * 8, 8),
        (["--prompt", "a"] * 9, None),
        (["--prompt", "a", "--max-num-seqs", "3"], 3),
    ],
)
def test_few_prompts_take_a_small_engine(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: int | None
) -> None:
    options = settings_of(monkeypatch, "generate", "m", *flags)[1]
    assert options.max_num_seqs == expected
    assert options.compilation == ("background" if expected is None else "on_demand")


def test_flags_win_over_the_file_and_it_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", "/from/env")
    file = tmp_path / "a.toml"
    command = ("generate", "--prompt", "a", "--config", str(file))
    file.write_text('[model]\nname = "x"\ndtype = "float32"\n[engine]\nmax_model_len = 99\n')
    model, options = settings_of(monkeypatch, *command, "--dtype", "bfloat16")
    assert model == "x"
    assert (options.dtype, options.max_model_len) == ("bfloat16", 99)
    assert options.cache_dir == Path("/from/env")
    file.write_text('[model]\nname = "x"\n[engine]\ncache_dir = "/from/file"\n')
    model, options = settings_of(monkeypatch, *command[:1], "y", *command[1:])
    assert (model, options.cache_dir) == ("y", Path("/from/file"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[model", "is not valid TOML"),
        ("[modle]\n", "unknown table: 'modle'; known: model, engine, sampling"),
        ("model = 3\n", "model must be a table"),
        ("[model]\nname = 3\n", "name in [model] must be a string, got 3"),
        ("[engine]\nmax_len = 3\n", "unknown key in [engine]: 'max_len'"),
        ('[engine]\ndtype = "float32"\n', "unknown key in [engine]: 'dtype'"),
        ("[engine]\nmax_model_len = 0\n", "max_model_len must be a positive integer, got 0"),
        ("[engine]\nseed = 1.5\n", "seed must be an integer, got 1.5"),
        ("[engine]\nprogram_cache = 1\n", "program_cache must be true or false, got 1"),
        ("[engine]\nattention = 1\n", "attention must be a string, got 1"),
        ('[sampling]\noutput_kind = "x"\n', "unknown key in [sampling]: 'output_kind'"),
        ("[sampling]\ntop_p = 2\n", "top_p must be a number in (0, 1], got 2"),
    ],
)
def test_bad_config_is_one_line_and_exit_code_2(
    cli: Cli, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    code, out, err = cli("generate", "--prompt", "a", "--config", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"jaxllm: error: {file}: ")
    assert message in err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_projects_configs_are_valid(path: Path) -> None:
    settings = read_config(path)
    assert settings.model
    assert settings.engine_options().max_model_len
    assert SamplingParams.from_dict(settings.sampling).max_tokens


def test_there_are_configs() -> None:
    assert "smollm2-135m-cpu.toml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["generate", "m", "--prompt", "a", "--top", "3"], "unrecognized arguments: --top 3"),
        (["generate", "m", "--prompt", "a", "--n", "x"], "--n: must be an integer, got 'x'"),
        (["generate", "m", "--prompt", "a", "--n", "0"], "n must be an integer in [1, 16384]"),
        (["generate", "m", "--prompt", "a", "--logit-bias", "5"], "pairs of token id and number"),
        (["generate", "m", "--prompt", "a", "--stop-token-ids", "a"], "token ids separated"),
        (["generate", "m", "--prompt", "a", "--dtype", "int3"], "dtype must be one of auto"),
        (["generate", "m", "--prompt", "a", "--prompts-file", "f"], "not allowed with"),
        (["generate", "m", "--prompt", "a", "--logprobs", "1"], "use --output-format jsonl"),
        (["generate", "m", "--prompt", "a", "--output", "/no/such"], "--output /no/such: cannot"),
        (["generate", "m", "--prompts-file", "/no/such"], "/no/such: cannot be read: No such"),
        (["generate", "m"], "no prompts: the input is empty"),
        (["generate", "--prompt", "a"], "which model?"),
        (["chat", "m", "--n", "2"], "unrecognized arguments: --n 2"),
        (["chat", "m", "--best-of", "2"], "unrecognized arguments: --best-of 2"),
        (["generate", "m", "--prompt", "a", "--beam-width", "65"], "beam_width must be an integer"),
        (["generate", "m", "--prompt", "a", "--length-penalty", "1"], "needs --beam-width"),
        (
            ["generate", "m", "--prompt", "a", "--beam-width", "2", "--top-k", "3"],
            "top_k cannot be combined with beam search",
        ),
        (
            ["generate", "m", "--prompt", "a", "--beam-width", "2", "--stream"],
            "--stream cannot be combined with --beam-width",
        ),
        (["generate", "m", "--prompt", "a", "--speculative", "eagle"], "must be 'ngram'"),
        (["serve", "m", "--speculative", "draft:"], "with the name of a smaller model"),
        (["serve", "m", "--num-speculative-tokens", "3"], "has no effect without speculation"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, words: list[str], message: str) -> None:
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("jaxllm: error: ")
    assert message in err


def test_an_unknown_model_is_one_line_and_exit_code_1(cli: Cli) -> None:
    code, out, err = cli("generate", "nosuch", "--prompt", "a")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("jaxllm: error: no model 'nosuch'")
    code, _, err = cli("generate", "nosuch", "--prompt", "a", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_models_lists_what_is_cached(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BUILTIN_MODELS["smollm2-135m-instruct"]
    path = tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    code, out, _ = cli("models", "--cache-dir", tmp_path)
    header, row = out.splitlines()
    assert code == 0
    assert header.split() == ["NAME", "CACHED", "SIZE", "LICENCE", "PATH"]
    assert row.split() == [spec.name, "no", "98", "MB", "Apache-2.0", str(path)]
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(spec.size)
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    assert cli("models")[1].splitlines()[1].split()[1] == "yes"


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, "jaxllm 0.1.0\n", "")


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["models"], ["generate", "m", "--top-p", "2"]]
)
def test_what_needs_no_engine_does_not_import_one(words: list[str]) -> None:
    program = f"""
import sys, time
from jaxllm.cli import main
main({words!r})
heavy = {{"jax", "transformers", "torch", "gguf", "tqdm", "tokenizers"}} & set(sys.modules)
print("\\n", time.process_time(), *heavy)
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(2)  # the first may have to read the files from the disk
    ]
    last_lines = [run.stdout.splitlines()[-1].split() for run in runs]
    assert [line[1:] for line in last_lines] == [[], []]
    assert min(float(line[0]) for line in last_lines) < 1  # of the processor; about 0.15 alone


# ---- generate


def test_one_prompt_is_answered_with_nothing_but_the_text(generate: Cli, llm: LLM) -> None:
    assert generate("--prompt", "The fox", *GREEDY_FLAGS) == (0, text_of(llm, "The fox") + "\n", "")


def test_several_prompts_from_stdin_have_titles_and_their_order(generate: Cli, llm: LLM) -> None:
    code, out, _ = generate(*GREEDY_FLAGS, stdin="The fox\n\nOnce upon a time\n")
    first, second = text_of(llm, "The fox"), text_of(llm, "Once upon a time")
    assert (code, out) == (0, f"[1] The fox\n{first}\n\n[3] Once upon a time\n{second}\n")


def test_streamed_text_is_the_same_text(generate: Cli) -> None:
    flags = ("--prompt", "The fox", "--prompt", "In", "--n", "2", "--seed", "5", "--ignore-eos")
    whole = generate(*flags)
    assert generate(*flags, "--stream") == whole
    titles = [line for line in whole[1].split("\n") if line.startswith("[")]
    assert titles == ["[1.1] The fox", "[1.2] The fox", "[2.1] In", "[2.2] In"]


def test_beam_search_writes_the_best_answers(generate: Cli, llm: LLM) -> None:
    search = BeamSearchParams(beam_width=4, max_tokens=9, length_penalty=0.5, early_stopping=True)
    [expected] = llm.beam_search("The fox", search, use_tqdm=False)
    flags = (
        "--prompt", "The fox", "--beam-width", "4", "--max-tokens", "9", "--length-penalty", "0.5",
        "--early-stopping", "true",
    )  # fmt: skip
    assert generate(*flags) == (0, expected.outputs[0].text + "\n", "")
    code, out, _ = generate(*flags, "--n", "3", "--output-format", "jsonl")
    found = objects(out)[0]["outputs"]
    assert code == 0
    assert [answer["token_ids"] for answer in found] == [a.token_ids for a in expected.outputs[:3]]
    assert found[0]["cumulative_logprob"] == pytest.approx(expected.outputs[0].cumulative_logprob)


def test_beams_of_a_form_with_their_log_probabilities(generate: Cli) -> None:
    flags = (
        "--prompt", "The fox", "--prompt", "In", "--beam-width", "4", "--n", "4",
        "--structured-outputs", '{"choice": ["red", "green", "blue"]}',
    )  # fmt: skip
    code, out, _ = generate(*flags)
    titles = [line.split()[0] for line in out.splitlines() if line.startswith("[")]
    assert titles == ["[1.1]", "[1.2]", "[1.3]", "[2.1]", "[2.2]", "[2.3]"]
    code, out, _ = generate(*flags, "--logprobs", "1", "--output-format", "jsonl")
    answers = objects(out)[0]["outputs"]
    assert code == 0
    assert sorted(answer["text"] for answer in answers) == ["blue", "green", "red"]  # not four
    for answer in answers:
        total = sum(position[0]["logprob"] for position in answer["logprobs"])
        assert total == pytest.approx(answer["cumulative_logprob"], abs=1e-4)


def test_chat_flag_applies_the_template(generate: Cli, llm: LLM) -> None:
    expected = llm.chat([{"role": "user", "content": "The fox"}], GREEDY, use_tqdm=False)
    _, out, _ = generate("--prompt", "The fox", "--chat", *GREEDY_FLAGS)
    assert out == expected[0].outputs[0].text + "\n"


def test_jsonl_lines_with_their_own_options_and_errors(
    generate: Cli, llm: LLM, tmp_path: Path
) -> None:
    message = {"role": "user", "content": "Hello"}
    lines = [
        {"id": "a", "prompt": "The fox", "max_tokens": 3},
        "{not json",
        {"id": 7, "messages": [message]},
        {"prompt_token_ids": [10, 11, 12], "logprobs": 1},
        {"id": "b", "prompt": "x", "max_token": 3},
        {"id": "c", "prompt": "x", "messages": [message]},
        {"id": "d", "prompt_token_ids": [5, 999]},
        {"id": "e", "messages": [{"content": "no role"}]},
        {"id": "f", "prompt": "x", "priority": 2},
        [1],
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n"
    )
    code, out, err = generate(
        "--prompts-file", source, "--output-format", "jsonl", "--output", target, *GREEDY_FLAGS
    )
    assert (code, out, err) == (1, "", "")
    answers = objects(target.read_text())
    assert [answer["line"] for answer in answers] == list(range(1, 11))
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert answers[0] == {
        "id": "a", "line": 1, "prompt": "The fox", "num_prompt_tokens": 2, "num_cached_tokens": 0,
        "outputs": [{
            "index": 0, "text": text_of(llm, "The fox", short),
            "token_ids": llm.generate("The fox", short, use_tqdm=False)[0].outputs[0].token_ids,
            "finish_reason": "length", "stop_reason": None,
        }],
    }  # fmt: skip
    chat = llm.chat([message], GREEDY, use_tqdm=False)[0].outputs[0]
    assert (answers[2]["id"], answers[2]["outputs"][0]["text"]) == (7, chat.text)
    assert len(answers[3]["outputs"][0]["logprobs"]) == 8
    assert {answer["line"]: answer.get("id") for answer in answers if "error" in answer} == {
        2: None, 5: "b", 6: "c", 7: "d", 8: "e", 9: "f", 10: None,
    }  # fmt: skip
    for line, text in {
        2: "not valid JSON", 5: "unknown sampling option 'max_token'", 6: "prompt and messages",
        7: "999 at position 1", 8: "messages[0] needs a role", 9: "scheduling_policy='priority'",
        10: "must be a JSON object, got list",
    }.items():  # fmt: skip
        assert text in answers[line - 1]["error"]


def test_streamed_jsonl_pieces_join_to_the_answers(generate: Cli, llm: LLM) -> None:
    code, out, _ = generate(
        "--input-format", "jsonl", "--output-format", "jsonl", "--stream", *GREEDY_FLAGS,
        stdin='{"prompt": "The fox", "id": "a"}\n{"prompt": "In"}\n',
    )  # fmt: skip
    pieces = objects(out)
    assert code == 0
    for line, prompt in ((1, "The fox"), (2, "In")):
        own = [piece for piece in pieces if piece["line"] == line]
        assert len(own) > 2
        assert "".join(piece.get("text", "") for piece in own) == text_of(llm, prompt)
        assert own[-1]["finished"]
    assert {piece.get("id") for piece in pieces} == {"a", None}


def test_a_prompt_that_cannot_be_served_harms_no_other(generate: Cli, llm: LLM) -> None:
    code, out, err = generate("--prompt", "fox " * 300, "--prompt", "The fox", *GREEDY_FLAGS)
    assert code == 1
    assert out == f"[2] The fox\n{text_of(llm, 'The fox')}\n"
    assert err.startswith("jaxllm: error: prompt 1: the prompt has ")
    assert err.count("\n") == 1


def test_more_prompts_than_the_engine_takes_at_once(generate: Cli, llm: LLM) -> None:
    prompts = [f"The fox {i}" for i in range(20)]
    code, out, _ = generate(
        "--output-format", "jsonl", "--max-num-waiting", "1", *GREEDY_FLAGS,
        stdin="\n".join(prompts),
    )  # fmt: skip
    expected = [o.outputs[0].text for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert code == 0
    assert [answer["outputs"][0]["text"] for answer in objects(out)] == expected


def test_when_steps_fail_it_is_said(generate: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr("jaxllm.runtime.model_runner.ModelRunner.execute", fail)
    code, out, err = generate("--prompt", "a", "--output-format", "jsonl")
    assert code == 1
    assert objects(out)[0]["error"].startswith("the engine failed: RuntimeError: out of memory")
    assert "Traceback" not in err


# ---- as a process of its own


def process(*words: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def test_ctrl_c_ends_generate_with_130(tiny_llama_folder: Path, tiny_flags: list[str]) -> None:
    words = ["generate", str(tiny_llama_folder), *tiny_flags, "--prompt", "a", "--stream"]
    with hold() as held:
        child = subprocess.Popen(
            held.command(*words, "--ignore-eos", "--max-tokens", "240"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=held.environment(), pass_fds=(held.read_fd,),
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")


def test_text_that_the_output_cannot_encode_is_replaced(
    tiny_llama_folder: Path, tiny_flags: list[str]
) -> None:
    child = process(
        tiny_llama_folder, *tiny_flags, "--prompt", "café", "--prompt", "b", "--max-tokens", "1",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert out.startswith("[1] caf?\n")


def test_a_short_run_leaves_what_the_next_one_needs(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Its answers come from the first program, while the one for decoding is being compiled."""
    child = process(
        tiny_llama_folder, "--prompt", "a", "--prompt", "b", "--max-tokens", "2",
        "--max-model-len", "64", "--cache-dir", tmp_path,
    )  # fmt: skip
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert len(list((tmp_path / "programs").iterdir())) == 3  # and that which allocates the state


def test_a_broken_pipe_is_quiet(tiny_llama_folder: Path, tiny_flags: list[str]) -> None:
    child = process(tiny_llama_folder, *tiny_flags, "--prompt", "a", "--stream", "--ignore-eos")
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 141


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [("", 2, "standard input is closed"), ("--prompt a", 1, "no model 'nosuch'")],
)
def test_a_closed_stdin_matters_only_where_it_is_read(flags: str, code: int, message: str) -> None:
    script = ROOT / "scripts" / "generate.py"
    line = f"exec '{sys.executable}' '{script}' nosuch {flags} <&-"
    child = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert child.returncode == code
    assert message in child.stderr


def test_the_real_model_from_the_shell(smollm2_path: Path) -> None:
    child = process(smollm2_path, "--max-tokens", "3", "--temperature", "0", "--prompt",
                    "The capital of France is", "--max-model-len", "256", "--verbose")  # fmt: skip
    out, err = child.communicate(timeout=300)
    assert out.startswith(" Paris.")
    assert child.returncode == 0
    assert "memory" in err
    assert "ready in" in err


def test_ctrl_c_is_not_lost_in_a_callback_of_the_collector() -> None:
    program = """
import signal, time
from jaxllm.cli import command
command._repeat_lost_interrupts()
class Unlucky:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
try:
    Unlucky()
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert (child.stdout, child.stderr) == ("interrupted\n", "")
