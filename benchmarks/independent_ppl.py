"""WikiText2 and PTB perplexity (windows of 128) in a few lines that share nothing with shortstack: MODEL TEXT_FOLDER."""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (cls.from_pretrained(sys.argv[1]) for cls in (AutoModelForCausalLM, AutoTokenizer))
for name, file in (("wikitext2", "wikitext2/wiki.test.raw"), ("ptb", "ptb/ptb.valid.txt")):
    lines = Path(sys.argv[2], file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows = (
        [line.strip() for line in lines] if name == "ptb" else [line + "\n" if line.strip() else "" for line in lines]
    )
    ids = [tokenizer.bos_token_id, *tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]]
    windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    with torch.no_grad():
        losses = [float(model(part, labels=part).loss.double()) * len(part) for part in windows.split(32)]
    print(json.dumps({"text": name, "ppl_128": math.exp(math.fsum(losses) / len(windows)), "windows": len(windows)}))
