"""Key rules of FramePack files: the modules carry the published names, so only prefixes of repackaged files go."""

from musubi_tuner.weights.keys import WRAPPERS, without_prefix

rename_dit_key = without_prefix(*WRAPPERS)
