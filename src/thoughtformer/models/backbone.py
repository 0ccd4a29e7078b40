"""One view of every causal LM that can be compressed: embeddings in, hidden states out, attention handed in.

A compression method decides what a query reads; the backbone computes everything else with the model's own modules.
How attention gets into a model of transformers, and nothing else of it changes, is in `handed_in.py`.

Over 400 lines, because the families stand side by side: a new one is written by looking at its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from thoughtformer.attention.rotary import Rotary
from thoughtformer.cache.groups import LayerGroup
from thoughtformer.cache.shape import KVShape
from thoughtformer.errors import ThoughtformerError, UnsupportedError
from thoughtformer.models.acceptance import check_configuration, check_told, prove, windows_of
from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM
from thoughtformer.models.gpthf.layers import Angles, Layer, LayerAttention
from thoughtformer.models.handed_in import (
    BACKENDS,
    SCORE_ARGUMENTS,
    Acting,
    Attend,
    HandedIn,
    Original,
    acting,
    hand_in,
)

__all__ = ["Attend", "Backbone", "Original", "Rotation", "backbone_of", "bare_model"]

#: Turns rotated queries or keys by so many positions more; None for models whose positions are not rotations.
Rotation = Callable[
    [Float[Tensor, "batch heads seq head_dim"], Int[Tensor, "batch seq"]], Float[Tensor, "batch heads seq head_dim"]
]


#: What configurations say of logits behind the head.
LOGIT_SETTINGS = ("logits_scaling", "logit_scale", "final_logit_softcapping")


class _Layer(NamedTuple):
    """What a probe saw of a layer's queries and keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Backbone(ABC):
    """A causal LM without its attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.attention_modules: list[nn.Module] = []
        #: The modules around these, which are called with all that a pass hands in.
        self.layer_modules: list[nn.Module] = []
        #: How many of the last tokens each layer reads, itself included; None: all.
        self.windows: list[int | None] = []
        self._seen: list[_Layer] = []
        self._follows_model = self._keys_are_as_model = True

    def close(self) -> None:  # noqa: B027  most leave nothing
        """Leaves the model as it was."""

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def num_layers(self) -> int:
        return len(self._seen)

    @property
    def num_heads(self) -> int:
        """Of queries."""
        return self._seen[0].num_heads

    @property
    def num_kv_heads(self) -> int:
        return self._seen[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        return self._seen[0].head_dim

    @property
    def device(self) -> torch.device:
        """Where embeddings come from. The model may be moved later, unless hooks move its weights about."""
        return self.devices[0]

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer's keys are."""
        if self._follows_model:
            return [self.model.device] * self.num_layers
        return [layer.device for layer in self._seen]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; weights may be of another."""
        return self.model.dtype if self._keys_are_as_model else self._seen[0].dtype

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
    def text_limit(self) -> int | None:
        """Longest text that can be compressed at all: a window that is taken for none mustn't begin to act."""
        return min((window for layer in self.groups[0].layers if (window := self.windows[layer])), default=None)

    @property
    def groups(self) -> list[LayerGroup]:
        """Layers that attend alike; those first that a method acts on.

        A window as wide as any text is taken for none. Where every layer has one, so are the widest (`text_limit`).
        """
        widest = min(self.max_tokens, max(window or self.max_tokens for window in self.windows))
        by_window: dict[int | None, list[int]] = {None: []}
        for layer, window in enumerate(self.windows):
            by_window.setdefault(None if window is None or window >= widest else window, []).append(layer)
        return [LayerGroup(tuple(layers), window) for window, layers in by_window.items()]

    @property
    def shapes_scores(self) -> str | None:
        """What the model's own attention does to scores beside scaling them, by name; None: nothing."""
        return None

    @property
    def rotation(self) -> Rotation | None:
        """How this model's positions turn queries and keys; None if they are learned."""
        return None

    def embed(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq embedding"]:
        """The embeddings of ids."""
        return cast(nn.Module, self.model.get_input_embeddings())(input_ids)

    def head(self) -> nn.Module:
        """The last layer, from hidden states to scores of tokens."""
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def head_is_all(self) -> bool:
        """Logits are the head's scores as they are."""
        return not any(getattr(self.config, name, None) for name in LOGIT_SETTINGS)

    def logits(self, hidden_states: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape vocab"]:
        """The head's scores, scaled and capped as the model does it."""
        logits, config = self.head()(hidden_states), self.config
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if not cap else torch.tanh(logits / cap) * cap

    @abstractmethod
    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
        on: Acting | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """The final hidden states, as the head takes them.

        Args:
            inputs_embeds: of tokens, and of sentinels.
            position_ids: of each.
            attend: what attends.
            on: what an adapter acts on; None for the model as it is.
        """

    def kv_shape(self, layers: Sequence[int], num_rows: int = 1, dtype: torch.dtype | None = None) -> KVShape:
        """Of the keys and values of so many rows in some layers; dtype None: the model's."""
        return KVShape(
            num_layers=len(layers),
            num_rows=num_rows,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype if dtype is None else dtype,
        )

    def _probe(self, through: Callable[[Tensor, Tensor, Attend], Any]) -> None:
        """Runs two tokens to learn shapes and places, and to see that every layer really asks for its attention."""
        seen: dict[int, _Layer] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            if value.shape != key.shape:
                raise UnsupportedError(
                    f"{type(self.model).__name__} has keys of width {key.shape[3]} and values of width "
                    f"{value.shape[3]}: it can't be compressed."
                )
            seen[layer] = _Layer(query.shape[1], key.shape[1], key.shape[3], key.dtype, key.device)
            return query

        device = torch.device("cpu") if self.model.device.type == "meta" else self.model.device
        positions = torch.arange(2, device=device)[None]
        # Dropout, where the model is in training, may draw; the mode belongs to whoever set it.
        with torch.no_grad(), torch.random.fork_rng(enabled=self.model.training):
            through(self.embed(torch.zeros_like(positions)), positions, cast(Attend, attend))
        shapes = {(layer.num_kv_heads, layer.head_dim) for layer in seen.values()}
        if sorted(seen) != list(range(int(self.config.num_hidden_layers))) or len(shapes) != 1:
            raise UnsupportedError(
                f"{type(self.model).__name__}: {len(seen)} of {self.config.num_hidden_layers} layers asked for their "
                f"attention, with (heads, width) {sorted(shapes)}. It can't be compressed."
            )
        self._seen = [seen[layer] for layer in range(len(seen))]
        self.windows = self.windows or [None] * len(seen)
        self._follows_model = {layer.device for layer in self._seen} == {self.model.device}
        self._keys_are_as_model = {layer.dtype for layer in self._seen} == {self.model.dtype}


class TransformersBackbone(Backbone):
    """A model of transformers, through its attention interface."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        #: The rotation once it was looked for.
        self._rotation: tuple[Rotation | None] | None = None
        check_configuration(model)
        self._check_backend()
        self._release = hand_in(model, self)
        asked: dict[int, nn.Module] = {}
        told: dict[int, dict[str, Any]] = {}

        def through(inputs_embeds: Tensor, position_ids: Tensor, attend: Attend) -> None:
            handed_in = HandedIn(attend)
            self._through(inputs_embeds, position_ids, handed_in)
            asked.update(handed_in.asked)
            told.update(handed_in.told)

        try:
            self._probe(through)
            check_told(model, told)
            self.windows = windows_of(told)
            self._score_arguments = [
                name for name in SCORE_ARGUMENTS if any(of.get(name) is not None for of in told.values())
            ]
            prove(model, self.windows, self._logits_by)
        except BaseException as error:
            self.close()
            if isinstance(error, ThoughtformerError) or not isinstance(error, Exception):
                raise
            raise UnsupportedError(
                f"{type(model).__name__} can't be run with its attention handed in: {type(error).__name__}: {error}"
            ) from error
        self.attention_modules = [asked[layer] for layer in range(self.num_layers)]
        parents = {child: parent for parent in model.modules() for child in parent.children()}
        self.layer_modules = [parents[module] for module in self.attention_modules]

    def _logits_by(self, input_ids: Tensor, attend: Attend, last: int) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.logits(self.forward(self.embed(input_ids), positions, attend)[:, -last:])

    def close(self) -> None:
        self._release()

    @property
    def shapes_scores(self) -> str | None:
        names = {"softcap": "caps its scores", "s_aux": "has a sink in its softmax"}
        return " and ".join(names[name] for name in self._score_arguments) or None

    def _check_backend(self) -> None:
        backend = self.config._attn_implementation
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"{type(self.model).__name__} uses the attention backend {backend!r}, which reads no mask of ours. "
                "Load it with attn_implementation='sdpa' or 'eager'."
            )

    @property
    def rotation(self) -> Rotation | None:
        if self._rotation is None:
            self._rotation = (self._found_rotation(),)
        return self._rotation[0]

    def _found_rotation(self) -> Rotation | None:
        frequency = self._frequency()
        if frequency is None:
            return None

        def turn(states: Tensor, offset: Tensor) -> Tensor:
            angle = offset.to(torch.float32)[..., None] * frequency.to(offset.device)
            cos, sin = angle.cos()[:, None].to(states.dtype), angle.sin()[:, None].to(states.dtype)
            turned, rest = states.split([2 * cos.shape[-1], states.shape[-1] - 2 * cos.shape[-1]], dim=-1)
            first, second = turned.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

        # Nothing attends, so that only positions tell queries of one token apart.
        here, there = self._queries(0), self._queries(5)
        for layer in self.groups[0].layers:
            turned = turn(here[layer], torch.tensor([[5, 5]], device=here[layer].device))
            # Half precision rounds angles as well as products.
            slack = max(0.01, 8 * torch.finfo(turned.dtype).eps) * float(here[layer].abs().max())
            if not torch.allclose(turned, there[layer], rtol=0, atol=slack):
                raise self._not_understood()
        return turn

    def _not_understood(self) -> UnsupportedError:
        return UnsupportedError(f"{type(self.model).__name__} turns queries in a way that isn't understood.")

    @torch.no_grad()
    def _queries(self, position: int) -> dict[int, Tensor]:
        """Each layer's queries of two tokens from a position on."""
        queries: dict[int, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            queries[layer] = query
            return torch.zeros_like(query)

        device = torch.device("cpu") if self.model.device.type == "meta" else self.model.device
        positions = torch.arange(position, position + 2, device=device)[None]
        with torch.random.fork_rng(enabled=self.model.training):
            self.forward(self.embed(torch.zeros_like(positions)), positions, cast(Attend, attend))
        return queries

    def _frequency(self) -> Tensor | None:
        """Angles that one position turns the queries of the layers that a method acts on; None: learned positions.

        Raises:
            UnsupportedError: rotations that aren't understood, or differ among these layers.
        """
        kinds = getattr(self.config, "layer_types", None)
        names = {f"{kinds[layer]}_inv_freq" for layer in self.groups[0].layers} if kinds else set()
        found = [
            getattr(part, name)
            for part in self.model.modules()
            for name in ("inv_freq", *sorted(names))
            if isinstance(getattr(part, name, None), Tensor)
        ]
        if any(not torch.equal(frequency, found[0]) for frequency in found[1:]) or (
            not found and getattr(self.config, "rope_parameters", None)
        ):
            raise self._not_understood()
        return found[0] if found else None

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
        on: Acting | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        self._check_backend()  # it may be changed while a view exists
        handed_in = HandedIn(attend, on)
        with acting(on):
            states = self._through(inputs_embeds, position_ids, handed_in)
        if len(handed_in.asked) < self.num_layers:
            raise UnsupportedError(
                f"only {len(handed_in.asked)} of {self.num_layers} layers of {type(self.model).__name__} asked for the "
                "attention that was handed in: something between calls modules without their keyword arguments."
            )
        return states

    def _through(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        handed_in: HandedIn,
    ) -> Float[Tensor, "batch seq hidden"]:
        # A mask of four dimensions is taken for ready-made, so that none is built; our attention ignores it.
        no_mask = inputs_embeds.new_zeros(1, 1, 1, 1)
        output = self.model.base_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=no_mask,
            use_cache=False,
            handed_in=handed_in,
        )
        return output.last_hidden_state


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
        self._probe(self.forward)
        self.layer_modules = list(self._layers())
        self.attention_modules = [layer.attention for layer in self._layers()]

    def _layers(self) -> list[Layer]:
        return list(self.model.model.stages[0].layers)

    @property
    def _rotary(self) -> Rotary:
        return self.model.model.stages[0].spec.rotary

    @property
    def rotation(self) -> Rotation | None:
        rotary = self._rotary

        def turn(states: Tensor, offset: Tensor) -> Tensor:
            cos, sin = rotary.angles(offset.reshape(-1), states.dtype)
            cos, sin = (part.view(*offset.shape, -1)[:, None] for part in (cos, sin))
            first, second = states.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return turn

    def forward(
        self,
        inputs_embeds: Float[Tensor, "batch seq embedding"],
        position_ids: Int[Tensor, "batch seq"],
        attend: Attend,
        on: Acting | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        batch, seq, hidden = inputs_embeds.shape
        angles = self._rotary.angles(position_ids.reshape(-1), inputs_embeds.dtype)
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
                    scale=self.config.head_dim**-0.5,
                    dropout=0.0,
                    original=_grouped_sdpa,
                )
                return output.transpose(1, 2).reshape(batch * seq, *query.shape[1:])

            states = layer.run(_acting_layer(layer, on, angles, attend_flat), states)
        return self.model.model.norm(states).view(batch, seq, hidden)


def _acting_layer(
    layer: Layer, on: Acting | None, angles: Angles, attend: LayerAttention
) -> Callable[[Tensor], Tensor]:
    def through(states: Tensor) -> Tensor:
        with acting(on):  # inside, because gradient checkpointing calls it once more
            return layer(states, angles, attend)

    return through


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


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM inside torch.compile's wrapper, or peft's with an adapter that acts in its layers.

    Raises:
        UnsupportedError: a peft method that acts around the model, by prompts or prefixes.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            kinds = ", ".join(
                sorted(
                    str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()
                )
            )
            raise UnsupportedError(
                f"peft's {kinds} puts virtual tokens before the text, which a compression method would take for it. "
                "Adapters inside the layers, such as LoRA, can be compressed."
            )
        return bare_model(model.get_base_model())
    return model


def backbone_of(model: nn.Module) -> Backbone:
    """The view of a model, or a refusal.

    Raises:
        UnsupportedError: an architecture or attention backend that can't be compressed exactly; named.
    """
    if isinstance(model, GPTHFForCausalLM):
        return PlainBackbone(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is no model of transformers.")
    if model.get_output_embeddings() is None:
        raise UnsupportedError(f"{type(model).__name__} has no language modelling head.")
    return TransformersBackbone(model)
