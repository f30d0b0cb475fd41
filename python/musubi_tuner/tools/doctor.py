"""`musubi doctor`: what this machine has, which kernels run here and why, and what is missing for which feature.

Every probe stands alone: a broken package or driver becomes a row that says so, never a traceback. Packages are looked
up by their metadata and not imported, torch and musubi_kernels apart. Exit code 1 when something required is missing.
"""

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from musubi_tuner.config.options import option, parse


@dataclass(frozen=True)
class DoctorOptions:
    """Doctor."""

    json: bool = option(False, help="print the report as JSON")


@dataclass(frozen=True)
class Row:
    """One finding. state: `ok`, `info`, `missing` (a feature is not there) or `broken` (something required is not)."""

    name: str
    state: str
    note: str


@dataclass(frozen=True)
class Section:
    """Findings of one kind, with a heading."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Feature:
    """Something optional: what it serves, the package that it needs, and how to get it."""

    serves: str
    module: str
    distribution: str
    get: str


_TRAIN = 'pip install "musubi-tuner[train]"'

FEATURES = (
    Feature("logs with --log_with tensorboard", "tensorboard", "tensorboard", _TRAIN),
    Feature("logs with --log_with wandb", "wandb", "wandb", _TRAIN),
    Feature("schedule-free optimizers", "schedulefree", "schedulefree", _TRAIN),
    Feature("8-bit optimizers", "bitsandbytes", "bitsandbytes", _TRAIN + " (Linux on x86-64)"),
    Feature("loss plots", "matplotlib", "matplotlib", _TRAIN),
    Feature("sentencepiece tokenizers", "sentencepiece", "sentencepiece", "pip install sentencepiece"),
    Feature("reading and writing videos", "av", "av", "pip install av"),
    Feature("the demo's digits", "sklearn", "scikit-learn", 'pip install "musubi-tuner[demo]"'),
    Feature("--attn_mode flash", "flash_attn", "flash-attn", "pip install flash-attn (needs a CUDA device)"),
    Feature("--attn_mode xformers", "xformers", "xformers", "pip install xformers (needs a CUDA device)"),
    Feature("--attn_mode sageattn", "sageattention", "sageattention", "pip install sageattention (needs CUDA)"),
    Feature("Triton kernels", "triton", "triton", "comes with torch for CUDA"),
)

WATCHED = ("MUSUBI_KERNELS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")


def main(argv: Sequence[str]) -> int:
    """Print the report. Returns 0, or 1 when something required is missing or broken."""
    options = parse((DoctorOptions,), argv, prog="musubi doctor", description="What is here, and what is missing.")
    if options.help or options.print_config:
        print(options.help or options.print_config)
        return 0
    sections = report()
    print(json.dumps([asdict(s) for s in sections], indent=2) if options[DoctorOptions].json else as_text(sections))
    return int(any(row.state == "broken" for section in sections for row in section.rows))


def report() -> list[Section]:
    """All findings, in the order of the printed page."""
    return [
        Section("versions", tuple(versions())),
        Section("devices", tuple(devices())),
        Section("kernel backends", tuple(kernels())),
        Section("features", tuple(features(FEATURES))),
        Section("building from source", tuple(build_tools())),
        Section("environment", tuple(Row(n, "info", os.environ[n]) for n in WATCHED if n in os.environ)),
    ]


def as_text(sections: Sequence[Section]) -> str:
    """The page: one line per finding, what is missing marked."""
    marks = {"ok": "  ", "info": "  ", "missing": "- ", "broken": "! "}
    lines = []
    for section in (s for s in sections if s.rows):
        width = max(len(row.name) for row in section.rows)
        lines += [section.title, *(f"  {marks[r.state]}{r.name:<{width}}  {r.note}".rstrip() for r in section.rows), ""]
    return "\n".join([*lines, "  - not there, needed for that feature only     ! required, mend it first"])


def versions() -> list[Row]:
    """Ourselves, Python, and every required package with the range that it must lie in."""
    rows = [Row("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    try:
        ours = metadata.distribution("musubi-tuner")
    except metadata.PackageNotFoundError:
        return [Row("musubi-tuner", "info", "run from a checkout, not installed"), *rows, required("torch", "")]
    rows.insert(0, Row("musubi-tuner", "ok", ours.version))
    return rows + [required(name, wanted) for name, wanted in requirements(ours.requires or [])]


def requirements(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(name, version range) of the requirements that hold here without any extra."""
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in lines]
    return [(r.name, str(r.specifier)) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def required(name: str, wanted: str) -> Row:
    """A required package: there, in its range?"""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Row(name, "broken", f"not installed: pip install '{name}{wanted}'")
    if wanted:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(wanted).contains(found, prereleases=True):
            return Row(name, "broken", f"{found} is outside {wanted}: pip install '{name}{wanted}'")
    return Row(name, "ok", found)


def devices() -> list[Row]:
    """CPU, memory, and the accelerators that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [Row("CPU", "info", f"{cpu_name()}, {cores} of {os.cpu_count()} cores"), Row("memory", "info", memory())]
    return rows + probed("torch", _torch_devices)


def _torch_devices() -> list[Row]:
    import torch

    rows = [Row("torch threads", "info", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch was built for CUDA {built} and sees no device" if built else "this torch is built without CUDA"
        return [*rows, Row("CUDA", "missing", f"{why}: everything runs on the CPU, slower")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        note = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.1f} GiB"
        rows.append(Row(f"cuda:{index}", "ok", note + f", CUDA {torch.version.cuda}"))
    return rows


def cpu_name() -> str:
    """Model of the CPU, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> str:
    """Memory of the machine and what is free of it."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return "not known on this system"
    table = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
    total, free = (int(table[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} GiB available"


def kernels() -> list[Row]:
    """Each backend of musubi_kernels, with its reason where it is not there."""

    def rows() -> list[Row]:
        import musubi_kernels

        table = musubi_kernels.backends()
        return [Row(n, "ok" if text.startswith("available") else "missing", text) for n, text in table.items()]

    return probed("musubi_kernels", rows)


def probed(name: str, probe: Callable[[], list[Row]]) -> list[Row]:
    """The rows of `probe`, or one row that tells how it failed: a broken driver must not hide the other findings."""
    try:
        return probe()
    except Exception as fault:
        return [Row(name, "broken", f"{type(fault).__name__}: {fault}")]


def features(wanted: Sequence[Feature]) -> list[Row]:
    """Optional packages: version where installed, else what they would serve and how to get them."""
    rows = []
    for feature in wanted:
        if importlib.util.find_spec(feature.module) is None:
            rows.append(Row(feature.serves, "missing", f"needs {feature.distribution}: {feature.get}"))
            continue
        try:
            version = metadata.version(feature.distribution)
        except metadata.PackageNotFoundError:
            version = "installed"
        rows.append(Row(feature.serves, "ok", f"{feature.distribution} {version}"))
    return rows


def build_tools() -> list[Row]:
    """Compilers that an install from source would find."""
    compilers = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name]
    return [
        _tool("C++ compiler", compilers, "native CPU kernels; without one the reference kernels serve, slower"),
        _tool("nvcc", ["nvcc"], "CUDA bodies; not needed for the CPU or for Triton"),
        _tool("git", ["git"], "checkouts and updates"),
    ]


def _tool(name: str, commands: Sequence[str], serves: str) -> Row:
    found = next((path for path in map(shutil.which, commands) if path), None)
    return Row(name, "ok", found) if found else Row(name, "missing", f"serves {serves}")
