"""Whether the last block that is chosen and the next one can be told apart by their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shortstack.artifacts.score_command import score_command
from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.common.significance import LEVEL, student_p
from shortstack.pruning.options import BlockChoice

_MORE = 4  # times as many windows: half the error
_MOST_SAMPLES = 500  # of `score --until stable` by default, which takes at least two rounds


def close_scores(
    source: str,
    ranking: Scores,
    chosen: CriterionScores,
    order: Sequence[int],
    removed: Sequence[int],
    choice: BlockChoice,
) -> str:
    """Two lines where the last block chosen and the next one are within the error of their scores; else nothing.

    The error of their difference is that of two separate scores: the windows are the same, so it is at most as large.

    Args:
        source: the model.
        ranking, chosen: the scores, and the criterion among them.
        order: the blocks that can be removed, by that criterion.
        removed: those that are.
        choice: what was requested.
    """
    scores, windows = chosen.by_block(), int(ranking.calibration.get("samples") or 0)
    left = [block for block in order if block not in removed]
    if scores is None or chosen.stderr is None or not removed or not left:  # also where the worst of sources decides
        return ""
    errors = dict(zip(chosen.blocks, chosen.stderr, strict=True))
    last = max(removed, key=lambda block: (scores[block], block))
    following = next((block for block in left if scores[block] >= scores[last]), None)
    if following is None:
        return ""
    pair = (scores[last], scores[following])
    difference = math.log(pair[1] / pair[0]) if chosen.dense_ppl is not None else pair[1] - pair[0]
    error = math.hypot(errors[last], errors[following])
    if student_p(difference / error if error else math.inf if difference else 0.0, windows) <= LEVEL:
        return ""
    return (
        f"block {last}, the last one chosen, and block {following}, the next, are within the error of their scores "
        f"({difference:.2g} ±{error:.2g}{' nats' if chosen.dense_ppl is not None else ''}, {windows} windows): other text "
        f"may choose the other\nto find out: {_more_windows(source, ranking, chosen, len(removed), choice)}"
    )


def _more_windows(source: str, ranking: Scores, chosen: CriterionScores, removed: int, choice: BlockChoice) -> str:
    """The command that scores again with more windows: by perplexity, with as many as it takes."""
    calibration, more = dict(ranking.calibration), ""
    if chosen.dense_ppl is not None and not calibration.get("sources") and 2 * calibration["samples"] <= _MOST_SAMPLES:
        more = f" --until stable --remove {removed}" + {None: "", True: " --plus", False: " --no-plus"}[choice.plus]
    else:
        calibration["samples"] *= _MORE
    return score_command(source, calibration, [chosen.name], more=more, out="more-windows.json")
