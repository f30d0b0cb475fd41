"""Small models with the names and shapes of a checkpoint, built from its manifest alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

REFERENCE = Path(__file__).parent.parent / "data" / "reference"

Tree = Callable[[Mapping[str, tuple[int, ...]]], nn.Module]


class Node(nn.Module):
    """A module of nothing but children and parameters."""


@pytest.fixture
def reference() -> Path:
    return REFERENCE


@pytest.fixture
def tree() -> Tree:
    """A function (key -> shape) -> model on meta: `nn.Linear` where a `.weight` is 2-D, bare parameters elsewhere."""
    return build_tree


def build_tree(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    root = Node()
    with torch.device("meta"):
        for key, shape in shapes.items():
            path, _, leaf = key.rpartition(".")
            if leaf == "weight" and len(shape) == 2:
                linear = nn.Linear(shape[1], shape[0], bias=f"{path}.bias" in shapes)
                parent, _, name = path.rpartition(".")
                _node(root, parent).add_module(name, linear)
        for key, shape in shapes.items():
            path, _, leaf = key.rpartition(".")
            owner = _node(root, path)
            if not isinstance(owner, nn.Linear):
                owner.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
    return root


def _node(root: nn.Module, path: str) -> nn.Module:
    node = root
    for name in filter(None, path.split(".")):
        if name not in node._modules:
            node.add_module(name, Node())
        node = node._modules[name]
    return node
