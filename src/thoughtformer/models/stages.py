"""Stages of layers: a visibility rule, a position scheme, and how new tokens attend, alone or on a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from thoughtformer.attention import (
    AttentionPlan,
    DenseAttention,
    DenseMemoryAttention,
    EarlierSentences,
    HeldAttention,
    HeldMemoryAttention,
    MemoryPlan,
    OwnSentence,
    RowCounters,
    TokenRule,
    TokenStructure,
    VisibilityRule,
    dense_mask,
    dense_memory_attention,
    memory_plan,
    rotary_angles,
    rotate,
)
from thoughtformer.cache import StageCache
from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.models.layers import Angles, Attend, Layer, compiled_step, compiled_step_with_memory
from thoughtformer.models.linear import PackableLinear

__all__ = ["DecoderStage", "Pass", "Stage", "Summaries", "depth_gains", "rows_at", "with_depths"]

#: Given a layer's number, keys and values, keeps them.
_Write = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What the stages of one forward pass share.

    Attributes:
        after: where the rows stand once the new tokens have been read.
        is_fresh: nothing is held, and what is written is committed at once.
        is_step: one new token of each row.
        is_dense: attend by dense masks.
        compiles: one row's steps may run compiled.
    """

    after: RowCounters
    is_fresh: bool
    is_step: bool
    is_dense: bool
    compiles: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Summaries:
    """What stands for closed sentences: states, and the structure of the ends they belong to."""

    states: Float[Tensor, "summaries hidden"]
    structure: TokenStructure


class Stage(nn.Module):
    """Layers that share a visibility rule and a position scheme; of a width of their own, if the configuration says."""

    def __init__(self, name: str, rule: TokenRule, positions: str, num_layers: int, config: GPTHFConfig) -> None:
        super().__init__()
        self.name = name
        self.rule = rule
        self.positions = positions
        self.rope_theta = config.rope_theta
        self.shape = shape = config.layer_shape(name)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(num_layers))
        is_other_width = shape.hidden_size != config.hidden_size
        self.in_proj = PackableLinear(config.hidden_size, shape.hidden_size, False) if is_other_width else None
        self.out_proj = PackableLinear(shape.hidden_size, config.hidden_size, False) if is_other_width else None

    def extra_repr(self) -> str:
        return f"{self.name}, visibility={self.rule.name}, positions={self.positions}"

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        tokens: TokenStructure,
        shared: Pass,
        held: StageCache | None,
        outputs: list[Tensor] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """The last layer's output; each layer's is added to `outputs`. What later tokens may read goes to `held`."""
        if len(tokens) == 0:
            return self._nothing(hidden_states, outputs)
        if self.in_proj is not None:
            hidden_states = self.in_proj(hidden_states)
        hidden_states = self._through(hidden_states, tokens, shared, held, outputs)
        return hidden_states if self.out_proj is None else self.out_proj(hidden_states)

    def _through(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        tokens: TokenStructure,
        shared: Pass,
        held: StageCache | None,
        outputs: list[Tensor] | None,
    ) -> Float[Tensor, "tokens width"]:
        device = hidden_states.device
        angles = self._angles(self._position(tokens), hidden_states)
        if shared.is_fresh:
            attention: AttentionPlan | DenseAttention
            if shared.is_dense:
                attention = DenseAttention(dense_mask(self.rule, tokens).to(device))
            else:
                attention = self.rule.plan(tokens).to(device)
            attends = self._attend_fresh(attention, tokens, shared.after, held, device)
        else:
            assert held is not None
            row, slot = (index.to(device) for index in held.extend(tokens))
            over_held = held.held_attention(tokens, is_step=shared.is_step)
            if shared.compiles and outputs is None and _is_plain_step(held, over_held, tokens):
                return compiled_step(len(self.layers), self.shape.hidden_size)(
                    self._layer_list(), hidden_states, angles, held.keys, held.values, slot, over_held.num_keys
                )
            attends = self._attend_held(over_held.to(device), held, row, slot)
        return self._run(hidden_states, angles, attends, outputs)

    def _run(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        angles: Angles,
        attends: Sequence[Attend],
        outputs: list[Tensor] | None,
    ) -> Float[Tensor, "tokens width"]:
        for layer, attend in zip(self.layers, attends, strict=True):
            hidden_states = layer(hidden_states, angles, attend)
            if outputs is not None:
                outputs.append(hidden_states)
        return hidden_states

    def _nothing(
        self, hidden_states: Float[Tensor, "0 hidden"], outputs: list[Tensor] | None
    ) -> Float[Tensor, "0 hidden"]:
        """What `forward` returns for no tokens."""
        if outputs is not None:
            outputs += [hidden_states.new_empty(0, self.shape.hidden_size)] * len(self.layers)
        return hidden_states

    def _position(self, tokens: TokenStructure) -> Int[Tensor, " tokens"]:
        return getattr(tokens, self.positions)

    def _angles(self, position: Int[Tensor, " tokens"], like: Tensor) -> Angles:
        # Under autocast weights are float32; rotations are cast to the activations' dtype in the layer.
        dtype = cast(Tensor, self.layers[0].attention_norm.weight).dtype  # type: ignore[union-attr]
        return rotary_angles(position.to(like.device), self.shape.head_dim, self.rope_theta, dtype)

    def _layer_list(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def _attend_fresh(
        self,
        attention: AttentionPlan | DenseAttention,
        tokens: TokenStructure,
        after: RowCounters,
        held: StageCache | None,
        device: torch.device,
    ) -> list[Attend]:
        """One attention a layer, over the new tokens alone; what the rule keeps goes to the cache."""
        if held is None:
            return [attention.attend] * len(self.layers)
        write = _write_kept(self.rule, tokens, after, held, device)

        def attend_layer(number: int) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                write(number, key, value)
                return attention.attend(query, key, value)

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]

    def _attend_held(
        self, attention: HeldAttention, held: StageCache, row: Int[Tensor, " tokens"], slot: Int[Tensor, " tokens"]
    ) -> list[Attend]:
        """One attention a layer, over everything held with the new tokens added."""

        def attend_layer(number: int) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                held.write(number, row, slot, key, value)
                return attention.attend(query, held.keys[number], held.values[number])

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]


class DecoderStage(Stage):
    """Word-level layers that read, beside their sentence's tokens, what stands for earlier sentences.

    Summaries enter every layer as further keys and values, by the layer's own norm and projections. Running the middle
    of the stack seldom, between word-level layers, is after arXiv 2406.02657 (blocks) and 2501.10322 (words).
    """

    def __init__(self, config: GPTHFConfig) -> None:
        rule = OwnSentence(config.recent_sentences)
        # Offsets are small, and so exact in half precision; across sentences only document positions tell distances.
        positions = "position" if config.recent_sentences else "offset"
        super().__init__("decoder", rule, positions, config.num_decoder_layers, config)
        self.memory_rule = EarlierSentences(own=config.ends_read_own_summary)
        self.memory_positions = config.memory_positions

    def decode(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        tokens: TokenStructure,
        summaries: Summaries,
        shared: Pass,
        held: StageCache | None,
        memory: StageCache | None,
        outputs: list[Tensor] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """As `forward`; `summaries` are those of the new sentence ends, and go to `memory`."""
        device = hidden_states.device
        if shared.is_fresh:
            keys_and_values = self._memory_of(summaries)
            if memory is not None:
                remember = _write_kept(self.memory_rule, summaries.structure, shared.after, memory, device)
                for number, (key, value) in enumerate(keys_and_values):
                    remember(number, key, value)
            memory_keys, memory_values = zip(*keys_and_values, strict=True)
        else:
            assert memory is not None
            if len(summaries.structure):
                row, slot = (index.to(device) for index in memory.extend(summaries.structure))
                for number, (key, value) in enumerate(self._memory_of(summaries)):
                    memory.write(number, row, slot, key, value)
            memory_keys, memory_values = memory.keys, memory.values
        if len(tokens) == 0:
            return self._nothing(hidden_states, outputs)

        angles = self._angles(self._position(tokens), hidden_states)
        # A rotated query turned on by the difference is the query that counts sentences.
        turn = self._angles(self._memory_position(tokens) - self._position(tokens), hidden_states)
        if shared.is_fresh:
            make_attention = dense_memory_attention if shared.is_dense else memory_plan
            attention = make_attention(tokens, summaries.structure, self._own_rule(), self.memory_rule).to(device)
            write = None if held is None else _write_kept(self.rule, tokens, shared.after, held, device)
            attends = self._attend_memory(attention, write, None, turn, memory_keys, memory_values)
        else:
            assert held is not None
            assert memory is not None
            row, slot = (index.to(device) for index in held.extend(tokens))
            over_own = held.held_attention(tokens, is_step=shared.is_step)
            over_memory = memory.held_attention(tokens, is_step=shared.is_step, written=0)
            if (
                shared.compiles
                and outputs is None
                and _is_plain_step(held, over_own, tokens)
                and _is_plain_step(memory, over_memory, tokens)
                # The compiler would take two numbers that are equal when it first sees them for one.
                and over_own.num_keys != over_memory.num_keys
            ):
                return compiled_step_with_memory(len(self.layers), self.shape.hidden_size)(
                    self._layer_list(),
                    hidden_states,
                    angles,
                    held.keys,
                    held.values,
                    slot,
                    over_own.num_keys,
                    turn,
                    memory_keys,
                    memory_values,
                    over_memory.num_keys,
                )
            attention = HeldMemoryAttention(over_own, over_memory).to(device)

            def write_all(number: int, key: Tensor, value: Tensor) -> None:
                held.write(number, row, slot, key, value)

            attends = self._attend_memory(attention, write_all, held, turn, memory_keys, memory_values)
        return self._run(hidden_states, angles, attends, outputs)

    def _own_rule(self) -> OwnSentence:
        return cast(OwnSentence, self.rule)

    def _memory_position(self, tokens: TokenStructure) -> Int[Tensor, " tokens"]:
        return tokens.sentence if self.memory_positions == "sentence" else torch.zeros_like(tokens.sentence)

    def _memory_of(self, summaries: Summaries) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values of the summaries."""
        angles = self._angles(self._memory_position(summaries.structure), summaries.states)
        return [layer.memory(summaries.states, angles) for layer in self._layer_list()]

    def _attend_memory(
        self,
        attention: MemoryPlan | DenseMemoryAttention | HeldMemoryAttention,
        write: _Write | None,
        held: StageCache | None,
        turn: Angles,
        memory_keys: Sequence[Tensor],
        memory_values: Sequence[Tensor],
    ) -> list[Attend]:
        """One attention a layer, over the new tokens, or over all that is `held`, and over memory."""

        def attend_layer(number: int) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                if write is not None:
                    write(number, key, value)
                if held is not None:
                    key, value = held.keys[number], held.values[number]
                cos, sin = (angle.to(query.dtype) for angle in turn)
                turned = rotate(query, cos, sin)
                return attention.attend(query, key, value, turned, memory_keys[number], memory_values[number])

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]


def _write_kept(
    rule: VisibilityRule, entries: TokenStructure, after: RowCounters, held: StageCache, device: torch.device
) -> _Write:
    """Makes room for what the rule keeps; returns what writes a layer's keys and values there."""
    kept = rule.keeps(entries, after)
    row, slot = (index.to(device) for index in held.extend(entries[kept]))
    kept_index = kept.nonzero().squeeze(1).to(device)

    def write(number: int, key: Tensor, value: Tensor) -> None:
        held.write(number, row, slot, key.index_select(0, kept_index), value.index_select(0, kept_index))

    return write


def _is_plain_step(held: StageCache, attention: HeldAttention, tokens: TokenStructure) -> bool:
    """One token of one row that reads all it holds, so that the compiled step will do."""
    # The compiler takes one slot alone, or all of them, for a case of its own. The first pays where every sentence
    # starts with it.
    fewest = 1 if isinstance(held.rule, OwnSentence) else 2
    return (
        len(tokens) == len(held.lengths) == 1
        and attention.mask is None
        and fewest <= attention.num_keys < held.capacity
        and not torch.is_grad_enabled()
    )


def depth_gains(config: GPTHFConfig) -> nn.ParameterList:
    """A gain for each feature of the embeddings' and of every encoder layer's output but the last; 0 at first."""
    # Vectors, not one matrix: they are no linear map, and optimisers treat matrices as such.
    return nn.ParameterList(torch.zeros(config.hidden_size) for _ in range(config.num_encoder_layers))


def with_depths(
    hidden_states: Float[Tensor, "entries hidden"], depths: list[Tensor], gains: nn.ParameterList
) -> Float[Tensor, "entries hidden"]:
    """The states with those of each depth added, weighted by feature; the last depth is the states themselves."""
    return hidden_states + sum(gain * depth for gain, depth in zip(gains, depths[:-1], strict=True))


def rows_at(states: Float[Tensor, "entries hidden"], index: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen hidden"]:
    """The states at `index`, whose members increase; copied only if some are left out."""
    return states if len(index) == len(states) else states.index_select(0, index.to(states.device))
