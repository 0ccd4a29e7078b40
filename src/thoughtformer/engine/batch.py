"""The requests being written, a row of one cache each: prefill of any, one step for all, joining and leaving."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.engine.drafting import Drafting
from thoughtformer.engine.request import Request, StreamEvent
from thoughtformer.runners.base import Runner

__all__ = ["Batch"]


class Batch:
    """Requests that share each step; what one writes never depends on the others.

    Args:
        runner: the model.
        drafting: proposes tokens, which are verified together; None: one token a step.
    """

    def __init__(self, runner: Runner, drafting: Drafting | None = None) -> None:
        self.runner = runner
        self.drafting = drafting
        self.requests: list[Request] = []
        self.cache: RowsCache | None = None

    def num_bytes(self) -> int:
        """Held by all of them."""
        cache = self.cache  # once: another thread may ask while the last one leaves
        return 0 if cache is None else cache.num_bytes()

    @torch.inference_mode()
    def read(self, requests: Sequence[Request]) -> tuple[Float[Tensor, "rows vocab"], RowsCache]:
        """Reads whole prompts, without padding; returns logits, and what was kept of them."""
        self.runner.prepare()
        logits, cache, known = self.runner.read(
            [request.ids for request in requests], max(request.most_tokens for request in requests)
        )
        for request, num_known in zip(requests, known, strict=True):
            request.num_read = len(request.ids)
            request.num_known += num_known
        return self._choices(logits, requests), cache

    @torch.inference_mode()
    def read_piece(self, request: Request, num_tokens: int) -> Float[Tensor, "1 vocab"]:
        """Reads a request's next tokens into a cache of its own; logits after the last of them."""
        self.runner.prepare()
        if request.origin is not None:
            # A copy: a request that fails leaves what it went on from as it was.
            request.cache, request.origin = request.origin.fork_rows(torch.tensor([0])), None
        ids = request.ids[request.num_read : request.num_read + num_tokens]
        logits, request.cache, num_known = self.runner.read_on(ids, request.cache, request.most_tokens)
        request.num_read += len(ids)
        request.num_known += num_known
        return self._choices(logits, [request])

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, StreamEvent]]:
        """Every request's last token and what was drafted behind it, through the model; what is chosen then.

        Of a draft as many tokens stay as are chosen anyway, and one more is chosen behind them.
        """
        cache = self.cache
        assert cache is not None
        drafting = self.drafting
        drafts = [[]] * len(self.requests) if drafting is None else drafting.drafts(self.requests, cache)
        new = [[request.ids[-1], *draft] for request, draft in zip(self.requests, drafts, strict=True)]
        cache.autocommit = not any(drafts)
        started = time.perf_counter()
        logits = self.runner.verify(new, cache)
        for request in self.requests:
            request.num_read = len(request.ids)
        of_each = [request for request, ids in zip(self.requests, new, strict=True) for _ in ids]
        logits = self._choices(logits, of_each)
        if cache.autocommit:
            chosen = self.choose(logits, self.requests)
            if drafting is not None:
                drafting.took(len(new), len(new), time.perf_counter() - started)
                for request in self.requests:
                    drafting.observe(request, 0, 0)
            return list(zip(self.requests, chosen, strict=True))
        assert drafting is not None
        events, accepted, start = [], [], 0
        for request, draft in zip(self.requests, drafts, strict=True):
            chosen = list(self._chosen(request, draft, logits[start : start + len(draft) + 1]))
            events += [(request, event) for event in chosen]
            accepted.append(len(chosen))
            request.num_read = len(request.ids) - 1
            start += len(draft) + 1
        cache.commit(torch.tensor(accepted))
        cache.autocommit = True
        drafting.took(len(new), start, time.perf_counter() - started)
        for request, draft, number in zip(self.requests, drafts, accepted, strict=True):
            drafting.observe(request, len(draft), number - 1)
        return events

    def _chosen(
        self, request: Request, draft: Sequence[int], logits: Float[Tensor, "tokens vocab"]
    ) -> Iterator[StreamEvent]:
        """A request's tokens, until one isn't what was drafted."""
        for index, drafted in enumerate([*draft, None]):
            yield from self.choose(logits[index : index + 1], [request])
            if request.finish_reason is not None or request.ids[-1] != drafted:
                return

    def choose(self, logits: Float[Tensor, "rows vocab"], requests: Sequence[Request]) -> list[StreamEvent]:
        """Each request's next token, taken up by it."""
        likeliest = logits.argmax(-1).tolist()
        events = []
        for index, request in enumerate(requests):
            try:
                token = (
                    likeliest[index]
                    if request.params.is_plain_greedy
                    else request.sampler.choose(request.ids, logits[index])
                )
                event = request.accept(token)
            except Exception as error:  # no distribution to draw from, say: this request's affair alone
                request.error = error
                event = request.end("error")
            events.append(event)
        return events

    def with_contexts(self, events: Sequence[tuple[Request, StreamEvent]]) -> list[tuple[Request, StreamEvent]]:
        """The events of tokens, with the request's context where it is asked for; once all is committed."""
        told = []
        for request, event in events:
            if request.follower is not None and event.token is not None:
                assert self.cache is not None
                try:
                    context = request.follower.after(request.ids, self.cache, self.requests.index(request))
                    event = replace(event, context=context)
                except Exception as error:  # this request's affair alone
                    request.error = error
                    event = request.end("error")
            told.append((request, event))
        return told

    def join(self, requests: Sequence[Request], cache: RowsCache) -> None:
        """Takes in requests that have been read, with their cache, which is the batch's from now on."""
        for request in requests:
            request.cache = None
        if self.cache is None or not self.requests:
            self.requests, self.cache = list(requests), cache
            return
        self.requests += requests
        self.cache.join(cache)
        self.cache.reserve(max(request.most_tokens for request in self.requests))

    def drop_ended(self) -> list[Request]:
        """Lets go of those that have ended, and of their memory; those that keep their cache take it along."""
        staying = [index for index, request in enumerate(self.requests) if request.finish_reason is None]
        if len(staying) == len(self.requests) or self.cache is None:
            return []
        left = [request for request in self.requests if request.finish_reason is not None]
        if self.drafting is not None:
            for request in left:
                self.drafting.ended(request)
        num_bytes = self.num_bytes()
        for index, request in enumerate(self.requests):
            if request.finish_reason is not None:
                request.cache_bytes = num_bytes
                if request.keeps_cache and request.has_ended_itself:
                    request.cache = self.cache.fork_rows(torch.tensor([index]))
                    request.cache.reserve(0)
        self.requests = [self.requests[index] for index in staying]
        if self.requests:
            self.cache.select(torch.tensor(staying))
            self.cache.reserve(max(request.most_tokens for request in self.requests))
        else:
            self.cache = None
        return left

    def clear(self) -> list[Request]:
        """Lets go of everything; returns the requests."""
        requests, self.requests, self.cache = self.requests, [], None
        return requests

    def _choices(self, logits: Float[Tensor, "rows vocab"], requests: Sequence[Request]) -> Float[Tensor, "rows vocab"]:
        """What each may choose from."""
        logits = logits.float()
        for index, request in enumerate(requests):
            request.sampler.leave_out(logits[index])
        return logits
