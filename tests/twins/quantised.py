"""Entries in fewer bits, and texts that are read twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import KVzip, Quantised
from thoughtformer.models.backbone import backbone_of
from twins import MethodTwin, attended_by_hand, window_of


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


class Head:
    """What one key head of a layer holds: (position, key, value) of each entry, in the order of the text."""

    def __init__(self, window: int | None, bits: int | None, raw: int, size: int) -> None:
        self.window, self.bits, self.raw, self.size = window, bits, raw, size
        self.entries: list[tuple[int, Tensor, Tensor]] = []
        #: How many of them, behind the first ones, have fewer bits.
        self.coarse = 0

    def read(self, query: Tensor, position: int) -> tuple[list[int], Tensor, Tensor]:
        """Positions, weights and output of a scaled query."""
        near = [entry for entry in self.entries if self.window is None or entry[0] > position - self.window]
        weights = (torch.stack([key for _, key, _ in near]) @ query).softmax(dim=0)
        return [entry[0] for entry in near], weights, weights @ torch.stack([value for *_, value in near])

    def make_coarse(self, first: int, number: int) -> None:
        """These entries get fewer bits, block by block."""
        assert self.bits is not None
        for start in range(first, first + number, self.size):
            block = self.entries[start : start + self.size]
            keys, values = in_fewer_bits(*(torch.stack([entry[part] for entry in block]) for part in (1, 2)), self.bits)
            self.entries[start : start + self.size] = [
                (entry[0], key, value) for entry, key, value in zip(block, keys, values, strict=True)
            ]

    def settle(self, first_tokens: int) -> None:
        """In layers with a window the oldest raw block gets fewer bits, behind the first tokens, if it is due."""
        is_due = len(self.entries) - self.coarse == first_tokens + self.raw + self.size
        if self.window is not None and self.bits is not None and is_due:
            self.make_coarse(first_tokens + self.coarse, self.size)
            self.coarse += self.size


def kvzip(model: Any, ids: Sequence[int], method: KVzip, adapter: None) -> Tensor:
    """Algorithm 1, chunk by chunk: after each, the model reads it again, and the best of its entries stay."""
    view = backbone_of(model)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * view.num_layers
    heads = [
        [
            Head(window_of(model, kind), method.bits, min(method.recent_tokens, 16), min(method.block_tokens, 32))
            for _ in range(view.num_kv_heads)
        ]
        for kind in kinds
    ]

    def read(heads: list[list[Head]], first: int, tokens: Sequence[int], votes: dict[Any, float] | None) -> Tensor:
        def handed(layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: Any) -> Tensor:
            output, groups = torch.zeros_like(query), query.shape[1] // key.shape[1]
            for number, head in enumerate(heads[layer]):
                for place in range(len(tokens)):
                    head.entries.append((first + place, key[0, number, place], value[0, number, place]))
                    for one in range(number * groups, (number + 1) * groups):
                        positions, weights, output[0, one, place] = head.read(
                            query[0, one, place] * scale, first + place
                        )
                        if votes is not None and head.window is None:
                            for position, weight in zip(positions, weights.tolist(), strict=True):
                                at = layer, number, position
                                votes[at] = max(votes.get(at, 0.0), weight)
                    head.settle(method.first_tokens)
            return output

        places = torch.arange(first, first + len(tokens))[None]
        return view.logits(view.forward(view.embed(torch.tensor([list(tokens)])), places, handed))[0]

    logits, start = [], 0
    while start < len(ids):
        chunk = range(start - method.recent_tokens if start else method.first_tokens, len(ids))[: method.chunk_tokens]
        end = min(chunk.start + method.chunk_tokens + method.recent_tokens, len(ids))
        is_whole = end == chunk.start + method.chunk_tokens + method.recent_tokens
        is_whole = is_whole and end + method.chunk_tokens <= view.max_tokens
        end = end if is_whole else len(ids)
        logits.append(read(heads, start, ids[start:end], None))
        start = end
        if not is_whole:
            break
        votes: dict[Any, float] = {}
        read(copy.deepcopy(heads), end, [ids[position] for position in chunk], votes)
        for layer, of_layer in enumerate(heads):
            for number, head in enumerate(of_layer):
                if head.window is not None:
                    continue
                order = sorted(chunk, key=lambda p, layer=layer, number=number: (-votes[layer, number, p], p))
                size = method.block_tokens
                kept = round((1 - method.removed) * len(chunk))
                if method.bits is not None:
                    kept = max(round((1 - method.removed) * len(chunk) / size), 1) * size
                gone = set(order[kept:])
                head.entries = [entry for entry in head.entries if entry[0] not in gone]
                if method.bits is not None:
                    head.size = size
                    before = sum(entry[0] < chunk.start for entry in head.entries)
                    head.make_coarse(before, kept)
    return torch.cat(logits)


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
    ),
    "kvzip": MethodTwin(
        cases={
            "kvzip": KVzip(removed=0.6, chunk_tokens=11, first_tokens=2, recent_tokens=3),
            "kvzip_at_once": KVzip(removed=0.9, chunk_tokens=8, first_tokens=0, recent_tokens=0),
            "kvzip_4": KVzip(removed=0.5, chunk_tokens=12, first_tokens=1, recent_tokens=4, bits=4, block_tokens=3),
        },
        logits=kvzip,
        served={"kvzip": ("qwen2", KVzip(removed=0.6, chunk_tokens=32, recent_tokens=8))},
    ),
}
