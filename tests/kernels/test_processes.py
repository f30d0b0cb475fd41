"""The pool in other processes and threads: forks, dataloader workers, threads that call at once; and scratch memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from musubi_kernels import _native, dequantize_fp8, fp8_linear, fp8_lora_linear, quantize_fp8

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork.*:DeprecationWarning"  # CPython 3.12's os.fork; forking with threads is the subject
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer(seed: int) -> Layer:
    """(x, q, scale), made before any fork: torch's own OpenMP threads do not survive one, a child calls only ours."""
    generator = torch.Generator().manual_seed(seed)
    q, scale = quantize_fp8(torch.randn(300, 64, generator=generator).bfloat16())
    return torch.randn(3, 64, generator=generator).bfloat16(), q, scale


class Products(torch.utils.data.Dataset[torch.Tensor]):
    """Item i is a product made in the process that asks for it, on two threads."""

    def __init__(self) -> None:
        self.layers = [layer(i) for i in range(4)]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(2)
        return fp8_linear(*self.layers[index])


def test_a_forked_child_computes_and_the_parent_goes_on(native: None, two_threads: None) -> None:
    given = layer(1)
    want = fp8_linear(*given)
    assert _native.module().pool_workers() >= 1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            started_empty = _native.module().pool_workers() == 0
            status = 0 if started_empty and torch.equal(fp8_linear(*given), want) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(fp8_linear(*given), want)


def test_dataloader_workers_compute(native: None, two_threads: None) -> None:
    products = Products()
    want = [fp8_linear(*each) for each in products.layers]
    loader = torch.utils.data.DataLoader(
        products, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for ours, expected in zip(loader, want, strict=True):
        assert torch.equal(ours, expected)


def test_threads_that_call_at_once_get_their_own_results(native: None, two_threads: None) -> None:
    layers = [layer(i) for i in range(4)]
    want = [fp8_linear(*each) for each in layers]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(30) if not torch.equal(fp8_linear(*layers[i]), want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_scratch_stays_below_its_bound(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 13824 x 5120 would be 271 MB dequantised in float32; x of 3,000 rows is packed in parts.

    Each body on a thread of its own, which starts with none: forward, input gradient, LoRA of rank 128, quantise.
    """
    tall, wide = (torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn) for n, k in ((6400, 64), (200, 5120)))
    low = torch.ones(128, 5120).requires_grad_(), torch.zeros(200, 128).requires_grad_()

    def ones(rows: int, columns: int) -> torch.Tensor:
        return torch.ones(rows, columns, dtype=torch.bfloat16).requires_grad_()

    def quantize(_: int) -> None:
        for mode in ("block", "channel", "tensor"):
            dequantize_fp8(*quantize_fp8(torch.ones(8, 13824), mode=mode, search="mse"))

    def branch(rows: int) -> None:
        y = fp8_lora_linear(ones(rows, 5120), wide, torch.ones(200, 80, 1), None, *low, scale=1.0)
        y.sum().backward()

    works = {
        "forward": lambda rows: fp8_linear(ones(rows, 5120), wide, torch.ones(200, 80, 1)),
        "backward": lambda rows: fp8_linear(ones(rows, 64), tall, torch.ones(6400, 1, 1)).sum().backward(),
        "branch": branch,
        "many short rows": lambda rows: fp8_linear(ones(20 * rows, 64), tall[:200], torch.ones(200, 1, 1)),
        "quantise": quantize,
    }
    for isa in _native.module().isas():
        monkeypatch.setenv(_native.ISA_VARIABLE, isa)
        for name, work in works.items():
            held = scratch_of(partial(work, 100 if isa == "scalar" else 3000))
            assert held <= 16 << 20, (isa, name, held)
            assert held > 0 or name == "quantise"


def scratch_of(work: Callable[[], object]) -> int:
    """Bytes of scratch that a new thread holds after `work`."""
    sizes: list[int] = []
    thread = threading.Thread(target=lambda: (work(), sizes.append(_native.module().scratch_bytes())))
    thread.start()
    thread.join()
    return sizes[0]
