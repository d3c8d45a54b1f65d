"""What runs llm-compressor, in a process of its own: it sets up logging, a global session and patches of its own.

    python -m shortstack.quantization.worker JOB.json

The job says what is to be done; what came of it is written as JSON where the job says. On stdout stands a line for every
group of matrices that is done. The process ends when its stdin does: nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortstack.engine.load import from_directory
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.memory import used

_BATCHES = 1  # windows at a time: the Hessians are sums over all of them
_LARGEST_SHARD = "5GB"
_MATRICES_DONE = re.compile(r"Quantizing (\d+) module")
# Warnings of llm-compressor about what is meant to be so.
_EXPECTED = ("No accelerator available", "Disabling tokenizer parallelism", "Attempting to save a model with offloaded")


@dataclass(frozen=True)
class Job:
    """What the process is to do.

    Attributes:
        model: the checkpoint's directory.
        out: an empty directory.
        report: the file that says what came of it.
        scheme: the name of the scheme.
        groups: group size (0: a whole row) -> kinds of layers.
        windows: token ids to calibrate on; empty where none are needed.
        dtype: what the model is loaded in.
        actorder: quantize columns in the order of their inputs' size.
        dampening: share of the mean diagonal that is added to the Hessian's.
        gptq: or round to the nearest.
        trust_remote_code: run code that comes with the checkpoint.
    """

    model: str
    out: str
    report: str
    scheme: str
    groups: dict[str, list[str]]
    windows: list[list[int]]
    dtype: str
    actorder: str
    dampening: float
    gptq: bool
    trust_remote_code: bool = False

    def save(self, path: Path) -> None:
        """Write it where the process finds it."""
        path.write_text(json.dumps(asdict(self)))


def main() -> None:
    """Do the job that the first argument names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with used(_device()) as usage:
        try:
            report = _quantized(job)
        except Exception as error:
            report = {"error": _described(error), "traceback": traceback.format_exc()}
    Path(job.report).write_text(json.dumps({**report, "usage": usage.to_json()}))


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.buffer.read()
    os._exit(1)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _described(error: Exception) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "says": error.message if isinstance(error, ShortstackError) else first_line(error),
        "hint": error.hint if isinstance(error, ShortstackError) else "",
        "errno": getattr(error, "errno", None),
    }


def _quantized(job: Job) -> dict[str, Any]:
    """Load, quantize block by block, save."""
    import torch

    dtype = getattr(torch, job.dtype)
    model, info = from_directory(Path(job.model), dtype=dtype, trust_remote_code=job.trust_remote_code)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ShortstackError(f"{job.model}: the weights lack {missing[0]!r}, which would be random")
    kinds = [kind for group in job.groups.values() for kind in group]
    not_linear = _not_linear(model, kinds)
    if not set(kinds) - set(not_linear):
        raise ShortstackError(
            f"{job.model}: none of its layers is of type Linear ({kinds[0]} is a {not_linear[kinds[0]]})",
            hint="export it to GGUF and quantize that with llama.cpp",
        )
    says = _run(
        job, model, {size: [kind for kind in group if kind not in not_linear] for size, group in job.groups.items()}
    )
    model.save_pretrained(job.out, save_compressed=True, max_shard_size=_LARGEST_SHARD)
    return {"not_linear": not_linear, "says": says}


def _not_linear(model: Any, kinds: list[str]) -> dict[str, str]:
    """Kinds of layers of which some are not torch's Linear -> what they are."""
    import torch

    found = {}
    for name, module in model.named_modules():
        for kind in kinds:
            if name.endswith(f".{kind}") and type(module) is not torch.nn.Linear:
                found[kind] = type(module).__name__
    return found


def _run(job: Job, model: Any, groups: dict[str, list[str]]) -> list[str]:
    """Quantize the model in place; gives what llm-compressor warned of."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    says = _listening()
    schemes = {}
    for number, (size, kinds) in enumerate((size, kinds) for size, kinds in groups.items() if kinds):
        scheme = preset_name_to_scheme(job.scheme, [rf"re:.*\.{re.escape(kind)}$" for kind in kinds])
        if int(size):
            scheme.weights.group_size = int(size)
        schemes[f"group_{number}"] = scheme
    common: dict[str, Any] = {"config_groups": schemes, "ignore": ["lm_head"]}
    if not job.gptq:
        oneshot(model=model, recipe=QuantizationModifier(**common), pipeline="datafree")
        return says
    actorder = None if job.actorder == "none" else job.actorder
    recipe = GPTQModifier(**common, actorder=actorder, dampening_frac=job.dampening)
    windows = [{"input_ids": torch.tensor(window)} for window in job.windows]
    loader: Any = torch.utils.data.DataLoader(windows, batch_size=_BATCHES)  # type: ignore[arg-type]
    # Windows are token ids already. Without a tokenizer it would look for one beside the model, where there may be none.
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))
    use_own_attention(model)
    oneshot(model=model, dataset=loader, processor=nothing, recipe=recipe, pipeline="sequential")
    return says


def use_own_attention(model: Any) -> None:
    """Calibrate with torch's own attention where the family has it, in this whole process.

    llm-compressor asks for the eager one, because it needs the mask that comes with it. That takes most of the time of a
    calibration on windows of 2048 tokens. Torch's takes the same mask.
    """
    from transformers import AttentionInterface

    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        return  # a family that has the eager one alone
    AttentionInterface.register("eager", AttentionInterface()["sdpa"])


def _listening() -> list[str]:
    """llm-compressor's own log: how far it is goes to stdout; gives a list that gets its warnings."""
    from loguru import logger

    says: list[str] = []

    def sink(message: Any) -> None:
        text = str(message.record["message"])
        done = _MATRICES_DONE.match(text)
        if done:
            print(done[1], flush=True)
        elif message.record["level"].name == "WARNING" and text not in says and not text.startswith(_EXPECTED):
            says.append(text)

    logger.remove()
    logger.add(sink, level="INFO")
    return says


if __name__ == "__main__":
    main()
