"""Linear layers that may keep a second copy of their weight, in the layout that the processor reads fastest.

PyTorch's `linear` on CPUs calls a general matrix product, which for a few rows reads weights at a third of the memory's
rate (docs/log.md). oneDNN's product on a weight laid out in blocks comes near that rate, and is a little faster for
many rows too. PyTorch brings oneDNN along for its compiler; its operators are probed here, never assumed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thoughtformer.models.checksum import checksum

__all__ = ["PackableLinear", "can_pack", "compiled_linear", "pack_weights", "unpack_weights", "using_packed_weights"]

#: Rows that the blocked layout is made for. 8 was as good as the exact number from 1 to 4,096 rows.
PACKED_FOR_ROWS = 8
#: Elements below which a weight stays as it is: it lies in a cache anyway, and oneDNN's call costs 12 us more than it
#: saves with one row. With 16 rows packing paid from half of this on (docs/log.md).
LEAST_PACKED = 2**17


class _InUse(threading.local):
    """Whether this thread uses packed copies."""

    packed = False


_in_use = _InUse()


@contextmanager
def using_packed_weights() -> Iterator[None]:
    """Within, this thread uses the copies that `pack_weights` made; elsewhere every layer reads its weight itself.

    For those who have called `pack_weights` since anyone may have written to the weights: the engine before each
    prefill, and benchmarks. So a model that an engine has packed stays, to all others, a plain model.
    """
    before, _in_use.packed = _in_use.packed, True
    try:
        yield
    finally:
        _in_use.packed = before


@cache
def can_pack() -> bool:
    """Whether this build of PyTorch has oneDNN's prepacked product, and it gives the same result."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, states = torch.randn(24, 16, generator=generator), torch.randn(3, 16, generator=generator)
    try:
        with torch.inference_mode():
            product = _product(states, _packed(weight), None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(product, F.linear(states, weight), atol=1e-5)


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


class PackableLinear(nn.Linear):
    """`nn.Linear`, whose weight `pack` copies into oneDNN's layout for use outside training.

    The copy is used under `using_packed_weights`, for float32 on CPUs where no gradient and no autocast is asked for,
    and only while the weight is the very one that was packed: after a step of training, another `load_state_dict` or
    `to`, the layer is plain again. Writing through `weight.data`, as merging LoRA does, leaves no trace that a forward
    pass could see; `pack` sees it, by a checksum over the whole weight, and packs anew. The engine calls it before
    every prefill: an edit while a text is being written is seen with the next one.
    """

    _packed: Tensor | None = None
    _packed_from: tuple[int, int] | None = None
    _packed_checksum: bytes | None = None

    def pack(self) -> None:
        """Makes the copy, as many bytes as the weight, unless it is there and true; nothing where it wouldn't help."""
        is_usable = self.weight.dtype == torch.float32 and self.weight.device.type == "cpu" and can_pack()
        if not is_usable or self.weight.numel() < LEAST_PACKED:
            self.unpack()
            return
        now = checksum(self.weight)
        if self._packed_from == self._weight_version() and self._packed_checksum == now:
            return
        with torch.inference_mode():
            self._packed = _packed(self.weight)
        self._packed_from, self._packed_checksum = self._weight_version(), now

    def unpack(self) -> None:
        """Drops the copy."""
        self._packed = self._packed_from = self._packed_checksum = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moved or converted; a freed weight's address and version could come back with other values.
        self.unpack()
        return super()._apply(fn, recurse)

    def _weight_version(self) -> tuple[int, int]:
        # A weight made in inference mode counts no versions, and can't be trained either.
        return self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and input.shape[0] == 1 and not torch.is_grad_enabled():
            # Compiled, this is one pass over the weight at the memory's rate, fused with what comes before and after.
            product = (self.weight * input).sum(dim=-1)[None]
            return product if self.bias is None else product + self.bias
        packed = self._packed
        if (
            packed is None
            or torch.compiler.is_compiling()
            or not _in_use.packed
            or torch.is_grad_enabled()
            or input.dtype != torch.float32
            or self._packed_from != self._weight_version()
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, self.weight, self.bias)
        return _product(input, packed, self.bias)

    def __getstate__(self) -> dict:
        # Copies and pickles of the module start without: the layout is opaque to both.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


@cache
def compiled_linear() -> Callable[[PackableLinear, Tensor], Tensor]:
    """A layer's product with one row, compiled."""
    return torch.compile(PackableLinear.forward, dynamic=False)


def pack_weights(module: nn.Module) -> None:
    """Packs every `PackableLinear` in `module`, for `using_packed_weights`."""
    for part in module.modules():
        if isinstance(part, PackableLinear):
            part.pack()


def unpack_weights(module: nn.Module) -> None:
    """Drops the copies of every `PackableLinear` in `module`."""
    for part in module.modules():
        if isinstance(part, PackableLinear):
            part.unpack()
