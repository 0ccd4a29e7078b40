"""FLOPs of the paper's six (prompt, new) pairs at 16 + 8 layers: counted, against the exact incremental cost.

Prints a table, then one JSON line. Takes about nine minutes on one core: the model has 454M parameters.
"""

from __future__ import annotations

import json

import torch

from thoughtformer.bench import generation_flops, regular_ids
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM

#: TFLOPs of the exact incremental method, by (prompt, new) tokens.
EXPECTED = {
    (100, 100): 0.145,
    (100, 250): 0.282,
    (250, 100): 0.228,
    (250, 250): 0.364,
    (20, 500): 0.465,
    (500, 20): 0.292,
}


def main() -> None:
    config = GPTHFConfig(
        vocab_size=50260,
        hidden_size=1024,
        intermediate_size=4096,
        num_encoder_layers=16,
        num_body_layers=8,
        num_attention_heads=16,
        body_visibility="fast",
    )
    model = GPTHFForCausalLM(config).eval()
    rows = []
    print("prompt  new  counted  expected  difference")
    for (prompt, new), expected in EXPECTED.items():
        ids = regular_ids(prompt + new, sentence_tokens=25, sentence_end_token_id=config.sentence_end_token_id)
        counted = generation_flops(model, ids[:prompt], ids[prompt:]) / 1e12
        rows.append({"prompt": prompt, "new": new, "tflops": counted, "expected_tflops": expected})
        print(f"{prompt:6} {new:4}  {counted:.4f}   {expected:.3f}     {counted / expected - 1:+.2%}", flush=True)
    print(json.dumps({"theme": "flops_paper", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
