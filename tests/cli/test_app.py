"""The command line: thin, quick, with errors of one or two lines and the right exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.cli.app import run
from shortstack.registry import COMMANDS

Built = Callable[..., Path]


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "shortstack", *arguments], capture_output=True, text=True, timeout=120)


def test_overview_lines_are_the_first_sentences_of_the_docstrings() -> None:
    for command in COMMANDS.values():
        assert " ".join((command.stage.__doc__ or "").split()).startswith(command.summary)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--json" in shown
    if command:
        for parameter in (name.strip("_") for name in COMMANDS[command].options):
            assert parameter.upper() in shown or f"--{parameter.replace('_', '-')}" in shown


TRAINING = (
    "--max-steps --save-every --eval-every --log-every --validation --eval-data --eval-windows --dense --dtype --device "
    "--seed --save-dtype --gradient-checkpointing --workers --report-to --dry-run --restart --weights-only-resume --force "
    "--trust-remote-code --quiet --tokenizer "
)
EVALUATING = "--tokenizer --batch --dtype --device --fresh --trust-remote-code --quiet "
# The flags are promised (design): a name that changes breaks scripts.
FROZEN = {
    "retrain lora": TRAINING + "--data --out --rank --alpha --dropout --lr --epochs --tokens --batch --micro-batch "
    "--cutoff --warmup --group-by-length --merge --no-merge --load-in-4bit --target-modules --prompt-template --instruction "
    "--no-instruction --train-on-inputs --add-eos --no-add-eos",
    "retrain cpt": TRAINING + "--data --out --train --tokens --seq-len --lr --weight-decay --batch --micro-batch "
    "--warmup --isolate-documents",
    "retrain distill": TRAINING + "--out --teacher --data --offline --train --temperature --kl-weight --loss-weight "
    "--hidden-weight --lr --weight-decay --epochs --tokens --seq-len --batch --micro-batch --warmup --rank --alpha "
    "--dropout --isolate-documents",
    "retrain local": TRAINING
    + "--of --data --out --radius --lora-rank --update-weight --cosine-weight --states --tokens "
    "--epochs --seq-len --lr --weight-decay --batch --micro-batch --warmup",
    "merge": "--out --base --save-dtype --force --trust-remote-code --quiet",
    "teach": "--data --out --top-k --temperature --tokens --seq-len --validation --isolate-documents --micro-batch "
    "--dtype --device --seed --force --trust-remote-code --quiet --tokenizer",
    "quickstart": "--out --force --quiet",
    "info": "--allow-links",
    "check": "--engine --of --engine-python --engine-binary --engine-args --time-limit --quick --trust-remote-code "
    "--allow-links --quiet",
    "families": "",
    "doctor": "",
    "score": "--tokenizer --save-every --allow-links --until --remove --plus --no-plus --max-samples --memory-limit "
    "--out --criterion --data --samples --seq-len --seed --sampling --bos-every --chat-template --csv --dtype "
    "--device --memory --trust-remote-code --quiet --count-prompts",
    "plan": "--allow-links --out --blocks --scores --criterion --remove --ratio --params --plus --no-plus --strategy "
    "--objective --bytes --ppl-ceiling --speedup",
    "stability": "--out --plot --remove --criterion --seeds --windows --plus --no-plus --data --samples --seq-len --seed "
    "--sampling --bos-every --chat-template --count-prompts --tokenizer --dtype --device --memory --memory-limit "
    "--trust-remote-code --allow-links --quiet",
    "search": "--objective --count-prompts --bytes --ppl-ceiling --speedup --rescore "
    "--out --selection --remove --ratio --params --plus --no-plus --data --samples --seq-len --seed --sampling "
    "--bos-every --chat-template --tokenizer --dtype --device --memory --memory-limit --save-every --trust-remote-code "
    "--allow-links --quiet",
    "curve": "--objective --count-prompts "
    "--out --selection --most --plus --no-plus --data --samples --seq-len --seed --sampling --bos-every "
    "--chat-template --tokenizer --dtype --device --memory --memory-limit --save-every --trust-remote-code --allow-links "
    "--quiet",
    "prune": "--adapter --allow-links --objective "
    "--out --plan --blocks --scores --criterion --remove --ratio --params --plus --no-plus --strategy --verify --repair "
    "--repair-between --force --allow-nonfinite --quiet",
    "repair": "--of --out --method --data --samples --seq-len --seed --sampling --bos-every --chat-template --behind "
    "--first-token --padding --force --tokenizer --dtype --device --cpu-kernels --memory --trust-remote-code --allow-links "
    "--quiet",
    "prune-width": "--out --ratio --params --only --head-unit --multiple-of --data --samples --seq-len --seed --sampling "
    "--bos-every --chat-template --tokenizer --verify --force --allow-nonfinite --dtype --device --memory --memory-limit "
    "--save-every --trust-remote-code --allow-links --quiet",
    "quantize": "--tokenizer --out --scheme --group-size --actorder --dampening --data --samples --seq-len --seed --sampling "
    "--chat-template --eval-data --device --force --trust-remote-code --allow-links --quiet",
    "eval ppl": EVALUATING + "--data --data-dir --seq-len --bos --limit --out --csv",
    "eval zeroshot": EVALUATING + "--tasks --tasks-dir --limit --num-fewshot --out --csv",
    "eval generation": EVALUATING + "--prompts --new-tokens --probes --dense --seed --out",
    "eval samples": EVALUATING + "--prompt --count --new-tokens --top-k --top-p --temperature --seed --out --csv",
    "eval all": EVALUATING + "--data --data-dir --seq-len --bos --tasks --tasks-dir --limit --dense --seed --out --csv",
    "compare": "--base --published --out",
    "card": "--base-model --license --eval-results --force --quiet",
    "push": "--yes --public --quick --force --quiet",
    "report": "--out --png --published",
    "bench": (
        "--preset --batch --prompt-tokens --new-tokens --sampling --runs --warmup --engine --engine-python --engine-binary "
        "--engine-args --time-limit --compare --draft --draft-tokens --csv --plot --out --memory --no-memory --seed --dtype "
        "--device --fresh --trust-remote-code --allow-links --quiet --tokenizer"
    ),
    "agree": "--criterion --remove --plus --no-plus --out",
    "export gguf": "--out --type --converter --converter-python --time-limit --force --trust-remote-code --allow-links "
    "--quiet",
    "export mergekit": "--out --plan --dense --force --allow-links --quiet",
    "export prune-layers": "--out --plan --dense --force --allow-links --quiet",
    "run": "--model --out --set --from --dry-run --dtype --device --force --quiet",
    "recipes": "",
    "demo": (
        "--scores --results --port --public --user --password-env --dtype --device --trust-remote-code --allow-links --quiet "
        "--tokenizer"
    ),
}


@pytest.mark.parametrize("command", FROZEN)
def test_frozen_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert [flag for flag in FROZEN[command].split() if flag not in shown] == []
    assert set(FROZEN) == set(COMMANDS)


def test_python_dash_m_and_version() -> None:
    done = shell("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().count(".") == 2


def test_figures_on_stdout_as_text_or_json(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(built("llama"))]) == 0
    assert "family" in capsys.readouterr().out
    assert run(["info", str(built("llama")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 6
    assert run(["--json", "plan", str(built("llama")), "--blocks", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [1]


@pytest.mark.fault(45)
def test_the_whole_way(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = str(built("llama")), tmp_path / "text.txt"
    text.write_text("a text that is long enough for some windows. " * 60)
    scores, pruned = str(tmp_path / "s.json"), str(tmp_path / "p")
    options = ["--data", str(text), "--samples", "4", "--seq-len", "32"]
    assert run(["score", model, *options, "--criterion", "ppl,taylor:p=2,weight=sum,magnitude", "--out", scores]) == 0
    shown = capsys.readouterr()
    assert "lowest = least important = removed first" in shown.out
    assert set(json.loads(Path(scores).read_text())["criteria"]) == {"ppl", "taylor:p=2,weight=sum", "magnitude"}
    assert (
        run(["prune", model, "--scores", scores, "--criterion", "ppl", "--remove", "1", "--verify", "--out", pruned])
        == 0
    )
    assert "verified" in capsys.readouterr().out
    results = str(tmp_path / "r.json")
    assert run(["eval", "ppl", model, pruned, "--data", str(text), "--seq-len", "32", "--out", results]) == 0
    shown = capsys.readouterr()
    assert "ppl_32" in shown.out
    assert "pruned by scores on this very text" in shown.out
    assert len(json.loads(Path(results).read_text())) == 2
    assert run(["eval", "samples", pruned, "--prompt", "ab", "--new-tokens", "8", "--count", "2"]) == 0
    assert "sample 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "first"),
    [
        (["info", "/no/such/place"], 1, "error: /no/such/place: no such directory"),
        (["info", "MODEL", "--frobnicate"], 2, ""),
        (["frobnicate"], 2, ""),
        (["score"], 2, ""),
        (["score", "MODEL", "--criterion", "taylr"], 2, "error: unknown criterion 'taylr'"),
        (
            ["score", "MODEL", "--criterion", "all,ppl"],
            2,
            "hint: `all` cannot be combined with other criteria: --criterion all",
        ),
        (["info", ""], 2, "error: '' is not the name of a model"),
        (["score", "MODEL", "--data", ""], 2, "error: '' is not the name of a text"),
        (["eval", "ppl", "MODEL", "--data", ""], 2, "error: --data '': names no text"),
        (["eval", "ppl", "MODEL", "--data", " , "], 2, "error: --data ' , ': names no text"),
        (["prune", "MODEL", "--plan", ".", "--out", "p"], 1, "error: .: not a plan of shortstack (is a directory)"),
        (["plan", "MODEL", "--scores", ".", "--remove", "1"], 1, "error: .: cannot be read (is a directory)"),
        (["score", "MODEL", "--criterion", "taylor:q=2"], 2, "error: criterion 'taylor:q=2': has no parameter 'q'"),
        (
            ["score", "MODEL", "--criterion", "taylor:p=²"],
            2,
            "error: criterion 'taylor:p=²': p=², expected a whole number",
        ),
        (["score", "MODEL", "--criterion", "ppl,ppl"], 2, "error: --criterion 'ppl,ppl': duplicate ppl"),
        (["score", "MODEL", "--samples", "x"], 2, ""),
        (["score", "MODEL", "--data", "/no/text"], 1, "error: /no/text: no such file or folder"),
        (
            ["score", "MODEL", "--criterion", "magnitude", "--device", "cuda:7"],
            1,
            "error: --device cuda:7: not usable here",
        ),
        (["plan", "MODEL"], 2, "error: no blocks to remove are given"),
        (["plan", "MODEL", "--blocks", "9"], 1, "error: MODEL: no block 9; it has blocks 0-5"),
        (["prune", "MODEL", "--blocks", "1", "--out", "MODEL"], 1, "error: MODEL: is the input"),
        (["eval", "ppl"], 2, "error: no model given"),
        (["eval", "ppl", "MODEL", "--seq-len", "x"], 2, "error: --seq-len 'x'"),
    ],
)
def test_errors_are_short_and_have_their_exit_code(
    built: Built, arguments: list[str], code: int, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(built("llama"))
    assert run([model if argument == "MODEL" else argument for argument in arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert first.replace("MODEL", model) in shown.err
    assert "Traceback" not in shown.err
    if first:
        assert len(shown.err.splitlines()) <= 2


def test_debug_shows_the_traceback() -> None:
    done = shell("info", "/no/such/place", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_interrupted(monkeypatch: pytest.MonkeyPatch, built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: str, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shortstack.inspection.info.open_model", interrupt)
    assert run(["info", str(built("llama"))]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.fault(77, 84)
def test_no_terminal_escapes_and_no_tokens_in_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "x\x1b[31mred hf_abcdefghijklmnop"
    assert run(["info", f"/no/{name}/there/is"]) == 1
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "abcdefghijklmnop" not in shown


LIGHT = [
    ["--help"],
    ["score", "--help"],
    ["info", "MODEL"],
    ["families"],
    ["plan", "MODEL", "--blocks", "1"],
    ["prune", "MODEL", "--blocks", "1", "--out", "OUT"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=lambda arguments: arguments[0])
def test_light_commands_import_nothing_heavy(built: Built, arguments: list[str], tmp_path: Path) -> None:
    """Start-up is part of every command's time: neither torch nor transformers for headers, plans and byte copies."""
    places = {"MODEL": str(built("llama")), "OUT": str(tmp_path / "p")}
    code = (
        "import sys; from shortstack.cli.app import run; code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'gradio', 'scipy', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)"
    )
    given = [places.get(argument, argument) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkpoint_package_does_not_import_torch() -> None:
    """The rule holds for the text of the modules too; reading `.bin` files, which is pickle, is the one exception."""
    import ast

    import shortstack.checkpoint

    for path in Path(shortstack.checkpoint.__file__).parent.rglob("*.py"):
        if path.name == "torch_bin.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], path


# Rooms from the bottom to the top; the stages stand side by side.
ROOMS = [
    "errors",
    "common",
    "runtime",
    "artifacts",
    "checkpoint",
    "families",
    "data",
    "engine",
    "a stage",
    "registry",
    "recipes",
    "cli",
]
STAGES = {
    "baselines", "benchmark", "demo",
    "evaluation", "inspection", "pruning", "publishing", "quantization", "retraining", "scoring",
}  # fmt: skip
# A family that the table does not know is built and run: the one thing in its room that needs the engine.
EXCEPTIONS = {("families/probe.py", "engine")}


def test_nothing_below_imports_from_above() -> None:
    """The arrows go one way (CONTRIBUTING.md), also inside functions; among the stages they make no circle."""
    import ast
    import graphlib

    import shortstack

    root = Path(shortstack.__file__).parent
    level = {room: number for number, room in enumerate(ROOMS)} | {stage: ROOMS.index("a stage") for stage in STAGES}
    between: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        room = inside.parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shortstack.")):
                continue
            used = (node.module or "").split(".")[1]
            if (inside.as_posix(), used) not in EXCEPTIONS:
                assert level[used] <= level[room], f"{inside} imports {node.module}"
            if room in STAGES and used in STAGES - {room}:
                between[room].add(used)
    graphlib.TopologicalSorter(between).prepare()  # raises CycleError


def test_public_names_are_importable_and_documented() -> None:
    import shortstack

    for name in shortstack.__all__:
        assert getattr(shortstack, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        shortstack.nonsense  # noqa: B018
