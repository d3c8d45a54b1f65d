"""llama.cpp's own converter, where it is found: SmolLM2 dense and pruned, and a tokenizer that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shortstack.checkpoint.gguf import Gguf
from shortstack.errors import ShortstackError
from shortstack.pruning.prune import prune
from shortstack.publishing.export.gguf import export_gguf
from shortstack.publishing.export.prune_layers import export_prune_layers
from tests.engines import converter_python

pytestmark = pytest.mark.engine
REMOVED = "3,10-12,20"


@pytest.mark.slow
def test_a_real_model_dense_and_pruned(real_model: Path, tmp_path: Path) -> None:
    """The file of the pruned model is the dense model's without the listed blocks, tensor by tensor."""
    python, pruned = converter_python(), tmp_path / "p"
    prune(str(real_model), out=pruned, blocks=REMOVED, quiet=True)
    dense = export_gguf(str(real_model), out=tmp_path / "d.gguf", type="bf16", converter_python=python, quiet=True)
    found = export_gguf(str(pruned), out=tmp_path / "p.gguf", type="bf16", converter_python=python, quiet=True)
    assert (dense.blocks, found.blocks, found.tokens, found.says) == (30, 25, 49152, [])
    removed = export_prune_layers(str(pruned), quiet=True).layers
    kept = [number for number in range(30) if number not in removed]
    with (tmp_path / "d.gguf").open("rb") as one, (tmp_path / "p.gguf").open("rb") as other:
        whole, cut = Gguf(one, "dense"), Gguf(other, "pruned")
        for name in cut.tensors:
            head, number, rest = (*name.split(".", 2), "", "")[:3]
            of_dense = f"blk.{kept[int(number)]}.{rest}" if head == "blk" else name
            assert np.array_equal(cut.values(name), whole.values(of_dense)), name
        assert cut.metadata["tokenizer.ggml.tokens"] == whole.metadata["tokenizer.ggml.tokens"]


def test_a_tokenizer_that_it_does_not_know(built: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="does not know its tokenizer"):
        export_gguf(str(built()), out=tmp_path / "m.gguf", converter_python=converter_python(), quiet=True)
    assert list(tmp_path.iterdir()) == []
