"""From tensors as they are stored to parameters as they are computed with, by transformers' own rules.

Names differ (a prefix), and so do forms: experts are stored one by one and computed with in one fused tensor. What
transformers applies to a whole checkpoint when it loads one is applied here to the tensors of one block at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.runtime.private_names import conversion_rules, ignored_patterns


@dataclass
class Part:
    """Stored tensors that together make one parameter, or several.

    Attributes:
        target: the (first) parameter's name in the model.
        sources: names on disk, with the pattern of the rule that takes them.
        rule: transformers' rule, or None where a tensor is stored as it is computed with.
    """

    target: str
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    rule: Any = None


class Conversion:
    """Which stored tensors make which parameters of a model.

    Args:
        model: the model, parameters on the meta device.
        checkpoint: where the tensors are.

    Raises:
        ShortstackError: a tensor has no place in the model, or not the shape that the config implies.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._rules = conversion_rules()
        self._model = model
        self._checkpoint = checkpoint
        mapping = self._rules.mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, self._rules.renaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, self._rules.converter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._expected: Mapping[str, torch.Tensor] = model.state_dict()
        self._parts: dict[str, Part] = {}
        self._part_of: dict[str, Part] = {}
        for tensor in checkpoint.tensors.values():
            if not checkpoint.anatomy.predicts_further(tensor.name):
                self._pair(tensor)

    def _pair(self, tensor: TensorInfo) -> None:
        checkpoint, expected = self._checkpoint, self._expected
        target, pattern = self._renamed(tensor.name)
        if target not in expected:
            if self._ignored(tensor.name) or checkpoint.anatomy.is_buffer(tensor.name):
                return
            raise ShortstackError(
                f"{checkpoint.source}: the model has no parameter for tensor {tensor.name!r}",
                hint="check that the weights belong to this config: transformers expects other names for this family",
            )
        if pattern is None and tuple(expected[target].shape) != tensor.shape:
            raise ShortstackError(
                f"{checkpoint.source}: {tensor.name} is {list(tensor.shape)}, config.json implies "
                f"{list(expected[target].shape)}",
                hint="config.json and the weights do not belong together",
            )
        part = self._parts.setdefault(target, Part(target))
        part.sources.append((tensor.name, pattern))
        if pattern is not None:
            part.rule = self._by_pattern[pattern]
        self._part_of[tensor.name] = part

    def _ignored(self, name: str) -> bool:
        """What transformers leaves out, too; and the other models of a composite, such as a vision tower."""
        if any(re.search(pattern, name) for pattern in ignored_patterns(self._model)):
            return True
        family, anatomy = self._checkpoint.anatomy.family, self._checkpoint.anatomy
        base = anatomy.prefix.partition(".")[0]
        return bool(family.nested) and not name.startswith((base, anatomy.head))

    def makes(self, name: str) -> bool:
        """Whether stored tensors make this parameter or buffer of the model, as one that begins a part."""
        return name in self._parts

    def parts(self, tensors: Iterable[TensorInfo]) -> list[Part]:
        """The parts that some stored tensors make; all of a part's tensors are among them."""
        found = {self._part_of[t.name].target: self._part_of[t.name] for t in tensors if t.name in self._part_of}
        return list(found.values())

    def parameters(self, part: Part, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that a part makes of the stored tensors, by name in the model."""
        if part.rule is None:
            return {part.target: stored[part.sources[-1][0]]}
        rule = copy.deepcopy(part.rule)
        for name, pattern in sorted(part.sources, key=lambda source: self._rules.sort_key(source[0])):
            rule.add_tensor(part.target, name, pattern, lambda value=stored[name]: value)
        made = rule.convert(part.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def stored(self, tensors: Iterable[TensorInfo], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The other way round: what these stored tensors become when parameters of the model have other values.

        Args:
            tensors: all that make the parameters, of a block say.
            parameters: new values, by name in the model.

        Returns:
            The new values by name on disk, of those tensors that parameters are made of.

        Raises:
            ShortstackError: transformers' rules give other tensors than there were.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        plain = {part.target: part.sources[-1][0] for part in self._parts.values() if part.rule is None}
        found = {plain[name]: value for name, value in parameters.items() if name in plain}
        ruled = {name: value for name, value in parameters.items() if name not in plain}
        if ruled:
            found |= self._rules.revert(self._model, ruled)
        odd = [name for name, value in found.items() if shapes.get(name) != tuple(value.shape)]
        if odd:
            raise ShortstackError(
                f"{self._checkpoint.source}: transformers' rules make a tensor {odd[0]!r} that the checkpoint lacks",
                hint="its blocks cannot be written back as they were stored",
            )
        return found

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(name in the model, pattern of the rule that makes a parameter of it)."""
        prefix, expected = self._model.base_model_prefix, self._expected
        target, pattern = self._rules.rename(name, self._renamings, self._converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = self._rules.rename(name, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        return target, pattern
