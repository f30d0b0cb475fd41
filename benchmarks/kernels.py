"""What the FP8 kernels gain on this machine: ratios to the usual path, to plain bf16 and to other packages.

Nothing is reported before every product agrees with float64. Every row is measured in one process on one thread, the
contestants in turn (cpu_clock.py); what is asked of each row stands in cpu_gates.py. Prints Markdown tables, writes
kernels.json and kernels.png to `--out`, and exits with 1 where a product is wrong or a row misses its gate.

    python benchmarks/kernels.py                           # everything; installed peers too (cpu_peers.py)
    python benchmarks/kernels.py --contended               # and one row of x under a load of four processes
    python benchmarks/kernels.py --shapes 3072x3072 --rows 1 16 256
    python benchmarks/kernels.py --quick --gate 0.5        # what .ci/run runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import cpu_gates as gates
from cpu_clock import Limits, machine, measure_limits, native_isa, peak_bytes
from cpu_contended import contended_row
from cpu_conversions import conversion_rows, gain_rows, search_row
from cpu_gates import Gate, Row
from cpu_peers import Field, compiled_usual, field_of, usual_weight
from cpu_products import (
    Weight,
    correctness,
    dynamic_row,
    forward_row,
    gradient_row,
    made,
    product_rows,
    step_row,
    typed_row,
)
from cpu_report import memory_table, peer_table, save, summary, table
from musubi_kernels import _native, backends, fp8_linear
from musubi_kernels._pin import PIN_VARIABLE, pinned

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (5120, 5120), (13824, 5120), (3001, 1999))
ROWS = (1, 4, 8, 16, 64, 256, 1024, 2304)
AVX2_SHAPE, AVX2_ROWS = (3072, 3072), (64, 256)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gate of correctness and the measurements."""
    options = parse(argv)
    torch.set_num_threads(1)
    if native_isa() is None:
        print(f"not measured: {backends()['native']}")
        return 0
    if pinned() not in {None, "native"}:
        print(f"not measured: {PIN_VARIABLE} = {pinned()} pins another backend; unset it", file=sys.stderr)
        return 1
    fault = correctness()
    if fault:
        print(f"not measured, a product is wrong: {fault}", file=sys.stderr)
        return 1
    if options.quick:
        rows = list(again(quick_rows(), options))
        print(f"{machine()}\n{gates.applied()}\n{table(rows, options.gate)}")
        return report(rows, options, {})
    if options.only:
        save(Path(options.out), machine(), [measure() for measure in rows_apart(options)], {}, options.gate)
        return 0
    return sitting(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def shape(word: str) -> tuple[int, int]:
        n, k = word.split("x")
        return int(n), int(k)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one weight, few sizes, a miss is measured again")
    parser.add_argument("--gate", type=float, default=1.0, help="share of each gate that must be reached; 0: none")
    parser.add_argument(
        "--again", type=int, default=None, help="times that a miss is measured again (2; 3 with --quick)"
    )
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="rows of x")
    parser.add_argument("--no-peers", action="store_true", help="the usual path and plain bf16 only")
    parser.add_argument("--contended", action="store_true", help="also one row of x under a load of four processes")
    parser.add_argument("--only", choices=("products", "conversions"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="build/bench", help="folder for kernels.json and kernels.png")
    options = parser.parse_args(argv)
    if options.again is None:
        options.again = 3 if options.quick else 2
    return options


def quick_rows() -> Iterator[Callable[[], Row]]:
    """The kinds of rows whose gates a change breaks first, on one weight: under a minute."""
    weight, limits = made(3072, 3072), Limits(0.0, 0.0, 0.0)
    yield from conversion_rows(weight)
    for m in (1, 8, 16, 64, 256):
        yield lambda m=m: forward_row(weight, m, limits)
    yield lambda: gradient_row(weight, 256)
    yield lambda: step_row(weight, 256)
    yield lambda: search_row(weight.dense[:1024])


def again(rows: Iterator[Callable[[], Row]], options: argparse.Namespace) -> Iterator[Row]:
    """Each row; one that misses is measured again up to `options.again` times before the miss counts."""
    for measure in rows:
        row = measure()
        for _ in range(options.again):
            if row.verdict(options.gate) != "miss":
                break
            print(f"measured again: {row.what}, M = {row.m}: {', '.join(map(str, row.gates))}", file=sys.stderr)
            row = measure()
        yield row


def sitting(options: argparse.Namespace) -> int:
    """Everything: the machine's limits, then weight by weight, then what needs processes of its own."""
    limits, began = measure_limits(), time.perf_counter()
    print(f"{machine()}; {limits.sentence()}\n{gates.applied()}", flush=True)
    rows: list[Row] = []
    memory = []
    peers = Field()
    for n, k in options.shapes:
        weight = made(n, k)
        if not options.no_peers:
            found = join(weight)
            peers.absent |= found.absent
            peers.errors |= {name: max(error, peers.errors.get(name, 0.0)) for name, error in found.errors.items()}
        rows += apart("conversions", (n, k), options)
        rows += again(product_rows(weight, tuple(options.rows), limits), options)
        memory += [((n, k, m), temporary(weight, m)) for m in (1, 256)]
        print(f"{n} x {k}: measured, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    weight = made(*AVX2_SHAPE)
    rows += again(single_rows(weight, options), options)
    rows += gain_rows()
    rows += avx2_rows(options)
    beside = {"limits": vars(limits), "errors": peers.errors, "not measured": peers.absent}
    print(table(rows, options.gate))
    print(peer_table(rows, peers.errors, peers.absent))
    print(memory_table(memory))
    return report(rows, options, beside)


def single_rows(weight: Weight, options: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """What is measured on one weight only."""
    yield lambda: search_row(weight.dense)
    for m in AVX2_ROWS:
        yield lambda m=m: typed_row(weight, m, torch.float32)
        yield lambda m=m: typed_row(weight, m, torch.float16)
        yield lambda m=m: dynamic_row(weight, m)
    yield scratch_row
    if options.contended:
        yield lambda: contended_row(weight)
    else:
        print("forward under a load of four processes not measured: --contended asks for it")


def join(weight: Weight) -> Field:
    """Adds every peer that can be timed to the weight's contestants."""
    peers = field_of(weight.dense)
    compiled, reason = compiled_usual(weight.q, weight.scale)
    if compiled:
        weight.peers["compiled usual"] = compiled
    else:
        peers.absent["compiled usual"] = reason
    weight.peers |= peers.calls
    return peers


def temporary(weight: Weight, m: int) -> Mapping[str, float]:
    """Bytes that one forward needs at its peak beyond its result."""
    x = torch.randn(m, weight.shape[1]).bfloat16()
    calls = {
        "ours": lambda: fp8_linear(x, weight.q, weight.scale),
        "usual": lambda: F.linear(x, usual_weight(weight.q, weight.scale)),
        "plain": lambda: F.linear(x, weight.dense),
        **{name: (lambda peer=peer: peer(x)) for name, peer in weight.peers.items()},
    }
    return {name: max(0.0, peak_bytes(call) - 2 * m * weight.shape[0]) for name, call in calls.items()}


def scratch_row() -> Row:
    """What this thread's bodies hold after everything above, and after the largest product of all."""
    n, k = max(SHAPES, key=lambda shape: shape[0] * shape[1])
    codes = torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    fp8_linear(torch.ones(64, k, dtype=torch.bfloat16), codes, torch.ones(n, k // 64, 1))
    held = _native.module().scratch_bytes()
    gate = Gate("scratch MB", held / 2**20, gates.SCRATCH_BYTES / 2**20, most=True)
    return Row("scratch", n, k, 64, 0.0, {}, (gate,), {"scratch MB": held / 2**20})


def avx2_rows(options: argparse.Namespace) -> list[Row]:
    """Forward where ours and torch both have AVX2 only: a child process, whose libraries are told so."""
    usable = _native.module().isas()
    if "avx2" not in usable or not gates.has_bf16():
        print(f"the AVX2 body not measured apart: this machine runs {', '.join(usable)}")
        return []
    pins = {"MUSUBI_KERNELS_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    rows = apart("products", AVX2_SHAPE, options, pins)
    return [replace(row, what=f"{row.what}, AVX2 alone") for row in rows]


def rows_apart(options: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """What a process of its own measures, of one weight."""
    weight = made(*options.shapes[0])
    if options.only == "conversions":
        yield from conversion_rows(weight)
        return
    for m in AVX2_ROWS:
        yield lambda m=m: forward_row(weight, m, Limits(0.0, 0.0, 0.0))


def apart(
    kind: str, shape: tuple[int, int], options: argparse.Namespace, pins: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows measured in a process of their own, where conversions meet memory as a program does that loads a model: what
    earlier rows have left with the allocator would serve the usual path's temporaries, the largest part of its time.
    Rows that miss are measured again in another process, up to `options.again` times."""
    rows = child(kind, shape, options, pins or {})
    for _ in range(options.again):
        if all(row.verdict(options.gate) != "miss" for row in rows):
            break
        anew = {(row.what, row.m): row for row in child(kind, shape, options, pins or {})}
        rows = [anew.get((row.what, row.m), row) if row.verdict(options.gate) == "miss" else row for row in rows]
    return rows


def child(kind: str, shape: tuple[int, int], options: argparse.Namespace, pins: Mapping[str, str]) -> list[Row]:
    n, k = shape
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--only", kind, "--shapes", f"{n}x{k}", "--out", folder]
        command += ["--gate", str(options.gate)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=900, env=os.environ | dict(pins)
        )
        if done.returncode:  # a miss, and no reason to lose the rest of a long sitting
            print(f"{kind} of {n} x {k} not measured: {done.stderr.strip().splitlines()[-1:]}")
            return [Row(kind, n, k, 0, 0.0, {}, (Gate("measured", 0.0, 1.0),))]
        saved = json.loads((Path(folder) / "kernels.json").read_text())["rows"]
    keys = ("what", "n", "k", "m", "milliseconds", "ratios")
    return [Row(*(row[key] for key in keys), gates_of(row), row["figures"]) for row in saved]


def gates_of(row: Mapping[str, Any]) -> tuple[Gate, ...]:
    return tuple(Gate(**gate) for gate in row["gates"])


def report(rows: Sequence[Row], options: argparse.Namespace, beside: Mapping[str, object]) -> int:
    """Saves, says how many rows hold, and gives the exit status."""
    save(Path(options.out), machine(), rows, beside, options.gate)
    print(summary(rows, options.gate))
    return int(options.gate > 0 and any(row.verdict(options.gate) == "miss" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
