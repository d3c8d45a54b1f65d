"""Where stages take a record from: a file or, in Python, the object itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from shortstack.common.option_values import Form

if TYPE_CHECKING:
    from shortstack.artifacts.plan import PrunePlan
    from shortstack.artifacts.scores import Scores

    # The command line, which reads these annotations when it runs, knows files alone.
    PlanSource = Path | PrunePlan
    ScoresSource = Path | Scores
else:
    PlanSource = Annotated[Path, Form(also="shortstack.artifacts.plan:PrunePlan")]
    ScoresSource = Annotated[Path, Form(also="shortstack.artifacts.scores:Scores")]
