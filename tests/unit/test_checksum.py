"""Checksums of weights: any edit is seen, wherever it hides in the sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thoughtformer.models.checksum import checksum

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(6,), (64, 64), (33, 130), (4, 3, 50)]

#: What is done to a tensor laid out flat.
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "all turned": lambda flat: -flat,
    "every other turned": lambda flat: flat * torch.tensor([1, -1]).repeat(len(flat) // 2).to(flat.dtype),
    "two turned": lambda flat: flat * torch.tensor([-1, *[1] * (len(flat) - 2), -1]).to(flat.dtype),
    "doubled": lambda flat: flat * 2,
    "rolled": lambda flat: flat.roll(1),
    "reversed": lambda flat: flat.flip(0),
    "zeroed": lambda flat: flat * 0,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(edit, dtype, shape):
    torch.manual_seed(0)
    tensor = (torch.randn(shape, dtype=torch.float64) * 30 + 0.25).to(dtype)
    before, copy = checksum(tensor), tensor.clone()
    assert checksum(copy) == before
    tensor.copy_(EDITS[edit](tensor.flatten()).view(shape))
    assert not torch.equal(tensor, copy)
    assert checksum(tensor) != before
    tensor.copy_(copy)
    assert checksum(tensor) == before


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_flipped_bit_is_seen(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(7, 11, dtype=torch.float64).to(dtype)
    seen, held = {checksum(tensor)}, tensor.view(torch.uint8)
    for byte in range(held.numel()):
        for bit in range(8):
            held.view(-1)[byte] ^= 1 << bit
            seen.add(checksum(tensor))
            held.view(-1)[byte] ^= 1 << bit
    assert len(seen) == 8 * held.numel() + 1


def test_shape_and_type_count():
    zeros = torch.zeros(4, 6)
    sums = [zeros, zeros.view(6, 4), zeros.view(torch.int32), torch.zeros(0), torch.zeros(0, 3)]
    assert len({checksum(tensor) for tensor in sums}) == len(sums)
