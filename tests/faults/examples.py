"""Random checkpoints, plans and tables, and what must hold of every one: no traceback, no output that does not load."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from shortstack.checkpoint.headers import read_header
from shortstack.cli.app import explained
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune

SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
CONFIG_KEYS = st.sampled_from(
    [
        "model_type", "num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings", "layer_types",
        "mlp_layer_types", "quantization_config", "per_layer_config", "num_nextn_predict_layers", "auto_map",
        "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim", "text_config",
        "bos_token_id", "eos_token_id", "use_cache", "rope_scaling",
    ]
)  # fmt: skip
MODEL_TYPES = st.sampled_from(
    ["llama", "qwen2", "gemma2", "gpt2", "smollm3", "deepseek_v3", "jamba", "gemma3", "zamba2", "xlm"]
)


def quietly(do: Callable[[], object]) -> tuple[int, str]:
    """Do something as the command line would: (exit code, what it says on stderr). A traceback is a failed example."""
    said = io.StringIO()
    try:
        do()
    except Exception as error:
        with contextlib.redirect_stderr(said):
            code = explained(error)
        if code is None:
            raise
        return code, said.getvalue()
    return 0, ""


@contextlib.contextmanager
def copy_of(model: Path) -> Iterator[Path]:
    """A copy of a checkpoint that an example may break."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(model, Path(folder) / "model"))


def pruned_or_refused(model: Path, **options: Any) -> int:
    """Prune; a refusal is one or two lines, an output opens and is complete, and neither leaves anything beside it."""
    out = model.parent / "out"
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    code, said = quietly(lambda: prune(str(model), out=out, quiet=True, **options))
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
    if code == 0:
        assert open_checkpoint(out).depth >= 1
        if zlib.crc32((out / "config.json").read_bytes()) % 16 == 0:
            loads_if_the_input_does(model, out)
        shutil.rmtree(out)
    else:
        assert code in (1, 2)
        assert 1 <= len(said.splitlines()) <= 2, said
        assert not out.exists()
    assert {path.name for path in model.parent.iterdir()} <= {"model", "plan.json", "order.csv", "scores.json"}
    return code


def loads_if_the_input_does(model: Path, out: Path) -> None:
    """transformers takes the output where it takes the input, and invents no weight where it invented none."""
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    except Exception:
        return
    if info["missing_keys"]:  # llama's weights under the name of a family that has more
        return
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file: random bytes, a random header, or a sound one with something changed."""
    kind = draw(st.sampled_from(["bytes", "json", "entries", "flip"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "json":
        raw = json.dumps(draw(JSON)).encode()
        return len(raw).to_bytes(8, "little") + raw + draw(st.binary(max_size=20))
    header, position = {}, 0
    for name in draw(st.lists(st.text(max_size=5), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4
        for length in shape:
            size *= length
        off = draw(st.sampled_from([0, 0, 0, 0, 4, -4])) if kind == "entries" else 0
        dtype = draw(st.sampled_from(["F32", "F32", "F32", "I32", "F128", 3])) if kind == "entries" else "F32"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size + off]}
        position += size
    raw = json.dumps(header).encode()
    data = bytearray(len(raw).to_bytes(8, "little") + raw + b"\0" * position)
    if kind == "flip" and data:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 5]))])


def check_header(folder: Path, data: bytes) -> None:
    """Refused by name, or read as the reference implementation reads it."""
    from safetensors import SafetensorError, safe_open

    path = folder / "x.safetensors"
    path.write_bytes(data)
    try:
        found, _ = read_header(path)
    except ShortstackError as error:
        assert str(path) in error.message
        return
    try:
        with safe_open(path, "np") as file:
            assert {tensor.name for tensor in found} == set(file.keys())
    except SafetensorError as error:  # the reference refuses more names; never a size or an offset that was accepted
        assert "offset" not in str(error).lower(), error


@st.composite
def config_edits(draw: st.DrawFn) -> dict[str, Any]:
    """Entries to set in a sound config; None under a key of its own removes it."""
    edits = dict(draw(st.dictionaries(CONFIG_KEYS | st.text(max_size=8), JSON, max_size=3)))
    if draw(st.booleans()):
        edits["num_hidden_layers"] = draw(st.integers(-1, 8))
    if draw(st.integers(0, 3)) == 0:
        edits["model_type"] = draw(MODEL_TYPES)
    if draw(st.integers(0, 3)) == 0:
        edits["layer_types"] = draw(st.lists(st.sampled_from(["full_attention", "sliding_attention", 3]), max_size=8))
    return edits


BLOCKS = st.lists(st.integers(0, 7), min_size=1, max_size=5).map(lambda found: ",".join(map(str, found)))


def check_config(model: Path, edits: dict[str, Any], blocks: str) -> int:
    """Whatever stands in config.json: pruned soundly or refused."""
    with copy_of(model) as copy:
        config = {**json.loads((copy / "config.json").read_text()), **edits}
        (copy / "config.json").write_text(json.dumps(config))
        return pruned_or_refused(copy, blocks=blocks)


def check_index(model: Path, edits: dict[str, Any], blocks: str) -> int:
    """Whatever the index says of shards."""
    with copy_of(model) as copy:
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= edits
        path.write_text(json.dumps({key: value for key, value in index.items() if key not in edits}))
        return pruned_or_refused(copy, blocks=blocks)


def edited(record: Any, path: list[int], value: Any) -> Any:
    """A JSON value with one of its inner values replaced; `path` chooses which."""
    if not path or not isinstance(record, (dict, list)) or not record:
        return value
    if isinstance(record, dict):
        key = sorted(record)[path[0] % len(record)]
        return {**record, key: edited(record[key], path[1:], value)}
    index = path[0] % len(record)
    return [*record[:index], edited(record[index], path[1:], value), *record[index + 1 :]]


def check_record(model: Path, name: str, text: str, option: str, **options: Any) -> int:
    """Whatever stands in a plan, a scores file or a block order."""
    with copy_of(model) as copy:
        path = copy.parent / name
        path.write_text(text)
        return pruned_or_refused(copy, **{option: path}, **options)
