"""Ahead-of-time compilation: in parallel, in the background, kept on disk, and never by surprise.

A compiled program is code. Programs are read only from a folder that its owner alone can write, and
only if their checksum holds.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax
import jaxlib
from jax.experimental import serialize_executable

from jaxllm.runtime.programs import Program
from jaxllm.runtime.sharding import Placement

logger = logging.getLogger(__name__)

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
DIGEST_SIZE = 32
CACHE_BYTES = 2 << 30  # of all programs on disk
MOST_THREADS = 16  # that compile for TPU, each with up to a gigabyte


class LateCompileError(RuntimeError):
    """Something was compiled after warm-up although that was forbidden."""


def serialize(compiled: jax.stages.Compiled) -> bytes:
    """A compiled program as bytes, which are code."""
    return serialize_executable.serialize(compiled)[0]


def deserialize(
    serialized: bytes, program: Program, devices: Sequence[jax.Device]
) -> jax.stages.Compiled:
    """What `serialize` was given, on the devices that the program is for. Runs code that is in the
    bytes, and raises whatever jaxlib does."""
    in_tree = jax.tree.structure((program.arguments, {}))
    out_tree = jax.tree.structure(program.out)
    return serialize_executable.deserialize_and_load(
        serialized, in_tree, out_tree, devices[0].client, devices
    )


def others_may_write(folder: Path) -> bool:
    """Whether another user could put code into a folder."""
    status = folder.stat()
    return hasattr(os, "getuid") and (status.st_uid != os.getuid() or bool(status.st_mode & 0o022))


class ProgramCache:
    """Serialized programs in a folder, one file each, named by the hash of what made them. Each
    change of the source leaves a set of them behind, so those used longest ago go when all together
    exceed max_bytes."""

    def __init__(self, folder: Path, max_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    @classmethod
    def open(cls, folder: Path) -> ProgramCache | None:
        """The cache in a folder, which is made if it is missing; None, with a warning, if it cannot
        be made or if others could write to it."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_unsafe = others_may_write(folder)
        except OSError as error:
            logger.warning("no program cache: %s", error.strerror)
            return None
        if is_unsafe:
            logger.warning("no program cache: others may write to its folder; chmod 700 it")
            return None
        return cls(folder)

    def load(
        self, key: str, program: Program, devices: Sequence[jax.Device]
    ) -> jax.stages.Compiled | None:
        """The compiled program of a key, or None if there is none that works."""
        path = self.folder / key
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, serialized = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
        if hashlib.sha256(serialized).digest() != digest:
            logger.warning("a cached program is damaged and is compiled again")
            return None
        try:
            loaded = deserialize(serialized, program, devices)
        except Exception as error:  # whatever another jaxlib throws: compile instead
            logger.warning("a cached program could not be loaded: %s", error)
            return None
        with suppress(OSError):
            os.utime(path)  # the time of its last use, see _prune
        return loaded

    def store(self, key: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program; a failure (a full disk) is a warning."""
        temporary = None
        try:
            serialized = serialize(compiled)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                temporary = Path(file.name)
                file.write(hashlib.sha256(serialized).digest() + serialized)
            temporary.replace(self.folder / key)
            self._prune()
        except (OSError, ValueError, RuntimeError) as error:  # jaxlib's errors are RuntimeErrors
            logger.warning("a compiled program could not be kept: %s", error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Other processes may prune at the same time, and what is loaded needs its file no more."""
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        surplus = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if surplus <= 0:
                break
            path.unlink(missing_ok=True)
            surplus -= size


class ProgramSource(Protocol):
    """Where compiled programs come from, see compiled_folder.py."""

    def load(self, program: Program, devices: Sequence[jax.Device]) -> jax.stages.Compiled: ...


class _Workers:
    """Threads that compute futures in the order of their submission, unless one is hurried.

    Unlike those of a ThreadPoolExecutor they do not hold up the end of the process until all is
    done. What runs is waited for even then: the interpreter must not go while XLA is compiling.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: OrderedDict[Hashable, tuple[Future[Any], Callable[[], Any]]] = OrderedDict()
        self._changed = threading.Condition()  # guards _jobs and _closed
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"compile-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, name: Hashable, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the compiler was closed")
            self._jobs[name] = (future, function)
            self._changed.notify()
        return future

    def hurry(self, name: Hashable) -> None:
        """Puts a job first, if it has not begun."""
        with self._changed:
            if name in self._jobs:
                self._jobs.move_to_end(name, last=False)

    def close(self) -> None:
        """Cancels what is queued, waits for what is running. May be called again."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            for future, _ in self._jobs.values():
                future.cancel()
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return self._jobs.popitem(last=False)[1] if self._jobs else None

    def _run(self) -> None:
        while job := self._next():
            future, function = job
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del job, future, function  # while it waits for more, it keeps nothing alive


def _num_threads(platform: str) -> int:
    """Half the cores, as LLVM uses several for one program; all of them for TPU, whose compiler
    hardly does, up to what memory is sure to be there for."""
    cores = os.cpu_count() or 1
    return min(cores, MOST_THREADS) if platform == "tpu" else max(1, cores // 2)


class Compiler:
    """Compiles programs on background threads and hands them out by name. A held program waits
    until it is asked for or all are released.

    num_threads: None for what the platform's compiler can use. compiled: where programs come from
    instead; then none is compiled.
    forbid_late: once `wait()` has returned, a compilation inside `guard()` raises LateCompileError.
    """

    def __init__(
        self,
        program_cache: ProgramCache | None,
        *,
        num_threads: int | None = None,
        forbid_late: bool = False,
        placement: Placement | None = None,
        compiled: ProgramSource | None = None,
    ) -> None:
        self._compiled = compiled
        self._program_cache = program_cache
        self._placement = placement or Placement.on(jax.devices()[:1])
        self._workers = _Workers(num_threads or _num_threads(self._placement.platform))
        self._forbid_late = forbid_late
        self._futures: dict[Hashable, Future[jax.stages.Compiled]] = {}
        self._ready: dict[Hashable, jax.stages.Compiled] = {}  # each step asks: a look-up, no locks
        self._held: OrderedDict[Hashable, Program] = OrderedDict()
        self._tracing = threading.Lock()  # tracing holds the GIL: two at once are slower than one
        self._sealed = False
        self._closed = False
        self._guarded = threading.local()
        self.num_compiled = 0
        self.num_loaded = 0
        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def submit(self, program: Program, *, held: bool = False) -> None:
        """Queues or holds a program."""
        self._ready.pop(program.name, None)
        self._held[program.name] = program
        if not held:
            self._queue(program.name)

    def release(self) -> None:
        """Queues the held programs, in the order of their submission."""
        for name in list(self._held):
            self._queue(name)

    def hurry(self, name: Hashable) -> None:
        """A step would rather have had this program: it is compiled before the others that wait,
        once it is no longer held."""
        if name in self._held:
            self._held.move_to_end(name, last=False)
        self._workers.hurry(name)

    def get(self, name: Hashable) -> jax.stages.Compiled:
        """The program, waited for if need be. Raises what its compilation raised."""
        program = self._ready.get(name)
        if program is not None:
            return program
        if name in self._held:
            self._queue(name)
        self._workers.hurry(name)
        return self._futures[name].result()

    def forget(self, name: Hashable) -> None:
        """Drops a program that was compiled only to be measured."""
        self._futures.pop(name).result()
        self._ready.pop(name)

    def is_ready(self, name: Hashable) -> bool:
        """Whether `get` would return at once."""
        return name in self._ready

    @property
    def num_programs(self) -> int:
        """Programs submitted so far."""
        return len(self._futures) + len(self._held)

    @property
    def num_ready(self) -> int:
        """How many of them are ready."""
        return len(self._ready)

    def _queue(self, name: Hashable) -> None:
        self._futures[name] = self._workers.submit(name, partial(self._make, self._held.pop(name)))

    def wait(self) -> None:
        """Waits until every program is ready, then forbids late compilation if that was asked."""
        self.release()
        for future in list(self._futures.values()):
            future.result()
        self._sealed = self._forbid_late

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What runs in it, on this thread, must not compile anything once all is compiled."""
        self._guarded.active = True
        try:
            yield
        finally:
            self._guarded.active = False

    def close(self) -> None:
        """Drops what is still queued; waits for what is running. May be called again."""
        self._workers.close()
        if not self._closed:
            self._closed = True
            jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _make(self, program: Program) -> jax.stages.Compiled:
        compiled = self._ready[program.name] = self._build(program)
        return compiled

    def _build(self, program: Program) -> jax.stages.Compiled:
        started = time.monotonic()
        if self._compiled is not None:
            self.num_loaded += 1
            return self._compiled.load(program, self._placement.devices)
        if self._program_cache is not None:
            key = program_key(program, self._placement.devices)
            loaded = self._program_cache.load(key, program, self._placement.devices)
            if loaded is not None:
                self.num_loaded += 1
                return loaded
        with self._tracing:
            _, lowered = lower(program, self._placement)
        compiled = lowered.compile()
        self.num_compiled += 1
        self.compile_seconds += time.monotonic() - started
        logger.info("compiled %s in %.1f s", program.name, time.monotonic() - started)
        if self._program_cache is not None:
            self._program_cache.store(key, compiled)
        return compiled

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT and self._sealed and getattr(self._guarded, "active", False):
            raise LateCompileError(
                f"something was compiled after warm-up ({duration_secs:.2f} s) although late "
                f"compilation is forbidden; run with jax_log_compiles to see what"
            )


def lower(program: Program, placement: Placement) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    """A program traced and lowered for the devices of a placement."""
    donated = () if program.donate is None else (program.donate,)
    if placement.mesh is None:
        traced = jax.jit(program.function, donate_argnums=donated).trace(*program.arguments)
        return traced, traced.lower()
    # code that asks for the TPU's generation while it is traced gets that of the mesh
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        jitted = jax.jit(program.function, donate_argnums=donated, out_shardings=program.out)
        traced = jitted.trace(*program.arguments)
        return traced, traced.lower()


def program_key(program: Program, devices: Sequence[jax.Device]) -> str:
    """A name for a program: of its arguments' shapes, of this package's code, of the machine."""
    content = repr((program_shape(program), source_digest(), _machine(tuple(devices))))
    return hashlib.sha256(content.encode()).hexdigest()


def program_shape(program: Program) -> str:
    """A hash of what a program depends on beside the code and the machine."""
    leaves = jax.tree.leaves(program.arguments)
    shapes = [(leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in leaves]
    tree = jax.tree.structure((program.arguments, program.out))
    content = repr((str(program.name), program.key, program.donate, shapes, str(tree)))
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def source_digest() -> str:
    """Of the source files that decide what a step computes."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    kernels = package.parent / "pallas_kernels"
    paths = [package / "config.py", package / "sampling_params.py"]
    parts = ("engine", "models", "quantization", "runtime")
    for folder in (*(package / part for part in parts), kernels):
        paths += sorted(folder.rglob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _machine(devices: tuple[jax.Device, ...]) -> tuple[str, ...]:
    """What a compiled program depends on beside its source."""
    kind = f"{devices[0].platform} {devices[0].device_kind} x{len(devices)}"
    cpu = processor(devices[0])
    platform_version = devices[0].client.platform_version  # libtpu's, the driver's
    versions = (jax.__version__, jaxlib.__version__, version("flax"), platform_version)
    flags = tuple(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    settings = ("jax_enable_x64", "jax_default_matmul_precision")
    precision = [str(getattr(jax.config, name)) for name in settings]
    return (*versions, kind, cpu, *flags, *precision)


def processor(device: jax.Device) -> str:
    """Of a CPU, all instructions of which a program may use; else nothing."""
    if device.platform != "cpu":
        return ""
    info = Path("/proc/cpuinfo")
    features = (
        [line for line in info.read_text().splitlines() if line.startswith("flags")][:1]
        if info.is_file()
        else [platform.processor()]
    )
    return f"{platform.machine()} {os.cpu_count()} {features}"
