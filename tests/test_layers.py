"""The architecture as a test: imports point down, families stay apart, libraries stay in their places, budgets hold.

`faults(files)` judges a mapping of repository paths to sources; the tree must have none, and every rule is shown a
small violation that it must find.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]

RANK = {
    "config": 0,
    "flow": 1,
    "nn": 1,
    "weights": 2,
    "adapters": 2,
    "memory": 2,
    "optim": 2,
    "families": 3,
    "data": 4,
    "sampling": 4,
    "training": 5,
    "networks": 6,
    "modules": 6,
    "console": 6,
    "tools": 6,
    "cli": 7,
    "__main__": 8,
}
"""An import may point to a package of the same or a lower rank; packages of one rank must not form a cycle."""

NOT_LIBRARY = ("networks", "modules", "tools", "cli", "__main__")
FAMILY_WORD = re.compile(r"(?<![a-z])(wan|hunyuan(video)?|framepack|fpack|flux|kontext|qwen)(?![a-z])", re.IGNORECASE)
ESTABLISHED = re.compile(
    r"(flux|qwen)_shift|qinglong_(flux|qwen)"
    r"|flux_kontext_no_resize_control|qwen_image_edit_(no_resize_control|control_resolution)"
)
"""Words of users' files: names of timestep distributions (formulas, not families) and keys of data set files."""

CONFINED = {
    "accelerate": r"training/runtime\.py",
    "argparse": r"config/.*|cli\.py|tools/demo/pretrain.*",
    "flash_attn": r"nn/attention\.py",
    "flash_attn_interface": r"nn/attention\.py",
    "xformers": r"nn/attention\.py",
    "sageattention": r"nn/attention\.py",
}
HEAVY = r"families/[^/]+/(text|vae)\.py|nn/(text|vae)/.*|optim/build\.py|tools/demo/.*"
"""Where `transformers` and `diffusers` may be imported, and there inside functions only."""

DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
SEEDS = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all", "np.random.seed", "random.seed"}

FILE_LINES, FUNCTION_LINES, SCRIPT_LINES, FAMILY_LINES, LOOP_LINES = 600, 100, 10, 900, 450


def module_of(path: str) -> tuple[str, ...]:
    """`python/musubi_tuner/nn/linear.py` -> (musubi_tuner, nn, linear)."""
    parts = PurePosixPath(path).with_suffix("").parts[1:]
    return parts[:-1] if parts[-1] == "__init__" else parts


def inside(path: str) -> str:
    """Path below the import package."""
    return path.split("/", 2)[2]


def imports(tree: ast.AST, modules: set[tuple[str, ...]]) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Every imported module, at any depth, by `import`, `from` and `import_module` with a plain text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = tuple(node.module.split("."))
            for alias in node.names:
                yield node, (*base, alias.name) if (*base, alias.name) in modules else base
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from ((node, tuple(name.split("."))) for name in names if isinstance(name, str))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else the last name or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def rank(module: tuple[str, ...]) -> int:
    """Height of a module of ours; a module at the top that the table has not is a script."""
    return RANK.get(module[1], 8) if len(module) > 1 else -1


def layer_faults(path: str, tree: ast.AST, modules: set[tuple[str, ...]]) -> Iterator[str]:
    """Imports that point up, to a sibling family, or out of the library's ground floor."""
    here = module_of(path)
    for node, found in imports(tree, modules):
        where, name = f"{path}:{node.lineno}", ".".join(found)
        if here[0] == "musubi_kernels":
            if found[0] == "musubi_tuner":
                yield f"{where}: the kernels must not know {name}"
            continue
        if here[1:2] == ("config",) and found[:2] != ("musubi_tuner", "config"):
            if found[0] not in sys.stdlib_module_names and found[0] != "tomli":
                yield f"{where}: config imports the standard library only, not {name}"
            continue
        if len(here) == 1 and found[0] not in sys.stdlib_module_names:
            yield f"{where}: the package root imports nothing, not {name}"
        if found[0] != "musubi_tuner" or len(here) == 1:
            continue
        if rank(found) > rank(here) or (rank(found) == 8 and found != here):
            yield f"{where}: import of {name} points up"
        elif found[1:2] == ("families",):
            yield from (f"{where}: {why}" for why in family_faults(here, found))


def family_faults(here: tuple[str, ...], found: tuple[str, ...]) -> Iterator[str]:
    """Who may see which part of `families`."""
    part = found[2] if len(found) > 2 else "__init__"
    if here[1] == "families":
        own = here[2] if len(here) > 2 else "__init__"
        if part not in ("base", own):
            yield f"a family sees families.base and itself, not {'.'.join(found)}"
    elif here[1] in ("data", "sampling") and part != "base":
        yield f"{here[1]} sees families.base only, not {'.'.join(found)}"
    elif here[1] == "training" and part not in ("base", "registry"):
        yield f"training sees families.base and registry, not {'.'.join(found)}"


def library_faults(path: str, tree: ast.AST) -> Iterator[str]:
    """Third-party libraries outside their place."""
    outer = {id(n) for n in at_module_level(tree)}
    for node, found in imports(tree, set()):
        place = CONFINED.get(found[0])
        if place and not re.fullmatch(place, inside(path)):
            yield f"{path}:{node.lineno}: {found[0]} belongs in {place}"
        if found[0] in ("transformers", "diffusers"):
            if not re.fullmatch(HEAVY, inside(path)):
                yield f"{path}:{node.lineno}: {found[0]} belongs in {HEAVY}"
            elif id(node) in outer:
                yield f"{path}:{node.lineno}: {found[0]} is imported inside functions only"


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: everything but function bodies."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_module_level(node)


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are statements of their own: docstrings of modules, classes, functions, fields."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def name_faults(path: str, tree: ast.AST) -> Iterator[str]:
    """A family's name in shared code, in identifiers and texts (docstrings may give examples)."""
    module = module_of(path)
    if module[0] != "musubi_tuner" or len(module) < 2 or module[1] in NOT_LIBRARY or rank(module) == 8:
        return
    if module[1] == "families" and len(module) > 2 and module[2] not in ("base", "registry"):
        return
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        words = [getattr(node, attribute, None) for attribute in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in skipped:
            words.append(node.value)
        for word in words:
            if isinstance(word, str) and FAMILY_WORD.search(ESTABLISHED.sub("", word)):
                yield f"{path}:{node.lineno}: shared code names a family: {word!r}"


def never_faults(path: str, tree: ast.AST) -> Iterator[str]:
    """The Never list of the style page, as far as a syntax tree shows it."""
    forked = any(isinstance(n, ast.Attribute) and n.attr == "fork_rng" for n in ast.walk(tree))
    for node in ast.walk(tree):
        for why in never(node):
            if not (forked and "torch.manual_seed" in why):  # dropout has no other source; the stream is put back
                yield f"{path}:{getattr(node, 'lineno', 0)}: {why}"
    if PurePosixPath(path).name in ("utils.py", "helpers.py", "common.py", "misc.py"):
        yield f"{path}: a file is named after its subject"


def never(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and target.attr == "forward":
                yield "nothing replaces .forward: put a module in the parent's slot"
            if isinstance(target, ast.Subscript) and dotted(getattr(target.value, "func", target)) == "globals":
                yield "no writing to globals()"
    elif isinstance(node, ast.ExceptHandler):
        wide = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        if wide and all(isinstance(n, ast.Pass | ast.Continue) for n in node.body):
            yield "a swallowed exception hides a fault: catch what you expect"
    elif isinstance(node, ast.Name | ast.Attribute) and dotted(node).split(".")[-1] in ("MethodType", "Namespace"):
        yield f"no {dotted(node)}"
    elif isinstance(node, ast.Call):
        yield from never_called(node)


def never_called(node: ast.Call) -> Iterator[str]:
    name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
    if name.endswith("load_state_dict") and getattr(keywords.get("strict"), "value", True) is False:
        yield "strict=False hides missing keys"
    if name in ("getattr", "setattr") and len(node.args) == 3:
        if name == "setattr" and isinstance(node.args[1], ast.Constant) and node.args[1].value == "forward":
            yield "nothing replaces .forward: put a module in the parent's slot"
        if name == "getattr" and dotted(node.args[0]).split(".")[-1] in ("args", "cfg", "config", "options", "opts"):
            yield "a group has its fields: no getattr with a default on a configuration"
    if name in SEEDS or (name.startswith("torch.") and name[6:] in DRAWS and "generator" not in keywords):
        yield f"{name} without a generator draws from the global stream"
    if name in ("logging.basicConfig", "logging.captureWarnings") or name.endswith("addHandler"):
        yield "only console.py configures logging"


def is_exempt(path: str, fault: str) -> bool:
    """Places that a rule does not mean."""
    if "configures logging" in fault:
        return path.endswith("musubi_tuner/console.py")
    if "global stream" in fault:  # a tool is a program of its own, not library code
        return "/tools/" in path
    return False


def budget_faults(files: Mapping[str, str]) -> Iterator[str]:
    """Lines of files, functions, scripts, families and the training loop."""
    lines = {path: len(source.splitlines()) for path, source in files.items()}
    for path, count in lines.items():
        module = module_of(path)
        script = len(module) == 2 and module[0] == "musubi_tuner" and module[1] not in RANK
        if count > (SCRIPT_LINES if script else FILE_LINES):
            yield f"{path}: {count} lines, at most {SCRIPT_LINES if script else FILE_LINES}"
        for node in ast.walk(ast.parse(files[path])):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}"
    groups = {"run + loop + step": (r".*/training/(run|loop|step)\.py", LOOP_LINES)}
    for name in {module_of(p)[2] for p in files if len(module_of(p)) > 3 and module_of(p)[1] == "families"}:
        groups[f"family {name} without its VAE"] = (rf".*/families/{name}/(?!vae).*", FAMILY_LINES)
    for title, (pattern, limit) in groups.items():
        total = sum(count for path, count in lines.items() if re.fullmatch(pattern, path))
        if total > limit:
            yield f"{title}: {total} lines, at most {limit}"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True for a Triton kernel body."""
    return any("jit" in ast.dump(decorator) for decorator in node.decorator_list)


def cycle_faults(files: Mapping[str, str], trees: Mapping[str, ast.AST]) -> Iterator[str]:
    """Packages of one rank that import each other."""
    modules = {module_of(p) for p in files}
    edges = {
        (here[1], found[1])
        for path in files
        for here in [module_of(path)]
        if here[0] == "musubi_tuner" and len(here) > 1
        for _, found in imports(trees[path], modules)
        if found[0] == "musubi_tuner" and len(found) > 1 and found[1] != here[1]
    }
    reach = set(edges)
    while new := {(a, d) for a, b in reach for c, d in edges if b == c} - reach:
        reach |= new
    yield from (f"packages {a} and {b} import each other" for a, b in sorted(reach) if a < b and (b, a) in reach)


def faults(files: Mapping[str, str]) -> list[str]:
    """All violations in a set of sources, by repository path."""
    trees = {path: ast.parse(source) for path, source in files.items()}
    modules = {module_of(path) for path in files}
    found = [*budget_faults(files), *cycle_faults(files, trees)]
    for path, tree in trees.items():
        for check in (library_faults, name_faults, never_faults):
            found += [f for f in check(path, tree) if not is_exempt(path, f)]
        found += layer_faults(path, tree, modules)
    return found


def sources() -> dict[str, str]:
    """Every Python file of the two import packages."""
    found = [*ROOT.glob("python/musubi_tuner/**/*.py"), *ROOT.glob("kernels/musubi_kernels/**/*.py")]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in found}


def test_the_tree_keeps_the_architecture():
    assert "\n".join(faults(sources())) == ""


T = "python/musubi_tuner"
SEEDED = [
    ("kernels/musubi_kernels/ops/x.py", "def f():\n    import musubi_tuner.nn", "kernels must not know"),
    (f"{T}/config/x.py", "import torch", "config imports the standard library only"),
    (f"{T}/config/x.py", "from musubi_tuner import nn", "config imports the standard library only"),
    (f"{T}/__init__.py", "import torch", "the package root imports nothing"),
    (f"{T}/flow/x.py", "from musubi_tuner.weights import reader", "points up"),
    (f"{T}/nn/x.py", "def f():\n    if True:\n        from musubi_tuner.families.base import Family", "points up"),
    (f"{T}/data/x.py", "from musubi_tuner.training.run import run", "points up"),
    (f"{T}/data/x.py", "import_module('musubi_tuner.cli')", "points up"),
    (f"{T}/training/x.py", "import musubi_tuner.some_script", "points up"),
    (f"{T}/tools/x.py", "import musubi_tuner.some_script", "points up"),
    (f"{T}/data/x.py", "from musubi_tuner.families import registry", "families.base only"),
    (f"{T}/sampling/x.py", "import musubi_tuner.families.alpha.spec", "families.base only"),
    (f"{T}/training/x.py", "from musubi_tuner.families.alpha import family", "base and registry"),
    (
        f"{T}/families/alpha/model.py",
        "from musubi_tuner.families.beta.model import Block",
        "sees families.base and itself",
    ),
    (f"{T}/families/alpha/model.py", "from musubi_tuner.data.cache import read", "points up"),
    (f"{T}/training/loop.py", "import accelerate", "accelerate belongs in"),
    (f"{T}/data/x.py", "import argparse", "argparse belongs in"),
    (f"{T}/families/alpha/model.py", "from xformers.ops import x", "xformers belongs in"),
    (f"{T}/families/alpha/model.py", "def f():\n    import diffusers", "diffusers belongs in"),
    (f"{T}/families/alpha/text.py", "from transformers import AutoModel", "inside functions only"),
    (f"{T}/families/alpha/text.py", "class A:\n    from transformers import AutoModel", "inside functions only"),
    (f"{T}/training/x.py", "if name == 'wan2.1': pass", "names a family"),
    (f"{T}/data/x.py", "def cache_qwen(x): ...", "names a family"),
    (f"{T}/data/x.py", "is_flux = 1", "names a family"),
    (f"{T}/families/base.py", "x.hunyuan_guidance", "names a family"),
    (f"{T}/nn/x.py", "layer.forward = other", "nothing replaces .forward"),
    (f"{T}/nn/x.py", "setattr(layer, 'forward', other)", "nothing replaces .forward"),
    (f"{T}/nn/x.py", "from types import MethodType\nm = MethodType(f, o)", "no MethodType"),
    (f"{T}/nn/x.py", "globals()['x'] = 1", "globals()"),
    (f"{T}/nn/x.py", "try: f()\nexcept Exception: pass", "swallowed exception"),
    (f"{T}/nn/x.py", "for _ in x:\n    try: f()\n    except: continue", "swallowed exception"),
    (f"{T}/nn/x.py", "m.load_state_dict(sd, strict=False)", "strict=False"),
    (f"{T}/nn/x.py", "getattr(self.config, 'rank', 4)", "no getattr with a default"),
    (f"{T}/data/x.py", "def f(args: argparse.Namespace): ...", "no argparse.Namespace"),
    (f"{T}/flow/x.py", "torch.randn(3)", "global stream"),
    (f"{T}/flow/x.py", "torch.manual_seed(3)", "global stream"),
    (f"{T}/flow/x.py", "logging.basicConfig()", "configures logging"),
    (f"{T}/flow/utils.py", "", "named after its subject"),
    (f"{T}/flow/x.py", "x = 1\n" * 601, "601 lines, at most 600"),
    (f"{T}/flow/x.py", "def f():\n" + "    x = 1\n" * 100, "f has 101 lines"),
    (f"{T}/alpha_train.py", "x = 1\n" * 11, "11 lines, at most 10"),
    (f"{T}/training/loop.py", "x = 1\n" * 451, "run + loop + step: 451 lines"),
    (f"{T}/families/alpha/deep/model.py", "x = 1\n" * 600, "family alpha without its VAE: 1100 lines"),
]


@pytest.mark.parametrize(("path", "source", "words"), SEEDED, ids=lambda v: v[:60] if isinstance(v, str) else None)
def test_a_seeded_violation_is_found(path, source, words):
    around = {
        f"{T}/families/registry.py": "",
        f"{T}/families/alpha/keys.py": "x = 1\n" * 500,
        f"{T}/families/alpha/vae.py": "x = 1\n" * 590,
        f"{T}/weights/reader.py": "",
        f"{T}/nn/__init__.py": "",
    }
    assert faults(around) == []
    found = faults(around | {path: source})
    assert any(words in fault for fault in found), found


def test_two_packages_of_one_rank_may_not_import_each_other():
    files = {
        f"{T}/weights/load.py": "from musubi_tuner.adapters.files import load",
        f"{T}/adapters/files.py": "import musubi_tuner.memory.plan",
        f"{T}/memory/plan.py": "from musubi_tuner.weights import load",
    }
    assert "packages adapters and weights import each other" in faults(files)
    assert faults({k: v for k, v in files.items() if "memory" not in k}) == []


def test_allowed_forms_are_not_found():
    allowed = {
        f"{T}/training/runtime.py": "import accelerate",
        f"{T}/training/run.py": "from musubi_tuner.families import registry\nfrom musubi_tuner.data import batches",
        f"{T}/families/registry.py": "from musubi_tuner.families.base import Family",
        f"{T}/families/alpha/vae.py": "def load():\n    import diffusers\n    return diffusers",
        f"{T}/families/alpha/model.py": "from musubi_tuner.families.alpha.keys import rename\nWAN = 'wan'",
        f"{T}/families/alpha/keys.py": "",
        f"{T}/flow/timesteps.py": "names = ('flux_shift', 'qinglong_qwen')\ntorch.randn(3, generator=g)\nwant = 'swan'",
        f"{T}/networks/lora_alpha.py": "from musubi_tuner.adapters import attach\nname = 'qwen'",
        f"{T}/training/step.py": "with torch.random.fork_rng([]):\n    torch.manual_seed(3)",
        f"{T}/data/x.py": '"""Like Wan\'s."""\ntry:\n    f()\nexcept OSError:\n    pass',
    }
    assert faults(allowed) == []
