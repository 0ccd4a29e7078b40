"""GPTHF without its head: a word-level encoder, then a sentence-level body.

    ids -> embedding -> stage "encoder" (own sentence) -> stage "body" (sentence ends, ...) -> RMSNorm -> tied head

The stack is a list of stages, each with its visibility rule. The parallel forward and the step-by-step decode are one
function, `GPTHFModel.forward`: it takes ragged tokens, reads their structure off their ids, lets only those tokens
pass a stage that something later depends on, and attends either by plan (nothing held yet) or to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from thoughtformer.attention import (
    AttentionPlan,
    Causal,
    DenseAttention,
    HeldAttention,
    OwnSentence,
    RowCounters,
    TokenStructure,
    VisibilityRule,
    body_rule,
    dense_mask,
    read_structure,
    rotary_angles,
)
from thoughtformer.cache import GPTHFCache, StageCache, stage_bytes
from thoughtformer.errors import ContextOverflowError
from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.models.layers import Attend, Layer, compiled_step, residual_projections

__all__ = ["GPTHFModel", "GPTHFPreTrainedModel", "RaggedOutput", "Stage", "compile_steps"]


class Stage(nn.Module):
    """Layers that share a visibility rule and a position scheme."""

    def __init__(self, name: str, rule: VisibilityRule, positions: str, num_layers: int, config: GPTHFConfig) -> None:
        super().__init__()
        self.name = name
        self.rule = rule
        self.positions = positions
        self.layers = nn.ModuleList(Layer(config) for _ in range(num_layers))

    def extra_repr(self) -> str:
        return f"{self.name}, visibility={self.rule.name}, positions={self.positions}"


def _stages(config: GPTHFConfig) -> list[Stage]:
    stages = []
    if config.num_encoder_layers:
        # Counting inside the sentence makes the encoder's output depend on the sentence alone.
        stages.append(Stage("encoder", OwnSentence(), "offset", config.num_encoder_layers, config))
    rule = body_rule(config.body_visibility)
    counts_tokens = isinstance(rule, Causal) or config.body_positions == "token"
    stages.append(Stage("body", rule, "position" if counts_tokens else "sentence", config.num_body_layers, config))
    return stages


@dataclass(frozen=True, eq=False, kw_only=True)
class RaggedOutput:
    """What `GPTHFModel.forward` returns, for the `wanted` tokens in text order.

    `hidden_states` holds, when asked for, the embeddings and every layer's output for all tokens.
    """

    last_hidden_state: Float[Tensor, "wanted hidden"]
    tokens: TokenStructure
    hidden_states: list[Float[Tensor, "tokens hidden"]] | None


class GPTHFPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving."""

    config_class = GPTHFConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012  these are transformers' declarations
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Layer):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            for weight in residual_projections(module):
                init.normal_(weight, mean=0.0, std=std)


class GPTHFModel(GPTHFPreTrainedModel):
    """The stages without the head, over ragged tokens."""

    #: Whether a step of one row passes each stage's layers as one compiled function.
    compiles_steps = False

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(_stages(config))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.embed_tokens)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def _stage_list(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))

    def new_cache(self, num_rows: int) -> GPTHFCache:
        """An empty cache for `num_rows` rows, in the model's dtype and on its device."""
        config = self.config
        stages = [
            StageCache(
                stage.rule,
                num_layers=len(stage.layers),
                num_rows=num_rows,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            for stage in self._stage_list()
        ]
        return GPTHFCache(stages, num_rows)

    def cache_bytes(self, longest_row_entries: dict[str, int], num_rows: int, *, reserve_tokens: int = 0) -> int:
        """What `num_bytes()` of a committed cache must be, given each stage's longest row and the reserve."""
        config = self.config
        stages = sum(
            stage_bytes(
                stage.rule,
                num_layers=len(stage.layers),
                num_rows=num_rows,
                longest_row_entries=max(longest_row_entries[stage.name], reserve_tokens if stage.rule.keeps_all else 0),
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=self.dtype,
            )
            for stage in self._stage_list()
        )
        return stages + num_rows * 8 * 5  # four counters and the token count

    def forward(
        self,
        input_ids: Int[Tensor, " tokens"],
        row: Int[Tensor, " tokens"],
        cache: GPTHFCache | None = None,
        *,
        num_rows: int | None = None,
        num_columns: int = 0,
        wanted: Bool[Tensor, " tokens"] | None = None,
        output_hidden_states: bool = False,
    ) -> RaggedOutput:
        """The hidden states of the `wanted` tokens (all by default), after the final norm.

        Args:
            input_ids: the new tokens of all rows, row after row, without padding.
            row: each token's row, on the CPU, never decreasing.
            cache: what the rows have read before; updated.
            num_rows: rows without a cache; default: those named.
            num_columns: by how much the cache's `get_seq_length` grows.
            wanted: on the CPU.
            output_hidden_states: also return every layer's output, of all tokens.

        Raises:
            ContextOverflowError: a document grows past `max_position_embeddings`, and `allow_extrapolation` is off.
        """
        if cache is not None:
            counters = cache.counters
        else:
            counters = RowCounters.zeros(num_rows if num_rows is not None else int(row.max()) + 1 if len(row) else 0)
        tokens = read_structure(
            input_ids.cpu(),
            row,
            counters,
            sentence_end_token_id=self.config.sentence_end_token_id,
            document_start_token_id=self.config.bos_token_id,
        )
        self._check_length(tokens)
        if wanted is None:
            wanted = torch.ones(len(tokens), dtype=torch.bool)
        after = counters.after(tokens)
        passing = self._passing(tokens, after, cache, wanted, keep_all=output_hidden_states)

        hidden_states = self.embed_tokens(input_ids)
        collected = [hidden_states] if output_hidden_states else None
        index: Int[Tensor, " passing"] = torch.arange(len(tokens))
        try:
            for number, stage in enumerate(self._stage_list()):
                if int(passing[number].sum()) < len(index):
                    still = passing[number][index]
                    hidden_states = hidden_states[still.to(hidden_states.device)]
                    index = index[still]
                held = None if cache is None else cache.stages[number]
                fresh = cache is None or (cache.is_fresh and cache.autocommit)
                at_stage = tokens if len(index) == len(tokens) else tokens[index]
                hidden_states = self._run(stage, hidden_states, at_stage, after, held, fresh, collected)
            is_wanted = wanted[index]
            if not bool(is_wanted.all()):
                hidden_states = hidden_states[is_wanted.to(hidden_states.device)]
            last = self.norm(hidden_states)
        except BaseException:
            if cache is not None and cache.autocommit:
                cache.rollback()  # never leave a step half written
            raise
        if cache is not None:
            cache.record(tokens, after, num_columns)
        return RaggedOutput(last_hidden_state=last, tokens=tokens[index[is_wanted]], hidden_states=collected)

    def _passing(
        self,
        tokens: TokenStructure,
        after: RowCounters,
        cache: GPTHFCache | None,
        wanted: Bool[Tensor, " tokens"],
        keep_all: bool,
    ) -> list[Bool[Tensor, " tokens"]]:
        """Per stage, the tokens that must pass it: the wanted, those a cache will keep, and all these depend on."""
        everything = torch.ones_like(wanted)
        if keep_all or (cache is not None and not cache.autocommit) or bool(wanted.all()):
            return [everything] * len(self.stages)
        needed, passing = wanted, []
        for stage in reversed(self._stage_list()):
            if cache is not None:
                needed = needed | stage.rule.keeps(tokens, after)
            needed = stage.rule.needs(tokens, needed)
            passing.append(needed)
        return passing[::-1]

    def _run(
        self,
        stage: Stage,
        hidden_states: Float[Tensor, "tokens hidden"],
        tokens: TokenStructure,
        after: RowCounters,
        held: StageCache | None,
        fresh: bool,
        collected: list[Float[Tensor, "tokens hidden"]] | None,
    ) -> Float[Tensor, "tokens hidden"]:
        if len(tokens) == 0:
            return hidden_states
        device = hidden_states.device
        position = getattr(tokens, stage.positions).to(device)
        # Under autocast the model's own dtype is float32; rotations are cast to the activations' dtype in the layer.
        angles = rotary_angles(position, self.config.head_dim, self.config.rope_theta, self.dtype)
        if fresh:
            attention: AttentionPlan | DenseAttention
            if self.config._attn_implementation == "eager":
                attention = DenseAttention(dense_mask(stage.rule, tokens).to(device))
            else:
                attention = stage.rule.plan(tokens).to(device)
            attends = _attend_fresh(attention, stage, tokens, after, held, device)
        else:
            assert held is not None
            row, slot = (index.to(device) for index in held.extend(tokens))
            held_attention = held.held_attention(tokens)
            if (
                self.compiles_steps
                and len(tokens) == len(held.lengths) == 1
                and held_attention.mask is None
                # The compiler would take one slot alone, or all of them, for a case of its own.
                and 1 < held_attention.num_keys < held.capacity
                and collected is None
                and not torch.is_grad_enabled()
            ):
                return compiled_step()(
                    list(stage.layers), hidden_states, angles, held.keys, held.values, slot, held_attention.num_keys
                )
            attends = _attend_held(stage, held, held_attention.to(device), row, slot)
        for layer, attend in zip(stage.layers, attends, strict=True):
            hidden_states = layer(hidden_states, angles, attend)
            if collected is not None:
                collected.append(hidden_states)
        return hidden_states

    def _check_length(self, tokens: TokenStructure) -> None:
        limit = self.config.max_position_embeddings
        if self.config.allow_extrapolation or len(tokens) == 0:
            return
        longest = int(tokens.position.max()) + 1
        if longest > limit:
            raise ContextOverflowError(
                f"a document reaches {longest} tokens, but the model was trained for {limit}. Shorten the text, or "
                "allow_extrapolation (config.allow_extrapolation=True, --allow-extrapolation)."
            )


def compile_steps(model: nn.Module, *, enabled: bool = True) -> None:
    """Compiles the steps of single rows, stage by stage; the first step then takes many seconds."""
    for part in model.modules():
        if isinstance(part, GPTHFModel):
            part.compiles_steps = enabled


def _attend_fresh(
    attention: AttentionPlan | DenseAttention,
    stage: Stage,
    tokens: TokenStructure,
    after: RowCounters,
    held: StageCache | None,
    device: torch.device,
) -> list[Attend]:
    """One attention a layer, over the new tokens alone; what the rule keeps goes to the cache."""
    if held is None:
        return [attention.attend] * len(stage.layers)
    kept = stage.rule.keeps(tokens, after)
    row, slot = (index.to(device) for index in held.extend(tokens[kept]))
    kept_index = kept.nonzero().squeeze(1).to(device)

    def attend_layer(number: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            held.write(number, row, slot, key.index_select(0, kept_index), value.index_select(0, kept_index))
            return attention.attend(query, key, value)

        return attend

    return [attend_layer(number) for number in range(len(stage.layers))]


def _attend_held(
    stage: Stage, held: StageCache, attention: HeldAttention, row: Int[Tensor, " tokens"], slot: Int[Tensor, " tokens"]
) -> list[Attend]:
    """One attention a layer, over everything held with the new tokens added."""

    def attend_layer(number: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            held.write(number, row, slot, key, value)
            return attention.attend(query, held.keys[number], held.values[number])

        return attend

    return [attend_layer(number) for number in range(len(stage.layers))]
