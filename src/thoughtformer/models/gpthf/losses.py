"""Losses of sentence vectors, added to the tokens' in training alone; what the model computes stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.models.gpthf.outputs import SentenceVectors
from thoughtformer.rules import TokenStructure

__all__ = ["SentenceLosses"]


class SentenceLosses(nn.Module):
    """What a sentence's vector should know: the sentence's words, and what comes next.

    - rebuild: the cross-entropy of the sentence's tokens, in any order, given its vector from the encoder;
    - next sentence: one less the cosine between what the body says at its end and the vector of the sentence after it,
      which is taken as given.

    Each is a mean over sentences, in nats and as is, times its weight. Both have a linear map of their own, of no use
    after training.
    """

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__()
        self.rebuild_weight = config.rebuild_loss_weight
        self.next_weight = config.next_sentence_loss_weight
        width = config.hidden_size
        self.rebuild = nn.Linear(width, width, bias=False) if self.rebuild_weight else None
        self.next_sentence = nn.Linear(width, width, bias=False) if self.next_weight else None
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)

    def forward(
        self,
        sentences: SentenceVectors,
        input_ids: Int[Tensor, " tokens"],
        tokens: TokenStructure,
        head: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        """The weighted sum; `tokens` and `input_ids` are all tokens that the sentences were read from."""
        loss = sentences.encoder.new_zeros((), dtype=torch.promote_types(sentences.encoder.dtype, torch.float32))
        if self.rebuild is not None:
            loss = loss + self.rebuild_weight * self._rebuilt(sentences, input_ids, tokens, head)
        if self.next_sentence is not None:
            loss = loss + self.next_weight * self._next(sentences)
        return loss

    def _rebuilt(
        self,
        sentences: SentenceVectors,
        input_ids: Int[Tensor, " tokens"],
        tokens: TokenStructure,
        head: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        # A token's sentence is the first that ends at or after it; the end itself is no word.
        closed = (tokens.is_end.cumsum(0) - tokens.is_end.long())[~tokens.is_end]
        is_closed = closed < len(sentences.structure)
        sentence = closed[is_closed].to(input_ids.device)
        word = input_ids[(~tokens.is_end).to(input_ids.device)][is_closed.to(input_ids.device)]
        # An open sentence may lie before another row's: its tokens have no vector of their own.
        is_own = _same_sentence(tokens[~tokens.is_end][is_closed], sentences.structure[closed[is_closed]])
        sentence, word = sentence[is_own.to(sentence.device)], word[is_own.to(word.device)]
        if len(word) == 0:
            return sentences.encoder.sum() * 0
        assert self.rebuild is not None
        rebuilt = self.rebuild(sentences.encoder)
        # Under autocast the product is of another type than the norm's weight, which costs it its fast way.
        logits = head(self.norm(rebuilt.to(self.norm.weight.dtype)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        surprise = logits.logsumexp(-1)[sentence] - logits[sentence, word]
        count = torch.bincount(sentence, minlength=len(logits)).clamp(min=1)
        return (surprise / count[sentence]).sum() / len(torch.unique(sentence))

    def _next(self, sentences: SentenceVectors) -> Float[Tensor, ""]:
        where = sentences.structure
        follows = (where.row[1:] == where.row[:-1]) & (where.document[1:] == where.document[:-1])
        number = follows.nonzero().squeeze(1).to(sentences.body.device)
        if len(number) == 0:
            return sentences.body.sum() * 0
        assert self.next_sentence is not None
        predicted = self.next_sentence(self.norm(sentences.body[number]))
        cosine = F.cosine_similarity(predicted.float(), sentences.encoder[number + 1].detach().float(), dim=-1)
        return (1 - cosine).mean()


def _same_sentence(one: TokenStructure, other: TokenStructure) -> Tensor:
    return (one.row == other.row) & (one.document == other.document) & (one.sentence == other.sentence)
