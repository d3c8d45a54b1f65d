"""Run by an engine's own Python, where shortstack is not installed: greedy tokens for lines of JSON.

The first line is {"engine": NAME, "model": PATH, "dtype": "float32", "length": N}, and what is answered holds the engine's
version: {"version": "0.32.0"}. Each further line {"prompts": [[1, 2], ...], "new_tokens": N} is answered by
{"tokens": [[...], ...]}. llama.cpp's server answers for itself: {"version": ..., "url": ...} says where. What goes wrong is
{"error": "..."}.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

Tokens = list[list[int]]
Continue = Callable[[list[list[int]], int], Tokens]


def main() -> None:
    """Answer line by line until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    generate: Continue | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if generate is None:
                generate, answer = LOADERS[request["engine"]](request)
            else:
                answer = {"tokens": generate(request["prompts"], request["new_tokens"])}
        except Exception as error:  # whatever an engine raises is told, not lost with the process
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def vllm(request: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """By vLLM's Python class."""
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        model=request["model"], dtype=request["dtype"], max_model_len=request["length"], enforce_eager=True, seed=0
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> Tokens:
        how = vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, {"version": vllm.__version__}


def transformers(request: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """By the transformers of another environment."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"]), local_files_only=True
    ).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> Tokens:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            found.append(made[0, len(prompt) :].tolist())
        return found

    return generate, {"version": transformers.__version__}


def mlx(request: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """By mlx-lm, with weights made as wide as requested: it would compute in the checkpoint's own type."""
    from importlib.metadata import version

    import mlx.core as mx  # type: ignore[import-not-found]
    from mlx_lm import load  # type: ignore[import-not-found]
    from mlx_lm.generate import generate_step  # type: ignore[import-not-found]

    model = load(request["model"])[0]
    model.set_dtype(getattr(mx, request["dtype"]))

    def generate(prompts: list[list[int]], new_tokens: int) -> Tokens:
        steps = [generate_step(mx.array(prompt), model, max_tokens=new_tokens) for prompt in prompts]
        return [[int(token) for token, _ in step] for step in steps]

    return generate, {"version": f"{version('mlx')} (mlx-lm {version('mlx-lm')})"}


def openvino(request: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """By OpenVINO GenAI, of an export by optimum-intel that is thrown away afterwards."""
    from optimum.exporters.openvino import main_export  # type: ignore[import-not-found]

    folder = tempfile.TemporaryDirectory(prefix="shortstack-openvino-")
    main_export(request["model"], folder.name, task="text-generation-with-past", local_files_only=True)
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]

    precision = {"float32": ov.Type.f32, "float16": ov.Type.f16, "bfloat16": ov.Type.bf16}[request["dtype"]]
    pipe = openvino_genai.LLMPipeline(folder.name, "CPU", INFERENCE_PRECISION_HINT=precision)

    def generate(prompts: list[list[int]], new_tokens: int) -> Tokens:
        assert folder.name
        found = []
        for prompt in prompts:
            how = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
            ids = openvino_genai.TokenizedInputs(ov.Tensor([prompt]), ov.Tensor([[1] * len(prompt)]))
            found.append([int(token) for token in pipe.generate(ids, how).tokens[0]])
        return found

    return generate, {"version": ov.__version__}


def llama_cpp(request: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """llama.cpp's server inside xllamacpp; it answers over HTTP until this process ends."""
    import xllamacpp  # type: ignore[import-not-found]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx, parameters.n_parallel, parameters.port = request["length"], 1, 0
    if request["threads"]:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    server = xllamacpp.Server(parameters)

    def generate(*_: Any) -> Tokens:
        raise RuntimeError(f"ask {server.listening_address}")

    return generate, {"version": f"xllamacpp {xllamacpp.__version__}", "url": server.listening_address}


LOADERS = {"vllm": vllm, "transformers": transformers, "mlx": mlx, "openvino": openvino, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    main()
