"""What the published recipes need, in small: models of each family with its kind of tokenizer, and data of each form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shortstack.data.embedded import training_documents
from tests import pico
from tests.checkpoint.test_config_file import decapoda
from tests.checkpoint.test_torch_bin import as_bin
from tests.evaluation import material as tasks
from tests.retraining.material import sentence

VOCABULARY = 400
POSITIONS = 256
# The model of a recipe -> (family, blocks, tokenizer, whether its weights are pickled, whether it is the decapoda copy).
MODELS: dict[str, tuple[str, int, str, bool, bool]] = {
    "baffo32/decapoda-research-llama-7B-hf": ("llama", 32, "LlamaTokenizer", True, True),
    "meta-llama/Llama-2-7b-hf": ("llama", 32, "LlamaTokenizer", False, False),
    "meta-llama/Meta-Llama-3-8B": ("llama", 32, "PreTrainedTokenizerFast", False, False),
    "lmsys/vicuna-7b-v1.3": ("llama", 32, "LlamaTokenizer", True, False),
    "lmsys/vicuna-13b-v1.3": ("llama", 40, "LlamaTokenizer", True, False),
    "rishiraj/CatPPT-base": ("mistral", 32, "LlamaTokenizer", False, False),
    "google/gemma-2b": ("gemma", 18, "GemmaTokenizer", False, False),
    "google/gemma-7b": ("gemma", 28, "GemmaTokenizer", False, False),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": POSITIONS,
}  # fmt: skip


def model(folder: Path, hub_id: str, blocks: int | None = None, **more: Any) -> Path:
    """A pico model with the family, the tokenizer and the form of files of a published one, and its depth or another."""
    family, depth, kind, pickled, wrong_ids = MODELS.get(hub_id, MODELS["lmsys/vicuna-7b-v1.3"])
    if hub_id.startswith("nota-ai/"):  # published checkpoints: pruned already, safetensors
        depth, pickled = 26, False
    blocks = blocks or depth
    # The known fault of the decapoda copy is told by its vocabulary, too.
    sizes = {**SIZES, **more, **({"vocab_size": 32000, "hidden_size": 8, "head_dim": 4} if wrong_ids else {})}
    made = pico.build(folder, family, num_hidden_layers=blocks, with_tokenizer=False, dtype=torch.float16, **sizes)
    tokenizer(made, kind)
    if wrong_ids:
        decapoda(made)
    return as_bin(made, shards=3) if pickled else made


def tokenizer(folder: Path, kind: str) -> None:
    """Train a small tokenizer of a class on the package's own text: sentencepiece-like, Gemma's, or bytes (Llama-3)."""
    texts = [document.text for document in training_documents()][:60]
    special = {"LlamaTokenizer": ["<unk>", "<s>", "</s>"], "GemmaTokenizer": ["<pad>", "<eos>", "<bos>", "<unk>"]}
    names = special.get(kind, ["<|begin_of_text|>", "<|end_of_text|>"])
    if kind == "PreTrainedTokenizerFast":
        raw = Tokenizer(models.BPE(ignore_merges=True))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        parts = [normalizers.Replace(" ", "▁")]
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *parts] if kind[0] == "L" else parts)
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        names = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=False,
        limit_alphabet=max(60, len(alphabet)),
    )
    raw.train_from_iterator((part for text in texts for part in text.split("\n")), trainer)
    bos, eos = {"L": ("<s>", "</s>"), "G": ("<bos>", "<eos>")}.get(kind[0], ("<|begin_of_text|>", "<|end_of_text|>"))
    raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "model_max_length": POSITIONS}
    if kind != "PreTrainedTokenizerFast":
        config["unk_token"] = "<unk>"
    if kind == "GemmaTokenizer":
        config["pad_token"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {"bos_token_id": raw.token_to_id(bos), "eos_token_id": raw.token_to_id(eos), "pad_token_id": 0}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **ids}))


def data(folder: Path) -> dict[str, Path]:
    """Data sets by the names that recipes use, each in the form that its published copy has."""
    import pyarrow
    import pyarrow.parquet

    generator = random.Random(0)
    # BookCorpus: rows of one sentence each, most of them too short for a window.
    rows = [{"text": sentence(generator, 150 if number % 3 == 0 else 12)} for number in range(60)]
    (folder / "bookcorpus").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bookcorpus/0000.parquet")
    alpaca = [
        {"instruction": sentence(generator, 4), "input": sentence(generator, 2) if number % 2 else "",
         "output": sentence(generator, 3)}
        for number in range(24)
    ]  # fmt: skip
    (folder / "alpaca_data_cleaned.json").write_text(json.dumps(alpaca, indent=1))
    (folder / "slimpajama").mkdir()
    text = "".join(json.dumps({"text": sentence(generator, 80), "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n"
                   for _ in range(40))  # fmt: skip
    (folder / "slimpajama/example_train_0.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    (folder / "texts/wikitext2").mkdir(parents=True)
    (folder / "texts/ptb").mkdir()
    wiki = [f" = {sentence(generator, 2)} = ", "", *(f" {sentence(generator, 40)} . " for _ in range(6))]
    (folder / "texts/wikitext2/wiki.test.raw").write_text("\n".join(wiki) + "\n")
    (folder / "texts/ptb/ptb.valid.txt").write_text("".join(f" {sentence(generator, 20)} \n" for _ in range(10)))
    tasks.published(folder / "tasks")
    return {
        "bookcorpus": folder / "bookcorpus",
        "alpaca-cleaned": folder / "alpaca_data_cleaned.json",
        "slimpajama": folder / "slimpajama",
        "texts": folder / "texts",
        "tasks": folder / "tasks",
    }


def shortened(steps: dict[str, str], places: dict[str, Path]) -> list[str]:
    """`--set`s that point a recipe's steps (name -> stage) to local data and make them short."""
    per_stage = {
        "score": {"data": places["bookcorpus"]},
        "retrain lora": {"data": places["alpaca-cleaned"], "validation": 4, "max_steps": 1, "batch": 2,
                         "micro_batch": 2, "eval_data": places["texts"] / "ptb/ptb.valid.txt", "eval_windows": 1},
        "retrain cpt": {"data": places["slimpajama"], "validation": 1, "max_steps": 1, "batch": 2, "micro_batch": 2,
                        "seq_len": 32, "eval_data": "null"},
        "quantize": {"data": places["slimpajama"], "samples": 4, "seq_len": 32, "group_size": "null"},
        "eval ppl": {"data_dir": places["texts"]},
        "eval zeroshot": {"tasks_dir": places["tasks"], "limit": 2},
        "eval samples": {"new_tokens": 4, "count": 1},
    }  # fmt: skip
    return [f"{step}.{key}={value}" for step, verb in steps.items() for key, value in per_stage.get(verb, {}).items()]
