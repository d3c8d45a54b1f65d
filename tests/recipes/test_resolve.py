"""What a recipe comes to: bases, changes, references, paths; and what is refused, by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.merge import shipped_recipes
from shortstack.recipes.resolve import Recipe, Reference, resolve
from shortstack.registry import COMMANDS

PRUNING = "model: embedded\nsteps:\n  score: {criterion: ppl, samples: 2}\n  prune: {scores: $score, remove: 3}\n"


def written(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def values(recipe: Recipe, step: str) -> dict[str, Any]:
    return next(one.values for one in recipe.steps if one.name == step)


def refused(folder: Path, text: str, **options: Any) -> ShortstackError:
    with pytest.raises(ShortstackError) as caught:
        resolve(written(folder, text), **options)
    assert "\n" not in caught.value.message
    assert "\n" not in caught.value.hint
    return caught.value


def test_steps_follow_one_another(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, PRUNING + "  again: {stage: score}\n  ppl: {stage: eval ppl}\n"))
    assert [step.name for step in recipe.steps] == ["score", "prune", "again", "ppl"]
    assert values(recipe, "prune") == {"model": Reference("model"), "scores": Reference("score"), "remove": 3}
    assert values(recipe, "again")["model"] == Reference("prune")
    assert values(recipe, "ppl")["models"] == [Reference("model"), Reference("prune")]


def test_numbers_and_texts_are_what_the_functions_take(tmp_path: Path) -> None:
    text = (
        PRUNING + "  lora: {stage: retrain lora, data: embedded, lr: 1e-4, epochs: 2, tokens: 1000, dtype: bfloat16}\n"
    )
    found = values(resolve(written(tmp_path, text)), "lora")
    assert (found["lr"], found["epochs"], found["tokens"]) == (1e-4, 2.0, "1000")


def test_merge_knows_what_the_adapter_was_trained_on(tmp_path: Path) -> None:
    text = PRUNING + "  lora: {stage: retrain lora, data: embedded, merge: false}\n  merge: {adapter: $lora}\n"
    assert values(resolve(written(tmp_path, text)), "merge")["base"] == Reference("prune")


def test_a_base_is_changed_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, PRUNING, "bases/base.yaml")
    change = "extends: bases/base.yaml\nabout: mine\nsteps:\n  score: {samples: null, seed: 7}\n  prune: {remove: 2}\n"
    recipe = resolve(written(tmp_path, change))
    assert recipe.about == "mine"
    assert values(recipe, "score") == {"model": Reference("model"), "criterion": "ppl", "seed": 7}
    assert values(recipe, "prune")["remove"] == 2


def test_several_bases_are_laid_over_one_another(tmp_path: Path) -> None:
    written(tmp_path, PRUNING, "one.yaml")
    written(tmp_path, "steps:\n  ppl: {stage: eval ppl}\n  score: {samples: 5}\n", "two.yaml")
    recipe = resolve(written(tmp_path, "extends: [one.yaml, two.yaml]\nsteps:\n  prune: null\n"))
    assert [step.name for step in recipe.steps] == ["score", "ppl"]
    assert values(recipe, "score")["samples"] == 5


def test_a_shipped_recipe_can_be_extended(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, "extends: vicuna-7b-ppl\nmodel: embedded\nsteps:\n  prune: {remove: 2}\n"))
    assert values(recipe, "prune")["remove"] == 2
    assert len(recipe.steps) == len(resolve("vicuna-7b-ppl").steps)


def test_set_lays_over_everything(tmp_path: Path) -> None:
    path = written(tmp_path, PRUNING)
    settings = ["prune.remove=1", "score.criterion=taylor:p=2,batch=1", "score.seed=null", "score.data=a: b"]
    recipe = resolve(path, settings=settings, everywhere={"dtype": "bfloat16", "device": "cpu"})
    assert values(recipe, "prune")["remove"] == 1
    found = values(recipe, "score")
    assert (found["criterion"], found["dtype"], found["device"], found["data"]) == (
        "taylor:p=2,batch=1", "bfloat16", "cpu", "a: b"
    )  # fmt: skip
    assert (
        values(resolve(path, settings=["score.dtype=float32"], everywhere={"dtype": "bfloat16"}), "score")["dtype"]
        == "float32"
    )
    assert [step.name for step in resolve(path, settings=["prune=null"]).steps] == ["score"]
    assert resolve(path, model="elsewhere").model == "elsewhere"


@pytest.mark.parametrize(
    ("more", "is_run"),
    [("blocks: '1'", False), ("selection: greedy, remove: 1", True), ("repair: auto, remove: 1", True)],
)
def test_the_data_type_of_a_recipe_is_for_steps_that_run_the_model(tmp_path: Path, more: str, is_run: bool) -> None:
    """`prune` refuses it where it copies bytes alone, and `run --dtype` could not be used on any recipe that prunes."""
    path = written(tmp_path, f"model: embedded\nsteps: {{prune: {{{more}}}}}")
    found = values(resolve(path, everywhere={"dtype": "float32", "device": "cpu"}), "prune")
    assert ("dtype" in found, "device" in found) == (is_run, is_run)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.remov=1", "--set prune.remov=1: there is no option of prune named 'remov'"),
        ("prun.remove=1", "there is no step named 'prun'"),
        ("prune.remove=x", "remove is 'x', expected a whole number"),
        ("prune.remove", "expected step.key=value"),
        ("prune.=1", "expected step.key=value"),
        ("prune=1", "expected step.key=value, or step=null"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str, tmp_path: Path) -> None:
    error = refused(tmp_path, PRUNING, settings=[setting])
    assert message in error.message
    assert error.hint


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("modle: x\nsteps: {info: {}}", "r.yaml, line 1: there is no key of a recipe named 'modle'", "did you mean model?"),
        ("model: embedded\nsteps:\n  prune: {blocks: '1', remov: 2}", "line 3: there is no option of prune named", "remove"),
        ("model: embedded\nsteps:\n  prnue: {}", "there is no stage named 'prnue'", "did you mean prune?"),
        ("model: embedded\nsteps:\n  a: {stage: retrain loar}", "there is no stage named", "did you mean retrain lora?"),
        ("model: 3\nsteps: {info: {}}", "model is 3, expected text", ""),
        ("model: embedded\nsteps: [info]", "expected a mapping", ""),
        ("- a", "expected a mapping", ""),
        ("", "found nothing, expected a mapping", ""),
        ("model: embedded", "has no steps", ""),
        ("steps: {info: {}}", "has no model to begin with", "--model"),
        ("model: embedded\nsteps: {info: 3}", "found 3, expected a mapping", ""),
        (PRUNING + "  ppl: {stage: eval ppl, fresh: no}", "fresh is 'no', expected true or false", "fresh"),
        (PRUNING + "  lora: {stage: retrain lora, data: x, rank: 8.5}", "rank is 8.5, expected a whole", "rank: The rank"),
        (PRUNING + "  lora: {stage: retrain lora, data: x, rank: true}", "rank is True, expected a whole number", ""),
        (PRUNING + "  lora: {stage: retrain lora, data: x, lr: .nan}", "lr is nan, expected a number", ""),
        (PRUNING + "  lora: {stage: retrain lora, data: [x]}", "data is ['x'], expected text", ""),
        (PRUNING + "  lora: {stage: retrain lora}", "step lora lacks data", "data: The data to train on: rows"),
        ("model: embedded\nsteps: {score: {dtype: float8}}", "dtype is 'float8', expected auto, float32", ""),
        (PRUNING + "  Bad: {stage: info}", "'Bad' is not allowed as the name of a step", "lower case"),
        (PRUNING + "  ../../etc: {stage: info}", "is not allowed as the name of a step", ""),
        (PRUNING + "  logs: {stage: info}", "is not allowed as the name of a step", ""),
        (PRUNING + "  x: {stage: info, optional: 1}", "optional is 1, expected true or false", ""),
        (PRUNING + "  x: null", "there is no step to take away named 'x'", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_with_its_line(text: str, message: str, hint: str, tmp_path: Path) -> None:
    error = refused(tmp_path, text)
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize("option", ["trust_remote_code", "allow_links", "force", "out", "quiet", "dry_run"])
def test_what_a_user_decides_is_not_for_recipes(option: str, tmp_path: Path) -> None:
    error = refused(tmp_path, PRUNING + f"  score2: {{stage: score, {option}: true}}")
    verb = "score" if option in COMMANDS["score"].options else "prune"
    if verb == "score":
        assert f"{option} is not allowed in a recipe" in error.message
    else:
        assert option in error.message


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("plan: {scores: $scroe, remove: 1}", "there is no step before plan named 'scroe'"),
        ("plan: {scores: $plan, remove: 1}", "there is no step before plan named 'plan'"),
        ("plan: {scores: $prune, remove: 1}", "scores is $prune, a step that makes checkpoint; expected scores"),
        ("ppl: {stage: eval ppl, models: [$score]}", "models is $score, a step that makes scores; expected checkpoint"),
        ("merge: {adapter: $prune}", "adapter is $prune, a step that makes checkpoint; expected adapter"),
        ("compare: {results: [$model]}", "there is no step before compare named 'model'"),
    ],
)
def test_references_lead_to_what_is_there_and_of_the_right_kind(step: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, PRUNING + f"  {step}\n").message


@pytest.mark.fault(74)
def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "deep/er"
    written(folder, "text", "texts/a.txt")
    written(folder, "text", "texts/b.txt")
    recipe = resolve(written(folder, (
        "model: ./pico\nsteps:\n  score: {data: texts}\n"
        "  ppl: {stage: eval ppl, models: [$model, org/name], data: 'texts/a.txt,wikitext2,texts/b.txt', data_dir: copies}\n"
    )))  # fmt: skip
    assert recipe.model == str(folder / "pico")
    assert values(recipe, "score")["data"] == str(folder / "texts")
    assert values(recipe, "ppl")["data"] == f"{folder}/texts/a.txt,wikitext2,{folder}/texts/b.txt"
    assert values(recipe, "ppl")["data_dir"] == str(folder / "copies")
    assert values(recipe, "ppl")["models"] == [Reference("model"), "org/name"]
    given = resolve(str(folder / "r.yaml"), settings=["score.data=texts"])
    assert values(given, "score")["data"] == "texts"  # on the command line: relative to where the user is


@pytest.mark.fault(74)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: ~/secrets\nsteps: {info: {}}", "do not read home folders"),
        ("model: $HOME/secrets\nsteps: {info: {}}", "do not read home folders or environment variables"),
        ("model: https://example.org/m\nsteps: {info: {}}", "URLs are not read"),
        ("model: embedded\nsteps: {score: {data: 'https://example.org/x.txt'}}", "URLs are not read"),
        ("model: embedded\nsteps: {score: {data: '~/x.txt'}}", "do not read home folders"),
        ("model: embedded\nsteps: {score: {data: embedded, csv: ../../up}}", "expected a name inside the step's folder"),
        ("model: embedded\nsteps: {score: {data: embedded, csv: /tmp/up}}", "expected a name inside the step's folder"),
        ("model: embedded\nsteps: {score: {data: embedded, csv: ~/up}}", "expected a name inside the step's folder"),
        ("extends: https://example.org/r.yaml\nsteps: {info: {}}", "recipes are not fetched from the network"),
    ],
)  # fmt: skip
def test_a_recipe_reads_no_home_no_environment_and_no_url_and_writes_in_its_folder(
    text: str, message: str, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, text).message


def test_circles_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "extends: r.yaml\n", "other.yaml")
    assert "in a circle" in refused(tmp_path, "extends: other.yaml\nmodel: embedded\nsteps: {info: {}}").message


def test_names_are_found_whatever_their_case_and_bases_are_not_recipes() -> None:
    assert resolve("Vicuna-7B-PPL").steps == resolve("vicuna-7b-ppl").steps
    with pytest.raises(ShortstackError, match="there is no recipe named 'vicuna-7b-pl'") as caught:
        resolve("vicuna-7b-pl")
    assert caught.value.hint == "did you mean vicuna-7b-ppl?"
    with pytest.raises(ShortstackError, match="there is no recipe"):
        resolve("published-pruning")


def test_an_optional_step_without_its_packages_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else real(name))
    training = "  cpt: {stage: retrain cpt, data: embedded, optional: true}\n"
    recipe = resolve(written(tmp_path, PRUNING + training + "  ppl: {stage: eval ppl, models: [$prune, $cpt]}\n"))
    assert recipe.left_out == {"cpt": "it needs pip install 'shortstack[retrain]'"}
    assert values(recipe, "ppl")["models"] == [Reference("prune")]
    error = refused(tmp_path, PRUNING + training + "  score2: {stage: score, model: $cpt}\n")
    assert "$cpt was skipped: it needs pip install" in error.message


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_shown_in_full_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = resolve(name, to_run=False)
    again = resolve(written(tmp_path, recipe.to_yaml()), to_run=False)
    assert again.steps == recipe.steps
    assert (again.model, again.about) == (recipe.model, recipe.about)
    assert yaml.safe_load(recipe.to_yaml())["steps"].keys() == {step.name for step in recipe.steps}


def test_shipped_recipes_are_a_few_lines_each() -> None:
    for name, path in shipped_recipes().items():
        if name not in ("quickstart", "any-light"):  # pipelines of their own
            assert len(path.read_text().splitlines()) <= 10, name
        assert resolve(name, to_run=False).about, name


def test_usage_errors_are_told_from_others(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        resolve(written(tmp_path, "steps: {info: {}}"))


def test_named_sources_lie_beside_the_recipe_and_are_known_by_content(tmp_path: Path) -> None:
    from shortstack.recipes.cache_keys import step_key

    for name in ("books", "prompts"):
        (tmp_path / f"{name}.txt").write_text("words " * 100)
    text = 'model: embedded\nsteps:\n  score: {data: "general=books.txt,own=self:prompts.txt,c4=c4"}\n'
    recipe = resolve(written(tmp_path, text))
    data = values(recipe, "score")["data"]
    assert data == f"general={tmp_path / 'books.txt'},own=self:{tmp_path / 'prompts.txt'},c4=c4"
    assert data in recipe.to_yaml()
    first = step_key(recipe.steps[0], {"model": "m"})
    assert step_key(recipe.steps[0], {"model": "m"}) == first
    (tmp_path / "prompts.txt").write_text("other words " * 100)
    assert step_key(recipe.steps[0], {"model": "m"}) != first
