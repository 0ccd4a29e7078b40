"""What one pass needs in every layer, on whichever devices the layers are."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["OnDevices"]


class _Movable(Protocol):
    def to(self, device: torch.device) -> Any: ...


Kind = TypeVar("Kind", bound=_Movable)


class OnDevices(Generic[Kind]):
    """Something that is copied to each device once, when a layer there first asks for it."""

    def __init__(self, original: Kind) -> None:
        self._original = original
        self._copies: dict[torch.device, Kind] = {}

    def at(self, device: torch.device) -> Kind:
        """The thing itself, or its copy."""
        if device not in self._copies:
            self._copies[device] = self._original.to(device)
        return self._copies[device]
