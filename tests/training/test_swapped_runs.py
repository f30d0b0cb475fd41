"""Whole runs with block swap, on a stand-in device: files and states to the byte as without it, and what is told."""

import logging
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.known import known_elsewhere
from musubi_tuner.config.options import Resolved, parse
from musubi_tuner.families import registry
from musubi_tuner.memory import plan
from musubi_tuner.sampling.request import Request
from musubi_tuner.training import prepare, preview, run
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.weights import load
from musubi_tuner.weights.write import atomic_save_safetensors
from swap_stand_in import StandIn, watching
from tiny_models import TINY
from training_place import make_place, tensors_in, words_of

FAMILIES = registry.names()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    return {name: make_place(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture
def device(monkeypatch) -> list[StandIn]:
    """The devices that swapped blocks visit in this test, the latest last: each run makes its own."""
    found: list[StandIn] = []

    def stand_in(_: torch.device, *, pinned: bool) -> StandIn:
        found.append(StandIn(pinned=pinned))
        return found[-1]

    monkeypatch.setattr(plan, "has_lanes", lambda _: True)
    monkeypatch.setattr(plan, "lanes_for", stand_in)
    return found


def options(name: str, place: Path, out: Path, *words: str) -> Resolved:
    groups = (*run.GROUPS, *registry.get(name).option_groups("train"))
    words = ("--max_train_steps", "3", *words)
    elsewhere = known_elsewhere("wan_train_network")
    return parse(groups, words_of(place, out, *words), prog="train", description="", elsewhere=elsewhere)


def train(name: str, place: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    found = options(name, place, out, *words)
    assert not found.warnings
    run.run(registry.get(name), found)
    return tensors_in(out / "study.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


AGAIN = ("--gradient_checkpointing", "--gradient_accumulation_steps", "2")
CASES = {
    "checkpointing and accumulation": AGAIN,
    "neither": (),
    "scaled FP8 in bf16": (*AGAIN, "--fp8_base", "--fp8_scaled", "--mixed_precision", "bf16"),
    "dropout on some layers": (
        *AGAIN,
        "--gradient_checkpointing_cpu_offload",
        "--network_dropout",
        "0.2",
        "--network_args",
        "include_patterns=.*blocks.*1.*",
    ),
    "every weight": (*AGAIN, "--full_finetune"),
}


@pytest.mark.shows("blocks_to_swap", "block_swap_ring_size", "block_swap_h2d_only")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_that_of_a_run_without_swap(name, case, places, tmp_path, device):
    """`block_swap_h2d_only` is taken in silence: weights are never copied back."""
    place, words = places[name], CASES[case]
    expected = train(name, place, tmp_path / "plain", *words)
    for blocks_to_swap, block_swap_ring_size in ((2, 1), (2, 2)):
        given = ["--blocks_to_swap", str(blocks_to_swap), "--block_swap_ring_size", str(block_swap_ring_size)]
        out = tmp_path / str(block_swap_ring_size)
        assert same(train(name, place, out, *words, *given, "--block_swap_h2d_only"), expected)
        assert len(device[-1].slots) == block_swap_ring_size
        assert len(device[-1].copies) >= (2 if block_swap_ring_size == 2 else 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_is_resumed_with_and_without_swap(name, places, tmp_path, device, caplog):
    words = [*AGAIN, "--max_train_steps", "4", "--save_every_n_steps", "2", "--save_state"]
    swapping = ("--blocks_to_swap", "2")
    expected = train(name, places[name], tmp_path / "whole", *words)
    assert same(train(name, places[name], tmp_path / "swapped", *words, *swapping), expected)
    states = [str(tmp_path / out / "study-step00000002-state") for out in ("whole", "swapped")]
    for state, more in zip(states, (swapping, ()), strict=True):
        out = tmp_path / f"on{len(more)}"
        assert same(train(name, places[name], out, *words, *more, "--resume", state), expected)
    assert len(device) == 2
    assert "blocks_to_swap" not in caplog.text, "it is no departure from the state"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_run_keeps_the_order(name, places, tmp_path, device, monkeypatch):
    """Every operation of two steps, from the moment that the blocks rest."""
    install = plan.MemoryPlan.install

    def watched(memory: plan.MemoryPlan, dit: torch.nn.Module) -> object:
        swap = install(memory, dit)
        stack.enter_context(watching(device[-1]))
        return swap

    monkeypatch.setattr(plan.MemoryPlan, "install", watched)
    with ExitStack() as stack:
        words = ["--max_train_steps", "2", "--blocks_to_swap", "2", "--img_in_txt_in_offloading"]
        train(name, places[name], tmp_path, *AGAIN, *words)
    assert len(device[-1].copies) > 8


def test_two_experts_swap_in_one_ring(places, tmp_path, device, caplog):
    """Each batch goes to the expert of its noise level; the LoRA that they share is that of a run without swap."""
    place = places["wan"]
    with safe_open(place / "dit.safetensors", "pt") as file:
        told = file.metadata()
    high = {key: value * 0.9 for key, value in tensors_in(place / "dit.safetensors").items()}
    atomic_save_safetensors(tmp_path / "high.safetensors", high, told)
    words = ["--dit_high_noise", str(tmp_path / "high.safetensors"), "--timestep_boundary", "500"]
    expected = train("wan", place, tmp_path / "plain", *AGAIN, *words)
    with caplog.at_level(logging.INFO):
        assert same(train("wan", place, tmp_path / "out", *AGAIN, *words, "--blocks_to_swap", "2"), expected)
    assert "block swap: 2 of 3 blocks of each transformer rest on the host" in caplog.text
    assert (len(device[-1].slots), len(device[-1].homes)) == (2, 4)
    with pytest.raises(UserError, match="leave offload_inactive_dit out"):
        train("wan", place, tmp_path / "moved", *words, "--blocks_to_swap", "2", "--offload_inactive_dit")


class Window:
    """A VAE that shows the first three channels of the latents."""

    def to(self, _: torch.device) -> "Window":
        return self

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].tanh()


def test_previews_in_between_change_nothing_and_show_the_same(places, tmp_path, device, monkeypatch):
    """Guided pictures, two branches a step, before the run and after each of its steps."""
    requests = tuple(Request(f"picture {n}", seed=n, width=48, height=32, steps=2, guidance=3.0) for n in range(2))
    prompts = {text: TINY["wan"].entry(3 + n) for n, text in enumerate(("", "picture 0", "picture 1"))}
    monkeypatch.setattr(preview, "encode", lambda *_, **__: preview.Encoded(requests, prompts, Window()))
    (tmp_path / "prompts.txt").write_text("read by nobody here\n")
    words = [*AGAIN, "--sample_prompts", str(tmp_path / "prompts.txt"), "--vae", "none", "--sample_at_first"]
    words += ["--sample_every_n_steps", "1"]
    swapping = ["--blocks_to_swap", "2", "--block_swap_ring_size", "1"]
    expected = train("wan", places["wan"], tmp_path / "plain", *AGAIN)
    shown = []
    for name, more in (("kept", []), ("swapped", swapping)):
        assert same(train("wan", places["wan"], tmp_path / name, *words, *more), expected)
        files = sorted((tmp_path / name / "sample").iterdir(), key=lambda path: path.stem.split("_")[1:3])
        shown.append([path.read_bytes() for path in files])
    assert len(shown[0]) == 8
    assert shown[0] == shown[1]
    assert len(device[-1].copies) > 8 * 2 * 2


@pytest.mark.shows("use_pinned_memory_for_block_swap", "img_in_txt_in_offloading")
def test_what_rests_where_is_told_in_one_line(places, tmp_path, device, caplog):
    words = ["--blocks_to_swap", "2", "--use_pinned_memory_for_block_swap", "--img_in_txt_in_offloading"]
    plain = train("hunyuan_video", places["hunyuan_video"], tmp_path / "plain")
    with caplog.at_level(logging.INFO):
        assert same(train("hunyuan_video", places["hunyuan_video"], tmp_path / "out", *words), plain)
    (told,) = [record.getMessage() for record in caplog.records if "block swap" in record.getMessage()]
    assert re.fullmatch(
        r"block swap: 1 of 2 double_blocks, 1 of 2 single_blocks, img_in, txt_in rest on the host in 0\.00 GiB of "
        r"pinned memory; on cpu: 2 slots of 0\.00 GiB, and 0\.00 GiB stay",
        told,
    )
    assert device[-1].pinned
    train("hunyuan_video", places["hunyuan_video"], tmp_path / "less", *words[:2])
    assert not device[-1].pinned
    assert len(device[-2].homes) == len(device[-1].homes) + 2


def test_blocks_that_rest_are_never_all_on_the_device(places, tmp_path, device, monkeypatch):
    """What the loader makes on the device is only what stays there, and a few rows at a time."""
    seen = {}
    place_of = load._Places.of

    def noting(places: load._Places, name: str) -> torch.device:
        seen[name] = places.host != () and name.startswith(places.host)
        return place_of(places, name)

    monkeypatch.setattr(load._Places, "of", noting)
    train("wan", places["wan"], tmp_path, "--blocks_to_swap", "2")
    assert {name for name, host in seen.items() if host} == {
        n for n in seen if n.startswith(("blocks.1.", "blocks.2."))
    }
    assert sum(seen.values()) == 54


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--blocks_to_swap", "3"], "blocks_to_swap = 3: this model has 3 blocks, and one of each must stay; use 0..2"),
        (["--blocks_to_swap", "-1"], "blocks_to_swap -1: must be at least 0"),
        (
            ["--blocks_to_swap", "1", "--compile", "--compile_mode", "max-autotune"],
            r"CUDA graphs \(max-autotune\) fix their addresses: compile with INDUCTOR in mode default",
        ),
        (["--blocks_to_swap", "1", "--dynamo_backend", "CUDAGRAPHS"], r"CUDA graphs \(cudagraphs\) fix"),
        (["--block_swap_ring_size", "0"], "block_swap_ring_size 0: must be at least 1"),
    ],
)
def test_what_cannot_rest_is_an_error_before_anything_is_read(words, sentence, places, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "materialize", None)
    with pytest.raises(UserError, match=sentence):
        train("wan", places["wan"], tmp_path, *words)


def test_models_of_two_lists_tell_their_own_limit(places, tmp_path):
    with pytest.raises(UserError, match=r"has 2 double_blocks and 2 single_blocks, .* use 0\.\.2"):
        train("hunyuan_video", places["hunyuan_video"], tmp_path, "--blocks_to_swap", "20")


def test_trained_weights_of_two_processes_do_not_rest(places, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "launched", lambda *_: LocalRuntime("cpu", world=2))
    with pytest.raises(UserError, match="with --full_finetune in 2 processes"):
        train("wan", places["wan"], tmp_path, "--blocks_to_swap", "1", "--full_finetune")


def test_a_launch_that_splits_weights_refuses_to_swap(places, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "launched", lambda *_: LocalRuntime("cpu", world=2, sharding={}))
    with pytest.raises(UserError, match="FSDP, which keeps a share of every block on each device"):
        train("wan", places["wan"], tmp_path, "--blocks_to_swap", "1", "--full_finetune")


def test_on_the_cpu_nothing_is_swapped_and_that_is_told(places, tmp_path, caplog):
    train("wan", places["wan"], tmp_path, "--blocks_to_swap", "2", "--use_pinned_memory_for_block_swap")
    assert "blocks_to_swap, use_pinned_memory_for_block_swap: no effect on cpu, where all weights are in" in caplog.text
    caplog.clear()
    train("wan", places["wan"], tmp_path, "--block_swap_ring_size", "3", "--use_pinned_memory_for_block_swap")
    assert "block_swap_ring_size has no effect without blocks_to_swap" in caplog.text
    assert "use_pinned_memory_for_block_swap has no effect without blocks_to_swap" in caplog.text


def test_the_count_means_what_it_means_in_established_files():
    """One list: the last blocks. Two: half of them large ones, two small ones for each of the rest, and one more."""
    assert plan.most_swapped((40,)) == 39
    assert plan.most_swapped((20, 40)) == 38
    assert plan.shared_out(20, (40,)) == (20,)
    found = {count: plan.shared_out(count, (20, 40)) for count in (0, 1, 20, 36, 38, 39)}
    assert found == {0: (0, 0), 1: (0, 3), 20: (10, 21), 36: (18, 37), 38: (19, 39), 39: None}
    for lengths in ((2, 2), (3, 5), (1, 9), (2, 40), (1, 1), (1,)):
        shares = [plan.shared_out(count, lengths) for count in range(plan.most_swapped(lengths) + 1)]
        assert all(rest < length for share in shares for rest, length in zip(share, lengths, strict=True))
        assert shares == sorted(shares)
        assert shares[-1] == tuple(length - 1 for length in lengths)
