"""llama.cpp: its own llama-bench (batch 1) and llama-batched-bench for times, its llama-server for greedy tokens."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.benchmark.engines import DoesNotFitError, EngineError, Sample, Workload
from shortstack.benchmark.engines.program import Background, background, found_program, run_program
from shortstack.benchmark.options import EngineOptions
from shortstack.errors import ShortstackError
from shortstack.evaluation.evaluated_model import Subject

_OLDEST = 4400  # the first builds whose server gives token ids
_HINT = "build or install llama.cpp, and give the folder of its programs with --engine-binary"
_LOCAL = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # a server on this machine, whatever proxies are set
_NO_MEMORY = ("out of memory", "failed to allocate", "unable to allocate", "cannot allocate")


class LlamaCppEngine:
    """One checkpoint in llama.cpp, from the GGUF file that was made of it."""

    name = "llama.cpp"
    in_process = False

    def __init__(self, subject: Subject, options: EngineOptions) -> None:
        self._subject, self._options = subject, options
        self._closing = contextlib.ExitStack()
        self._url = ""
        self.version = ""
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None

    def start(self) -> None:
        """Find the programs and the GGUF file."""
        self._program("llama-bench")
        file = gguf_of(self._subject)
        self.notes = [
            f"llama.cpp: {file.name}, prompts are tokens of its own, sampling is not timed; at batch 1 decoding starts from "
            "an empty context, and takes a step for every new token"
        ]

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        """One call of llama-bench, which warms up by itself, or of llama-batched-bench, with that many runs more."""
        if workload.batch == 1:
            return self._plain(workload, runs)
        return self._batched(workload, runs, warmup)

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """By its server, which stays until `stop`."""
        if not self._url:
            self._serve(max(map(len, prompts)) + new_tokens)
        found = []
        for prompt in prompts:
            record = {
                "prompt": list(prompt), "n_predict": new_tokens, "temperature": 0.0, "top_k": 1, "ignore_eos": True,
                "return_tokens": True, "cache_prompt": False, "stream": False,
            }  # fmt: skip
            answer = _post(f"{self._url}/completion", record, self._options.time_limit)
            tokens = answer.get("tokens") if isinstance(answer, dict) else None
            if not isinstance(tokens, list) or len(tokens) != new_tokens:
                raise EngineError(f"llama-server: expected {new_tokens} tokens, found {str(answer)[:120]}", hint=_HINT)
            found.append([int(token) for token in tokens])
        return found

    def served_rate(self, workload: Workload) -> float | None:
        """It has no measure of its own."""

    def stop(self) -> None:
        """End its server."""
        self._closing.close()
        self._url = ""

    def _plain(self, workload: Workload, runs: int) -> list[Sample]:
        prompt, new = workload.prompt_tokens, workload.new_tokens
        output = self._run(["llama-bench", "-p", prompt, "-n", new, "-r", runs, "-o", "json"])
        try:
            rows = json.loads(output[output.index("[") :])
            if int(rows[0]["build_number"]) < _OLDEST:
                raise EngineError(
                    f"llama.cpp build {rows[0]['build_number']} is too old: expected {_OLDEST} or newer", hint=_HINT
                )
            self.version = f"build {rows[0]['build_number']}"
            times = {(row["n_prompt"], row["n_gen"]): [float(ns) / 1e9 for ns in row["samples_ns"]] for row in rows}
            prefill, decode = times[prompt, 0], times[0, new]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _rubbish("llama-bench", output, error) from None
        return [_sample(first, rest, new) for first, rest in zip(prefill, decode, strict=True)]

    def _batched(self, workload: Workload, runs: int, warmup: int) -> list[Sample]:
        batch, prompt, new = workload.batch, workload.prompt_tokens, workload.new_tokens
        often = ",".join([str(batch)] * (warmup + runs))
        output = self._run(
            ["llama-batched-bench", "-c", batch * (prompt + new), "-npp", prompt, "-ntg", new, "-npl", often,
             "--output-format", "jsonl"]
        )  # fmt: skip
        try:
            rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            samples = [_sample(float(row["t_pp"]), float(row["t_tg"]), new) for row in rows if row["pl"] == batch]
            if len(samples) != warmup + runs:
                raise ValueError(f"{len(samples)} rows of batch {batch}, expected {warmup + runs}")
        except (ValueError, KeyError, TypeError) as error:
            raise _rubbish("llama-batched-bench", output, error) from None
        return samples[warmup:]

    def _run(self, arguments: Sequence[str | int]) -> str:
        name = str(arguments[0])
        program = self._program(name)
        file = gguf_of(self._subject)
        try:
            output = run_program(
                [program, "-m", file, *map(str, arguments[1:]), *shlex.split(self._options.engine_args)],
                what=name, limit=self._options.time_limit,
            )  # fmt: skip
        except EngineError as error:
            if any(sign in error.message.lower() for sign in _NO_MEMORY):
                raise DoesNotFitError(f"{self._subject.name}: {error.message}") from None
            raise
        self.peak_rss_bytes = output.peak_rss_bytes
        return output.stdout

    def _program(self, name: str) -> Path:
        binary = self._options.engine_binary
        if binary is not None and not Path(binary).is_dir():
            binary = Path(binary).parent  # the others lie beside the one that was given
        return found_program(binary, [name], "llama.cpp", _HINT)

    def _serve(self, length: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments: list[str | Path] = [
            self._program("llama-server"), "-m", gguf_of(self._subject), "--host", "127.0.0.1", "--port", str(port),
            "-c", str(max(length, 256)), "-np", "1", *shlex.split(self._options.engine_args),
        ]  # fmt: skip
        server = self._closing.enter_context(background(arguments, what="llama-server"))
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(server, url, self._options.time_limit)
        except ShortstackError:
            self._closing.close()
            raise
        self._url = url


def gguf_of(subject: Subject) -> Path:
    """The GGUF file of a checkpoint: the only one in its directory, or NAME.gguf beside it.

    Raises:
        EngineError: there is none, several, or one that is older than the weights.
    """
    checkpoint = subject.checkpoint
    directory = checkpoint.directory
    beside = directory.with_name(f"{directory.name}.gguf")
    found = sorted(directory.glob("*.gguf")) or ([beside] if beside.is_file() else [])
    make = f"shortstack export gguf {subject.name} --out {beside.name}, beside the checkpoint"
    if len(found) != 1:
        says = "no GGUF file in it, and no " + beside.name + " beside it" if not found else "several GGUF files in it"
        raise EngineError(f"{subject.name}: llama.cpp runs GGUF files; {says}", hint=make)
    if found[0].stat().st_mtime < max(path.stat().st_mtime for path in checkpoint.shards):
        raise EngineError(f"{found[0]}: older than the weights of {subject.name}", hint=make)
    return found[0].absolute()


def _sample(prefill: float, decode: float, steps: int) -> Sample:
    if not (0 < prefill < float("inf") and 0 <= decode < float("inf")):
        raise ValueError(f"times of {prefill} and {decode} seconds")
    return Sample(prefill + decode, prefill, decode, steps)


def _rubbish(name: str, output: str, error: Exception) -> EngineError:
    found = output.strip()[:80]
    return EngineError(
        f"{name}: its JSON is not as expected ({type(error).__name__}: {str(error)[:80]}); it begins with {found!r}",
        hint=_HINT,
    )


def _wait_until_ready(server: Background, url: str, limit: float) -> None:
    ends = time.monotonic() + limit
    pause = threading.Event()
    while time.monotonic() < ends:
        if server.process.poll() is not None:
            raise server.error("ended before it was ready")
        with contextlib.suppress(OSError, ValueError), _LOCAL.open(f"{url}/health", timeout=5) as answer:
            if json.load(answer).get("status") == "ok":
                return
        pause.wait(0.1)
    raise server.error(f"was not ready within {limit:g} s", hint="a longer --time-limit")


def _post(url: str, record: dict[str, Any], limit: float) -> Any:
    request = urllib.request.Request(
        url, json.dumps(record).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with _LOCAL.open(request, timeout=limit) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise EngineError(f"llama-server: {type(error).__name__}: {str(error)[:120]}") from None
