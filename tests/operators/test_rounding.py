"""Roundings of computed values: no further off than half a step, and in the dtype of what is rounded."""

from __future__ import annotations

import torch

from spinpass import operators  # noqa: F401  (registers torch.ops.spinpass)


def test_roundings_do_what_they_say() -> None:
    x = torch.randn(3, 5, 16)
    for bits in (4, 8):
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        y = torch.ops.spinpass.round_tokens(x, bits, True)
        assert ((y - x).abs() <= step / 2 + 1e-6).all()
        assert torch.allclose(y, torch.ops.spinpass.round_tokens(y, bits, True), atol=1e-6)
        span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        z = torch.ops.spinpass.round_tokens(x, bits, False)
        assert ((z - x).abs() <= span / (2**bits - 1) + 1e-6).all()
    assert (torch.ops.spinpass.round_tokens(torch.zeros(2, 4), 4, False) == 0).all()
    half = torch.ops.spinpass.round_tokens(x.bfloat16(), 8, True)
    assert half.dtype == torch.bfloat16 and half.stride() == x.stride()
