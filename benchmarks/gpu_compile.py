"""Compiles kernels ahead of time for given compute capabilities and reads their machine code; two processes, a cache.

`Compiler` starts workers (this file as a program, with Triton's interpreter off), feeds them one job at a time and
keeps every result in a folder, named by a hash of the kernel's source, configuration, target, Triton's version and the
reader of the code. An entry is a `musubi_kernels._triton.Shipped`; a source is `module:function` that lists entries.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

SHIPPED = "musubi_kernels._triton:shipped"
PLAIN = "gpu_plain:companions"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Report:
    """One kernel, configuration and target in figures; `error` where it did not compile."""

    kernel: str
    config: str
    op: str
    target: int
    hot: bool
    tile: tuple[int, int, int] | None = None
    rows: int = 0
    warps: int = 0
    error: str = ""
    registers: int = 0
    stack: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    shared: int = 0
    wide_copies: int = 0
    loop: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    slow_conversions: int = 0
    steps: float = 0.0
    opcodes: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the row in baselines."""
        return f"{self.kernel}-{self.config} sm_{self.target}"

    @property
    def per_step(self) -> float:
        """Instructions of a warp in one K step of the hot loop."""
        return self.loop / self.steps if self.steps else 0.0

    @property
    def per_mma(self) -> float:
        """Instructions of the hot loop for each matrix instruction in it."""
        count = sum(self.mma.values())
        return self.loop / count if count else 0.0


@dataclass(frozen=True)
class Job:
    """Entry number `index` of `source`, compiled for `target`."""

    source: str
    index: int
    target: int


def cache_folder() -> Path:
    """Where results are kept: `MUSUBI_STATIC_CACHE`, else in the user's cache."""
    told = os.environ.get("MUSUBI_STATIC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(told) if told else base / "musubi-tuner" / "gpu_static"


class Compiler:
    """Worker processes and the questions one can ask them. Use it as a context manager."""

    def __init__(self, workers: int = 2) -> None:
        """Remember how many workers to start; the first question starts them."""
        self._wanted = max(1, workers)
        self._workers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Compiler:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.communicate()  # closes the pipes; the worker's input ends

    def entries(self, source: str) -> list[dict[str, Any]]:
        """Name, config, targets, op, hot and core of every entry of `source`."""
        listed: list[dict[str, Any]] = self._ask(self._start(0), {"list": source})
        return listed

    def reports(self, jobs: Sequence[Job]) -> list[Report]:
        """The report of every job, in order."""
        waiting: Queue[tuple[int, Job]] = Queue()
        for numbered in enumerate(jobs):
            waiting.put(numbered)
        results: dict[int, Report] = {}
        failures: list[BaseException] = []

        def serve(worker: subprocess.Popen[str]) -> None:
            try:
                while not failures:
                    number, job = waiting.get_nowait()
                    results[number] = _report(self._ask(worker, asdict(job)))
            except Empty:
                pass
            except BaseException as error:  # handed to the caller below
                failures.append(error)

        count = min(self._wanted, len(jobs))
        threads = [threading.Thread(target=serve, args=(self._start(i),)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[i] for i in range(len(jobs))]

    def _start(self, index: int) -> subprocess.Popen[str]:
        while len(self._workers) <= index:
            path = os.pathsep.join([str(HERE), *sys.path])
            settings = {
                "TRITON_INTERPRET": "0",
                "TRITON_DEFAULT_FP_FUSION": "1",
                "TRITON_CACHE_DIR": str(cache_folder() / "triton"),
                "TRITON_STORE_BINARY_ONLY": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": path,
            }
            command = [sys.executable, str(HERE / "gpu_compile.py")]
            environment = {**os.environ, **settings}
            pipe = subprocess.PIPE
            worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self._workers.append(worker)
        return self._workers[index]

    @staticmethod
    def _ask(worker: subprocess.Popen[str], question: dict[str, Any]) -> Any:
        if worker.stdin is None or worker.stdout is None:
            raise RuntimeError("the compile worker has no pipes")
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the compile worker ended while it was asked for {question}; its words are above")
        return json.loads(answer)


def _report(values: dict[str, Any]) -> Report:
    tile = values.pop("tile", None)
    return Report(**values, tile=tuple(tile) if tile else None)


# -- in the worker ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer one JSON question a line until the input ends; nothing else may print to the standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question = json.loads(line)
        answer = _listing(question["list"]) if "list" in question else asdict(_result(Job(**question)))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


_loaded: dict[str, list[Any]] = {}


def _entries(source: str) -> list[Any]:
    if source not in _loaded:
        module, _, name = source.partition(":")
        _loaded[source] = list(getattr(importlib.import_module(module), name)())
    return _loaded[source]


def _listing(source: str) -> list[dict[str, Any]]:
    names = ("name", "op", "note", "targets", "hot", "core", "num_warps", "num_stages")
    return [{name: getattr(entry, name) for name in names} for entry in _entries(source)]


def _result(job: Job) -> Report:
    entry = _entries(job.source)[job.index]
    path = cache_folder() / f"{_digest(entry, job.target)}.json"
    if path.exists():
        return _report(json.loads(path.read_text()))
    report = _compile(entry, job.target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(report)))
    partial.replace(path)
    return report


def _digest(entry: Any, target: int) -> str:
    import triton

    readers = [(HERE / name).read_bytes() for name in ("gpu_sass.py", "gpu_compile.py")]
    facts = [triton.__version__, target, entry.function.cache_key, entry.signature, entry.constexprs]
    facts += [entry.num_warps, entry.num_stages, entry.aligned, entry.name, entry.note, entry.op, entry.hot]
    return hashlib.sha256(repr(facts).encode() + b"".join(readers)).hexdigest()[:32]


def _compile(entry: Any, target: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import gpu_sass

    arguments = entry.function.arg_names
    signature = {name: entry.signature.get(name, "constexpr") for name in arguments}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in entry.aligned]
    hints = {(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned}
    shape = tile_of(entry.constexprs)
    about: dict[str, Any] = {
        "kernel": entry.name.partition("-")[0],
        "config": entry.name.partition("-")[2],
        "op": entry.op,
        "target": target,
        "hot": entry.hot,
        "tile": shape,
        "rows": shape[1 if entry.constexprs.get("SWAP") else 0] if shape else 0,
        "warps": entry.num_warps,
    }
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, "enable_fp_fusion": True}
    try:
        source = ASTSource(entry.function, signature, entry.constexprs, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        code = gpu_sass.inspect_cubin(compiled.asm["cubin"])
    except Exception as error:  # a kernel that does not compile is a result
        return Report(**about, error=f"{type(error).__name__}: {error}"[:2000])
    loop = code.loop
    narrow = any(name.startswith(("Q", "I", "UTCQ", "UTCI")) for name in loop.mma)
    return Report(
        **about,
        registers=code.registers,
        stack=code.stack,
        spill_loads=code.spill_loads,
        spill_stores=code.spill_stores,
        shared=compiled.metadata.shared,
        wide_copies=code.wide_copies,
        loop=loop.length,
        mma=dict(loop.mma),
        slow_conversions=loop.slow_conversions,
        steps=gpu_sass.steps_of(loop, shape, entry.num_warps, 8 if narrow else 16) if shape and loop.length else 0.0,
        opcodes=dict(_families(loop.opcodes)),
    )


def tile_of(constants: dict[str, Any]) -> tuple[int, int, int] | None:
    """(BM, BN, BK) of a product kernel."""
    names = ("BM", "BN", "BK")
    return tuple(constants[name] for name in names) if all(name in constants for name in names) else None  # type: ignore[return-value]


def _families(opcodes: Iterable[str] | Any) -> Iterator[tuple[str, int]]:
    """Opcodes of the loop by their first word, the most frequent first."""
    table: dict[str, int] = {}
    for name, count in opcodes.items():
        word = name.split(".")[0]
        table[word] = table.get(word, 0) + count
    yield from sorted(table.items(), key=lambda item: -item[1])


if __name__ == "__main__":
    main()
