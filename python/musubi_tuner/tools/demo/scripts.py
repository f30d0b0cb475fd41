"""Running the project's own scripts, as a user does: each in a process of its own, its command line shown first."""

import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from musubi_tuner.config.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How a script went."""

    name: str
    seconds: float
    peak_bytes: int
    """Largest resident size of any script so far, its own children included."""


def run(name: str, arguments: Sequence[str]) -> Outcome:
    """Run `python -m musubi_tuner.<name> ...`, its output passed on.

    Raises UserError when it fails, with its exit code and the command that shows the fault again.
    """
    print(f"\n$ musubi {name} {shlex.join(arguments)}", flush=True)
    # threads that sleep while they wait: spinning ones halve the speed where cores are shared
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"musubi_tuner.{name}", *arguments], env=environment, check=False)
    if done.returncode:
        raise UserError(
            f"the demo stopped: `musubi {name}` failed with exit code {done.returncode}; its message is above. "
            "Mend that and run the demo again: it goes on from what is there"
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Outcome(name, time.perf_counter() - started, peak)
