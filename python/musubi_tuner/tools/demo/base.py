"""The shipped base model as the demo uses it: its files, its FP8 form, and how a user's LoRA goes on top."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.base import Dit, Encoders, Family, Vae
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

FAMILY = "wan"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """The files of the base model in one folder."""

    folder: Path

    @property
    def vae(self) -> Path:
        return self.folder / "vae.safetensors"

    @property
    def dit(self) -> Path:
        return self.folder / "dit.safetensors"

    @property
    def t5(self) -> Path:
        return self.folder / "t5.safetensors"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def judge(self) -> Path:
        return self.folder / "judge.safetensors"

    @property
    def family(self) -> Family:
        return registry.get(FAMILY)

    def require(self) -> None:
        """Raises UserError naming what is not there."""
        missing = [p.name for p in (self.vae, self.dit, self.t5, self.tokenizer, self.judge) if not p.exists()]
        if missing:
            raise UserError(
                f"{self.folder} has no {', '.join(missing)}: run the demo in the folder of the repository, "
                "or name the base model's folder with --base (it is examples/digits of the repository)"
            )

    def load_vae(self) -> Vae:
        return self.family.load_vae(str(self.vae), device=CPU, dtype=torch.float32)

    def load_encoders(self) -> Encoders:
        """The text encoder, asked for as generation asks for it."""
        group: Any = self.family.option_groups("generate")[0]
        options = group(t5=str(self.t5), t5_tokenizer=str(self.tokenizer))
        encoders = self.family.load_encoders(options, device=CPU, dtype=torch.float32)
        if encoders is None:
            raise UserError(f"{self.t5} gave no text encoder")
        return encoders

    def load_dit(self, *, fp8: bool) -> Dit:
        """The transformer in float32, its targeted weights in scaled FP8 if asked for; in evaluation mode."""
        policy = WeightPolicy(torch.float32, Fp8Policy(self.family.spec.fp8, scaled=True) if fp8 else None)
        with open_checkpoint(self.dit) as checkpoint:
            dit = self.family.build_dit(checkpoint.header)
            materialize(dit, checkpoint, rename=self.family.rename_dit_key, policy=policy, device=CPU, progress=False)
        return dit.eval()


def find_base(named: str | None, candidates: Sequence[Path] = ()) -> Base:
    """The folder that was named, else the first candidate that is there (a checkout's examples)."""
    if named is not None:
        return Base(Path(named))
    found = [folder for folder in candidates if folder.is_dir()]
    return Base(found[0] if found else candidates[0])
