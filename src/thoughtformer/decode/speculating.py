"""Drafts for transformers' own `generate`, as its `custom_generate`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.compression import CompressedModel, compress
from thoughtformer.decode.drafting import Drafter, drafters_of, verifiable
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.transformers_api import (
    CACHE_NAME,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from thoughtformer.runners import runner_of
from thoughtformer.sampling.noise import Noise
from thoughtformer.sampling.sampler import Chooser

__all__ = ["speculate"]

logger = logging.getLogger(__name__)

#: What `generate` can be asked to tell of each step, which steps of several tokens don't.
UNTOLD = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def speculate(
    model: Any,
    input_ids: Int[Tensor, "1 seq"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafts: str | Drafter | Sequence[str | Drafter] = "suffix",
    target_tokenizer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling in which a pass may verify several tokens; the text is the one without.

    `model.generate(ids, custom_generate=thoughtformer.speculate, drafts="suffix")`, for a GPTHF, a compressed model, or
    any causal LM of transformers that can be compressed. With the same seed (`torch.manual_seed`), a text is the one
    that `generate` draws. All that is drafted is verified; `Engine` verifies what pays, and takes several rows.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what `generate` gives.
        drafts: as for `Engine`; at each step the first of several that has something drafts.
        target_tokenizer: the model's own, which a `DraftModel` needs.

    Raises:
        UnsupportedError: several rows, beams, a cache that isn't kept or another's, or an output with scores and such.
        InputError: unknown drafts, or a `DraftModel` without `target_tokenizer`.
    """
    _check(model, input_ids, generation_config, model_kwargs)
    with ExitStack() as stack:
        if isinstance(model, GPTHFForCausalLM | CompressedModel):
            reader, cache = model, model_kwargs[CACHE_NAME]
        else:
            reader = stack.enter_context(compress(model, "full"))
            cache = reader.new_cache(1)
        if not cache.can_speculate:
            raise UnsupportedError(f"{cache.written_by} overwrites what it drops: leave custom_generate out.")
        chooser = Chooser(logits_processor, Noise(None) if generation_config.do_sample else None)
        drafters: list[Drafter] = []
        for drafter in drafters_of(drafts):
            if type(drafter).bound is not Drafter.bound:
                if target_tokenizer is None:
                    raise InputError(f"drafts: {type(drafter).__name__} needs target_tokenizer=, the model's own.")
                drafter = drafter.bound(runner_of(model, target_tokenizer))
            drafters.append(drafter.begin(guess=chooser.guess))
        mask = model_kwargs.get("attention_mask")
        prompt = input_ids[0] if mask is None else input_ids[0][mask[0, -input_ids.shape[1] :].bool()]
        written = _written(reader, cache, input_ids, prompt.tolist(), drafters, chooser, stopping_criteria)
    sequences = torch.tensor([written], device=input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})  # type: ignore[arg-type]


def _check(model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    if (config.num_beams or 1) > 1:
        raise UnsupportedError(f"num_beams={config.num_beams}: drafts are for greedy search and sampling.")
    if len(input_ids) != 1:
        raise UnsupportedError(f"speculate writes one row, not {len(input_ids)}: thoughtformer.Engine takes several.")
    if config.use_cache is False:
        raise UnsupportedError("use_cache=False: drafts need a cache.")
    asked = [name for name in UNTOLD if config.return_dict_in_generate and getattr(config, name, False)]
    if asked:
        raise UnsupportedError(f"{asked[0]}: not told of steps of several tokens. Leave it out.")
    cache = model_kwargs.get(CACHE_NAME)
    if isinstance(cache, RowsCache):
        return
    if cache is not None and (cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)):
        raise UnsupportedError(
            "a cache of transformers' own: leave it out, or use a model from thoughtformer.compress."
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise UnsupportedError(
            f"cache_implementation={config.cache_implementation!r}: drafts need a cache of their own."
        )


def _written(
    model: Any,
    cache: RowsCache,
    input_ids: Int[Tensor, "1 seq"],
    prompt: list[int],
    drafters: Sequence[Drafter],
    chooser: Chooser,
    stopping_criteria: StoppingCriteriaList,
) -> list[int]:
    """Ids with what is written behind them.

    Args:
        input_ids: with padding, as processors and criteria see them.
        prompt: without.
    """
    ids, device = input_ids[0].tolist(), input_ids.device
    padding, limit, known = len(ids) - len(prompt), stopping_criteria.max_length, cache.get_seq_length()
    unread, draft = prompt[max(known - padding, 0) :], []
    drafters, drafted_by = list(drafters), None
    while True:
        cache.autocommit = not draft
        new = torch.tensor([[*unread, *draft]], device=device)
        logits = model(new, **{CACHE_NAME: cache}, logits_to_keep=len(draft) + 1).logits[0]
        logits = logits.to(device, torch.float32)  # as `generate` does
        num_new, is_done = 0, False
        for place, drafted in enumerate([*draft, None]):
            ids.append(chooser.choose(ids, logits[place]))
            num_new += 1
            is_done = bool(stopping_criteria(torch.tensor([ids], device=device), None).all())  # type: ignore[arg-type]
            if is_done or ids[-1] != drafted:
                break
        if draft:
            cache.commit(torch.tensor([num_new]))
            cache.autocommit = True
        if is_done:
            return ids
        most = len(ids) if limit is None else limit - len(ids) - 1
        verified, unread, draft = draft, ids[-1:], []
        for drafter in list(drafters):
            of_it = (len(verified), num_new - 1) if drafter is drafted_by else (0, 0)
            try:
                drafter.observe(*of_it, num_new)
                if not draft and most > 0:
                    proposed = drafter.propose(ids[padding:], most)
                    draft, drafted_by = verifiable(proposed, most, vocab_size=logits.shape[-1])[0], drafter
            except Exception:  # no text fails for a draft's sake
                logger.warning("%s drafts no more", type(drafter).__name__, exc_info=True)
                drafters.remove(drafter)
