"""One scoring run: the fewest sweeps that the criteria need, and again with less at a time where memory runs out.

Legend: B windows that are shown together, W windows, T tokens, D hidden size, N blocks that are scored.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shortstack.artifacts.provenance import versions
from shortstack.artifacts.scores import CriterionScores
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.engine.cpu import computing, usable_threads
from shortstack.engine.interface import Engine, ForwardRequest, ForwardResult, GradientRequest, Windows
from shortstack.engine.journal import STATE, UNSAVED, Journal, read_state
from shortstack.engine.losses import Predictions
from shortstack.engine.select import EngineOptions, choose_engine, with_less_memory
from shortstack.errors import ShortstackError
from shortstack.runtime.devices import Kernels
from shortstack.runtime.distributed import ALONE, Process
from shortstack.runtime.memory import is_out_of_memory
from shortstack.runtime.workspace import differences, unused
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
from shortstack.scoring.shared_windows import SharedWindows
from shortstack.scoring.source_gradients import SourceGradients
from shortstack.scoring.swept import token_weights


@dataclass
class ScoringRun:
    """The sweeps of one scoring run, and the criteria that are shown what the sweeps have.

    Several processes share the windows: each sweeps its part, losses are put side by side, and gradients are added up before
    criteria see them.

    Attributes:
        checkpoint: what is scored.
        windows: what processes share; None where every criterion needs weights alone.
        requested: the criteria.
        work_folder: where the state of the run is saved; None saves nothing.
        save_every: at least this many seconds between two saved states.
        kernels: the library of float32 products on a CPU.
        rounds: add windows in rounds until they are enough; `stability` tells when.
        engine, settings: what the run used.
        found: the scores, in the order of the criteria.
    """

    checkpoint: Checkpoint
    windows: SharedWindows | None
    requested: Sequence[RequestedCriterion]
    progress: Progress
    work_folder: Path | None = None
    save_every: float = 60.0
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
        place, left = options.device, self._left()
        if left.get("fingerprint") == self.checkpoint.fingerprint:
            # What an earlier run decided by the memory that was free stays, or figures would differ in the last bits.
            options = dataclasses.replace(options, group=left.get("group"), tokens=left.get("tokens"))
        trying = options
        while True:
            if self.rounds is not None:
                self.stability = self.rounds.stability(self.checkpoint, options.candidates)
            try:
                with self._prepared(trying, left) as (engine, journal):
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
                        hint="use --memory streamed, a smaller --seq-len, or fewer processes",
                    ) from None
                less = with_less_memory(trying, self.engine, self.windows.seq_len if self.windows else 1)
            if less is None:
                raise ShortstackError(
                    f"{self.checkpoint.source}: out of memory on {place}, even with one window and one block at a time",
                    hint="use a smaller --seq-len, --dtype bfloat16, or --device cpu",
                )
            how = "block by block" if less.tokens is None else f"with {less.tokens} tokens at a time"
            self.progress.say(f"out of memory on {place}: trying again {how}")
            trying = less

    def _left(self) -> dict[str, Any]:
        """The key of the state that an earlier run left; empty where none can be read."""
        if self.work_folder is None or not (self.work_folder / STATE).is_file():
            return {}
        state = read_state(self.work_folder, tensors=False)
        if state is None:
            self.progress.say(f"the saved state in {self.work_folder} cannot be read and is not used")
        return {} if state is None else dict(state.record["key"])

    @contextlib.contextmanager
    def _prepared(self, options: EngineOptions, left: dict[str, Any]) -> Iterator[tuple[Engine, Journal]]:
        """Within, there are an engine, criteria that have seen nothing, and where the state is saved."""
        self.engine = None
        windows = self.windows
        if windows is not None:
            windows = windows if self.rounds is None else windows.some(slice(self.rounds.size))
        self.engine = engine = choose_engine(self.checkpoint, windows.own if windows else None, options)
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
        for criterion, asked in zip(self._criteria, self.requested, strict=True):
            if "gradients" in asked.needs:
                criterion.of_sources = {source: asked.start() for source in self._sources}
        self._scored = {index: scored_parameters(engine.blocks[index]) for index in engine.candidates}
        with contextlib.closing(engine), computing(options.dtype, options.device, self.kernels) as linear:
            self.settings["linear"] = linear
            key = self._key(engine)
            if left:
                differs = differences({name: left.get(name) for name in key}, key)  # a round has its number besides
                resuming = f"resuming from the saved state in {self.work_folder}"
                self.progress.say(unused(self.work_folder, differs) if differs else resuming)
            yield engine, Journal(self.work_folder, key, self.save_every)

    def _key(self, engine: Engine) -> dict[str, Any]:
        """All that makes the scores to the last bit: a saved state with another key is not used."""
        return {
            "fingerprint": self.checkpoint.fingerprint,
            "windows": self.windows.sha256 if self.windows else None,
            "criteria": [asked.name for asked in self.requested],
            **{name: value for name, value in self.settings.items() if name != "memory"},
            "group": engine.group,
            "tokens": engine.tokens,
            "blocks": list(engine.candidates),
            "threads": usable_threads(),
        }

    def _sweep(self, engine: Engine, journal: Journal) -> None:
        keeping = self._keeping()
        journal.extra = lambda: [criterion.kept for criterion in keeping]
        saved = journal.found()
        if saved is not None:
            for criterion, kept in zip(keeping, saved.record["extra"], strict=True):
                criterion.kept = {int(index): value for index, value in kept.items()}
        if self.windows is None:
            with self.progress.bar("weights", len(engine.blocks)) as advance:
                engine.weights_only(self._request(None).on_weights or (lambda *_: None), advance)
            self._finish(engine, None, None)
            return
        windows = self.windows.on(engine.device)
        states, gradients = self._that_need("states"), self._that_need("gradients")
        request = dataclasses.replace(
            self._request(windows),
            branches=bool(self._that_need("branches", "logits")),
            keep_inputs=bool(states or (gradients and not engine.reason)),  # a whole model runs again for gradients
            keep_graphs=bool(gradients),
        )
        with self.progress.bar("forward", engine.forward_work(branches=request.branches)) as advance:
            forward = engine.forward(windows, dataclasses.replace(request, on_progress=advance), journal)
        for criterion in states:
            if not criterion.kept:  # else it has seen them before the run was cut off
                inputs, last = forward.inputs, forward.last_WTD
                assert inputs is not None
                assert last is not None
                criterion.on_states(StatesPass(engine.candidates, slice(0, len(windows)), inputs, last))
        self._backward(engine, self.windows, windows, forward, journal)
        self._finish(engine, self._of_all(forward, len(self.windows.ids)), self.windows)

    def _sweep_rounds(self, engine: Engine, journal: Journal, size: int, stability: Stability) -> None:
        """Sweep `size` windows after `size` windows, until they are enough; for criteria of losses alone."""
        windows, key = self.windows, journal.key
        assert windows is not None
        folder = journal.folder if self.process.world == 1 else None
        rounds: list[list[list[float]]] = []  # per round: NLL of [window][dense, without block 0, 1, ...]
        left = read_state(folder) if folder is not None else None
        if left is not None and left.record["key"] == {**key, "round": left.record["key"].get("round")}:
            rounds = left.record["extra"]["rounds"]
        found = torch.tensor([], dtype=torch.float64).reshape(0, len(engine.candidates) + 1)
        for number, start in enumerate(range(0, len(windows.ids) - size + 1, size)):
            if number >= len(rounds):
                of_round = Journal(folder, {**key, "round": number}, journal.every_seconds, lambda: {"rounds": rounds})
                some = windows.some(slice(start, start + size))
                with self.progress.bar(f"round {number + 1}", engine.forward_work(branches=True)) as advance:
                    request = ForwardRequest(branches=True, on_progress=advance)
                    forward = engine.forward(some.on(engine.device), request, of_round)
                forward = self._of_all(forward, size)
                assert forward.base_nll_W is not None
                assert forward.candidate_nll_NW is not None
                rounds.append(torch.cat([forward.base_nll_W[None], forward.candidate_nll_NW]).T.tolist())
            found = torch.cat([found, torch.tensor(rounds[number], dtype=torch.float64)])
            weights_W = token_weights(torch.tensor(windows.counts()[: len(found)]))
            enough = stability.judge(found[:, 1:].T if weights_W is None else found[:, 1:].T * weights_W)
            self.progress.say(f"{len(found)} windows: would remove {', '.join(map(str, stability.chosen[-1]))}")
            if enough:
                break
        stability.ended()
        self._finish(engine, ForwardResult(found[:, 0], found[:, 1:].T), windows.some(slice(len(found))))

    def _that_need(self, *needs: Need) -> list[Criterion]:
        return [
            criterion
            for asked, criterion in zip(self.requested, self._criteria, strict=True)
            if not asked.needs.isdisjoint(needs)
        ]

    @property
    def _sources(self) -> Mapping[str, Sequence[int]]:
        return self.windows.sources if self.windows else {}

    def _keeping(self) -> list[Criterion]:
        """All criteria that keep something, those of named sources behind the one that they belong to."""
        return [one for criterion in self._criteria for one in (criterion, *criterion.of_sources.values())]

    def _request(self, swept: Windows | None) -> ForwardRequest:
        """What a forward sweep calls: it hands on what it has to the criteria that need it."""
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
            assert swept is not None
            for criterion in logits:
                criterion.on_logits(LogitsPass(index, windows, tokens, dense, without, swept))

        return ForwardRequest(
            on_weights=on_weights if weights else None,
            on_hidden=on_hidden if hidden else None,
            on_logits=on_logits if logits else None,
        )

    def _backward(
        self,
        engine: Engine,
        shared: SharedWindows,
        windows: Windows,
        forward: ForwardResult,
        journal: Journal,
    ) -> None:
        """A backward sweep for each mean loss whose gradients criteria need."""
        # Processes go through the blocks together: one that resumed at another block would wait for ever.
        journal = journal if self.process.world == 1 else UNSAVED

        needing = self._that_need("gradients")
        batches = list(dict.fromkeys(criterion.batch for criterion in needing))
        for turn, batch in enumerate(batches):
            group = [criterion for criterion in needing if criterion.batch == batch]
            scale_W, shares = shared.loss_scale(batch)
            adding = SourceGradients(self.process, self._scored, group, shares, len(windows))
            is_last = turn == len(batches) - 1
            with self.progress.bar("backward", 3 * len(engine.blocks)) as advance:
                scale_W, show = scale_W.to(engine.device), adding.on_gradients
                request = GradientRequest(scale_W, show, turn, release_inputs=is_last, on_progress=advance)
                engine.backward(windows, forward, request, journal)

    def _of_all(self, forward: ForwardResult, windows: int) -> ForwardResult:
        """The losses of all processes' windows, in their order."""
        base, candidates = forward.base_nll_W, forward.candidate_nll_NW
        return dataclasses.replace(
            forward,
            base_nll_W=None if base is None else self.process.gathered(base, windows),
            candidate_nll_NW=None if candidates is None else self.process.gathered(candidates, windows),
        )

    def _finish(self, engine: Engine, forward: ForwardResult | None, windows: SharedWindows | None) -> None:
        swept = Swept(
            engine.candidates,
            tuple(engine.original_blocks[index] for index in engine.candidates),
            len(windows.ids) if windows else 0,
            windows.seq_len if windows else 0,
            torch.tensor(windows.counts() if windows else []),
            self.process,
            forward.base_nll_W if forward is not None else None,
            forward.candidate_nll_NW if forward is not None else None,
        )
        found = self._finished(swept)
        of_text = {asked.name for asked in self.requested if asked.needs != {"weights"}}  # weights are the same for all
        of_sources = {
            source: self._finished(swept.of_source(source, places)) for source, places in self._sources.items()
        }
        self.found = {
            name: dataclasses.replace(
                one, sources={source: of[name] for source, of in of_sources.items() if name in of_text}
            )
            for name, one in found.items()
        }

    def _finished(self, swept: Swept) -> dict[str, CriterionScores]:
        """The scores of all criteria, in their order."""
        of_others = self._that_need("others")
        found = {one.name: one.finish(swept) for one in self._criteria if one not in of_others}
        swept = dataclasses.replace(swept, others=found)
        found |= {one.name: one.finish(swept) for one in of_others}
        return {criterion.name: found[criterion.name] for criterion in self._criteria}


def _detached(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in named.items()}
