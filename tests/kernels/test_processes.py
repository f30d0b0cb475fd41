"""The pool in other processes and threads: forks, dataloader workers, threads that call at once; and scratch memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from musubi_kernels import _native, fp8_linear, quantize_fp8

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


def test_scratch_stays_below_its_bound(native: None) -> None:
    """A weight of 13824 x 5120 would be 271 MB dequantised; x of 3,000 rows is packed in parts."""
    codes = torch.zeros(384, 5120, dtype=torch.uint8)
    q, scale = codes.view(torch.float8_e4m3fn), torch.ones(384, 80, 1)
    x = torch.ones(3000, 5120, dtype=torch.bfloat16)

    def work() -> None:
        fp8_linear(x, q, scale)
        sizes.append(_native.module().scratch_bytes())

    sizes: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert 0 < sizes[0] <= 16 << 20
