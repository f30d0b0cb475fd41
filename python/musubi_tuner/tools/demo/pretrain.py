"""Makes the demo's base model from nothing: tokenizer, text encoder, VAE, judge, DiT; then measures what it made.

    python -m musubi_tuner.tools.demo.pretrain WORK_FOLDER SHIP_FOLDER

Takes about an hour and a half on one core. Each part is kept in the work folder with its state, so a run that was
stopped goes on. The shipped files are bfloat16 safetensors in Wan's original key layouts, with their sizes in
`musubi.config`.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.families.base import Dit
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.families.wan.vae import VaeConfig, to_original_keys
from musubi_tuner.sampling.models import encode
from musubi_tuner.sampling.pipeline import Sampler, decode
from musubi_tuner.sampling.request import Request
from musubi_tuner.tools.demo import examine, judge, pretrain_dit, pretrain_text, pretrain_vae, shelf, world
from musubi_tuner.tools.demo.base import CPU, Base
from musubi_tuner.weights.write import atomic_save_safetensors

SEED = 20261124
VAE_CONFIG = VaeConfig(base_dim=16, num_res_blocks=1)
DIT_CONFIG = WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=6, text_dim=64, text_len=16)
ACCURACY_GATE = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the demo's base model.")
    parser.add_argument("work", type=Path, help="folder for training states")
    parser.add_argument("ship", type=Path, help="folder for the finished files")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    base = Base(given.ship)
    if not base.t5.exists():
        pretrain_text.write(base.folder, SEED)
    if not base.judge.exists():
        save(base.judge, judge.train_judge(SEED).state_dict(), {}, torch.float32)
    if not base.vae.exists():
        make_vae(base, given.work)
    if not base.dit.exists():
        make_dit(base, given.work)
    print(json.dumps(figures(base), indent=2), flush=True)


def save(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write tensors in `dtype`, with the architecture in the metadata where there is one."""
    metadata = {"format": "pt"}
    if config:
        metadata["musubi.config"] = json.dumps(config)
    atomic_save_safetensors(path, {name: t.detach().to(dtype).contiguous() for name, t in tensors.items()}, metadata)


def make_vae(base: Base, work: Path) -> None:
    """Train, fold the family's latent statistics in, and write under the original names."""
    model: Any = pretrain_vae.train(pretrain_vae.VaeRecipe(), work)
    known = model.config  # diffusers knows the published statistics
    pretrain_vae.fold_statistics(model, pretrain_vae.typical_pixels(SEED), known.latents_mean, known.latents_std)
    save(base.vae, to_original_keys(model.state_dict(), VAE_CONFIG), asdict(VAE_CONFIG), torch.bfloat16)


def make_dit(base: Base, work: Path) -> None:
    """Encode the world with the shipped VAE and text encoder, train on it, and write the averaged weights."""
    family, recipe = base.family, pretrain_dit.DitRecipe()
    shelved = shelf.open_shelf(work / "latents.pt", base.load_vae(), SEED)
    texts = shelf.encode_captions(family, base.load_encoders(), shelf.all_captions())
    with torch.device("meta"):
        dit = WanModel(DIT_CONFIG)
    pretrain_dit.initialize(dit, recipe.seed)
    source = shelf.DigitBatches(family, shelved, texts, recipe.seed)
    source = replace(source, mix=recipe.mix(len(source)))
    weights = pretrain_dit.pretrain(
        dit, lambda x_t, t, cond: family.predict(dit, x_t, t, cond), source, recipe, work / "dit_state.pt"
    )
    save(base.dit, weights, asdict(DIT_CONFIG), torch.bfloat16)


def figures(base: Base) -> dict[str, float]:
    """What the finished base can do: VAE in dB, digits read right on 200 pictures and on the first frames of clips."""
    reader, vae = judge.load_judge(base.judge), base.load_vae()
    found = {}
    for name, pixels in pretrain_vae.fixed_sets(world.load_glyphs(held_out=True)).items():
        with torch.no_grad():
            error = (decode(vae, vae.encode(pixels), CPU) - pixels).square().mean()
        found[f"dB {name}"] = round(float(10 * torch.log10(4 / error)), 2)
    for fp8 in (False, True):
        dit, weights = base.load_dit(fp8=fp8), "fp8" if fp8 else "bf16"
        stills = render(base, dit, examine.ordinary_requests(200))[:, :, 0]
        found[f"digits right, 200 pictures, {weights}"] = judge.accuracy(reader, stills, asked_digits(200))
    asked = moving_requests(40)
    clips = render(base, dit, [r for r, _ in asked])
    found["digits right, first frames of 40 clips"] = judge.accuracy(reader, clips[:, :, 0], asked_digits(40))
    found["clips that move as told"] = moves_right(clips, [way for _, way in asked])
    found["gate"] = ACCURACY_GATE
    return found


def asked_digits(count: int) -> Tensor:
    """The digits of the first `count` prompts."""
    return torch.arange(count) % 10


def moving_requests(count: int) -> list[tuple[Request, str]]:
    """Requests of clips, with the direction each should move in."""
    colors, ways = tuple(world.COLORS), tuple(world.DIRECTIONS)
    told = [(world.caption(i % 10, colors[i % 8], ways[i // 10 % 4]), ways[i // 10 % 4]) for i in range(count)]
    return [(examine.request(prompt, 7000 + i, world.FRAMES), way) for i, (prompt, way) in enumerate(told)]


def render(base: Base, dit: Dit, requests: list[Request]) -> Tensor:
    """Pixels `[N, 3, F, H, W]` of the requests."""
    prompts = encode(base.family, base.load_encoders(), requests, progress=False)
    latents = [z for _, z in Sampler(base.family, dit, CPU).latents(requests, prompts, batch=40, progress=False)]
    vae = base.load_vae()
    return torch.cat([decode(vae, part, CPU) for part in torch.stack(latents).split(20)])


def moves_right(clips: Tensor, ways: list[str]) -> float:
    """Share of clips `[N, 3, F, H, W]` whose strokes' center goes most the way that was told."""
    centers = []
    for frame in (0, clips.shape[2] - 1):
        masks = judge.strokes(clips[:, :, frame])
        mass, axis = masks.sum((1, 2)).clamp_min(1e-6), torch.arange(masks.shape[-1], dtype=torch.float32)
        centers.append(torch.stack([(masks.sum(1) * axis).sum(1), (masks.sum(2) * axis).sum(1)], dim=1) / mass[:, None])
    travel = centers[1] - centers[0]  # [N, (x, y)]
    compass = torch.tensor([world.DIRECTIONS[way] for way in world.DIRECTIONS], dtype=torch.float32)
    found = (travel @ compass.T).argmax(1)
    told = torch.tensor([tuple(world.DIRECTIONS).index(way) for way in ways])
    return (found == told).float().mean().item()


if __name__ == "__main__":
    main()
