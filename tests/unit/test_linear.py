"""Packed weights: the same products, never a stale copy, nothing left in what is saved."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from conftest import tiny_model
from thoughtformer import Engine, load
from thoughtformer.bench import count_flops
from thoughtformer.models.packed_linear import (
    PackableLinear,
    can_pack,
    pack_weights,
    unpack_weights,
    using_packed_weights,
)
from thoughtformer.sampling import SamplingParams

needs_packing = pytest.mark.skipif(not can_pack(), reason="this build of PyTorch can't pack weights")


@pytest.fixture(autouse=True)
def pack_all(monkeypatch):
    """Layers of any size, so that those of the tests are packed."""
    monkeypatch.setattr("thoughtformer.models.packed_linear.LEAST_PACKED", 0)


@pytest.fixture
def in_use():
    """Packed copies are used, as within the engine."""
    with using_packed_weights():
        yield


@pytest.fixture
def linear() -> PackableLinear:
    """A layer of odd sizes, in evaluation."""
    torch.manual_seed(0)
    return PackableLinear(37, 91, bias=True).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("shape", [(1, 37), (2, 37), (64, 37), (3, 5, 37), (0, 37)])
@torch.inference_mode()
def test_packed_product_is_the_product(linear, in_use, shape):
    states = torch.randn(shape)
    plain = linear(states)
    linear.pack()
    assert linear._packed is not None
    torch.testing.assert_close(linear(states), plain)


@needs_packing
def test_the_copy_is_really_used(linear, in_use):
    linear.pack()
    linear._packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(91, 37), 8)
    with torch.no_grad():
        assert torch.equal(linear(torch.randn(2, 37)), linear.bias.expand(2, 91))
    assert linear(torch.randn(2, 37)).std() > 0.1  # gradients are on


@needs_packing
@pytest.mark.parametrize("change", ["in place", "data", "load"])
def test_a_changed_weight_is_never_served_from_the_copy(linear, in_use, change):
    linear.pack()
    new = torch.randn(91, 37)
    with torch.no_grad():
        if change == "in place":
            linear.weight.copy_(new)
        elif change == "data":
            linear.weight.data = new
        else:
            linear.load_state_dict({"weight": new, "bias": linear.bias})
        states = torch.randn(4, 37)
        torch.testing.assert_close(linear(states), torch.nn.functional.linear(states, new, linear.bias))


@needs_packing
def test_writing_through_data_is_seen_by_the_next_pack(linear, in_use):
    """As merging LoRA does; the engine packs before every prefill."""
    linear.pack()
    before = linear._packed
    linear.pack()
    assert linear._packed is before
    linear.weight.data.mul_(2)
    linear.pack()
    states = torch.randn(3, 37)
    with torch.no_grad():
        torch.testing.assert_close(linear(states), torch.nn.functional.linear(states, linear.weight, linear.bias))


@needs_packing
def test_a_round_trip_through_another_type_drops_the_copy(linear):
    linear.pack()
    linear.to(torch.bfloat16).to(torch.float32)
    assert linear._packed is None


@needs_packing
def test_an_engine_notices_that_its_model_changed():
    model, tokenizer = load("tiny-gpthf")
    engine, params = Engine(model, tokenizer), SamplingParams(max_new_tokens=8)
    before = engine.generate(["The sea was calm."], params)[0].ids
    for parameter in model.parameters():
        parameter.data.mul_(-1)
    after = engine.generate(["The sea was calm."], params)[0].ids
    assert after != before
    assert after == Engine(model, tokenizer, pack=False).generate(["The sea was calm."], params)[0].ids
    assert model.lm_head._packed is None


@needs_packing
@torch.inference_mode()
def test_a_copy_that_an_engine_made_is_its_own(linear):
    """Whoever else asks the layer has the weight as it is, edits through `data` included."""
    linear.pack()
    linear.weight.data.mul_(2)
    states = torch.randn(3, 37)
    expected = torch.nn.functional.linear(states, linear.weight, linear.bias)
    assert torch.equal(linear(states), expected)
    with using_packed_weights():
        assert not torch.allclose(linear(states), expected)
    model, tokenizer = load("tiny-gpthf")
    ids = torch.tensor([tokenizer.encode("The sea was calm.")])
    Engine(model, tokenizer).generate(["The sea was calm."], SamplingParams(max_new_tokens=2))
    assert model.lm_head._packed is not None
    model.lm_head.weight.data.mul_(3)
    logits = model(ids).logits
    unpack_weights(model)
    assert torch.equal(logits, model(ids).logits)


@needs_packing
def test_other_types_autocast_and_gradients_take_the_plain_route(linear, in_use):
    linear.pack()
    states = torch.randn(2, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert linear(states).dtype == torch.bfloat16
    states.requires_grad_()
    linear(states).sum().backward()
    assert states.grad is not None
    with torch.no_grad():
        assert linear.double()(torch.randn(2, 37, dtype=torch.float64)).dtype == torch.float64


@needs_packing
def test_copies_and_state_hold_no_packed_weight(linear):
    linear.pack()
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert copy.deepcopy(linear)._packed is None
    linear.unpack()
    assert linear._packed is None


@needs_packing
def test_small_weights_stay_plain(monkeypatch):
    monkeypatch.setattr("thoughtformer.models.packed_linear.LEAST_PACKED", 37 * 91)
    small, large = PackableLinear(37, 90), PackableLinear(37, 91)
    pack_weights(torch.nn.Sequential(small, large))
    assert small._packed is None
    assert large._packed is not None


def test_double_stays_plain():
    model = tiny_model("hybrid")
    pack_weights(model)
    assert model.lm_head._packed is None


@needs_packing
def test_an_engine_writes_the_same_packed_or_not():
    model, tokenizer = load("tiny-gpthf")
    prompts, params = ["The sea was calm.", "It was late. Her uncle had"], SamplingParams(max_new_tokens=24)
    plain = [done.ids for done in Engine(model, tokenizer, pack=False).generate(prompts, params)]
    assert model.lm_head._packed is None
    packed = [done.ids for done in Engine(model, tokenizer).generate(prompts, params)]
    assert model.lm_head._packed is not None
    assert packed == plain
    unpack_weights(model)
    assert model.lm_head._packed is None


@needs_packing
@torch.inference_mode()
def test_packed_products_are_counted(linear, in_use):
    linear.pack()
    with count_flops() as counted:
        linear(torch.randn(3, 5, 37))
    assert counted.total == 2 * 15 * 37 * 91


#: Run apart: the shape checks of conftest.py can't be compiled.
COMPILED = """
import torch
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.gpthf.modeling import compile_steps

torch.manual_seed(0)
config = GPTHFConfig(
    vocab_size=40, hidden_size=32, num_encoder_layers=2, num_body_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.4, **CHANGES,
)
model = GPTHFForCausalLM(config).double().eval()
ids = torch.randint(2, 40, (90,))
ids[::7] = 1
ids[30:60] = 5

@torch.inference_mode()
def steps():
    cache = model.new_cache(1)
    first = [model(token.view(1, 1), cache=cache).logits[0] for token in ids[:WARMUP]]
    # All stages are compiled by now; from here on each must do.
    with torch._dynamo.config.patch(error_on_recompile=True):
        return torch.cat(first + [model(token.view(1, 1), cache=cache).logits[0] for token in ids[WARMUP:]])

plain = steps()
compile_steps(model)
compiled = steps()
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert graphs == GRAPHS, f"{graphs} graphs"
torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-9)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("changes", "graphs", "warmup"),
    # The hourglass's decoder is compiled anew once its two caches are of unlike size.
    [({}, 4, 9), ({"body_visibility": "fast", "num_decoder_layers": 2}, 7, 60)],
    ids=["hybrid", "hourglass"],
)
def test_a_compiled_step_is_the_step(changes, graphs, warmup):
    """Float64, 1e-9; a compilation a stage and the head's, and one more where sentences start, serve every step."""
    program = f"CHANGES = {changes!r}\nGRAPHS = {graphs}\nWARMUP = {warmup}\n{COMPILED}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
