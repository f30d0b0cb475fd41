"""The calls that the CUDA lanes make, in order, on a stand-in for CUDA's streams: that no device is here proves nothing
about speed, but a wait that is missing or on the wrong stream shows."""

import gc
import logging
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch

from musubi_tuner.memory.lanes import CudaLanes, has_lanes

CPU = torch.device("cpu")


class Stream:
    """Notes what is asked of it, under its name."""

    log: ClassVar[list[tuple[str, ...]]] = []
    now: "Stream"

    def __init__(self, device=None, name="copying"):
        self.device, self.name = device, name

    def wait_event(self, event):
        self.log.append((self.name, "wait", event))

    def record_event(self):
        self.log.append((self.name, "record"))
        return f"event {len(self.log)} of {self.name}"


@pytest.fixture
def cuda(monkeypatch):
    computing = Stream(name="computing")
    monkeypatch.setattr(Stream, "log", [])
    Stream.now = computing

    @contextmanager
    def on(stream):
        before, Stream.now = Stream.now, stream
        yield
        Stream.now = before

    copy_ = torch.Tensor.copy_

    def noting(slot, source, non_blocking=False):
        Stream.log.append((Stream.now.name, "copy", "at once" if not non_blocking else "queued"))
        return copy_(slot, source)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream.now)
    monkeypatch.setattr(torch.Tensor, "copy_", noting)
    return Stream.log


def test_a_copy_waits_in_its_own_stream_and_computing_waits_for_its_end(cuda):
    lanes = CudaLanes(CPU, pinned=False)
    source, slot = lanes.rest(1 << 15), lanes.slot(1 << 15)
    source.fill_(7)
    free = lanes.mark()
    assert cuda == [("computing", "record")]
    ready = lanes.copy(slot, source, free)
    assert cuda[1:] == [("copying", "wait", free), ("copying", "copy", "queued"), ("copying", "record")]
    lanes.wait(ready)
    assert cuda[4:] == [("computing", "wait", ready)]
    assert ready.endswith("of copying")
    assert torch.equal(slot, source)


class Runtime:
    """CUDA's calls for locked pages."""

    def __init__(self, refusals=0):
        self.refusals, self.locked = refusals, {}

    def cudaHostRegister(self, address, count, flags):
        if len(self.locked) >= 1 and self.refusals:
            return 2
        self.locked[address] = (count, flags)
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


def test_pages_are_locked_in_their_own_size_and_freed(cuda, monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    lanes = CudaLanes(CPU, pinned=True)
    memory = lanes.rest((1 << 20) + 256)
    assert runtime.locked == {memory.data_ptr(): ((1 << 20) + 256, 0)}
    view = memory[256:].view(torch.float32)
    del memory
    gc.collect()
    assert len(runtime.locked) == 1, "a view holds the pages"
    del view
    gc.collect()
    assert not runtime.locked


def test_refused_pages_are_told_once_and_the_rest_is_ordinary(cuda, monkeypatch, caplog):
    runtime = Runtime(refusals=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    lanes = CudaLanes(CPU, pinned=True)
    with caplog.at_level(logging.WARNING):
        held = [lanes.rest(1 << 20) for _ in range(3)]
    assert len(runtime.locked) == 1
    assert not lanes.pinned
    assert caplog.text.count("CUDA refused to pin 0.00 GiB (error 2)") == 1
    assert len(held) == 3


def test_only_devices_with_memory_of_their_own_have_lanes():
    assert has_lanes(torch.device("cuda", 1))
    assert not has_lanes(CPU)
