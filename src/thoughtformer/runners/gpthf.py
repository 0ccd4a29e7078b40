"""A GPTHF, or its plain GPT, as the loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache import GPTHFCache
from thoughtformer.cache.rows import RowsCache
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.fingerprint import Followed, base_weights, exact_fingerprint
from thoughtformer.models.gpthf.modeling import compile_steps
from thoughtformer.models.packed_linear import pack_weights, unpack_weights, using_packed_weights
from thoughtformer.runners.base import ContextFollower, RequestContext, Runner, end_ids_of, identity_of
from thoughtformer.stores.model_sentences import StoredSentences
from thoughtformer.text import SentenceTokenizer

__all__ = ["GPTHFRunner"]

#: Keys of the configuration that change nothing in what is held.
UNNAMED = ("allow_extrapolation", "initializer_range", "use_cache", "model_type", "keys_to_ignore_at_inference")
#: Keys that came later: left out while they are None, so that a name stays what it was.
LATER = ("body_visibility_settings",)


class GPTHFRunner(Runner):
    """A GPTHF, or its plain GPT.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        sentences, pack, compile: see `Engine`.
    """

    def __init__(
        self,
        model: GPTHFForCausalLM,
        tokenizer: SentenceTokenizer,
        *,
        sentences: StoredSentences | None = None,
        pack: bool = True,
        compile: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sentences = sentences
        self.pack = pack
        self.compile = compile
        self._fingerprint = Followed(
            lambda: exact_fingerprint(model), lambda: (weight for _, weight in base_weights(model))
        )
        config = model.config
        self.vocab_size = config.vocab_size
        self.sentence_end = config.sentence_end_token_id
        self.start_ids = () if config.bos_token_id is None else (config.bos_token_id,)
        self.end_ids = end_ids_of(model, tokenizer, vocab_size=self.vocab_size, also=self.start_ids)
        # As `model.generate` has it.
        self.exempt_ids = self.start_ids if self.sentence_end is None else (self.sentence_end, *self.start_ids)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.model.device

    @property
    def max_tokens(self) -> int | None:
        config = self.model.config
        return None if config.allow_extrapolation else config.max_position_embeddings

    def prepare(self) -> None:
        if self.pack:
            pack_weights(self.model)
        else:
            unpack_weights(self.model)
        compile_steps(self.model, enabled=self.compile)

    def read(
        self, ids: Sequence[Sequence[int]], most_tokens: int
    ) -> tuple[Float[Tensor, "rows vocab"], RowsCache, list[int]]:
        cache = self.model.new_cache(len(ids))
        cache.reserve(most_tokens)
        logits, known = self._read(ids, cache)
        return logits, cache, known

    def read_on(
        self, ids: Sequence[int], cache: RowsCache | None, most_tokens: int
    ) -> tuple[Float[Tensor, "1 vocab"], RowsCache, int]:
        row_cache: RowsCache = self.model.new_cache(1) if cache is None else cache
        row_cache.reserve(most_tokens)
        logits, known = self._read([ids], row_cache)
        return logits, row_cache, known[0]

    def _read(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> tuple[Float[Tensor, "rows vocab"], list[int]]:
        lengths = torch.tensor([len(row) for row in ids])
        wanted = torch.zeros(int(lengths.sum()), dtype=torch.bool)
        wanted[lengths.cumsum(0) - 1] = True
        assert isinstance(cache, GPTHFCache)
        with using_packed_weights():
            logits, output = self.model.ragged_logits(
                torch.tensor([token for row in ids for token in row], device=self.device),
                torch.arange(len(ids)).repeat_interleave(lengths),
                cache,
                wanted=wanted,
                sentence_source=self.sentences,
            )
        return logits, [0] * len(ids) if output.known_tokens is None else output.known_tokens.tolist()

    def step(self, ids: Sequence[int], cache: RowsCache) -> Float[Tensor, "rows vocab"]:
        assert isinstance(cache, GPTHFCache)
        new = torch.tensor(ids, device=self.device)
        with using_packed_weights():
            return self.model.ragged_logits(new, torch.arange(len(ids)), cache, num_columns=1)[0]

    def _verify(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> Float[Tensor, "tokens vocab"]:
        assert isinstance(cache, GPTHFCache)
        new = torch.tensor([token for row in ids for token in row], device=self.device)
        row = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(row) for row in ids]))
        with using_packed_weights():
            return self.model.ragged_logits(new, row, cache)[0]

    def most_entries(self, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
        return self.model.model.most_entries(prompt, num_new_tokens)

    def most_bytes(self, most_entries: Sequence[dict[str, int]], most_tokens: int) -> int:
        longest = {stage: max(row[stage] for row in most_entries) for stage in most_entries[0]}
        return self.model.model.cache_bytes(longest, len(most_entries), reserve_tokens=most_tokens)

    def check_history(self, cache: RowsCache, ids: Sequence[int]) -> None:
        assert isinstance(cache, GPTHFCache)
        self.model.model.check_history(cache, ids)

    def new_follower(self) -> ContextFollower:
        return _Follower(self)

    def parts(self, ids: Sequence[int]) -> tuple[str, list[str], str]:
        closed, start = [], 0
        for place, token in enumerate(ids):
            if token == self.sentence_end:
                closed.append(self.decode(ids[start:place]))
                start = place + 1
        return "", closed, self.decode(ids[start:])

    def identity(self) -> str:
        config = self.model.config
        shape = {name: getattr(config, name) for name in sorted(GPTHFConfig.__annotations__) if name not in UNNAMED}
        shape = {name: value for name, value in shape.items() if name not in LATER or value is not None}
        return identity_of(self._fingerprint(), shape, self.model.dtype)

    def piece(self, ids: Sequence[int], most: int | None) -> int:
        size, end = super().piece(ids, most), self.sentence_end
        if size < len(ids) and self.sentences is not None and end is not None and end in ids[:size]:
            return size - list(ids[:size])[::-1].index(end)  # whole sentences, so that they can be known
        return size


class _Follower(ContextFollower):
    """Counts sentence ends and starts of documents as they come."""

    def __init__(self, runner: GPTHFRunner) -> None:
        self.runner = runner
        self.num_counted = self.num_sentences = self.num_starts = 0
        #: Where the open sentence begins.
        self.opened = 0

    def after(self, ids: Sequence[int], cache: RowsCache, index: int) -> RequestContext:
        assert isinstance(cache, GPTHFCache)
        for place in range(self.num_counted, len(ids)):
            is_end, is_start = ids[place] == self.runner.sentence_end, ids[place] in self.runner.start_ids
            self.num_sentences, self.num_starts = self.num_sentences + is_end, self.num_starts + is_start
            self.opened = place + 1 if is_end or is_start else self.opened
        self.num_counted = len(ids)
        model, config = self.runner.model, self.runner.model.config
        shape = config.layer_shape("decoder")
        entry = 2 * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize
        return RequestContext(
            closed_sentences=self.num_sentences,
            open_tokens=len(ids) - self.opened,
            held_bytes=model.model.cache_bytes({stage.name: int(stage.lengths[index]) for stage in cache.stages}, 1),
            plain_bytes=entry * (len(ids) - self.num_sentences - self.num_starts),
        )
