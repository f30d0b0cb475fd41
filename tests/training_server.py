"""Whole training runs in processes of their own, through `training/run_server.py`."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def held_port() -> socket.socket:
    """A socket bound to a port for the processes of one run, theirs for as long as it is not closed.

    The port is below those that the system gives to outgoing connections. From those, another test could be given it
    before the run listens; worse, a process that calls it too early can be connected to itself, and both then wait.
    """
    for _ in range(100):
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the run listens on it all the same
        try:
            holder.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
        except OSError:
            holder.close()
            continue
        return holder
    raise AssertionError("no free port between 20000 and 32000")


def launch_variables(port: int) -> dict[str, str]:
    """What a launcher sets for two processes on this machine, but for their ranks; with the paths of the tree."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("python", "kernels", "tests"))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**shared, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}


class Server:
    """Runs of `run_server.py`."""

    def __init__(self, *modules: str) -> None:
        """modules: what else the runs import on their way, imported once."""
        paths = os.pathsep.join(str(ROOT / part) for part in ("python", "kernels", "tests"))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tests/training/run_server.py"), *modules]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ports: list[socket.socket] = []

    def ask(self, **question: object) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, place: Path, out: Path, words: list[str], **more: object) -> int:
        out.mkdir(exist_ok=True)
        return self.ask(place=str(place), out=str(out), words=words, **more)["pid"]

    def pair(self, place: Path, out: Path, words: list[str], *, script: Path | None = None, **more: str) -> list[int]:
        """Two processes of one run (or of `script`), as a launcher starts them; `more` environment variables."""
        self.ports.append(held_port())
        shared = {**launch_variables(self.ports[-1].getsockname()[1]), **more}
        also = {} if script is None else {"script": str(script)}
        return [
            self.start(place, out, words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **also)
            for rank in range(2)
        ]

    def first_loss(self, out: Path, *pids: int) -> None:
        """Wait until a run has written a loss; fails with its log where one of its processes ends before."""
        losses, deadline = out / "losses.txt", time.monotonic() + 240
        while not losses.exists() or not losses.read_text():
            gone = [pid for pid in pids if self.ask(peek=pid)["ended"]]
            if gone or time.monotonic() > deadline:
                raise AssertionError(f"no loss; ended: {gone} of {pids}: {(out / 'log.txt').read_text()}")
            time.sleep(0.01)

    def end(self, pid: int) -> int:
        """The exit code of a run, negative for the signal that ended it."""
        return os.waitstatus_to_exitcode(self.ask(wait=pid)["status"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        for port in self.ports:
            port.close()
