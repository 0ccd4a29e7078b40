"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["GPTHFCausalLMOutput"]


@dataclass
class GPTHFCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output, and with `loss_only` each column's loss in nats, shape (batch, seq - 1), 0 if unscored."""

    token_losses: Tensor | None = None
