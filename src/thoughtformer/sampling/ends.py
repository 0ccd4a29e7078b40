"""Where a request's text ends: tokens that end it, and why it has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from thoughtformer.errors import InputError
from thoughtformer.sampling.sampler import SamplingParams

__all__ = ["Ends", "FinishReason", "ends_of"]

FinishReason = Literal["end_of_text", "stop_string", "stop_token", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Of one request.

    Attributes:
        reasons: by the tokens that end the text, which aren't shown, why it has ended then.
        never: tokens that are never chosen.
    """

    reasons: Mapping[int, FinishReason]
    never: tuple[int, ...] = ()


def ends_of(
    params: SamplingParams, *, end_ids: Iterable[int], special_tokens: Mapping[str, int], vocab_size: int
) -> Ends:
    """The ends that the model has and the request names.

    Args:
        params: the request's.
        end_ids: the model's.
        special_tokens: ids by what they are called: a stop string with one in it, which text could never show, ends
            the text at that token.
        vocab_size: ids are below.

    Raises:
        InputError: a stop token that the model hasn't.
    """
    stops: dict[int, FinishReason] = dict.fromkeys(params.stop_token_ids, "stop_token")
    outside = [token for token in stops if token >= vocab_size]
    if outside:
        raise InputError(f"stop_token_ids has {outside[0]}, but the model's ids are 0 to {vocab_size - 1}.")
    for content, token in special_tokens.items():
        if any(content in stop for stop in params.stop):
            stops[token] = "stop_string"
    others = [token for token in end_ids if token not in stops]
    if params.ignore_end_of_text:
        return Ends(reasons=stops, never=tuple(others))
    reasons: dict[int, FinishReason] = dict.fromkeys(others, "end_of_text")
    return Ends(reasons=reasons | stops)
