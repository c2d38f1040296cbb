"""Compiled programs: kept on disk, loaded again, never by surprise."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.runtime import compilation
from jaxllm.runtime.compilation import Compiler, LateCompileError, ProgramCache, program_key
from jaxllm.runtime.programs import Program
from jaxllm.runtime.sharding import Placement

VECTOR = jax.ShapeDtypeStruct((8,), jnp.float32)
ARGS = ({"a": VECTOR, "b": VECTOR},)


def add(pair: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return pair["a"] + pair["b"], pair["a"] * 2


def pair() -> dict[str, jax.Array]:
    return {"a": jnp.arange(8.0), "b": jnp.ones(8)}


@pytest.fixture
def make() -> Iterator[Callable[..., Compiler]]:
    compilers = []

    def build(folder: Path | None = None, **options: Any) -> Compiler:
        cache = None if folder is None else ProgramCache.open(folder)
        compilers.append(Compiler(cache, num_threads=2, **options))
        return compilers[-1]

    yield build
    for compiler in compilers:
        compiler.close()


ADD = Program("add", add, ARGS, (0, 0), donate=None, key=())


def submit(compiler: Compiler, *, held: bool = False, **changes: Any) -> None:
    compiler.submit(replace(ADD, **changes), held=held)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def assert_adds(compiler: Compiler) -> None:
    total, twice = compiler.get("add")(pair())
    np.testing.assert_array_equal(total, np.arange(8.0) + 1)
    np.testing.assert_array_equal(twice, np.arange(8.0) * 2)


def test_a_second_compiler_loads_what_the_first_compiled(
    make: Callable[..., Compiler], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "programs"
    for num_compiled, num_loaded in ((1, 0), (0, 1)):
        compiler = make(folder)
        submit(compiler)
        compiler.wait()
        assert_adds(compiler)
        assert (compiler.num_compiled, compiler.num_loaded) == (num_compiled, num_loaded)
        assert (compiler.compile_seconds > 0) == bool(num_compiled)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(programs(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "sealed nonsense"])
def test_a_damaged_program_is_compiled_again(
    make: Callable[..., Compiler], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(tmp_path / "p")
    submit(first)
    first.wait()
    (path,) = programs(tmp_path / "p")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:  # a right checksum, but no program
        content = bytearray(compilation.hashlib.sha256(b"nonsense").digest() + b"nonsense")
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = make(tmp_path / "p")
        submit(second)
        second.wait()
    assert "cached program" in caplog.text
    assert_adds(second)
    assert (second.num_compiled, second.num_loaded) == (1, 0)
    third = make(tmp_path / "p")  # the good one took the place of the damaged one
    submit(third)
    third.wait()
    assert third.num_loaded == 1


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert ProgramCache.open(tmp_path) is None
    assert "others may write" in caplog.text
    tmp_path.chmod(0o755)
    assert ProgramCache.open(tmp_path) is not None


def test_a_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert ProgramCache.open(tmp_path / "file" / "folder") is None
    assert "no program cache" in caplog.text


def test_a_full_disk_is_a_warning(
    make: Callable[..., Compiler],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = tempfile.NamedTemporaryFile

    def full(*args: Any, **options: Any) -> Any:
        file = real(*args, **options)

        def write(content: bytes) -> int:
            file.file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        file.write = write
        return file

    monkeypatch.setattr(compilation.tempfile, "NamedTemporaryFile", full)
    compiler = make(tmp_path / "p")
    with caplog.at_level(logging.WARNING):
        submit(compiler)
        compiler.wait()
    assert "No space left on device" in caplog.text
    assert_adds(compiler)
    assert programs(tmp_path / "p") == []


def test_a_program_that_cannot_be_serialized_is_used_all_the_same(
    make: Callable[..., Compiler],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: serialization")

    monkeypatch.setattr(compilation.serialize_executable, "serialize", refuse)
    compiler = make(tmp_path / "p")
    with caplog.at_level(logging.WARNING):
        submit(compiler)
        compiler.wait()
    assert "UNIMPLEMENTED" in caplog.text
    assert_adds(compiler)


def test_the_key_tells_programs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = jax.ShapeDtypeStruct((8,), jnp.int32)
    longer = jax.ShapeDtypeStruct((16,), jnp.float32)
    devices = jax.devices()

    def key(**changes: Any) -> str:
        return program_key(replace(ADD, **changes), devices)

    keys = [
        key(),
        key(name="sub"),
        key(key=(1,)),
        key(donate=0),
        key(out=[0, 0]),
        key(arguments=({"a": VECTOR, "b": other},)),
        key(arguments=({"a": VECTOR, "b": longer},)),
        key(arguments=({"a": VECTOR, "c": VECTOR},)),
        key(arguments=(VECTOR, VECTOR)),
        key(arguments=Placement.on(devices, on_mesh=True).whole(ARGS)),
    ]
    monkeypatch.setattr(compilation, "source_digest", lambda: "other source")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(compilation, "_machine", lambda _: ("another machine",))
    keys.append(key())
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def testsource_digest_covers_what_a_step_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "jaxllm"
    names = ["config.py", "sampling_params.py", "engine/batch.py", "models/layers.py",
             "runtime/compilation.py", "../pallas_kernels/attention/api.py"]  # fmt: skip
    for name in names:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("before")
    monkeypatch.setattr(compilation, "__file__", str(package / "runtime" / "compilation.py"))
    digest = compilation.source_digest.__wrapped__
    digests = {digest()}
    for name in names:
        (package / name).write_text("after")
        digests.add(digest())
    assert len(digests) == 1 + len(names)


def test_donation_is_part_of_the_key(make: Callable[..., Compiler], tmp_path: Path) -> None:
    compiler = make(tmp_path / "p")
    submit(compiler)
    compiler.wait()
    submit(compiler, donate=0)
    compiler.wait()
    assert compiler.num_compiled == 2


@pytest.mark.parametrize("loaded", [False, True])
def test_donation_holds_for_compiled_and_loaded_programs(
    make: Callable[..., Compiler], tmp_path: Path, loaded: bool
) -> None:
    state = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    options = {
        "arguments": (state, jax.ShapeDtypeStruct((), jnp.int32)),
        "out": 0,
        "donate": 0,
    }
    for _ in range(1 + loaded):
        compiler = make(tmp_path / "p")
        submit(compiler, name="set", function=lambda x, i: x.at[i].set(1.0), **options)
        compiler.wait()
    assert compiler.num_loaded == loaded
    given = jnp.zeros(1 << 20)
    address = given.unsafe_buffer_pointer()
    result = compiler.get("set")(given, np.int32(5))
    assert given.is_deleted()
    assert result.unsafe_buffer_pointer() == address
    assert (result[5], result.sum()) == (1, 1)


def fresh_jit() -> Any:
    return jax.jit(lambda x: x * 3 + 1)


def test_late_compilation_is_an_error_inside_the_guard_only(make: Callable[..., Compiler]) -> None:
    compiler = make(forbid_late=True)
    submit(compiler)
    values = np.arange(3.0)
    with compiler.guard():  # not before wait()
        fresh_jit()(values)
    compiler.wait()
    fresh_jit()(values)  # not outside
    late = fresh_jit()
    with compiler.guard():
        assert_adds_args = pair_on_host()
        compiler.get("add")(assert_adds_args)  # what is compiled runs
        for _ in range(2):  # and a refused program is not kept
            with pytest.raises(LateCompileError, match="after warm-up"):
                late(values)
    other = threading.Thread(target=lambda: results.append(fresh_jit()(values)))
    results: list[jax.Array] = []
    with compiler.guard():  # other threads are free
        other.start()
        other.join()
    np.testing.assert_array_equal(results[0], values * 3 + 1)
    late(values)


def pair_on_host() -> dict[str, np.ndarray]:
    return {"a": np.zeros(8, np.float32), "b": np.zeros(8, np.float32)}


def test_late_compilation_is_allowed_unless_forbidden(make: Callable[..., Compiler]) -> None:
    compiler = make()
    submit(compiler)
    compiler.wait()
    with compiler.guard():
        assert fresh_jit()(np.float32(2)) == 7


def test_the_guard_ends_with_an_exception(make: Callable[..., Compiler]) -> None:
    compiler = make(forbid_late=True)
    compiler.wait()
    with pytest.raises(KeyError), compiler.guard():
        raise KeyError
    assert fresh_jit()(np.float32(2)) == 7


def test_a_failing_compilation_surfaces(make: Callable[..., Compiler]) -> None:
    def broken(_: Any) -> Any:
        raise ValueError("no such shape")

    compiler = make()
    submit(compiler, name="broken", function=broken)
    submit(compiler)
    for ask in (lambda: compiler.get("broken"), compiler.wait):
        with pytest.raises(ValueError, match="no such shape"):
            ask()
    assert not compiler.is_ready("broken")
    assert_adds(compiler)
    assert compiler.is_ready("add")


def test_close_drops_what_is_queued_and_waits_for_what_runs() -> None:
    compiler = Compiler(None, num_threads=1)
    started, release = threading.Event(), threading.Event()

    def slow(pair: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        started.set()
        assert release.wait(10)
        return add(pair)

    submit(compiler, name="slow", function=slow)
    submit(compiler)
    started.wait(10)
    assert not compiler.is_ready("slow")
    threading.Timer(0.1, release.set).start()
    compiler.close()
    assert compiler.is_ready("slow")
    assert not compiler.is_ready("add")
    with pytest.raises(CancelledError):
        compiler.get("add")
    compiler.close()  # again does no harm


def test_a_program_asked_for_after_the_end_is_an_error() -> None:
    compiler = Compiler(None, num_threads=1)
    submit(compiler, held=True)
    compiler.close()
    with pytest.raises(RuntimeError, match="closed"):
        compiler.get("add")


def test_the_end_of_the_process_waits_for_the_program_under_way_only() -> None:
    program = """
import atexit, threading, time
import jax
from jaxllm.runtime.compilation import Compiler
from jaxllm.runtime.programs import Program

atexit.register(lambda: print(*traced))  # registered first, called last
traced, begun = [], threading.Event()

def slow(number):
    def function(x):
        begun.set()
        time.sleep(0.5)
        traced.append(number)
        return x
    return function

compiler = Compiler(None, num_threads=1)
vector = jax.ShapeDtypeStruct((4,), "float32")
for number in range(20):
    compiler.submit(Program(number, slow(number), (vector,), 0, donate=None, key=()))
begun.wait()
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert (child.stdout, child.stderr) == ("0\n", "")


def test_programs_used_longest_ago_make_room_for_others(
    make: Callable[..., Compiler], tmp_path: Path
) -> None:
    compiler = make()
    submit(compiler)
    program = compiler.get("add")
    cache = ProgramCache(tmp_path)
    for age, key in enumerate(("new", "used", "old", "oldest")):
        cache.store(key, program)
        os.utime(tmp_path / key, (1e9 - age, 1e9 - age))
    size = (tmp_path / "old").stat().st_size
    assert cache.load("used", ADD, jax.devices()) is not None
    os.utime(tmp_path / "new", (1e9 + 1, 1e9 + 1))  # still longer ago than "used"
    ProgramCache(tmp_path, max_bytes=3 * size + size // 2).store("newest", program)
    assert [path.name for path in programs(tmp_path)] == ["new", "newest", "used"]


def submit_named(compiler: Compiler, names: tuple[str, ...], started: list[str]) -> None:
    """Programs that say when they are traced; all but the first are held."""

    def program(name: str) -> Any:
        def function(x: jax.Array) -> jax.Array:
            started.append(name)
            return x + 1

        return function

    vector = (jax.ShapeDtypeStruct((4,), jnp.float32),)
    for name in names:
        one = Program(name, program(name), vector, 0, donate=None, key=())
        compiler.submit(one, held=name != names[0])


def test_a_held_program_waits_until_it_is_wanted() -> None:
    compiler = Compiler(None, num_threads=1)
    started: list[str] = []
    submit_named(compiler, ("first", "second", "third", "fourth"), started)
    assert compiler.get("first")(np.ones(4, np.float32)).tolist() == [2] * 4
    assert started == ["first"]
    assert not compiler.is_ready("third")
    compiler.get("third")
    assert (compiler.num_ready, compiler.num_programs) == (2, 4)
    compiler.release()
    compiler.wait()
    assert started == ["first", "third", "second", "fourth"]
    compiler.close()


def test_a_hurried_program_comes_before_the_others() -> None:
    compiler = Compiler(None, num_threads=1)
    started: list[str] = []
    submit_named(compiler, ("first", "second", "third", "fourth"), started)
    compiler.get("first")
    compiler.hurry("fourth")
    compiler.hurry("first")  # ready already: nothing to do
    assert started == ["first"], "it is held"
    compiler.release()
    compiler.wait()
    assert started == ["first", "fourth", "second", "third"]
    compiler.close()


def test_a_program_that_is_waited_for_comes_before_the_queue() -> None:
    compiler = Compiler(None, num_threads=1)
    started: list[str] = []
    names = ("first", *(f"queued {i}" for i in range(20)), "wanted")
    submit_named(compiler, names, started)
    compiler.release()
    compiler.get("wanted")
    assert started.index("wanted") < len(names) // 2
    compiler.close()
