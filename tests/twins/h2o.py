"""H2O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import HeavyHitters
from thoughtformer.models.backbone import backbone_of
from twins import MethodTwin, attended_by_hand


def h2o(model: Any, ids: Sequence[int], method: HeavyHitters, adapter: None) -> Tensor:
    """Algorithm 1 for each layer and key head, with lists."""
    kv_heads, recent = backbone_of(model).num_kv_heads, round(method.max_entries * method.recent_fraction)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[0] // kv_heads
        output = torch.zeros_like(query)
        for kv_head in range(kv_heads):
            held: list[int] = []
            gained: dict[int, float] = {}
            for j in range(len(ids)):
                if len(held) == method.max_entries:
                    older = [p for p in held if p <= j - 1 - recent]
                    held.remove(min(older, key=lambda p: (gained[p], p)))
                held.append(j)
                gained[j] = 0.0
                for head in range(kv_head * groups, (kv_head + 1) * groups):
                    weights = (query[head, j] @ key[head, held].mT).softmax(dim=-1)
                    output[head, j] = weights @ value[head, held]
                    for p, weight in zip(held, weights.tolist(), strict=True):
                        gained[p] += weight
        return output

    return attended_by_hand(model, ids, attend)


METHODS = {"h2o": MethodTwin(cases={"h2o": HeavyHitters(max_entries=14)}, logits=h2o)}
