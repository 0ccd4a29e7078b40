"""One view of every causal LM that can be compressed: embeddings in, hidden states out, attention handed in.

A compression method decides what a query reads; the backbone computes everything else with the model's own modules.
transformers' models reach the handed-in attention through a registered attention implementation, which is switched on
for the length of one forward pass and off again: nothing stays behind, and the model itself is unchanged.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from thoughtformer.attention import rotary_angles
from thoughtformer.errors import UnsupportedError
from thoughtformer.models.causal_lm import GPTHFForCausalLM
from thoughtformer.models.layers import Layer

__all__ = ["SUPPORTED_MODELS", "Attend", "Backbone", "Rotation", "backbone_of"]

#: transformers' `model_type`s whose attention is proven to be replaceable (tests/contract/test_backbones.py).
SUPPORTED_MODELS = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3")
BACKENDS = ("sdpa", "eager")
PREFIX = "thoughtformer_"


class Original(Protocol):
    """The model's own attention of queries over keys; `mask` is additive, None for plain causal attention."""

    def __call__(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Float[Tensor, "batch #heads seq keys"] | None,
    ) -> Float[Tensor, "batch heads seq head_dim"]: ...


class Attend(Protocol):
    """Attention handed in: what each query of a layer gets, given that layer's new queries, keys and values.

    Keys and queries are rotated already, where the model rotates them. `scale` is the factor of the scores.
    """

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        scale: float,
        dropout: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]: ...


#: Turns rotated queries or keys by so many positions more; None for models whose positions are not rotations.
Rotation = Callable[
    [Float[Tensor, "batch heads seq head_dim"], Int[Tensor, "batch seq"]], Float[Tensor, "batch heads seq head_dim"]
]


class Backbone(ABC):
    """A causal LM without its attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.num_layers = 0
        self.num_kv_heads = 0
        self.head_dim = 0
        self.attention_modules: list[nn.Module] = []

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        """Ids that the model has embeddings for."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    @property
    def embedding_dim(self) -> int:
        return cast(nn.Embedding, self.model.get_input_embeddings()).embedding_dim

    @property
    def max_tokens(self) -> int:
        """Longest text that the model was trained for."""
        return int(self.config.max_position_embeddings)

    @property
    def rotation(self) -> Rotation | None:
        """How this model's positions turn queries and keys; None if they are learned."""
        return None

    def embed(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq embedding"]:
        """The embeddings of ids."""
        return cast(nn.Module, self.model.get_input_embeddings())(input_ids)

    def head(self) -> nn.Module:
        """What makes logits from hidden states."""
        return cast(nn.Module, self.model.get_output_embeddings())

    @abstractmethod
    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> Float[Tensor, "batch seq hidden"]:
        """The final hidden states, as the head takes them."""

    def kv_bytes_per_entry(self) -> int:
        """Keys and values of one entry in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def _probe(self) -> None:
        """Runs two tokens to learn the shapes, and to see that every layer really asks for its attention."""
        shapes: dict[int, tuple[int, int]] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            shapes[layer] = (key.shape[1], key.shape[3])
            return query

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                positions = torch.arange(2, device=self.device)[None]
                self.forward(self.embed(torch.zeros_like(positions)), positions, cast(Attend, attend))
        finally:
            self.model.train(was_training)
        if sorted(shapes) != list(range(int(self.config.num_hidden_layers))) or len(set(shapes.values())) != 1:
            raise UnsupportedError(
                f"{type(self.model).__name__}: {len(shapes)} of {self.config.num_hidden_layers} layers asked for their "
                f"attention, with (heads, width) {sorted(set(shapes.values()))}. It can't be compressed."
            )
        self.num_layers = len(shapes)
        self.num_kv_heads, self.head_dim = shapes[0]


class TransformersBackbone(Backbone):
    """A model of transformers, through its attention interface."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._check()
        self.backend = str(self.config._attn_implementation)
        self._modules: dict[int, nn.Module] = {}
        self._probe()
        self.attention_modules = [self._modules[layer] for layer in range(self.num_layers)]

    def _check(self) -> None:
        name, config = type(self.model).__name__, self.config
        if config.model_type not in SUPPORTED_MODELS:
            raise UnsupportedError(
                f"{name} (model_type {config.model_type!r}) is not among the architectures that compression is proven "
                f"for: {', '.join(SUPPORTED_MODELS)}, and the plain GPT of this package."
            )
        backend = config._attn_implementation
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"{name} uses the attention backend {backend!r}, which reads no mask of ours. Load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        windows = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
        if windows or (getattr(config, "sliding_window", None) and config.model_type == "mistral"):
            raise UnsupportedError(
                f"{name} has layers of {', '.join(sorted(windows)) or 'sliding-window attention'}: their window would "
                "not be respected. Models with full attention in every layer can be compressed."
            )
        if getattr(config, "reorder_and_upcast_attn", False):
            raise UnsupportedError(f"{name}: reorder_and_upcast_attn=True bypasses the attention interface.")
        if getattr(config, "rope_parameters", None) and config.rope_parameters.get("rope_type") in (
            "dynamic",
            "longrope",
        ):
            raise UnsupportedError(
                f"{name}: rope_type={config.rope_parameters['rope_type']!r} changes the rotations of a text as it "
                "grows, so that a compressed text can't equal a whole one."
            )

    @property
    def rotation(self) -> Rotation | None:
        rotary = next((part for part in self.model.modules() if hasattr(part, "inv_freq")), None)
        if rotary is None:
            return None
        frequency = cast(Tensor, rotary.inv_freq)

        def turn(states: Tensor, offset: Tensor) -> Tensor:
            angle = offset.to(torch.float32)[..., None] * frequency.to(offset.device)
            cos, sin = angle.cos()[:, None].to(states.dtype), angle.sin()[:, None].to(states.dtype)
            turned, rest = states.split([2 * cos.shape[-1], states.shape[-1] - 2 * cos.shape[-1]], dim=-1)
            first, second = turned.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

        return turn

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> Float[Tensor, "batch seq hidden"]:
        # A mask of four dimensions is taken for ready-made, so that none is built; our attention ignores it.
        no_mask = inputs_embeds.new_zeros(1, 1, 1, 1)
        with self._switched_on():
            output = self.model.base_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=no_mask,
                use_cache=False,
                handed_in=(attend, self._modules),
            )
        return output.last_hidden_state

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        before = self.config._attn_implementation
        self.config._attn_implementation = PREFIX + self.backend
        try:
            yield
        finally:
            self.config._attn_implementation = before


def _own_attention(module: nn.Module, backend: str) -> Callable[..., Any]:
    eager = cast(Callable[..., Any], getattr(sys.modules[type(module).__module__], "eager_attention_forward", None))
    return eager if backend == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)


def _implementation(backend: str) -> Callable[..., Any]:
    """An attention for transformers' registry: the one handed in, or else just what `backend` does."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        handed_in: tuple[Attend, dict[int, nn.Module]] | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        own = _own_attention(module, backend)
        if handed_in is None:  # another model that shares this one's configuration
            return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        attend, modules = handed_in
        layer = cast(int, module.layer_idx)
        modules[layer] = module
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def original(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if backend == "eager" and key.shape[2] > query.shape[2]:
                # Held keys are strided, and products of strided matrices differ in the last bit from those of
                # transformers' own cache.
                key, value = key.contiguous(), value.contiguous()
            if mask is None and backend == "eager":
                shape = (query.shape[2], key.shape[2])
                hidden = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1 + shape[1] - shape[0])
                mask = query.new_zeros(shape).masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]
            return own(module, query, key, value, mask, scaling=scaling, dropout=dropout)[0].transpose(1, 2)

        output = attend(layer, query, key, value, scale=scale, dropout=dropout, original=original)
        return output.transpose(1, 2), None

    return attention


def _register() -> None:
    for backend in BACKENDS:
        if PREFIX + backend not in ALL_ATTENTION_FUNCTIONS:
            # Both registries: with a name in one alone, transformers drops padding masks without a word.
            AttentionInterface.register(PREFIX + backend, _implementation(backend))
            AttentionMaskInterface.register(PREFIX + backend, ALL_MASK_ATTENTION_FUNCTIONS[backend])


class PlainBackbone(Backbone):
    """This package's plain GPT: a GPTHF with one causal stage."""

    def __init__(self, model: GPTHFForCausalLM) -> None:
        super().__init__(model)
        if len(model.model.stages) != 1 or model.config.body_visibility != "causal":
            raise UnsupportedError(
                "this GPTHF folds its sentences itself (body_visibility="
                f"{model.config.body_visibility!r}, {model.config.num_encoder_layers} encoder layers): only its plain "
                "case, without encoder and with a causal body, can be compressed."
            )
        self._probe()
        self.attention_modules = [layer.attention for layer in self._layers()]

    def _layers(self) -> list[Layer]:
        return list(self.model.model.stages[0].layers)

    @property
    def rotation(self) -> Rotation | None:
        config = self.config

        def turn(states: Tensor, offset: Tensor) -> Tensor:
            cos, sin = rotary_angles(offset.reshape(-1), config.head_dim, config.rope_theta, states.dtype)
            cos, sin = (part.view(*offset.shape, -1)[:, None] for part in (cos, sin))
            first, second = states.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return turn

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
    ) -> Float[Tensor, "batch seq hidden"]:
        batch, seq, hidden = inputs_embeds.shape
        config = self.config
        angles = rotary_angles(position_ids.reshape(-1), config.head_dim, config.rope_theta, self.dtype)
        states = inputs_embeds.reshape(batch * seq, hidden)

        def padded(part: Tensor) -> Tensor:
            return part.view(batch, seq, *part.shape[1:]).transpose(1, 2)

        for number, layer in enumerate(self._layers()):

            def attend_flat(query: Tensor, key: Tensor, value: Tensor, number: int = number) -> Tensor:
                output = attend(
                    number,
                    padded(query),
                    padded(key),
                    padded(value),
                    scale=config.head_dim**-0.5,
                    dropout=0.0,
                    original=_grouped_sdpa,
                )
                return output.transpose(1, 2).reshape(batch * seq, *query.shape[1:])

            states = layer(states, angles, attend_flat)
        return self.model.model.norm(states).view(batch, seq, hidden)


def _grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention; heads that share keys become further queries of one head, so that no key is copied."""
    batch, heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None and seq > 1)
    if seq == 1 and (mask is None or mask.shape[1] == 1):
        packed = query.view(batch, kv_heads, heads // kv_heads, head_dim)
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask)
        return output.reshape(batch, heads, seq, head_dim)
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None and seq > 1)


def backbone_of(model: PreTrainedModel) -> Backbone:
    """The view of a model, or a refusal.

    Raises:
        UnsupportedError: an architecture or attention backend that can't be compressed exactly; named.
    """
    _register()
    if isinstance(model, GPTHFForCausalLM):
        return PlainBackbone(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is no model of transformers.")
    if model.get_output_embeddings() is None:
        raise UnsupportedError(f"{type(model).__name__} has no language modelling head.")
    return TransformersBackbone(model)
