"""Runs in kvpress's own environment, and so imports nothing of this package.

Reads one JSON object a line: ask "load" with path and threads, then ask "score" with press, ratio, blocks and
first_scored, as often as wanted; answers with the scored tokens' loss in nats and the entries that they could read,
themselves included, or with an error.

A press prunes the prompt once, after it was read. Tokens before `first_scored` are the prompt, without the last
`read_later` of them; all that follow stay.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any


def score(model: Any, press: Any, blocks: list[list[int]], first_scored: int, read_later: int = 0) -> dict[str, Any]:
    """Summed loss, mean entries, and mean numbers of keys and values in all layers, over all scored tokens; and
    whether each of them is the likeliest."""
    import torch
    from transformers import DynamicCache

    loss, entries, numbers, count, is_right = 0.0, 0.0, 0.0, 0, True
    for block in blocks:
        ids = torch.tensor([block])
        cache = DynamicCache()
        # The last prompt token is read again by none: its logits score the first token.
        with press(model) if press is not None else nullcontext():
            logits = model(ids[:, : first_scored - read_later], past_key_values=cache, logits_to_keep=1).logits
        cached = cache.get_seq_length()
        rest = ids[:, first_scored - read_later :]
        layers: Any = cache.layers
        held = [(layer.keys.numel() + layer.values.numel(), layer.keys.shape[2]) for layer in layers]
        numbers += sum(size * (length + number) / length for size, length in held for number in range(rest.shape[1]))
        # Positions go on from the text's, not from what is held; the mask of ones says that the gap starts no document.
        mask: Any = torch.ones(1, cached + rest.shape[1], dtype=torch.long)
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            mask = masks_by_kind(model.config, [length for _, length in held], rest.shape[1])
        positions = torch.arange(first_scored - read_later, len(block))[None]
        output = model(rest, past_key_values=cache, position_ids=positions, attention_mask=mask)
        logits = torch.cat([logits, output.logits[:, :-1]], dim=1)[0, read_later:]
        rest = rest[:, read_later:]
        is_right = is_right and bool((logits.argmax(dim=-1) == rest[0]).all())
        for part, ids in zip(logits.split(512), rest[0].split(512), strict=True):
            loss += float(torch.nn.functional.cross_entropy(part.float(), ids, reduction="sum"))
        entries += sum(cached + number + 1 for number in range(rest.shape[1]))
        count += rest.shape[1]
    return {
        "loss_nats": loss,
        "mean_entries": entries / count,
        "mean_numbers": numbers / count,
        "is_right": is_right,
        "num_tokens": count,
    }


def masks_by_kind(config: Any, held: list[int], num_new: int) -> Any:
    """What new tokens see if they come one by one: all that a layer holds, or the last of it in layers with a window.

    For several tokens at once transformers makes the masks of such models from positions, which a press has moved.
    """
    import torch

    masks: dict[str, Any] = {}
    for kind, length in zip(config.layer_types, held, strict=True):
        entry, last = torch.arange(length + num_new), length + torch.arange(num_new)[:, None]
        is_seen = entry <= last
        if kind == "sliding_attention":
            is_seen &= entry > last - config.sliding_window
        masks[kind] = is_seen[None, None]
    return masks


def main() -> None:
    import kvpress  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    model = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["ask"] == "load":
            torch.set_num_threads(question["threads"])
            model = AutoModelForCausalLM.from_pretrained(
                question["path"], dtype=getattr(torch, question.get("dtype", "float32"))
            ).eval()
            answer: dict[str, Any] = {"version": __import__("importlib.metadata").metadata.version("kvpress")}
        else:
            name, ratio = question["press"], question["ratio"]
            press = None if name is None else getattr(kvpress, name)(compression_ratio=ratio)
            try:
                answer = score(
                    model, press, question["blocks"], question["first_scored"], question.get("read_later", 0)
                )
            except Exception as error:  # a press that can't take such a prompt, or such a model, fails in any way
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
