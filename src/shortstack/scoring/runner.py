"""The sweeps of one scoring run, and what the criteria make of what they see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shortstack.artifacts.scores import CriterionScores
from shortstack.common.progress import Progress
from shortstack.runtime.distributed import ALONE, Process
from shortstack.scoring.criteria import Criterion

if TYPE_CHECKING:
    import torch

    from shortstack.engine.forward import ForwardResult
    from shortstack.engine.journal import Journal
    from shortstack.engine.parameters import ScoredParameter
    from shortstack.engine.select import Engine
    from shortstack.scoring.early_stopping import Stability


@dataclass
class ScoringRun:
    """The sweeps of one scoring run and what the criteria made of them.

    Several processes share the windows: each sweeps its part, losses are put side by side, and gradients are added up before
    weights meet them.
    """

    engine: Engine
    criteria: list[Criterion]
    progress: Progress
    journal: Journal
    process: Process = ALONE
    found: dict[str, CriterionScores] = field(default_factory=dict)
    _tensors: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    _scored: dict[int, list[ScoredParameter]] = field(default_factory=dict)

    def sweep(self, windows: Sequence[Sequence[int]] | None) -> None:
        """Run the fewest sweeps that the criteria need, and fill `found` in the order asked for."""
        from shortstack.engine.forward import windows_tensor
        from shortstack.engine.parameters import scored_parameters

        depth = len(self.engine.blocks)
        self._scored = {index: scored_parameters(self.engine.blocks[index]) for index in self.engine.candidates}
        taylors = [asked for asked in self.criteria if asked.kind == "taylor"]
        branches = any(asked.kind == "ppl" for asked in self.criteria)
        forward: ForwardResult | None = None
        self.journal.extra = lambda: self._tensors
        saved = self.journal.found()
        if saved is not None:
            self._tensors = {
                name: {int(index): scores for index, scores in blocks.items()}
                for name, blocks in saved.record["extra"].items()
            }
        if windows is None:
            with self.progress.bar("weights", depth) as advance:
                self.engine.weights_only(self._score_magnitude, advance)
        else:
            ids_WT = windows_tensor(windows[self.process.part(len(windows))], self.engine.device)
            with self.progress.bar("forward", self.engine.forward_work(branches=branches)) as advance:
                forward = self.engine.forward(
                    ids_WT,
                    branches=branches,
                    keep_inputs=bool(taylors),
                    on_weights=self._score_magnitude,
                    on_progress=advance,
                    journal=self.journal,
                )
            self._backward(ids_WT, forward, taylors, len(windows))
            forward = self._of_all(forward, len(windows))
        for asked in self.criteria:
            self.found[asked.name] = self._result(asked, forward)

    def sweep_rounds(self, windows: Sequence[Sequence[int]], size: int, stability: Stability) -> int:
        """Sweep `size` windows after `size` windows, until they are enough; ppl alone. Returns how many it took."""
        import torch

        from shortstack.engine.forward import ForwardResult, windows_tensor
        from shortstack.engine.journal import Journal, read_state

        folder = self.journal.folder if self.process.world == 1 else None
        rounds: list[list[list[float]]] = []  # per round: NLL of [window][dense, without block 0, 1, ...]
        left = read_state(folder) if folder is not None else None
        if left is not None and left.record["key"] == {**self.journal.key, "round": left.record["key"].get("round")}:
            rounds = left.record["extra"]["rounds"]
        found = torch.tensor([], dtype=torch.float64).reshape(0, len(self.engine.candidates) + 1)
        for number, start in enumerate(range(0, len(windows) - size + 1, size)):
            if number >= len(rounds):
                key = {**self.journal.key, "round": number}
                journal = Journal(folder, key, self.journal.every_seconds, lambda: {"rounds": rounds})
                part = windows[start : start + size]
                ids_WT = windows_tensor(part[self.process.part(size)], self.engine.device)
                with self.progress.bar(f"round {number + 1}", self.engine.forward_work(branches=True)) as advance:
                    forward = self.engine.forward(
                        ids_WT, branches=True, keep_inputs=False, on_weights=lambda *_: None, on_progress=advance,
                        journal=journal,
                    )  # fmt: skip
                forward = self._of_all(forward, size)
                assert forward.base_nll_W is not None
                assert forward.candidate_nll_NW is not None
                rounds.append(torch.cat([forward.base_nll_W[None], forward.candidate_nll_NW]).T.tolist())
            found = torch.cat([found, torch.tensor(rounds[number], dtype=torch.float64)])
            enough = stability.judge(found[:, 1:].T)
            self.progress.say(f"{len(found)} windows: would remove {', '.join(map(str, stability.chosen[-1]))}")
            if enough:
                break
        stability.ended()
        whole = ForwardResult(found[:, 0], found[:, 1:].T, None, None)
        self.found = {asked.name: self._result(asked, whole) for asked in self.criteria}
        return len(found)

    def _of_all(self, forward: ForwardResult, windows: int) -> ForwardResult:
        """The losses of all processes' windows, in their order."""
        base, candidates = forward.base_nll_W, forward.candidate_nll_NW
        return dataclasses.replace(
            forward,
            base_nll_W=None if base is None else self.process.gathered(base, windows),
            candidate_nll_NW=None if candidates is None else self.process.gathered(candidates, windows),
        )

    def _complete(self, gradient: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """A gradient over the windows of all processes; one that no window of ours reaches may have reached others."""
        if self.process.world == 1:
            return gradient
        return self.process.summed(weight.new_zeros(weight.shape) if gradient is None else gradient)

    def _backward(self, ids_WT: torch.Tensor, forward: ForwardResult, taylors: list[Criterion], windows: int) -> None:
        import torch

        from shortstack.engine.journal import Journal
        from shortstack.scoring.criteria import taylor

        part = self.process.part(windows)
        batches = list(dict.fromkeys(asked.batch for asked in taylors))
        for turn, batch in enumerate(batches):
            group = [asked for asked in taylors if asked.batch == batch]

            def on_gradients(
                index: int,
                weights: dict[str, torch.Tensor],
                gradients: dict[str, torch.Tensor],
                group: list[Criterion] = group,
            ) -> None:
                scores: dict[tuple[str, str], torch.Tensor] = {}
                for parameter in self._scored.get(index, ()):
                    name = parameter.name
                    # A parameter that the loss does not reach (an expert that no token went to) has gradient 0.
                    gradient = self._complete(gradients.get(name), weights[name])
                    for asked in group:
                        scores[asked.name, name] = (
                            taylor.score(asked, weights[name], gradient, parameter.output_dim)
                            if gradient is not None
                            else torch.zeros((), dtype=torch.float64, device=weights[name].device)
                        )
                self._keep(index, scores)

            with self.progress.bar("backward", 3 * len(self.engine.blocks)) as advance:
                self.engine.backward(
                    ids_WT,
                    forward,
                    loss_scale_W=taylor.loss_scale(windows, ids_WT.shape[1], batch)[part].to(ids_WT.device),
                    on_gradients=on_gradients,
                    release_inputs=turn == len(batches) - 1,
                    on_progress=advance,
                    turn=turn,
                    # Processes go through the blocks together: one that went on from another place would wait for ever.
                    journal=self.journal if self.process.world == 1 else Journal(None),
                )

    def _score_magnitude(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        from shortstack.scoring.criteria import magnitude

        scores: dict[tuple[str, str], torch.Tensor] = {}
        for asked in self.criteria:
            if asked.kind == "magnitude":
                for parameter in self._scored.get(index, ()):
                    weight = weights[parameter.name].detach()
                    scores[asked.name, parameter.name] = magnitude.score(asked, weight, parameter.output_dim)
        self._keep(index, scores)

    def _keep(self, index: int, scores: dict[tuple[str, str], torch.Tensor]) -> None:
        """Scores of a block's tensors by (criterion, tensor): brought from where they were computed all at once."""
        import torch

        if scores:
            values = torch.stack(list(scores.values())).tolist()
            for (criterion, name), value in zip(scores, values, strict=True):
                self._tensors.setdefault(criterion, {}).setdefault(index, {})[name] = value

    def _result(self, asked: Criterion, forward: ForwardResult | None) -> CriterionScores:
        candidates = self.engine.candidates
        blocks = tuple(self.engine.original_blocks[index] for index in candidates)
        if asked.kind == "ppl":
            from shortstack.scoring.criteria import ppl

            if forward is None or forward.base_nll_W is None or forward.candidate_nll_NW is None:
                raise ValueError("ppl needs a forward sweep with branches")
            stderr = ppl.paired_stderr(forward.candidate_nll_NW, forward.base_nll_W)
            return CriterionScores(
                asked.name,
                tuple(ppl.perplexities(forward.candidate_nll_NW)),
                blocks,
                stderr=tuple(stderr) if stderr is not None else None,
                base=ppl.perplexities(forward.base_nll_W[None])[0],
            )
        from shortstack.scoring.criteria.reductions import block_score

        by_index = self._tensors[asked.name]
        values = [block_score(list(by_index[index].values()), asked.block_reduction) for index in candidates]
        tensors = {self.engine.original_blocks[index]: by_index[index] for index in candidates}
        return CriterionScores(asked.name, tuple(values), blocks, tensors=tensors)
