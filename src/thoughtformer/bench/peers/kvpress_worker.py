"""Runs in kvpress's own environment, and so imports nothing of this package.

Reads one JSON object a line: ask "load" with path and threads, then ask "score" with press, ratio, blocks and
first_scored, as often as wanted; answers with the scored tokens' loss in nats and the entries that they could read,
themselves included, or with an error.

A press prunes the prompt once, after it was read. Tokens before `first_scored` are the prompt; all that follow stay.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any


def score(model: Any, press: Any, blocks: list[list[int]], first_scored: int) -> dict[str, float]:
    """Summed loss and mean entries over all scored tokens."""
    import torch
    from transformers import DynamicCache

    loss, entries, count = 0.0, 0.0, 0
    for block in blocks:
        ids = torch.tensor([block])
        cache = DynamicCache()
        # The last prompt token is read again by none: its logits score the first token.
        with press(model) if press is not None else nullcontext():
            logits = model(ids[:, :first_scored], past_key_values=cache, logits_to_keep=1).logits
        cached = cache.get_seq_length()
        rest = ids[:, first_scored:]
        # Positions go on from the text's, not from what is held; the mask of ones says that the gap starts no document.
        output = model(
            rest,
            past_key_values=cache,
            position_ids=torch.arange(first_scored, len(block))[None],
            attention_mask=torch.ones(1, cached + rest.shape[1], dtype=torch.long),
        )
        logits = torch.cat([logits, output.logits[:, :-1]], dim=1)[0].float()
        loss += float(torch.nn.functional.cross_entropy(logits, rest[0], reduction="sum"))
        entries += sum(cached + number + 1 for number in range(rest.shape[1]))
        count += rest.shape[1]
    return {"loss_nats": loss, "mean_entries": entries / count, "num_tokens": count}


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
            model = AutoModelForCausalLM.from_pretrained(question["path"], dtype=torch.float32).eval()
            answer: dict[str, Any] = {"version": __import__("importlib.metadata").metadata.version("kvpress")}
        else:
            name, ratio = question["press"], question["ratio"]
            press = None if name is None else getattr(kvpress, name)(compression_ratio=ratio)
            try:
                answer = score(model, press, question["blocks"], question["first_scored"])
            except (AssertionError, RuntimeError, ValueError) as error:  # a press that can't take such a prompt
                answer = {"error": " ".join(str(error).split())[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
