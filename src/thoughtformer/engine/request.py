"""One request as the engine sees it: its ids, how they are chosen, its text, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from thoughtformer.cache.rows import RowsCache
from thoughtformer.decode import Drafter
from thoughtformer.errors import ContextOverflowError, InputError
from thoughtformer.runners.base import ContextFollower, RequestContext, Runner
from thoughtformer.sampling import Ends, FinishReason, Sampler, SamplingParams, TextStream, ends_of

__all__ = ["Completion", "Request", "StreamEvent", "Usage", "make_request"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens read and written; sentence ends are tokens too, and also counted apart.

    `cached_prompt_tokens` are those that were not read anew: of sentences that a store knew, or of a session.
    `drafted_tokens` were verified, and of these `accepted_draft_tokens` are among the new ones.
    """

    prompt_tokens: int
    prompt_sentence_ends: int
    cached_prompt_tokens: int
    new_tokens: int
    new_sentence_ends: int
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One token of one request: `text` is what it adds to the shown text, perhaps nothing.

    `row` is the request's number; of `Engine`, the place of its prompt. `token` is None where a request ends without
    one: cancelled, late, or failed. `context` is there if asked for.
    """

    row: int
    token: int | None
    text: str
    finish_reason: FinishReason | None
    context: RequestContext | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of one prompt.

    Attributes:
        text: the new text, without the stop string.
        ids: the new tokens, sentence ends and a final end or stop token included.
        finish_reason: why it ended.
        usage: token counts.
        first_token_seconds: from the call to this request's first token.
        seconds: from the call to this request's last token.
        cache_bytes: held by the whole batch when this request ended.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    first_token_seconds: float
    seconds: float
    cache_bytes: int


@dataclass(eq=False)
class Request:
    """A request from its submission to its end.

    Attributes:
        number: its name among the others.
        ids: prompt and what was written.
        num_prompt_tokens: of these, the prompt's.
        num_read: of these, how many `held` has.
        cache: its own: before it joined the batch, or, with `keeps_cache`, after it left.
        origin: where to go on from, copied once the request is admitted; `num_read` counts it already.
        keeps_cache: take the request's cache out of the batch when it ends.
        takes_drafts: several of its tokens may be read in one step.
        prediction: the tokens of `params.prediction`, where anything drafts.
        drafters: what drafts for it alone, by strategy; None: nothing has begun to.
        drafted_by: which of them made the last draft.
        num_drafted, num_right: drafted tokens that were verified, and those of them that were chosen.
        ends: where its text ends.
        most_entries: by stage, what it may hold at most.
        client: for turns among clients.
        deadline: on the monotonic clock; it ends then, wherever it stands.
        is_told: its last event has been told.
        follower: tells of its context, for its events; None: they say nothing of it.
        on_event: told of every event of this request, in the scheduler's thread.
    """

    number: int
    ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    ends: Ends
    most_entries: dict[str, int]
    client: str = ""
    deadline: float | None = None
    follower: ContextFollower | None = None
    on_event: Callable[[StreamEvent], None] | None = None
    num_read: int = 0
    num_known: int = 0
    cache: RowsCache | None = None
    origin: RowsCache | None = None
    keeps_cache: bool = False
    takes_drafts: bool = True
    prediction: Sequence[int] = ()
    drafters: dict[str, Drafter] | None = None
    drafted_by: str = ""
    num_drafted: int = 0
    num_right: int = 0
    is_cancelled: bool = False
    is_told: bool = False
    error: BaseException | None = None
    finish_reason: FinishReason | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    cache_bytes: int = 0
    text: list[str] = field(default_factory=list)
    _is_end_unshown: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens that it may grow to."""
        return self.num_prompt_tokens + self.params.max_new_tokens

    @property
    def has_ended_itself(self) -> bool:
        """Whether it came to an end of its own: not cancelled, late or failed."""
        return self.finish_reason in ("end_of_text", "stop_string", "stop_token", "length")

    @property
    def shown_ids(self) -> list[int]:
        """The ids without the token that ended the text, if one did."""
        return self.ids[:-1] if self._is_end_unshown else self.ids

    def limit_new_tokens(self, runner: Runner, max_new_tokens: int) -> None:
        """Another limit, before anything is written."""
        self.params = replace(self.params, max_new_tokens=max_new_tokens)
        self.most_entries = runner.most_entries(self.ids, max_new_tokens)

    def go_on_from(self, cache: RowsCache, num_tokens: int) -> None:
        """Has it read only what comes after its first `num_tokens`, which `cache`, of one row, has read already."""
        self.origin = cache
        self.num_read = self.num_known = num_tokens

    def accept(self, token: int) -> StreamEvent:
        """Adds a chosen token; the request may have ended then."""
        self.ids.append(token)
        reason = self.ends.reasons.get(token)
        self._is_end_unshown = reason is not None
        text = "" if self._is_end_unshown else self.stream.add(token)
        if reason is None and len(self.ids) - self.num_prompt_tokens >= self.params.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self.stream.finish()
        self.finish_reason = "stop_string" if self.stream.is_stopped else reason
        self.seconds = time.perf_counter() - self.submitted
        if len(self.ids) == self.num_prompt_tokens + 1:
            self.first_token_seconds = self.seconds
        return self._event(token, text)

    def end(self, reason: FinishReason) -> StreamEvent:
        """Ends it without another token; what was held back of its text is shown."""
        self.finish_reason = reason
        self.seconds = time.perf_counter() - self.submitted
        return self._event(None, self.stream.finish())

    def _event(self, token: int | None, text: str) -> StreamEvent:
        self.text.append(text)
        return StreamEvent(row=self.number, token=token, text=text, finish_reason=self.finish_reason)

    def completion(self, sentence_end: int | None) -> Completion:
        """What came of it, once it has ended."""
        assert self.finish_reason is not None
        prompt, new = self.ids[: self.num_prompt_tokens], self.ids[self.num_prompt_tokens :]
        return Completion(
            text="".join(self.text),
            ids=new,
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(prompt),
                prompt_sentence_ends=0 if sentence_end is None else prompt.count(sentence_end),
                cached_prompt_tokens=self.num_known,
                new_tokens=len(new),
                new_sentence_ends=0 if sentence_end is None else new.count(sentence_end),
                drafted_tokens=self.num_drafted,
                accepted_draft_tokens=self.num_right,
            ),
            first_token_seconds=self.first_token_seconds,
            seconds=self.seconds,
            cache_bytes=self.cache_bytes,
        )


def make_request(runner: Runner, prompt: str | Sequence[int], params: SamplingParams, *, number: int) -> Request:
    """A request for a prompt: text, or token ids, which start as the model's texts do.

    Raises:
        InputError: no ids, or ids that the model can't read.
        ContextOverflowError: prompt and new tokens exceed the model's trained length.
    """
    ids = runner.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if params.fits_room and runner.max_tokens is not None:
        room = max(runner.max_tokens - len(ids), 1)
        params = replace(params, max_new_tokens=min(params.max_new_tokens, room))
    check_prompt(runner, ids, params, number)
    ends = ends_of(params, end_ids=runner.end_ids, special_tokens=runner.special_tokens, vocab_size=runner.vocab_size)
    return Request(
        number=number,
        ids=ids,
        num_prompt_tokens=len(ids),
        params=params,
        sampler=Sampler(params, runner.exempt_ids, runner.device, never=ends.never),
        stream=TextStream(runner.tokenizer.backend_tokenizer, params.stop, ids),
        most_entries=runner.most_entries(ids, params.max_new_tokens),
        ends=ends,
        takes_drafts=params.drafts,
    )


def check_prompt(runner: Runner, ids: Sequence[int], params: SamplingParams, number: int) -> None:
    """Raises what `make_request` does."""
    if not ids:
        raise InputError(f"prompt {number} has no tokens: start it as a text, with the tokenizer's own start token.")
    if min(ids) < 0 or max(ids) >= runner.vocab_size:
        raise InputError(f"prompt {number} has ids outside 0 to {runner.vocab_size - 1}.")
    runner.check(ids, number)
    limit = runner.max_tokens
    needed = len(ids) + params.max_new_tokens
    if limit is not None and needed > limit:
        advice = (
            f"Ask for {limit - len(ids)} new tokens at most"
            if len(ids) < limit
            else f"Shorten the prompt by {needed - limit} tokens"
        )
        raise ContextOverflowError(
            f"prompt ({len(ids)} tokens) + {params.max_new_tokens} new tokens = {needed}, but the model was trained "
            f"for {limit}. {advice}, or load the model with allow_extrapolation (command line and server: "
            "--allow-extrapolation)."
        )
