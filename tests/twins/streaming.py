"""StreamingLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import StreamingLLM
from thoughtformer.models.backbone import backbone_of
from twins import MethodTwin, attended_by_hand


def streaming(model: Any, ids: Sequence[int], method: StreamingLLM, adapter: None) -> Tensor:
    """With rotations: keys as if rotated at their place in the cache. With learned positions: the window alone."""
    turn, first, size = backbone_of(model).rotation, method.first_tokens, method.max_entries

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for j in range(len(ids)):
            held = list(range(j + 1)) if j < size else [*range(first), *range(j + 1 - (size - first), j + 1)]
            assert len(held) == min(j + 1, size)
            q, k = query[:, j : j + 1], key[:, held]
            if turn is not None:
                # Every key and the query move from their place in the text to their place in the cache.
                moved = torch.tensor([[place - p for place, p in enumerate(held)]])
                k = turn(k[None], moved)[0]
                q = turn(q[None], torch.tensor([[len(held) - 1 - j]]))[0]
            output[:, j : j + 1] = (q @ k.mT).softmax(dim=-1) @ value[:, held]
        return output

    return attended_by_hand(model, ids, attend)


METHODS = {
    "streaming": MethodTwin(
        cases={"streaming": StreamingLLM(max_entries=14, first_tokens=3)},
        logits=streaming,
        # Rotations are computed in float32, as transformers does: turning twice differs in the seventh digit.
        atol=2e-4,
        served={"streaming": ("llama", StreamingLLM(max_entries=40, first_tokens=3))},
    )
}
