"""Comparisons: paired errors from the definition, marks of noise, published figures beside them, refusals."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shortstack.artifacts.results import Figure, Result, Results, load_results, mean_figure, perplexity_figure
from shortstack.baselines.figures import published_names, published_result
from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.compare import Difference, compare, compared


def result(model: str, what: str, per_item: dict[str, list[Any]], figures: dict[str, Figure], **fields: Any) -> Result:
    data = fields.pop("data", {"source": "wikitext2", "sha256": "a", "rows": 3})
    settings = fields.pop("settings", {"dtype": "float32", "joined_by": "\n\n"})
    return Result(model, model * 8, what, data, settings, figures, 1000, 4000, 1.0, 10, per_item=per_item, **fields)


def ppl(model: str, nll: list[float], **fields: Any) -> Result:
    value = math.exp(statistics.fmean(nll))
    figure = Figure(value, value * statistics.stdev(nll) / len(nll) ** 0.5, "ppl", len(nll) * 127)
    return result(model, "ppl", {"ppl_128": nll}, {"ppl_128": figure}, **fields)


NLL = [3.0, 4.0, 2.0, 5.0]


def test_a_difference_of_perplexities_is_a_ratio_with_the_error_of_the_pairs() -> None:
    shifts = [0.1, 0.12, 0.09, 0.11]
    found = compared([ppl("d", NLL), ppl("p", [a + b for a, b in zip(NLL, shifts, strict=True)])], None, [])
    (figure,) = found.figures
    _, difference = figure.differences
    assert difference is not None
    mean, error = statistics.fmean(shifts), statistics.stdev(shifts) / 2
    assert difference.value == pytest.approx(math.exp(mean) - 1)
    assert difference.stderr == pytest.approx(math.exp(mean) * error)
    assert difference.pairs == 4
    assert difference.is_noise is False
    # The two figures alone could not tell: their errors are ten times larger.
    assert figure.figures[0] is not None
    assert (figure.figures[0].stderr or 0) > 10 * difference.stderr * (figure.figures[0].value or 0) / 2
    assert "≈" not in found.to_text().replace("≈ is within", "")


def test_what_is_within_noise_is_marked() -> None:
    found = compared([ppl("d", NLL), ppl("p", [3.1, 3.8, 2.2, 4.95])], None, [])
    (figure,) = found.figures
    assert figure.differences[1] is not None
    assert figure.differences[1].is_noise is True
    assert "≈ " in next(line for line in found.to_text().splitlines() if line.startswith("ppl_128"))


def accuracy(model: str, right: dict[str, list[float]], **fields: Any) -> Result:
    figures = {name: mean_figure(values, "accuracy") for name, values in right.items()}
    values = [figure.value or 0 for figure in figures.values()]
    error = math.sqrt(sum((figure.stderr or 0) ** 2 for figure in figures.values())) / len(figures)
    tasks = {name.partition(" ")[0]: {"sha256": "s"} for name in right}
    data = {"source": "tasks", "sha256": "b", "rows": 8, "tasks": tasks}
    all_figures = {**figures, "AVE": Figure(statistics.fmean(values), error, "accuracy", 8)}
    return result(model, "zeroshot", right, all_figures, **{"data": data, **fields})


def test_accuracies_differ_by_points_and_the_mean_over_tasks_adds_the_errors_up() -> None:
    dense = accuracy("d", {"piqa acc": [1, 1, 0, 1], "boolq acc": [0, 1, 1, 1]})
    pruned = accuracy("p", {"piqa acc": [1, 0, 0, 1], "boolq acc": [0, 1, 1, 0]})
    found = {figure.name: figure.differences[1] for figure in compared([dense, pruned], None, []).figures}
    error = statistics.stdev([0, -1, 0, 0]) / 2
    assert found["piqa acc"] is not None
    assert (found["piqa acc"].value, found["piqa acc"].stderr) == pytest.approx((-0.25, error))
    assert found["AVE"] is not None
    assert (found["AVE"].value, found["AVE"].stderr) == pytest.approx((-0.25, math.sqrt(2 * error**2) / 2))


@pytest.mark.fault(141)
def test_three_of_ten_rows_are_noise_by_an_exact_test_though_their_errors_say_otherwise() -> None:
    """The first two hours of a new user: +30 points on 3 of 10 rows of winogrande were no noise."""
    before = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    dense = accuracy("d", {"winogrande acc": before, "piqa acc": before})
    better = accuracy("p", {"winogrande acc": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "piqa acc": before})
    found = compared([dense, better], None, [])
    task, same, mean = (figure.differences[1] for figure in found.figures)
    assert task is not None
    assert same is not None
    assert mean is not None
    assert task.value == pytest.approx(0.3)
    assert task.value > 1.8 * (task.stderr or 0)
    assert (task.p, task.is_noise) == (0.25, True)
    assert (same.value, same.p, same.is_noise) == (0.0, 1.0, True)
    assert (mean.value, mean.p, mean.is_noise) == (pytest.approx(0.15), 0.25, True)
    assert "≈ +30.0 points" in found.to_text()
    assert found.to_json()["figures"][0]["differences"][1]["p"] == 0.25
    more = accuracy("p", {"winogrande acc": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "piqa acc": before})
    (task, *_) = (figure.differences[1] for figure in compared([dense, more], None, []).figures)
    assert task is not None
    assert (task.p, task.is_noise) == (0.03125, False)


@pytest.mark.fault(141)
def test_few_windows_are_judged_by_student_and_rows_of_two_files_by_fisher() -> None:
    shifted = ppl("p", [nll + shift for nll, shift in zip(NLL[:3], (0.1, 0.3, 0.26), strict=True)])
    (figure,) = compared([ppl("d", NLL[:3]), shifted], None, []).figures
    difference = figure.differences[1]
    assert difference is not None
    assert difference.value > 1.96 * (difference.stderr or 0), "of many windows that would be no noise"
    assert difference.is_noise is True
    assert difference.margin == pytest.approx(4.303 * (difference.stderr or 0), rel=1e-3)
    dense = accuracy("d", {"piqa acc": [1] * 3 + [0] * 7})
    alone = replace(accuracy("p", {"piqa acc": [1] * 6 + [0] * 4}), per_item={})
    difference = compared([dense, alone], None, []).figures[0].differences[1]
    assert difference is not None
    assert (difference.pairs, difference.p) == (0, pytest.approx(0.3698, abs=1e-4))


def test_prompts_are_matched_by_their_numbers() -> None:
    name = "greedy distinct_1"

    def written(model: str, values: dict[int, float]) -> Result:
        items = {"prompts": list(values), name: list(values.values())}
        return result(model, "generation", items, {name: mean_figure(list(values.values()), "share")})

    found = compared([written("d", {0: 0.5, 1: 0.7, 2: 0.9}), written("p", {2: 0.8, 0: 0.4})], None, [])
    (difference,) = (figure.differences[1] for figure in found.figures)
    assert difference is not None
    assert difference.pairs == 2
    assert difference.value == pytest.approx(-0.1)


def test_figures_without_items_are_compared_with_both_errors() -> None:
    dense, pruned = (replace(ppl(name, nll), per_item={}) for name, nll in (("d", NLL), ("p", [3.5, 4.5, 2.5, 5.5])))
    (figure,) = compared([dense, pruned], None, []).figures
    difference = figure.differences[1]
    assert difference is not None
    assert difference.pairs == 0
    error = statistics.stdev(NLL) / 2
    assert difference.stderr == pytest.approx(math.exp(0.5) * math.hypot(error, error), rel=1e-6)


def test_times_have_their_unit_and_bytes_are_sizes() -> None:
    """`latency 3.837` and a difference of `-1.28e+08` bytes could not be read."""
    found = [
        result(name, "bench", {}, {"latency": Figure(seconds, None, "s", 1), "rss": Figure(held, None, "bytes", 1)})
        for name, seconds, held in (("d", 2.0, 1.5e9), ("p", 1.5, 1.25e9))
    ]
    rows = [line.split("  ") for line in compared(found, None, []).to_text().splitlines()]
    assert ["latency, s", "2", "1.5", "-0.5"] in [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["rss", "1.5 GB", "1.25 GB", "-250 MB"] in [[cell.strip() for cell in row if cell.strip()] for row in rows]


def test_other_settings_are_not_compared_and_other_text_stands_apart() -> None:
    dense = ppl("d", NLL, settings={"limit": None, "dtype": "float32"})
    limited = ppl("p", NLL, settings={"limit": 3, "dtype": "float32"})
    found = compared([dense, limited], None, [])
    assert found.figures[0].differences == [None, None]
    assert "ppl on wikitext2: p was measured with another limit (3, not none) and is not compared" in found.notes
    other = ppl("p", NLL, data={"source": "ptb", "sha256": "z", "rows": 3})
    found = compared([dense, other], None, [])
    assert [figure.data for figure in found.figures] == ["wikitext2", "ptb"]
    assert [figure.differences for figure in found.figures] == [[None, None], [None, None]]
    half = ppl("p", NLL, settings={"limit": None, "dtype": "bfloat16"})
    assert any("float32" in note and "bfloat16" in note for note in compared([dense, half], None, []).notes)


UNIT = {"dtype": "float32", "joined_by": "\n\n", "tokenizer": "a", "bos_token": 1}


@pytest.mark.fault(103)
@pytest.mark.parametrize(("changed", "differs"), [({"tokenizer": "b"}, "tokenizer"), ({"bos_token": None}, "BOS rule")])
def test_perplexities_of_other_units_are_not_subtracted(changed: dict[str, Any], differs: str) -> None:
    """As many windows, as many tokens in each: the very items would pair."""
    dense, other = ppl("d", NLL, settings=UNIT), ppl("p", NLL, settings={**UNIT, **changed})
    found = compared([dense, other], None, [])
    assert [figure.differences for figure in found.figures] == [[None, None]]
    (note,) = found.notes
    assert note.startswith(f"ppl of p and of d: they differ in the {differs}, so")
    assert "cannot be compared" in Results((dense, other)).to_text()
    same = ppl("p", NLL, settings=UNIT)
    assert compared([dense, same], None, []).figures[0].differences[1] is not None
    assert compared([dense, same], None, []).notes == []
    assert "compared" not in Results((dense, same)).to_text()


@pytest.mark.fault(103)
def test_what_does_not_record_its_tokenizer_is_of_an_unknown_unit() -> None:
    old = ppl("d", NLL)
    found = compared([old, ppl("p", NLL, settings=UNIT)], None, [])
    (note,) = found.notes
    assert "do not record the tokenizer (d)" in note
    longer = ppl("p", [*NLL, 3.0])  # the same text became more tokens
    found = compared([old, longer], None, [])
    assert found.figures[0].differences == [None, None]
    assert "they differ in the number of tokens in the text" in found.to_text()


@pytest.mark.fault(103)
def test_perplexities_over_other_windows_are_not_subtracted() -> None:
    dense, other = ppl("d", NLL, settings=UNIT), ppl("p", NLL, settings=UNIT)
    other = replace(other, figures={"ppl_64": other.figures["ppl_128"]}, per_item={"ppl_64": NLL})
    found = compared([dense, other], None, [])
    assert [figure.differences for figure in found.figures] == [[None, None], [None, None]]
    assert "ppl_128 of d and ppl_64 of p are over windows of different lengths or BOS" in found.to_text()


def test_models_measured_under_other_bos_rules_are_compared_in_what_both_have() -> None:
    dense, other = ppl("d", NLL, settings=UNIT), ppl("p", [nll + 0.1 for nll in NLL], settings=UNIT)
    every = {"ppl_128_bos_every": other.figures["ppl_128"]}
    alone = replace(other, figures=every, per_item={})
    found = compared([dense, alone], None, [])
    assert [figure.differences for figure in found.figures] == [[None, None], [None, None]]
    assert "BOS rules (--bos) and are not compared" in found.to_text()
    both = replace(other, figures={**other.figures, **every})
    found = compared([dense, both], None, [])
    assert {one.name: one.differences[1] is not None for one in found.figures} == {
        "ppl_128": True, "ppl_128_bos_every": False,
    }  # fmt: skip
    assert found.notes == []


@pytest.mark.fault(140)
def test_other_limits_of_the_same_rows_have_one_table_that_says_so() -> None:
    """Their sources have other names: "the first 2 rows of each" and "the first 3 rows of each"."""
    dense, other = (
        accuracy(model, {"piqa acc": [1, 0, 1][:limit]}, settings={"limit": limit, "dtype": "float32"},
                 data={"source": f"piqa, the first {limit} rows of each", "sha256": "b", "rows": 8, "tasks": {}})
        for model, limit in (("d", 2), ("p", 3))
    )  # fmt: skip
    found = compared([dense, other], None, [])
    assert [one.name for one in found.figures] == ["piqa acc", "AVE"]
    assert [one.differences for one in found.figures] == [[None, None], [None, None]]
    assert any("p was measured with another limit (3, not 2) and is not compared" in note for note in found.notes)


@pytest.mark.fault(103)
def test_counts_of_other_tokens_are_not_subtracted_but_what_the_dense_model_read_is() -> None:
    def written(model: str, tokenizer: str) -> Result:
        units = {
            "greedy length": "tokens",
            "greedy distinct_1": "share",
            "greedy ppl_by_dense": "ppl",
            "sums": "accuracy",
        }
        figures = {name: mean_figure([0.5, 0.75], unit) for name, unit in units.items()}
        items = {"prompts": [0, 1], **{name: [0.5, 0.75] for name in units}}
        return result(model, "generation", items, figures, settings={"tokenizer": tokenizer})

    for other, compares in (("b", {"greedy ppl_by_dense", "sums"}), ("a", {*written("d", "a").figures})):
        found = compared([written("d", "a"), written("p", other)], None, [])
        assert {figure.name for figure in found.figures if figure.differences[1] is not None} == compares


def test_the_base_can_be_chosen_and_files_are_pooled(tmp_path: Path) -> None:
    Results((ppl("d", NLL), ppl("p", [4.0, 5.0, 3.0, 6.0]))).save(tmp_path / "a.json")
    Results((accuracy("d", {"piqa acc": [1, 0]}),)).save(tmp_path / "b.json")
    Results((accuracy("p", {"piqa acc": [1, 1]}),)).save(tmp_path / "c.json")
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    found = compare(*files, base="p", out=tmp_path / "out.json")
    assert found.models == ["p", "d"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["what"] == "compare"
    by_name = {figure["name"]: figure for figure in record["figures"]}
    assert by_name["ppl_128"]["differences"][1]["value"] == pytest.approx(math.exp(-1) - 1)
    assert by_name["piqa acc"]["differences"][1]["pairs"] == 2
    with pytest.raises(UsageError, match=r"--base x: not among the models \(d, p\)"):
        compare(*files, base="x")


def test_several_results_of_one_model_are_one_and_nothing_is_lost_silently() -> None:
    def of(windows: int, nll: list[float], **settings: Any) -> Result:
        name = f"ppl_{windows}"
        figure = Figure(math.exp(statistics.fmean(nll)), None, "ppl", len(nll) * (windows - 1))
        return result("d", "ppl", {name: nll}, {name: figure}, **({"settings": settings} if settings else {}))

    pruned = ppl("p", [3.1, 3.8, 2.2, 4.95])
    found = compared([of(128, NLL), of(2048, [2.0, 3.0]), pruned], None, [])
    assert {one.name: one.figures[0] is not None for one in found.figures} == {"ppl_128": True, "ppl_2048": True}
    assert next(one for one in found.figures if one.name == "ppl_128").differences[1] is not None
    assert not [note for note in found.notes if "several results" in note]
    again = compared([of(128, NLL), of(128, [2.0, 3.0, 4.0, 6.0]), pruned], None, [])
    assert "ppl on wikitext2: d has several results of ppl_128: the last one given is shown" in again.notes
    other = compared([of(128, NLL), of(128, NLL, joined_by=" "), pruned], None, [])
    assert "ppl on wikitext2: an older result of d, measured with another joined_by, is left out" in other.notes


def test_published_figures_stand_beside(shared: Path, tmp_path: Path) -> None:
    published = json.loads((shared / "published/results.json").read_text())
    assert published_names() == list(published["models"])
    name = "st-vicuna-v1.3-5.5b-ppl"
    one = published_result(name)
    assert one.parameters == published["models"][name]["params"] == 5524115456
    assert one.figures["zeroshot", "", "hellaswag acc_norm"] == pytest.approx(0.676459)
    Results((ppl("d", NLL), accuracy("d", {"boolq acc": [1, 0]}))).save(tmp_path / "a.json")
    found = compare(tmp_path / "a.json", published=name)
    by_name = {(figure.what, figure.name): figure.published for figure in found.figures}
    assert by_name["ppl", "ppl_128"] == [18.8495]
    assert by_name["zeroshot", "boolq acc"] == [pytest.approx(0.718043)]
    text = found.to_text()
    assert "published figures are of all rows" not in text
    assert "published perplexities are per token of the published models' tokenizers" in text
    limited = accuracy("d", {"boolq acc": [1, 0]}, settings={"limit": 2, "dtype": "float32"})
    assert "published figures are of all rows" in compared([limited], None, [one]).to_text()
    assert "5.52B" in text
    assert "18.85" in text
    with pytest.raises(UsageError) as raised:
        published_result("st-vicuna-v1.3-5.5b-pl")
    assert raised.value.hint == f"did you mean {name}?"


def test_the_package_ships_the_published_figures_as_they_are(shared: Path) -> None:
    import shortstack.baselines.figures as module

    assert json.loads(module._FILE.read_text()) == json.loads((shared / "published/results.json").read_text())


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    Results((ppl("d", NLL),)).save(tmp_path / "one.json")
    with pytest.raises(ShortstackError, match="results of one model"):
        compare(tmp_path / "one.json")
    (tmp_path / "bad.json").write_text('{"schema": 1}')
    with pytest.raises(ShortstackError, match=r"bad\.json: not a results file"):
        compare(tmp_path / "bad.json")
    (tmp_path / "scores.json").write_text('{"schema": 1, "model": {}}')
    with pytest.raises(ShortstackError, match="not a results file"):
        compare(tmp_path / "scores.json")
    with pytest.raises(ShortstackError, match="cannot be read"):
        compare(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match="no results given"):
        compare()


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = Results((ppl("d", NLL, notes=["a note"], peak_device_bytes=5), accuracy("d", {"piqa acc": [1, 0]})))
    found.save(tmp_path / "r.json")
    assert load_results(tmp_path / "r.json") == found


@pytest.mark.fault(111)
def test_infinite_perplexities_are_compared_as_far_as_they_can_be() -> None:
    """A model that is broken has an infinite perplexity: an answer, not a traceback, and no number made up."""
    fine, broken = perplexity_figure([2.0, 3.0], 127), perplexity_figure([900.0, 950.0], 127)
    nll = {"a": [2.0, 3.0], "b": [900.0, 950.0]}
    measured = [
        result(model, "ppl", {"ppl_128": nll[model]}, {"ppl_128": figure})
        for model, figure in zip("ab", (fine, broken), strict=True)
    ]
    (figure,) = compared(measured, None, []).figures
    assert figure.differences[1] == Difference(math.inf, None, 2)
    without = [
        result(model, "ppl", {}, {"ppl_128": one}) for model, one in zip("abc", (broken, fine, broken), strict=True)
    ]
    found = compared(without, None, [])
    assert found.figures[0].differences == [None, Difference(-1.0, None, 0), None]
    assert "inf" in found.to_text()
    json.loads(json_text(found.to_json()), parse_constant=lambda name: pytest.fail(name))


def test_items_without_their_prompts_are_no_pairs() -> None:
    """A list of another length says nothing of which item is which."""
    whole = {"prompts": [0, 1, 2], "greedy length": [3.0, 4.0, 5.0]}
    cut = {"prompts": [0, 1], "greedy length": [3.5, 4.5, 5.5]}
    models = [result(m, "generation", items, {"greedy length": mean_figure(items["greedy length"], "tokens")})
              for m, items in (("a", whole), ("b", cut))]  # fmt: skip
    difference = compared(models, None, []).figures[0].differences[1]
    assert difference is not None
    assert difference.pairs == 0
