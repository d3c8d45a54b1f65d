"""Real engines, where they are found: the same greedy tokens as transformers in float32, and times that make sense.

vLLM: the Python of its environment is $SHORTSTACK_VLLM_PYTHON, or in .engines/vllm. llama.cpp: its programs are in the folder
$SHORTSTACK_LLAMA_CPP, or on PATH; $SHORTSTACK_GGUF_MODEL is a checkpoint with a GGUF file beside it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shortstack.benchmark.engines import open_engine
from shortstack.benchmark.options import EngineOptions
from tests import pico
from tests.benchmark.material import subject, workload

pytestmark = pytest.mark.engine
ROOT = Path(__file__).resolve().parents[3]
VLLM = Path(os.environ.get("SHORTSTACK_VLLM_PYTHON", ROOT / ".engines/vllm/bin/python"))
LLAMA = os.environ.get("SHORTSTACK_LLAMA_CPP") or (shutil.which("llama-server") and "")
PROMPTS = [[1, 44, 75, 80, 91], [1, 9, 8, 7]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Wide enough for the attention kernels of engines."""
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return pico.build(tmp_path / "model", "llama", max_position_embeddings=256, **sizes)


@pytest.mark.skipif(not VLLM.is_file(), reason=f"vLLM's Python was not found ({VLLM})")
def test_vllm(model: Path) -> None:
    one = subject(model)
    own = open_engine("transformers", one, EngineOptions())
    vllm = open_engine("vllm", one, EngineOptions(engine_python=VLLM))
    try:
        assert vllm.greedy(PROMPTS, 8) == own.greedy(PROMPTS, 8)
    finally:
        vllm.stop()


@pytest.mark.skipif(
    LLAMA is None or "SHORTSTACK_GGUF_MODEL" not in os.environ,
    reason="llama.cpp was not found (llama-server on PATH), or no checkpoint with a GGUF file is named",
)
def test_llama_cpp() -> None:
    one = subject(Path(os.environ["SHORTSTACK_GGUF_MODEL"]))
    own = open_engine("transformers", one, EngineOptions())
    options = EngineOptions(engine_binary=Path(LLAMA) if LLAMA else None, engine_args="-t 1")
    llama = open_engine("llama.cpp", one, options)
    llama.start()
    try:
        assert llama.greedy(PROMPTS, 8) == own.greedy(PROMPTS, 8)
        assert [sample.steps for sample in llama.bench(workload(1, 16, 8), runs=2, warmup=1)] == [8, 8]
    finally:
        llama.stop()
