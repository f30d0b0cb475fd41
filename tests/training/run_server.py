"""Starts training runs as processes of their own, cheaply: imports once, then forks for every line it is given.

Run as `python run_server.py [MODULE ...]`, which are imported too; reads JSON lines from stdin and answers each with
one JSON line:
    {"place": ..., "out": ..., "words": [...]}  ->  {"pid": ...}     a run. "sync": n: it kills itself at its n-th
                                                                     fsync; "env": {...}: with these variables;
                                                                     "script": a file to run with `words` instead
    {"peek": pid}                               ->  {"ended": ...}   whether it has ended
    {"wait": pid}                               ->  {"status": ...}  as os.waitpid tells
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 -- what a run imports on its way, before any fork
import torch
import torch._dynamo  # the same

from musubi_tuner import cli, console
from training_place import FAMILY, train_noting_losses


def main() -> None:
    torch.set_num_threads(1)
    assert FAMILY.spec.name == "wan"
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = {"status": os.waitpid(asked["wait"], 0)[1]}
        elif "peek" in asked:
            found = os.waitid(os.P_PID, asked["peek"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            answer = {"ended": found is not None}
        else:
            pid = os.fork()
            if pid == 0:
                _child(asked)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _child(asked: dict) -> None:
    """One run, with the command line's own handling of faults."""
    with (Path(asked["out"]) / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 2)
    os.environ.update(asked.get("env", {}))
    if asked.get("sync"):
        _die_at_sync(asked["sync"])
    console.configure()

    def work() -> int:
        if "script" in asked:
            sys.argv = [asked["script"], *asked["words"]]
            runpy.run_path(asked["script"], run_name="__main__")
            return 0
        train_noting_losses(Path(asked["place"]), Path(asked["out"]), *asked["words"])
        return 0

    try:
        code = cli.guarded("train", work)
    except SystemExit as left:
        code = left.code
    os._exit(code)


def _die_at_sync(number: int) -> None:
    real, done = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        real(descriptor)

    os.fsync = fsync


if __name__ == "__main__":
    main()
