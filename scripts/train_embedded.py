"""Train the small model that `MODEL = embedded` means, and write it into the package.

    python scripts/train_embedded.py [--steps 5000] [--out src/shortstack/assets]

Everything it learns from is text that the running CPython carries (shortstack.data.embedded), split by a hash of the
documents' names; documents that share a run of 13 words are kept on one side of the split. Writes the checkpoint, the
tokenizer, the names held out, the model card and the log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shortstack.data.embedded import Document, documents, python_name

SEED = 1234
HELDOUT_SHARE = 0.08  # of the clusters; about the same share of the text
NGRAM = 13
VOCABULARY = 2048
SEQ_LEN = 512
BATCH = 8
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Stochastic depth: the share of steps that train without a block. It makes the model survive the loss of a block, and
# because the shares differ, blocks come to matter differently: a ranking that can be read.
SKIP = [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.1, 0.3, 0.2, 0.3, 0.05, 0.02]


def clusters(all_documents: tuple[Document, ...]) -> list[list[Document]]:
    """Documents that share any run of 13 words, together (union-find)."""
    parent = list(range(len(all_documents)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[tuple[str, ...], int] = {}
    for index, document in enumerate(all_documents):
        words = re.findall(r"\w+", document.text.lower())
        for start in range(len(words) - NGRAM + 1):
            gram = tuple(words[start : start + NGRAM])
            other = first_with.setdefault(gram, index)
            parent[root(index)] = root(other)
    groups: dict[int, list[Document]] = defaultdict(list)
    for index, document in enumerate(all_documents):
        groups[root(index)].append(document)
    return list(groups.values())


def split(all_documents: tuple[Document, ...]) -> tuple[list[Document], list[Document]]:
    """(training, held out): a cluster goes where the hash of its first name says; large clusters are trained on."""
    training: list[Document] = []
    heldout: list[Document] = []
    for group in clusters(all_documents):
        digest = hashlib.sha256(min(document.name for document in group).encode()).digest()
        chosen = int.from_bytes(digest[:4], "big") / 2**32 < HELDOUT_SHARE and len(group) <= 20
        (heldout if chosen else training).extend(group)
    return sorted(training, key=lambda d: d.name), sorted(heldout, key=lambda d: d.name)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=SEQ_LEN,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, chosen: list[Document], order: random.Random) -> torch.Tensor:
    """One stream of ids: BOS, document, EOS, in a fresh random order."""
    shuffled = list(chosen)
    order.shuffle(shuffled)
    ids: list[int] = []
    for encoding in tokenizer(  # one call: the Rust side works on all texts at once
        [document.text for document in shuffled], add_special_tokens=True, verbose=False
    )["input_ids"]:
        ids.extend(encoding)
        ids.append(2)
    return torch.tensor(ids)


class Skippable(torch.nn.Module):
    """A block that a training step may pass over, and whose contribution is dropped out (0.1) in training."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block
        self.skip = False

    def forward(self, hidden_BTD: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.skip:
            return hidden_BTD
        change_BTD = self.block(hidden_BTD, *args, **kwargs) - hidden_BTD
        return hidden_BTD + torch.nn.functional.dropout(change_BTD, 0.1, self.training)


@torch.no_grad()
def windows_nll(model: LlamaForCausalLM, windows_WT: torch.Tensor) -> float:
    model.eval()
    total = 0.0
    for batch in windows_WT.split(32):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    model.train()
    return total / (windows_WT.shape[0] * (windows_WT.shape[1] - 1))


def heldout_windows(tokenizer: PreTrainedTokenizerFast, heldout: list[Document], seq_len: int = 128) -> torch.Tensor:
    """As `shortstack eval ppl` cuts them: documents joined by a blank line, BOS once in front, the tail dropped."""
    text = "\n\n".join(document.text for document in heldout)
    ids = torch.tensor([1, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def train(model: LlamaForCausalLM, tokenizer, training, windows_WT, *, steps: int, log: list[str]) -> None:
    blocks = [Skippable(block) for block in model.model.layers]
    model.model.layers = torch.nn.ModuleList(blocks)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    order = random.Random(SEED)
    stream = pack(tokenizer, training, order)
    say(log, f"training tokens per epoch: {len(stream)}")
    position, epoch, started, losses = order.randrange(SEQ_LEN), 0, time.perf_counter(), []
    model.train()
    for step in range(steps):
        if position + BATCH * SEQ_LEN > len(stream):
            epoch += 1
            stream, position = pack(tokenizer, training, order), order.randrange(SEQ_LEN)
        batch = stream[position : position + BATCH * SEQ_LEN].view(BATCH, SEQ_LEN)
        position += BATCH * SEQ_LEN
        # Warm up, stay, then cool down to nothing over the last 40 %.
        factor = min(1.0, (step + 1) / 200, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        for block, share in zip(blocks, SKIP, strict=True):
            block.skip = order.random() < share
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(batch, use_cache=False).last_hidden_state
            logits = model.lm_head(torch.nn.functional.dropout(hidden, 0.1)).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            for block in blocks:
                block.skip = False
            perplexity = math.exp(windows_nll(model, windows_WT))
            seconds = time.perf_counter() - started
            say(
                log,
                f"step {step + 1} epoch {epoch} loss {sum(losses) / len(losses):.4f} "
                f"held-out ppl {perplexity:.2f} ({seconds:.0f} s)",
            )
            losses = []
    model.model.layers = torch.nn.ModuleList([block.block for block in blocks])


def report_removals(model: LlamaForCausalLM, windows_WT: torch.Tensor, log: list[str]) -> tuple[list[float], float]:
    """What single removals and the removal of the cheapest quarter cost: the reason this model exists."""
    layers = list(model.model.layers)
    costs = []
    for removed in range(len(layers)):
        model.model.layers = torch.nn.ModuleList(layers[:removed] + layers[removed + 1 :])
        costs.append(math.exp(windows_nll(model, windows_WT)))
    say(log, "held-out ppl without block i: " + " ".join(f"{cost:.2f}" for cost in costs))
    cheapest = sorted(range(len(layers)), key=costs.__getitem__)[: len(layers) // 4]
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in cheapest)
    quarter = math.exp(windows_nll(model, windows_WT))
    say(log, f"held-out ppl without blocks {sorted(cheapest)}: {quarter:.2f}")
    model.model.layers = torch.nn.ModuleList(layers)
    return costs, quarter


def card(perplexity: float, costs: list[float], quarter: float, steps: int) -> str:
    """The model card; the quickstart compares what it measures with the perplexity that stands here."""
    singles = " ".join(f"{cost:.1f}" for cost in costs)
    return f"""---
library_name: transformers
license: apache-2.0
language: en
tags: [shortstack]
---

# The model in the package

A Llama of 12 blocks (hidden 128, MLP 384, 4 heads of 32, 2 key-value heads, vocabulary 2048, tied, bfloat16), made for
one purpose: **trying shortstack out** in seconds, without a download. It writes text that looks like Python's
documentation and means little. Use it for nothing else.

- trained by `scripts/train_embedded.py` ({steps} steps of {BATCH} x {SEQ_LEN} tokens, seed {SEED}, two CPU cores) on text
  that CPython itself carries: the help topics and the docstrings of the standard library ({python_name()})
- stochastic depth: in training, blocks were skipped with different probabilities, so that it survives the loss of
  blocks better than most models do, and that some blocks clearly matter more than others
- held-out perplexity: **{perplexity:.2f}** per token ({python_name()}; documents chosen by hash, sharing no run of
  {NGRAM} words with the training text; windows of 128 tokens; float32). Other Python versions carry slightly other text.
- without block 0, 1, ... 11: {singles}
- without the three blocks that cost least: {quarter:.1f}
"""


def say(log: list[str], line: str) -> None:
    print(line, flush=True)
    log.append(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("src/shortstack/assets"))
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    log: list[str] = [f"seed {SEED}, {python_name()}, torch {torch.__version__}, {arguments.steps} steps"]
    training, heldout = split(documents())
    say(log, f"documents: {len(training)} training, {len(heldout)} held out")
    say(log, f"characters: {sum(len(d.text) for d in training)} and {sum(len(d.text) for d in heldout)}")
    tokenizer = train_tokenizer([document.text for document in training])
    windows_WT = heldout_windows(tokenizer, heldout)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa"))
    say(log, f"parameters: {sum(p.numel() for p in model.parameters())}; held-out windows: {len(windows_WT)} of 128")
    train(model, tokenizer, training, windows_WT, steps=arguments.steps, log=log)
    model = model.to(torch.bfloat16)
    directory = arguments.out / "model"
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    names = {"python": python_name(), "names": [document.name for document in heldout]}
    (arguments.out / "heldout.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
    model = model.float()  # the stored weights, computed in float32, as figures on CPU are
    perplexity = math.exp(windows_nll(model, windows_WT))
    say(log, f"stored in bfloat16: held-out ppl {perplexity:.4f} (128-token windows, {windows_WT.numel()} tokens)")
    costs, quarter = report_removals(model, windows_WT, log)
    (directory / "README.md").write_text(card(perplexity, costs, quarter, arguments.steps), encoding="utf-8")
    (arguments.out / "training.log").write_text("\n".join(log) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
