"""Adapters as PEFT writes them, of pico models: every factor random, so that nothing is neutral."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from tests import pico


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor(pico.windows(2, 20)), use_cache=False).logits
    return found


def build(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Write an adapter of the checkpoint `base`; what base and adapter compute together."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, which is what the tests are about
        adapted = get_peft_model(pico.load(base), LoraConfig(**given))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted(adapted.named_parameters()):
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
    return logits(adapted)


def configure(folder: Path, **entries: Any) -> None:
    """Set entries of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
