"""From ids to what the body reads: embedding, a sentence's further positions, the encoder, sentences known before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from thoughtformer.cache import StageCache
from thoughtformer.models.gpthf.known_sentences import KnownSentences
from thoughtformer.models.gpthf.stages import Pass, Stage
from thoughtformer.rules import TokenStructure, with_summaries

__all__ = ["Encoded", "Encoding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """The encoder's entries, which are the tokens and, where sentences have several summaries, repeated ends.

    Of sentences known before only the ends are there.

    Attributes:
        states: what leaves the encoder.
        depths: what entered it, and each layer's output, where these are read.
        token_index: where the tokens are among the entries.
    """

    states: Float[Tensor, "entries hidden"]
    depths: list[Float[Tensor, "entries hidden"]]
    token_index: Int[Tensor, " tokens"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoding:
    """A model's parts up to its body.

    Attributes:
        embed_tokens: of ids.
        summary_tokens: of positions behind a sentence's end, if there are any.
        encoder: if there is one.
        num_summaries: positions of a sentence that the body reads.
        reads_depths: whether more than the encoder's last output is read of them.
    """

    embed_tokens: nn.Embedding
    summary_tokens: nn.Embedding | None
    encoder: Stage | None
    num_summaries: int
    reads_depths: bool

    def encode(
        self,
        input_ids: Int[Tensor, " tokens"],
        tokens: TokenStructure,
        shared: Pass,
        cache: StageCache | None,
        *,
        keeps_depths: bool = False,
    ) -> Encoded:
        """Embeds all tokens and lets them pass the encoder; with every depth's states, if to be kept."""
        embedded, structure, token_index = self._embedded(input_ids, tokens)
        states, outputs = embedded, []
        if self.encoder is not None:
            states, outputs = self.encoder(embedded, structure, shared, cache, self.reads_depths or keeps_depths)
        return Encoded(states=states, depths=[embedded, *outputs], token_index=token_index)

    def encode_new(
        self,
        input_ids: Int[Tensor, " tokens"],
        tokens: TokenStructure,
        shared: Pass,
        cache: StageCache | None,
        known: KnownSentences,
    ) -> Encoded:
        """As `encode`, of known sentences their ends alone; tells the source of those that it missed."""
        is_new = ~known.is_known
        part = self.encode(input_ids[is_new.to(input_ids.device)], tokens[is_new], shared, cache)
        repeats = torch.where(tokens.is_end, self.num_summaries, is_new.long())
        token_index = repeats.cumsum(0) - repeats
        is_computed = torch.repeat_interleave(is_new, repeats).to(part.states.device)

        def joined(computed: Tensor, depth: int) -> Tensor:
            whole = computed.new_empty(len(is_computed), computed.shape[1])
            whole[is_computed] = computed
            whole[~is_computed] = known.vectors[:, depth].flatten(0, 1).to(computed)
            return whole

        computed = part.depths if self.reads_depths else [part.states]
        depths = [joined(states, depth) for depth, states in enumerate(computed)]
        if known.missing:
            entry = (token_index[known.missing_ends, None] + torch.arange(self.num_summaries)).to(part.states.device)
            known.source.add(known.missing, torch.stack([states[entry] for states in depths], dim=1))
        return Encoded(states=depths[-1], depths=depths, token_index=token_index)

    def _embedded(
        self, input_ids: Int[Tensor, " tokens"], tokens: TokenStructure
    ) -> tuple[Float[Tensor, "entries hidden"], TokenStructure, Int[Tensor, " tokens"]]:
        """What enters the encoder, its structure, and where in it the tokens are."""
        embedded = self.embed_tokens(input_ids)
        # In training every parameter takes part in every step, as distributed training expects.
        if self.summary_tokens is None or not (tokens.has_ends or torch.is_grad_enabled()):
            return embedded, tokens, torch.arange(len(tokens))
        index, entries = with_summaries(tokens, self.num_summaries)
        number = entries.offset - tokens.offset[index]
        # Further positions of a sentence end have vectors of their own, laid behind the tokens'.
        source = torch.where(number == 0, index, len(tokens) + number - 1).to(embedded.device)
        more = self.summary_tokens(torch.arange(self.num_summaries - 1, device=embedded.device))
        table = torch.cat([embedded, more.to(embedded.dtype)])
        return table.index_select(0, source), entries, (number == 0).nonzero().squeeze(1)
