"""Whether a tensor is still what it was, by reading all of it at the rate of the memory."""

from __future__ import annotations

import hashlib
import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["checksum"]


#: Of which a second copy is made at once.
CHUNK_NUMBERS = 1 << 17


def checksum(tensor: Tensor) -> bytes:
    """A few bytes that change with any edit: of the bits as 64-bit numbers in a table, the sums by row and by column.

    Sums are exact, modulo 2^64. A third sum is for signs that turn: an even number of highest bits comes to a multiple
    of 2^64. Bits that are changed, and values, rows or columns that are swapped, are seen; it is no defence against
    somebody who looks for two tensors with equal sums.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()  # this process's part of it
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        return b"".join(checksum(getattr(tensor, name)) for name in names)
    if tensor.is_quantized:
        return checksum(tensor.int_repr()) + checksum(tensor.dequantize())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    whole = len(flat) // 8 * 8
    numbers = flat[:whole].view(torch.int64)
    columns = math.isqrt(len(numbers)) or 1
    table = numbers[: len(numbers) // columns * columns].view(-1, columns)
    # As floating point numbers where that can be: sums of these are the fastest, and here need not be exact.
    is_wide = tensor.dtype in (torch.float32, torch.float64)
    halves = [(rows >> 32).sum(1) for rows in table.split(max(1, CHUNK_NUMBERS // columns))] if not is_wide else []
    signs = table.view(tensor.dtype).sum(1) if is_wide else torch.cat([table[:0, 0], *halves])
    for part in (table.sum(0), table.sum(1), signs, numbers[table.numel() :], flat[whole:]):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
