"""llama.cpp: its own llama-bench (batch 1) and llama-batched-bench for times, its server for greedy tokens.

The server is the program llama-server, or the one inside the Python package xllamacpp, which has no other program: then its
own clock times batch 1.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.benchmark.engines import DoesNotFitError, EngineError, Sample, Workload
from shortstack.benchmark.engines.program import Background, background, environment, found_program, run_program
from shortstack.benchmark.engines.worker import Worker, installed_python, threads
from shortstack.benchmark.options import EngineOptions
from shortstack.checkpoint.gguf import Gguf
from shortstack.errors import ShortstackError
from shortstack.evaluation.evaluated_model import Subject

_OLDEST = 4400  # the first builds whose server gives token ids
_UNNUMBERED = 1000  # built from a copy without its history, a build is number 0 or 1
_HINT = (
    "give the folder of llama.cpp's programs with --engine-binary; or pip install xllamacpp in an environment of its own, "
    "and give its Python with --engine-python"
)
_FOLDER = "llama"  # of its Python, where `make engines` installs it
# GGML types of weights by number, as far as they are common.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 30: "BF16",
}  # fmt: skip
_LOCAL = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # a server on this machine, whatever proxies are set
_ROOM = 1024  # tokens, at least
_NO_MEMORY = ("out of memory", "failed to allocate", "unable to allocate", "cannot allocate")


class LlamaCppEngine:
    """One checkpoint in llama.cpp, from the GGUF file that was made from it."""

    name = "llama.cpp"
    in_process = False

    def __init__(self, subject: Subject, options: EngineOptions, gguf: Path | None = None) -> None:
        self._subject, self._options, self._gguf = subject, options, gguf
        self._closing = contextlib.ExitStack()
        self._url = ""
        self.version = ""
        self.precision = ""
        self.notes: list[str] = []
        self.peak_rss_bytes: int | None = None

    def find(self) -> None:
        """Look for its server."""
        if self._python() is None:
            self._program("llama-server")

    def start(self) -> None:
        """Find the programs and the GGUF file."""
        file = self._file()
        note = f"llama.cpp: {file.name} ({self.precision}), sampling is not timed"
        if self._python() is not None:
            self.notes = [f"{note}; times are those that its server reports"]
            return
        self._program("llama-bench")
        self.notes = [
            f"{note}; llama.cpp chooses the tokens of prompts; at batch 1 decoding starts from an empty context, with a step "
            "for each new token"
        ]

    def bench(self, workload: Workload, *, runs: int, warmup: int) -> list[Sample]:
        """One call of llama-bench, which warms up by itself, or of llama-batched-bench, with that many runs more.

        Of a server inside a Python package, batch 1 alone, request by request.
        """
        if self._python() is not None:
            return self._by_server(workload, runs, warmup)
        if workload.batch == 1:
            return self._plain(workload, runs)
        return self._batched(workload, runs, warmup)

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """By its server, which stays until `stop`."""
        self._serve(max(map(len, prompts)) + new_tokens)
        return [self._completed(prompt, new_tokens)["tokens"] for prompt in prompts]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """By its server: the tokenizer is in the GGUF file."""
        self._serve(0)
        found = []
        for text in texts:
            answer = self._post("tokenize", {"content": text, "add_special": True})
            tokens = answer.get("tokens") if isinstance(answer, dict) else None
            if not isinstance(tokens, list):
                raise EngineError(f"llama.cpp: expected the tokens of a text, found {str(answer)[:120]}", hint=_HINT)
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
            self.version = _version(int(rows[0]["build_number"]), str(rows[0]["build_commit"]))
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

    def _by_server(self, workload: Workload, runs: int, warmup: int) -> list[Sample]:
        if workload.batch > 1:
            raise EngineError(
                f"llama.cpp: batch {workload.batch} is timed by llama-batched-bench, which a Python package does not have",
                hint="build llama.cpp, and give the folder of its programs with --engine-binary; or --batch 1",
            )
        self._serve(workload.prompt_tokens + workload.new_tokens)
        samples = []
        for _ in range(warmup + runs):
            answer = self._completed(workload.prompt_ids, workload.new_tokens)
            try:
                times = answer["timings"]
                if times["prompt_n"] != workload.prompt_tokens:
                    raise ValueError(f"{times['prompt_n']} tokens of prompt were computed")
                samples.append(_sample(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3, workload.new_tokens - 1))
            except (ValueError, KeyError, TypeError) as error:
                raise _rubbish("llama.cpp's server", str(answer.get("timings")), error) from None
        return samples[warmup:]

    def _run(self, arguments: Sequence[str | int]) -> str:
        name = str(arguments[0])
        program, file = self._program(name), self._file()
        try:
            output = run_program(
                [program, "-m", file, *map(str, arguments[1:]), *self._further()],
                what=name, limit=self._options.time_limit,
            )  # fmt: skip
        except EngineError as error:
            if any(sign in error.message.lower() for sign in _NO_MEMORY):
                raise DoesNotFitError(f"{self._subject.name}: {error.message}") from None
            raise
        self.peak_rss_bytes = output.peak_rss_bytes
        return output.stdout

    def _further(self) -> list[str]:
        """The user's own arguments; threads that wait for a busy processor make it many times slower."""
        given, most = shlex.split(self._options.engine_args), threads()
        return given if most is None or {"-t", "--threads"} & set(given) else ["-t", str(most), *given]

    def _file(self) -> Path:
        file = self._gguf or gguf_of(self._subject)
        self.precision = weight_type(file)
        return file

    def _python(self) -> Path | None:
        """A Python that has its server as a package: by option, or where neither option nor PATH names a program."""
        options = self._options
        if options.engine_python is not None:
            return found_program(options.engine_python, ["python", "python3"], "a Python with xllamacpp", _HINT)
        return None if options.engine_binary is not None else installed_python(_FOLDER)

    def _program(self, name: str) -> Path:
        binary = self._options.engine_binary
        if binary is not None and not Path(binary).is_dir():
            binary = Path(binary).parent  # the others lie beside the one that was given
        return found_program(binary, [name], "llama.cpp", _HINT)

    def _completed(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        answer = self._post(
            "completion",
            {
                "prompt": list(prompt), "n_predict": new_tokens, "temperature": 0.0, "top_k": 1, "ignore_eos": True,
                "return_tokens": True, "cache_prompt": False, "stream": False,
            },
        )  # fmt: skip
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or len(tokens) != new_tokens:
            raise EngineError(f"llama-server: expected {new_tokens} tokens, found {str(answer)[:120]}", hint=_HINT)
        return {**answer, "tokens": [int(token) for token in tokens]}

    def _post(self, what: str, record: dict[str, Any]) -> Any:
        return _post(f"{self._url}/{what}", record, self._options.time_limit)

    def _serve(self, length: int) -> None:
        if self._url:
            return
        file, python, room = self._file(), self._python(), max(length, _ROOM)
        if python is not None:
            worker = Worker(
                self.name, python, file, dtype="", length=room, limit=self._options.time_limit, env=environment()
            )
            self._closing.callback(worker.close)
            self._url, self.version = worker.url, worker.version
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments: list[str | Path] = [
            self._program("llama-server"), "-m", file, "--host", "127.0.0.1", "--port", str(port), "-c", str(room),
            "-np", "1", *self._further(),
        ]  # fmt: skip
        server = self._closing.enter_context(background(arguments, what="llama-server"))
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(server, url, self._options.time_limit)
            with contextlib.suppress(OSError, ValueError):
                self.version = str(_get(f"{url}/props").get("build_info", self.version))
        except ShortstackError:
            self._closing.close()
            raise
        self._url = url


def gguf_files(subject: Subject) -> list[Path]:
    """The GGUF files in a checkpoint's directory; where there are none, NAME.gguf beside it."""
    directory = subject.checkpoint.directory
    beside = directory.with_name(f"{directory.name}.gguf")
    return sorted(directory.glob("*.gguf")) or ([beside] if beside.is_file() else [])


def gguf_of(subject: Subject) -> Path:
    """The GGUF file of a checkpoint: the only one in its directory, or NAME.gguf beside it.

    Raises:
        EngineError: there is none, several, or one that is older than the weights.
    """
    checkpoint, found = subject.checkpoint, gguf_files(subject)
    beside = checkpoint.directory.with_name(f"{checkpoint.directory.name}.gguf")
    make = f"shortstack export gguf {subject.name} --out {beside.name}, beside the checkpoint"
    if len(found) != 1:
        says = "no GGUF file in it, and no " + beside.name + " beside it" if not found else "several GGUF files in it"
        raise EngineError(f"{subject.name}: llama.cpp runs GGUF files; {says}", hint=make)
    if found[0].stat().st_mtime < max(path.stat().st_mtime for path in checkpoint.shards):
        raise EngineError(f"{found[0]}: older than the weights of {subject.name}", hint=make)
    return found[0].absolute()


def weight_type(file: Path) -> str:
    """The GGML type that most matrices of a GGUF file are stored in, such as `F16` or `Q8_0`.

    Raises:
        ShortstackError: it is no GGUF file, or is broken.
    """
    with file.open("rb") as stream:
        kinds = Counter(one.kind for one in Gguf(stream, str(file)).tensors.values() if len(one.shape) > 1)
    kind = kinds.most_common(1)[0][0] if kinds else -1
    return _TYPES.get(kind, f"GGML type {kind}")


def _version(build: int, commit: str) -> str:
    if build < _UNNUMBERED:
        return f"commit {commit}"
    if build < _OLDEST:
        raise EngineError(f"llama.cpp build {build} is too old: expected {_OLDEST} or newer", hint=_HINT)
    return f"build {build}"


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
        with contextlib.suppress(OSError, ValueError):
            if _get(f"{url}/health").get("status") == "ok":
                return
        pause.wait(0.1)
    raise server.error(f"was not ready within {limit:g} s", hint="set a longer --time-limit")


def _get(url: str) -> dict[str, Any]:
    with _LOCAL.open(url, timeout=5) as answer:
        found = json.load(answer)
    if not isinstance(found, dict):
        raise ValueError(f"no record: {str(found)[:40]}")
    return found


def _post(url: str, record: dict[str, Any], limit: float) -> Any:
    request = urllib.request.Request(
        url, json.dumps(record).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with _LOCAL.open(request, timeout=limit) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise EngineError(f"llama-server: {type(error).__name__}: {str(error)[:120]}") from None
