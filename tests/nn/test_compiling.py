"""Compiled blocks: which settings the options mean, who wins over the launcher, equal results without a graph break."""

import logging

import pytest
import torch
from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.nn.compiling import CompileOptions, CompileSettings, compile_blocks, known_backend, settings_of


def settings(*words: str, **environment: str) -> CompileSettings | None:
    options = parse((CompileOptions,), list(words), prog="train", description="")[CompileOptions]
    return settings_of(options, environment)


def test_nothing_is_compiled_unless_asked_for():
    assert settings() is None
    assert settings("--dynamo_backend", "no") is None
    assert settings("--dynamo_fullgraph", "--compile_mode", "max-autotune") is None


def test_both_spellings_mean_the_same():
    words = ["--dynamo_backend", "INDUCTOR", "--dynamo_mode", "max-autotune", "--dynamo_fullgraph", "--dynamo_dynamic"]
    newer = ["--compile", "--compile_mode", "max-autotune", "--compile_fullgraph", "--compile_dynamic", "true"]
    assert settings(*words) == settings(*newer) == CompileSettings("inductor", "max-autotune", True, True)
    assert settings("--compile", "--compile_cache_size_limit", "9") == CompileSettings(cache_size_limit=9)
    assert settings("--dynamo_backend", "eager", "--dynamo_mode", "default") == CompileSettings("eager")
    with pytest.raises(UserError, match="give one of them"):
        settings("--compile", "--dynamo_backend", "EAGER")


def test_the_launcher_is_followed_when_nothing_is_said_and_never_added(caplog):
    env = {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true"}
    with caplog.at_level(logging.INFO):
        assert settings(**env) == CompileSettings("eager", None, True, None)
        assert settings("--dynamo_backend", "INDUCTOR", **env) == CompileSettings("inductor")
    assert caplog.text.count("the run's own options count, once") == 1
    assert settings(ACCELERATE_DYNAMO_BACKEND="no") is None


@pytest.mark.parametrize(
    ("name", "near"),
    [("NVFUSER", "INDUCTOR"), ("CUDAGRAPHS_FALLBACK", "CUDAGRAPHS"), ("INDUCTR", "INDUCTOR"), ("FX2TRT", "TENSORRT")],
)
def test_a_backend_that_is_gone_is_told_with_the_nearest(name, near):
    with pytest.raises(UserError, match=f"not offered by this torch.*did you mean {near}"):
        known_backend(name)


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.runs = 0
        weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        self.linear.weight.data = weight

    def forward(self, h: torch.Tensor, ctx: torch.Tensor) -> torch.Tensor:
        return h + torch.tanh(self.linear(h)) * ctx


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(3))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(h, torch.tensor(0.5))
        return h


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
def test_blocks_are_compiled_in_place_and_compute_the_same():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    plain, compiled = Stack(), Stack()
    compiled.load_state_dict(plain.state_dict())
    names = [name for name, _ in compiled.named_parameters()]
    assert compile_blocks(compiled, ("blocks",), CompileSettings("aot_eager", fullgraph=True)) == 3
    assert [name for name, _ in compiled.named_parameters()] == names
    h = torch.randn(2, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out, expected = compiled(h), plain(h)
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1, "equal blocks share a compilation"
    assert not counters["graph_break"]
    torch.compiler.reset()
