"""Runs in llama-cpp-python's own environment, and so imports nothing of this package.

Reads one JSON object a line: ask "load" with path, threads and context, then ask "generate" with ids and new_tokens,
as often as wanted; answers with ids and seconds.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def main() -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    model = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["ask"] == "load":
            model = llama_cpp.Llama(
                question["path"],
                n_ctx=question["context"],
                n_batch=512,
                n_threads=question["threads"],
                n_threads_batch=question["threads"],
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )
            answer = {"version": llama_cpp.__version__}
        else:
            assert model is not None
            started = time.perf_counter()
            model.reset()
            model.eval(question["ids"])
            prefill = time.perf_counter() - started
            ids = []
            started = time.perf_counter()
            for _ in range(question["new_tokens"]):
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
                ids.append(int(logits.argmax()))
                if len(ids) < question["new_tokens"]:
                    model.eval(ids[-1:])
            answer = {"ids": ids, "first_token_seconds": prefill, "decode_seconds": time.perf_counter() - started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
