"""Every shipped recipe against a hand-kept table of the published numbers: editing a shared base breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from shortstack.baselines.figures import published_names
from shortstack.recipes.merge import shipped_recipes
from shortstack.recipes.resolve import Reference, resolve

MODEL, SCORE, PRUNE = Reference("model"), Reference("score"), Reference("prune")
SEVEN = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"

# name of the model in recipes -> hub id, blocks removed as published, by which criteria, other ratios, BOS on every window
MODELS = {
    "llama-1-7b": ("baffo32/decapoda-research-llama-7B-hf", 6, ("ppl", "taylor", "magnitude"), (9, 11), False),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 6, ("ppl", "taylor"), (9, 11), False),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 6, ("ppl", "taylor"), (), False),
    "vicuna-7b": ("lmsys/vicuna-7b-v1.3", 6, ("ppl", "taylor", "magnitude"), (9, 11), False),
    "vicuna-13b": ("lmsys/vicuna-13b-v1.3", 8, ("ppl", "taylor", "magnitude"), (11, 15), False),
    "catppt-base": ("rishiraj/CatPPT-base", 6, ("ppl", "taylor", "magnitude"), (9, 11), False),
    "gemma-2b": ("google/gemma-2b", 4, ("ppl", "taylor"), (), True),
    "gemma-7b": ("google/gemma-7b", 5, ("ppl", "taylor"), (), True),
}
# The twenty scripts, and the other ratios of ppl and taylor: recipe -> (model, criterion, removed)
PIPELINES = {
    f"{model}-{criterion}" + ("" if removed == published else f"-remove-{removed}"): (model, criterion, removed)
    for model, (_, published, criteria, others, _) in MODELS.items()
    for criterion in criteria
    for removed in (published, *(others if criterion != "magnitude" else ()))
}
# share of the blocks -> (blocks removed, tokens)
CPT = {20: (6, "37B"), 45: (15, "74B"), 60: (20, "150B"), 80: (26, "271B")}
CHECKPOINTS = [
    *(f"st-llama-1-5.5b-{criterion}" for criterion in ("ppl", "taylor")),
    *(f"st-vicuna-v1.3-{size}-{criterion}" for size in ("5.5b", "10.5b") for criterion in ("ppl", "taylor")),
    *(
        f"{way}-vicuna-v1.3-{size}-ppl"
        for way in ("cpt_st", "cpt-lora_st")
        for size in ("5.5b", "3.7b", "2.7b", "1.5b")
    ),
]
# What was measured beside what: time and memory as the scripts do; Vicuna-7B beside all sizes that were published of it.
BENCHES = {
    "bench-llama-1-7b": ("llama-1-7b", ["nota-ai/st-llama-1-5.5b-ppl"]),
    "bench-vicuna-13b": ("vicuna-13b", ["nota-ai/st-vicuna-v1.3-10.5b-ppl"]),
    "bench-vicuna-7b": (
        "vicuna-7b", [f"nota-ai/cpt_st-vicuna-v1.3-{size}-ppl" for size in ("5.5b", "3.7b", "2.7b", "1.5b")],
    ),
}  # fmt: skip


GPTQ = {
    "vicuna-7b-gptq": "lmsys/vicuna-7b-v1.3",
    **{
        f"vicuna-7b-cpt-gptq-{share}": f"nota-ai/cpt_st-vicuna-v1.3-{left}-ppl"
        for share, left in ((20, "5.5b"), (45, "3.7b"), (60, "2.7b"), (80, "1.5b"))
    },
}


def steps(name: str) -> dict[str, dict[str, Any]]:
    return {step.name: {"stage": step.command.name, **step.values} for step in resolve(name).steps}


def scoring(model: str, criterion: str) -> dict[str, Any]:
    by_window = criterion == "taylor" and model.startswith("vicuna")
    full = {
        "ppl": "ppl",
        "taylor": f"taylor:p=1,weight=sum,block=sum,batch={1 if by_window else 10}",
        "magnitude": "magnitude:p=1,weight=sum,block=sum",
    }
    return {
        "stage": "score", "model": MODEL, "criterion": full[criterion], "data": "bookcorpus", "sampling": "published",
        "samples": 10, "seq_len": 128, "seed": 1234, "bos_every": MODELS[model][4], "csv": "csv",
    }  # fmt: skip


def pruning(removed: int) -> dict[str, Any]:
    return {"stage": "prune", "model": MODEL, "scores": SCORE, "strategy": "one-shot", "plus": True, "remove": removed}


def lora(of: Reference, **more: Any) -> dict[str, Any]:
    return {
        "stage": "retrain lora", "model": of, "data": "alpaca-cleaned", "rank": 8, "alpha": 16, "dropout": 0.05, "lr": 1e-4,
        "epochs": 2, "batch": 64, "micro_batch": 4, "cutoff": 256, "warmup": 100, "validation": 2000, "seed": 42,
        "eval_every": 100, "save_every": 200, "eval_data": "wikitext2,ptb", "group_by_length": False, "merge": False, **more,
    }  # fmt: skip


def merging(of: Reference, dtype: str = "float16") -> dict[str, Any]:
    return {"stage": "merge", "adapter": Reference("lora"), "base": of, "save_dtype": dtype}


REPORT: dict[str, dict[str, Any]] = {"report": {"stage": "report", "sources": [Reference("run")]}}


def evaluation(*made: str) -> dict[str, dict[str, Any]]:
    models = [MODEL, *map(Reference, made)]
    return {
        "ppl": {
            "stage": "eval ppl", "models": models, "data": "wikitext2,ptb", "seq_len": "128", "bos": "both", "csv": "csv",
        },
        "zeroshot": {"stage": "eval zeroshot", "models": models, "tasks": SEVEN, "num_fewshot": 0, "csv": "csv"},
        "samples": {
            "stage": "eval samples", "models": models, "prompt": "The Leaning Tower of Pisa is known for", "count": 5,
            "new_tokens": 128, "top_k": 50, "top_p": 0.95, "temperature": 1, "csv": "csv",
        },
        "compare": {"stage": "compare", "results": [Reference("ppl"), Reference("zeroshot")]},
        **REPORT,
    }  # fmt: skip


def without_published(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The recipe's steps; whether the published names that stand beside it exist is looked at here."""
    named = found.get("compare", {}).pop("published", None)
    assert set((named or "").split(",")) - {""} <= set(published_names())
    return found


def test_the_twenty_scripts_are_here() -> None:
    assert sum("remove" not in name for name in PIPELINES) == 20


def test_every_recipe_ends_with_a_report() -> None:
    assert {resolve(name, to_run=False).steps[-1].command.name for name in shipped_recipes()} == {"report"}


def test_there_is_no_other_recipe() -> None:
    cpt = {f"vicuna-7b-cpt{way}-{share}" for way in ("", "-lora") for share in CPT}
    evaluated = {f"eval-{name}" for name in (*MODELS, *CHECKPOINTS)}
    assert set(shipped_recipes()) == {
        *PIPELINES,
        *cpt,
        *evaluated,
        *BENCHES,
        *GPTQ,
        "quickstart",
        "any-light",
        "best-25",
        "best-50",
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_a_published_pipeline(name: str) -> None:
    model, criterion, removed = PIPELINES[name]
    is_bf16 = model == "llama-2-7b"
    assert resolve(name).model == MODELS[model][0]
    assert without_published(steps(name)) == {
        "score": scoring(model, criterion),
        "prune": pruning(removed),
        "lora": lora(PRUNE, **({"dtype": "bfloat16"} if is_bf16 else {})),
        "merge": merging(PRUNE, "bfloat16" if is_bf16 else "float16"),
        **evaluation("prune", "merge"),
    }


@pytest.mark.parametrize("share", CPT)
def test_continued_pretraining(share: int) -> None:
    removed, tokens = CPT[share]
    cpt = {
        "stage": "retrain cpt", "model": PRUNE, "data": "cerebras/SlimPajama-627B", "train": "all", "lr": 1e-4,
        "weight_decay": 0.1, "batch": 512, "micro_batch": 2, "seq_len": 2048, "tokens": tokens, "eval_data": "wikitext2,ptb",
    }  # fmt: skip
    first = {"score": scoring("vicuna-7b", "ppl"), "prune": pruning(removed), "cpt": cpt}
    name = f"vicuna-7b-cpt-{share}"
    assert resolve(name).model == "lmsys/vicuna-7b-v1.3"
    assert without_published(steps(name)) == {**first, **evaluation("prune", "cpt")}
    found = without_published(steps(f"vicuna-7b-cpt-lora-{share}"))
    of = Reference("cpt")
    expected = {**first, "lora": lora(of), "merge": merging(of), **evaluation("prune", "cpt", "merge")}
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", GPTQ)
def test_quantization(name: str) -> None:
    quantize = {
        "stage": "quantize", "model": MODEL, "scheme": "W4A16", "group_size": 128, "actorder": "static", "data": "c4",
        "sampling": "joined", "samples": 128, "seq_len": 2048, "seed": 0, "eval_data": "none",
    }  # fmt: skip
    expected = {"quantize": quantize, **evaluation("quantize")}
    if "cpt" in name:
        del expected["compare"]
    assert resolve(name).model == GPTQ[name]
    assert without_published(steps(name)) == expected


def test_what_functions_do_by_default_is_published_too() -> None:
    """Values that recipes leave to the functions: the optimizer's."""
    from shortstack.retraining.cpt import BETAS

    assert BETAS == (0.9, 0.95)


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_are_evaluated(name: str) -> None:
    recipe = resolve(f"eval-{name}")
    assert recipe.model == MODELS[name][0]
    expected = evaluation()
    if name == "vicuna-13b":  # nothing was published of it
        del expected["compare"]
    assert without_published(steps(f"eval-{name}")) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_are_evaluated(name: str) -> None:
    recipe = resolve(f"eval-{name}")
    assert recipe.model == f"nota-ai/{name}"
    expected = evaluation()
    if name.startswith("cpt"):
        del expected["compare"]
    else:
        assert recipe.steps[-2].values["published"] == name
    assert without_published(steps(f"eval-{name}")) == expected


@pytest.mark.parametrize("name", BENCHES)
def test_published_measurements_of_efficiency(name: str) -> None:
    model, beside = BENCHES[name]
    assert resolve(name).model == MODELS[model][0]
    assert steps(name) == {
        "bench": {
            "stage": "bench", "models": [MODEL, *beside], "batch": "1,8,16,32,64,128,256", "new_tokens": "128,512",
            "sampling": "published", "runs": 30, "warmup": 10, "seed": 1234, "memory": True, "compare": True, "csv": "csv",
        },
        **REPORT,
    }  # fmt: skip


@pytest.mark.parametrize("name", published_names())
def test_every_published_result_stands_beside_a_recipe(name: str) -> None:
    named = {
        one
        for recipe in shipped_recipes()
        for step in resolve(recipe, to_run=False).steps
        for one in str(step.values.get("published", "")).split(",")
    }
    assert name in named
