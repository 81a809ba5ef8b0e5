"""Claims about v4jax/checkpoint/load.py and export.py."""

import json
import logging
import re
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from trees import random_params, small_config

from v4jax.checkpoint import export, load, load_safetensors, official_names, save_safetensors, to_official
from v4jax.checkpoint.files import write_file
from v4jax.checkpoint.names import official_shapes
from v4jax.config import ModelConfig

CFG = small_config()
PARAMS = random_params(CFG)
TENSORS = to_official(CFG, PARAMS)
BF16 = np.dtype(ml_dtypes.bfloat16)
INDEX = "model.safetensors.index.json"


def assert_same(got, expected):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert set(got) == set(expected)
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg="/".join(path))


def rounded(tree):
    """The tree as a bfloat16 file holds it."""
    kept = ("hc_attn", "hc_ffn", "hc_head", "attn_sink", "ape", "bias", "tid2eid")
    flat = flatten_dict(tree)
    return unflatten_dict({path: leaf if {*path} & {*kept} else leaf.astype(BF16) for path, leaf in flat.items()})


def write(directory, tensors=TENSORS, raw=None):
    """A one-file checkpoint written without `export`."""
    directory.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CFG.to_dict() if raw is None else raw))
    return directory


def no_reading(monkeypatch):
    """From here on, reading a tensor fails the test."""
    monkeypatch.setattr(load, "fill_tree", lambda *args: pytest.fail("a tensor was read before the checks were done"))


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 100_000, 1])
def test_float32_round_trip_is_exact(tmp_path, max_file_bytes):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", max_file_bytes=max_file_bytes)
    cfg, params = load_safetensors(tmp_path / "out")
    assert cfg == CFG
    assert_same(params, PARAMS)


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 100_000])
def test_bfloat16_round_trip_is_exact(tmp_path, max_file_bytes):
    save_safetensors(CFG, PARAMS, tmp_path / "a", max_file_bytes=max_file_bytes)
    _, params = load_safetensors(tmp_path / "a", dtype="bfloat16")
    assert_same(params, rounded(PARAMS))
    save_safetensors(CFG, params, tmp_path / "b", max_file_bytes=max_file_bytes)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_bfloat16_files_widen_exactly_and_float32_files_round(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "bf16")
    save_safetensors(CFG, PARAMS, tmp_path / "f32", dtype="float32")
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded(PARAMS))
    assert_same(load_safetensors(tmp_path / "bf16", dtype="float32")[1], wide)
    assert_same(load_safetensors(tmp_path / "f32", dtype="bfloat16")[1], rounded(PARAMS))


def test_arrays_spread_over_devices_are_saved_alike(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        axes = ["x" if size % mesh.size == 0 else None for size in leaf.shape]
        first = axes.index("x") + 1 if "x" in axes else 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes[:first])))

    save_safetensors(CFG, jax.tree.map(place, PARAMS), tmp_path / "jax")
    save_safetensors(CFG, PARAMS, tmp_path / "numpy")
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("jax", "numpy")]
    assert files[0] == files[1]


def test_files_of_others_load(tmp_path):
    assert_same(load_safetensors(write(tmp_path / "in"))[1], PARAMS)


def test_int32_hash_tables_load(tmp_path):
    tensors = {name: x.astype(np.int32) if name.endswith("tid2eid") else x for name, x in TENSORS.items()}
    assert_same(load_safetensors(write(tmp_path / "in", tensors))[1], PARAMS)


# ---- what export writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_stored_names_shapes_and_dtypes_are_official(tmp_path, dtype, stored):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        headers = {name: file.get_slice(name) for name in file.keys()}
        assert file.metadata() == {"format": "pt"}
    assert {name: tuple(header.get_shape()) for name, header in headers.items()} == official_shapes(CFG)
    for name, header in headers.items():
        fixed = re.search(r"hc_|attn_sink|ape$|gate\.bias", name)
        expected = "I64" if name.endswith("tid2eid") else "F32" if fixed else stored
        assert header.get_dtype() == expected, name


def test_values_are_in_official_orientation(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(TENSORS)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name], err_msg=name)


def test_config_json_is_official(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw == json.loads(json.dumps(CFG.to_dict())) | {"torch_dtype": "bfloat16"}
    assert raw["compress_ratios"] == [0, 0, 4, 128, 4, 128, 4, 0] and raw["rope_scaling"]["type"] == "yarn"
    assert "quantization_config" not in raw and "layer_types" not in raw


def test_pieces_respect_the_limit_and_the_index_lists_them(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=60_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"]) == set(official_names(CFG)) and sorted(set(index["weight_map"].values())) == files
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 60_000 and sum(sizes) == index["metadata"]["total_size"] and len(sizes) == len(files) > 5


def test_a_model_that_fits_is_one_file_without_index(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["config.json", "model.safetensors"]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of some megabytes, mostly experts, and its size in memory as float32."""
    cfg = small_config(hidden_size=96, moe_intermediate_size=128, n_routed_experts=16)
    directory = tmp_path_factory.mktemp("wide") / "out"
    params = random_params(cfg)
    save_safetensors(cfg, params, directory)
    load_safetensors(directory)  # shapes are traced once and kept
    return cfg, params, directory, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_loading_holds_one_copy(wide):
    _, _, directory, size = wide
    assert size > 2e7
    assert peak_of(lambda: load_safetensors(directory)) < 1.1 * size


def test_loading_with_put_holds_one_leaf(wide):
    _, params, directory, size = wide
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = peak_of(lambda: load_safetensors(directory, put=lambda path, leaf: None))
    assert peak < largest + 0.12 * size < 0.5 * size  # 1 800 headers take 2 MB


def test_saving_holds_one_tensor(wide, tmp_path):
    cfg, params, _, size = wide
    peak = peak_of(lambda: save_safetensors(cfg, params, tmp_path / "out", dtype="float32"))
    assert peak < 0.1 * size


def test_put_places_every_leaf(tmp_path):
    seen = {}

    def put(path, leaf):
        seen[path] = leaf
        return path

    _, params = load_safetensors(write(tmp_path / "in"), put=put)
    assert flatten_dict(params) == {path: path for path in flatten_dict(PARAMS)}
    for path, leaf in flatten_dict(PARAMS).items():
        np.testing.assert_array_equal(seen[path], leaf)


# ---- what load refuses -----------------------------------------------------------------------------------------------


def without(*names):
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


E4M3 = ml_dtypes.float8_e4m3fn
WQ_A = "layers.0.attn.wq_a.weight"
GATE = "layers.2.ffn.gate.tid2eid"


def table(row, value):
    ids = TENSORS[GATE].copy()
    ids[row] = value
    return TENSORS | {GATE: ids}


_BAD_TENSORS = [
    ({}, r"missing tensor embed.weight \[97, 48\] \(and \d+ more\)"),
    (without("layers.3.attn.attn_sink"), r"missing tensor layers.3.attn.attn_sink \[6\]$"),
    (without(*(name for name in TENSORS if name.startswith("mtp."))), "missing tensor mtp.0.attn_norm.weight"),
    (TENSORS | {"layers.7.x": np.zeros(3, np.float32)}, r"unexpected tensor layers.7.x \[3\]$"),
    (TENSORS | {"layers.3.ffn.gate.tid2eid": TENSORS[GATE]}, "unexpected tensor layers.3.ffn.gate.tid2eid"),
    (
        TENSORS | {"layers.4.attn.wo_a.weight": np.zeros((48, 24), np.float32)},
        r"tensor layers.4.attn.wo_a.weight: got shape \[48, 24\]; must be \[24, 48\]",
    ),
    (TENSORS | {"norm.weight": np.ones(48, np.float16)}, "tensor norm.weight: got F16; allowed: F32, BF16"),
    (TENSORS | {"norm.weight": np.ones(48)}, "tensor norm.weight: got F64; allowed: F32, BF16"),
    (TENSORS | {GATE: TENSORS[GATE].astype(BF16)}, f"tensor {GATE}: got BF16; allowed: I64, I32"),
    (
        TENSORS | {WQ_A: TENSORS[WQ_A].astype(E4M3)},
        r"layers.0.attn.wq_a.weight: got F8_E4M3 with no scales \(layers.0.attn.wq_a.scale\); allowed: F32, F8_E8M0, U8",
    ),
    (
        TENSORS | {"layers.0.attn.wq_a.scale": np.ones((1, 1), np.float32)},
        "layers.0.attn.wq_a.weight: got F32 with F32 scales .*; allowed: None",
    ),
    (
        TENSORS | {WQ_A: TENSORS[WQ_A].astype(E4M3), "layers.0.attn.wq_a.scale": np.ones((1, 2), np.float32)},
        r"tensor layers.0.attn.wq_a.scale: got shape \[1, 2\]; must be \[1, 1\]",
    ),
    (
        TENSORS | {"layers.0.ffn.experts.0.w1.weight": np.ones((40, 24), np.int8)},
        "layers.0.ffn.experts.0.w1.weight: got I8 with no scales",
    ),
    (TENSORS | {"embed.weight": TENSORS["embed.weight"].astype(E4M3)}, "embed.weight: got F8_E4M3; allowed: F32, BF16"),
    (TENSORS | {WQ_A: np.ones((20, 24), np.int8)}, "wq_a.weight: got I8; allowed: F32, BF16, F8_E4M3"),
    (without("mtp.0.enorm.weight"), "tensor mtp.0.[a-z_.]*: this checkpoint's mtp.. is a DSpark drafter"),
    (TENSORS | {"mtp.1.enorm.weight": np.ones(48, np.float32)}, "tensor mtp.1.enorm.weight: .* is a DSpark drafter"),
    (TENSORS | {"model.norm.weight": np.ones(48, np.float32)}, "got both .*norm.weight, two names of norm.weight"),
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
        load_safetensors(write(tmp_path / "in", tensors), put=lambda path, leaf: placed.append(path))
    assert all(path[-1] == "tid2eid" for path in placed)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (table(7, 3), f"{GATE}: row 7 is [3, 3]: one expert twice"),
        (TENSORS | {GATE: 0 * TENSORS[GATE]}, f"{GATE}: row 0 is [0, 0]: one expert twice; the table is all zeros"),
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
    "file gone": (lambda d: first_file(d).unlink(), f"{INDEX}: names model-00001-of-.*, which does not exist"),
    "truncated": (
        lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-10]),
        "model-00001-of-.*: not a readable safetensors file: ",
    ),
    "garbage": (lambda d: first_file(d).write_bytes(b"x" * 500), "model-00001-of-.*: not a readable safetensors file"),
    "empty": (lambda d: first_file(d).write_bytes(b""), "model-00001-of-.*: not a readable safetensors file"),
    "index not JSON": (lambda d: (d / INDEX).write_text("{"), f"{INDEX}: expected a JSON object with .weight_map"),
    "index a list": (lambda d: (d / INDEX).write_text("[]"), f"{INDEX}: expected a JSON object with .weight_map"),
    "map a list": (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), f"{INDEX}: expected a JSON object"),
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
    "two checkpoints": (lambda d: write(d), f"got model.safetensors, and {INDEX} that does not name it"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "other model": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "model_type: got 'llama'"),
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
    with pytest.raises(ValueError, match="nowhere: not a directory"):
        load_safetensors(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_dict()))
    with pytest.raises(ValueError, match="got 0 .*safetensors files"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "int32", None, 3, "float64"])
def test_only_known_dtypes(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16'"):
        load_safetensors(write(tmp_path / "in"), dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16', 'fp8', 'official'"):
        save_safetensors(CFG, PARAMS, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


# ---- where export writes ---------------------------------------------------------------------------------------------


def listing(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
    def crash(path, *rest):
        if "00002" in path.name:
            raise OSError("disk full")
        write_file(path, *rest)

    monkeypatch.setattr(export, "write_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_earlier_export(tmp_path, monkeypatch):
    save_safetensors(CFG, PARAMS, tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.setattr(export, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", overwrite=True)
    assert listing(tmp_path) == before


def test_overwrite_replaces_an_export_wholly(tmp_path):
    sharded(tmp_path / "out")
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(load_safetensors(tmp_path / "out")[1], PARAMS)


def test_overwrite_keeps_what_stands_beside_an_export(tmp_path):
    sharded(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    save_safetensors(CFG, PARAMS, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_replaced(tmp_path, overwrite):
    target = tmp_path / "run"
    (target / "checkpoints").mkdir(parents=True)
    (target / "checkpoints" / "1").write_text("{}")
    (target / "config.json").write_text("{}")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="holds the directory checkpoints" if overwrite else "not empty; give a new"):
        save_safetensors(CFG, PARAMS, target, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file; must be a directory"):
        save_safetensors(CFG, PARAMS, target / "config.json", overwrite=overwrite)
    assert listing(tmp_path) == before


def test_an_empty_directory_may_be_written_to(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path, overwrite=False)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "5GB"])
def test_a_file_limit_is_a_positive_integer(tmp_path, limit):
    with pytest.raises(ValueError, match="max_file_bytes: got .*; must be a positive integer"):
        save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=limit)


def test_parameters_of_another_model_are_not_written(tmp_path):
    other = small_config(q_lora_rank=21)
    with pytest.raises(ValueError, match=r"parameter layers_0_1/.*: got shape \[2, .*20\]; must be \[2, .*21\]"):
        save_safetensors(other, PARAMS, tmp_path / "out")
    bad = random_params(CFG)
    bad["router"]["layers_2_2"]["block_0"]["ffn"]["tid2eid"][:] = 9
    with pytest.raises(ValueError, match=f"{GATE}: got expert id 9"):
        save_safetensors(CFG, bad, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- transformers ----------------------------------------------------------------------------------------------------


def as_transformers(tensors):
    """Tensors under the names that transformers 5.23 gives them, MTP dropped."""
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith("mtp."):
            name = re.sub(r"^hc_head_", "hc_head.hc_", name).replace(".attn.kv_norm.", ".attn.norm.")
            name = {"embed.weight": "embed_tokens.weight"}.get(name, name)
            renamed[name if name == "head.weight" else f"model.{name}"] = tensor
    return renamed


def without_mtp(tree):
    tree = {name: value for name, value in tree.items() if name != "mtp"}
    return tree | {"router": {name: value for name, value in tree["router"].items() if name != "mtp"}}


def test_transformers_names_load_without_mtp_and_say_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="v4jax"):
        cfg, params = load_safetensors(write(tmp_path / "in", as_transformers(TENSORS)))
    assert [record.getMessage() for record in caplog.records] == [
        "transformers wrote no mtp.* tensors: loading without the MTP module"
    ]
    assert cfg == CFG.replace(num_nextn_predict_layers=0, compress_ratios=CFG.compress_ratios[:-1])
    assert_same(params, without_mtp(PARAMS))


def test_transformers_files_are_checked_like_others(tmp_path):
    tensors = as_transformers(TENSORS)
    del tensors["model.layers.3.attn.norm.weight"]
    with pytest.raises(ValueError, match="missing tensor layers.3.attn.kv_norm.weight"):
        load_safetensors(write(tmp_path / "in", tensors))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("dtype", "max_file_bytes"), [("float32", 5 * 10**9), ("bfloat16", 300_000)])
def test_transformers_opens_an_export_and_what_it_saves_is_the_same(tmp_path, dtype, max_file_bytes):
    transformers = pytest.importorskip("transformers")
    save_safetensors(CFG, PARAMS, tmp_path / "ours", dtype=dtype, max_file_bytes=max_file_bytes)
    model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert str(model.dtype) == f"torch.{dtype}"
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    cfg, params = load_safetensors(tmp_path / "theirs", dtype=dtype)
    assert cfg == CFG.replace(num_nextn_predict_layers=0, compress_ratios=CFG.compress_ratios[:-1])
    assert_same(params, without_mtp(load_safetensors(tmp_path / "ours", dtype=dtype)[1]))
    assert ModelConfig.from_json(tmp_path / "theirs") == CFG
