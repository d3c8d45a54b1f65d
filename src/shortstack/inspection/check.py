"""Does a checkpoint load and generate as it should? Works on anyone's: nothing here needs shortstack to have made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.benchmark.options import EngineOptions
from shortstack.checkpoint import anatomy as structure
from shortstack.checkpoint.anatomy import Family
from shortstack.checkpoint.config_file import repair_for
from shortstack.checkpoint.headers import TensorInfo, adapter_files, read_weights, stray_shards
from shortstack.checkpoint.hub import locate
from shortstack.checkpoint.reader import Checkpoint, check_consistency, read_config
from shortstack.common.formatting import size
from shortstack.common.option_values import Listed
from shortstack.common.options import refuse_idle, stage
from shortstack.common.progress import Progress
from shortstack.data.tokenizer import tokenizer_in
from shortstack.errors import ShortstackError, UsageError, first_line
from shortstack.families.table import FAMILIES
from shortstack.inspection.check_bytes import LARGE, check_bytes
from shortstack.inspection.check_running import check_running
from shortstack.inspection.findings import CheckResult, Findings

if TYPE_CHECKING:
    from shortstack.inspection.check_engines import EngineCheck

_ENGINES = EngineOptions()
GGUF = ".gguf"


@stage
def check(
    model: str,
    *,
    engine: Listed | None = None,
    of: Path | None = None,
    engines: EngineOptions = _ENGINES,
    quick: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    quiet: bool = False,
) -> CheckResult:
    """Check that a checkpoint loads and generates correctly, whoever made it.

    It checks files, index and headers; the number of blocks and per-block lists; NaN and infinity; the hashes that
    shortstack.json records; missing and unexpected keys; generation without a cache, with one, and with a static one;
    tokenizer, chat template, positions and generation config. Checks that are not made are reported as skipped.

    With `--engine` that engine then loads the checkpoint in its own environment and continues four prompts by 32 greedy
    tokens each. Every token must be the first choice of transformers in float32; if one is not, the difference of the
    logits is reported.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`; or a GGUF file, which
            llama.cpp runs.
        engine: Run these engines, separated by commas: `transformers` (with `engine_python`, that of another
            environment), `vllm`, `llama.cpp`, `mlx`, `openvino`; or `found`, all that are installed. By default no
            engine runs, because starting one takes up to a minute.
        of: The checkpoint that a GGUF file was made from. By default it is the directory NAME beside NAME.gguf.
        engines: where engines are.
        quick: Skip weight files of 256 MB or more: they are not read, hashed or loaded, and are reported as skipped.
        trust_remote_code: Run the Python code that comes with the checkpoint.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.

    Returns:
        One finding for each check. The exit code of the command is 1 if a check failed.

    Raises:
        ShortstackError: nothing is there.
    """
    progress = Progress(quiet=quiet)
    if engine is None and not model.endswith(GGUF):
        refuse_idle(engines, (field.name for field in dataclasses.fields(engines)), "without --engine")
    if of is not None and not model.endswith(GGUF):
        raise UsageError(f"--of {of}: {model} is not a GGUF file", hint="leave it out")
    if model.endswith(GGUF):
        return CheckResult(
            model, _gguf_findings(Path(model), engine or "llama.cpp", of, engines, allow_links, progress)
        )
    wanted = None
    if engine is not None:
        from shortstack.inspection.check_engines import EngineCheck

        wanted = EngineCheck.of(engine, engines)
    found = _Check(model, locate(model), quick, trust_remote_code, allow_links, progress)
    if found.run() and wanted is not None:
        _run_engines(found.findings, model, wanted, trust_remote_code, allow_links, progress)
    elif wanted is not None:
        found.findings.add("engines", "skip", "not tried: the checkpoint cannot be loaded")
    return CheckResult(model, found.findings)


def _gguf_findings(
    file: Path, engine: str, of: Path | None, where: EngineOptions, allow_links: bool, progress: Progress
) -> Findings:
    """The check of a GGUF file with llama.cpp, beside the checkpoint that it was made from."""
    from shortstack.benchmark.engines.llama_cpp import weight_type
    from shortstack.inspection.check_engines import EngineCheck

    if not file.is_file():
        raise ShortstackError(f"{file}: no such file", hint="shortstack export gguf MODEL --out FILE makes one")
    if engine != "llama.cpp":
        raise UsageError(f"--engine {engine}: {file} is a GGUF file, which llama.cpp runs", hint="--engine llama.cpp")
    source = of or file.with_suffix("")
    if not source.is_dir():
        raise UsageError(
            f"{file}: its output is compared with the checkpoint that it was made from; {source} is not a directory",
            hint="name the checkpoint with --of DIR",
        )
    findings = Findings()
    findings.add("GGUF file", "ok", f"weights of type {weight_type(file)}, compared with {source}")
    wanted = EngineCheck.of(engine, where, file.absolute())
    _run_engines(findings, str(source), wanted, False, allow_links, progress)
    return findings


def _run_engines(
    findings: Findings,
    model: str,
    wanted: EngineCheck,
    trust_remote_code: bool,
    allow_links: bool,
    progress: Progress,
) -> None:
    from shortstack.evaluation.evaluated_model import Subject
    from shortstack.evaluation.options import EvaluationOptions
    from shortstack.families.open_model import open_model
    from shortstack.inspection.check_engines import check_engines

    options = EvaluationOptions(
        dtype="float32", device="cpu", trust_remote_code=trust_remote_code, allow_links=allow_links, quiet=True
    )
    subject = Subject(open_model(model, allow_links=allow_links, progress=Progress(quiet=True)), options, progress)
    check_engines(findings, subject, wanted, progress)


class _Check:
    """The checks, in the order in which one needs another."""

    def __init__(
        self, source: str, directory: Path, quick: bool, trust_remote_code: bool, allow_links: bool, progress: Progress
    ) -> None:
        self.findings = Findings()
        self._source, self._directory = source, directory
        self._quick, self._trust, self._links = quick, trust_remote_code, allow_links
        self._progress = progress

    def run(self) -> bool:
        """Make the checks; whether the checkpoint could be loaded."""
        config = self._step(
            "config",
            lambda: read_config(self._directory, allow_links=self._links)[0],
            lambda c: f"model_type {c.get('model_type')}",
        )
        weights = self._step(
            "weight files", lambda: read_weights(self._directory, allow_links=self._links), _weights_text
        )
        if config is None or weights is None:
            self.findings.add("the rest", "skip", "needs config.json and the weights")
            return False
        stray = stray_shards(self._directory, set(weights[1]))
        if stray:
            self.findings.add("weight files", "note", f"{', '.join(stray)} is named by no index")
        beside = adapter_files(self._directory)
        if beside:
            says = f"{', '.join(beside)}: transformers applies the adapter to the weights if PEFT is installed"
            self.findings.add("adapter", "note", f"{says}; the other checks are of the weights alone")
        family = FAMILIES.get(str(config.get("model_type")))
        sound = self._blocks(config, family, weights[0]) if family is not None else self._unknown(config)
        check_bytes(self.findings, self._directory, *weights, quick=self._quick, progress=self._progress)
        self._known_faults(config)
        self._tokenizer(config, family, weights[0])
        if sound:
            self._runs(weights[0])
        else:
            self.findings.add("loads", "skip", "not tried: config.json and the weights do not agree")
        return sound and not any(
            f.status == "fail" for f in self.findings if f.what in ("loads", "missing keys", "forward")
        )

    def _step(self, what: str, do: Callable[[], Any], says: Callable[[Any], str]) -> Any:
        """Do something; a ShortstackError is a failed check."""
        try:
            result = do()
        except ShortstackError as error:
            found = error.message.removeprefix(f"{self._directory}: ")
            self.findings.add(what, "fail", f"{found} ({error.hint})" if error.hint else found)
            return None
        self.findings.add(what, "ok", says(result))
        return result

    def _unknown(self, config: dict[str, Any]) -> bool:
        self.findings.add(
            "blocks", "skip", f"the family {config.get('model_type')!r} is not in the table; blocks are not compared"
        )
        return True

    def _blocks(self, config: dict[str, Any], family: Family, tensors: dict[str, TensorInfo]) -> bool:
        """Number of blocks, per-block lists, head and widths; whether it makes sense to load the model."""
        anatomy = self._step(
            "blocks",
            lambda: structure.anatomy_of(config, family, tensors, self._source),
            lambda a: (
                f"{a.depth} in config.json and in the weights"
                + (f", {a.extra} for multi-token prediction" if a.extra else "")
            ),
        )
        if anatomy is None:
            return False
        lists = self._step(
            "per-block lists",
            lambda: structure.per_block_lists(config, family, anatomy.depth, self._source),
            lambda found: ", ".join(found) or "none",
        )
        checkpoint = Checkpoint(
            self._directory, self._source, config, b"", tensors, {}, anatomy, tuple(range(anatomy.depth))
        )
        if lists is None:
            return False
        before = len(self.findings)
        self._step(
            "head, widths, types",
            lambda: check_consistency(checkpoint),
            lambda _: "head tied to the embedding" if checkpoint.tied else "head of its own",
        )
        return all(finding.status != "fail" for finding in self.findings[before:])

    def _known_faults(self, config: dict[str, Any]) -> None:
        repair = repair_for(config, self._directory)
        if repair is not None:
            self.findings.add("known faults", "fail", repair.says)
        if config.get("use_cache") is False:
            self.findings.add(
                "use_cache", "note", "is false in config.json, as training leaves it: generation will be slow"
            )

    def _tokenizer(self, config: dict[str, Any], family: Family | None, tensors: dict[str, TensorInfo]) -> None:
        try:
            tokenizer = tokenizer_in(self._directory, self._source, trust_remote_code=self._trust)
        except ShortstackError as error:
            self.findings.add("tokenizer", "fail", error.message.removeprefix(f"{self._source}: "))
            return
        embedding = tensors.get(family.embedding) if family is not None else None
        rows = embedding.shape[0] if embedding is not None else (family or Family("")).text(config).get("vocab_size")
        largest = max(tokenizer.get_vocab().values(), default=0)
        if isinstance(rows, int) and largest >= rows:
            self.findings.add("tokenizer", "fail", f"token id {largest}, but the embedding has {rows} rows")
        else:
            self.findings.add("tokenizer", "ok", f"{len(tokenizer)} tokens")
            if not isinstance(rows, int):
                self.findings.add("token ids", "skip", "the rows of the embedding are not known")
        self._special_ids(config, tokenizer)
        self._chat_template(tokenizer)

    def _special_ids(self, config: dict[str, Any], tokenizer: Any) -> None:
        """End-of-text decides where generation stops: config and tokenizer must mean the same."""
        stated = config.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [stated]
        own = tokenizer.eos_token_id
        if stated is None or own is None:
            self.findings.add("end of text", "note", f"config says {stated}, the tokenizer {own}")
        elif own in ids:
            self.findings.add("end of text", "ok", f"token {own}")
        else:
            self.findings.add("end of text", "fail", f"config says {stated}, the tokenizer {own}")

    def _chat_template(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            self.findings.add("chat template", "note", "there is none")
            return
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except Exception as error:  # templates are programs
            self.findings.add("chat template", "fail", f"cannot be rendered: {first_line(error)[:200]}")
            return
        holds = "Hello" in text
        self.findings.add(
            "chat template", "ok" if holds else "fail", "renders a message" if holds else "loses the message"
        )

    def _runs(self, tensors: dict[str, TensorInfo]) -> None:
        large = [path for path in {tensor.file for tensor in tensors.values()} if path.stat().st_size >= LARGE]
        if self._quick and large:
            self.findings.add("loads", "skip", f"--quick: not tried: {size(sum(t.nbytes for t in tensors.values()))}")
        else:
            check_running(self.findings, self._directory, tensors, trust_remote_code=self._trust)


def _weights_text(weights: tuple[dict[str, TensorInfo], dict[Path, Any]]) -> str:
    tensors, shards = weights
    return f"{len(tensors)} tensors in {len(shards)} file{'s' if len(shards) > 1 else ''}; headers and index agree"
