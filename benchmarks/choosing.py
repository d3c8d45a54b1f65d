"""Which blocks to remove: criteria and searches beside one another, for one text and for several, on other windows.

    python benchmarks/choosing.py MODEL --books FOLDER --sums ROWS --work DIR --out choosing.json --quick
    python benchmarks/choosing.py MODEL --books FOLDER --sums ROWS --work DIR --out choosing.json --tasks-dir TASKS
    python benchmarks/choosing.py ... --parts proposals,search --shares 0.1,0.2,0.3 --seeds 1234,1

The sources are books, code (Python's own standard library) and sums (rows of instruction and output, whose responses count).
Every set is judged on the same windows, which chose nothing, drawn with a seed of their own; all errors are paired. The
claims: the gated choice is never worse than one-shot; a search at equal cost is at least as good as the evolutionary one;
`worst` at least halves what the worst source loses beside the set chosen by perplexity of books; and how far the orders of
the published procedure move with ten other windows.

`--quick` takes 10 and 20 % of the blocks, one seed and few windows; the long form 10, 20, 30 and 50 %, three seeds, and the
seven tasks with 200 rows; `--parts`, `--shares` and `--seeds` take some of it. What was measured is kept in DIR: a run that
was killed resumes. One JSON line per figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import say
from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.scores import Scores, load_scores
from shortstack.data.calibration import CalibrationOptions
from shortstack.evaluation.zeroshot import evaluate_zeroshot
from shortstack.pruning.gate_search import gates_of
from shortstack.pruning.objective import parse_objective
from shortstack.pruning.opened_search import opened, opened_search
from shortstack.pruning.plan import plan
from shortstack.pruning.prune import prune
from shortstack.pruning.selection import parse_selection
from shortstack.pruning.set_search import SetSearch
from shortstack.scoring.agreement import kendall_tau
from shortstack.scoring.criteria.windows_mean import mean_and_error
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import score
from shortstack.scoring.search.gates import QuadraticModel

CRITERIA = ("ppl", "taylor", "bi", "kl")
QUIET = ScoreOptions(quiet=True)
Sets = dict[str, tuple[int, ...]]  # what chose it -> blocks that go


class Choosing:
    """One model, its texts, and what was found so far.

    Args:
        given: the command's options.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.checkpoint, self.progress, _ = opened(given.model, None, QUIET)
        self.protected, _ = protected_blocks(self.checkpoint.original_blocks, given.plus)
        self.seconds: dict[str, dict[str, float]] = {}
        self.sizes = [max(1, round(share * self.checkpoint.depth)) for share in given.shares]
        code = given.work / "code.txt"
        if not code.exists():
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
            code.write_text("\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files))
        self.data = f"books={given.books},code={code},sums={given.sums}"

    def calibration(self, data: str, seed: int, samples: int | None = None) -> CalibrationOptions:
        """Windows of a text, or of all sources."""
        samples = samples or self.given.samples
        return CalibrationOptions(data=data, samples=samples, seq_len=self.given.seq_len, seed=seed)

    def scores(self, data: str, name: str, seed: int, criteria: str) -> Scores:
        """Scores, kept in a file."""
        out = self.given.work / f"{name}-{seed}.json"
        if not out.exists():
            calibration = self.calibration(data, seed)
            score(self.given.model, out=out, criterion=criteria, calibration=calibration, options=QUIET)
        return load_scores(out)

    @contextmanager
    def search(
        self,
        selection: str,
        data: str,
        seed: int,
        objective: str | None = None,
        name: str | None = None,
        samples: int | None = None,
    ) -> Iterator[SetSearch]:
        """A search; its losses are kept in a folder."""
        work = self.given.work / (name or f"measured-{seed}-{'all' if data == self.data else 'books'}")
        work.mkdir(exist_ok=True)
        with opened_search(
            self.checkpoint,
            self.calibration(data, seed, samples),
            parse_selection(selection),
            self.protected,
            work,
            QUIET,
            self.progress,
            parse_objective(objective),
        ) as (sets, _):
            yield sets

    def judge(self, sets: Sets, seed: int, **about: Any) -> list[dict[str, Any]]:
        """A row per set: what it costs on windows of all sources that chose nothing."""
        samples = self.given.judging or self.given.samples
        with self.search("one-shot", self.data, 4321 + seed, name=f"judging-{seed}", samples=samples) as search:
            positions = {name: frozenset(map(self.checkpoint.position_of, blocks)) for name, blocks in sets.items()}
            dense, judged = search.judged(positions)
            nll_SW = search.judging.nll(positions.values())
            weights = search.judging.weights(nll_SW.shape[1])
        rows = []
        beside_S, errors_S = mean_and_error(nll_SW - nll_SW[:1], weights)  # the first set: others are compared with it
        for place, one in enumerate(judged):
            row = {**about, "seed": seed, "dense_ppl": dense, **one.to_json(), "beside_first": float(beside_S[place])}
            row["beside_stderr"] = None if errors_S is None else float(errors_S[place])
            say("set", **row)
            rows.append(row)
        return rows


def by_criteria(run: Choosing, seed: int) -> list[dict[str, Any]]:
    """One-shot and contiguous, by each criterion on all sources together."""
    found = run.scores(run.data, "all", seed, ",".join(CRITERIA))
    rows = []
    for removed, strategy in itertools.product(run.sizes, ("one-shot", "contiguous")):
        sets = {}
        for criterion in CRITERIA:
            made = plan(
                run.given.model,
                scores=found,
                criterion=criterion,
                remove=removed,
                strategy=strategy,
                plus=run.given.plus,
            )
            sets[criterion] = made.removed
        rows += run.judge(sets, seed, removed=removed, selection=strategy)
    return rows


def by_search(run: Choosing, seed: int) -> list[dict[str, Any]]:
    """Greedy, swaps that begin at its set, and the evolutionary search until it has cost as much as either.

    All on the same windows, losses and blocks; the one-shot set stands beside them.
    """
    rows = []
    kept = run.given.work / f"evaluations-{seed}.json"  # what is found in files is not computed again, nor counted
    costs: dict[str, dict[str, int]] = json.loads(kept.read_text()) if kept.exists() else {}
    for removed in run.sizes:
        sets, own = {}, costs.get(str(removed), {})
        with run.search("greedy", run.data, seed, name=f"greedy-{seed}-{removed}") as search:
            sets["one-shot"] = search.blocks(search.one_shot(removed))
            sets["greedy"] = search.blocks(search.steps(removed)[-1].sets[0])
            first = search.choosing.evaluations
            own.setdefault("greedy", first)
            search.selection = parse_selection(f"swaps:{run.given.swaps}")
            sets["swaps"] = search.blocks(search.ranked(removed)[0])
            own.setdefault("swaps", own["greedy"] + search.choosing.evaluations - first)
        with run.search("evolution:1", run.data, seed, name=f"evolution-{seed}-{removed}") as search:
            for name, most in (("evolution", own["greedy"]), ("evolution, longer", own["swaps"])):
                sets[name], own[f"{name}, generations"] = _evolved(
                    search, removed, most, own.get(f"{name}, generations")
                )
                own.setdefault(name, search.choosing.evaluations)
        costs[str(removed)] = own
        kept.write_text(json.dumps(costs))
        rows += run.judge(sets, seed, removed=removed, selection="search", evaluations=own)
    return rows


def _evolved(search: SetSearch, removed: int, most: int, known: int | None) -> tuple[tuple[int, ...], int]:
    """(what the evolutionary search comes to with so many block evaluations, generations; as many as `known`, if known)."""
    for generations in range(known or 1, 201):
        search.selection = parse_selection(f"evolution:{generations}")
        found = search.blocks(search.ranked(removed)[0])
        if known or search.choosing.evaluations >= most:
            break
    return found, generations


def by_proposals(run: Choosing, seed: int) -> list[dict[str, Any]]:
    """Sets that the gates propose, and as many that single losses or block influence do; all are measured alike.

    With the sets stand what each of the three cost in processor time, and how well it orders the sets of all three.
    """
    kept = run.given.work / f"seconds-{seed}.json"  # what is found in files is not computed again, nor counted
    seconds: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        before = time.process_time()
        yield
        seconds[what] = seconds.get(what, 0.0) + time.process_time() - before
        kept.write_text(json.dumps(seconds))

    rows = []
    with run.search(f"gate:{run.given.proposals}", run.data, seed, name=f"gates-{seed}") as search:
        with timed("single losses"):
            dense, *alone = search.losses([frozenset(), *(frozenset({place}) for place in search.free)])
        with timed("gates"):
            gates = gates_of(search)
        added = [loss - dense for loss in alone]
        guesses = {
            "single losses": sums(search.free, added),
            "block influence": sums(search.free, [gates.influence[place] for place in search.free]),
            "gates": gates.model,
        }
        for removed in run.sizes:
            proposed = {name: _possible(search, model, removed) for name, model in guesses.items()}
            sets: Sets = {f"{name}, first": search.blocks(found[0]) for name, found in proposed.items()}
            for name, found in proposed.items():
                with timed(f"{name}, {removed} blocks measured"):
                    losses = search.losses(found)
                sets[f"{name}, measured"] = search.blocks(found[losses.index(min(losses))])
            with timed(f"greedy, {removed} blocks"):
                sets["greedy"] = search.blocks(search.steps(removed)[-1].sets[0])
            every = sorted(set(itertools.chain(*proposed.values())), key=sorted)
            changes = [loss - dense for loss in search.losses(every)]
            orders = {name: _ordered(model, every, changes) for name, model in guesses.items()}
            rows += run.judge(sets, seed, size=removed, selection="proposals", orders=orders)
    say("seconds", seed=seed, **seconds)
    run.seconds[str(seed)] = seconds
    return rows


def sums(places: Sequence[int], costs: Sequence[float]) -> QuadraticModel:
    """A model without interaction: what a set costs is what its blocks cost one by one, added up."""
    none_NN = torch.zeros(len(places), len(places), dtype=torch.float64)
    return QuadraticModel(tuple(places), -torch.tensor(costs, dtype=torch.float64), none_NN)


def _possible(search: SetSearch, model: QuadraticModel, removed: int) -> list[frozenset[int]]:
    """The cheapest sets by a model that the family can spare, as many as the search measures."""
    possible = (one for one in model.cheapest(removed) if search.reason_against(one) is None)
    return list(itertools.islice(possible, search.selection.number))


def _ordered(model: QuadraticModel, sets: Sequence[frozenset[int]], changes: Sequence[float]) -> dict[str, float]:
    """Kendall's tau of what a model says of sets and what was measured, and by how much it errs on average."""
    said = [model.change(one) for one in sets]
    orders = [sorted(range(len(sets)), key=values.__getitem__) for values in (said, changes)]
    errs = [guess - change for guess, change in zip(said, changes, strict=True)]
    return {"sets": len(sets), "tau": kendall_tau(*orders), "mean_error": sum(errs) / len(errs)}


def by_objective(run: Choosing, seed: int) -> list[dict[str, Any]]:
    """The set for the worst-hit source, beside the one chosen by perplexity of books."""
    books = run.scores(str(run.given.books), "books", seed, "ppl")
    every = run.scores(run.data, "all", seed, ",".join(CRITERIA))
    rows = []
    for removed in run.sizes:
        sets = {"ppl of books": plan(run.given.model, scores=books, remove=removed, plus=run.given.plus).removed}
        for objective in ("mean", "worst"):
            made = plan(
                run.given.model, scores=every, criterion="ppl", remove=removed, objective=objective, plus=run.given.plus
            )
            sets[f"{objective}, added up"] = made.removed
        with run.search("greedy", run.data, seed, "worst") as search:
            sets["worst, greedy"] = search.blocks(search.steps(removed)[-1].sets[0])
        with run.search("greedy", str(run.given.books), seed) as search:
            sets["books, greedy"] = search.blocks(search.steps(removed)[-1].sets[0])
        rows += run.judge(sets, seed, removed=removed, selection="objective")
    return rows


def by_seed(run: Choosing) -> list[dict[str, Any]]:
    """The published procedure on ten windows of books, and on ten others."""
    found = {}
    for seed in (1234, 1, 2)[: 2 if run.given.quick else 3]:
        out = run.given.work / f"published-{seed}.json"
        if not out.exists():
            calibration = CalibrationOptions(data=str(run.given.books), sampling="joined", seed=seed)
            score(run.given.model, out=out, criterion="ppl,taylor", calibration=calibration, options=QUIET)
        found[seed] = load_scores(out)
    rows = []
    for (first, one), (second, other) in itertools.combinations(found.items(), 2):
        for criterion in ("ppl", "taylor"):
            orders = [
                [block for block in scores.criterion(criterion).order if block not in run.protected]
                for scores in (one, other)
            ]
            row: dict[str, Any] = {"criterion": criterion, "seeds": [first, second], "tau": kendall_tau(*orders)}
            row["same"] = {k: len({*orders[0][:k]} & {*orders[1][:k]}) for k in run.sizes}
            say("order", **row)
            rows.append(row)
    return rows


def by_tasks(run: Choosing, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seven tasks, of the sets at the second size, 200 rows each."""
    removed = run.sizes[min(1, len(run.sizes) - 1)]
    chosen = {(row["selection"], row["by"]): row["removed"] for row in rows if len(row["removed"]) == removed}
    paths = {}
    for (selection, name), blocks in chosen.items():
        out = run.given.work / f"{selection}-{name}".replace(", ", "-").replace(" ", "-")
        if not out.exists():
            prune(run.given.model, out=out, blocks=",".join(map(str, blocks)))
        paths[f"{selection}, {name}"] = out
    results = evaluate_zeroshot(
        run.given.model, *map(str, paths.values()), tasks_dir=run.given.tasks_dir, limit=200
    ).results
    found = []
    for name, result in zip(["dense", *paths], results, strict=True):
        figures = {key: (figure.value, figure.stderr) for key, figure in result.figures.items()}
        say("tasks", set=name, **figures)
        found.append({"set": name, "figures": figures})
    return found


PARTS = {
    "seeds": None,  # once, not for each seed
    "criteria": by_criteria,
    "objective": by_objective,
    "search": by_search,
    "proposals": by_proposals,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, required=True, help="a text, or a folder of texts")
    parser.add_argument("--sums", type=Path, required=True, help="rows of instruction and output")
    parser.add_argument("--work", type=Path, required=True, help="where scores and losses are kept")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--tasks-dir", type=Path, help="the seven tasks; without it they are left out")
    parser.add_argument("--samples", type=int, help="windows of each source that choose")
    parser.add_argument("--judging", type=int, help="windows of each source that judge; as many by default")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="two sizes, one seed, few windows")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, such as proposals,search")
    parser.add_argument("--shares", help="of the blocks that go, such as 0.1,0.2")
    parser.add_argument("--seeds", help="of the windows that choose, such as 1234,1")
    parser.add_argument("--no-plus", dest="plus", action="store_const", const=False, help="any block may go")
    parser.add_argument("--swaps", type=int, default=8, help="generations of swaps that begin at greedy's set")
    parser.add_argument("--proposals", type=int, default=32, help="sets that gates propose, and the others as many")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.samples = given.samples or (4 if given.quick else 10)
    shares = given.shares or ("0.1,0.2" if given.quick else "0.1,0.2,0.3,0.5")
    given.shares = [float(share) for share in shares.split(",")]
    seeds = [int(seed) for seed in (given.seeds or ("1234" if given.quick else "1234,1,2")).split(",")]
    parts = given.parts.split(",")
    run = Choosing(given)
    found: dict[str, Any] = {"orders": by_seed(run) if "seeds" in parts else [], "sets": [], "seconds": run.seconds}
    for seed in seeds:
        for part in (PARTS[name] for name in PARTS if name in parts):
            found["sets"] += part(run, seed) if part is not None else []
            given.out.write_text(json.dumps(found, indent=1))
    if given.tasks_dir is not None and not given.quick:
        found["tasks"] = by_tasks(run, [row for row in found["sets"] if row["seed"] == seeds[0]])
    given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
