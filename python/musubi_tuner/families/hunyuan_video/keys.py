"""Key rules of HunyuanVideo files: the modules carry the original names, so only prefixes of repackaged files go."""

from collections.abc import Iterable

from musubi_tuner.weights.keys import WRAPPERS, Rename, same, without_prefix

rename_dit_key = without_prefix(*WRAPPERS)

_VAE_PREFIX = "vae."


def vae_rename(keys: Iterable[str]) -> Rename:
    """The rename of a VAE file: where any key begins with `vae.`, the others belong to something else."""
    if not any(key.startswith(_VAE_PREFIX) for key in keys):
        return same
    return lambda key: key.removeprefix(_VAE_PREFIX) if key.startswith(_VAE_PREFIX) else None
