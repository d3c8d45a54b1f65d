"""Run by vLLM's own Python, where shortstack is not installed: greedy tokens for lines of JSON.

First line: {"model": DIR, "dtype": "float32", "max_model_len": N} -> {"version": "0.32.0"}. Then, for each line
{"prompts": [[1, 2], ...], "new_tokens": N} -> {"tokens": [[...], ...]}. What goes wrong is {"error": "..."}.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer line by line until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    llm = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if llm is None:
                llm, answer = loaded(request)
            else:
                answer = {"tokens": continued(llm, request)}
        except Exception as error:  # whatever vLLM raises is told, not lost with the process
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def loaded(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the model in vLLM, what is answered)."""
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        enforce_eager=True,
        seed=0,
    )
    return llm, {"version": vllm.__version__}


def continued(llm: Any, request: dict[str, Any]) -> list[list[int]]:
    """The most likely continuation of each prompt."""
    from vllm import SamplingParams

    new_tokens = request["new_tokens"]
    how = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], how, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
