"""Cache the latents of FramePack: `musubi cache_latents framepack` under its established name."""

import sys

if not __package__:  # run by file path: the packages are found beside this file's folder
    sys.path[0] = __file__.rsplit("musubi_tuner", 1)[0]
from musubi_tuner.cli import script

if __name__ == "__main__":
    script("fpack_cache_latents")
