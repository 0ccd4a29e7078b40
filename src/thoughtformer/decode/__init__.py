"""How tokens are proposed: strategies that make a step verify several, one file each."""

from __future__ import annotations

from thoughtformer.decode.budget import StepCosts
from thoughtformer.decode.drafting import DRAFTERS, Draft, Drafter, drafter_named
from thoughtformer.decode.suffix import Suffix

__all__ = ["DRAFTERS", "Draft", "Drafter", "StepCosts", "Suffix", "drafter_named"]
