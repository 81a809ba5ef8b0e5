"""load refuses broken checkpoints in one line that names the file or tensor, reading no tensor."""

import json

import ml_dtypes
import numpy as np
import pytest
from exports import BF16, CFG, GATE, INDEX, PARAMS, TENSORS, write

from v4jax.checkpoint import load, load_safetensors, save_safetensors


def no_reading(monkeypatch):
    """From here on, reading a tensor fails the test."""
    monkeypatch.setattr(
        load,
        "fill_tree",
        lambda *args: pytest.fail("a tensor was read before the checks were done"),
    )


def without(*names):
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


E4M3 = ml_dtypes.float8_e4m3fn
WQ_A = "layers.0.attn.wq_a.weight"


def table(row, value):
    ids = TENSORS[GATE].copy()
    ids[row] = value
    return TENSORS | {GATE: ids}


_BAD_TENSORS = [
    ({}, r"missing tensor embed.weight \[97, 48\] \(and \d+ more\)"),
    (without("layers.3.attn.attn_sink"), r"missing tensor layers.3.attn.attn_sink \[6\]$"),
    (
        without(*(name for name in TENSORS if name.startswith("mtp."))),
        "missing tensor mtp.0.attn_norm.weight",
    ),
    (TENSORS | {"layers.7.x": np.zeros(3, np.float32)}, r"unexpected tensor layers.7.x \[3\]$"),
    (
        TENSORS | {"layers.3.ffn.gate.tid2eid": TENSORS[GATE]},
        "unexpected tensor layers.3.ffn.gate.tid2eid",
    ),
    (
        TENSORS | {"layers.4.attn.wo_a.weight": np.zeros((48, 24), np.float32)},
        r"tensor layers.4.attn.wo_a.weight: got shape \[48, 24\]; must be \[24, 48\]",
    ),
    (
        TENSORS | {"norm.weight": np.ones(48, np.float16)},
        "tensor norm.weight: got F16; allowed: F32, BF16",
    ),
    (TENSORS | {"norm.weight": np.ones(48)}, "tensor norm.weight: got F64; allowed: F32, BF16"),
    (TENSORS | {GATE: TENSORS[GATE].astype(BF16)}, f"tensor {GATE}: got BF16; allowed: I64, I32"),
    (
        TENSORS | {WQ_A: TENSORS[WQ_A].astype(E4M3)},
        r"layers.0.attn.wq_a.weight: got F8_E4M3 with no scales \(layers.0.attn.wq_a.scale\); "
        r"allowed: F32, F8_E8M0, U8",
    ),
    (
        TENSORS | {"layers.0.attn.wq_a.scale": np.ones((1, 1), np.float32)},
        "layers.0.attn.wq_a.weight: got F32 with F32 scales .*; allowed: None",
    ),
    (
        TENSORS
        | {
            WQ_A: TENSORS[WQ_A].astype(E4M3),
            "layers.0.attn.wq_a.scale": np.ones((1, 2), np.float32),
        },
        r"tensor layers.0.attn.wq_a.scale: got shape \[1, 2\]; must be \[1, 1\]",
    ),
    (
        TENSORS | {"layers.0.ffn.experts.0.w1.weight": np.ones((40, 24), np.int8)},
        "layers.0.ffn.experts.0.w1.weight: got I8 with no scales",
    ),
    (
        TENSORS | {"embed.weight": TENSORS["embed.weight"].astype(E4M3)},
        "embed.weight: got F8_E4M3; allowed: F32, BF16",
    ),
    (
        TENSORS | {WQ_A: np.ones((20, 24), np.int8)},
        "wq_a.weight: got I8; allowed: F32, BF16, F8_E4M3",
    ),
    (
        without("mtp.0.enorm.weight"),
        "tensor mtp.0.[a-z_.]*: is of a DSpark drafter, and config.json has no dspark_",
    ),
    (
        TENSORS | {"mtp.1.enorm.weight": np.ones(48, np.float32)},
        "tensor mtp.1.enorm.weight: is of a DSpark drafter, and config.json has no dspark_",
    ),
    (
        TENSORS | {"model.norm.weight": np.ones(48, np.float32)},
        "got both .*norm.weight, two names of norm.weight",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), _BAD_TENSORS)
def test_headers_are_refused_before_any_tensor_is_read(tmp_path, monkeypatch, tensors, message):
    directory = write(tmp_path / "in", tensors)
    no_reading(monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        load_safetensors(directory)
    assert str(error.value).startswith(str(directory)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (table((5, 1), 6), f"{GATE}: got expert id 6; must be in .0, n_routed_experts=6."),
        (table((5, 1), -1), f"{GATE}: got expert id -1"),
    ],
)
def test_hash_tables_are_refused_before_other_tensors_are_placed(tmp_path, tensors, message):
    placed = []
    with pytest.raises(ValueError, match=message):
        load_safetensors(
            write(tmp_path / "in", tensors), put=lambda path, leaf: placed.append(path)
        )
    assert all(path[-1] == "tid2eid" for path in placed)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (table(7, 3), f"{GATE}: row 7 is [3, 3]: one expert twice"),
        (
            TENSORS | {GATE: 0 * TENSORS[GATE]},
            f"{GATE}: row 0 is [0, 0]: one expert twice; the table is all zeros",
        ),
    ],
)
def test_a_repeated_expert_is_read_with_a_warning_in_the_log(tmp_path, caplog, tensors, message):
    load_safetensors(write(tmp_path / "in", tensors))
    assert message in caplog.text


def sharded(directory):
    save_safetensors(CFG, PARAMS, directory, max_file_bytes=150_000)
    return json.loads((directory / INDEX).read_text())["weight_map"]


def edit_index(directory, change):
    path = directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first_file(directory):
    return sorted(directory.glob("*.safetensors"))[0]


_BAD_FILES = {
    "file gone": (
        lambda d: first_file(d).unlink(),
        f"{INDEX}: names model-00001-of-.*, which does not exist",
    ),
    "truncated": (
        lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-10]),
        "model-00001-of-.*: not a readable safetensors file: ",
    ),
    "garbage": (
        lambda d: first_file(d).write_bytes(b"x" * 500),
        "model-00001-of-.*: not a readable safetensors file",
    ),
    "empty": (
        lambda d: first_file(d).write_bytes(b""),
        "model-00001-of-.*: not a readable safetensors file",
    ),
    "index not JSON": (
        lambda d: (d / INDEX).write_text("{"),
        f"{INDEX}: expected a JSON object with .weight_map",
    ),
    "index a list": (
        lambda d: (d / INDEX).write_text("[]"),
        f"{INDEX}: expected a JSON object with .weight_map",
    ),
    "map a list": (
        lambda d: (d / INDEX).write_text('{"weight_map": [1]}'),
        f"{INDEX}: expected a JSON object",
    ),
    "another folder": (
        lambda d: edit_index(d, lambda m: m.update({"embed.weight": "../x.safetensors"})),
        "got file '../x.safetensors'; must be a file name in this directory",
    ),
    "not a name": (lambda d: edit_index(d, lambda m: m.update({"embed.weight": 5})), f"{INDEX}: "),
    "unlisted": (
        lambda d: edit_index(d, lambda m: m.pop("embed.weight")),
        "model-00001-of-.*: holds embed.weight, which .* places in None",
    ),
    "listed in vain": (
        lambda d: edit_index(d, lambda m: m.update({"ghost.weight": m["embed.weight"]})),
        "model-00001-of-.*: lacks ghost.weight, which .* places there",
    ),
    "no index": (lambda d: (d / INDEX).unlink(), rf"got \d+ .*safetensors files and no {INDEX}"),
    "two checkpoints": (
        lambda d: write(d),
        f"got model.safetensors, and {INDEX} that does not name it",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "other model": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "model_type: got 'llama'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), _BAD_FILES.values(), ids=_BAD_FILES)
def test_damaged_directories_are_refused(tmp_path, monkeypatch, damage, message):
    sharded(tmp_path / "in")
    damage(tmp_path / "in")
    no_reading(monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        load_safetensors(tmp_path / "in")
    assert str(error.value).startswith(str(tmp_path / "in")) and "\n" not in str(error.value)


def test_nothing_to_load_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_safetensors(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_dict()))
    with pytest.raises(ValueError, match="got 0 .*safetensors files"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "int32", None, 3, "float64"])
def test_only_known_dtypes(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16'"):
        load_safetensors(write(tmp_path / "in"), dtype=dtype)
    with pytest.raises(
        ValueError, match=f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16', 'fp8', 'official'"
    ):
        save_safetensors(CFG, PARAMS, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
