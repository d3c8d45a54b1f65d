"""Which parameters are trained: adapters on the projections of every block, all of them, or a named part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.stand_ins import find_blocks
from shortstack.errors import ShortstackError, UsageError, did_you_mean
from shortstack.retraining.options import LoRA
from shortstack.runtime.private_names import adapter_layer

# Linear layers that choose experts: their outputs are not projections of hidden states.
ROUTERS = ("gate", "router", "shared_expert_gate")
_PARTS = "all, last:N, first:N, head, norm, embeddings, separated by commas"


def projections(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Names of the linear layers inside the blocks, found by what they are: for Llama-like models the published seven."""
    name, blocks = find_blocks(model, checkpoint.anatomy)
    found = []
    for inner, module in blocks.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")
        if is_linear and inner.rpartition(".")[2] not in ROUTERS:
            found.append(f"{name}.{inner}")
    if not found:
        raise ShortstackError(
            f"{checkpoint.source}: no linear layers in its blocks to put adapters on",
            hint="retrain cpt trains them all",
        )
    return found


def short_names(model: nn.Module, chosen: list[str]) -> list[str]:
    """The last parts of the names, where they mean these modules and no others; else the names in full."""
    short = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if meant == set(chosen) else chosen


def chosen_projections(model: nn.Module, checkpoint: Checkpoint, settings: LoRA) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        UsageError: a target module that no layer of the blocks is.
    """
    found = projections(model, checkpoint)
    for name in (settings.target_modules or "").split(","):
        if name and not any(f".{layer}".endswith(f".{name}") for layer in found):
            there = sorted({layer.rpartition(".")[2] for layer in found})
            raise UsageError(
                f"--target-modules {name}: {checkpoint.source} has no such linear layer in its blocks",
                hint=f"there are {', '.join(there)}",
            )
    return [layer for layer in found if settings.adapts(layer)]


def with_adapter(model: Any, checkpoint: Checkpoint, settings: LoRA) -> Any:
    """The model with adapters on its projections and everything else frozen (PEFT).

    Raises:
        ShortstackError: PEFT cannot adapt this model.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=short_names(model, chosen_projections(model, checkpoint, settings)),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    # What PEFT writes into adapter_config.json as the base.
    model.config.name_or_path = checkpoint.source if checkpoint.revision else str(checkpoint.directory.absolute())
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise ShortstackError(f"{checkpoint.source}: PEFT cannot adapt it: {error}", hint="retrain cpt") from None
    return adapted


def without_adapter(model: Any, checkpoint: Checkpoint) -> str:
    """A line that names the matrices of the blocks that no adapter is put on (experts that are fused in one tensor, routers,
    convolutions), or nothing.
    """
    layer = adapter_layer()
    _, blocks = find_blocks(model, checkpoint.anatomy)
    adapted = [f"{name}." for name, module in blocks.named_modules() if isinstance(module, layer)]
    total, missing = 0, 0
    names: set[str] = set()
    for name, parameter in blocks.named_parameters():
        if ".lora_" in name:
            continue
        total += parameter.numel()
        if parameter.dim() > 1 and not name.startswith(tuple(adapted)):
            missing += parameter.numel()
            names.add(name.partition(".")[2])
    if not names:
        return ""
    return (
        f"{checkpoint.source}: no adapter on {', '.join(sorted(names))} ({missing / total:.1%} of the blocks' parameters): "
        "LoRA adapts only linear layers; retrain cpt trains all"
    )


def set_trainable(model: nn.Module, checkpoint: Checkpoint, what: str) -> list[str]:
    """Train these parameters and freeze all others.

    Args:
        model: a whole model.
        checkpoint: what it was loaded from.
        what: `all`, or some of `last:N`, `first:N` (blocks), `head`, `norm` (the final one) and `embeddings`, separated
            by commas.

    Returns:
        The names of the parameters that are trained.

    Raises:
        UsageError: not such a list, or more blocks than there are.
    """
    parts = [part.strip() for part in what.split(",")]
    if parts == ["all"]:
        model.requires_grad_(True)
        return [name for name, _ in model.named_parameters()]
    chosen: set[int] = set()
    for part in parts:
        chosen |= {id(parameter) for parameter in _part(model, checkpoint, part)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _part(model: Any, checkpoint: Checkpoint, part: str) -> list[nn.Parameter]:
    _, blocks = find_blocks(model, checkpoint.anatomy)
    kind, _, number = part.partition(":")
    if kind in ("last", "first") and number.isascii() and number.isdigit():
        count = int(number)
        if not 1 <= count <= len(blocks):
            raise UsageError(f"--train {part}: the model has {len(blocks)} blocks")
        return list((blocks[-count:] if kind == "last" else blocks[:count]).parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if part == "head":
        return list(head.parameters())
    if part == "embeddings":
        return list(embedding.parameters())
    if part == "norm":
        positions = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        others = {
            id(p) for module in (blocks, head, embedding, *positions) if module is not None for p in module.parameters()
        }
        return [parameter for parameter in model.parameters() if id(parameter) not in others]
    names = ("all", "last:N", "first:N", "head", "norm", "embeddings")
    raise UsageError(f"--train {part!r}: unknown", hint=did_you_mean(part, names, otherwise=f"known: {_PARTS}"))


def trained_count(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def isolates_documents(model: Any, rows: int) -> bool:
    """Whether positions that start again keep the documents of a window apart in this model.

    Tried: another first document must change nothing in the second one. The shapes are the same both times, so that
    this holds for weights in any precision.
    """
    device = next(model.parameters()).device
    ids_BT = torch.randint(rows, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    ids_BT[1, 7:] = ids_BT[0, 7:]
    positions_BT = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[:, 7:]
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-4 if logits_BTV.dtype == torch.float32 else 1e-2
    change = (logits_BTV[0] - logits_BTV[1]).float().abs().max()
    return bool(change <= tolerance * logits_BTV.float().abs().max().clamp(min=1.0))
