"""Checkpoints of llama2.c (github.com/karpathy/llama2.c) as transformers' Llama, with their tokenizer.

The file is a header of seven int32 (width, MLP width, layers, heads, key heads, vocabulary, context; a negative
vocabulary says that the head is not tied), then all weights in float32, tensor after tensor over all layers.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thoughtformer.errors import CheckpointError, TokenizerError
from thoughtformer.files import new_folder

__all__ = ["convert_llama2c", "load_llama2c", "load_llama2c_tokenizer"]

HEADER = struct.Struct("<7i")
BOS, EOS = 1, 2
FIRST_BYTE = 3


def load_llama2c(path: str | Path) -> LlamaForCausalLM:
    """The model in a llama2.c file, in float32 and evaluation mode.

    Raises:
        CheckpointError: a file that is missing, or not as long as its header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from None
    if len(content) < HEADER.size:
        raise CheckpointError(f"{path} has {len(content)} bytes: too short for a llama2.c header.")
    width, mlp, layers, heads, kv_heads, vocab, context = HEADER.unpack_from(content)
    is_tied, vocab = vocab > 0, abs(vocab)
    if min(width, mlp, layers, heads, kv_heads, vocab, context) < 1 or width % heads or heads % max(kv_heads, 1):
        raise CheckpointError(f"{path} has the header {HEADER.unpack_from(content)}: no llama2.c checkpoint.")
    head_dim = width // heads
    kv_width = kv_heads * head_dim
    shapes = {
        "embed": (vocab, width),
        "attention_norm": (layers, width),
        "query": (layers, width, width),
        "key": (layers, kv_width, width),
        "value": (layers, kv_width, width),
        "output": (layers, width, width),
        "mlp_norm": (layers, width),
        "gate": (layers, mlp, width),
        "down": (layers, width, mlp),
        "up": (layers, mlp, width),
        "norm": (width,),
        "cosines": (context, head_dim // 2),
        "sines": (context, head_dim // 2),
    }
    if not is_tied:
        shapes["head"] = (vocab, width)
    expected = HEADER.size + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(content) != expected:
        raise CheckpointError(f"{path} has {len(content)} bytes, its header asks for {expected}: truncated or foreign.")
    tensors, offset = {}, HEADER.size
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        tensors[name] = torch.from_numpy(np.frombuffer(content, "<f4", count, offset).reshape(shape).copy())
        offset += 4 * count

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=is_tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    state = {
        "model.embed_tokens.weight": tensors["embed"],
        "model.norm.weight": tensors["norm"],
        "lm_head.weight": tensors["embed"] if is_tied else tensors["head"],
    }
    for layer in range(layers):
        own = {
            "input_layernorm": tensors["attention_norm"][layer],
            "self_attn.q_proj": _halves(tensors["query"][layer], heads),
            "self_attn.k_proj": _halves(tensors["key"][layer], kv_heads),
            "self_attn.v_proj": tensors["value"][layer],
            "self_attn.o_proj": tensors["output"][layer],
            "post_attention_layernorm": tensors["mlp_norm"][layer],
            "mlp.gate_proj": tensors["gate"][layer],
            "mlp.down_proj": tensors["down"][layer],
            "mlp.up_proj": tensors["up"][layer],
        }
        state |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in own.items()}
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs lie side by side in llama2.c, half a head apart in transformers."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def load_llama2c_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a llama2.c file (tokenizer.bin, tok512.bin): byte-pair merges in the order of their scores.

    Raises:
        TokenizerError: a file that is missing, truncated or foreign.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"can't read {path}: {error.strerror or error}") from None
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4  # the longest piece's length
    try:
        while offset < len(content):
            score, length = struct.unpack_from("<fi", content, offset)
            offset += 8
            if not 0 < length <= len(content) - offset:
                raise ValueError(f"a piece of {length} bytes")
            pieces.append(content[offset : offset + length].decode("utf-8"))
            scores.append(score)
            offset += length
    except (struct.error, ValueError) as error:
        raise TokenizerError(f"{path} is truncated or no llama2.c tokenizer: {error}") from None
    if len(pieces) <= FIRST_BYTE + 256:
        raise TokenizerError(f"{path} has {len(pieces)} pieces; three special ones and 256 bytes come first.")
    pieces[:FIRST_BYTE] = ["<unk>", "<s>", "</s>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    ranked = sorted(range(FIRST_BYTE + 256, len(pieces)), key=lambda number: -scores[number])
    merges = [
        (pieces[number][:cut], pieces[number][cut:])
        for number in ranked
        for cut in range(1, len(pieces[number]))
        if pieces[number][:cut] in vocab and pieces[number][cut:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def convert_llama2c(weights: str | Path, tokenizer: str | Path, out: str | Path) -> None:
    """Writes a folder that transformers loads, whole or not at all.

    Raises:
        CheckpointError, TokenizerError: files that can't be read as what they should be.
        OutputError: the folder exists, or can't be written.
    """
    model, fast = load_llama2c(weights), load_llama2c_tokenizer(tokenizer)
    if len(fast) != model.config.vocab_size:
        raise TokenizerError(
            f"{tokenizer} has {len(fast)} pieces, {weights} {model.config.vocab_size}: they don't belong together."
        )
    with new_folder(Path(out)) as draft:
        model.save_pretrained(draft)
        fast.save_pretrained(draft)
