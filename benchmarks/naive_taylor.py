"""The naive way to Taylor scores: the whole model, one batch of all windows, one backward.

    python benchmarks/naive_taylor.py MODEL WINDOWS.jsonl

A process of its own; prints the scores, and the seconds after imports, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main(model_name: str, windows_name: str) -> None:
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers."))
    ids = torch.tensor([json.loads(line)["input_ids"] for line in Path(windows_name).read_text().splitlines()])
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    scores = [
        sum(float((weight.detach() * weight.grad).abs().sum()) for weight in block.parameters())
        for block in model.model.layers
    ]
    print(json.dumps({"scores": scores, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
