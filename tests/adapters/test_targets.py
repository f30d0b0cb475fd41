import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from musubi_tuner.adapters.attach import attach
from musubi_tuner.adapters.targets import NetworkArgs, find_targets, parse_network_args
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry

TARGETS = registry.get("wan").spec.adapter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qk"})
        self.mod = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class SmallTargets:
    block_classes = ("Block",)
    exclude = (r".*mod.*",)


EVERY = ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.mod", "blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.mod")
DEFAULT = tuple(path for path in EVERY if "mod" not in path)


@pytest.mark.parametrize("name", ["wan2_1_t2v_1_3b", "wan2_1_t2v_14b"])
def test_names_keys_and_order_of_wan_are_exact(
    name: str, reference: Path, manifest_model: Callable[[str], nn.Module]
) -> None:
    expected = json.loads((reference / "lora" / f"{name}.json").read_text())
    adapters = attach(manifest_model(name), TARGETS, rank=4, alpha=1.0)
    assert [list(pair) for pair in zip(adapters.names, adapters.paths, strict=True)] == expected["modules"]
    assert len(adapters.names) == expected["num_modules"]
    assert sum(p.numel() for p in adapters.parameters()) == expected["trainable_parameters_at_dim4"]
    shapes = {f"{slot.name}.alpha": [] for slot in adapters.modules}
    shapes |= {key: list(parameter.shape) for key, parameter in adapters.named_parameters()}
    assert shapes == expected["tensors"]


def test_the_established_wan_patterns_select_what_they_did(
    reference: Path, manifest_model: Callable[[str], nn.Module]
) -> None:
    """Rows of the reference data; `include_mode=add` is the established meaning of include_patterns."""
    rows = json.loads((reference / "behaviour" / "lora.json").read_text())["patterns"]
    model = manifest_model("wan2_1_t2v_1_3b")
    checked = 0
    for row in rows:
        if row["arch"] != "wan_t2v-1.3B":
            continue
        args = parse_network_args([*row["network_args"], "include_mode=add"])
        assert len(find_targets(model, TARGETS, args)) == row["selected_count"], row["network_args"]
        checked += 1
    assert checked == 3


def test_defaults_are_the_linears_of_the_blocks_but_the_excluded() -> None:
    assert find_targets(Small(), SmallTargets()) == DEFAULT


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (NetworkArgs(exclude_patterns=(r".*\.k",)), ("blocks.0.attn.q", "blocks.1.attn.q")),
        (NetworkArgs(default_excludes=False), EVERY),
        (NetworkArgs(default_excludes=False, exclude_patterns=(r"blocks\.0\..*",)), EVERY[3:]),
        (NetworkArgs(include_patterns=(r".*1\.mod",)), ("blocks.1.mod",)),
        (NetworkArgs(include_patterns=(r".*1\.mod",), include_mode="add"), (*DEFAULT, "blocks.1.mod")),
        (NetworkArgs(exclude_patterns=(".*",), include_patterns=(r".*\.q",)), ("blocks.0.attn.q", "blocks.1.attn.q")),
        (NetworkArgs(exclude_patterns=("attn",)), DEFAULT),  # a part of a path is no full match
    ],
)
def test_patterns_thin_the_targets(args: NetworkArgs, expected: tuple[str, ...]) -> None:
    assert find_targets(Small(), SmallTargets(), args) == expected


def test_include_alone_says_how_many_and_how_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    find_targets(Small(), SmallTargets(), NetworkArgs(include_patterns=(r".*\.q",)))
    assert "exactly the 2 matching modules of 6 are targeted (include_mode=add" in caplog.text


def test_no_target_is_an_error_that_lists() -> None:
    with pytest.raises(UserError, match=r"leave none of 6 linear layers \(blocks\.0\.attn\.q"):
        find_targets(Small(), SmallTargets(), NetworkArgs(exclude_patterns=(".*",)))
    with pytest.raises(UserError, match="Small has no linear layer inside WanAttentionBlock"):
        find_targets(Small(), TARGETS)


def test_network_args_are_read() -> None:
    args = parse_network_args(
        [
            r"exclude_patterns=[r'.*single_blocks\.\d=.*', '.*x.*']",
            "include_patterns=.*img.*",
            "include-mode=add",
            "loraplus_lr_ratio=4",
            "rank_dropout=0.5",
            "module_dropout=None",
            "default_excludes=false",
            "verbose=True",
        ]
    )
    assert args == NetworkArgs(
        exclude_patterns=(r".*single_blocks\.\d=.*", ".*x.*"),
        include_patterns=(".*img.*",),
        include_mode="add",
        loraplus_lr_ratio=4.0,
        rank_dropout=0.5,
        module_dropout=0.0,
        default_excludes=False,
        verbose=True,
    )


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("verbose", "'verbose' has no '='"),
        ("rank_dropuot=0.1", "'rank_dropuot' is not known, did you mean 'rank_dropout'?"),
        ("rank_dropout=1.5", "rank_dropout=1.5: use a probability"),
        ("rank_dropout=abc", "could not convert"),
        ("exclude_patterns=[r'[']", "is not a regular expression"),
        ("exclude_patterns=['a'", "not a list of strings"),
        ("exclude_patterns=[3]", "3 is not a string"),
        ("include_mode=all", "use only or add"),
        ("verbose=perhaps", "use True or False"),
        ("loraplus_lr_ratio=0", "use a ratio above 0"),
        ("conv_dim=4", "'conv_dim' cannot be used"),
    ],
)
def test_a_wrong_network_argument_is_told(arg: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_network_args(["rank_dropout=0.1", arg])
    assert told in str(caught.value)


def test_all_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"'a' is not known.*'verbos' is not known, did you mean 'verbose'"):
        parse_network_args(["a=1", "verbos=1"])


def test_a_nested_block_is_taken_once() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

    Outer.__name__ = "Block"
    with torch.device("meta"):
        paths = find_targets(nn.Sequential(Outer()), SmallTargets())
    assert paths == ("0.inner.attn.q", "0.inner.attn.k")
