"""Speed and memory of retraining: tokens per second, share of the matrix-multiply peak, the most memory held.

    python benchmarks/retraining.py                 # a small model, on whatever there is
    python benchmarks/retraining.py --seven         # 7B-shaped at 26 blocks (5.5 B parameters), for one GPU of 80 GB or more

Weights are random and text is random bytes: neither changes the time. One JSON line per way.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
from pathlib import Path

from common import random_llama, say
from shortstack.retraining.cpt import retrain_cpt
from shortstack.retraining.lora import retrain_lora
from shortstack.retraining.options import TrainingOptions
from shortstack.retraining.results import RetrainEstimate
from shortstack.runtime.memory import peak_rss_bytes

SHAPES = {
    "small": {"blocks": 4, "hidden": 256, "mlp": 688, "vocabulary": 512},
    "seven": {"blocks": 26, "hidden": 4096, "mlp": 11008, "vocabulary": 32000},
}


def with_tokenizer(directory: Path) -> None:
    """One token per byte, which any text goes through."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def random_text(path: Path, characters: int) -> Path:
    generator = random.Random(0)
    letters = string.ascii_lowercase + "     \n"
    path.write_text("".join(generator.choices(letters, k=characters)))
    return path


def measured(way: str, model: Path, text: Path, folder: Path, steps: int, seq_len: int, batch: int, micro: int) -> None:
    """A few steps; the metrics hold what the Trainer's loop reached after its first ones."""
    import torch

    options = TrainingOptions(
        max_steps=steps, save_every=10**6, eval_every=10**6, log_every=1, validation=0, quiet=True, dry_run=True
    )
    run = retrain_lora if way == "lora" else retrain_cpt
    length = {"cutoff": seq_len} if way == "lora" else {"seq_len": seq_len}
    shared = {"data": str(text), "batch": batch, "micro_batch": micro, **length}
    estimate = run(str(model), out=folder / way, options=options, **shared)  # type: ignore[arg-type]
    assert isinstance(estimate, RetrainEstimate)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    options = TrainingOptions(
        max_steps=steps, save_every=10**6, eval_every=10**6, log_every=1, validation=0, quiet=True
    )
    run(str(model), out=folder / way, options=options, **shared)  # type: ignore[arg-type]
    last = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()][-1]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()
    say(
        f"retrain {way}", device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        parameters=estimate.parameters, trained=estimate.trained, seq_len=seq_len, batch=batch, micro_batch=micro,
        tokens_per_second=last["tokens_per_second"], share_of_peak=last["share_of_peak"], peak_gb=peak / 1e9,
        estimated_gb=sum(estimate.bytes_per_device.values()) / 1e9,
        estimated_tokens_per_second=batch * seq_len / estimate.seconds_per_step,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seven", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="for the model and the outputs (35 GB with --seven)")
    arguments = parser.parse_args()
    shape = "seven" if arguments.seven else "small"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        dtype = "bfloat16" if arguments.seven else "float32"
        model = random_llama(folder / "model", dtype=dtype, shard_bytes=2 << 30, **SHAPES[shape])
        with_tokenizer(model)
        seq_len, batch, micro = (2048, 16, 4) if arguments.seven else (128, 8, 4)
        text = random_text(folder / "text.txt", 4 * seq_len * batch * arguments.steps)
        measured("lora", model, text, folder, arguments.steps, seq_len, batch, micro)
        measured("cpt", model, text, folder, arguments.steps, seq_len, batch, micro)


if __name__ == "__main__":
    main()
