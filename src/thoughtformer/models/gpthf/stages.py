"""Stages of layers: a visibility rule, a position scheme, and how new tokens attend, alone or on a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.attention.cached import CachedAttention
from thoughtformer.attention.dense import DenseAttention
from thoughtformer.attention.joint import CachedJointAttention, DenseJointAttention, JointPlan
from thoughtformer.attention.rotary import rotate
from thoughtformer.cache import StageCache
from thoughtformer.models.gpthf.layers import (
    Angles,
    Layer,
    LayerAttention,
    SummaryAngles,
    compiled_step,
    compiled_step_with_summaries,
)
from thoughtformer.models.gpthf.stage_specs import StageSpec
from thoughtformer.models.packed_linear import PackableLinear
from thoughtformer.rules import (
    OwnSentence,
    RowCounters,
    TokenStructure,
    VisibilityRule,
    dense_joint_attention,
    dense_mask,
    joint_plan,
)

__all__ = ["DecoderStage", "Pass", "Stage", "Summaries", "rows_at"]

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


#: What a stage returns: states, and each layer's output, of its own width, where those are to be kept.
Passed = tuple[Float[Tensor, "tokens hidden"], list[Float[Tensor, "tokens width"]]]


class Stage(nn.Module):
    """Layers that share a visibility rule and a position scheme; of a width of their own, if the configuration says."""

    def __init__(self, spec: StageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.name, self.rule, self.shape = spec.name, spec.rule, spec.shape
        self.layers = nn.ModuleList(Layer(spec.shape) for _ in range(spec.num_layers))
        inner, outer = spec.shape.hidden_size, spec.outer_size
        self.in_proj = PackableLinear(outer, inner, False) if inner != outer else None
        self.out_proj = PackableLinear(inner, outer, False) if inner != outer else None

    def extra_repr(self) -> str:
        return f"{self.name}, visibility={self.rule.name}, positions={self.spec.positions}"

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        tokens: TokenStructure,
        shared: Pass,
        cache: StageCache | None,
        keeps_outputs: bool = False,
    ) -> Passed:
        """The last layer's output, and, if to be kept, each layer's. What later tokens may read goes to `cache`."""
        if len(tokens) == 0:
            return self._nothing(hidden_states, keeps_outputs)
        if self.in_proj is not None:
            hidden_states = self.in_proj(hidden_states)
        hidden_states, outputs = self._through(hidden_states, tokens, shared, cache, keeps_outputs)
        return (hidden_states if self.out_proj is None else self.out_proj(hidden_states)), outputs

    def _through(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        tokens: TokenStructure,
        shared: Pass,
        cache: StageCache | None,
        keeps_outputs: bool,
    ) -> Passed:
        device = hidden_states.device
        angles = self._angles(self._position(tokens), hidden_states)
        if shared.is_fresh:
            attention: AttentionPlan | DenseAttention
            if shared.is_dense:
                attention = DenseAttention(dense_mask(self.rule, tokens).to(device))
            else:
                attention = self.rule.plan(tokens).to(device)
            attends = self._attend_fresh(attention, tokens, shared.after, cache, device)
        else:
            assert cache is not None
            row, slot = (index.to(device) for index in cache.extend(tokens))
            over_cached = cache.cached_attention(tokens, is_step=shared.is_step)
            if shared.compiles and not keeps_outputs and _is_plain_step(cache, over_cached, tokens):
                step = compiled_step(len(self.layers), self.shape.hidden_size)
                layers = self._layer_list()
                return step(layers, hidden_states, angles, cache.keys, cache.values, slot, over_cached.num_keys), []
            attends = self._attend_cached(over_cached.to(device), cache, row, slot)
        return self._run(hidden_states, angles, attends, cache, keeps_outputs)

    def _run(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        angles: Angles,
        attends: Sequence[LayerAttention],
        cache: StageCache | None,
        keeps_outputs: bool,
        summaries: tuple[Float[Tensor, "entries width"], SummaryAngles] | None = None,
    ) -> Passed:
        outputs: list[Tensor] = []
        for layer, attend in zip(self._layer_list(), attends, strict=True):
            through = partial(layer, angles=angles, attend=attend, summaries=summaries)
            hidden_states = layer.run(through, hidden_states) if cache is None else through(hidden_states)
            if keeps_outputs:
                outputs.append(hidden_states)
        return hidden_states, outputs

    def _nothing(self, hidden_states: Float[Tensor, "0 hidden"], keeps_outputs: bool) -> Passed:
        """What `forward` returns for no tokens."""
        nothing = hidden_states.new_empty(0, self.shape.hidden_size)
        return hidden_states, [nothing] * len(self.layers) if keeps_outputs else []

    def _position(self, tokens: TokenStructure) -> Int[Tensor, " tokens"]:
        return getattr(tokens, self.spec.positions)

    def _angles(self, position: Int[Tensor, " tokens"], like: Tensor) -> Angles:
        # Under autocast weights are float32; rotations are cast to the activations' dtype in the layer.
        dtype = cast(Tensor, self.layers[0].attention_norm.weight).dtype  # type: ignore[union-attr]
        return self.spec.rotary.angles(position.to(like.device), dtype)

    def _layer_list(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def _attend_fresh(
        self,
        attention: AttentionPlan | DenseAttention,
        tokens: TokenStructure,
        after: RowCounters,
        cache: StageCache | None,
        device: torch.device,
    ) -> list[LayerAttention]:
        """One attention a layer, over the new tokens alone; what the rule keeps goes to the cache."""
        if cache is None:
            return [attention.attend] * len(self.layers)
        write = _write_kept(self.rule, tokens, after, cache, device)

        def attend_layer(number: int) -> LayerAttention:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                write(number, key, value)
                return attention.attend(query, key, value)

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]

    def _attend_cached(
        self, attention: CachedAttention, cache: StageCache, row: Int[Tensor, " tokens"], slot: Int[Tensor, " tokens"]
    ) -> list[LayerAttention]:
        """One attention a layer, over everything held with the new tokens added."""

        def attend_layer(number: int) -> LayerAttention:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                cache.write(number, row, slot, key, value)
                return attention.attend(query, cache.keys[number], cache.values[number])

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]


class DecoderStage(Stage):
    """Word-level layers that read, beside their sentence's tokens, what stands for earlier sentences.

    Summaries enter every layer as further keys and values, by the layer's own norm and projections. Running the middle
    of the stack seldom, between word-level layers, is after arXiv 2406.02657 (blocks) and 2501.10322 (words).
    """

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(spec)
        assert spec.summaries is not None
        self.summary_rule, self.summary_positions = spec.summaries.rule, spec.summaries.positions

    def decode(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        tokens: TokenStructure,
        summaries: Summaries,
        shared: Pass,
        cache: StageCache | None,
        summary_cache: StageCache | None,
        keeps_outputs: bool = False,
    ) -> Passed:
        """As `forward`; `summaries` are those of the new sentence ends, and go to `summary_cache`."""
        device = hidden_states.device
        made = None
        if len(summaries.structure) or shared.is_fresh:
            made = (summaries.states, self._angles(self._summary_position(summaries.structure), summaries.states))
        if len(tokens) == 0 and (made is None or summary_cache is None):
            return self._nothing(hidden_states, keeps_outputs)
        angles = self._angles(self._position(tokens), hidden_states)
        # A rotated query turned on by the difference is the query that counts sentences.
        turn = self._angles(self._summary_position(tokens) - self._position(tokens), hidden_states)
        write: _Write | None = None
        remember: _Write | None = None
        attention: JointPlan | DenseJointAttention | CachedJointAttention | None = None
        if shared.is_fresh:
            if summary_cache is not None:
                remember = _write_kept(self.summary_rule, summaries.structure, shared.after, summary_cache, device)
            if cache is not None and len(tokens):
                write = _write_kept(self.rule, tokens, shared.after, cache, device)
            if len(tokens):
                make_attention = dense_joint_attention if shared.is_dense else joint_plan
                attention = make_attention(
                    tokens, summaries.structure, cast(OwnSentence, self.rule), self.summary_rule
                ).to(device)
            attends = self._attend_jointly(attention, write, remember, turn)
            return self._run(hidden_states, angles, attends, cache, keeps_outputs, made)

        assert cache is not None
        assert summary_cache is not None
        if made is not None:
            remember = _write_new(summary_cache, summaries.structure, device)
        if len(tokens):
            row, slot = (index.to(device) for index in cache.extend(tokens))
            write = partial(_write_at, cache, row, slot)
            over_own = cache.cached_attention(tokens, is_step=shared.is_step)
            over_summaries = summary_cache.cached_attention(tokens, is_step=shared.is_step, written=0)
            if (
                shared.compiles
                and not keeps_outputs
                and _is_plain_step(cache, over_own, tokens)
                and _is_plain_step(summary_cache, over_summaries, tokens)
                # The compiler would take two numbers that are equal when it first sees them for one.
                and over_own.num_keys != over_summaries.num_keys
            ):
                assert made is None, "what was just written needs a mask"
                states = compiled_step_with_summaries(len(self.layers), self.shape.hidden_size)(
                    self._layer_list(),
                    hidden_states,
                    angles,
                    cache.keys,
                    cache.values,
                    slot,
                    over_own.num_keys,
                    turn,
                    summary_cache.keys,
                    summary_cache.values,
                    over_summaries.num_keys,
                )
                return states, []
            attention = CachedJointAttention(over_own, over_summaries).to(device)
        attends = self._attend_jointly(attention, write, remember, turn, (cache, summary_cache))
        return self._run(hidden_states, angles, attends, cache, keeps_outputs, made)

    def _summary_position(self, tokens: TokenStructure) -> Int[Tensor, " tokens"]:
        if self.summary_positions is None:
            return torch.zeros_like(tokens.sentence)
        return getattr(tokens, self.summary_positions)

    def _attend_jointly(
        self,
        attention: JointPlan | DenseJointAttention | CachedJointAttention | None,
        write: _Write | None,
        remember: _Write | None,
        turn: Angles,
        caches: tuple[StageCache, StageCache] | None = None,
    ) -> list[LayerAttention]:
        """One attention a layer, over new tokens and new summaries, or over all that the caches hold of both.

        Without `attention` there are no tokens, and summaries are only written.
        """

        def attend_layer(number: int) -> LayerAttention:
            def attend(query: Tensor, key: Tensor, value: Tensor, *summaries: Tensor) -> Tensor:
                if write is not None:
                    write(number, key, value)
                if remember is not None:
                    remember(number, *summaries)
                if attention is None:
                    return query
                if caches is not None:
                    own, earlier = caches
                    key, value, summaries = (
                        own.keys[number],
                        own.values[number],
                        (earlier.keys[number], earlier.values[number]),
                    )
                cos, sin = (angle.to(query.dtype) for angle in turn)
                return attention.attend(query, key, value, rotate(query, cos, sin), *summaries)

            return attend

        return [attend_layer(number) for number in range(len(self.layers))]


def _write_at(
    cache: StageCache,
    row: Int[Tensor, " entries"],
    slot: Int[Tensor, " entries"],
    number: int,
    key: Tensor,
    value: Tensor,
) -> None:
    cache.write(number, row, slot, key, value)


def _write_new(cache: StageCache, entries: TokenStructure, device: torch.device) -> _Write:
    """Makes room for new entries; returns what writes a layer's keys and values there."""
    row, slot = (index.to(device) for index in cache.extend(entries))
    return partial(_write_at, cache, row, slot)


def _write_kept(
    rule: VisibilityRule, entries: TokenStructure, after: RowCounters, cache: StageCache, device: torch.device
) -> _Write:
    """Makes room for what the rule keeps; returns what writes a layer's keys and values there."""
    kept = rule.keeps(entries, after)
    row, slot = (index.to(device) for index in cache.extend(entries[kept]))
    kept_index = kept.nonzero().squeeze(1).to(device)

    def write(number: int, key: Tensor, value: Tensor) -> None:
        cache.write(number, row, slot, key.index_select(0, kept_index), value.index_select(0, kept_index))

    return write


def _is_plain_step(cache: StageCache, attention: CachedAttention, tokens: TokenStructure) -> bool:
    """One token of one row that reads all it holds, so that the compiled step will do."""
    # The compiler takes one slot alone, or all of them, for a case of its own. The first pays where every sentence
    # starts with it.
    fewest = 1 if cache.rule.starts_empty else 2
    return (
        len(tokens) == len(cache.lengths) == 1
        and attention.mask is None
        and fewest <= attention.num_keys < cache.capacity
        and not torch.is_grad_enabled()
    )


def rows_at(states: Float[Tensor, "entries hidden"], index: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen hidden"]:
    """The states at `index`, whose members increase; copied only if some are left out."""
    return states if len(index) == len(states) else states.index_select(0, index.to(states.device))
