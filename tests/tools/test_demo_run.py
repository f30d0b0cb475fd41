"""The demo's command: files are written once, a LoRA is reused only where nothing has changed, failure is told."""

import json
import math
from pathlib import Path

import pytest
import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.spec import load
from musubi_tuner.tools.demo import lesson, measure, pictures, report, run, scripts, world
from musubi_tuner.tools.demo.base import Base


def test_lesson_is_twelve_true_rainbows_with_captions(tmp_path: Path) -> None:
    taught = lesson.prepare(tmp_path)
    files = sorted(taught.folder.glob("*.png"))
    assert len(files) == taught.count == 12
    for file in files:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert caption == f"a rainbow {file.stem.partition('_')[0]}"
        assert measure.rainbow_distance(pictures.from_image(file)[None]).item() < 0.2
    digits = {file.stem.partition("_")[0] for file in files}
    assert digits.isdisjoint(world.NAMES[digit] for digit in world.HELD_OUT)


def test_lesson_is_a_dataset_that_the_scripts_take(tmp_path: Path) -> None:
    taught = lesson.prepare(tmp_path)
    (dataset,) = load(taught.dataset).datasets
    assert (dataset.resolution, dataset.batch_size, dataset.num_repeats) == ((64, 64), 8, 2)
    assert Path(dataset.media) == taught.folder


def test_a_second_lesson_touches_nothing(tmp_path: Path) -> None:
    lesson.prepare(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    lesson.prepare(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_spoilt_picture_is_drawn_again(tmp_path: Path) -> None:
    taught = lesson.prepare(tmp_path)
    file = taught.folder / "two_1.png"
    good = file.read_bytes()
    pictures.to_image(torch.zeros(3, 64, 64)).save(file)
    lesson.prepare(tmp_path)
    assert file.read_bytes() == good


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of trainings that were asked for; each leaves a file as the script would."""
    asked: list[list[str]] = []

    def pretend(name: str, arguments: list[str]) -> scripts.Outcome:
        asked.append([name, *arguments])
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arguments[arguments.index('--output_name') + 1]}.safetensors").write_bytes(b"a lora")
        return scripts.Outcome(name, 1.0, 1)

    monkeypatch.setattr(scripts, "run", pretend)
    return asked


def _tiny_base(folder: Path) -> Base:
    base = Base(folder)
    folder.mkdir()
    for path in (base.dit, base.vae, base.t5):
        path.write_bytes(path.name.encode())
    return base


def test_training_is_skipped_only_while_nothing_changes(tmp_path: Path, trainings: list[list[str]]) -> None:
    base, output = _tiny_base(tmp_path / "base"), tmp_path / "out"
    taught = lesson.prepare(output)
    assert run._trained(base, taught, output, [])[1] is False
    assert run._trained(base, taught, output, [])[1] is True
    (taught.folder / "two_1.txt").write_text("a rainbow goose\n", encoding="utf-8")
    assert run._trained(base, taught, output, [])[1] is False
    base.dit.write_bytes(b"another base")
    assert run._trained(base, taught, output, [])[1] is False
    assert [words[0] for words in trainings] == ["wan_train_network"] * 3


def test_training_asks_for_scaled_fp8_and_rank_8(tmp_path: Path, trainings: list[list[str]]) -> None:
    base, output = _tiny_base(tmp_path / "base"), tmp_path / "out"
    run._trained(base, lesson.prepare(output), output, [])
    words = " ".join(trainings[0])
    for part in ("--fp8_base", "--fp8_scaled", "--network_dim 8", "--max_train_steps 150", "--learning_rate 0.001"):
        assert part in words


def test_a_failing_script_stops_the_demo_with_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"wan_cache_latents.*exit code 2"):
        scripts.run("wan_cache_latents", ["--dataset_config", "nowhere.toml", "--vae", "none"])
    assert "--vae none is not there" in capfd.readouterr().err


def _report(share: float) -> report.Report:
    return report.Report(
        cached="12 pictures",
        training=report.Training(losses=(1.0, 0.5), seconds_per_step=(9.0, 9.0, 9.0, 0.25, 0.75), reused=False),
        lora="rank 8",
        kernels=("fp8_linear: reference",),
        verdict=measure.Verdict((measure.Gate("flow loss", 1.0, share, 0.6),), (("ordinary", 0.2, 0.4),)),
        peak_bytes=300 * 2**20,
        seconds=61.0,
        paths={"grid": Path("demo/grid.png")},
    )


@pytest.mark.parametrize(("share", "passed"), [(0.4, True), (0.7, False), (math.nan, False)])
def test_report_tells_the_measure_and_whether_it_passed(tmp_path: Path, share: float, passed: bool) -> None:
    made = _report(share)
    made.write(tmp_path)
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert ("The measure passed." in text) is passed
    assert ("FAILED" in text) is not passed
    for part in ("2.0 steps/s", "300 MiB", "demo/grid.png", "margin", "ordinary: base 0.200, LoRA 0.400"):
        assert part in text
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["passed"] is passed


def test_training_is_read_from_its_event_files(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "20260101" / "network_train"))
    for step, loss in enumerate((3.0, 2.0, 1.0), start=1):
        writer.add_scalar("loss/current", loss, step)
        writer.add_scalar("time/seconds_per_step", 0.5, step)
    writer.close()
    read = report.read_training(tmp_path, reused=True)
    assert read.losses == (3.0, 2.0, 1.0)
    assert read.steps_per_second == pytest.approx(2.0)


def test_grid_shows_every_row_at_twice_the_size(tmp_path: Path) -> None:
    from PIL import Image

    red = world.paint(torch.ones(64, 64), world.solid("red"))
    blue = world.paint(torch.ones(64, 64), world.solid("blue"))
    pictures.draw_grid([pictures.Row("one", [red, blue], ["r", "b"]), pictures.Row("two", [blue])], tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.size == (6 + 2 * 134, 6 + (20 + 128 + 18 + 6) + (20 + 128 + 6))
        found = [sheet.getpixel(place) for place in ((70, 90), (204, 90), (70, 260))]
    expected = [tuple(round(255 * c) for c in world.COLORS[name]) for name in ("red", "blue", "blue")]
    assert found == expected


@pytest.mark.slow
def test_the_whole_demo_passes_and_a_second_run_reuses_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shipped = Base(Path(__file__).parents[2] / "examples" / "digits")
    assert run.run(shipped, tmp_path) == 0
    lora = (tmp_path / "lora" / "rainbow.safetensors").stat().st_mtime_ns
    assert run.run(shipped, tmp_path) == 0
    assert (tmp_path / "lora" / "rainbow.safetensors").stat().st_mtime_ns == lora
    assert "not trained again" in capfd.readouterr().out
