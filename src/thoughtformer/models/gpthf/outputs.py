"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.models.transformers_api import CachedOutput
from thoughtformer.rules import TokenStructure

__all__ = ["GPTHFCausalLMOutput", "RaggedOutput", "SentenceVectors"]


@dataclass
class GPTHFCausalLMOutput(CachedOutput):
    """transformers' output, and with `loss_only` each column's loss in nats, shape (batch, seq - 1), 0 if unscored."""

    token_losses: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SentenceVectors:
    """What the encoder and the body made of the new tokens' closed sentences, in text order."""

    encoder: Float[Tensor, "sentences hidden"]
    body: Float[Tensor, "sentences hidden"]
    structure: TokenStructure


@dataclass(frozen=True, eq=False, kw_only=True)
class RaggedOutput:
    """What `GPTHFModel.forward` returns, for the `wanted` tokens in text order.

    `hidden_states` holds, when asked for, the embeddings and the outputs of every layer that all tokens pass: of an
    hourglass, those of encoder and decoder. `known_tokens` counts each row's tokens that a `SentenceSource` knew.
    """

    last_hidden_state: Float[Tensor, "wanted hidden"]
    tokens: TokenStructure
    hidden_states: list[Float[Tensor, "tokens hidden"]] | None
    sentences: SentenceVectors | None
    known_tokens: Int[Tensor, " rows"] | None = None
