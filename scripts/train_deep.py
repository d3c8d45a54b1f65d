"""Train a small model of many narrow blocks, to study on it what heals a cut (benchmarks/healing.py).

    python scripts/train_deep.py --data ../shared/data --out deep-model [--steps 3000]

24 blocks of width 96 on public-domain novels and web text. The last twentieth of every file is held out. The weights
are not part of the package; this command makes them again (about half an hour on 2 cores).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shortstack.data.embedded import Document
from train_embedded import SEED, heldout_windows, say, train_tokenizer, windows_nll

SEQ_LEN = 256
BATCH = 16
HELDOUT_SHARE = 0.05
FILES = ("books/*.txt", "text/wiki_demo.txt", "text/c4_demo.jsonl", "text/tinystories/tinystories.txt")
CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def read_texts(root: Path) -> tuple[list[str], list[str]]:
    """(training, held out): each file's last twentieth is held out, cut at the end of a paragraph."""
    training, heldout = [], []
    for path in sorted(path for pattern in FILES for path in root.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
        cut = text.rfind("\n", 0, int(len(text) * (1 - HELDOUT_SHARE)))
        training.append(text[:cut].strip())
        heldout.append(text[cut:].strip())
    return training, heldout


def train(model: LlamaForCausalLM, stream: torch.Tensor, windows_WT: torch.Tensor, steps: int, log: list[str]) -> None:
    """Windows at random places of the stream; Muon for matrices, AdamW for the rest; cool-down over the last 40 %."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(SEED)
    started, losses = time.perf_counter(), []
    for step in range(steps):
        starts = torch.randint(len(stream) - SEQ_LEN, (BATCH,), generator=generator)
        batch = torch.stack([stream[start : start + SEQ_LEN] for start in starts.tolist()])
        factor = min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            perplexity = math.exp(windows_nll(model, windows_WT[:200]))
            seconds = time.perf_counter() - started
            say(
                log,
                f"step {step + 1} loss {sum(losses) / len(losses):.4f} held-out ppl {perplexity:.2f} ({seconds:.0f} s)",
            )
            losses = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    log: list[str] = []
    training, heldout = read_texts(arguments.data)
    tokenizer = train_tokenizer(training)
    tokenizer.model_max_length = SEQ_LEN
    ids = [token for text in training for token in [*tokenizer(text, verbose=False)["input_ids"], 2]]
    windows_WT = heldout_windows(tokenizer, [Document(str(n), text) for n, text in enumerate(heldout)])
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa"))
    say(log, f"parameters: {model.num_parameters()}; tokens: {len(ids)}; held-out windows: {len(windows_WT)} of 128")
    train(model, torch.tensor(ids), windows_WT, arguments.steps, log)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "heldout").mkdir(exist_ok=True)
    (arguments.out / "training").mkdir(exist_ok=True)
    for number, (kept, held) in enumerate(zip(training, heldout, strict=True)):
        (arguments.out / "training" / f"{number:02d}.txt").write_text(kept, encoding="utf-8")
        (arguments.out / "heldout" / f"{number:02d}.txt").write_text(held, encoding="utf-8")
    say(log, f"held-out ppl {math.exp(windows_nll(model, windows_WT)):.4f} ({windows_WT.numel()} tokens)")
    (arguments.out / "training.log").write_text("\n".join(log) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
