"""The sensible naive way to ppl scores: the loaded model with one block bypassed, all windows in one batch.

    python benchmarks/naive_ppl.py MODEL WINDOWS.jsonl

A process of its own; prints the perplexities, and the seconds after imports, as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(model_name: str, windows_name: str) -> None:
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    ids = torch.tensor([json.loads(line)["input_ids"] for line in Path(windows_name).read_text().splitlines()])
    blocks = model.model.layers
    scores = []
    for removed in range(len(blocks)):
        model.model.layers = torch.nn.ModuleList([block for i, block in enumerate(blocks) if i != removed])
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        scores.append(math.exp(loss))
    print(json.dumps({"scores": scores, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
