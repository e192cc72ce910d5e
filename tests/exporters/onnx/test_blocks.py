"""Integers in the blocks that ONNX Runtime's kernels take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spinpass.errors import ConfigError
from spinpass.exporters.onnx.blocks import block_size, blocks, packed_bits
from spinpass.quantization import Weights
from spinpass.quantization.rounding.grid import rounded


def test_blocks_repeat_the_scale_of_a_row() -> None:
    codes = rounded(torch.randn(3, 160), Weights(4, symmetric=False))
    size = block_size(codes, "w")
    assert size == 32 and 160 % size == 0
    q, scales, zeros = blocks(codes, size)
    assert q.shape == (3, 160) and torch.equal(scales, codes.scales.expand(3, 5)) and zeros.shape == (3, 5)
    narrow = rounded(torch.randn(3, 40), Weights(4, symmetric=False))
    q, _, zeros = blocks(narrow, block_size(narrow, "w"))
    assert q.shape == (3, 48) and torch.equal(q[:, 40:], zeros[:, -1:].expand(3, 8)), "padding stands for zero"


def test_groups_that_no_block_fits_are_refused() -> None:
    codes = rounded(torch.randn(3, 96), Weights(4, 32))
    assert block_size(replace(codes, scales=codes.scales[:, :1], zeros=codes.zeros[:, :1]), "w") == 32
    with pytest.raises(ConfigError, match=r"the groups of w have 24 weights"):
        block_size(replace(codes, scales=torch.ones(3, 4), zeros=torch.ones(3, 4, dtype=torch.uint8)), "w")
    with pytest.raises(ConfigError, match=r"the groups of w do not lie side by side"):
        block_size(replace(codes, index=torch.arange(96) % 3), "w")


def test_bits_are_packed_from_below() -> None:
    assert packed_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert packed_bits(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 1]]
    assert packed_bits(torch.tensor([[200, 7]], dtype=torch.uint8), 8).tolist() == [[200, 7]]
