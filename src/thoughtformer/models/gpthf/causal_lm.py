"""GPTHF with its head, as a `transformers` causal LM: padding, losses, grammar of sentence ends, generation hooks."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.generation import LogitsProcessorList

from thoughtformer.cache import GPTHFCache
from thoughtformer.errors import ContextOverflowError, InputError, UnsupportedError
from thoughtformer.models.chunked_loss import chunked_cross_entropy
from thoughtformer.models.generating import OwnCacheGenerationMixin
from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.models.gpthf.losses import SentenceLosses
from thoughtformer.models.gpthf.modeling import GPTHFModel, GPTHFPreTrainedModel
from thoughtformer.models.gpthf.outputs import GPTHFCausalLMOutput, RaggedOutput
from thoughtformer.models.packed_linear import PackableLinear, compiled_linear
from thoughtformer.models.padding import KeptColumns, real_tokens
from thoughtformer.models.transformers_api import CACHE_NAME, one_cache, refuse_arguments, runs_uncompiled
from thoughtformer.rules import TokenStructure
from thoughtformer.sampling.penalty import exempting_repetition_penalty

__all__ = ["GPTHFForCausalLM"]


class GPTHFForCausalLM(OwnCacheGenerationMixin, GPTHFPreTrainedModel):
    """GPTHF with its head.

    The head knows the grammar of sentence ends: an end never follows an end or a document's start, and the last token
    that `max_sentence_tokens` allows is an end for certain, at no cost in bits. Since that is part of the logits, it
    holds alike in training, scoring, `generate` and the engine.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__(config)
        self.model = GPTHFModel(config)
        self.lm_head = PackableLinear(config.hidden_size, config.vocab_size, bias=False)
        self.sentence_losses = SentenceLosses(config) if config.has_sentence_losses else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def new_cache(self, num_rows: int) -> GPTHFCache:
        """An empty cache for `num_rows` rows."""
        return self.model.new_cache(num_rows)

    def ragged_logits(
        self,
        input_ids: Int[Tensor, " tokens"],
        row: Int[Tensor, " tokens"],
        cache: GPTHFCache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "wanted vocab"], RaggedOutput]:
        """Next-token logits of the wanted tokens; arguments as in `GPTHFModel.forward`."""
        places = {place for place in getattr(self, "hf_device_map", {}).values() if place not in ("cpu", "disk")}
        if len(places) > 1:
            raise UnsupportedError(
                f"device_map spreads this GPTHF over {sorted(map(str, places))}; it runs on one device, with weights "
                "offloaded to the CPU or to disk if need be."
            )
        output = self.model(input_ids, row, cache, **kwargs)
        states = output.last_hidden_state
        is_compiled = self.model.compiles_steps and len(states) == 1 and not torch.is_grad_enabled()
        head = cast(PackableLinear, self.lm_head)
        logits = compiled_linear()(head, states) if is_compiled else head(states)
        self._apply_grammar(logits, output.tokens)
        return logits, output

    @runs_uncompiled
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
        past_key_values: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> GPTHFCausalLMOutput | tuple:
        """Logits, and the loss where labels are given; transformers' arguments and meanings.

        Args:
            input_ids: new tokens, padded on either side where `attention_mask` is 0.
            attention_mask: 1 for tokens, 0 for padding; over the new columns, or over all columns seen.
            cache: what came before; updated in place.
            labels: as `input_ids`, shifted inside; -100 and padding are not scored.
            use_cache: without `cache`, make one and return it; default: the config's, not in training.
            logits_to_keep: the last so many columns, or the given columns; 0 for all. Padding has the logits of the
                token before it, or 0 where there is none.
            output_hidden_states: return the embeddings and the outputs of every layer that all tokens pass.
            return_dict: False for a tuple.
            loss_only: compute no logits beside the loss, but each token's loss; several times less memory to train.
            past_key_values: `cache`, by the name that it had up to transformers 5.23.
            num_items_in_batch: of the whole step, whose sum of losses is divided by it; default: this batch's mean.
            kwargs: nothing but what transformers hands to every model, as long as it is off.

        Raises:
            InputError: no ids, a mask that isn't two-dimensional, or a cache of another model.
            ArgumentError, UnsupportedError: an argument that isn't known, or asks for what a GPTHF doesn't do.
        """
        if input_ids is None or input_ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
            raise InputError(
                "GPTHF needs input_ids of shape (batch, seq): sentences are read off the ids, so embeddings won't do."
            )
        if kwargs.get("position_ids") is not None:
            raise InputError("GPTHF derives positions from the ids: leave position_ids out.")
        refuse_arguments(kwargs, of=self, known=_ARGUMENTS)
        batch, seq = input_ids.shape
        real = real_tokens(input_ids, attention_mask)
        keep = KeptColumns(logits_to_keep, real)
        if labels is not None and not keep.is_all:
            raise InputError("labels need all logits: leave logits_to_keep at 0.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        cached = self._checked_cache(one_cache(cache, past_key_values), batch)
        if cached is None and use_cache:
            cached = self.new_cache(batch)
        if loss_only:
            if labels is None:
                raise InputError("loss_only needs labels.")
            if cached is not None or output_hidden_states:
                raise InputError("loss_only returns losses alone: leave cache, use_cache and output_hidden_states out.")
            return self._losses(input_ids, real, labels, num_items_in_batch)

        row = torch.arange(batch)[:, None].expand(batch, seq)
        all_real = bool(real.all())
        adds_losses = self.sentence_losses is not None and self.training and labels is not None
        logits, output = self.ragged_logits(
            input_ids.reshape(-1) if all_real else input_ids[real.to(input_ids.device)],
            row[real],
            cached,
            num_rows=batch,
            num_columns=seq,
            wanted=keep.wanted[real],
            output_hidden_states=bool(output_hidden_states),
            keep_sentences=adds_losses,
        )
        logits = keep.laid_out(logits)

        loss = None
        if labels is not None:
            if not all_real:
                # Nothing predicts a token after padding.
                predicted = real.clone()
                predicted[:, 1:] &= real[:, :-1]
                labels = labels.masked_fill(~predicted.to(labels.device), -100)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if adds_losses:
                scored = (labels[:, 1:] != -100).sum()
                flat_ids = input_ids[real.to(input_ids.device)]
                loss = loss + self._sentence_loss(output, flat_ids, scored, num_items_in_batch)
        hidden_states = None
        if output.hidden_states is not None:
            hidden_states = tuple(_padded(states, real) for states in output.hidden_states)
        result = GPTHFCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=hidden_states,
            **cast(dict[str, Any], {CACHE_NAME: cached}),
        )
        return result if return_dict is not False else result.to_tuple()

    def _checked_cache(self, cache: Cache | None, batch: int) -> GPTHFCache | None:
        if cache is None:
            return None
        if not isinstance(cache, GPTHFCache):
            raise InputError(
                f"the cache given is a {type(cache).__name__}; a GPTHF needs one of its own: leave it out, or make one "
                "by model.new_cache(batch)."
            )
        if cache.num_rows != batch:
            raise InputError(f"the cache given holds {cache.num_rows} rows, input_ids has {batch}.")
        return cache

    def _losses(
        self,
        input_ids: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_items_in_batch: Tensor | int | None,
    ) -> GPTHFCausalLMOutput:
        """The loss without logits: the mean over scored tokens, or their sum over `num_items_in_batch`."""
        device = input_ids.device
        batch, seq = input_ids.shape
        row = torch.arange(batch)[:, None].expand(batch, seq)
        adds_losses = self.sentence_losses is not None and self.training
        flat_ids = input_ids[real.to(device)]
        output = self.model(flat_ids, row[real], num_rows=batch, keep_sentences=adds_losses)
        is_scored = torch.zeros(batch, seq, dtype=torch.bool, device=device)
        is_scored[:, :-1] = (labels[:, 1:] != -100) & (real[:, 1:] & real[:, :-1]).to(device)
        targets = torch.zeros_like(labels)
        targets[:, :-1] = labels[:, 1:].clamp(min=0)
        is_real = real.to(device)
        scored, target = is_scored[is_real], targets[is_real]
        count = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        weights = scored.to(torch.promote_types(self.dtype, torch.float32)) / count
        if type(self.lm_head) is PackableLinear and not self.lm_head.weight.is_meta:
            loss, losses = chunked_cross_entropy(
                output.last_hidden_state,
                self.lm_head.weight,
                target,
                weights,
                lambda logits, part: self._apply_grammar(logits, output.tokens[part]),
            )
        else:  # an adapter's layer, of which the weight isn't all; or a hook has to fetch the weight
            logits = self.lm_head(output.last_hidden_state)
            self._apply_grammar(logits, output.tokens)
            losses = F.cross_entropy(logits.to(weights.dtype), target, reduction="none")
            loss = torch.where(weights != 0, losses * weights, 0).sum()
            losses = losses.detach()
        if adds_losses:
            loss = loss + self._sentence_loss(output, flat_ids, scored.sum(), num_items_in_batch)
        token_losses = losses.new_zeros(batch, seq)
        token_losses[is_real] = losses.masked_fill(~scored, 0)
        return GPTHFCausalLMOutput(loss=loss, token_losses=token_losses[:, :-1])

    def _sentence_loss(
        self,
        output: RaggedOutput,
        flat_ids: Int[Tensor, " tokens"],
        num_scored: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Float[Tensor, ""]:
        """The losses of sentence vectors, in the share of a step that the batch's tokens have."""
        assert self.sentence_losses is not None
        loss = self.sentence_losses(output.sentences, flat_ids, output.tokens, self.lm_head)
        return loss if num_items_in_batch is None else loss * num_scored / num_items_in_batch

    @torch.no_grad()
    def _apply_grammar(self, logits: Float[Tensor, "wanted vocab"], tokens: TokenStructure) -> None:
        """Rules out ends that can't be, in place.

        Not recorded by autograd: what is ruled out has probability 0, and so gradient 0, in any loss of the softmax.
        """
        end = self.config.sentence_end_token_id
        if end is None:
            return
        impossible = torch.finfo(logits.dtype).min
        if tokens.has_ends:
            closed = tokens.is_end.nonzero().squeeze(1).to(logits.device)
            logits[closed, end] = impossible
        if self.config.max_sentence_tokens is None:
            return
        # The next token would be number offset + 2 of its sentence.
        full = ~tokens.is_end & (tokens.offset + 2 >= self.config.max_sentence_tokens)
        if bool(full.any()):
            rows = full.nonzero().squeeze(1).to(logits.device)
            end_logits = logits[rows, end].clone()
            logits[rows] = impossible
            logits[rows, end] = end_logits

    # transformers' generation hooks.

    def check_generated_length(self, num_tokens: int, num_prompt_tokens: int) -> None:
        """Raises `ContextOverflowError` if prompt and new tokens come to more than the model was trained for."""
        limit = self.config.max_position_embeddings
        if num_tokens > limit and not self.config.allow_extrapolation:
            over = num_tokens - limit
            advice = f"Lower max_new_tokens by {over}, or shorten" if num_prompt_tokens < limit else "Shorten"
            raise ContextOverflowError(
                f"prompt and new tokens come to {num_tokens}, but the model was trained for {limit}. {advice} the "
                f"prompt by {over} tokens, or set config.allow_extrapolation=True."
            )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        exempt = [self.config.sentence_end_token_id, self.config.bos_token_id]
        return exempting_repetition_penalty(processors, [token for token in exempt if token is not None])


#: What `forward` takes.
_ARGUMENTS = tuple(name for name in inspect.signature(GPTHFForCausalLM.forward).parameters if name != "kwargs")


def _padded(
    states: Float[Tensor, "tokens hidden"], real: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq hidden"]:
    padded = states.new_zeros(*real.shape, states.shape[-1])
    padded[real.to(states.device)] = states
    return padded
