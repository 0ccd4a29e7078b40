"""Entries in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import Quantised
from twins import MethodTwin, attended_by_hand


def fewer(states: Tensor, bits: int) -> Tensor:
    """One list of numbers as the nearest of evenly spaced levels between its least and its largest."""
    lowest = states.min()
    step = (states.max() - lowest) / (2**bits - 1)
    return lowest + ((states - lowest) / step).round() * step


def in_fewer_bits(key: Tensor, value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A block: keys channel by channel, values token by token, 64 numbers at most."""
    keys = torch.stack([fewer(channel, bits) for channel in key.T], dim=1)
    size = 64 if value.shape[1] % 64 == 0 else value.shape[1]
    values = torch.stack([torch.cat([fewer(part, bits) for part in token.split(size)]) for token in value])
    return keys, values


def quantised(model: Any, ids: Sequence[int], method: Quantised, adapter: None) -> Tensor:
    """Lists of blocks, each a list of positions with what is left of their keys and values."""
    size, most = method.block_tokens, method.held_tokens

    def attend(window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for head in range(len(query)):
            raw: list[int] = []
            finer: list[tuple[list[int], Tensor, Tensor]] = []
            coarse: list[tuple[list[int], Tensor, Tensor]] = []
            for j in range(len(ids)):
                raw.append(j)
                blocks = [*coarse, *finer, (raw, key[head, raw], value[head, raw])]
                read = torch.tensor([p for positions, _, _ in blocks for p in positions])
                keys, values = (torch.cat([block[part] for block in blocks]) for part in (1, 2))
                near = read > j - window if window else read >= 0
                output[head, j] = (query[head, j] @ keys[near].mT).softmax(dim=-1) @ values[near]
                if len(raw) < method.first_tokens + method.recent_tokens + size:
                    continue
                old = raw[method.first_tokens : method.first_tokens + size]
                raw = [p for p in raw if p not in old]
                has_finer = bool(method.finer_tokens) and not window
                bits = 8 if has_finer else method.bits
                (finer if has_finer else coarse).append((old, *in_fewer_bits(key[head, old], value[head, old], bits)))
                if has_finer and len(finer) * size > method.finer_tokens:
                    positions, *states = finer.pop(0)
                    coarse.append((positions, *in_fewer_bits(*states, method.bits)))
                if most is not None and not window:
                    while len(finer) + len(coarse) > most // size:
                        (coarse or finer).pop(0)
        return output

    return attended_by_hand(model, ids, lambda layer, *states: attend(None, *states), attend)


METHODS = {
    "quantised": MethodTwin(
        cases={
            "quantised": Quantised(bits=4, first_tokens=2, recent_tokens=3, block_tokens=6),
            "quantised_8": Quantised(bits=8, first_tokens=0, recent_tokens=0, block_tokens=4),
            "quantised_tiers": Quantised(
                bits=2, first_tokens=1, recent_tokens=4, block_tokens=5, finer_tokens=10, held_tokens=25
            ),
            "quantised_dropped": Quantised(bits=4, first_tokens=2, recent_tokens=5, block_tokens=4, held_tokens=0),
        },
        logits=quantised,
        served={"quantised": ("gemma3_text", Quantised(bits=4, recent_tokens=8, block_tokens=16, held_tokens=64))},
    )
}
