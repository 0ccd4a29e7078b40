"""What can go wrong, as exceptions.

    ThoughtformerError
    ├── InputError (ValueError)       a value somebody gave; the command line exits with 2
    │   ├── ArgumentError (TypeError) an argument that a function doesn't know
    │   ├── ContextOverflowError      more tokens than the model was trained for
    │   ├── CorpusError               text that can't be read: missing, empty, binary, wrong column
    │   ├── ConfigError               a recipe or configuration with an unknown key or a wrong value
    │   ├── CheckpointError           weights that are truncated, foreign, or pickled
    │   ├── StoreError                a sentence store that is damaged, or of another format
    │   ├── TooLargeError             a request that would never fit the limits
    │   ├── TokenizerError            a tokenizer without the tokens that the model needs
    │   └── OutputError               a place that can't be written to as asked
    ├── BusyError                     a session with a request under way
    ├── OverloadedError               more requests than may wait; the same one may do later
    ├── StoppedError                  requests to an engine that works no more
    └── UnsupportedError              a combination that can't be exact, refused instead of approximated

Every message says what was given, which limit it met, and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflowError",
    "CorpusError",
    "InputError",
    "OutputError",
    "OverloadedError",
    "StoppedError",
    "StoreError",
    "ThoughtformerError",
    "TokenizerError",
    "TooLargeError",
    "UnsupportedError",
    "nearest",
]


class ThoughtformerError(Exception):
    """Base of every exception that this package raises on purpose."""


class InputError(ThoughtformerError, ValueError):
    """A value that somebody gave can't be used."""


class ArgumentError(InputError, TypeError):
    """A function was given an argument that it doesn't know."""


class ContextOverflowError(InputError):
    """A text is longer than the model was trained for."""


class CorpusError(InputError):
    """A text source can't be read as what it was said to be."""


class ConfigError(InputError):
    """A configuration has an unknown key or a value out of range."""


class CheckpointError(InputError):
    """Weights are truncated, belong to another architecture, or come as a pickle."""


class StoreError(InputError):
    """A sentence store is damaged, or not one of ours."""


class TooLargeError(InputError):
    """A request needs more than all requests together may have."""


class TokenizerError(InputError):
    """A tokenizer lacks tokens that are needed."""


class OutputError(InputError):
    """An output folder or file can't be written as asked."""


class BusyError(ThoughtformerError):
    """A session takes one request at a time."""


class OverloadedError(ThoughtformerError):
    """More requests wait than may; the same request may do later."""


class StoppedError(ThoughtformerError):
    """The engine has stopped, or failed for good."""


class UnsupportedError(ThoughtformerError):
    """A combination that would not be exact."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint naming the choice closest to `name`, or all of them: ` Did you mean 'x'? Known: ...`."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."
