"""A small program that speaks the protocols of external engines, and misbehaves on demand.

It is called by the names of their programs; `behaviour.json` beside it says what it does instead of its work.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

_PROGRAM = '''
import http.server, json, os, signal, sys
from pathlib import Path

here = Path(sys.argv[0]).absolute().parent
name = Path(sys.argv[0]).name
behaviour = json.loads((here / "behaviour.json").read_text())
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({"name": name, "arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\\n")


def option(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def misbehave(how):
    if how == "hang":
        print("loading the model", file=sys.stderr, flush=True)
        signal.pause()
    if how == "die":
        print("note: starting\\nRuntimeError: the engine has no kernel for this\\nbye", file=sys.stderr)
        sys.exit(3)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "other tokens":
        print("vllm.exceptions.VLLMValidationError: Token id 9923 is out of vocabulary", file=sys.stderr)
        sys.exit(1)
    if how == "no memory":
        print("ValueError: No available memory for the cache blocks. CUDA out of memory.", file=sys.stderr)
        sys.exit(1)


def vllm():
    if "--version" in sys.argv:
        misbehave(behaviour.get("version call"))
        if "version error" in behaviour:
            sys.exit(behaviour["version error"])
        print(behaviour.get("version", "0.32.0"))
        return
    misbehave(behaviour.get("bench"))
    if "throughput" in sys.argv:
        record = {"elapsed_time": 2.0, "num_requests": int(option("--num-prompts")), "requests_per_second": 3.0}
        Path(option("--output-json")).write_text(json.dumps({} if behaviour.get("throughput") == "rubbish" else record))
        return
    runs, new = int(option("--num-iters")), int(option("--output-len"))
    seconds = [0.5 + 0.1 * new + 0.01 * run for run in range(runs)]
    text = json.dumps({"avg_latency": 1.0, "latencies": seconds, "percentiles": {}})
    if behaviour.get("bench") == "rubbish":
        text = "WARNING: not what you asked for"
    if behaviour.get("bench") == "too few":
        text = json.dumps({"latencies": seconds[:1]})
    print("Warming up...")
    Path(option("--output-json")).write_text(text)


def llama_bench():
    misbehave(behaviour.get("bench"))
    if behaviour.get("bench") == "rubbish":
        print("| model | size | t/s |")
        return
    prompt, new, runs = int(option("-p")), int(option("-n")), int(option("-r"))
    common = {"build_commit": "abc", "build_number": behaviour.get("build", 6000)}
    rows = [
        {**common, "n_prompt": prompt, "n_gen": 0, "samples_ns": [int(2e8) + run for run in range(runs)]},
        {**common, "n_prompt": 0, "n_gen": new, "samples_ns": [int(1e9) + run for run in range(runs)]},
    ]
    print("load_backend: loaded CPU backend")
    print(json.dumps(rows))


def llama_batched_bench():
    misbehave(behaviour.get("bench"))
    if behaviour.get("bench") == "rubbish":
        print('{"pp": 4}')
        return
    for batch in option("-npl").split(","):
        row = {"pp": int(option("-npp")), "tg": int(option("-ntg")), "pl": int(batch), "t_pp": 0.25, "t_tg": 0.75}
        print(json.dumps(row))


def llama_server(port=None):
    misbehave(behaviour.get("server"))
    written = iter(behaviour.get("tokens", []))

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, record):
            text = json.dumps(record).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.answer({"status": "ok"})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                texts = behaviour.get("ids", {})
                self.answer({"tokens": texts[request["content"]]} if behaviour.get("ids") != "rubbish" else {})
                return
            new, length = request["n_predict"], len(request["prompt"])
            tokens = next(written, None) or [request["prompt"][-1] + 1 + at for at in range(new)]
            times = {"prompt_n": length, "prompt_ms": 200.0, "predicted_n": new, "predicted_ms": 1000.0}
            times = behaviour.get("timings", times)
            record = {"tokens": tokens, "timings": times}
            self.answer({"content": ""} if behaviour.get("server") == "rubbish" else record)

    server = http.server.HTTPServer(("127.0.0.1", int(option("--port", 0))), Handler)
    if port is not None:
        port(server.server_address[1])
    server.serve_forever()


def python():
    """The engine's Python, which is given a worker: answers as the worker would."""
    if "--version" in sys.argv or "bench" in sys.argv:
        return vllm()
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        misbehave(behaviour.get("worker"))
        if behaviour.get("worker") == "rubbish":
            print("INFO loading", flush=True)
        elif behaviour.get("worker") == "raise":
            for line in behaviour.get("log", []):
                print(line, file=sys.stderr, flush=True)
            print(json.dumps({"error": behaviour.get("error", "ValueError: no such architecture")}), flush=True)
        elif number == 0 and request["engine"] == "llama.cpp":
            url = "http://127.0.0.1:%d"
            llama_server(lambda port: print(json.dumps({"version": "xllamacpp 1", "url": url % port}), flush=True))
        elif number == 0:
            print(json.dumps({"version": behaviour.get("version", "0.32.0")}), flush=True)
        else:
            rows = [[7] * request["new_tokens"] for _ in request["prompts"]]
            print(json.dumps({"tokens": behaviour.get("tokens", rows)}), flush=True)


{"vllm": vllm, "llama-bench": llama_bench, "llama-batched-bench": llama_batched_bench, "llama-server": llama_server,
 "python": python}[name]()
'''


def programs(folder: Path, **behaviour: Any) -> Path:
    """A folder with the programs of all engines, which behave so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vllm", "llama-bench", "llama-batched-bench", "llama-server", "python"):
        path = folder / name
        path.write_text(f"#!{sys.executable} -S\n{textwrap.dedent(_PROGRAM)}")
        path.chmod(0o755)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def environments(folder: Path, *engines: str, **behaviour: Any) -> Path:
    """A folder such as `make engines` fills: an environment for each engine, whose Python behaves so."""
    for engine in engines:
        programs(folder / engine / "bin", **behaviour)
    return folder


def calls(folder: Path) -> list[dict[str, Any]]:
    """What the programs were called with."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
