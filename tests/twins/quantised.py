"""Entries in fewer bits or in pages, and texts that are read twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import AttentionMatching, KVzip, Lookup, Quantised, Selection
from thoughtformer.models.backbone import backbone_of
from twins import MethodTwin, attended_by_hand, window_of


def levels(states: Tensor, bits: int, farthest: int) -> tuple[Tensor, float, float]:
    """One list of numbers in whole steps above the lowest, which is also told in steps; and the step.

    That is the first of 2**-20, 2**-(20 - 1/8), ... that will do; the lowest lies no more than `farthest` from zero.
    Numbers halfway between two steps, to a millionth, go up.
    """
    needed = max(float(states.max() - states.min()) / (2**bits - 1), abs(float(states.min())) / farthest)
    step = next(2 ** (n / 8 - 20) for n in range(256) if 2 ** ((n + 1e-6) / 8 - 20) >= needed)
    lowest = float((states.min() / step + 1e-6).round())
    found = [((number / step + 1e-6).round() - lowest).clamp(max=2**bits - 1) for number in states]
    return torch.stack(found), lowest, step


def fewer(states: Tensor, bits: int, farthest: int) -> Tensor:
    """The same numbers as what the steps come to."""
    found, lowest, step = levels(states, bits, farthest)
    return (found + lowest) * step


def rough(channel: Tensor, bits: int) -> Tensor:
    """A channel of keys, each in the middle of the half that it lies in."""
    found, lowest, step = levels(channel, bits, 2**15 - 2**8)
    lower, upper = range(2 ** (bits - 1)), range(2 ** (bits - 1), 2**bits)
    middles = [sum(half) / len(half) for half in (lower, upper)]
    return torch.stack([lowest + middles[int(level) in upper] + 0 * level for level in found]) * step


def in_fewer_bits(key: Tensor, value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A block: keys channel by channel, values token by token, 64 numbers at most."""
    keys = torch.stack([fewer(channel, bits, 2**15 - 2**8) for channel in key.T], dim=1)
    size = 64 if value.shape[1] % 64 == 0 else value.shape[1]
    values = torch.stack([torch.cat([fewer(part, bits, 2**7 - 1) for part in token.split(size)]) for token in value])
    return keys, values


def attend_in_fewer_bits(method: Any, window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Lists of blocks, each a list of positions with what is left of their keys and values."""
    output, most = torch.zeros_like(query), method.held_tokens
    size = min(method.block_tokens, 32) if window else method.block_tokens
    for head in range(len(query)):
        raw: list[int] = []
        finer: list[tuple[list[int], Tensor, Tensor]] = []
        coarse: list[tuple[list[int], Tensor, Tensor]] = []
        for j in range(query.shape[1]):
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


def quantised(model: Any, ids: Sequence[int], method: Quantised, adapter: None) -> Tensor:
    """Older entries in fewer bits, in layers of both kinds."""
    attend = partial(attend_in_fewer_bits, method)
    return attended_by_hand(model, ids, lambda layer, *states: attend(None, *states), attend)


def lookup(model: Any, ids: Sequence[int], method: Lookup, adapter: None) -> Tensor:
    """Each token by itself: by the halves that its numbers lie in it gets a share, and the largest shares are read."""
    kv_heads, first, size = backbone_of(model).num_kv_heads, method.first_tokens, method.block_tokens
    near = Quantised(
        bits=method.bits, first_tokens=first, recent_tokens=min(method.recent_tokens, 16), block_tokens=size
    )

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, output = query.shape[0] // kv_heads, torch.zeros_like(query)
        for j in range(len(ids)):
            blocks = max(j - first - method.recent_tokens, 0) // size
            raw = [*range(min(first, j + 1)), *range(first + blocks * size, j + 1)]
            old = list(range(first, first + blocks * size))
            for kv_head in range(kv_heads):
                heads = range(kv_head * groups, (kv_head + 1) * groups)
                mine, theirs = key[heads[0]].clone(), value[heads[0]].clone()
                judged = torch.zeros_like(mine)
                for start in range(first, first + blocks * size, size):
                    block = range(start, start + size)
                    judged[block] = torch.stack([rough(channel, method.bits) for channel in mine[block].T], dim=1)
                    mine[block], theirs[block] = in_fewer_bits(mine[block], theirs[block], method.bits)
                if old:
                    shares = [(judged[old] @ query[h, j]).log_softmax(dim=0) for h in heads]
                    worth = (torch.stack(shares).amax(dim=0) * 2**13).round().tolist()
                    best = sorted(range(len(old)), key=lambda n, worth=worth: (-worth[n], n))[: method.read_tokens]
                    read = sorted([*raw, *(old[n] for n in best)])
                else:
                    read = raw
                for head in heads:
                    output[head, j] = (query[head, j] @ mine[read].mT).softmax(dim=-1) @ theirs[read]
        return output

    return attended_by_hand(model, ids, attend, partial(attend_in_fewer_bits, near))


class Head:
    """What one key head of a layer holds: (position, key, value) of each entry, in the order of the text."""

    def __init__(self, window: int | None, bits: int | None, raw: int, size: int) -> None:
        self.window, self.bits, self.raw, self.size = window, bits, raw, size
        self.entries: list[tuple[int, Tensor, Tensor]] = []
        #: How many of them, behind the first ones, have fewer bits.
        self.coarse = 0
        self.bias: dict[int, float] = {}

    def read(self, query: Tensor, position: int) -> tuple[list[int], Tensor, Tensor]:
        """Positions, weights and output of a scaled query."""
        near = [entry for entry in self.entries if self.window is None or entry[0] > position - self.window]
        scores = [key @ query + self.bias.get(position, 0.0) for position, key, _ in near]
        weights = torch.stack(scores).softmax(dim=0)
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


#: What a second reading shows of a key head: the most that each position got, and its queries, scaled.
Seen = dict[tuple[int, int], tuple[dict[int, float], list[Tensor]]]


def read_twice(
    model: Any,
    ids: Sequence[int],
    method: Any,
    bits: int | None,
    size: int,
    choose: Callable[[Head, Sequence[int], dict[int, float], list[Tensor]], None],
) -> Tensor:
    """After each chunk the model reads it again; `choose(head, positions, votes, queries)` drops what goes."""
    view = backbone_of(model)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * view.num_layers
    recent = min(method.recent_tokens, 16)
    heads = [
        [Head(window_of(model, kind), bits, recent, min(size, 32)) for _ in range(view.num_kv_heads)] for kind in kinds
    ]

    def read(heads: list[list[Head]], first: int, tokens: Sequence[int], seen: Seen) -> Tensor:
        def handed(layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: Any) -> Tensor:
            output, groups = torch.zeros_like(query), query.shape[1] // key.shape[1]
            for number, head in enumerate(heads[layer]):
                votes, queries = seen.setdefault((layer, number), ({}, []))
                for place in range(len(tokens)):
                    head.entries.append((first + place, key[0, number, place], value[0, number, place]))
                    for one in range(number * groups, (number + 1) * groups):
                        queries.append(query[0, one, place] * scale)
                        positions, weights, output[0, one, place] = head.read(queries[-1], first + place)
                        for position, weight in zip(positions, weights.tolist(), strict=True):
                            votes[position] = max(votes.get(position, 0.0), weight)
                    head.settle(method.first_tokens)
            return output

        places = torch.arange(first, first + len(tokens))[None]
        return view.logits(view.forward(view.embed(torch.tensor([list(tokens)])), places, handed))[0]

    logits, start = [], 0
    while start < len(ids):
        first = start - method.recent_tokens if start else method.first_tokens
        end = first + method.chunk_tokens + method.recent_tokens
        if end > len(ids) or end + method.chunk_tokens > view.max_tokens:
            logits.append(read(heads, start, ids[start:], {}))
            break
        logits.append(read(heads, start, ids[start:end], {}))
        start, chunk, seen = end, range(first, first + method.chunk_tokens), {}
        read(copy.deepcopy(heads), end, [ids[position] for position in chunk], seen)
        for layer, of_layer in enumerate(heads):
            for number, head in enumerate(of_layer):
                if head.window is None:
                    choose(head, chunk, *seen[layer, number])
    return torch.cat(logits)


def kvzip(model: Any, ids: Sequence[int], method: KVzip, adapter: None) -> Tensor:
    """Algorithm 1, chunk by chunk: the entries with the best votes stay."""
    size = method.block_tokens

    def choose(head: Head, chunk: Sequence[int], votes: dict[int, float], queries: list[Tensor]) -> None:
        kept = round((1 - method.removed) * len(chunk))
        if method.bits is not None:
            kept = max(round((1 - method.removed) * len(chunk) / size), 1) * size
        gone = set(sorted(chunk, key=lambda p: (-votes[p], p))[kept:])
        head.entries = [entry for entry in head.entries if entry[0] not in gone]
        if method.bits is not None:
            head.size = size
            head.make_coarse(sum(entry[0] < chunk[0] for entry in head.entries), kept)

    return read_twice(model, ids, method, method.bits, size, choose)


def attention_matching(model: Any, ids: Sequence[int], method: AttentionMatching, adapter: None) -> Tensor:
    """Sections 3.1 to 3.3: keys by attention, masses by non-negative and values by regularised least squares."""

    def choose(head: Head, chunk: Sequence[int], votes: dict[int, float], queries: list[Tensor]) -> None:
        of_chunk = {entry[0]: entry for entry in head.entries if entry[0] in chunk}
        key, value = (torch.stack([of_chunk[position][part] for position in chunk]) for part in (1, 2))
        scores = torch.stack(queries) @ key.T
        attention = scores.softmax(dim=1)
        worth = attention.square().mean(dim=0).tolist()
        best = sorted(
            sorted(range(len(chunk)), key=lambda n: (-worth[n], n))[: round((1 - method.removed) * len(chunk))]
        )
        masses = torch.stack([(row - row.max()).exp() for row in scores])
        one, all_of_it = torch.ones(len(best), dtype=key.dtype), masses.sum(dim=1)
        for _ in range(method.steps):
            fitted = masses[:, best] @ one
            one = one * (masses[:, best].T @ all_of_it) / (masses[:, best].T @ fitted)
        one = one.clamp(min=1e-6)
        shares = torch.stack([row * one / (row * one).sum() for row in masses[:, best]])
        # min |shares v - attention value|^2 + ridge |v - v before|^2
        ridge = method.ridge * shares.square().sum(dim=0).mean()
        left = torch.cat([shares, ridge.sqrt() * torch.eye(len(best), dtype=key.dtype)])
        right = torch.cat([attention @ value, ridge.sqrt() * value[best]])
        values = torch.linalg.lstsq(left, right).solution
        for number, place in enumerate(best):
            head.bias[chunk[place]] = float(one[number].log())
            of_chunk[chunk[place]] = (chunk[place], key[place], values[number])
        head.entries = [
            of_chunk.get(entry[0], entry)
            for entry in head.entries
            if entry[0] not in chunk or entry[0] - chunk[0] in best
        ]

    return read_twice(model, ids, method, None, 1, choose)


def selection(model: Any, ids: Sequence[int], method: Selection, adapter: None) -> Tensor:
    """Algorithm 1 with a page's criticality from its extreme keys, the most of all query heads of a key head."""
    kv_heads, first, size = backbone_of(model).num_kv_heads, method.first_tokens, method.page_tokens

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, output = query.shape[0] // kv_heads, torch.zeros_like(query)
        for j in range(len(ids)):
            full = max(j - first - method.recent_tokens, 0) // size
            pages = [range(first + number * size, first + (number + 1) * size) for number in range(full)]
            raw = [*range(min(first, j + 1)), *range(first + full * size, j + 1)]
            for kv_head in range(kv_heads):
                heads = range(kv_head * groups, (kv_head + 1) * groups)
                critical = []
                for page in pages:
                    least, largest = key[heads[0], page].amin(dim=0), key[heads[0], page].amax(dim=0)
                    best = [float(torch.maximum(query[h, j] * least, query[h, j] * largest).sum()) for h in heads]
                    critical.append(max(best))
                order = sorted(range(full), key=lambda number, critical=critical: (-critical[number], number))
                chosen = [p for number in order[: method.read_tokens // size] for p in pages[number]]
                read = sorted({*raw, *chosen})
                for head in heads:
                    output[head, j] = (query[head, j] @ key[head, read].mT).softmax(dim=-1) @ value[head, read]
        return output

    return attended_by_hand(model, ids, attend)


METHODS = {
    "quantised": MethodTwin(
        cases={
            "quantised": Quantised(bits=4, first_tokens=2, recent_tokens=3, block_tokens=6),
            "quantised_wide": Quantised(bits=4, first_tokens=1, recent_tokens=0, block_tokens=34),
            "quantised_8": Quantised(bits=8, first_tokens=0, recent_tokens=0, block_tokens=4),
            "quantised_tiers": Quantised(
                bits=2, first_tokens=1, recent_tokens=4, block_tokens=5, finer_tokens=10, held_tokens=25
            ),
            "quantised_dropped": Quantised(bits=4, first_tokens=2, recent_tokens=5, block_tokens=4, held_tokens=0),
        },
        logits=quantised,
        served={"quantised": ("gemma3_text", Quantised(bits=4, recent_tokens=8, block_tokens=16, held_tokens=64))},
    ),
    "lookup": MethodTwin(
        cases={
            "lookup": Lookup(bits=4, read_tokens=6, block_tokens=5, first_tokens=2, recent_tokens=3),
            "lookup_host": Lookup(
                bits=8, read_tokens=3, block_tokens=4, first_tokens=0, recent_tokens=0, in_host_memory=True
            ),
        },
        logits=lookup,
        served={"lookup": ("gemma3_text", Lookup(read_tokens=16, block_tokens=8, recent_tokens=8))},
    ),
    "selection": MethodTwin(
        cases={
            "selection": Selection(read_tokens=8, page_tokens=4, first_tokens=2, recent_tokens=3),
            "selection_host": Selection(
                read_tokens=6, page_tokens=3, first_tokens=0, recent_tokens=0, in_host_memory=True
            ),
            "selection_none": Selection(read_tokens=0, page_tokens=5, first_tokens=1, recent_tokens=6),
        },
        logits=selection,
        served={"selection": ("phi", Selection(read_tokens=32, page_tokens=8, recent_tokens=8))},
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
    "attention_matching": MethodTwin(
        cases={
            "attention_matching": AttentionMatching(removed=0.6, chunk_tokens=11, first_tokens=2, recent_tokens=3),
            "attention_matching_more": AttentionMatching(
                removed=0.75, chunk_tokens=16, first_tokens=0, recent_tokens=1, steps=7, ridge=0.1
            ),
        },
        logits=attention_matching,
        served={
            "attention_matching": ("gemma3_text", AttentionMatching(removed=0.6, chunk_tokens=32, recent_tokens=8))
        },
    ),
}
