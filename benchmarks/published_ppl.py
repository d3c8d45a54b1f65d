"""The published procedure for ppl scores, as a process of its own: what `benchmarks/scoring.py` compares with.

    python benchmarks/published_ppl.py MODEL WINDOWS.jsonl

For every block: a fresh random model of one block less, a full copy of the kept weights into it, then one forward per
window. Written from the description of the procedure; prints the perplexities, and the seconds after imports, as JSON.
"""

from __future__ import annotations

import copy
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
    dense = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    windows = [torch.tensor([json.loads(line)["input_ids"]]) for line in Path(windows_name).read_text().splitlines()]
    weights = dense.state_dict()
    scores = []
    for removed in range(dense.config.num_hidden_layers):
        config = copy.deepcopy(dense.config)
        config.num_hidden_layers -= 1
        candidate = AutoModelForCausalLM.from_config(config)
        kept = {}
        for name, tensor in weights.items():
            if name.startswith("model.layers."):
                number, rest = name.removeprefix("model.layers.").split(".", 1)
                if int(number) == removed:
                    continue
                name = f"model.layers.{int(number) - (int(number) > removed)}.{rest}"
            kept[name] = tensor
        candidate.load_state_dict(kept)
        candidate.eval()
        losses = []
        for ids in windows:
            logits = candidate(ids).logits[:, :-1].float()
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            )
        scores.append(math.exp(torch.cat(losses).double().mean()))
    print(json.dumps({"scores": scores, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
