"""Two criteria that only tests know: they are registered by a test, or in a process that is started as this module.

`python -m tests.scoring.toys ARGUMENTS` is `shortstack ARGUMENTS` with both. With TOYS_KILLED_AT=N in the environment it
kills itself with SIGKILL right after it has saved its N-th state.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from shortstack.artifacts.scores import CriterionScores
from shortstack.scoring.criteria import CRITERIA, BlockPass, Criterion, LogitsPass, Row, Swept
from shortstack.scoring.parameters import WholeNumber

ROWS = {
    "change": Row("tests.scoring.toys:Change", frozenset({"weights", "hidden"}), {"power": WholeNumber(2, at_most=4)}),
    "divergence": Row("tests.scoring.toys:Divergence", frozenset({"logits"})),
}


class Change(Criterion):
    """Mean of |what comes out of a block - what goes in|^power."""

    def on_block(self, block: BlockPass) -> None:
        assert block.inputs_BTD is not None
        assert block.outputs_BTD is not None
        assert set(block.weights) >= {parameter.name for parameter in block.scored}
        assert block.gradients is None
        change = (block.outputs_BTD.double() - block.inputs_BTD.double()).abs() ** self.parameters["power"]
        self.add(block.index, block.windows, change.mean(dim=(1, 2)))

    def finish(self, swept: Swept) -> CriterionScores:
        return CriterionScores(self.name, tuple(swept.per_window(self).mean(dim=1).tolist()), swept.blocks)


class Divergence(Criterion):
    """Mean KL divergence of what the model predicts without a block from what the dense model predicts."""

    def on_logits(self, logits: LogitsPass) -> None:
        dense, without = (x.logits_BTV.double().log_softmax(dim=-1) for x in (logits.dense, logits.without))
        assert logits.ids_BT.shape == dense.shape[:2]
        self.add(logits.index, logits.windows, (dense.exp() * (dense - without)).sum(dim=(1, 2)))

    def finish(self, swept: Swept) -> CriterionScores:
        mean_N = swept.per_window(self).mean(dim=1) / swept.seq_len
        return CriterionScores(self.name, tuple(mean_N.tolist()), swept.blocks)


def main() -> int:
    from shortstack.cli.app import run
    from shortstack.engine.journal import Journal

    CRITERIA.update(ROWS)
    real, left = Journal.save, [int(os.environ.get("TOYS_KILLED_AT", "0"))]

    def save(self: Journal, *arguments: Any) -> None:
        real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.save = save  # type: ignore[method-assign]
    torch.set_num_threads(1)
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
