"""How tokens are proposed: strategies that make a step verify several, one file each."""

from __future__ import annotations

from thoughtformer.decode.budget import StepCosts
from thoughtformer.decode.draft_model import DraftModel
from thoughtformer.decode.drafting import DRAFTERS, Draft, Drafter, Forecast, Guess, drafters_of
from thoughtformer.decode.suffix import Suffix

__all__ = ["DRAFTERS", "Draft", "DraftModel", "Drafter", "Forecast", "Guess", "StepCosts", "Suffix", "drafters_of"]
