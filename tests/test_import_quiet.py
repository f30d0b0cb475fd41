"""Importing any module of ours prints nothing, sets up no logging, asks no device, makes no folder and fetches nothing.

One subprocess imports every module in turn with the doors watched; a second one checks that `musubi --help` needs
neither torch nor any other heavy library.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

WATCH = """
import importlib, json, logging, os, pathlib, sys, threading
import torch  # its own noise is not ours

seen = []
state = {"name": "", "on": False}

def hook(event, args):
    if not state["on"]:
        return
    if event in ("os.mkdir", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.remove"):
        seen.append([state["name"], event, repr(args)[:200]])
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if "__pycache__" not in str(args[0]):
            seen.append([state["name"], event, repr(args)[:200]])

sys.addaudithook(hook)

def snapshot():
    loggers = [logging.getLogger(), *(l for l in map(logging.getLogger, list(logging.root.manager.loggerDict)))]
    ours = [l for l in loggers if l is logging.root or l.name.startswith("musubi")]
    return {
        "handlers": sum(len(l.handlers) for l in ours),
        "root level": logging.root.level,
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "random state": hash(bytes(torch.get_rng_state())),
        "default dtype": str(torch.get_default_dtype()),
        "cuda": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

failed = []
for name in json.loads(sys.argv[1]):
    before = snapshot()
    state.update(name=name, on=True)
    try:
        importlib.import_module(name)
    except Exception as fault:
        failed.append([name, "import", f"{type(fault).__name__}: {fault}"])
    finally:
        state["on"] = False
    after = snapshot()
    failed += [[name, key, f"{before[key]} -> {after[key]}"] for key in before if before[key] != after[key]]
sys.stderr.write("@@" + json.dumps(seen + failed))
"""


def modules() -> list[str]:
    """Dotted names of all our modules, but for those that are meant to be run."""
    found = []
    for package, folder in (("musubi_kernels", "kernels"), ("musubi_tuner", "python")):
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] != "__main__":
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("python", "kernels"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::ResourceWarning"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def test_importing_every_module_is_quiet(tmp_path):
    names = [name for name in modules() if not name.endswith(".triton")]  # imported where there is a device for it
    done = python(WATCH, json.dumps(names), cwd=tmp_path)
    errors, mark, told = done.stderr.partition("@@")
    assert mark, done.stderr
    assert (done.stdout, errors) == ("", "")
    assert json.loads(told) == []
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_a_loud_module(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import logging, os, torch\nprint('hello')\nlogging.basicConfig()\nos.mkdir('made')\ntorch.manual_seed(3)\n"
        "os.environ['LOUD'] = '1'\nopen('written', 'w').close()\n"
    )
    done = python("import sys; sys.path.insert(0, '.')\n" + WATCH, json.dumps(["loud"]), cwd=tmp_path)
    told = json.loads(done.stderr.partition("@@")[2])
    assert {what for _, what, _ in told} == {"os.mkdir", "open", "handlers", "random state", "environment"}
    assert done.stdout == "hello\n"


def test_the_help_page_needs_no_heavy_library(tmp_path):
    heavy = ["torch", "numpy", "transformers", "diffusers", "accelerate", "safetensors", "musubi_kernels", "PIL", "av"]
    code = (
        "import sys, musubi_tuner.cli as cli\n"
        "code = cli.main(['--help']) + cli.main(['--version'])\n"
        f"sys.stderr.write(' '.join(sorted(set({heavy}) & set(sys.modules))))\n"
        "sys.exit(code)"
    )
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: musubi COMMAND" in done.stdout
