"""Options of the established tool by script, so that a user's file or command line is understood as a whole.

`known_options.json` holds, by option name, how many words the flag takes and which scripts have it. What a command of
ours does not serve (yet) is accepted with one grouped warning instead of an error; what it does in any case is accepted
in silence (`ALWAYS`); where an option can never have an effect here, the warning says why (`NEVER`).
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from musubi_tuner.config.command_line import Arity
from musubi_tuner.config.layers import ALREADY, Known

NOT_SERVED = "not served by this version"

ALWAYS: Mapping[str, str] = {
    "disable_numpy_memmap": "checkpoints are read with plain reads, never mapped",
    "skip_existing": "caches that are fresh are not made again",
    "keep_cache": "only prune_cache deletes caches",
    "cpu_noise": "noise is drawn on the CPU",
    "block_swap_h2d_only": "weights that rest on the host are copied to the device and never back",
    "lycoris": "LoHa and LoKr files are merged as LoRA files are",
    "force_v2_1_time_embedding": "the time embedding is computed once a sample, never for each token",
    "split_uncond": "the two calls of guidance are made one after the other unless cfg_batch joins them",
}
"""What is done in any case, by the option that asks for it."""

REFUSED: Mapping[str, tuple[str, ...]] = {
    "sage_attn": ("train",),
    "full_fp16": ("train",),
}
"""Options that a kind of command always refuses, with a sentence."""

NEVER: Mapping[str, str] = {
    "ddp_gradient_as_bucket_view": "gradients are averaged without buckets",
    "ddp_static_graph": "gradients are averaged without a wrapper that could use it",
    "guidance_scale": "this model is told no guidance in training",
    "persistent_data_loader_workers": "threads read ahead, which start in no time",
}
"""Why an option of the established tool has no effect in any command of ours."""


@cache
def _table() -> dict[str, tuple[Arity, tuple[str, ...]]]:
    raw = json.loads(files("musubi_tuner.config").joinpath("known_options.json").read_text(encoding="utf-8"))
    scripts = raw["scripts"]
    return {name: (words, tuple(scripts[i] for i in where)) for name, (words, where) in raw["options"].items()}


def known_elsewhere(script: str) -> dict[str, Known]:
    """All options of the established tool by name, each with where it belongs as seen from `script`."""
    return {name: Known(_where(name, script, scripts), words) for name, (words, scripts) in _table().items()}


def belongs(name: str, script: str) -> bool:
    """Whether the established script of this name has the option."""
    return script in _table()[name][1]


def _where(name: str, script: str, scripts: tuple[str, ...]) -> str:
    if script in scripts:
        return ALREADY if name in ALWAYS else NEVER.get(name, NOT_SERVED)
    return f"of {scripts[0]}" if len(scripts) == 1 else f"of {scripts[0]} and others"
