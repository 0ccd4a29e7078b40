"""Texts in which some tokens written out are tokens and others are letters: which is which is told by place."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from thoughtformer.errors import InputError

__all__ = ["Marker", "Markers"]


NOT_APART = "this model's tokenizer can't keep its own special tokens apart from text that names them."
#: Contents of added tokens that are text like other text.
TEXT_ITSELF = "[\\s\u2581]*|<0x[0-9A-F]{2}>"


class Marker(NamedTuple):
    """A token written out in a text."""

    start: int
    end: int
    token: int


class Markers:
    """The added tokens of a tokenizer that a text may hold written out: special ones, and those beside the vocabulary.

    White space of a token of its own is none, nor is a byte's: they say nothing but themselves.

    Args:
        backend: the tokenizer; asked for its tokens once.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        self.contents = {
            token: one.content for token, one in added.items() if not re.fullmatch(TEXT_ITSELF, one.content)
        }
        self._tokens = {content: token for token, content in self.contents.items()}
        self._special = {token for token in self.contents if added[token].special}
        # Those are looked for in what the normalizer makes of a text, which only the tokenizer knows.
        self._is_normalized = backend.normalizer is not None and any(added[token].normalized for token in self.contents)
        alone = {content for token, content in self.contents.items() if added[token].single_word}
        self.pattern = _pattern(tuple(sorted(self._tokens.keys() - alone)), tuple(sorted(alone)))
        self._parts = _parts(tuple(sorted(self._tokens)))

    def is_special(self, token: int) -> bool:
        """Whether text leaves the token out."""
        return token in self._special

    def find(self, text: str) -> list[Marker]:
        """Those in a text, in order."""
        found = [Marker(*match.span(), self._tokens[match.group()]) for match in self.pattern.finditer(text)]
        if self._is_normalized:
            encoding = self.backend.encode(text, add_special_tokens=False)
            known = {marker.start for marker in found}
            found += [
                Marker(start, end, token)
                for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if token in self.contents and end > start and not any(place in known for place in range(start, end))
            ]
        return sorted(found)

    def is_cut_by(self, text: str) -> bool:
        """Whether a marker may begin or end where the text does, so that what comes beside it completes one."""
        heads, tails, longest = self._parts
        lengths = range(1, min(longest, len(text)) + 1)
        return any(text[-length:] in heads or text[:length] in tails for length in lengths)

    def encode(self, text: str, real: Sequence[Marker]) -> list[int]:
        """The ids of a text of whose markers the `real` ones alone are tokens.

        Raises:
            InputError: the tokenizer can't tell them apart.
        """
        if self.find(text) == sorted(real):
            return self.backend.encode(text, add_special_tokens=False).ids
        renamed = _renamed(self.backend, self.contents)
        parts, at = [], 0
        for marker in sorted(real):
            parts += [text[at : marker.start], renamed.names.get(marker.token, text[marker.start : marker.end])]
            at = marker.end
        ids = renamed.backend.encode("".join([*parts, text[at:]]), add_special_tokens=False).ids
        # Unknown words come of text as well.
        known = self.contents.keys() - {renamed.unknown}
        if [token for token in ids if token in known] != [one.token for one in sorted(real) if one.token in known]:
            raise InputError(NOT_APART)
        return ids


def _trie(contents: Iterable[str]) -> str:
    """A pattern for the longest of some strings, which looks at each character once however many there are."""
    branches: dict[str, list[str]] = {}
    ends_here = False
    for content in contents:
        if content:
            branches.setdefault(content[0], []).append(content[1:])
        else:
            ends_here = True
    if not branches:
        return ""
    parts = [re.escape(first) + _trie(rest) for first, rest in branches.items()]
    if len(parts) == 1 and not ends_here:
        return parts[0]
    return f"(?:{'|'.join(parts)}){'?' if ends_here else ''}"


@lru_cache(maxsize=8)
def _pattern(anywhere: tuple[str, ...], alone: tuple[str, ...]) -> re.Pattern[str]:
    """Any of `anywhere`, or of `alone` where no letters stand beside it."""
    parts = ([_trie(anywhere)] if anywhere else []) + ([rf"(?<!\w)(?:{_trie(alone)})(?!\w)"] if alone else [])
    return re.compile("|".join(parts) or "(?!)")


@lru_cache(maxsize=8)
def _parts(contents: tuple[str, ...]) -> tuple[set[str], set[str], int]:
    """All proper beginnings of the contents, all proper ends, and the longest's length."""
    heads = {content[:length] for content in contents for length in range(1, len(content))}
    tails = {content[-length:] for content in contents for length in range(1, len(content))}
    return heads, tails, max(map(len, heads), default=0)


class _Renamed(NamedTuple):
    """A tokenizer whose markers have names that nobody can write, these names by id, and the id of unknown words."""

    backend: Tokenizer
    names: dict[int, str]
    unknown: int | None
    contents: dict[int, str]


_RENAMED: WeakKeyDictionary[Any, _Renamed] = WeakKeyDictionary()


def _renamed(backend: Tokenizer, contents: Mapping[int, str]) -> _Renamed:
    known = _RENAMED.get(backend)
    if known is not None and known.contents == contents:
        return known
    nonce = f"q{secrets.token_hex(8)}"
    state = json.loads(backend.to_str())
    model = state["model"]
    merged = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges") or ()}
    # What merges lead to can't be kept from text by any name.
    names = {token: f"{nonce}n{token}z" for token, content in contents.items() if content not in merged}
    by_content = {contents[token]: name for token, name in names.items()}
    for token in state["added_tokens"]:
        token["content"] = by_content.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {by_content.get(content, content): number for content, number in model["vocab"].items()}
    else:
        model["vocab"] = [[by_content.get(content, content), score] for content, score in model["vocab"]]
    unknown = model.get("unk_id")
    if model.get("unk_token") is not None:
        unknown = backend.token_to_id(model["unk_token"])
        model["unk_token"] = by_content.get(model["unk_token"], model["unk_token"])
    state["post_processor"] = state["truncation"] = state["padding"] = None
    renamed = _Renamed(Tokenizer.from_str(json.dumps(state)), names, unknown, dict(contents))
    if any(renamed.backend.token_to_id(name) != token for token, name in names.items()):
        raise InputError(NOT_APART)
    _RENAMED[backend] = renamed
    return renamed
