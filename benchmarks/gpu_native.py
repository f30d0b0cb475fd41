"""Registers, stack and shared memory of the CUDA C++ kernels in a compiled object or module, by architecture."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_sass import SHARED_LIMIT, run_tool


@dataclass(frozen=True)
class NativeKernel:
    """One CUDA kernel at one architecture. `shared` is what is declared; dynamic shared memory comes at the launch.

    `stack` is where spilled registers and arrays that are indexed at run time go: both are loads and stores of DRAM.
    """

    kernel: str
    target: int
    registers: int
    stack: int
    shared: int


def module_path() -> Path | None:
    """The compiled module of this installation, or None."""
    found = importlib.util.find_spec("musubi_kernels._C")
    return Path(found.origin) if found is not None and found.origin else None


def read_object(path: Path) -> list[NativeKernel]:
    """Every kernel of every architecture in `path`; an empty list where it holds no GPU code."""
    try:
        usage = run_tool("cuobjdump", "-res-usage", str(path))
    except RuntimeError as error:
        if "does not contain device code" in str(error):
            return []
        raise
    rows = []
    for target, section in _by_architecture(usage):
        for name, text in re.findall(r"Function (\S+):\s+(REG:.*)", section):
            figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            rows.append(
                NativeKernel(name, target, figures["REG"], figures["STACK"] + figures["LOCAL"], figures["SHARED"])
            )
    readable = _demangled([row.kernel for row in rows])
    return [replace(row, kernel=name) for row, name in zip(rows, readable, strict=True)]


def _by_architecture(text: str) -> list[tuple[int, str]]:
    found = [(re.search(r"arch = sm_(\d+)", part), part) for part in text.split("Fatbin elf code:")[1:]]
    return [(int(match[1]), part) for match, part in found if match]


def _demangled(names: list[str]) -> list[str]:
    filter_program = shutil.which("c++filt")
    if not names or filter_program is None:
        return names
    # on its standard input, since a module has more names than a command line holds
    done = subprocess.run([filter_program], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short_name(line) for line in done.stdout.splitlines()]


def short_name(signature: str) -> str:
    """`void a::f<(T)0, 8>(a::X, bool)` without return type and parameters: `a::f<(T)0, 8>`."""
    text = signature.removeprefix("void ").strip()
    if not text.endswith(")"):
        return text
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += (text[at] == ")") - (text[at] == "(")
        if depth == 0:
            return text[:at]
    return text


def native_misses(rows: list[NativeKernel], targets: tuple[int, ...]) -> list[str]:
    """What is wrong with the CUDA kernels: a stack, too much shared memory, a kernel that an architecture lacks."""
    found = []
    for row in rows:
        name = f"{row.kernel} sm_{row.target}"
        if row.stack:
            found.append(f"{name}: {row.stack} bytes of stack: spills, or an array that is indexed at run time")
        limit = SHARED_LIMIT.get(row.target, 99) * 1024
        if row.shared > limit:
            found.append(f"{name}: {row.shared} bytes of shared memory, at most {limit}")
    for kernel in sorted({row.kernel for row in rows}):
        absent = sorted(set(targets) - {row.target for row in rows if row.kernel == kernel})
        if absent:
            found.append(f"{kernel}: no code for {', '.join(f'sm_{t}' for t in absent)}")
    return found
