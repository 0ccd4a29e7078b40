"""Muon for the matrices of layers, AdamW for embeddings and norms, as one optimiser for schedulers and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from thoughtformer.errors import UnsupportedError

__all__ = ["MuonWithAdamW", "build_optimizer"]


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` side by side; their parameter groups end to end."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The parts' own groups, so that a scheduler's learning rates reach them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "closures are for line searches"
        refuse_sharded(parameter for group in self.param_groups for parameter in group["params"])
        for part in self.parts:
            part.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def refuse_sharded(parameters: Iterable[nn.Parameter]) -> None:
    """Raises `UnsupportedError` for parameters of which this process holds a part: Muon needs whole matrices."""
    for parameter in parameters:
        is_split = isinstance(parameter, DTensor) and any(place.is_shard() for place in parameter.placements)
        if is_split or hasattr(parameter, "ds_id") or getattr(parameter, "_is_flat_param", False):
            raise UnsupportedError(
                "optimizer='muon' turns whole matrices, but parameters are sharded (FSDP, tensor parallel or ZeRO): it "
                "would be silently wrong. Train with optimizer='adamw', or without sharding."
            )


def build_optimizer(
    model: nn.Module,
    *,
    kind: str,
    learning_rate: float,
    matrix_learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW for everything, or Muon for the layers' matrices; norms and embeddings don't decay.

    Raises:
        UnsupportedError: Muon for parameters that are sharded.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or id(p) in embeddings]
    if kind == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    # Scaled to AdamW's step size (arXiv 2502.16982, section 2.2), so that one scale of learning rates serves both.
    refuse_sharded(model.parameters())
    muon = torch.optim.Muon(
        matrices, lr=matrix_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return MuonWithAdamW(muon, torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=0.0))
