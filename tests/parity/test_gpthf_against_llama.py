"""The plain GPT is a Llama: in transformers, from a folder, and in a GGUF file."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import random_text, tiny_model
from prose import tiny_pair
from thoughtformer import compress, load
from thoughtformer.convert.gguf import write_gguf
from thoughtformer.convert.llama import as_llama, export_llama
from thoughtformer.errors import CheckpointError, OutputError, UnsupportedError


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["plain_heads", "grouped_heads"])
def test_logits_equal_llama(kv_heads):
    model = tiny_model(
        "causal", num_encoder_layers=0, num_body_layers=3, num_key_value_heads=kv_heads, sentence_end_token_id=None
    )
    text = random_text(60, seed=1)[None]
    with torch.no_grad():
        ours, theirs = model(text).logits, as_llama(model)(text).logits
    # transformers computes rotations in float32.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_llama_shares_the_weights():
    model = tiny_model("causal", num_encoder_layers=0, sentence_end_token_id=None)
    llama = as_llama(model)
    with torch.no_grad():
        model.model.stages[0].layers[0].attention.qkv_proj.weight.zero_()
    assert not llama.model.layers[0].self_attn.q_proj.weight.any()


def test_exported_folder_reads_and_writes_the_same(tmp_path):
    model, tokenizer = load("tiny-gpt")
    export_llama(model, tokenizer, tmp_path / "llama")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    plain = AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = "The lamp went out. Nobody said a word,\n\nand <|endoftext|> is text? Yes."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert plain("The lamp went out.")["input_ids"] == tokenizer("The lamp went out.")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
    with pytest.raises(OutputError, match="exists"):
        export_llama(model, tokenizer, tmp_path / "llama")


def test_a_gguf_file_loads_and_can_be_compressed(tmp_path):
    """What llama.cpp reads, `load` reads too: the same logits and ids, and a folder that it was saved to."""
    pytest.importorskip("gguf")
    model, tokenizer = tiny_pair(plain=True)
    model = model.float()
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    loaded, theirs = load(tmp_path / "tiny.gguf")
    text = "The sea was calm. It was late."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids[0, 1:].tolist()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
        with compress(loaded, "streaming", max_entries=8) as small:
            assert small(ids).logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "folder")
    theirs.save_pretrained(tmp_path / "folder")
    again, _ = load(tmp_path / "folder")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for damaged in (b"no such file", whole[:3000], whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no causal LM that transformers can load"):
            load(tmp_path / "damaged.gguf")


def test_gguf_holds_the_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = load("tiny-gpt")
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    llama = as_llama(model)
    layer = llama.model.layers[2]
    assert len(tensors) == 2 + 9 * model.config.num_body_layers
    assert torch.equal(tensors["token_embd.weight"], llama.model.embed_tokens.weight)
    assert torch.equal(tensors["blk.2.ffn_gate.weight"], layer.mlp.gate_proj.weight)
    assert torch.equal(tensors["blk.2.attn_v.weight"], layer.self_attn.v_proj.weight)
    # llama.cpp turns neighbours: row 2i of a head is row i here, row 2i + 1 is row i + head_dim / 2.
    head_dim = model.config.head_dim
    query = layer.self_attn.q_proj.weight.view(-1, head_dim, model.config.hidden_size)
    stored = tensors["blk.2.attn_q.weight"].view_as(query)
    assert torch.equal(stored[:, 0::2], query[:, : head_dim // 2])
    assert torch.equal(stored[:, 1::2], query[:, head_dim // 2 :])
    assert reader.get_field("llama.rope.dimension_count").contents() == head_dim
    names = reader.get_field("tokenizer.ggml.tokens").contents()
    assert names[:3] == ["<|endoftext|>", "<|endofsentence|>", "<|padding|>"]
    assert len(names) == model.config.vocab_size


def test_what_folds_has_no_counterpart(tmp_path):
    model, tokenizer = load("tiny-gpthf")
    with pytest.raises(UnsupportedError, match="plain GPT"):
        as_llama(model)
    with pytest.raises(UnsupportedError, match="plain GPT"):
        write_gguf(model, tokenizer, tmp_path / "no.gguf")
    plain, _ = load("tiny-gpt")
    with pytest.raises(UnsupportedError, match="sentence ends"):
        export_llama(plain, tokenizer, tmp_path / "no")
    assert not list(tmp_path.iterdir())
