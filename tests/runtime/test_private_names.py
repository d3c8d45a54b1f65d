"""A version of a library that lacks a name that shortstack takes of it is refused in a sentence; and all such names are in
one file."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError
from shortstack.runtime import private_names
from shortstack.runtime.private_names import KNOWN

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src/shortstack"

# What is removed: the object that has it, and its name there.
Holder = Callable[[], tuple[Any, str]]


def of(module: str, name: str) -> Holder:
    def found() -> tuple[Any, str]:
        *path, last = name.split(".")
        holder = importlib.import_module(module)
        for part in path:
            holder = getattr(holder, part)
        return holder, last

    return found


def loaded_tensor(path: Path) -> torch.Tensor:
    torch.save({"a": torch.ones(2)}, path)
    with private_names.fake_tensors():
        found: torch.Tensor = torch.load(path, weights_only=True)["a"]
    return found


def entered(context: contextlib.AbstractContextManager[Any]) -> None:
    with context:
        pass


def trainer_class() -> None:
    from transformers import Trainer

    private_names.check_trainer_class(Trainer)


def on_all_devices() -> None:
    from transformers import CompileConfig

    private_names.compile_everywhere(CompileConfig())


def without_rules() -> None:
    """A model of a transformers that has neither of the two names."""
    private_names.ignored_patterns(torch.nn.Linear(1, 1))


def without_initialization() -> None:
    private_names.initialize_again(torch.nn.Linear(1, 1), [])


LOADING = "transformers.core_model_loading"
TRAINER = [f"Trainer.{name}" for name in private_names._HOOKS]
CASES: list[tuple[str, str, Holder | None, Callable[[], object]]] = [
    ("torch", "_subclasses.fake_tensor.FakeTensorMode", of("torch._subclasses.fake_tensor", "FakeTensorMode"),
     private_names.fake_tensors),
    ("torch", "ops.mkldnn._linear_pointwise", of("torch", "ops.mkldnn"), private_names.check_onednn),
    ("torch", "_dynamo.config.patch", of("torch.utils._config_module", "ConfigModule.patch"),
     lambda: entered(private_names.compiled_whole(2))),
    *(("torch", f"_dynamo.config.{name}", of("torch._dynamo.config", name), lambda: entered(private_names.compiled_whole(2)))
      for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")),
    ("transformers", "CompileConfig._compile_all_devices", of("transformers", "CompileConfig._compile_all_devices"),
     on_all_devices),
    ("transformers", "conversion_mapping.get_model_conversion_mapping",
     of("transformers.conversion_mapping", "get_model_conversion_mapping"), private_names.conversion_rules),
    *(("transformers", f"core_model_loading.{name}", of(LOADING, name), private_names.conversion_rules)
      for name in (*private_names._CONVERSION, "WeightConverter.convert")),
    ("transformers", "core_model_loading.WeightConverter.add_tensor", of(LOADING, "WeightTransform.add_tensor"),
     private_names.conversion_rules),
    ("transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected", None, without_rules),
    ("transformers", "PreTrainedModel.initialize_weights", None, without_initialization),
    *(("transformers", name, of("transformers", name), trainer_class) for name in TRAINER),
    *(("transformers", f"Trainer.{name}", None, lambda name=name: private_names.check_trainer(
        SimpleNamespace(**{other: 0 for other in private_names._TRAINER_STATE if other != name})))
      for name in private_names._TRAINER_STATE),
    *(("transformers", f"trainer.{name}", of("transformers.trainer", name), private_names.state_file_names)
      for name in ("OPTIMIZER_NAME", "SCHEDULER_NAME")),
    ("accelerate", "state.AcceleratorState._reset_state", of("accelerate.state", "AcceleratorState._reset_state"),
     private_names.forget_processes),
    ("accelerate", "PartialState._shared_state", of("accelerate", "PartialState._shared_state"), private_names.shard_on_cpu),
    ("peft", "tuners.tuners_utils.BaseTunerLayer", of("peft.tuners.tuners_utils", "BaseTunerLayer"),
     private_names.adapter_layer),
    ("peft", "tuners.tuners_utils.BaseTuner", of("peft.tuners.tuners_utils", "BaseTuner"), private_names.adapter_tuner),
]  # fmt: skip


@pytest.mark.parametrize(("package", "name", "holder", "call"), CASES, ids=[f"{case[0]}.{case[1]}" for case in CASES])
def test_a_version_without_the_name_is_refused_in_a_sentence(
    package: str, name: str, holder: Holder | None, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if holder is not None:
        owner, attribute = holder()
        if owner is torch.ops:  # it makes what is not there
            monkeypatch.setattr(owner, attribute, SimpleNamespace())
        elif hasattr(owner, "_config"):  # of settings
            monkeypatch.delitem(owner._config, attribute)
        else:
            monkeypatch.delattr(owner, attribute)
    with pytest.raises(ShortstackError) as error:
        call()
    installed = importlib.metadata.version(package)
    said = (
        re.escape(f"{package} {installed} has no {name}")
        + r".*, which .* needs; "
        + re.escape(f"{package} {KNOWN[package]}")
    )
    assert re.match(said, error.value.message), error.value.message
    assert error.value.hint == f"pip install {package}=={KNOWN[package]}"


def test_a_storage_without_its_place_in_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = loaded_tensor(tmp_path / "t.bin")
    assert private_names.place_in_file(tensor) > 0
    with pytest.raises(ShortstackError, match=r"torch .* has no UntypedStorage\._checkpoint_offset"):
        private_names.place_in_file(torch.ones(2))


def test_a_trainer_whose_hook_takes_other_parameters_is_refused() -> None:
    from transformers import Trainer

    class Changed(Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, model: Any, trial: Any) -> None: ...

        def _load_optimizer_and_scheduler(self, folder: str) -> None: ...

    with pytest.raises(ShortstackError, match=r"Trainer\._load_optimizer_and_scheduler\(checkpoint\)"):
        private_names.check_trainer_class(Changed)


def test_a_retraining_run_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check is where the name is used, and not beside it."""
    from transformers import Trainer

    from shortstack.retraining.cpt import retrain_cpt
    from tests import pico
    from tests.retraining.material import texts

    model = pico.build(tmp_path / "m")
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    with pytest.raises(
        ShortstackError, match=r"has no Trainer\._save_checkpoint\(model, trial\), which retraining needs"
    ):
        retrain_cpt(
            str(model), data=str(texts(tmp_path / "t.jsonl")), out=tmp_path / "o", seq_len=16, max_steps=1, quiet=True
        )
    assert not (tmp_path / "o").exists()


def test_the_known_versions_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {name: pinned[name] for name in KNOWN} == KNOWN


# Documented in spite of their underscore, or harmless where they are missing.
ALLOWED = {
    "_exit",  # os
    "_Hash", "_typeshed",  # for types alone
    "_block", "_gate",  # of this package's own modules, which hold them by name
    "_dynamo",  # what the command line leaves out of an import, if it is there (cli/quick_start.py)
}  # fmt: skip


def test_no_other_file_takes_a_private_name_of_a_library() -> None:
    """A name with a leading underscore that this package does not define itself is another's."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py") if "assets" not in path.parts}
    own = {name for tree in trees.values() for name in _defined(tree)}
    odd = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path, tree in trees.items()
        if path.name != "private_names.py"
        for name in _used(tree)
        if name not in own | ALLOWED
    }
    assert not odd
    assert "_shared_state" in set(_used(trees[SOURCE / "runtime/private_names.py"]))  # it finds what is there


def _is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        ):
            yield node.attr


def _used(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("shortstack"):
            yield from filter(_is_private, [*node.module.split("."), *(one.name for one in node.names)])
        elif isinstance(node, ast.Import):
            yield from filter(_is_private, [part for one in node.names for part in one.name.split(".")])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and _is_private(one.value))
