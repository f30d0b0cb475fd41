"""The plots of docs/training.md: what `--show_timesteps image` draws, and the curves of learning rates.

python docs/images/make.py        (matplotlib is needed; `make docs` calls it)
"""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.optim.schedules import curve
from musubi_tuner.training.config import TimestepOptions
from musubi_tuner.training.show_timesteps import histogram, image

HERE = Path(__file__).parent
SHIFT = "--timestep_sampling shift --discrete_flow_shift 3.0"
TIMES = {
    "shift_3": SHIFT,
    "shift_3_500_1000": f"{SHIFT} --min_timestep 500 --max_timestep 1000",
    "shift_3_500_1000_cut": f"{SHIFT} --min_timestep 500 --max_timestep 1000 --preserve_distribution_shape",
    "logsnr": "--timestep_sampling logsnr --logit_mean -6.0 --logit_std 2.0",
    "qinglong_flux": "--timestep_sampling qinglong_flux --logit_mean -6.0 --logit_std 2.0",
}
"""By the name of the picture: the options that it shows."""

STEPS = 1000
RATES: dict[str, dict[str, Any]] = {
    "rex (0.1, 0.9), warm-up of 100": {"name": "rex", "warmup": 100},
    "rex (0.5, 0.5)": {"name": "rex", "args": {"rex_alpha": 0.5, "rex_beta": 0.5}},
    "polynomial, power 0.5": {"name": "polynomial", "power": 0.5},
    "cosine": {"name": "cosine"},
    "warmup_stable_decay, 20 %": {"name": "warmup_stable_decay", "decay": 0.2, "min_ratio": 0.1},
}
"""By the words of the legend: arguments of the curve."""


def draw_rates(path: Path) -> None:
    """The factor of the learning rate by step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for label, arguments in RATES.items():
        given = dict(arguments)
        factor = curve(given.pop("name"), steps=STEPS, rate=1e-4, **given)
        axes.plot([factor(step) for step in range(STEPS)], label=label)
    axes.set(xlabel="step", ylabel="part of the learning rate", xlim=(0, STEPS), ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw them all beside this file."""
    for name, words in TIMES.items():
        options = parse((TimestepOptions,), words.split(), prog="plots", description="")
        image(histogram(options[TimestepOptions], registry.get("wan").spec, 0), HERE / f"{name}.png")
    draw_rates(HERE / "rates.png")


if __name__ == "__main__":
    main()
