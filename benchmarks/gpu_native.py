"""Registers, local memory and shared memory of the CUDA C++ kernels in a compiled object or module, by architecture."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gpu_sass import SHARED_LIMIT, run_tool


@dataclass(frozen=True)
class NativeKernel:
    """One CUDA kernel at one architecture. `shared` is what is declared; dynamic shared memory comes at the launch."""

    kernel: str
    target: int
    registers: int
    stack: int
    local: int
    shared: int
    spill_loads: int
    spill_stores: int


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
    spills = _spills(run_tool("cuobjdump", "-sass", str(path)))
    rows = []
    for target, section in _by_architecture(usage, r"Fatbin elf code:"):
        for name, text in re.findall(r"Function (\S+):\s+(REG:.*)", section):
            figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            loads, stores = spills.get((target, name), (0, 0))
            values = (figures["REG"], figures["STACK"], figures["LOCAL"], figures["SHARED"])
            rows.append(NativeKernel(name, target, *values, loads, stores))
    readable = _demangled([row.kernel for row in rows])
    return [NativeKernel(**{**vars(row), "kernel": name}) for row, name in zip(rows, readable, strict=True)]


def _by_architecture(text: str, mark: str) -> list[tuple[int, str]]:
    parts = re.split(mark, text)[1:]
    found = [(re.search(r"arch = sm_(\d+)", part), part) for part in parts]
    return [(int(match[1]), part) for match, part in found if match]


def _spills(text: str) -> dict[tuple[int, str], tuple[int, int]]:
    table = {}
    for target, section in _by_architecture(text, r"Fatbin elf code:"):
        pieces = re.split(r"Function : (\S+)", section)
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            opcodes = Counter(re.findall(r"\b(LDL|STL)\b", body))
            table[target, name] = (opcodes["LDL"], opcodes["STL"])
    return table


def _demangled(names: list[str]) -> list[str]:
    filter_program = shutil.which("c++filt")
    if not names or filter_program is None:
        return names
    done = subprocess.run([filter_program, *names], capture_output=True, text=True, check=True)
    # without the parameter list and the return type: `void a::b<3>(T)` is a::b<3>
    return [re.sub(r"^void\s+|\(.*\)$", "", line) for line in done.stdout.splitlines()]


def native_misses(rows: list[NativeKernel], targets: tuple[int, ...]) -> list[str]:
    """What is wrong with the CUDA kernels: spills, too much shared memory, a kernel that an architecture lacks."""
    found = []
    for row in rows:
        name = f"{row.kernel} sm_{row.target}"
        if row.spill_loads or row.spill_stores or row.local:
            found.append(f"{name}: spills: {row.spill_loads} loads, {row.spill_stores} stores, {row.local} bytes local")
        limit = SHARED_LIMIT.get(row.target, 99) * 1024
        if row.shared > limit:
            found.append(f"{name}: {row.shared} bytes of shared memory, at most {limit}")
    for kernel in sorted({row.kernel for row in rows}):
        absent = sorted(set(targets) - {row.target for row in rows if row.kernel == kernel})
        if absent:
            found.append(f"{kernel}: no code for {', '.join(f'sm_{t}' for t in absent)}")
    return found
