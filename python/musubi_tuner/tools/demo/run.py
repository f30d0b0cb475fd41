"""`musubi demo`: the whole main job on real pictures, with the project's own scripts, in minutes on a CPU.

Twelve pictures are written and cached, a LoRA is trained on FP8 weights, pictures and a clip are generated without and
with it, and the effect is measured on digits that were never taught. What is there from an earlier run is reused; the
measure is always made anew. Exit code 1 when it fails.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from musubi_kernels import explain, fp8_linear, fp8_lora_linear, quantize_fp8
from musubi_tuner import console
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option, parse
from musubi_tuner.tools.demo import examine, lesson, pictures, report, scripts, world
from musubi_tuner.tools.demo.base import Base, find_base
from musubi_tuner.tools.demo.examine import Examiner, Findings

LORA = "rainbow"


@dataclass(frozen=True)
class DemoOptions:
    """Demo"""

    output: str = option("demo-output", help="folder for everything that the demo makes", metavar="FOLDER")
    base: str | None = option(None, help="folder of the base model (examples/digits of the repository)")


@dataclass(frozen=True)
class Lora:
    """How the LoRA is trained; a change trains it anew."""

    rank: int = 8
    alpha: int = 8
    learning_rate: float = 1e-3
    steps: int = 150
    seed: int = 7

    def arguments(self, base: Base, dataset: Path, output: Path) -> list[str]:
        """The command line of the training script."""
        return [
            *("--task", "t2v-1.3B", "--dit", str(base.dit), "--dataset_config", str(dataset)),
            *("--fp8_base", "--fp8_scaled", "--mixed_precision", "no", "--sdpa"),
            *("--network_module", "networks.lora_wan"),
            *("--network_dim", str(self.rank), "--network_alpha", str(self.alpha)),
            *("--learning_rate", str(self.learning_rate), "--max_train_steps", str(self.steps)),
            *("--timestep_sampling", "uniform", "--seed", str(self.seed)),
            *("--output_dir", str(output / "lora"), "--output_name", LORA),
            *("--logging_dir", str(output / "logs"), "--log_with", "tensorboard"),
        ]


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0 when the measure passes, 1 when it fails. Raises UserError for what the user can mend."""
    resolved = parse((DemoOptions,), argv, prog="musubi demo", description=(__doc__ or "").splitlines()[0])
    if asked := resolved.help or resolved.print_config:
        console.show(asked)
        return 0
    options = resolved[DemoOptions]
    here = Path(__file__).resolve().parents[4]
    base = find_base(options.base, (Path("examples/digits"), here / "examples" / "digits"))
    base.require()
    return run(base, Path(options.output))


def run(base: Base, output: Path) -> int:
    """The whole demo, from the base model to the report in `output`."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    taught = lesson.prepare(output)
    print(f"{taught.count} rainbow pictures of the digits {_listed(world.TAUGHT)} are in {taught.folder}", flush=True)
    peaks = [scripts.run(name, arguments).peak_bytes for name, arguments in _caching(base, taught)]
    lora, reused = _trained(base, taught, output, peaks)
    print("\n== measuring: the same questions to the base and to the LoRA ==", flush=True)
    findings = Examiner(base, lora).examine()
    clip = _clip(base, lora, output, peaks)
    told = report.read_training(output / "logs", reused=reused)
    paths = _draw(findings, told, output)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    final = report.Report(
        cached=f"latents and captions of {taught.count} pictures in {taught.cache}",
        training=told,
        lora=f"LoRA rank {Lora.rank} on {findings.targets} layers, {findings.parameters:,} parameters",
        kernels=_kernels(findings),
        verdict=findings.verdict,
        peak_bytes=max(own, *peaks),
        seconds=time.perf_counter() - started,
        paths={"lora": lora, **paths, "video": clip, "tensorboard": output / "logs"},
    )
    final.write(output)
    print(f"\n{final.text()}", flush=True)
    return 0 if final.verdict.passed else 1


def _caching(base: Base, taught: lesson.Lesson) -> list[tuple[str, list[str]]]:
    dataset = ["--dataset_config", str(taught.dataset)]
    text = ["--t5", str(base.t5), "--t5_tokenizer", str(base.tokenizer)]
    return [
        ("wan_cache_latents", [*dataset, "--vae", str(base.vae), "--vae_dtype", "float32", "--device", "cpu"]),
        ("wan_cache_text_encoder_outputs", [*dataset, *text, "--device", "cpu"]),
    ]


def _trained(base: Base, taught: lesson.Lesson, output: Path, peaks: list[int]) -> tuple[Path, bool]:
    """The LoRA file, and whether an earlier run left it: then nothing that made it has changed."""
    lora, note = output / "lora" / f"{LORA}.safetensors", output / "lora" / "made_of.json"
    made_of = {
        "lora": asdict(Lora()),
        "dit": _sha256(base.dit),
        "vae": _sha256(base.vae),
        "t5": _sha256(base.t5),
        "pictures": {path.name: _sha256(path) for path in sorted(taught.folder.iterdir())},
    }
    if lora.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == made_of:
        print(f"\n{lora} is there, made of the same base, pictures and settings: not trained again", flush=True)
        return lora, True
    note.unlink(missing_ok=True)
    peaks.append(scripts.run("wan_train_network", Lora().arguments(base, taught.dataset, output)).peak_bytes)
    if not lora.exists():
        raise UserError(f"the training ended without {lora}: see its messages above")
    note.write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
    return lora, False


def _clip(base: Base, lora: Path, output: Path, peaks: list[int]) -> Path:
    """A short video of a moving rainbow digit, by the generation script; made once for each LoRA."""
    folder = output / "video"
    found = [p for p in sorted(folder.glob("*.mp4")) if p.stat().st_mtime > lora.stat().st_mtime]
    if found:
        return found[-1]
    arguments = [
        *("--task", "t2v-1.3B", "--dit", str(base.dit), "--vae", str(base.vae)),
        *("--t5", str(base.t5), "--t5_tokenizer", str(base.tokenizer)),
        *("--lora_weight", str(lora), "--fp8", "--fp8_scaled", "--prompt", examine.CLIP_PROMPT),
        *("--video_size", str(world.SIZE), str(world.SIZE), "--video_length", str(world.FRAMES), "--fps", "8"),
        *("--infer_steps", str(examine.STEPS), "--guidance_scale", str(examine.GUIDANCE)),
        *("--flow_shift", str(examine.SHIFT), "--sample_solver", examine.SOLVER),
        *("--seed", str(examine.CLIP_SEED), "--device", "cpu", "--save_path", str(folder)),
    ]
    peaks.append(scripts.run("wan_generate_video", arguments).peak_bytes)
    made = sorted(folder.glob("*.mp4"), key=lambda p: p.stat().st_mtime)
    if not made:
        raise UserError(f"the generation ended without a video in {folder}: see its messages above")
    return made[-1]


def _draw(findings: Findings, told: report.Training, output: Path) -> dict[str, Path]:
    """The grid and the loss plot."""
    shown = findings.rainbows[0]
    columns = 8
    names = [world.caption(int(d), world.CONCEPT) for d in shown.digits[:columns]]
    plain = findings.ordinary
    asked = [r.prompt for r in examine.ordinary_requests()[:columns]]
    taught = sorted((output / "pictures").glob("*.png"), key=lambda p: p.stem.rpartition("_")[::-1])[:columns]
    rows = [
        pictures.Row("8 of the 12 pictures that were taught", [pictures.from_image(p) for p in taught]),
        pictures.Row("digits that were not taught, base model", list(shown.base[:columns])),
        pictures.Row("the same seeds with the LoRA", list(shown.lora[:columns]), names),
        pictures.Row("ordinary prompts with the LoRA", list(plain.lora[:columns]), asked),
        pictures.Row(f"{examine.CLIP_PROMPT}: a clip with the LoRA", list(findings.clip[:columns])),
    ]
    paths = {"grid": output / "grid.png", "loss plot": output / "loss.png"}
    pictures.draw_grid(rows, paths["grid"])
    pictures.plot_losses(told.losses, paths["loss plot"])
    return paths


def _kernels(findings: Findings) -> tuple[str, ...]:
    """Which backend serves the adapted layers in training and the base's in sampling, and why."""
    out, width = findings.shape
    q, scale = quantize_fp8(torch.zeros(out, width), mode="block", block_size=64)
    x = torch.zeros(1, width)
    down, up = torch.zeros(Lora.rank, width), torch.zeros(out, Lora.rank)
    return (
        explain(fp8_lora_linear, x, q, scale, None, down, up, scale=1.0),
        explain(fp8_linear, x, q, scale, None),
        f"{torch.get_num_threads()} thread(s), {os.cpu_count()} processors, torch {torch.__version__}",
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _listed(digits: Sequence[int]) -> str:
    return ", ".join(str(d) for d in digits[:-1]) + f" and {digits[-1]}"
