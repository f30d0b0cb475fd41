"""torch.compile for a transformer's blocks, each compiled on its own where it stands.

Equal blocks share one compilation, everything around them stays eager, and block swap, checkpointing and step caches
call the compiled block as they call any other. `nn.Module.compile` is used, so names of parameters do not change.

Two spellings of the same settings exist in users' files: `dynamo_*` (after the launcher's) and `compile*`. One of them
may be given; a launcher that asks for Dynamo as well is told that ours wins, so that nothing is compiled twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest
from musubi_tuner.config.options import option
from musubi_tuner.nn.experts import transformers

log = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GONE: Mapping[str, str] = {
    "NVFUSER": "INDUCTOR",
    "AOT_NVFUSER": "INDUCTOR",
    "AOT_TS_NVFUSER": "INDUCTOR",
    "NVPRIMS_NVFUSER": "INDUCTOR",
    "AOT_CUDAGRAPHS": "CUDAGRAPHS",
    "CUDAGRAPHS_FALLBACK": "CUDAGRAPHS",
    "OFI": "INDUCTOR",
    "FX2TRT": "TENSORRT",
}
"""Backends that torch no longer has, by the one that took their place."""


@dataclass(frozen=True)
class CompileSettings:
    """Arguments of torch.compile. mode: None is the backend's default. dynamic: None lets torch find out."""

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    cache_size_limit: int | None = None

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are made, in which the addresses of weights are fixed."""
        return self.mode in ("reduce-overhead", "max-autotune") or self.backend == "cudagraphs"


@dataclass(frozen=True)
class CompileOptions:
    """Compilation"""

    dynamo_backend: str = option(
        "NO", help="compile the blocks with this backend of torch.compile (INDUCTOR, CUDAGRAPHS, ...); NO does not"
    )
    dynamo_mode: str | None = option(None, help="what INDUCTOR optimises for", choices=MODES)
    dynamo_fullgraph: bool = option(False, help="stop where a block is more than one graph")
    dynamo_dynamic: bool = option(False, help="compile for changing shapes; more often than not slower")
    compile: bool = option(False, help="the same, in newer words: compile the blocks")
    compile_backend: str = option("inductor", help="backend of --compile")
    compile_mode: str = option("default", help="what it optimises for", choices=MODES)
    compile_dynamic: str | None = option(
        None, help="changing shapes; auto finds out", choices=("true", "false", "auto")
    )
    compile_fullgraph: bool = option(False, help="stop where a block is more than one graph")
    compile_cache_size_limit: int | None = option(
        None, help="versions of a block that are kept, one for each shape; torch's limit if not given", minimum=1
    )

    @property
    def uses_dynamo(self) -> bool:
        return self.dynamo_backend.upper() != "NO"

    @property
    def settings(self) -> CompileSettings | None:
        """None: nothing is compiled. Raises UserError when both spellings are given."""
        if self.uses_dynamo and self.compile:
            raise UserError("--dynamo_backend and --compile ask for the same thing: give one of them")
        if self.uses_dynamo:
            dynamic = True if self.dynamo_dynamic else None
            mode = None if self.dynamo_mode == "default" else self.dynamo_mode
            return CompileSettings(self.dynamo_backend, mode, self.dynamo_fullgraph, dynamic)
        if not self.compile:
            return None
        mode = None if self.compile_mode == "default" else self.compile_mode
        dynamic = {"true": True, "false": False}.get(self.compile_dynamic or "auto")
        limit = self.compile_cache_size_limit
        return CompileSettings(self.compile_backend, mode, self.compile_fullgraph, dynamic, limit)


def settings_of(options: CompileOptions, environment: Mapping[str, str]) -> CompileSettings | None:
    """What to compile with: the options, else what the launcher put into `environment` (`ACCELERATE_DYNAMO_*`).

    The backend's name is checked. Raises UserError.
    """
    chosen = options.settings
    launcher = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if chosen is None and launcher.upper() != "NO":
        chosen = CompileSettings(
            launcher,
            {"default": None}.get(mode := environment.get("ACCELERATE_DYNAMO_MODE", "default"), mode),
            environment.get("ACCELERATE_DYNAMO_USE_FULLGRAPH", "").lower() in ("1", "true"),
            True if environment.get("ACCELERATE_DYNAMO_USE_DYNAMIC", "").lower() in ("1", "true") else None,
        )
        log.info("compiling as the launcher asks: %s", launcher)
    elif chosen is not None and launcher.upper() != "NO":
        log.warning("the launcher asks for Dynamo %s too: the run's own options count, once", launcher)
    if chosen is None:
        return None
    return CompileSettings(
        known_backend(chosen.backend), chosen.mode, chosen.fullgraph, chosen.dynamic, chosen.cache_size_limit
    )


def known_backend(name: str) -> str:
    """torch's spelling of a backend. Raises UserError with the nearest of those that this torch offers."""
    from torch import _dynamo

    offered = [n for n in _dynamo.list_backends(exclude_tags=()) if "TESTING" not in n and "minifier" not in n]
    if name.lower() in offered:
        return name.lower()
    shown = sorted(n.upper() for n in _dynamo.list_backends())
    close = GONE.get(name.upper()) or nearest(name.upper(), [n.upper() for n in offered], 0.6)
    raise UserError(
        f"dynamo_backend = {name!r} is not offered by this torch: use NO or one of {', '.join(shown)}"
        + (f"; did you mean {close}?" if close else "")
    )


def compile_blocks(dit: nn.Module, lists: Sequence[str], settings: CompileSettings) -> int:
    """Compile every block in the lists of `dit` that `lists` names, of two experts in both, in place; their number."""
    from torch import _dynamo

    if settings.cache_size_limit is not None:
        _dynamo.config.recompile_limit = settings.cache_size_limit
    blocks = [block for part in transformers(dit) for name in lists for block in part.get_submodule(name).children()]
    for block in blocks:
        block.compile(
            backend=settings.backend,
            mode=settings.mode,
            fullgraph=settings.fullgraph,
            dynamic=settings.dynamic,
        )
    log.info(
        "%d blocks are compiled with %s%s%s when they first run",
        len(blocks),
        settings.backend,
        f", mode {settings.mode}" if settings.mode else "",
        ", as one graph each" if settings.fullgraph else "",
    )
    return len(blocks)
