"""A library call changes nothing for the process it runs in: a notebook or a server calls these functions, too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import shortstack
from shortstack.common.extras import missing_packages
from shortstack.registry import public_commands
from tests import pico
from tests.evaluation import material as tasks
from tests.retraining import material as texts

_LIBC, _setlocale = ctypes.CDLL(None), locale.setlocale
QUIET = {"quiet": True}
STEPS: dict[str, Any] = {"max_steps": 1, "batch": 2, "micro_batch": 2, "validation": 2, "device": "cpu", **QUIET}
# What is called, of the functions that `import shortstack` offers; in an order in which each finds what it needs.
CALLS: dict[str, Callable[[Path, str], object]] = {
    "doctor": lambda _, __: shortstack.doctor(),
    "info": lambda _, model: shortstack.info(model),
    "check": lambda _, model: shortstack.check(model),
    "score": lambda at, model: shortstack.score(
        model,
        criterion="ppl,taylor,magnitude",
        data=str(at / "w.jsonl"),
        out=at / "scores.json",
        memory="resident",
        **QUIET,
    ),
    "search": lambda at, model: shortstack.search(
        model, selection="greedy", remove=1, data=str(at / "w.jsonl"), out=at / "found.json", **QUIET
    ),
    "curve": lambda at, model: shortstack.curve(
        model, most=2, data=str(at / "w.jsonl"), out=at / "curve.json", **QUIET
    ),
    "stability": lambda at, model: shortstack.stability(
        model, remove=1, seeds=1, criterion="bi", data=str(at / "w.jsonl"), out=at / "stability.json", **QUIET
    ),
    "agree": lambda at, _: shortstack.agree(at / "scores.json", at / "scores.json"),
    "plan": lambda at, model: shortstack.plan(
        model, scores=at / "scores.json", criterion="ppl", remove=1, out=at / "plan.json"
    ),
    "prune": lambda at, model: shortstack.prune(model, blocks="2", out=at / "pruned", verify=True, **QUIET),
    "prune_width": lambda at, model: shortstack.prune_width(
        model, ratio=0.2, data=str(at / "t.jsonl"), samples=2, seq_len=16, out=at / "narrow", **QUIET
    ),
    "repair": lambda at, model: shortstack.repair(
        str(at / "pruned"), of=model, data=str(at / "t.jsonl"), samples=2, seq_len=16, out=at / "repaired", **QUIET
    ),
    "retrain_lora": lambda at, _: shortstack.retrain_lora(
        str(at / "pruned"), data=str(at / "rows.json"), out=at / "healed", **STEPS
    ),
    "merge": lambda at, _: shortstack.merge(
        str(at / "healed/adapter"), base=str(at / "pruned"), out=at / "merged", **QUIET
    ),
    "retrain_cpt": lambda at, _: shortstack.retrain_cpt(
        str(at / "pruned"), data=str(at / "t.jsonl"), out=at / "trained", seq_len=32, **STEPS
    ),
    "retrain_distill": lambda at, model: shortstack.retrain_distill(
        str(at / "pruned"), teacher=model, data=str(at / "t.jsonl"), out=at / "taught", seq_len=32, **STEPS
    ),
    "retrain_local": lambda at, model: shortstack.retrain_local(
        str(at / "pruned"),
        of=model,
        data=str(at / "t.jsonl"),
        out=at / "nearer",
        tokens=64,
        seq_len=32,
        **{name: value for name, value in STEPS.items() if name != "max_steps"},
    ),
    "teach": lambda at, model: shortstack.teach(
        model, data=str(at / "t.jsonl"), top_k=8, seq_len=32, tokens=200, validation=1, out=at / "notes", **QUIET
    ),
    "evaluate_ppl": lambda at, model: shortstack.evaluate_ppl(
        model, str(at / "pruned"), data=str(at / "t.jsonl"), seq_len=32, out=at / "ppl.json", **QUIET
    ),
    "evaluate_zeroshot": lambda at, model: shortstack.evaluate_zeroshot(
        model, tasks_dir=at / "tasks", limit=1, **QUIET
    ),
    "evaluate_generation": lambda _, model: shortstack.evaluate_generation(model, new_tokens=2, probes=1, **QUIET),
    "samples": lambda _, model: shortstack.samples(model, prompt="once", new_tokens=2, temperature=1.0, **QUIET),
    "evaluate_all": lambda at, model: shortstack.evaluate_all(
        model, data=str(at / "t.jsonl"), tasks="piqa", tasks_dir=at / "tasks", limit=1, seq_len="32", **QUIET
    ),
    "compare": lambda at, _: shortstack.compare(at / "ppl.json"),
    "bench": lambda _, model: shortstack.bench(model, new_tokens="2", runs=3, warmup=1, memory=False, **QUIET),
    "report": lambda at, _: shortstack.report(str(at / "ppl.json"), out=at / "report.html"),
    "card": lambda at, _: shortstack.card(str(at / "pruned")),
    "export_mergekit": lambda at, _: shortstack.export_mergekit(str(at / "pruned"), out=at / "merge.yaml"),
    "export_prune_layers": lambda at, _: shortstack.export_prune_layers(str(at / "pruned")),
    "run": lambda at, model: shortstack.run(str(at / "recipe.yaml"), model=model, out=at / "run", **QUIET),
}
NOT_CALLED = {
    "evaluate": "is evaluate_ppl",
    "export_gguf": "a process of its own does the work, with packages that are not here",
    "push": "needs a hub: tests/publishing",
    "quantize": "a process of its own does the work, with packages that are not here",
    "serve_demo": "waits until it is interrupted; tests/demo sees the signals put back",
}


@pytest.fixture(scope="module")
def place(built: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where calls find their files, and leave others."""
    folder = tmp_path_factory.mktemp("process")
    texts.texts(folder / "t.jsonl")
    texts.instructions(folder / "rows.json")
    tasks.published(folder / "tasks")
    (folder / "w.jsonl").write_text("".join(f'{{"input_ids": {window}}}\n' for window in pico.windows(20)))
    (folder / "recipe.yaml").write_text(
        f"steps:\n  scored: {{stage: score, data: {folder / 'w.jsonl'}, criterion: magnitude}}\n"
    )
    return folder


def state() -> dict[str, Any]:
    """What belongs to the process, as text where it may be large."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers, actions = ctypes.create_string_buffer(1024), {}
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT):
        _LIBC.sigaction(number, None, handlers)
        actions[number.name] = (str(signal.getsignal(number)), handlers.raw[:8])
    return {
        "signals": actions,
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "modules of our own making": sorted(
            n for n, m in list(sys.modules.items()) if type(m).__module__.startswith("shortstack")
        ),
        "torch": (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
            torch.get_num_interop_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "functions of torch": {f"{owner.__name__}.{n}": v for owner in _OWNERS for n, v in vars(owner).items()
                               if callable(v)},
        "environment": dict(os.environ),
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": {logger.name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers))
                    for logger in loggers if isinstance(logger, logging.Logger)},
        "logging as a whole": logging.root.manager.disable,
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "folder": Path.cwd(),
        "locale": _setlocale(locale.LC_ALL),
        "search path": list(sys.path),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile()),
        "threads": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
        "file mode": _umask(),
        "switch interval": sys.getswitchinterval(),
    }  # fmt: skip


_OWNERS = (nn.Module, nn.Parameter, nn.Linear, nn.Embedding, torch.nn.functional, torch.nn.init, torch.Tensor)


def warm_up() -> None:
    """What a library changes for good when it is imported is its own affair."""
    for name in ("transformers.trainer", "accelerate", "peft", "lm_eval.evaluator", "datasets", "sklearn", "pandas"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


def _differences(before: Any, after: Any) -> Any:
    """What is to be read where something changed."""
    if not isinstance(before, dict):
        return str(before)[:500], str(after)[:500]
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


@pytest.fixture
def no_lasting_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While calls run, nobody changes what all threads share, even if it would be put back."""
    real = ctypes.CDLL

    class Watched(real):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            assert name not in ("mallopt", "signal", "sigaction"), f"{name} of the C library is called"
            return super().__getattr__(name)

    for owner, name in (
        (gc, "disable"),
        (gc, "set_threshold"),
        (signal, "signal"),
        (os, "chdir"),
        (locale, "setlocale"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} is called"))
    monkeypatch.setattr(ctypes, "CDLL", Watched)


def test_all_are_called() -> None:
    assert set(public_commands()) == CALLS.keys() | NOT_CALLED.keys()


@pytest.mark.usefixtures("no_lasting_changes")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_process_as_it_was(name: str, place: Path, built: Callable[..., Path]) -> None:
    command, model = public_commands()[name], str(built(max_position_embeddings=512))
    if missing := missing_packages(command.needs):
        pytest.skip(f"{missing[0]} is not installed")
    warm_up()
    before = state()
    CALLS[name](place, model)
    after = state()
    after["logging"] = {
        logger: after["logging"].get(logger) for logger in before["logging"]
    }  # new modules have new ones
    assert not {key: _differences(before[key], after[key]) for key in before if before[key] != after[key]}
