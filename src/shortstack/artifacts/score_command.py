"""The command that scores a model as a record of its calibration says it was scored."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_RECORDED = ("samples", "seq_len", "sampling", "seed")


def score_command(
    source: str, calibration: Mapping[str, Any], criteria: Sequence[str], *, more: str = "", out: str = "scores.json"
) -> str:
    """What to type; empty where the calibration is unknown.

    Args:
        source: the model.
        calibration: of scores.json; without `samples` the criteria need the weights alone.
        criteria: by their names with parameters.
        more: further options, as they are typed.
        out: the file to write.
    """
    if not calibration:
        return ""
    data = options = ""
    if calibration.get("samples"):
        data = f" --data {shlex.quote(str(calibration['source']))}"
        options = "".join(
            f" --{name.replace('_', '-')} {shlex.quote(str(calibration[name]))}"
            for name in _RECORDED
            if calibration.get(name) is not None
        ) + (" --bos-every" if calibration.get("bos_every") else "")
    listed = shlex.quote(",".join(criteria))
    return f"shortstack score {shlex.quote(source)}{data} --criterion {listed}{options}{more} --out {out}"
