"""Sentence ends among tokens: where those go that a splitter finds in a text's characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from thoughtformer.text.splitting import SentenceEnd

__all__ = ["insert_ends"]


def insert_ends(
    ids: Sequence[int],
    token_offsets: Sequence[tuple[int, int]],
    sentence_ends: Sequence[SentenceEnd],
    *,
    sentence_end_token_id: int,
    max_sentence_tokens: int | None,
    min_sentence_tokens: int | None = None,
    close_last: bool,
    last_ink: int = -1,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with sentence ends among them, and for each the index of its token in `ids`, -1 for an end.

    An end follows the token that holds its sentence's last non-space character (the last such token, where a character
    spans several), or comes right before the one that shows it to be an end, if that is later. None comes last, where
    text may follow. So the ends among the first tokens of a text are those of the text that these tokens make.

    A sentence that reaches `max_sentence_tokens`, its end included, is closed by force unless the text stops there. One
    of fewer than `min_sentence_tokens` since the last end goes on into the next, unless a complete text ends with it.
    What comes later in a text never changes an end.

    Args:
        ids: plain token ids.
        token_offsets: per token, the characters that it holds (start, past the end).
        sentence_ends: as `SentenceSplitter.decided` gives them.
        sentence_end_token_id: the id to insert.
        max_sentence_tokens: None for no limit.
        min_sentence_tokens: None to keep every sentence apart; as much as the maximum makes blocks of equal length.
        close_last: the text is complete, so its last sentence ends too.
        last_ink: index of the last non-space character of a complete text; -1: it has none.
    """
    num_tokens = len(ids)
    if not num_tokens:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    after = np.zeros(num_tokens, dtype=bool)
    offsets = np.asarray(token_offsets, dtype=np.int64).reshape(num_tokens, 2)
    starts, stops = offsets[:, 0], offsets[:, 1]
    exempt = -1
    if len(sentence_ends):
        place, seen, unless = np.asarray(sentence_ends, dtype=np.int64).T
        # The first token that stops behind a character shows it.
        at = np.maximum(_holding(starts, place - 1), np.searchsorted(stops, seen, side="right") - 1)
        in_sight = stops[np.minimum(at + 1, num_tokens - 1)]
        stays = ((at < num_tokens - 1) | (seen < place)) & ((unless < 0) | (in_sight <= unless))
        after[at[stays]] = True
        if close_last and seen[-1] < place[-1]:
            exempt = int(at[-1])
    if max_sentence_tokens is not None or min_sentence_tokens is not None:
        _even_out(after, min_sentence_tokens or 0, max_sentence_tokens, exempt)
    if close_last and last_ink >= 0 and not after[_holding(starts, last_ink) :].any():
        after[-1] = True
    token_index = np.insert(np.arange(num_tokens), np.flatnonzero(after) + 1, -1)
    with_ends = np.where(token_index < 0, sentence_end_token_id, np.asarray(ids, dtype=np.int64)[token_index])
    return with_ends, token_index


def _holding(starts: np.ndarray, character: np.ndarray | int) -> Any:
    """The last token that starts at or before a character; starts never decrease."""
    return np.searchsorted(starts, character, side="right") - 1


def _even_out(after: np.ndarray, shortest: int, longest: int | None, exempt: int) -> None:
    """Takes away ends that come too early, but for `exempt`, and adds some where none comes for too long; in place."""
    last = len(after) - 1
    ends = np.flatnonzero(after).tolist()
    begin = 0
    for end in ends if ends and ends[-1] == last else [*ends, last]:
        if longest is not None:
            # Tokens begin..end are one sentence; one that fills the limit exactly ends there anyway.
            forced = range(begin + longest - 2, end, longest - 1)
            after[forced] = True
            begin += len(forced) * (longest - 1)
        if not after[end]:
            continue
        if end - begin + 2 < shortest and end != exempt:
            after[end] = False
        else:
            begin = end + 1
