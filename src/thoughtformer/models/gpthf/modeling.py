"""GPTHF without its head: a word-level encoder, then a sentence-level body, and in an hourglass a word-level decoder.

    ids -> embedding -> stage "encoder" (own sentence) -> stage "body" (sentence ends, ...) -> RMSNorm -> tied head

    hourglass:  ids -> embedding -> encoder ---------------------> decoder (own sentence, summaries) -> RMSNorm -> head
                                       \\-> body, sentence ends only -> summaries of earlier sentences ^

The parallel forward and the step-by-step decode are one function, `GPTHFModel.forward`: it takes ragged tokens, reads
their structure off their ids, lets only those tokens pass a stage that something later depends on, and attends either
by plan (nothing held yet) or to the cache.

Over 400 lines, because what passes which stage is one piece of reasoning, and is read as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from thoughtformer.cache import GPTHFCache, StageCache
from thoughtformer.errors import ContextOverflowError, UnsupportedError
from thoughtformer.models.gpthf.cache_sizes import (
    CachedStage,
    cache_bytes,
    cached_stages,
    check_history,
    most_entries,
    new_cache,
)
from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.models.gpthf.depths import DepthGains, with_depths
from thoughtformer.models.gpthf.encoding import Encoded, Encoding
from thoughtformer.models.gpthf.known_sentences import KnownSentences, SentenceSource, find_known
from thoughtformer.models.gpthf.layers import Layer, residual_projections
from thoughtformer.models.gpthf.outputs import RaggedOutput, SentenceVectors
from thoughtformer.models.gpthf.stage_specs import stage_specs
from thoughtformer.models.gpthf.stages import DecoderStage, Pass, Stage, Summaries, rows_at
from thoughtformer.rules import (
    BODY_RULES,
    RowCounters,
    TokenStructure,
    read_structure,
    summaries_of,
)

__all__ = ["GPTHFModel", "GPTHFPreTrainedModel", "compile_steps"]


class GPTHFPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving."""

    config_class = GPTHFConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012  these are transformers' declarations
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

    @property
    def device(self) -> torch.device:
        """Where the model computes, also while accelerate's hooks keep its weights elsewhere."""
        device = super().device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            device = torch.device(next((place for place in places if place is not None), device))
        return device

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this source into every folder that is saved."""

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UnsupportedError(
                "gradient checkpointing with use_reentrant=True loses the gradients of what a layer reads beside its "
                "input, such as summaries of sentences. Leave it out: False is the default."
            )
        layers = [module for module in self.modules() if isinstance(module, Layer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and number % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.ParameterList):  # the gains of depths
            for gain in module:
                init.zeros_(gain)
        if isinstance(module, Layer):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            for weight in residual_projections(module):
                init.normal_(weight, mean=0.0, std=std)


class GPTHFModel(GPTHFPreTrainedModel):
    """The stages without the head, over ragged tokens."""

    #: Whether a step of one row passes each stage's layers as one compiled function.
    compiles_steps = False

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(
            Stage(spec) if spec.summaries is None else DecoderStage(spec) for spec in stage_specs(config)
        )
        more = config.summaries_per_sentence - 1
        self.summary_tokens = nn.Embedding(more, config.hidden_size) if more else None
        self.body_depths = (
            DepthGains(config.num_encoder_layers, config.hidden_size) if config.body_reads_depths else None
        )
        self.memory_depths = (
            DepthGains(config.num_encoder_layers, config.hidden_size) if config.decoder_reads_depths else None
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.embed_tokens)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def _stage_list(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))

    def _cached_stages(self) -> list[CachedStage]:
        """What a cache holds, in its order."""
        return cached_stages(self._stage_list())

    def new_cache(self, num_rows: int) -> GPTHFCache:
        """An empty cache for `num_rows` rows, in the model's dtype and on its device."""
        return new_cache(self._cached_stages(), num_rows, dtype=self.dtype, device=self.device)

    def cache_bytes(self, longest_row_entries: dict[str, int], num_rows: int, *, reserve_tokens: int = 0) -> int:
        """What `num_bytes()` of a committed cache must be, given each stage's longest row and the reserve.

        Stages are `encoder`, `body`, and in an hourglass `decoder` and `memory`, the summaries that it reads.
        """
        return cache_bytes(self._cached_stages(), longest_row_entries, num_rows, reserve_tokens, self.dtype)

    def most_entries(self, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
        """The most entries of each stage that a row holds between steps, once it has read and written so much.

        For `cache_bytes`. Of the prompt's sentence ends it knows the number; of new tokens every other may be one.
        """
        return most_entries(self._cached_stages(), cast(GPTHFConfig, self.config), prompt, num_new_tokens)

    def check_history(self, cache: GPTHFCache, ids: Sequence[int]) -> None:
        """Raises `ValueError` unless a cache of one row is that of these ids, as far as bookkeeping tells."""
        row = torch.zeros(len(ids), dtype=torch.long)
        check_history(self._cached_stages(), cache, self._structure(torch.tensor(ids), row, RowCounters.zeros(1)))

    @property
    def sentence_vector_shape(self) -> tuple[int, int, int]:
        """What the encoder's vector of a sentence is: (depths that are read, summaries, hidden size).

        Raises:
            UnsupportedError: later stages read more of a sentence than its vector.
        """
        config = self.config
        if not config.num_encoder_layers or not BODY_RULES[config.body_visibility].ends_suffice:
            those = " or ".join(repr(name) for name, rule in BODY_RULES.items() if rule.ends_suffice)
            raise UnsupportedError(
                f"a model with num_encoder_layers={config.num_encoder_layers} and body_visibility="
                f"{config.body_visibility!r} has no vectors of sentences that could be kept: it needs an encoder, and "
                f"a {those} body."
            )
        depths = config.num_encoder_layers + 1 if self._encoding().reads_depths else 1
        return depths, config.summaries_per_sentence, config.hidden_size

    @torch.no_grad()
    def remember_sentences(self, input_ids: Int[Tensor, " tokens"], source: SentenceSource) -> None:
        """Has the encoder read those whole sentences that `source` doesn't know, and tells it of them.

        Texts may be longer than the model's trained length: sentences are read one by one. Those without an end are
        left out.
        """
        row = torch.zeros(len(input_ids), dtype=torch.long)
        counters = RowCounters.zeros(1)
        tokens = self._structure(input_ids, row, counters)
        known = find_known(source, input_ids, tokens, torch.zeros(len(tokens), dtype=torch.bool))
        shared = Pass(
            after=counters,
            is_fresh=True,
            is_step=False,
            is_dense=self.config._attn_implementation == "eager",
            compiles=False,
        )
        self._encoding().encode_new(input_ids, tokens, shared, None, known)

    def forward(
        self,
        input_ids: Int[Tensor, " tokens"],
        row: Int[Tensor, " tokens"],
        cache: GPTHFCache | None = None,
        *,
        num_rows: int | None = None,
        num_columns: int = 0,
        wanted: Bool[Tensor, " tokens"] | None = None,
        output_hidden_states: bool = False,
        keep_sentences: bool = False,
        sentence_source: SentenceSource | None = None,
    ) -> RaggedOutput:
        """The hidden states of the `wanted` tokens (all by default), after the final norm.

        Args:
            input_ids: the new tokens of all rows, row after row, without padding.
            row: each token's row, on the CPU, never decreasing.
            cache: what the rows have read before; updated.
            num_rows: rows without a cache; default: those named.
            num_columns: by how much the cache's `get_seq_length` grows.
            wanted: on the CPU.
            output_hidden_states: also return every layer's output, of all tokens.
            keep_sentences: also return the vectors of sentences.
            sentence_source: sentences known from before, which then skip the encoder; it takes up those that are new.
                Without gradients, and where nothing may be rolled back, only.

        Raises:
            ContextOverflowError: a document grows past `max_position_embeddings`, and `allow_extrapolation` is off.
        """
        if cache is not None:
            counters = cache.counters
        else:
            counters = RowCounters.zeros(num_rows if num_rows is not None else int(row.max()) + 1 if len(row) else 0)
        tokens = self._structure(input_ids, row, counters)
        self._check_length(tokens)
        if wanted is None:
            wanted = torch.ones(len(tokens), dtype=torch.bool)
        after = counters.after(tokens)
        passing = self._passing(tokens, after, cache, wanted, keep_all=output_hidden_states)

        shared = Pass(
            after=after,
            is_fresh=cache is None or (cache.is_fresh and cache.autocommit),
            is_step=tokens.is_one_a_row(len(counters)),
            is_dense=self.config._attn_implementation == "eager",
            compiles=self.compiles_steps,
        )
        caches = dict.fromkeys(stage.name for stage in self._cached_stages()) if cache is None else cache.by_name()
        known = None
        # Uncommitted tokens are counted in each stage.
        may_skip = (cache is None or cache.autocommit) and not (output_hidden_states or keep_sentences)
        if sentence_source is not None and may_skip and not torch.is_grad_enabled():
            known = find_known(sentence_source, input_ids, tokens, passing[self._stage_list()[-1].name])
        lengths = [] if cache is None else cache.lengths()
        try:
            last, index, vectors, states = self._through_stages(
                input_ids, tokens, passing, shared, caches, output_hidden_states, keep_sentences, known
            )
            is_wanted = wanted[index]
            if not bool(is_wanted.all()):
                last = last[is_wanted.to(last.device)]
            last = self.norm(last)
        except BaseException:
            if cache is not None:
                cache.restore(lengths)  # never leave a step half written
            raise
        if cache is not None:
            cache.record(tokens, after, num_columns)
        return RaggedOutput(
            last_hidden_state=last,
            tokens=tokens.at(index[is_wanted]),
            hidden_states=states if output_hidden_states else None,
            sentences=vectors,
            known_tokens=None if known is None else torch.bincount(row[known.is_known], minlength=len(counters)),
        )

    def _through_stages(
        self,
        input_ids: Int[Tensor, " tokens"],
        tokens: TokenStructure,
        passing: dict[str, Bool[Tensor, " tokens"]],
        shared: Pass,
        caches: Mapping[str, StageCache | None],
        keeps_states: bool,
        keeps: bool,
        known: KnownSentences | None,
    ) -> tuple[Float[Tensor, "passing hidden"], Int[Tensor, " passing"], SentenceVectors | None, list[Tensor]]:
        """The last stage's output for the tokens that pass it, their indices, sentence vectors, and all layers' states.

        The last two if they are to be kept.
        """
        stages = {stage.name: stage for stage in self._stage_list()}
        encoding, encoder_cache = self._encoding(), caches.get("encoder")
        if known is None:
            encoded = encoding.encode(input_ids, tokens, shared, encoder_cache, keeps_depths=keeps_states)
        else:
            encoded = encoding.encode_new(input_ids, tokens, shared, encoder_cache, known)
        kept = [rows_at(depth, encoded.token_index) for depth in encoded.depths] if keeps_states else []
        if "decoder" in stages:
            summaries, vectors = self._summaries(encoded, tokens, stages["body"], shared, caches["body"], keeps)
            index = passing["decoder"].nonzero().squeeze(1)
            states = rows_at(encoded.states, encoded.token_index[index])
            decoder = cast(DecoderStage, stages["decoder"])
            states, outputs = decoder.decode(
                states, tokens.at(index), summaries, shared, caches["decoder"], caches["memory"], keeps_states
            )
            return states, index, vectors, kept + outputs
        index = passing["body"].nonzero().squeeze(1)
        states = rows_at(self._into_body(encoded), encoded.token_index[index])
        states, outputs = stages["body"](states, tokens.at(index), shared, caches["body"], keeps_states)
        vectors = self._sentence_vectors(tokens, encoded.states, states, index) if keeps else None
        return states, index, vectors, kept + outputs

    def _encoding(self) -> Encoding:
        config = self.config
        return Encoding(
            embed_tokens=cast(nn.Embedding, self.embed_tokens),
            summary_tokens=self.summary_tokens,
            encoder=self._stage_list()[0] if config.num_encoder_layers else None,
            num_summaries=config.summaries_per_sentence,
            reads_depths=config.body_reads_depths or config.decoder_reads_depths,
        )

    def _into_body(self, encoded: Encoded) -> Float[Tensor, "entries hidden"]:
        if self.body_depths is None:
            return encoded.states
        return with_depths(encoded.states, encoded.depths, self.body_depths())

    def _summaries(
        self,
        encoded: Encoded,
        tokens: TokenStructure,
        body: Stage,
        shared: Pass,
        cache: StageCache | None,
        keeps: bool,
    ) -> tuple[Summaries, SentenceVectors | None]:
        """What an hourglass's body makes of sentence ends, and the vectors of sentences, if to be kept."""
        if not keeps and not tokens.has_ends:
            return Summaries(states=encoded.states[:0], structure=tokens[:0]), None
        count = self.config.summaries_per_sentence
        end_index, structure = summaries_of(tokens, count)
        # Repeated ends follow their end.
        entry = encoded.token_index[end_index] + torch.arange(count).repeat(len(end_index) // count)
        states, _ = body(rows_at(self._into_body(encoded), entry), structure, shared, cache)
        vectors = None
        if keeps:
            last = slice(count - 1, None, count)
            vectors = SentenceVectors(
                encoder=rows_at(encoded.states, entry[last]), body=states[last], structure=structure[last]
            )
        if self.memory_depths is not None:
            at_ends = [rows_at(depth, entry) for depth in encoded.depths]
            states = with_depths(states, at_ends, self.memory_depths())
        return Summaries(states=states, structure=structure), vectors

    def _sentence_vectors(
        self,
        tokens: TokenStructure,
        encoded: Float[Tensor, "tokens hidden"],
        states: Float[Tensor, "passing hidden"],
        index: Int[Tensor, " passing"],
    ) -> SentenceVectors:
        is_end = tokens.is_end[index]
        at_ends = index[is_end]
        body = rows_at(states, is_end.nonzero().squeeze(1))
        return SentenceVectors(encoder=rows_at(encoded, at_ends), body=body, structure=tokens[at_ends])

    def _passing(
        self,
        tokens: TokenStructure,
        after: RowCounters,
        cache: GPTHFCache | None,
        wanted: Bool[Tensor, " tokens"],
        keep_all: bool,
    ) -> dict[str, Bool[Tensor, " tokens"]]:
        """Per stage, the tokens that must pass it: the wanted, those a cache will keep, and all these depend on.

        An encoder is passed by all, and an hourglass's body by sentence ends.
        """
        last = self._stage_list()[-1]
        needed = wanted
        if keep_all or (cache is not None and not cache.autocommit) or bool(wanted.all()):
            needed = torch.ones_like(wanted)
        else:
            if cache is not None:
                needed = needed | last.rule.keeps(tokens, after)
            needed = last.rule.needs(tokens, needed, len(last.layers))
        return {last.name: needed}

    def _structure(
        self, input_ids: Int[Tensor, " tokens"], row: Int[Tensor, " tokens"], counters: RowCounters
    ) -> TokenStructure:
        return read_structure(
            input_ids.cpu(),
            row,
            counters,
            sentence_end_token_id=self.config.sentence_end_token_id,
            document_start_token_id=self.config.bos_token_id,
        )

    def _check_length(self, tokens: TokenStructure) -> None:
        limit = self.config.max_position_embeddings
        if self.config.allow_extrapolation or len(tokens) == 0:
            return
        longest = int(tokens.position.max()) + 1
        if longest > limit:
            raise ContextOverflowError(
                f"a document reaches {longest} tokens, but the model was trained for {limit}. Shorten the text, or "
                "allow_extrapolation (config.allow_extrapolation=True, --allow-extrapolation)."
            )


def compile_steps(model: nn.Module, *, enabled: bool = True) -> None:
    """Compiles the steps of single rows, stage by stage; the first step then takes many seconds."""
    for part in model.modules():
        if isinstance(part, GPTHFModel):
            part.compiles_steps = enabled
