"""Cross-entropy straight from hidden states: logits live a few hundred tokens at a time, and never all at once.

For a small model the logits are most of a training step's memory traffic. The gradient is computed beside the loss,
chunk by chunk, while the logits are still in cache. Its twin: the head, then `torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["chunked_cross_entropy"]

CHUNK_TOKENS = 256


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        apply_grammar: Callable[[Tensor, slice], None],
    ) -> tuple[Tensor, Tensor]:
        device_type = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device_type, enabled=False):
            weight = head_weight.to(dtype)
            wants_hidden, wants_weight = ctx.needs_input_grad[:2]
            grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
            grad_weight = torch.zeros_like(head_weight, dtype=exact) if wants_weight else None
            losses = torch.empty(len(labels), dtype=exact, device=labels.device)
            for start in range(0, len(labels), CHUNK_TOKENS):
                part = slice(start, min(start + CHUNK_TOKENS, len(labels)))
                hidden = hidden_states[part].to(dtype)
                logits = (hidden @ weight.T).to(exact)
                apply_grammar(logits, part)
                target = labels[part, None]
                total = logits.logsumexp(dim=-1, keepdim=True)
                losses[part] = (total - logits.gather(1, target)).squeeze(1)
                if grad_hidden is None and grad_weight is None:
                    continue
                gradient = logits.sub_(total).exp_()
                gradient.scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient = gradient.mul_(token_weights[part, None]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ weight
                if grad_weight is not None:
                    grad_weight += gradient.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        # Weighed first: a token of weight 0 may have an infinite loss, and must not spoil the sum.
        weighed = torch.where(token_weights != 0, losses * token_weights, 0)
        return weighed.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        grads = (None if grad is None else grad * grad_loss for grad in (grad_hidden, grad_weight))
        return *grads, None, None, None


def chunked_cross_entropy(
    hidden_states: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
    apply_grammar: Callable[[Tensor, slice], None],
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """The weighted sum of the tokens' losses in nats, and each token's loss without gradient.

    Under autocast the products run in its dtype, softmax and sums in float32.

    Args:
        hidden_states: what the head reads.
        head_weight: the head's rows.
        labels: each token's target; where there is none, any id with weight 0.
        token_weights: each loss's factor in the sum.
        apply_grammar: given the logits of a slice of tokens, rules out in place what can't follow.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, head_weight, labels, token_weights, apply_grammar)  # type: ignore[return-value]
