"""Training as users do it: checkpointed layers, LoRA by its defaults, accumulated gradients. The same gradients."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import SWITCHES, tiny_model
from lms import policy, random_ids, tiny_adapter, tiny_lm
from prose import tiny_pair
from thoughtformer import compress
from thoughtformer.compression import Local, Sentinel
from thoughtformer.errors import UnsupportedError
from thoughtformer.models.gpthf.layers import Layer
from thoughtformer.models.handed_in import ACTING
from thoughtformer.recipes import recipe
from thoughtformer.train.optimizer import build_optimizer
from thoughtformer.train.trainer import recipe_optimizer

peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ALL = {**SWITCHES, **{name: {"visibility": name} for name in ("fast", "hybrid", "keep_last", "causal")}}


def text_ids():
    """Rows of several sentences."""
    ids = random_ids(2, 60)
    ids[:, 7::9], ids[:, 0] = 1, 0
    return ids


def gradients(model, parameters, **inputs):
    """Loss, and the gradient of each parameter that has one."""
    torch.manual_seed(0)  # for dropout
    for parameter in parameters.values():
        parameter.grad = None
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_same(first, second, atol=1e-9):
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=atol)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=0, atol=atol, msg=name)


@peft_asks_by_an_old_name
@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("name", list(ALL))
def test_gradient_checkpointing(name, loss_only, monkeypatch):
    """Layers run twice, and the gradients stay."""
    model = tiny_model(**({"rebuild_loss_weight": 0.0 if name == "causal" else 0.1} | ALL[name])).train()
    calls = []
    forward = Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *a, **k: (calls.append(self), forward(self, *a, **k))[1])
    ids, parameters = text_ids(), dict(model.named_parameters())
    inputs = {"input_ids": ids, "labels": ids, "loss_only": loss_only}
    expected = gradients(model, parameters, **inputs)
    plain_calls = len(calls)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    actual = gradients(model, parameters, **inputs)
    assert len(calls) == 3 * plain_calls
    assert_same(actual, expected)
    with torch.no_grad():
        model(ids, use_cache=True)  # writes a cache, and so runs once
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@peft_asks_by_an_old_name
def test_reentrant_checkpointing_is_refused():
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        tiny_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@peft_asks_by_an_old_name
@pytest.mark.parametrize("sentinels_only", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "plain"])
def test_checkpointing_under_an_adapter(family, sentinels_only):
    """The second pass of a layer, long after the call, has LoRA act on the same entries."""
    model = tiny_lm(family)
    adapter = tiny_adapter(model, sentinels_only=sentinels_only)
    parameters = {str(number): p.requires_grad_(True) for number, p in enumerate(adapter.trainable())}
    compressed = compress(model, Sentinel(policy=policy()), adapter=adapter).train()
    ids = random_ids(2, 40)
    expected = gradients(compressed, parameters, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable()
    assert_same(gradients(compressed, parameters, input_ids=ids, labels=ids), expected)
    assert ACTING.get() is None


@peft_asks_by_an_old_name
@pytest.mark.parametrize("name", ["causal", "hybrid", "hourglass_recent", "everything"])
@torch.no_grad()
def test_lora_without_target_modules(name):
    """peft knows what to change, and an adapter that acts is what it is when merged, also on memory's keys."""
    model, ids = tiny_model(**ALL[name]), text_ids()
    bare = model(ids).logits
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    with_lora = peft(ids).logits
    assert not torch.allclose(with_lora, bare)
    stepped = []
    cache = peft.get_base_model().new_cache(2)
    for column in ids.split(1, dim=1):
        stepped.append(peft(column, cache=cache).logits)
    torch.testing.assert_close(torch.cat(stepped, dim=1), with_lora, rtol=0, atol=1e-9)
    torch.testing.assert_close(peft.merge_and_unload()(ids).logits, with_lora, rtol=0, atol=1e-9)


@peft_asks_by_an_old_name
def test_lora_on_the_head_is_trained_through_the_loss_alone():
    model, ids = tiny_model("hybrid", rebuild_loss_weight=0.1, tie_word_embeddings=False), text_ids()
    peft = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "qkv_proj"], init_lora_weights=False)
    ).train()
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in parameters)
    whole = gradients(peft, parameters, input_ids=ids, labels=ids)
    # transformers' loss rounds logits to float32.
    assert_same(gradients(peft, parameters, input_ids=ids, labels=ids, loss_only=True), whole, atol=1e-6)


class _FirstStep(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "grad_norm" in logs:
            self.seen = logs["loss"], logs["grad_norm"]


@pytest.mark.parametrize("kind", ["gpthf", "bare", "view"])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind, tmp_path):
    """transformers' Trainer hands on how many tokens a step has; rows here have unlike numbers of them."""
    rows = []
    for number, row in enumerate(random_ids(8, 32)):
        labels = row.clone()
        labels[: 3 * number] = -100
        rows.append({"input_ids": row, "labels": labels})

    def first_step(size, steps):
        if kind == "gpthf":
            model = tiny_pair(rebuild_loss_weight=0.0)[0].float().train()
        else:
            model = tiny_lm(dtype=torch.float32).train()
        first = _FirstStep()
        trainer = Trainer(
            model=compress(model, Local(removed=0.5)) if kind == "view" else model,
            args=TrainingArguments(
                str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
                logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            callbacks=[first],
        )  # fmt: skip
        trainer.train()
        return [float(value) for value in first.seen]

    assert first_step(1, 8) == pytest.approx(first_step(8, 1), rel=2e-3)


def test_muon_is_refused_where_parameters_are_sharded(tmp_path):
    settings = {"learning_rate": 1e-3, "matrix_learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    model = tiny_model().float()
    optimizer = build_optimizer(model, kind="muon", **settings)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        weight = model.model.stages[0].layers[0].attention.qkv_proj
        split = torch.nn.Parameter(distribute_tensor(weight.weight.detach(), mesh, [Shard(0)]))
        weight.weight = split
        with pytest.raises(UnsupportedError, match=r"muon.*sharded"):
            build_optimizer(model, kind="muon", **settings)
        build_optimizer(model, kind="adamw", **settings)
        # Sharded after the optimiser was made, as FSDP2 does it under accelerate.
        group = optimizer.param_groups[0]
        group["params"] = [split, *group["params"][1:]]
        with pytest.raises(UnsupportedError, match=r"muon.*sharded"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    flat = torch.nn.Linear(4, 4)
    flat.weight._is_flat_param = True
    with pytest.raises(UnsupportedError, match="muon"):
        build_optimizer(flat, kind="muon", **settings)
    assert recipe_optimizer(recipe("tiny-gpthf"), tiny_model().float()) is not None


# Logits are a view of what layers gave back; nothing here writes to them.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("switches", ["default_recipe", "everything", "hybrid_depths"])
def test_fully_sharded_layers_give_the_same_gradients(switches, tmp_path):
    """A layer's weights are whole only while it is called: whatever a stage asks of a layer goes through its call."""
    ids = text_ids()
    plain, sharded = tiny_model(**SWITCHES[switches]).train(), tiny_model(**SWITCHES[switches]).train()
    loss = plain(ids, labels=ids).loss
    loss.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        for layer in [module for module in sharded.modules() if isinstance(module, Layer)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        loss_there = sharded(ids, labels=ids).loss
        loss_there.backward()
        torch.testing.assert_close(loss_there, loss, rtol=0, atol=1e-9)
        theirs = dict(sharded.named_parameters())
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(theirs[name].grad.full_tensor(), parameter.grad, rtol=0, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharding_trainer_is_refused_before_it_starts():
    from thoughtformer.train.trainer import SentenceTrainer

    stand_in = types.SimpleNamespace(
        optimizer=None,
        model=tiny_model(),
        recipe=types.SimpleNamespace(optimizer="muon"),
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
    )
    with pytest.raises(UnsupportedError, match="FSDP"):
        SentenceTrainer.create_optimizer(stand_in)  # type: ignore[arg-type]
