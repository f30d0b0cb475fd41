"""Gates on the machine code of every GPU kernel (spills, shared memory, opcodes, drift), and faults that they catch.

Kernels are compiled in processes of their own, since Triton's interpreter is on in this one; no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")

import gpu_static
from gpu_compile import Compiler, Job, Report
from gpu_gates import baseline_rows, drifts, misses, trial_misses
from gpu_native import NativeKernel, native_misses, short_name
from gpu_sass import hot_loop, instructions, read_sass, steps_of
from gpu_static import Survey, survey

SEEDS = "gpu_seeds:seeds"
pytestmark = pytest.mark.timeout(1800)  # the first test waits for all compilations: minutes on two idle cores


@pytest.fixture(scope="module")
def core() -> Survey:
    return survey(plain=False)


@pytest.fixture(scope="module")
def seeds() -> Iterator[dict[str, Report]]:
    with Compiler(2) as compiler:
        entries = compiler.entries(SEEDS)
        jobs = [Job(SEEDS, i, target) for i, entry in enumerate(entries) for target in entry["targets"]]
        yield {report.kernel: report for report in compiler.reports(jobs)}


def test_every_shipped_kernel_passes_the_gates(core: Survey) -> None:
    assert core.shipped
    assert core.missed() == []


def test_hot_loops_stay_within_the_baseline(core: Survey) -> None:
    stored = json.loads(gpu_static.BASELINE.read_text())
    assert drifts(core.shipped, stored, importlib.metadata.version("triton")) == []


def test_forwards_need_no_more_instructions_than_the_trial(core: Survey) -> None:
    assert gpu_static.trial_rows(core) == []


@pytest.mark.slow
def test_rare_types_pass_the_gates_too() -> None:
    assert survey(everything=True, plain=False).missed() == []


def test_a_healthy_kernel_has_no_misses(seeds: dict[str, Report]) -> None:
    report = seeds["healthy"]
    assert misses(report) == []
    assert report.steps == 1.0
    assert report.mma == {"HMMA.16816.F32.BF16": 32}
    assert report.loop == sum(report.opcodes.values())


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("spills", "of local memory"),
        ("too_much_shared", "bytes of shared memory, a block on sm_86 has at most 101376"),
        ("narrow", "no asynchronous copies of 16 bytes"),
        ("slow_conversion", "F2F conversions in the hot loop"),
        ("no_tensor_cores", "matrix instructions none in the hot loop, expected HMMA"),
        ("does_not_compile", "does not compile: "),
    ],
)
def test_a_seeded_fault_is_caught(seeds: dict[str, Report], kernel: str, words: str) -> None:
    assert any(words in sentence for sentence in misses(seeds[kernel])), misses(seeds[kernel])


def test_a_tile_that_misses_the_wide_unit_is_caught(seeds: dict[str, Report]) -> None:
    report = dataclasses.replace(seeds["small_unit"], warps=4)
    assert misses(report) == [
        f"{report.key}: matrix instructions ['HMMA.16816.F32.BF16'] in the hot loop, expected HGMMA"
    ]


def _baseline(report: Report, **change: float) -> dict[str, object]:
    rows = baseline_rows([report])
    return {"triton": "3.9.0", "rows": {key: {**row, **change} for key, row in rows.items()}}


def test_drift_from_the_baseline_is_caught(seeds: dict[str, Report]) -> None:
    report = seeds["healthy"]
    stored = report.per_mma
    assert drifts([report], _baseline(report), "3.9.0") == []
    assert drifts([report], _baseline(report, per_mma=stored / 1.04), "3.9.0") == []
    for factor in (1.06, 0.94):
        (sentence,) = drifts([report], _baseline(report, per_mma=stored / factor), "3.9.0")
        assert "instructions per matrix instruction" in sentence
    assert "was written with Triton 3.9.0" in drifts([report], _baseline(report), "3.10.0")[0]
    assert "not in the baseline" in drifts([report], {"triton": "3.9.0", "rows": {}}, "3.9.0")[0]
    assert "no longer compiled" in drifts([], _baseline(report), "3.9.0")[0]


def test_a_forward_above_the_trial_is_caught(seeds: dict[str, Report]) -> None:
    report = dataclasses.replace(seeds["healthy"], tile=(128, 128, 64), warps=8, loop=453, steps=1.0)
    found = trial_misses([report], {report.key: "bf16"})
    assert "sm_80 bf16: 453 instructions a K step, the trial's 452" in found
    assert "sm_120 bf16: no forward at (128, 128, 64) with 8 warps" in found
    assert not any(
        words.startswith("sm_80 bf16")
        for words in trial_misses([dataclasses.replace(report, loop=452)], {report.key: "bf16"})
    )


def test_faults_of_cuda_kernels_are_caught() -> None:
    good = NativeKernel("a", 80, 64, 0, 1024)
    assert native_misses([good], (80,)) == []
    assert "16 bytes of stack: spills" in native_misses([dataclasses.replace(good, stack=16)], (80,))[0]
    assert "at most 166912" in native_misses([dataclasses.replace(good, shared=170_000)], (80,))[0]
    assert native_misses([good], (80, 90)) == ["a: no code for sm_90"]


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void a::tile<a::F16, (a::Format)0, true>(a::Task, bool)", "a::tile<a::F16, (a::Format)0, true>"),
        ("a::plain(int (*)(bool))", "a::plain"),
        ("_Zunreadable", "_Zunreadable"),
    ],
)
def test_names_of_cuda_kernels_keep_their_template_arguments(signature: str, name: str) -> None:
    assert short_name(signature) == name


NESTED = """
        /*0000*/                   LDL R1, [R2] ;                 /* 0x0 */
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;        /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
        /*0030*/              @!P0 BRA 0x50 ;
        /*0040*/                   F2F.BF16.F32 R5, R6 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R8.reuse, R12, R8 ;
        /*0060*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/               @P0 BRA 0x30 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   HMMA.16816.F32.BF16 R8, R8, R12, R8 ;
        /*00a0*/                   BRA 0xa0;
"""


def test_the_hot_loop_is_the_innermost_around_matrix_instructions() -> None:
    code = instructions(NESTED)
    assert len(code) == 11
    loop = hot_loop(code)
    assert loop.length == 5
    assert loop.mma == {"HMMA.16816.F32.BF16": 1}
    assert loop.slow_conversions == 1
    figures = read_sass(NESTED, 32, 0)
    assert (figures.spill_loads, figures.spill_stores, figures.wide_copies) == (1, 0, 1)


@pytest.mark.parametrize(
    ("opcode", "count", "tile", "warps", "bits", "steps"),
    [
        ("HMMA.16816.F32.BF16", 64, (128, 128, 64), 8, 16, 1.0),
        ("HMMA.1688.F32.TF32", 64, (64, 64, 32), 4, 16, 2.0),
        ("IMMA.16832.S8.S8", 32, (64, 64, 128), 4, 8, 1.0),
        ("HGMMA.64x128x16.F32.BF16", 4, (128, 128, 64), 8, 16, 1.0),
        ("HGMMA.64x64x16.F32.BF16", 8, (128, 64, 64), 4, 16, 1.0),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 4, (128, 128, 128), 8, 8, 1.0),
        ("UTCHMMA", 8, (128, 128, 64), 8, 16, 2.0),
        ("UTCQMMA", 4, (128, 256, 128), 8, 8, 1.0),
    ],
)
def test_k_steps_follow_from_the_matrix_instructions(
    opcode: str, count: int, tile: tuple[int, int, int], warps: int, bits: int, steps: float
) -> None:
    text = "\n".join(
        [
            *(f"        /*{i * 16:04x}*/                   {opcode} R8, R8, R8 ;" for i in range(count)),
            f"        /*{count * 16:04x}*/               @P0 BRA 0x0 ;",
        ]
    )
    loop = hot_loop(instructions(text))
    assert steps_of(loop, tile, warps, bits) == steps
