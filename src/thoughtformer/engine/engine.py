"""The one generation loop: ragged prefill, then one step a token for all rows still writing.

A row leaves the batch when it finishes, and its memory with it. What a row writes never depends on the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache import GPTHFCache
from thoughtformer.decode import RowSampler, SamplingParams, TextStream
from thoughtformer.engine.store import SentenceStore
from thoughtformer.errors import ContextOverflowError, InputError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.linear import pack_weights, unpack_weights
from thoughtformer.models.modeling_gpthf import compile_steps
from thoughtformer.text import SentenceTokenizer

__all__ = ["Completion", "Engine", "StreamEvent", "Usage"]

FinishReason = Literal["end_of_text", "stop_string", "length"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens read and written; sentence ends are tokens too, and also counted apart.

    `cached_prompt_tokens` are those of sentences that a store knew.
    """

    prompt_tokens: int
    prompt_sentence_ends: int
    cached_prompt_tokens: int
    new_tokens: int
    new_sentence_ends: int


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One token of one row: `text` is what it adds to the shown text, perhaps nothing."""

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of one prompt.

    Attributes:
        text: the new text, without the stop string.
        ids: the new tokens, sentence ends and a final end of text included.
        finish_reason: why it ended.
        usage: token counts.
        first_token_seconds: from the call to this row's first token.
        seconds: from the call to this row's last token.
        cache_bytes: held by the whole batch when this row ended.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    first_token_seconds: float
    seconds: float
    cache_bytes: int


@dataclass(eq=False)
class _Row:
    number: int
    ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    sampler: RowSampler
    stream: TextStream
    finish_reason: FinishReason | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    cache_bytes: int = 0
    cached_prompt_tokens: int = 0
    text: list[str] = field(default_factory=list)


def _most_tokens(rows: list[_Row]) -> int:
    """Tokens of the row that may grow longest."""
    return max(row.num_prompt_tokens + row.params.max_new_tokens for row in rows)


class Engine:
    """Continues prompts with a GPTHF or its plain GPT.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        max_rows: prompts that share a batch; more wait for the next.
        pack: on CPUs, give the weights a second copy that is 2 to 3 times as fast to read for few rows.
        compile: compile decoding of a single row; its first step then takes many seconds.
        store: sentences known from before; those that prompts bring anew are added.

    Raises:
        InputError: no rows.
        UnsupportedError: a store for a model without vectors of sentences.

    Packing and compiling belong to the model: of several engines on one model, the one that last began a batch decides.
    """

    def __init__(
        self,
        model: GPTHFForCausalLM,
        tokenizer: SentenceTokenizer,
        *,
        max_rows: int = 32,
        pack: bool = True,
        compile: bool = False,
        store: SentenceStore | None = None,
    ) -> None:
        if max_rows < 1:
            raise InputError(f"max_rows={max_rows} must be 1 or more.")
        self.model = model.eval()
        self.pack = pack
        self.compile = compile
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.sentences = None if store is None else store.of(model)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """A completion for each prompt, in their order; arguments and errors as in `stream`."""
        rows: list[_Row] = []
        for _ in self._run(prompts, params, rows):
            pass
        return [self._completion(row) for row in rows]

    def stream(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[StreamEvent]:
        """Every token as it is chosen; closing the iterator stops the work.

        Args:
            prompts: texts, or token ids that start with the end-of-text token.
            params: for all prompts, or one for each; default: greedy.

        Raises:
            InputError: an empty list of ids, or as many params as there are not prompts.
            ContextOverflowError: a prompt and its new tokens exceed the model's trained length.
        """
        yield from self._run(prompts, params, [])

    def _run(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        rows: list[_Row],
    ) -> Iterator[StreamEvent]:
        started = time.perf_counter()
        rows.extend(self._rows(prompts, params))
        for first in range(0, len(rows), self.max_rows):
            yield from self._run_batch(rows[first : first + self.max_rows], started)

    def _prepare(self) -> None:
        """Before every prefill, because the weights may have changed since the last."""
        if self.pack:
            pack_weights(self.model)
        else:
            unpack_weights(self.model)
        compile_steps(self.model, enabled=self.compile)

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row]) -> tuple[Float[Tensor, "rows vocab"], GPTHFCache]:
        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = torch.tensor([token for row in rows for token in row.ids], device=self.model.device)
        wanted = torch.zeros(len(ids), dtype=torch.bool)
        wanted[lengths.cumsum(0) - 1] = True
        cache = self.model.new_cache(len(rows))
        cache.reserve(_most_tokens(rows))
        logits, output = self.model.ragged_logits(
            ids,
            torch.arange(len(rows)).repeat_interleave(lengths),
            cache,
            wanted=wanted,
            sentence_source=self.sentences,
        )
        if output.known_tokens is not None:
            for row, known in zip(rows, output.known_tokens.tolist(), strict=True):
                row.cached_prompt_tokens = known
        return self._choices(logits, rows), cache

    @torch.inference_mode()
    def _step(self, rows: list[_Row], cache: GPTHFCache) -> Float[Tensor, "rows vocab"]:
        ids = torch.tensor([row.ids[-1] for row in rows], device=self.model.device)
        logits, _ = self.model.ragged_logits(ids, torch.arange(len(rows)), cache, num_columns=1)
        return self._choices(logits, rows)

    def _choices(self, logits: Float[Tensor, "rows vocab"], rows: list[_Row]) -> Float[Tensor, "rows vocab"]:
        """What each row may choose from."""
        logits, end = logits.float(), self.model.config.bos_token_id
        ignoring = [index for index, row in enumerate(rows) if row.params.ignore_end_of_text]
        if ignoring and end is not None:
            logits[ignoring, end] = float("-inf")
        return logits

    def _run_batch(self, rows: list[_Row], started: float) -> Iterator[StreamEvent]:
        self._prepare()
        logits, cache = self._prefill(rows)
        while True:
            likeliest = logits.argmax(-1).tolist()
            for index, row in enumerate(rows):
                token = likeliest[index] if row.params.is_plain_greedy else row.sampler.choose(row.ids, logits[index])
                text = self._accept(row, token)
                row.seconds = time.perf_counter() - started
                if len(row.ids) == row.num_prompt_tokens + 1:
                    row.first_token_seconds = row.seconds
                if row.finish_reason is not None:
                    row.cache_bytes = cache.num_bytes()
                yield StreamEvent(row=row.number, token=token, text=text, finish_reason=row.finish_reason)
            writing = [index for index, row in enumerate(rows) if row.finish_reason is None]
            if not writing:
                return
            if len(writing) < len(rows):
                rows = [rows[index] for index in writing]
                cache.select(torch.tensor(writing))
                cache.reserve(_most_tokens(rows))
            logits = self._step(rows, cache)

    def _accept(self, row: _Row, token: int) -> str:
        """Adds a token to its row; returns the text to show."""
        row.ids.append(token)
        text = row.stream.add(token)
        if token == self.model.config.bos_token_id:
            row.finish_reason = "end_of_text"
        elif row.stream.is_stopped:
            row.finish_reason = "stop_string"
        elif len(row.ids) - row.num_prompt_tokens >= row.params.max_new_tokens:
            row.finish_reason = "length"
        if row.finish_reason is not None:
            text += row.stream.finish()
            if row.stream.is_stopped:
                row.finish_reason = "stop_string"
        row.text.append(text)
        return text

    def _rows(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Row]:
        if isinstance(prompts, str):
            raise InputError("prompts is one string: give a list of prompts.")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InputError(
                f"{len(params)} sampling params for {len(prompts)} prompts: give one for all, or one each."
            )
        config = self.model.config
        exempt = [token for token in (config.sentence_end_token_id, config.bos_token_id) if token is not None]
        rows = []
        for number, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
            self._check(ids, param, number)
            sampler = RowSampler(param, exempt, self.model.device)
            stream = TextStream(self.tokenizer.backend_tokenizer, param.stop)
            rows.append(_Row(number, ids, len(ids), param, sampler, stream))
        return rows

    def _check(self, ids: Sequence[int], params: SamplingParams, number: int) -> None:
        config = self.model.config
        if not ids:
            raise InputError(
                f"prompt {number} has no tokens: start it with the end-of-text token, as for an empty text."
            )
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise InputError(f"prompt {number} has ids outside 0 to {config.vocab_size - 1}.")
        limit = config.max_position_embeddings
        needed = len(ids) + params.max_new_tokens
        if needed > limit and not config.allow_extrapolation:
            advice = (
                f"Lower max_new_tokens to {limit - len(ids)}"
                if len(ids) < limit
                else f"Shorten the prompt by at least {len(ids) + 1 - limit} tokens"
            )
            raise ContextOverflowError(
                f"prompt ({len(ids)} tokens) + max_new_tokens ({params.max_new_tokens}) = {needed}, but the model was "
                f"trained for {limit}. {advice}, or allow extrapolation (--allow-extrapolation)."
            )

    def _completion(self, row: _Row) -> Completion:
        assert row.finish_reason is not None
        end = self.model.config.sentence_end_token_id
        prompt, new = row.ids[: row.num_prompt_tokens], row.ids[row.num_prompt_tokens :]
        return Completion(
            text="".join(row.text),
            ids=new,
            finish_reason=row.finish_reason,
            usage=Usage(
                prompt_tokens=len(prompt),
                prompt_sentence_ends=0 if end is None else prompt.count(end),
                cached_prompt_tokens=row.cached_prompt_tokens,
                new_tokens=len(new),
                new_sentence_ends=0 if end is None else new.count(end),
            ),
            first_token_seconds=row.first_token_seconds,
            seconds=row.seconds,
            cache_bytes=row.cache_bytes,
        )
