"""Attention against its formula, and the choice of a library."""

import math

import pytest
import torch
from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.flow import keyed
from musubi_tuner.nn import attention as attention_module
from musubi_tuner.nn.attention import LIBRARIES, attention, check_mode, set_mode


def qkv(dtype=torch.float32):
    """Two samples of 5 queries and 7 keys, 3 heads of 6."""
    return [keyed.normal((2, n, 3, 6), "attention", name).to(dtype) for n, name in ((5, "q"), (7, "k"), (7, "v"))]


def by_formula(q, k, v, lengths=None):
    """softmax(q k^T / sqrt(d)) v in float64, one sample and head at a time."""
    y = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        n = k.shape[1] if lengths is None else int(lengths[b])
        for h in range(q.shape[2]):
            scores = q[b, :, h].double() @ k[b, :n, h].double().T / math.sqrt(q.shape[3])
            y[b, :, h] = scores.softmax(-1) @ v[b, :n, h].double()
    return y


def test_equals_the_formula():
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v).double(), by_formula(q, k, v), rtol=1e-5, atol=1e-6)


def test_padding_keys_have_no_weight_and_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())
    lengths = torch.tensor([7, 3])
    y = attention(q, k, v, lengths=lengths)
    torch.testing.assert_close(y.double(), by_formula(q, k, v, lengths), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert k.grad[1, 3:].abs().max() == 0
    assert v.grad[1, 3:].abs().max() == 0
    assert k.grad[1, :3].abs().min() > 0


def test_the_result_has_the_dtype_of_q():
    q, k, v = qkv(dtype=torch.bfloat16)
    assert attention(q, k.float(), v.float()).dtype == torch.bfloat16


def test_an_unknown_mode_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="attn_mode = fast: use one of sdpa, flash, "):
        check_mode("fast")


@pytest.mark.parametrize(("mode", "library"), LIBRARIES.items())
def test_a_library_that_is_missing_is_an_error_and_no_fallback(mode, library, monkeypatch):
    monkeypatch.setattr("musubi_tuner.nn.attention.find_spec", lambda name: None if name == library else name)
    with pytest.raises(UserError, match=f"the package {library} is not installed"):
        check_mode(mode)


def test_sdpa_is_always_there():
    assert check_mode("sdpa") == "sdpa"


def test_a_model_without_the_attribute_cannot_be_told():
    with pytest.raises(TypeError, match="Linear has no attribute attn_mode"):
        set_mode(nn.Linear(1, 1), "sdpa")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.shows("split_attn")
def test_samples_of_different_lengths_go_one_by_one_where_asked_or_where_a_library_has_no_mask(split, monkeypatch):
    """As --split_attn asks."""
    seen = []

    def body(q, k, v):
        seen.append((len(q), k.shape[1]))
        return attention(q.float(), k.float(), v.float()).to(q.dtype)

    monkeypatch.setitem(attention_module._BODIES, "flash", body)
    monkeypatch.setattr("musubi_tuner.nn.attention.find_spec", lambda name: name)
    model = nn.Module()
    model.attn_mode = "sdpa"
    lengths = torch.tensor([7, 3])
    for mode, dtype in (("sdpa", torch.float32), ("flash", torch.bfloat16)):
        set_mode(model, mode, split=split)
        q, k, v = (x.requires_grad_() for x in qkv(dtype))
        y = attention(q, k, v, lengths=lengths, mode=model.attn_mode)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y.double(), by_formula(q, k, v, lengths), rtol=tolerance, atol=tolerance)
        y.float().square().sum().backward()
        assert k.grad[1, 3:].abs().max() == 0
    assert seen == [(1, 7), (1, 3)]
    attention(*qkv(torch.bfloat16), mode=model.attn_mode)
    assert seen[-1] == (2, 7), "without lengths a batch is one call"
