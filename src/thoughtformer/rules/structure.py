"""Where each token stands: its row, document, sentence and positions.

The model takes ragged text: the tokens of all rows, one row after the other, without padding (axis `tokens`). Which
tokens close a sentence, and which start a document, is read off the token ids, so that the parallel forward and the
step-by-step decode derive the same structure from the same ids:

    row 0:  <eot>  The  cat  sat  .  <eos>  It  slept
    document  1     1    1    1   1    1     1    1
    sentence  0     1    1    1   1    1     2    2
    offset    0     0    1    2   3    4     0    1      index inside the sentence
    position  0     1    2    3   4    5     6    7      index inside the document
    is_end    *                        *                 closes its sentence

`<|endoftext|>` starts a document and is a sentence of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = [
    "RowCounters",
    "TokenStructure",
    "document_ordinal",
    "in_current_document",
    "in_recent_sentences",
    "is_earlier",
    "read_structure",
    "sentence_ordinal",
    "starts_document",
    "summaries_of",
    "with_summaries",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStructure:
    """The place of each of some tokens, or of each cache entry; all fields have one shape, on the CPU."""

    row: Int[Tensor, "*shape"]
    document: Int[Tensor, "*shape"]
    sentence: Int[Tensor, "*shape"]
    offset: Int[Tensor, "*shape"]
    position: Int[Tensor, "*shape"]
    is_end: Bool[Tensor, "*shape"]

    def __len__(self) -> int:
        return self.row.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStructure:
        """The same structure with `function` applied to every field."""
        return TokenStructure(
            row=function(self.row),
            document=function(self.document),
            sentence=function(self.sentence),
            offset=function(self.offset),
            position=function(self.position),
            is_end=function(self.is_end),
        )

    def at(self, index: Int[Tensor, " chosen"]) -> TokenStructure:
        """Those at `index`, whose members increase; copied only if some are left out."""
        return self if index.shape[0] == len(self) else self[index]

    @cached_property
    def has_ends(self) -> bool:
        """Whether any closes its sentence, which most steps of decoding don't."""
        return bool(self.is_end.any())

    def is_one_a_row(self, num_rows: int) -> bool:
        """Whether these are one token of each of `num_rows` rows, in order: a decode step."""
        return len(self) == num_rows and (num_rows == 1 or bool((self.row == torch.arange(num_rows)).all()))

    def __getitem__(self, index: Tensor | slice) -> TokenStructure:
        return self.map(lambda field: field[index])


@dataclass(eq=False, kw_only=True)
class RowCounters:
    """Per row, where the next token will stand (unless it is an `<|endoftext|>`, which starts a new document)."""

    document: Int[Tensor, " rows"]
    sentence: Int[Tensor, " rows"]
    offset: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]

    @classmethod
    def zeros(cls, num_rows: int) -> RowCounters:
        return cls(**{field.name: torch.zeros(num_rows, dtype=torch.long) for field in fields(cls)})

    def __len__(self) -> int:
        return self.document.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> RowCounters:
        """The same counters with `function` applied to every field."""
        return RowCounters(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def after(self, tokens: TokenStructure) -> RowCounters:
        """Where each row's next token will stand once `tokens` (ordered by row) have been read."""
        if len(tokens) == 0:
            return self
        if tokens.is_one_a_row(len(self)):
            return RowCounters(
                document=tokens.document,
                sentence=tokens.sentence + tokens.is_end,
                offset=torch.where(tokens.is_end, 0, tokens.offset + 1),
                position=tokens.position + 1,
            )
        is_last = torch.ones(len(tokens), dtype=torch.bool)
        is_last[:-1] = tokens.row[1:] != tokens.row[:-1]
        last = tokens[is_last]
        counters = self.map(torch.clone)
        counters.document[last.row] = last.document
        counters.position[last.row] = last.position + 1
        counters.sentence[last.row] = last.sentence + last.is_end.long()
        counters.offset[last.row] = torch.where(last.is_end, 0, last.offset + 1)
        return counters


def read_structure(
    input_ids: Int[Tensor, " tokens"],
    row: Int[Tensor, " tokens"],
    counters: RowCounters,
    *,
    sentence_end_token_id: int | None,
    document_start_token_id: int | None,
) -> TokenStructure:
    """The structure of new tokens that follow what `counters` has already seen.

    `row` must not decrease; both tensors live on the CPU. With `sentence_end_token_id=None` a document is one
    sentence, but for the `<|endoftext|>` that starts it.
    """
    num_tokens = input_ids.shape[0]
    nothing = torch.zeros(num_tokens, dtype=torch.bool)
    starts = nothing if document_start_token_id is None else input_ids == document_start_token_id
    is_end = starts if sentence_end_token_id is None else starts | (input_ids == sentence_end_token_id)
    num_rows = len(counters)
    if num_tokens == num_rows and (num_rows == 1 or bool((row == torch.arange(num_rows)).all())):
        # One token a row: the decode step. Same answer as below, without the running sums.
        return TokenStructure(
            row=row,
            document=counters.document + starts.long(),
            sentence=torch.where(starts, 0, counters.sentence),
            offset=torch.where(starts, 0, counters.offset),
            position=torch.where(starts, 0, counters.position),
            is_end=is_end,
        )

    index = torch.arange(num_tokens)
    is_first = torch.ones(num_tokens, dtype=torch.bool)
    is_first[1:] = row[1:] != row[:-1]
    row_start = torch.cummax(torch.where(is_first, index, 0), dim=0).values
    # The last <|endoftext|> at or before each token, and the last close strictly before it; -1 where there is none.
    document_start = torch.cummax(torch.where(starts, index, -1), dim=0).values
    last_close = torch.full((num_tokens,), -1)
    last_close[1:] = torch.cummax(torch.where(is_end, index, -1), dim=0).values[:-1]
    in_new_document = document_start >= row_start
    in_new_sentence = last_close >= row_start

    starts_seen = starts.long().cumsum(0)
    ends_before = is_end.long().cumsum(0) - is_end.long()
    document = counters.document[row] + starts_seen - (starts_seen - starts.long())[row_start]
    sentence_in_document = ends_before - ends_before[document_start.clamp(min=0)]
    sentence = torch.where(
        in_new_document, sentence_in_document, counters.sentence[row] + ends_before - ends_before[row_start]
    )
    position = torch.where(in_new_document, index - document_start, counters.position[row] + index - row_start)
    sentence_start = torch.maximum(last_close + 1, document_start)
    offset = torch.where(
        in_new_document | in_new_sentence, index - sentence_start, counters.offset[row] + index - row_start
    )
    return TokenStructure(
        row=row, document=document, sentence=sentence, offset=offset, position=position, is_end=is_end
    )


def summaries_of(tokens: TokenStructure, count: int) -> tuple[Int[Tensor, " summaries"], TokenStructure]:
    """`count` entries for each sentence end: the index of their end, and their structure.

    They share their end's place; `offset` numbers those of one sentence, and `position` orders all of a document.
    """
    index = tokens.is_end.nonzero().squeeze(1)
    if count == 1:
        return index, tokens[index]
    number = torch.arange(count).repeat(len(index))
    index = index.repeat_interleave(count)
    end = tokens[index]
    fields_of_end = {field.name: getattr(end, field.name) for field in fields(end)}
    return index, TokenStructure(**(fields_of_end | {"offset": number, "position": end.position * count + number}))


def with_summaries(tokens: TokenStructure, count: int) -> tuple[Int[Tensor, " entries"], TokenStructure]:
    """`tokens` with each sentence end `count` times in place of once: each entry's token, and its structure.

    Repeated ends go on counting positions as further tokens of their sentence would.
    """
    repeats = torch.where(tokens.is_end, count, 1)
    index = torch.repeat_interleave(torch.arange(len(tokens)), repeats)
    number = torch.arange(len(index)) - (repeats.cumsum(0) - repeats)[index]
    token = tokens[index]
    fields_of_token = {field.name: getattr(token, field.name) for field in fields(token)}
    moved = {"offset": token.offset + number, "position": token.position + number}
    return index, TokenStructure(**(fields_of_token | moved))


def _ordinal(*keys: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """Counts runs of equal keys: 0 for the first run, 1 for the next, and so on."""
    changes = torch.zeros_like(keys[0])
    for key in keys:
        changes[1:] |= (key[1:] != key[:-1]).long()
    return changes.cumsum(0)


def document_ordinal(tokens: TokenStructure) -> Int[Tensor, " tokens"]:
    """The number of each token's document, of all rows' documents in order."""
    return _ordinal(tokens.row, tokens.document)


def sentence_ordinal(tokens: TokenStructure) -> Int[Tensor, " tokens"]:
    """The number of each token's sentence, of all rows' sentences in order."""
    return _ordinal(tokens.row, tokens.document, tokens.sentence)


def is_earlier(query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
    """Whether the key is the query itself or before it in its document."""
    same_document = (query.row == key.row) & (query.document == key.document)
    return same_document & (key.position <= query.position)


def in_current_document(entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
    """Whether an entry is of the document where its row now stands."""
    return entry.document == counters.document[entry.row]


def in_recent_sentences(entry: TokenStructure, counters: RowCounters, recent: int) -> Bool[Tensor, "*shape"]:
    """Whether an entry is of the open sentence, or of one of the `recent` before it."""
    return in_current_document(entry, counters) & (entry.sentence >= counters.sentence[entry.row] - recent)


def starts_document(new: TokenStructure) -> bool:
    """Whether any of these starts another document than its row's first."""
    return bool(((new.position == 0) & (new.document > 0)).any())
