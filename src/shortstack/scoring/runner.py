"""One scoring run: the fewest sweeps that the criteria need, and again with less at a time where memory runs out.

Legend: B windows that are shown together, W windows, T tokens, D hidden size, N blocks that are scored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.engine.select import EngineOptions, with_less_memory
from shortstack.errors import ShortstackError
from shortstack.runtime.devices import Kernels
from shortstack.runtime.distributed import ALONE, Process
from shortstack.runtime.memory import is_out_of_memory
from shortstack.scoring.criteria import (
    BlockPass,
    Criterion,
    LogitsPass,
    Need,
    RequestedCriterion,
    ScoredParameter,
    StatesPass,
    Swept,
    scored_parameters,
)
from shortstack.scoring.early_stopping import Rounds, Stability

if TYPE_CHECKING:
    import torch

    from shortstack.engine.forward import ForwardResult, Hooks
    from shortstack.engine.journal import Journal
    from shortstack.engine.losses import Predictions
    from shortstack.engine.select import Engine


@dataclass
class ScoringRun:
    """The sweeps of one scoring run, and the criteria that are shown what the sweeps have.

    Several processes share the windows: each sweeps its part, losses are put side by side, and gradients are added up before
    criteria see them.

    Attributes:
        checkpoint: what is scored.
        windows: of all processes; None where every criterion needs weights alone.
        requested: the criteria.
        work_folder: where the state of the run is saved; None saves nothing.
        save_every: at least this many seconds between two saved states.
        left: the key of the state that an earlier run left.
        kernels: the library of float32 products on a CPU.
        rounds, stability: add windows in rounds until they are enough.
        engine, settings: what the run used.
        found: the scores, in the order of the criteria.
    """

    checkpoint: Checkpoint
    windows: Sequence[Sequence[int]] | None
    requested: Sequence[RequestedCriterion]
    progress: Progress
    work_folder: Path | None = None
    save_every: float = 60.0
    left: dict[str, Any] | None = None
    kernels: Kernels = "auto"
    process: Process = ALONE
    rounds: Rounds | None = None
    stability: Stability | None = None
    engine: Engine | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    found: dict[str, CriterionScores] = field(default_factory=dict)
    _criteria: list[Criterion] = field(default_factory=list)
    _scored: dict[int, list[ScoredParameter]] = field(default_factory=dict)

    def run(self, options: EngineOptions) -> None:
        """Sweep, and fill `found`; with less at a time where memory runs out.

        Raises:
            ShortstackError: it does not fit with the least at a time either.
        """
        place, trying = options.device, options
        while True:
            try:
                with self._prepared(trying) as (engine, journal):
                    if self.rounds is not None and self.stability is not None:
                        self._sweep_rounds(engine, journal, self.rounds.size, self.stability)
                    else:
                        self._sweep(engine, journal)
                return
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) or isinstance(error, MemoryError)):
                    raise
                if self.process.world > 1:
                    raise ShortstackError(
                        f"{self.checkpoint.source}: out of memory on {place}, in one of {self.process.world} processes",
                        hint="--memory streamed, a smaller --seq-len, or fewer processes",
                    ) from None
                less = with_less_memory(trying, self.engine, len(self.windows[0]) if self.windows else 1)
            if less is None:
                raise ShortstackError(
                    f"{self.checkpoint.source}: out of memory on {place}, even with one window and one block at a time",
                    hint="a smaller --seq-len, --dtype bfloat16, or --device cpu",
                )
            how = "block by block" if less.tokens is None else f"with {less.tokens} tokens at a time"
            self.progress.say(f"out of memory on {place}: trying again {how}")
            trying = less

    @contextlib.contextmanager
    def _prepared(self, options: EngineOptions) -> Iterator[tuple[Engine, Journal]]:
        """Within, there are an engine, criteria that have seen nothing, and where the state is saved."""
        from shortstack.engine.cpu import computing
        from shortstack.engine.journal import Journal
        from shortstack.engine.select import choose_engine

        self.engine = None
        windows = self.windows
        if windows is not None:
            windows = windows if self.rounds is None else windows[: self.rounds.size]
            windows = windows[self.process.part(len(windows))]
        self.engine = engine = choose_engine(self.checkpoint, windows, options)
        self.settings = {
            "dtype": str(options.dtype).removeprefix("torch."),
            "device": str(options.device),
            "memory": engine.memory,
            **({"whole_model": engine.reason} if engine.reason else {}),
            **({"group": engine.group} if not engine.reason and engine.group < len(engine.candidates) else {}),
            **({"processes": self.process.world} if self.process.world > 1 else {}),
            "versions": versions(),
        }
        self._criteria = [asked.start() for asked in self.requested]
        self._scored = {index: scored_parameters(engine.blocks[index]) for index in engine.candidates}
        with contextlib.closing(engine), computing(options.dtype, options.device, self.kernels) as linear:
            self.settings["linear"] = linear
            key = self._key(engine, windows if self.rounds is None else self.windows)
            self._say_what_becomes_of_state(key)
            yield engine, Journal(self.work_folder, key, self.save_every)

    def _key(self, engine: Engine, windows: Sequence[Sequence[int]] | None) -> dict[str, Any]:
        """All that makes the scores to the last bit: a saved state with another key is not used."""
        from shortstack.engine.cpu import usable_threads

        return {
            "fingerprint": self.checkpoint.fingerprint,
            "windows": hashlib.sha256(json_text(windows).encode()).hexdigest(),
            "criteria": [asked.name for asked in self.requested],
            **{name: value for name, value in self.settings.items() if name != "memory"},
            "group": engine.group,
            "tokens": engine.tokens,
            "blocks": list(engine.candidates),
            "threads": usable_threads(),
        }

    def _say_what_becomes_of_state(self, key: dict[str, Any]) -> None:
        from shortstack.engine.journal import STATE

        if self.left is None:
            if self.work_folder is not None and (self.work_folder / STATE).is_file():
                self.progress.say(f"the saved state in {self.work_folder} cannot be read and is not used")
            return
        differs = [name for name in key if self.left.get(name) != key[name]]
        if differs:
            others = ", ".join(differs)
            self.progress.say(
                f"the saved state in {self.work_folder} is another run's (other {others}) and is not used"
            )
        else:
            self.progress.say(f"going on from the saved state in {self.work_folder}")

    def _sweep(self, engine: Engine, journal: Journal) -> None:
        from shortstack.engine.forward import windows_tensor

        journal.extra = lambda: {criterion.name: criterion.kept for criterion in self._criteria}
        saved = journal.found()
        if saved is not None:
            for criterion in self._criteria:
                kept = saved.record["extra"].get(criterion.name, {})
                criterion.kept = {int(index): value for index, value in kept.items()}
        if self.windows is None:
            with self.progress.bar("weights", len(engine.blocks)) as advance:
                engine.weights_only(self._hooks(None).on_weights or (lambda *_: None), advance)
            self._finish(engine, None, 0)
            return
        ids_WT = windows_tensor(self.windows[self.process.part(len(self.windows))], engine.device)
        branches = bool(self._that_need("branches", "logits"))
        states, gradients = self._that_need("states"), self._that_need("gradients")
        with self.progress.bar("forward", engine.forward_work(branches=branches)) as advance:
            forward = engine.forward(
                ids_WT,
                branches=branches,
                keep_inputs=bool(states or (gradients and not engine.reason)),  # a whole model runs again for gradients
                keep_graphs=bool(gradients),
                hooks=self._hooks(ids_WT),
                on_progress=advance,
                journal=journal,
            )
        for criterion in states:
            if not criterion.kept:  # else it has seen them before the run was cut off
                inputs, last = forward.inputs, forward.last_WTD
                assert inputs is not None
                assert last is not None
                criterion.on_states(StatesPass(engine.candidates, slice(0, len(ids_WT)), inputs, last))
        self._backward(engine, ids_WT, forward, journal)
        self._finish(engine, self._of_all(forward, len(self.windows)), len(self.windows))

    def _sweep_rounds(self, engine: Engine, journal: Journal, size: int, stability: Stability) -> None:
        """Sweep `size` windows after `size` windows, until they are enough; for criteria of losses alone."""
        import torch

        from shortstack.engine.forward import ForwardResult, Hooks, windows_tensor
        from shortstack.engine.journal import Journal, read_state

        stability.begin()
        windows, key = self.windows or (), journal.key
        folder = journal.folder if self.process.world == 1 else None
        rounds: list[list[list[float]]] = []  # per round: NLL of [window][dense, without block 0, 1, ...]
        left = read_state(folder) if folder is not None else None
        if left is not None and left.record["key"] == {**key, "round": left.record["key"].get("round")}:
            rounds = left.record["extra"]["rounds"]
        found = torch.tensor([], dtype=torch.float64).reshape(0, len(engine.candidates) + 1)
        for number, start in enumerate(range(0, len(windows) - size + 1, size)):
            if number >= len(rounds):
                of_round = Journal(folder, {**key, "round": number}, journal.every_seconds, lambda: {"rounds": rounds})
                ids_WT = windows_tensor(windows[start : start + size][self.process.part(size)], engine.device)
                with self.progress.bar(f"round {number + 1}", engine.forward_work(branches=True)) as advance:
                    forward = engine.forward(
                        ids_WT,
                        branches=True,
                        keep_inputs=False,
                        keep_graphs=False,
                        hooks=Hooks(),
                        on_progress=advance,
                        journal=of_round,
                    )
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
        self._finish(engine, ForwardResult(found[:, 0], found[:, 1:].T, None, None), len(found))

    def _that_need(self, *needs: Need) -> list[Criterion]:
        return [
            criterion
            for asked, criterion in zip(self.requested, self._criteria, strict=True)
            if not asked.needs.isdisjoint(needs)
        ]

    def _hooks(self, ids_WT: torch.Tensor | None) -> Hooks:
        """What a forward sweep calls: it hands on what it has to the criteria that need it."""
        from shortstack.engine.forward import Hooks

        hidden, logits = self._that_need("hidden"), self._that_need("logits")
        weights = [criterion for criterion in self._that_need("weights") if criterion not in hidden]

        def on_weights(index: int, named: dict[str, torch.Tensor]) -> None:
            for criterion in weights if index in self._scored else ():
                criterion.on_block(BlockPass(index, _detached(named), self._scored[index], slice(0, 0)))

        def on_hidden(
            index: int, named: dict[str, torch.Tensor], windows: slice, came: torch.Tensor, left: torch.Tensor
        ) -> None:
            shown = BlockPass(index, _detached(named), self._scored[index], windows, came.flatten(2), left.flatten(2))
            for criterion in hidden:
                criterion.on_block(shown)

        def on_logits(index: int, windows: slice, tokens: slice, dense: Predictions, without: Predictions) -> None:
            assert ids_WT is not None
            shown = LogitsPass(index, windows, tokens, dense, without, ids_WT[windows, tokens], ids_WT.shape[1])
            for criterion in logits:
                criterion.on_logits(shown)

        return Hooks(on_weights if weights else None, on_hidden if hidden else None, on_logits if logits else None)

    def _backward(self, engine: Engine, ids_WT: torch.Tensor, forward: ForwardResult, journal: Journal) -> None:
        """A backward sweep for each mean loss whose gradients criteria need."""
        from shortstack.engine.journal import Journal
        from shortstack.engine.losses import loss_scale

        windows, needing = len(self.windows or ()), self._that_need("gradients")
        batches = list(dict.fromkeys(criterion.batch for criterion in needing))
        for turn, batch in enumerate(batches):
            group = [criterion for criterion in needing if criterion.batch == batch]

            def on_gradients(
                index: int,
                weights: dict[str, torch.Tensor],
                gradients: dict[str, torch.Tensor],
                group: list[Criterion] = group,
            ) -> None:
                if index in self._scored:
                    scored, complete = self._scored[index], self._complete(index, weights, gradients)
                    for criterion in group:
                        criterion.on_block(BlockPass(index, weights, scored, slice(0, len(ids_WT)), gradients=complete))

            with self.progress.bar("backward", 3 * len(engine.blocks)) as advance:
                engine.backward(
                    ids_WT,
                    forward,
                    loss_scale_W=loss_scale(windows, ids_WT.shape[1], batch)[self.process.part(windows)].to(
                        ids_WT.device
                    ),
                    on_gradients=on_gradients,
                    release_inputs=turn == len(batches) - 1,
                    on_progress=advance,
                    turn=turn,
                    # Processes go through the blocks together: one that resumed at another block would wait for ever.
                    journal=journal if self.process.world == 1 else Journal(None),
                )

    def _complete(
        self, index: int, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradients of the scored weights over the windows of all processes, which take the place of this process's."""
        complete = {}
        for name in (parameter.name for parameter in self._scored[index]):
            gradient = gradients.pop(name, None)
            if self.process.world > 1:  # one that no window of ours reaches may have reached others
                gradient = self.process.summed(
                    weights[name].new_zeros(weights[name].shape) if gradient is None else gradient
                )
            if gradient is not None:
                complete[name] = gradient
        return complete

    def _of_all(self, forward: ForwardResult, windows: int) -> ForwardResult:
        """The losses of all processes' windows, in their order."""
        base, candidates = forward.base_nll_W, forward.candidate_nll_NW
        return dataclasses.replace(
            forward,
            base_nll_W=None if base is None else self.process.gathered(base, windows),
            candidate_nll_NW=None if candidates is None else self.process.gathered(candidates, windows),
        )

    def _finish(self, engine: Engine, forward: ForwardResult | None, windows: int) -> None:
        swept = Swept(
            engine.candidates,
            tuple(engine.original_blocks[index] for index in engine.candidates),
            windows,
            len(self.windows[0]) if self.windows else 0,
            self.process,
            forward.base_nll_W if forward is not None else None,
            forward.candidate_nll_NW if forward is not None else None,
        )
        of_others = self._that_need("others")
        found = {one.name: one.finish(swept) for one in self._criteria if one not in of_others}
        swept = dataclasses.replace(swept, others=found)
        found |= {one.name: one.finish(swept) for one in of_others}
        self.found = {criterion.name: found[criterion.name] for criterion in self._criteria}


def _detached(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in named.items()}
