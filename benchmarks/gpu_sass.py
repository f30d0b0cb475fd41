"""Reads what the compiler made of a GPU kernel: registers, spills, and the instructions of its hot loop. No GPU needed.

A kernel's machine code (cubin) is disassembled by the cuobjdump that lies in Triton's wheel. The hot loop is the
innermost backward branch around the most matrix instructions; its length divided by the K steps that one pass makes is
the number that decides whether the tensor cores are kept busy: every other instruction takes an issue slot from them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block can have, by compute capability (CUDA programming guide, technical table)."""

# Multiply-adds of one instruction as a warp sees it, by the shape in its name; tcgen05 shapes are not in the text.
_MMA = re.compile(r"^(?:[HIQO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)\b")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: byte address, opcode with modifiers, operands as text."""

    address: int
    opcode: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """The hot loop: all its opcodes, and those among them that matter."""

    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def length(self) -> int:
        """Instructions of one pass, each counted once whether its predicate holds or not."""
        return self.opcodes.total()

    @property
    def mma(self) -> Counter[str]:
        """Matrix instructions."""
        return Counter({name: n for name, n in self.opcodes.items() if _MMA.match(name)})

    @property
    def slow_conversions(self) -> int:
        """`F2F`: a float conversion on the unit that takes a quarter or less of the usual rate."""
        return sum(n for name, n in self.opcodes.items() if name.startswith("F2F."))


@dataclass(frozen=True)
class Code:
    """A kernel's code in figures."""

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    wide_copies: int
    loop: Loop


def tool(name: str) -> str:
    """The path of one of the CUDA tools in Triton's wheel; FileNotFoundError names the place that was looked at."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this Triton has no {name}; install the wheel from PyPI")
    return str(path)


def run_tool(name: str, *arguments: str) -> str:
    """The standard output of a tool; CalledProcessError with its words where it fails."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def inspect_cubin(cubin: bytes) -> Code:
    """The figures of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        text = run_tool("cuobjdump", "-sass", file.name)
    registers, stack = usage_of(usage)
    return read_sass(text, registers, stack)


def usage_of(text: str) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) from `cuobjdump -res-usage`."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing of registers: {text.strip()!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def read_sass(text: str, registers: int, stack: int) -> Code:
    """The figures of a disassembly."""
    code = instructions(text)
    names = Counter(line.opcode for line in code)
    return Code(
        registers,
        stack,
        sum(n for name, n in names.items() if name.startswith("LDL")),
        sum(n for name, n in names.items() if name.startswith("STL")),
        sum(n for name, n in names.items() if _is_wide_copy(name)),
        hot_loop(code),
    )


def _is_wide_copy(opcode: str) -> bool:
    """An asynchronous copy to shared memory of 16 bytes a thread, or of a whole tile (TMA)."""
    return (opcode.startswith("LDGSTS") and opcode.endswith(".128")) or opcode.startswith(("UTMALDG", "UBLKCP"))


def instructions(text: str) -> list[Instruction]:
    """The instructions of a disassembly in order."""
    matches = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in matches if m]


def hot_loop(code: list[Instruction]) -> Loop:
    """The innermost loop with the most matrix instructions; an empty one where no loop has any."""
    spans = []
    for line in code:
        target = re.search(r"(0x[0-9a-f]+)\s*$", line.operands)
        if line.opcode.startswith("BRA") and target and int(target[1], 16) < line.address:
            spans.append((int(target[1], 16), line.address))
    best = Loop()
    for start, end in spans:
        inside = [other for other in spans if other != (start, end) and start <= other[0] and other[1] <= end]
        body = Loop(Counter(line.opcode for line in code if start <= line.address <= end))
        # A loop around the loop (a persistent kernel) is not the hot one.
        if any(_count(code, *span) for span in inside):
            continue
        if body.mma.total() > best.mma.total():
            best = body
    return best


def _count(code: list[Instruction], start: int, end: int) -> int:
    return sum(1 for line in code if start <= line.address <= end and _MMA.match(line.opcode))


def steps_of(loop: Loop, tile: tuple[int, int, int], warps: int, element_bits: int) -> float:
    """How many K steps of a tile BM x BN x BK one pass of `loop` makes: 1, or more where the compiler unrolled.

    A warp's share of a tile's multiply-adds, divided by those of the matrix instructions in the loop.
    """
    bm, bn, bk = tile
    total = 0.0
    for name, count in loop.mma.items():
        if name.startswith("UTC"):  # one thread multiplies for the whole block: 32 bytes of K, up to 128 x 256
            whole = (bk * element_bits / 256) * -(-bm // 128) * -(-bn // 256)
            total += count / whole
        elif "GMMA" in name:  # four warps together
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)", name)
            if shape is None:
                raise RuntimeError(f"{name}: no shape in the name of a matrix instruction")
            total += count * int(shape[1]) * int(shape[2]) * int(shape[3]) * (warps / 4) / (bm * bn * bk)
        else:
            total += count * _warp_mma(name) * warps / (bm * bn * bk)
    return total


def _warp_mma(name: str) -> int:
    """Multiply-adds of a warp's matrix instruction: HMMA.16816 is 16 x 8 x 16."""
    digits = re.search(r"\.(\d{4,})", name)
    if digits is None:
        raise RuntimeError(f"{name}: no shape in the name of a matrix instruction")
    text = digits[1]
    return int(text[:2]) * int(text[2]) * int(text[3:]) if text.startswith("16") else 8 * 8 * int(text[2:])
