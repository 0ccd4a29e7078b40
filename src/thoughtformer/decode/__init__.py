"""How tokens are proposed: strategies that make a step verify several, one file each."""

from __future__ import annotations

from thoughtformer.decode.drafting import Drafter

__all__ = ["Drafter"]
