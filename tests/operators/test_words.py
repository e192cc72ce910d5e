"""Bits in words: against the layout spelled out in Python's integers, and there and back."""

from __future__ import annotations

import pytest
import torch

from spinpass.operators.words import pack_words, unpack_words, words


def stream(values: list[int], bits: int) -> list[int]:
    """The words of a list of values, unsigned, by one long integer."""
    total = sum(v << (i * bits) for i, v in enumerate(values))
    return [(total >> (32 * k)) & 0xFFFFFFFF for k in range(words(len(values), bits))]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 24, 32, 40, 96])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_are_one_stream_of_bits(bits: int, count: int, dim: int) -> None:
    size = (count, 5) if dim == 0 else (5, count)
    values = torch.randint(2**bits, size, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_words(values, bits, dim)
    assert packed.dtype == torch.int32 and packed.shape[dim] == words(count, bits) and packed.is_contiguous()
    rows = (packed.T if dim == 0 else packed).to(torch.int64) & 0xFFFFFFFF
    expected = [stream(row, bits) for row in (values.T if dim == 0 else values).tolist()]
    assert rows.tolist() == expected
    back = unpack_words(packed, bits, dim, count)
    assert back.dtype == torch.uint8 and torch.equal(back, values)


def test_three_bits_cross_words() -> None:
    """Of 32 values the 11th lies in the words 0 and 1, the 22nd in the words 1 and 2."""
    values = torch.zeros(32, 1, dtype=torch.uint8)
    values[10], values[21] = 0b101, 0b110
    packed = pack_words(values, 3, 0)[:, 0].to(torch.int64) & 0xFFFFFFFF
    assert packed.tolist() == [0b01 << 30, 0b1, 0b11]
    assert torch.equal(unpack_words(pack_words(torch.full((32, 1), 7, dtype=torch.uint8), 3, 0), 3, 0, 32), torch.full((32, 1), 7))


def test_four_bits_begin_at_the_lowest() -> None:
    values = torch.arange(8, dtype=torch.uint8)[:, None]
    assert pack_words(values, 4, 0).item() == 0x76543210
    assert pack_words(values + 8, 4, 0).item() == 0xFEDCBA98 - 2**32
