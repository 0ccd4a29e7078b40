"""Methods that drop tokens by their position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor

from thoughtformer.compression import Full, Local, RandomEviction, Scattered, SepLLM, Truncation
from thoughtformer.compression.draws import uniform
from twins import MethodTwin


def full(method: Full, ids: Sequence[int]) -> Iterator[range]:
    return (range(j + 1) for j in range(len(ids)))


def truncation(method: Truncation, ids: Sequence[int]) -> Iterator[range]:
    return (range(j // method.piece_tokens * method.piece_tokens, j + 1) for j in range(len(ids)))


def local(method: Local, ids: Sequence[int]) -> Iterator[range]:
    return (range(floor(j * method.removed), j + 1) for j in range(len(ids)))


def scattered(method: Scattered, ids: Sequence[int]) -> Iterator[list[int]]:
    """One vector for all queries; each token also reads itself."""
    kept = [position for position in range(len(ids)) if uniform(method.seed, position) >= method.removed]
    assert 0 < len(kept) < len(ids)
    for j in range(len(ids)):
        yield [*(position for position in kept if position < j), j]


def random(method: RandomEviction, ids: Sequence[int]) -> Iterator[list[int]]:
    """A full list loses the one with the least draw, of those that are neither the first nor the most recent."""
    held: list[int] = []
    for j in range(len(ids)):
        if len(held) == method.max_entries:
            may_go = [p for p in held if method.first_tokens <= p <= j - 1 - method.recent_tokens]
            held.remove(min(may_go, key=lambda p: uniform(method.seed, p)))
        held.append(j)
        yield list(held)


def sepllm(method: SepLLM, ids: Sequence[int]) -> Iterator[list[int]]:
    """Section 4.1: initial tokens, separators, neighbouring tokens; section 4.3: no more than some separators."""
    assert method.separator_ids
    for j in range(len(ids)):
        near = range(max(0, j - method.recent_tokens + 1), j + 1)
        separators = [p for p in range(method.first_tokens, near[0]) if ids[p] in method.separator_ids]
        if method.max_separators is not None:
            separators = separators[len(separators) - min(method.max_separators, len(separators)) :]
        yield sorted({*range(min(method.first_tokens, j + 1)), *separators, *near})


_SEPARATORS = frozenset(range(3, 15))
METHODS = {
    "sepllm": MethodTwin(
        cases={
            "sepllm": SepLLM(first_tokens=2, recent_tokens=5, separator_ids=_SEPARATORS),
            "sepllm_few": SepLLM(first_tokens=1, recent_tokens=4, max_separators=3, separator_ids=_SEPARATORS),
            "sepllm_alone": SepLLM(first_tokens=0, recent_tokens=1, max_separators=0, separator_ids=_SEPARATORS),
        },
        reads=sepllm,
        served={"sepllm": ("llama", SepLLM(recent_tokens=20, separator_ids=frozenset(range(10, 60))))},
    ),
    "full": MethodTwin(cases={"full": Full()}, reads=full),
    "truncation": MethodTwin(cases={"truncation": Truncation(piece_tokens=13)}, reads=truncation),
    "local": MethodTwin(cases={"local": Local(removed=0.6)}, reads=local),
    "scattered": MethodTwin(
        cases={"scattered": Scattered(removed=0.6), "scattered_otherwise": Scattered(removed=0.6, seed=3)},
        reads=scattered,
    ),
    "random": MethodTwin(
        cases={"random": RandomEviction(max_entries=15, first_tokens=2, recent_tokens=4)},
        reads=random,
        served={"random": ("gpt_neox", RandomEviction(max_entries=40, first_tokens=2, recent_tokens=4))},
    ),
}
