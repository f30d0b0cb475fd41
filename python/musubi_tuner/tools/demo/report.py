"""The demo's report: what was cached and trained, which kernels ran and why, the measure, memory, and the paths."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from musubi_tuner.tools.demo.measure import Verdict


@dataclass(frozen=True)
class Training:
    """The LoRA training as its own event files tell it."""

    losses: tuple[float, ...]
    seconds_per_step: tuple[float, ...]
    reused: bool

    @property
    def steps_per_second(self) -> float:
        """Without the first steps, which warm caches up."""
        timed = sorted(self.seconds_per_step[3:]) or sorted(self.seconds_per_step)
        return len(timed) / sum(timed) if timed else float("nan")


@dataclass(frozen=True)
class Report:
    """Everything that is told at the end."""

    cached: str
    training: Training
    lora: str
    kernels: tuple[str, ...]
    verdict: Verdict
    peak_bytes: int
    seconds: float
    paths: Mapping[str, Path]

    def text(self) -> str:
        made = "found there, made earlier at" if self.training.reused else "at"
        told = [
            ("cached", [self.cached]),
            (
                "trained",
                [f"{len(self.training.losses)} steps {made} {self.training.steps_per_second:.1f} steps/s; {self.lora}"],
            ),
            ("kernels", list(self.kernels)),
            ("measure", self.verdict.lines()),
            ("memory", [f"peak {self.peak_bytes / 2**20:.0f} MiB resident in any one process"]),
            ("time", [f"{self.seconds:.0f} s"]),
            *((name, [str(path)]) for name, path in self.paths.items()),
        ]
        width = max(len(name) for name, _ in told) + 2
        lines = [f"{name if i == 0 else '':<{width}}{line}" for name, part in told for i, line in enumerate(part)]
        end = "The measure passed." if self.verdict.passed else "The measure FAILED: see the lines above."
        return "\n".join([*lines, "", end])

    def write(self, folder: Path) -> None:
        """`report.txt` and `report.json`."""
        (folder / "report.txt").write_text(self.text() + "\n", encoding="utf-8")
        content = {
            "passed": self.verdict.passed,
            "steps_per_second": self.training.steps_per_second,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "gates": [{**asdict(gate), "share": gate.share, "passed": gate.passed} for gate in self.verdict.gates],
            "reported": {name: {"base": base, "lora": lora} for name, base, lora in self.verdict.reported},
            "paths": {name: str(path) for name, path in self.paths.items()},
        }
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_training(folder: Path, *, reused: bool) -> Training:
    """Losses and step times of the newest run below a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        return Training((), (), reused)
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]

    def values(tag: str) -> tuple[float, ...]:
        return tuple(event.value for event in events.Scalars(tag)) if tag in scalars else ()

    return Training(values("loss/current"), values("time/seconds_per_step"), reused)
