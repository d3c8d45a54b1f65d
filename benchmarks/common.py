"""What the benchmarks share: checkpoints of random weights, and processes with their time and peak memory."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ran:
    """One process: wall-clock seconds, the most memory it held, what it printed, seconds of processor time."""

    seconds: float
    peak_bytes: int
    output: str
    processor_seconds: float


# A small process between the benchmark and the command: a child's peak memory starts from what its parent held.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
output = process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
processor = usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024, output.decode(), processor]))
"""


def run(arguments: list[str]) -> Ran:
    """Run a command as a process of its own; stop the benchmark when it fails."""
    done = subprocess.run([sys.executable, "-S", "-c", _LAUNCHER, *arguments], stdout=subprocess.PIPE, check=True)
    code, seconds, peak, output, processor = json.loads(done.stdout)
    if code:
        sys.exit(f"{' '.join(arguments)} ended with {code}")
    return Ran(seconds, peak, output, processor)


def shortstack(*arguments: str) -> list[str]:
    """The installed command."""
    return [str(Path(sys.executable).with_name("shortstack")), *arguments]


def say(name: str, **figures: object) -> None:
    """One JSON line per figure."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"benchmark": name, **rounded}), flush=True)


def figures_parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark whose checkpoints and figures stay, so that it need not measure them again."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text that chooses blocks, and that is calibrated on")
    parser.add_argument("--text", required=True, help="evaluation texts, separated by commas")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    return parser


def known_figures(given: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run left in `--out`; `--work` is made."""
    given.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    return found


def losses(model: str | Path, texts: str, *, seq_len: int, limit: int, dtype: str) -> dict[str, list[float]]:
    """Text -> mean NLL of each of its first windows."""
    from shortstack.evaluation.ppl import evaluate_ppl

    results = evaluate_ppl(str(model), data=texts, seq_len=str(seq_len), limit=limit, dtype=dtype, quiet=True).results
    return {Path(one.data["source"]).name: list(one.per_item[f"ppl_{seq_len}"]) for one in results}


def share_back(dense: Sequence[float], pruned: Sequence[float], repaired: Sequence[float]) -> tuple[float, float]:
    """(share of the lost log-perplexity that is back, its standard error over windows, paired), of NLL per window."""
    lost = [after - before for before, after in zip(dense, pruned, strict=True)]
    back = [after - now for after, now in zip(pruned, repaired, strict=True)]
    share = sum(back) / sum(lost)
    errors = [gained - share * cost for gained, cost in zip(back, lost, strict=True)]
    return share, statistics.stdev(errors) * len(lost) ** 0.5 / abs(sum(lost))


@dataclass
class Goals:
    """Figures with their goals; those that fell short."""

    short: list[str] = field(default_factory=list)

    def figure(
        self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None, **more: object
    ) -> None:
        """One figure, with its target."""
        reached = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        goal = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
        say(name, value=value, **goal, reached=reached, **more)
        if not reached:
            self.short.append(f"{name}: {value:.3g}, goal {goal}")

    def end(self) -> None:
        """Say what fell short; the exit code tells it too."""
        for line in self.short:
            print(f"short of its goal: {line}", file=sys.stderr)
        sys.exit(1 if self.short else 0)


def random_llama(
    directory: Path,
    *,
    blocks: int,
    hidden: int = 768,
    mlp: int = 2048,
    vocabulary: int = 32000,
    dtype: str = "float32",
    shard_bytes: int = 1 << 40,
    same_blocks: bool = False,
) -> Path:
    """A Llama of random weights, 64-wide heads, untied; written shard by shard, so that any size fits in memory.

    With `same_blocks` the blocks hold the same numbers, which is quicker.
    """
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": blocks, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": dtype,
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shards = _shards(_shapes(blocks, hidden, mlp, vocabulary), kind.itemsize, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        tensors = {}
        for name, shape in shapes.items():
            scale, offset = (0.02, 0.0) if len(shape) == 2 else (0.0, 1.0)
            key = name.split(".", 3)[3] if same_blocks and name.startswith("model.layers.") else name
            if key not in made:
                made[key] = (torch.randn(shape, generator=generator) * scale + offset).to(kind)
            tensors[name] = made[key].clone() if key != name else made.pop(name)
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _shapes(blocks: int, hidden: int, mlp: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(blocks):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (mlp, hidden) for n in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        if held >= limit:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += math.prod(shape) * itemsize
    return shards


def random_windows(path: Path, *, count: int = 10, length: int = 128, vocabulary: int = 32000) -> Path:
    """Rows of `input_ids`, which every program in the comparison reads as they stand."""
    import random

    generator = random.Random(0)
    rows = [[generator.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path
