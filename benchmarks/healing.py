"""What heals a cut: LoRA, continued pretraining, partial tuning and distillation at equal tokens, on real text.

    python benchmarks/healing.py --quick                                  # the embedded model, half removed, minutes
    python benchmarks/healing.py --deep DIR --plot PNG                    # both models, both ratios, everything
    python benchmarks/healing.py --real DIR --tokens 226K                 # LoRA and block by block: tokens and memory

DIR is what `python scripts/train_deep.py --out DIR` makes. Every run sees the same number of tokens of the same text. Text
that neither training nor scoring saw is cut in two: each way's learning rate is the better of two on one half (`dev`, after
the severe cut), its figure is the perplexity of the other half (`test`), on windows of 128 tokens. One JSON line per figure.

`--real` takes 8 blocks out of a real model, and heals it by LoRA on the whole model and block by block on a tenth of its
tokens: processes of their own, whose peak memory is what the system counted.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import run, say, shortstack
from shortstack.data.sources import read_corpus
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.retraining.cpt import retrain_cpt
from shortstack.retraining.distill import retrain_distill
from shortstack.retraining.local import retrain_local
from shortstack.retraining.lora import retrain_lora
from shortstack.retraining.options import TrainingOptions, parse_tokens
from shortstack.retraining.results import RetrainEstimate, RetrainResult
from shortstack.scoring.score import score

# Two learning rates for each way; the published 1e-4 is for 7B. Training from random weights gets the larger one.
RATES = {
    "embedded": {"lora": (3e-4, 3e-3), "cpt": (1e-4, 1e-3), "partial": (1e-4, 1e-3), "distill": (3e-4, 1e-3),
                 "local": (3e-4, 1e-3)},
    "deep": {"lora": (3e-3, 1e-2), "cpt": (1e-3, 3e-3), "partial": (1e-3, 3e-3), "distill": (1e-3, 3e-3),
             "local": (1e-3, 3e-3)},
}  # fmt: skip
FROM_RANDOM = (3e-3,)
SEQ_LEN, BATCH = 256, 16
LOCAL = ["--lr", "1e-3", "--epochs", "2"]  # of the real model


@dataclass
class Subject:
    """One model, its text, and where its copies go."""

    name: str
    model: str
    training: str
    heldout: str
    folder: Path
    steps: int
    windows: int
    rates: dict[str, tuple[float, ...]]
    better: dict[str, float] = field(default_factory=dict)
    found: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)

    def halves(self) -> str:
        """The held-out text in two files."""
        files = [self.folder / "dev.txt", self.folder / "test.txt"]
        if not files[0].exists():
            documents = read_corpus(self.heldout, role="evaluation").documents
            paragraphs = "\n\n".join(documents).split("\n\n")
            for number, file in enumerate(files):  # by turns in pieces of 50 paragraphs, so that both hold some of all
                chosen = [p for at, p in enumerate(paragraphs) if at // 50 % 2 == number]
                file.write_text("\n\n".join(chosen), encoding="utf-8")
        return ",".join(map(str, files))

    def pruned(self, removed: int) -> Path:
        """The model without the blocks whose removal costs least; no block is protected."""
        scores = self.folder / "scores.json"
        if not scores.exists():
            score(self.model, data=self.training, criterion="ppl", samples=10, out=scores, quiet=True)
        out = self.folder / f"minus-{removed}"
        prune(self.model, scores=scores, criterion="ppl", remove=removed, plus=False, out=out, quiet=True)
        return out

    def run(self, start: Path, way: str, rate: float) -> tuple[RetrainResult, list[tuple[int, float]]]:
        """Train a copy in one of the ways: (its figures, (step, perplexity of the test half) along the way)."""
        if way == "local":
            return self.run_local(start, rate)
        every = max(1, self.steps // 4)
        options = TrainingOptions(
            max_steps=self.steps, eval_every=every, save_every=10**6, log_every=every, validation=0,
            eval_data=self.halves(), eval_windows=self.windows, quiet=True, dense=self.model,
        )  # fmt: skip
        out = self.folder / f"{start.name}-{way}"
        shared: dict[str, Any] = {
            "data": self.training, "out": out, "lr": rate, "batch": BATCH, "micro_batch": BATCH, "options": options,
            "warmup": self.steps // 10,
        }  # fmt: skip
        if way == "lora":
            result = retrain_lora(str(start), cutoff=SEQ_LEN, **shared)
        elif way == "distill":
            result = retrain_distill(str(start), teacher=self.model, seq_len=SEQ_LEN, **shared)
        else:
            train = "last:3,head,norm" if way == "partial" else "all"
            result = retrain_cpt(str(start), train=train, seq_len=SEQ_LEN, **shared)
        assert isinstance(result, RetrainResult)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        curve = [(line["step"], line["ppl:test.txt"]) for line in lines if "ppl:test.txt" in line]
        assert curve[-1][0] == self.steps
        return result, curve

    def run_local(self, start: Path, rate: float) -> tuple[RetrainResult, list[tuple[int, float]]]:
        """The same, block by block, every block on the tokens of the other ways."""
        out, tokens = self.folder / f"{start.name}-local", self.steps * BATCH * SEQ_LEN
        shared: dict[str, Any] = {
            "of": self.model, "data": self.training, "out": out, "lr": rate, "batch": 4, "micro_batch": 4,
            "seq_len": SEQ_LEN, "radius": "all", "validation": 0, "quiet": True,
        }  # fmt: skip
        planned = retrain_local(str(start), dry_run=True, **shared)
        assert isinstance(planned, RetrainEstimate)
        held = min(tokens, planned.tokens)
        result = retrain_local(
            str(start), tokens=held, epochs=tokens / held, eval_data=self.halves(), eval_windows=self.windows, **shared
        )
        assert isinstance(result, RetrainResult)
        shutil.rmtree(out)
        return result, [(self.steps, result.rows["after"]["figures"]["ppl:test.txt"])]

    def healed(self, ratio: str, start: Path, way: str, rates: Sequence[float]) -> None:
        """One way at its better rate, by the dev half; its figures and its curve."""
        runs = {rate: self.run(start, way, rate) for rate in rates}
        dev = {rate: result.rows["after"]["figures"]["ppl:dev.txt"] for rate, (result, _) in runs.items()}
        rate = self.better[way] = min(dev, key=lambda rate: dev[rate])
        result, curve = runs[rate]
        rows = {which: row["figures"]["ppl:test.txt"] for which, row in result.rows.items()}
        self.found.setdefault(ratio, {"dense": rows["dense"], "pruned": rows["before"]})[way] = rows["after"]
        self.curves.setdefault(ratio, {})[way] = curve
        say(
            "healing", model=self.name, removed=ratio, way=way, dense=rows["dense"], pruned=rows["before"],
            healed=rows["after"], lr=rate, dev={f"{rate:g}": round(ppl, 2) for rate, ppl in dev.items()},
            tokens=result.tokens, seconds=result.seconds, curve=curve,
        )  # fmt: skip


def random_like(checkpoint: Path, out: Path) -> Path:
    """A checkpoint of the same shape whose weights are as a model begins."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(checkpoint, out)
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    dtype = {"BF16": torch.bfloat16}.get(next(iter(open_checkpoint(checkpoint).tensors.values())).dtype, torch.float32)
    model.to(dtype).save_pretrained(out)
    return out


def measured(subject: Subject, ratios: dict[str, int]) -> None:
    """All runs of one model, the most severe ratio first."""
    severe = next(iter(ratios))
    for ratio, removed in ratios.items():
        start = subject.pruned(removed)
        for way, rates in subject.rates.items():
            subject.healed(ratio, start, way, rates if ratio == severe else (subject.better[way],))
        if ratio == severe:
            subject.healed(ratio, random_like(start, subject.folder / "random"), "random", FROM_RANDOM)


def lora_on_instructions(shared: Path, folder: Path, steps: int) -> None:
    """The published LoRA on a real model: validation loss before and after; merged against base and adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, out = shared / "models/stories260k", folder / "instructed"
    options = TrainingOptions(max_steps=steps, save_every=max(1, steps // 4), eval_every=max(1, steps // 4), quiet=True)
    data = str(shared / "instruct/alpaca_small.json")
    result = retrain_lora(str(model), data=data, out=out, lr=3e-3, batch=16, micro_batch=16, options=options)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        apart = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
    rows = {which: row["figures"]["validation"] for which, row in result.rows.items()}
    say(
        "lora on instructions", model="stories260k", rows=2000, steps=result.steps, validation_before=rows["before"],
        validation_after=rows["after"], merged_minus_unmerged=float((apart - merged).abs().max()),
    )  # fmt: skip


def on_a_real_model(model: Path, data: Path, folder: Path, tokens: int, removed: int) -> None:
    """LoRA on the whole model against block by block on a tenth of its tokens: perplexity and peak memory of each process."""
    scores, pruned, text = folder / "scores.json", folder / "pruned", str(data / "text/wiki_demo.txt")
    score(str(model), data=str(data / "text/c4_demo.jsonl"), criterion="ppl", samples=10, out=scores, quiet=True)
    prune(str(model), scores=scores, criterion="ppl", remove=removed, plus=False, out=pruned, quiet=True)
    heldout = str(data / "text/wikitext2/wiki.test.raw")
    common = ["--eval-data", heldout, "--eval-windows", "64", "--validation", "8", "--save-every", "100000", "--quiet"]
    steps = max(1, tokens // (BATCH * SEQ_LEN))
    lora = ["lora", "--cutoff", "256", "--batch", "16", "--micro-batch", "4", "--lr", "1e-3", "--dense", str(model),
            "--warmup", str(max(1, steps // 10)), "--eval-every", str(max(1, steps // 4))]  # fmt: skip
    local = ["local", "--of", str(model), "--seq-len", "256", "--batch", "4", *LOCAL]
    for way, options, amount in (
        ("lora", lora, tokens), ("local", local, tokens // 10), ("local, disk", [*local, "--states", "disk"], tokens // 10),
        ("local", local, tokens),
    ):  # fmt: skip
        out = folder / "out"
        ran = run(shortstack("retrain", *options[:1], str(pruned), "--data", text, "--out", str(out),
                             "--tokens", str(amount), *options[1:], *common))  # fmt: skip
        models = json.loads((out / "retraining.json").read_text())["models"]
        dense, before, after = (models[row]["figures"]["ppl:wiki.test.raw"] for row in ("dense", "before", "after"))
        back = math.log(before / after) / math.log(before / dense)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curve = [
            (line["step"] * BATCH * SEQ_LEN, line["ppl:wiki.test.raw"]) for line in lines if "ppl:wiki.test.raw" in line
        ]
        shutil.rmtree(out)
        say(
            "healing, real", way=way, removed=removed, tokens=amount, dense=dense, pruned=before, healed=after,
            share_back=back, peak_bytes=ran.peak_bytes, seconds=ran.seconds, curve=curve,
        )  # fmt: skip


def plot(subjects: list[Subject], path: Path) -> None:
    """Held-out perplexity over tokens, a panel per model and ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(subject, ratio) for subject in subjects for ratio in subject.curves]
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (subject, ratio) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for way, curve in subject.curves[ratio].items():
            start = [] if way == "random" else [(0, subject.found[ratio]["pruned"])]
            points = [(step * SEQ_LEN * BATCH / 1e6, ppl) for step, ppl in [*start, *curve]]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=way)
        axes.axhline(subject.found[ratio]["dense"], color="black", linewidth=0.8, linestyle="--", label="dense")
        axes.set(title=f"{subject.name}, {ratio} of the blocks removed", xlabel="million tokens", yscale="log")
        axes.set_ylabel("held-out perplexity (128 tokens)")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deep", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--tokens", default="220K")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.deep is None and not arguments.quick and arguments.real is None:
        sys.exit("--deep DIR: what scripts/train_deep.py made; --real DIR: a real model; or --quick")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.real is not None:
            tokens = parse_tokens(arguments.tokens)
            assert tokens is not None
            on_a_real_model(arguments.real.absolute(), arguments.data.absolute(), folder, tokens, removed=8)
            return
        # The embedded model knows its training text nearly by heart: much more of it makes any copy worse.
        steps, windows = 30, 32 if arguments.quick else 100
        rates = {way: found[-1:] for way, found in RATES["embedded"].items()} if arguments.quick else RATES["embedded"]
        subjects = [Subject("embedded", "embedded", "embedded", "embedded", folder / "embedded", steps, windows, rates)]
        if arguments.deep is not None:
            texts = [str(arguments.deep / part) for part in ("training", "heldout")]
            subjects.insert(0, Subject("deep", str(arguments.deep), *texts, folder / "deep", 60, 100, RATES["deep"]))
        for subject in subjects:
            subject.folder.mkdir()
            depth = open_checkpoint(subject.model).depth
            measured(
                subject, {"half": depth // 2} if arguments.quick else {"half": depth // 2, "a quarter": depth // 4}
            )
        if (arguments.data / "models/stories260k").is_dir():
            lora_on_instructions(arguments.data, folder, 20 if arguments.quick else 200)
        if arguments.plot is not None:
            plot(subjects, arguments.plot)
        for subject in subjects:
            for ratio, found in subject.found.items():
                say("healing, ppl", model=subject.name, removed=ratio, **found)


if __name__ == "__main__":
    main()
