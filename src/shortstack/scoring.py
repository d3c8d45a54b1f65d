"""Plan the fewest sweeps for the criteria asked for, run them, return Scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shortstack.calibration import CalibrationSet, Sampling, check_windows, draw_windows
from shortstack.checkpoint.provenance import versions
from shortstack.checkpoint.reader import Checkpoint, open_checkpoint
from shortstack.checkpoint.writer import check_writable_file
from shortstack.corpora import read_corpus
from shortstack.criteria import Criterion, parse_criteria
from shortstack.errors import ShortstackError
from shortstack.machine import DType, available_bytes, peak_rss_bytes, pick_device, pick_dtype
from shortstack.progress import Progress
from shortstack.scores import CriterionScores, Scores
from shortstack.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

    from shortstack.engine.parameters import ScoredParameter
    from shortstack.engine.skeleton import Skeleton
    from shortstack.engine.sweep import ForwardResult
    from shortstack.engine.weights import BlockWeights

MemoryMode = Literal["auto", "resident", "streamed"]

_RESIDENT_SHARE = 0.25  # of the memory that is free: what `auto` lets a model take
_STREAMS_SHARE = 0.4  # of the memory that is free: what streams may take before they are swept in groups


def score(
    model: str,
    *,
    out: Path | None = None,
    criterion: str = "ppl",
    data: str = "embedded",
    samples: int = 10,
    seq_len: int = 128,
    seed: int = 1234,
    sampling: Sampling = "documents",
    bos_every: bool = False,
    chat_template: bool = False,
    csv: Path | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    memory: MemoryMode = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Scores:
    """Measure how much each block matters. Lower scores are removed first.

    The model is never held whole unless it is small: one block at a time is brought in, with the next one ahead.

    Args:
        model: a checkpoint directory, a hub id, or `embedded`.
        out: write the scores here (scores.json).
        criterion: criteria, separated by commas: `ppl`, `taylor`, `magnitude`, with parameters such as
            `taylor:p=2,weight=sum,block=sum,batch=10`. Asked for together they share their passes over the weights.
        data: where calibration text comes from: `embedded`, a .txt, .jsonl, .json or .parquet file, or a folder.
        samples: number of calibration windows.
        seq_len: tokens per window.
        seed: of the generator that draws the windows.
        sampling: `documents` draws windows from documents that are long enough, or from joined rows; `published` is the
            procedure of Shortened LLaMA.
        bos_every: begin every window with BOS, as published for Gemma.
        chat_template: render rows of `messages` through the tokenizer's chat template.
        csv: also write the scores in the published CSV layout, one folder per criterion, into this folder.
        dtype: what to compute in; `auto` is float32 on a CPU, the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory: `streamed` holds two blocks, `resident` keeps all; `auto` keeps a model that fits well.
        trust_remote_code: run code that comes with the checkpoint.
        quiet: no progress on stderr.

    Returns:
        The scores of every criterion.

    Raises:
        ShortstackError: the checkpoint cannot be read, there is too little text, or a score is not finite.
    """
    criteria = parse_criteria(criterion)
    if out is not None:
        check_writable_file(Path(out))
    checkpoint = open_checkpoint(model)
    calibration = None
    if any(asked.needs != "weights" for asked in criteria):
        corpus = read_corpus(data, role="calibration")
        tokenizer = None if corpus.windows else load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        calibration = draw_windows(
            corpus,
            tokenizer,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            sampling=sampling,
            bos_every=bos_every,
            chat_template=chat_template,
        )
    scores = score_windows(
        checkpoint,
        calibration,
        criteria,
        dtype=dtype,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        progress=Progress(quiet=quiet),
    )
    if out is not None:
        scores.save(out)
    if csv is not None:
        total = checkpoint.parameters()
        scores.save_csv(csv, [total - size for size in checkpoint.block_parameters()])
    return scores


def score_windows(
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    criteria: Sequence[Criterion],
    *,
    dtype: DType = "auto",
    device: str = "auto",
    memory: MemoryMode = "auto",
    stream_bytes: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score the blocks of a checkpoint on given windows: what `score` does after reading its options.

    Args:
        calibration: windows of token ids; None where every criterion needs weights alone.
        stream_bytes: the most that streams may take at once; by default 40 % of the memory that is free.

    Raises:
        ShortstackError: windows that the model cannot take, or a score that is not finite.
    """
    from shortstack.engine.linear import fast_linear, largest_matrix
    from shortstack.engine.skeleton import Skeleton
    from shortstack.engine.weights import BlockWeights

    started = time.perf_counter()
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(f"{checkpoint.source}: is quantized; score the checkpoint it was made from")
    place = pick_device(device)
    stored = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    computed = pick_dtype(dtype, stored, place)
    if calibration is not None:
        check_windows(checkpoint, calibration.windows)
    resident = memory == "resident" or (
        memory == "auto" and checkpoint.nbytes < _RESIDENT_SHARE * available_bytes() and place.type == "cpu"
    )
    skeleton = Skeleton(checkpoint, dtype=computed, device=place, trust_remote_code=trust_remote_code)
    limit = stream_bytes if stream_bytes is not None else int(_STREAMS_SHARE * available_bytes(place))
    with (
        BlockWeights(checkpoint, skeleton.blocks, dtype=computed, device=place, resident=resident) as weights,
        fast_linear(computed, place, largest_matrix(checkpoint)) as linear,
    ):
        run = _Run(skeleton, weights, list(criteria), progress or Progress(quiet=True), limit)
        run.sweep(calibration.windows if calibration is not None else None)
    _check_finite(checkpoint, run.found)
    settings = {
        "dtype": str(computed).removeprefix("torch."),
        "device": str(place),
        "memory": "resident" if resident else "streamed",
        "linear": linear,
        "versions": versions(),
    }
    return Scores(
        source=checkpoint.source,
        fingerprint=checkpoint.fingerprint,
        blocks=checkpoint.original_blocks,
        criteria=run.found,
        calibration=calibration.record if calibration is not None else {"source": "none", "samples": 0, "seq_len": 0},
        settings=settings,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


@dataclass
class _Run:
    """The sweeps of one scoring run and what the criteria made of them."""

    skeleton: Skeleton
    weights: BlockWeights
    criteria: list[Criterion]
    progress: Progress
    stream_bytes: int
    found: dict[str, CriterionScores] = field(default_factory=dict)
    _tensors: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    _scored: dict[int, list[ScoredParameter]] = field(default_factory=dict)

    def sweep(self, windows: Sequence[Sequence[int]] | None) -> None:
        """Run the fewest sweeps that the criteria need, and fill `found` in the order asked for."""
        from shortstack.engine import sweep as sweeps
        from shortstack.engine.parameters import scored_parameters

        depth = len(self.skeleton.blocks)
        self._scored = {index: scored_parameters(block) for index, block in enumerate(self.skeleton.blocks)}
        taylors = [asked for asked in self.criteria if asked.kind == "taylor"]
        branches = any(asked.kind == "ppl" for asked in self.criteria)
        forward: ForwardResult | None = None
        if windows is None:
            with self.progress.bar("weights", depth) as advance:
                for index, block in self.weights.each(range(depth)):
                    self._score_magnitude(index, dict(block.named_parameters()))
                    advance(1)
        else:
            ids_WT = sweeps.windows_tensor(windows, self.skeleton.device)
            work = sweeps.block_evaluations(depth) if branches else depth
            with self.progress.bar("forward", work) as advance:
                forward = sweeps.forward_sweep(
                    self.skeleton,
                    self.weights,
                    ids_WT,
                    branches=branches,
                    keep_inputs=bool(taylors),
                    stream_bytes=self.stream_bytes,
                    on_weights=self._score_magnitude,
                    on_progress=advance,
                )
            self._backward(ids_WT, forward, taylors)
        for asked in self.criteria:
            self.found[asked.name] = self._result(asked, forward)

    def _backward(self, ids_WT: torch.Tensor, forward: ForwardResult, taylors: list[Criterion]) -> None:
        from shortstack.criteria import taylor
        from shortstack.engine import sweep as sweeps

        batches = list(dict.fromkeys(asked.batch for asked in taylors))
        for turn, batch in enumerate(batches):
            group = [asked for asked in taylors if asked.batch == batch]

            def on_gradients(
                index: int,
                weights: dict[str, torch.Tensor],
                gradients: dict[str, torch.Tensor],
                group: list[Criterion] = group,
            ) -> None:
                for parameter in self._scored[index]:
                    name = parameter.name
                    for asked in group:
                        value = taylor.score(asked, weights[name], gradients[name], parameter.output_dim)
                        self._keep(asked, index, name, value)

            with self.progress.bar("backward", 3 * len(self.skeleton.blocks)) as advance:
                sweeps.backward_sweep(
                    self.skeleton,
                    self.weights,
                    ids_WT,
                    forward,
                    loss_scale_W=taylor.loss_scale(len(ids_WT), ids_WT.shape[1], batch).to(ids_WT.device),
                    on_gradients=on_gradients,
                    release_inputs=turn == len(batches) - 1,
                    on_progress=advance,
                )

    def _score_magnitude(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        from shortstack.criteria import magnitude

        for asked in self.criteria:
            if asked.kind == "magnitude":
                for parameter in self._scored[index]:
                    value = magnitude.score(asked, weights[parameter.name].detach(), parameter.output_dim)
                    self._keep(asked, index, parameter.name, value)

    def _keep(self, asked: Criterion, index: int, name: str, value: float) -> None:
        self._tensors.setdefault(asked.name, {}).setdefault(index, {})[name] = value

    def _result(self, asked: Criterion, forward: ForwardResult | None) -> CriterionScores:
        blocks = self.skeleton.checkpoint.original_blocks
        if asked.kind == "ppl":
            from shortstack.criteria import ppl

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
        from shortstack.criteria.reductions import block_score

        by_index = self._tensors[asked.name]
        values = [block_score(list(by_index[index].values()), asked.block_reduction) for index in range(len(blocks))]
        tensors = {blocks[index]: by_index[index] for index in range(len(blocks))}
        return CriterionScores(asked.name, tuple(values), blocks, tensors=tensors)


def _check_finite(checkpoint: Checkpoint, found: dict[str, CriterionScores]) -> None:
    for name, criterion in found.items():
        broken = [
            index for index, value in zip(criterion.blocks, criterion.scores, strict=True) if not math.isfinite(value)
        ]
        if broken:
            raise ShortstackError(
                f"{checkpoint.source}: the {name} score of block {broken[0]} is not finite",
                hint="compute in --dtype float32 or bfloat16; or the weights hold NaN",
            )
