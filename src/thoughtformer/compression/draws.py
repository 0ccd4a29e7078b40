"""Draws that depend on a seed and a position alone, so that rows and batches agree."""

from __future__ import annotations

__all__ = ["uniform"]


def uniform(seed: int, position: int) -> float:
    """A number from 0 to 1 that depends on seed and position alone (SplitMix64): the same for every row and batch."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (1 << 64) - 1
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)
