"""The command's arguments, and what becomes of an error.

Exit codes: 0, 1 failure, 2 wrong usage or input, 130 Ctrl-C, 141 the reader of a pipe has left.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jaxllm
from jaxllm.cli import bench, chat, compile, generate, plan, serve
from jaxllm.cli.flags import ENGINE, SAMPLING, SERVER
from jaxllm.cli.settings import UsageError
from jaxllm.config import ModelError
from jaxllm.loading.hub import cache_folder
from jaxllm.loading.packages import list_builtin

MODEL_HELP = "a folder, a .gguf file, org/name of the Hugging Face hub, or a name that models lists"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. argv: without the program's name; None takes the
    process's own and ends the process."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if argv is None:
        _repeat_lost_interrupts()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # an answer may have characters that a terminal in ASCII or Latin-1 has not
            sys.stdout.reconfigure(errors="replace")
    code = _run(sys.argv[1:] if argv is None else argv, ends_process=argv is None)
    if argv is None:
        # Not sys.exit: it would wait until programs that nobody needs any more are compiled.
        os._exit(code)
    return code


def _repeat_lost_interrupts() -> None:
    """Ctrl-C in a callback of the garbage collector (jax has one) is printed and then forgotten by
    the interpreter."""
    default = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main_thread = threading.main_thread().ident
            again = (main_thread, signal.SIGINT)
            threading.Timer(0.05, signal.pthread_kill, again).start()  # after the callback
        else:
            default(unraisable)

    sys.unraisablehook = hook


def _run(argv: Sequence[str], ends_process: bool) -> int:
    try:
        code = _run_command(argv, ends_process)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"jaxllm: error: {_one_line(error)}", file=sys.stderr, flush=True)
        is_usage = isinstance(error, ValueError) and not isinstance(error, ModelError)
        return 2 if is_usage else 1


def _run_command(argv: Sequence[str], ends_process: bool) -> int:
    try:
        arguments = _parser().parse_args(argv, argparse.Namespace(ends_process=ends_process))
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 0
    _start_log(arguments.verbose, arguments.debug)
    return arguments.run(arguments)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    expected = isinstance(error, ValueError | OSError)
    return text if expected and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxllm", description=jaxllm.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    command = _add(commands, "generate", "answer prompts", generate.run)
    _add_model(command)
    generate.add_arguments(command)
    SAMPLING.add_flags(command)
    ENGINE.add_flags(command)

    command = _add(commands, "chat", "a conversation in the terminal", chat.run)
    _add_model(command)
    chat.add_arguments(command)
    SAMPLING.add_flags(command, skip=chat.NOT_IN_CHAT)
    ENGINE.add_flags(command)

    command = _add(commands, "serve", "answer HTTP requests with OpenAI's API", serve.run)
    _add_model(command)
    SERVER.add_flags(command)
    ENGINE.add_flags(command)

    command = _add(commands, "plan", "whether a model fits on chips, and how fast it is", plan.run)
    _add_model(command)
    plan.add_arguments(command)
    ENGINE.add_flags(command, skip=plan.NOT_PLANNED)

    what = "compile all programs into a folder for --compiled"
    command = _add(commands, "compile", what, compile.run)
    _add_model(command)
    compile.add_arguments(command)
    ENGINE.add_flags(command, skip=plan.NOT_PLANNED)

    _add_bench(commands)

    command = _add(commands, "models", "list the built-in models", list_models)
    command.add_argument("--cache-dir", metavar="PATH", help="folder of fetched models")
    return parser


def _add_bench(commands: argparse._SubParsersAction) -> None:
    what = "measure an engine or a server"
    command = commands.add_parser("bench", help=what, description=what, allow_abbrev=False)
    benchmarks = command.add_subparsers(required=True, metavar="BENCHMARK", parser_class=_Parser)
    for name, help_text, run, add_flags in (
        ("latency", "seconds of one batch", bench.run_latency, bench.add_latency_flags),
        ("throughput", "many prompts at once", bench.run_throughput, bench.add_throughput_flags),
        ("startup", "fresh processes to the first token", bench.run_startup,
         bench.add_startup_flags),
    ):  # fmt: skip
        benchmark = _add(benchmarks, name, help_text, run)
        _add_model(benchmark)
        add_flags(benchmark)
        ENGINE.add_flags(benchmark)
    serve_help = "a server of OpenAI's API, ours or another's"
    bench.add_serve_flags(_add(benchmarks, "serve", serve_help, bench.run_serve))
    sweep_help = "the same at several request rates or concurrencies"
    bench.add_sweep_flags(_add(benchmarks, "sweep", sweep_help, bench.run_sweep))


def _add(commands: argparse._SubParsersAction, name: str, what: str, run: object) -> _Parser:
    command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("--verbose", action="store_true", help="show the log")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--config", metavar="FILE", help="TOML with tables [model], [engine], [sampling]"
    )


def _start_log(verbose: bool, debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(debug))
    log = logging.getLogger("jaxllm")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if verbose or debug else logging.WARNING)


class _Formatter(logging.Formatter):
    """One line a record; tracebacks only with --debug."""

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        text = f"jaxllm: {record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if self._debug:
                text += "\n" + self.formatException(record.exc_info)
        return text


def list_models(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> int:
    """The table of built-in models."""
    folder = arguments.cache_dir or environment.get("JAXLLM_CACHE")
    models = list_builtin(Path(os.path.expanduser(folder)) if folder else cache_folder())
    rows = [("NAME", "CACHED", "SIZE", "LICENCE", "PATH")] + [
        (m.name, "yes" if m.cached else "no", f"{m.size / 1e6:.0f} MB", m.licence, str(m.path))
        for m in models
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0
