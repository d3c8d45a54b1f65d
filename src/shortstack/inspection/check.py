"""Does a checkpoint load and generate as it should? Works on anyone's: nothing here needs shortstack to have made it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.artifacts import provenance
from shortstack.checkpoint import anatomy as structure
from shortstack.checkpoint.byte_copy import first_nonfinite
from shortstack.checkpoint.family import Family
from shortstack.checkpoint.headers import TensorInfo, read_weights, stray_shards
from shortstack.checkpoint.hub import locate
from shortstack.checkpoint.known_faults import repair_for
from shortstack.checkpoint.reader import Checkpoint, check_consistency, read_config
from shortstack.common.formatting import size
from shortstack.common.progress import Progress
from shortstack.data.tokenizer import tokenizer_in
from shortstack.engine.load import quiet_transformers
from shortstack.errors import ShortstackError, first_line
from shortstack.families.table import FAMILIES
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "fail", "note"]
_NEW_TOKENS = 12
_PROMPT_TOKENS = 8
_MARKS: dict[Status, tuple[str, str]] = {"ok": ("ok  ", "32"), "fail": ("FAIL", "31"), "note": ("note", "33")}


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        what: what was looked at.
        status: `ok`, `fail`, or `note` for what may be meant so, or could not be looked at.
        says: what was found.
    """

    what: str
    status: Status
    says: str


@dataclass(frozen=True)
class CheckResult:
    """What `shortstack check` found; the command's exit code is 1 where anything failed."""

    source: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 where nothing failed, else 1."""
        return int(any(finding.status == "fail" for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "source": self.source,
            "ok": not self.exit_code,
            "findings": [asdict(f) for f in self.findings],
        }

    def to_text(self) -> str:
        """One line each."""
        width = max(len(finding.what) for finding in self.findings)
        lines = [self.source]
        lines += [f"  {_MARKS[f.status][0]}  {f.what.ljust(width)}  {f.says}" for f in self.findings]
        failed = sum(finding.status == "fail" for finding in self.findings)
        return "\n".join([*lines, f"{failed} of {len(self.findings)} checks failed" if failed else "nothing failed"])

    def coloured(self, text: str) -> str:
        """The same text with green and red marks, for a terminal."""
        for mark, code in _MARKS.values():
            text = text.replace(f"\n  {mark}  ", f"\n  \x1b[{code}m{mark}\x1b[0m  ")
        return text


def check(model: str, *, trust_remote_code: bool = False, quiet: bool = False) -> CheckResult:
    """Check that a checkpoint loads and generates as it should, whoever made it.

    Files, index and headers; number of blocks and per-block lists; NaN and infinity; missing and unexpected keys;
    generation without a cache, with one, and with a static one; tokenizer, chat template, positions, generation config.

    Args:
        model: a checkpoint directory, a hub id such as `org/name@revision`, or `embedded`.
        trust_remote_code: run code that comes with the checkpoint.
        quiet: no progress on stderr.

    Returns:
        A finding per check. The command exits 1 where one failed.

    Raises:
        ShortstackError: nothing is there.
    """
    directory = locate(model)
    found = _Check(model, directory, trust_remote_code, Progress(quiet=quiet))
    found.run()
    return CheckResult(model, found.findings)


class _Check:
    """The checks, in the order in which one needs another."""

    def __init__(self, source: str, directory: Path, trust_remote_code: bool, progress: Progress) -> None:
        self.findings: list[Finding] = []
        self._source = source
        self._directory = directory
        self._trust = trust_remote_code
        self._exact = True
        self._progress = progress

    def run(self) -> None:
        config = self._step(
            "config", lambda: read_config(self._directory)[0], lambda c: f"model_type {c.get('model_type')}"
        )
        weights = self._step("weight files", lambda: read_weights(self._directory), _weights_text)
        if config is None or weights is None:
            return
        stray = stray_shards(self._directory, set(weights[1]))
        if stray:
            self._add("weight files", "note", f"{', '.join(stray)} is named by no index")
        family = FAMILIES.get(str(config.get("model_type")))
        sound = self._blocks(config, family, weights[0]) if family is not None else self._unknown(config)
        self._values(weights[0])
        self._known_faults(config)
        self._recorded_hashes()
        self._tokenizer(config, family, weights[0])
        if sound:
            self._loads(weights[0])

    def _step(self, what: str, do: Callable[[], Any], says: Callable[[Any], str]) -> Any:
        """Do something; a ShortstackError is a failed check."""
        try:
            result = do()
        except ShortstackError as error:
            self._add(what, "fail", error.message.removeprefix(f"{self._directory}: "))
            return None
        self._add(what, "ok", says(result))
        return result

    def _add(self, what: str, status: Status, says: str) -> None:
        self.findings.append(Finding(what, status, says))

    def _unknown(self, config: dict[str, Any]) -> bool:
        self._add(
            "blocks", "note", f"the family {config.get('model_type')!r} is not in the table; blocks are not compared"
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

    def _values(self, tensors: dict[str, TensorInfo]) -> None:
        total = sum(tensor.nbytes for tensor in tensors.values())
        with self._progress.bar("values", total, "B") as advance:
            broken = first_nonfinite(tensors.values(), advance)
        if broken:
            self._add("values", "fail", f"tensor {broken!r} holds NaN or infinity")
        else:
            self._add("values", "ok", "no NaN, no infinity")

    def _known_faults(self, config: dict[str, Any]) -> None:
        repair = repair_for(config, self._directory)
        if repair is not None:
            self._add("known faults", "fail", repair.says)
        if config.get("use_cache") is False:
            self._add("use_cache", "note", "is false in config.json, as training leaves it: generation will be slow")

    def _recorded_hashes(self) -> None:
        try:
            record = provenance.read(self._directory)
        except ShortstackError as error:
            self._add("shortstack.json", "fail", error.message)
            return
        for name, digest in (record or {}).get("files", {}).items():
            path = self._directory / name
            with contextlib.suppress(OSError):
                if path.stat().st_size < 1 << 28 and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                    self._add("recorded hashes", "fail", f"{name} is not the file that shortstack.json records")
                    return
        if record:
            self._add("recorded hashes", "ok", f"{len(record.get('files', {}))} files as shortstack.json records them")

    def _tokenizer(self, config: dict[str, Any], family: Family | None, tensors: dict[str, TensorInfo]) -> None:
        try:
            tokenizer = tokenizer_in(self._directory, self._source, trust_remote_code=self._trust)
        except ShortstackError as error:
            self._add("tokenizer", "fail", error.message.removeprefix(f"{self._source}: "))
            return
        embedding = tensors.get(family.embedding) if family is not None else None
        rows = embedding.shape[0] if embedding is not None else (family or Family("")).text(config).get("vocab_size")
        largest = max(tokenizer.get_vocab().values(), default=0)
        if isinstance(rows, int) and largest >= rows:
            self._add("tokenizer", "fail", f"token id {largest}, but the embedding has {rows} rows")
        else:
            self._add("tokenizer", "ok", f"{len(tokenizer)} tokens")
        self._special_ids(config, tokenizer)
        self._chat_template(tokenizer)

    def _special_ids(self, config: dict[str, Any], tokenizer: Any) -> None:
        """End-of-text decides where generation stops: config and tokenizer must mean the same."""
        stated = config.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [stated]
        own = tokenizer.eos_token_id
        if stated is None or own is None:
            self._add("end of text", "note", f"config says {stated}, the tokenizer {own}")
        elif own in ids:
            self._add("end of text", "ok", f"token {own}")
        else:
            self._add("end of text", "fail", f"config says {stated}, the tokenizer {own}")

    def _chat_template(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            self._add("chat template", "note", "there is none")
            return
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except Exception as error:  # templates are programs
            self._add("chat template", "fail", f"cannot be rendered: {first_line(error)[:200]}")
            return
        holds = "Hello" in text
        self._add("chat template", "ok" if holds else "fail", "renders a message" if holds else "loses the message")

    def _loads(self, tensors: dict[str, TensorInfo]) -> None:
        """As a user loads it, with the keys that transformers would invent or leave out without an error."""
        import torch
        from transformers import AutoModelForCausalLM

        stored, wide = sum(t.nbytes for t in tensors.values()), 4 * sum(t.numel for t in tensors.values())
        free = available_bytes()
        if min(stored, wide) > free:
            self._add("loads", "note", f"not tried: {size(min(stored, wide))} of weights, {size(free)} of memory free")
            return
        # In the checkpoint's own precision, with and without a cache may differ by rounding alone.
        self._exact = wide <= free
        try:
            with quiet_transformers():
                model, info = AutoModelForCausalLM.from_pretrained(
                    self._directory,
                    dtype=torch.float32 if self._exact else "auto",
                    output_loading_info=True,
                    trust_remote_code=self._trust,
                )
        except Exception as error:  # transformers raises whatever a config class raises
            self._add("loads", "fail", f"transformers cannot load it: {first_line(error)[:200]}")
            return
        self._add("loads", "ok", type(model).__name__)
        for kind in ("missing_keys", "unexpected_keys"):
            keys = sorted(str(key) for key in info.get(kind, ()))
            name = kind.replace("_", " ")
            self._add(name, "fail" if keys else "ok", f"{keys[0]} ({len(keys)})" if keys else "none")
        if not info.get("missing_keys"):
            self._generates(model.eval())

    def _generates(self, model: Any) -> None:
        import torch

        text = model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        length = (
            _PROMPT_TOKENS if not isinstance(positions, int) else max(1, min(_PROMPT_TOKENS, positions - _NEW_TOKENS))
        )
        ids = torch.arange(3, 3 + length)[None] % text.vocab_size
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # whatever a wrong config leads to
            self._add("forward", "fail", f"fails: {first_line(error)[:200]}")
            return
        if not bool(torch.isfinite(logits).all()):
            self._add("forward", "fail", "logits hold NaN or infinity")
            return
        self._add("forward", "ok", f"logits {list(logits.shape)}, all finite")
        self._add("positions", "ok", f"{positions}" if positions else "not limited by the config")
        self._caches(model, ids)

    def _caches(self, model: Any, ids: torch.Tensor) -> None:
        uncached = self._generated(model, ids, use_cache=False)
        if isinstance(uncached, str):
            self._add("generation", "fail", f"without a cache: {uncached}")
            return
        self._add("generation", "ok", f"{len(uncached) - ids.shape[1]} tokens without a cache")
        for what, options in (("cached generation", {}), ("static cache", {"cache_implementation": "static"})):
            found = self._generated(model, ids, use_cache=True, **options)
            if isinstance(found, str):
                # A static cache is not for every architecture; a plain one is.
                self._add(what, "note" if options else "fail", found)
            elif found != uncached:
                same = next(i for i, (a, b) in enumerate(zip(found, uncached, strict=False)) if a != b) - ids.shape[1]
                rounding = "" if self._exact else f" (in {model.dtype}: it may be rounding)"
                says = f"gives other tokens than without a cache, from new token {same} on{rounding}"
                self._add(what, "fail" if self._exact else "note", says)
            else:
                self._add(what, "ok", "the same tokens as without")

    def _generated(self, model: Any, ids: torch.Tensor, **options: Any) -> list[int] | str:
        import torch

        try:
            with torch.no_grad(), quiet_transformers():
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
                    eos_token_id=None, pad_token_id=0, **options,
                )  # fmt: skip
        except Exception as error:  # generation fails in as many ways as there are caches
            return first_line(error)[:200]
        return [int(token) for token in made[0]]


def _weights_text(weights: tuple[dict[str, TensorInfo], dict[Path, Any]]) -> str:
    tensors, shards = weights
    return f"{len(tensors)} tensors in {len(shards)} file{'s' if len(shards) > 1 else ''}; headers and index agree"
