"""2,100 ways to break a checkpoint each end in a ValueError that names it.

The claim holds for load, convert and compare: no crash, no hang, no silence.
"""

import contextlib
import functools
import json
import os
import pathlib
import pickle
import signal

import numpy as np
import pytest
from trees import random_params, small_config

import v4jax
from v4jax.checkpoint import save_safetensors
from v4jax.checkpoint.files import INDEX_FILE, headers_of
from v4jax.convert.compare import compare
from v4jax.convert.conversion import convert

CFG = small_config(
    vocab_size=40,
    hidden_size=32,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    num_hash_layers=1,
    n_routed_experts=3,
)
MUTATIONS, PARTS = 2100, 10
SECONDS = 20
"""Seconds after which a mutation counts as a hang; the usual one takes 10 ms."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Sound checkpoints.

    They are an instruct release in pieces with an index, a -Base release, and float32 in one file.
    """
    root = tmp_path_factory.mktemp("sound")
    for name, dtype, size in (
        ("pieces", "official", 60_000),
        ("base", "fp8", 10**9),
        ("plain", "float32", 10**9),
    ):
        save_safetensors(CFG, random_params(CFG), root / name, dtype=dtype, max_file_bytes=size)
        (root / name / "tokenizer.json").write_text("{}")
        v4jax.load(root / name)
    return root


# ---- tools: a file as (header, data) -------------------------------------------------------------


def weights(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def replace(path: pathlib.Path, data: bytes | str):
    """Replaces a file; files are links to the sound ones, so none is written in place."""
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def parts(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def put(path, head: bytes | dict, data: bytes):
    head = json.dumps(head).encode() if isinstance(head, dict) else head
    replace(path, len(head).to_bytes(8, "little") + head + data)


def edit(change):
    """A mutation that changes the entry of one tensor.

    It calls `change(rng, entry, header, name, size of the data)`.
    """

    def mutate(rng, folder):
        path = weights(rng, folder)
        head, data = parts(path)
        header = json.loads(head)
        name = str(rng.choice([name for name in header if name != "__metadata__"]))
        change(rng, header[name], header, name, len(data))
        put(path, header, data)

    return mutate


def fill(dtype, value, where=""):
    """A mutation that overwrites one number of a tensor of `dtype`."""

    def mutate(rng, folder):
        found = [
            one
            for path in sorted(folder.glob("*.safetensors"))
            for one in headers_of(path)
            if one.dtype == dtype and where in one.stored
        ]
        if not found:  # this source has none: any other harm
            return truncated(rng, folder)
        one, bytes_ = found[rng.integers(len(found))], np.asarray(value).tobytes()
        data = bytearray(one.path.read_bytes())
        start = one.start + int(rng.integers(np.prod(one.shape))) * len(bytes_)
        data[start : start + len(bytes_)] = bytes_
        replace(one.path, bytes(data))

    return mutate


def config(change):
    def mutate(rng, folder):
        raw = json.loads((folder / "config.json").read_text())
        change(rng, raw)
        replace(folder / "config.json", json.dumps(raw))

    return mutate


def index(change):
    def mutate(rng, folder):
        path = folder / INDEX_FILE
        raw = (
            json.loads(path.read_text())
            if path.exists()
            else {
                "weight_map": {
                    one.stored: "model.safetensors" for one in headers_of(weights(rng, folder))
                }
            }
        )
        change(rng, raw["weight_map"], str(rng.choice(list(raw["weight_map"]))))
        replace(path, json.dumps(raw))

    return mutate


def on(name, action):
    """A mutation of a whole file; of any weights if name is None."""

    def mutate(rng, folder):
        path = weights(rng, folder) if name is None else folder / name
        path.unlink(missing_ok=True)
        action(rng, path)

    return mutate


def outside(rng, path):
    """Links to a sound file of the same name elsewhere."""
    real = path.parent.parent / "elsewhere" / path.name
    real.parent.mkdir(exist_ok=True)
    real.write_bytes((path.parent.parent / "copy" / path.name).read_bytes())
    path.symlink_to(real)


# ---- mutations -----------------------------------------------------------------------------------


def truncated(rng, folder):
    path = weights(rng, folder)
    data = path.read_bytes()
    replace(path, data[: int(rng.integers(len(data)))])


def lengthened(rng, folder):
    path = weights(rng, folder)
    replace(path, path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def header_length(rng, folder):
    path = weights(rng, folder)
    data = path.read_bytes()
    right = int.from_bytes(data[:8], "little")
    wrong = rng.choice(
        [
            0,
            1,
            right - 1,
            right // 2,
            right + 8,
            len(data),
            len(data) * 2,
            10**9,
            2**62,
            2**63,
            right + 1,
        ]
    )
    replace(path, int(wrong).to_bytes(8, "little") + data[8:])


def header_byte(rng, folder):
    path = weights(rng, folder)
    head, data = parts(path)
    at = int(
        rng.integers(head.index(b"}") + 2, head.rindex(b"}"))
    )  # past __metadata__, which means nothing
    new = int(rng.choice([byte for byte in range(256) if byte != head[at]]))
    put(path, head[:at] + bytes([new]) + head[at + 1 :], data)


def shifted(rng, entry, header, name, size):
    entry["data_offsets"][int(rng.integers(2))] += int(
        rng.choice([-8, -1, 1, 4, 1000, size, 2**40, 2**63])
    )


def overlapping(rng, entry, header, name, size):
    other = str(rng.choice([other for other in header if other not in (name, "__metadata__")]))
    if header[other]["data_offsets"] == entry["data_offsets"]:
        del header[name]
    else:
        entry["data_offsets"] = header[other]["data_offsets"]


def dtype_of_another(rng, entry, header, name, size):
    allowed = {"F8_E8M0": ("U8",), "I64": ("I32",)}.get(entry["dtype"], ())
    dtypes = [
        "BOOL",
        "F4",
        "F6_E2M3",
        "U8",
        "I8",
        "F8_E5M2",
        "F8_E4M3",
        "F8_E8M0",
        "I16",
        "U16",
        "F16",
        "BF16",
        "I32",
        "U32",
        "F32",
        "C64",
        "F64",
        "I64",
        "U64",
        "X99",
    ]
    entry["dtype"] = str(
        rng.choice([one for one in dtypes if one not in (entry["dtype"], *allowed)])
    )


def shape_of_another(rng, entry, header, name, size):
    shape = entry["shape"]
    others = [
        [*shape, 1],
        [int(np.prod(shape))],
        shape[::-1],
        [1, *shape],
        [size + 1 for size in shape],
        [0],
        [],
        [-1],
        [2**62, 4],
    ]
    entry["shape"] = others[rng.choice([i for i, one in enumerate(others) if one != shape])]


def odd_entry(rng, entry, header, name, size):
    header[name] = [
        None,
        [],
        3,
        {},
        {"dtype": "F32"},
        entry | {"shape": "2"},
        entry | {"data_offsets": [0]},
        entry | {"data_offsets": None},
    ][rng.integers(8)]


def renamed(rng, entry, header, name, size):
    header[
        str(
            rng.choice(
                [
                    "x",
                    "",
                    name + " ",
                    "model." + name,
                    name.upper(),
                    "layers.99.attn.wkv.weight",
                    "../" + name,
                    "mtp.1.x",
                ]
            )
        )
    ] = header.pop(name)


def empty_tensor(rng, entry, header, name, size):
    header[
        str(rng.choice(["x", "mtp.0.extra", "embed.scale", "layers.0.attn.wkv.weight_scale_inv"]))
    ] = entry | {"shape": [0], "data_offsets": [0, 0]}


def said_twice(rng, folder):
    path = weights(rng, folder)
    head, data = parts(path)
    name = str(rng.choice([name for name in json.loads(head) if name != "__metadata__"]))
    entry = f", {json.dumps(name)}: {json.dumps(json.loads(head)[name])}}}"
    put(path, head.rstrip()[:-1] + entry.encode(), data)


def in_two_files(rng, folder):
    path = weights(rng, folder)
    replace(folder / "model-9.safetensors", path.read_bytes())
    if rng.random() < 0.5 and (folder / INDEX_FILE).exists():
        raw = json.loads((folder / INDEX_FILE).read_text())
        raw["weight_map"][headers_of(path)[0].stored] = "model-9.safetensors"
        replace(folder / INDEX_FILE, json.dumps(raw))
    else:
        (folder / INDEX_FILE).unlink(missing_ok=True)


class Harmful:
    """Stands for what a pickle may do when it is opened."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("/tmp/v4jax-pickle-was-opened"),)


def other_file(rng, path):
    contents = [
        b"",
        b"\0" * 64,
        pickle.dumps({"embed.weight": [1.0] * 100}),
        pickle.dumps(Harmful()),
        b"PK\3\4" + rng.bytes(500),
        b"\x1f\x8b" + rng.bytes(99),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        rng.bytes(3000),
        b"{}",
        (2).to_bytes(8, "little") + b"{}",
    ]
    path.write_bytes(contents[rng.integers(len(contents))])


def no_file(rng, path):
    actions = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/etc/passwd"),
        lambda: path.symlink_to(".."),
    ]
    actions[rng.integers(len(actions))]()


def bad_json(rng, path):
    texts = [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"weight_map":' * 5000,
        b"{}",
        b'{"weight_map": [1]}',
        b'{"weight_map": null}',
        b'{"a": 1, "a": 2}',
        b"9" * 10_000,
        rng.bytes(100),
        b'{"weight_map": {}}',
    ]
    path.write_bytes(texts[rng.integers(len(texts))])


FILE_NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "",
    ".",
    "..",
    5,
    None,
    [],
    {},
    True,
    "a" * 5000,
    "a\0b",
    "\ud800",
    "none.safetensors",
    "config.json",
    "~/x",
]
ILL_VALUES = [
    -1,
    0,
    1.5,
    2**40,
    10**400,
    "4",
    [],
    [4],
    {},
    True,
    float("nan"),
    float("inf"),
    -(10**400),
]
SIZES = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "n_routed_experts",
    "hc_mult",
]  # the last has a default, which these files fit
OTHER_SHAPES = [
    {"vocab_size": 41},
    {"hidden_size": 64},
    {"n_routed_experts": 4},
    {"num_hash_layers": 0},
    {"head_dim": 32},
]
MANY = [
    {"n_routed_experts": 16384},
    {"num_hidden_layers": 1000, "compress_ratios": [0, 4, 128, 4, 4] * 200 + [0]},
]
OTHER_RULES = [
    {"model_type": "llama"},
    {"model_type": "deepseek_v4.1"},
    {"architectures": ["DeepseekV41ForCausalLM"]},
    {"scoring_func": "sigmoid"},
    {"num_key_value_heads": 2},
    {"dspark_block": 3},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": [1]},
    {"compress_ratios": [0, 4]},
    {"compress_ratios": [0, 4, 128, 7]},
    {"compress_ratios": [0, [], 128, 0]},
    {"compress_ratios": [0, 4, 128, 4]},
    {"compress_rope_theta": None},
    {"num_nextn_predict_layers": 3},
    {"num_hash_layers": 9},
    {"eos_token_id": 4000},
    {"rope_scaling": {"type": "yarn", "factor": "x"}},
    {"rope_parameters": {"main": 3}},
    {"swiglu_limit": 10**400},
    {"compress_ratios": None, "layer_types": ["x"]},
    {"qk_rope_head_dim": 7},
]
ANY = {
    "truncated": truncated,
    "lengthened": lengthened,
    "header length": header_length,
    "header byte": header_byte,
    "offsets": edit(shifted),
    "overlap": edit(overlapping),
    "dtype": edit(dtype_of_another),
    "shape": edit(shape_of_another),
    "entry": edit(odd_entry),
    "name": edit(renamed),
    "empty tensor": edit(empty_tensor),
    "tensor gone": edit(lambda rng, entry, header, name, size: header.pop(name)),
    "said twice": said_twice,
    "in two files": in_two_files,
    "scale 255": fill("F8_E8M0", np.uint8(255)),
    "scale nan": fill("F32", np.float32(np.nan), ".scale"),
    "scale 0": fill("F32", np.float32(0), ".scale"),
    "scale below 0": fill("F32", np.float32(-1), ".scale"),
    "fp8 nan": fill("F8_E4M3", np.uint8(127)),
    "fp8 -nan": fill("F8_E4M3", np.uint8(255)),
    "expert 3": fill("I64", np.int64(3)),
    "expert -1": fill("I64", np.int64(-1)),
    "other file": on(None, other_file),
    "no file": on(None, no_file),
    "a link outside": on(None, outside),
    "config no file": on("config.json", no_file),
    "config outside": on("config.json", outside),
    "tokenizer outside": on("tokenizer.json", outside),
    "config bad JSON": on("config.json", bad_json),
    "index bad JSON": on(INDEX_FILE, bad_json),
    "index outside": on(INDEX_FILE, lambda rng, path: path.symlink_to("/etc/passwd")),
    "index name": index(
        lambda rng, names, one: names.update({one: FILE_NAMES[rng.integers(len(FILE_NAMES))]})
    ),
    "index short": index(lambda rng, names, one: names.pop(one)),
    "index long": index(lambda rng, names, one: names.update({one + "x": names[one]})),
    "index elsewhere": index(lambda rng, names, one: names.update({one: "tokenizer.json"})),
    "config ill value": config(
        lambda rng, raw: raw.update(
            {str(rng.choice(SIZES)): ILL_VALUES[rng.integers(len(ILL_VALUES))]}
        )
    ),
    "config without": config(
        lambda rng, raw: raw.pop(str(rng.choice([*SIZES[:-1], "model_type"])))
    ),
    "config of other shapes": config(
        lambda rng, raw: raw.update(OTHER_SHAPES[rng.integers(len(OTHER_SHAPES))])
    ),
    "config of many": config(lambda rng, raw: raw.update(MANY[rng.integers(len(MANY))])),
    "config of other rules": config(
        lambda rng, raw: raw.update(OTHER_RULES[rng.integers(len(OTHER_RULES))])
    ),
}
SEEN_WHEN_READ = {
    "scale 255",
    "scale nan",
    "scale 0",
    "scale below 0",
    "fp8 nan",
    "fp8 -nan",
    "expert 3",
    "expert -1",
}
"""Mutations with sound headers: a store begins before the harm is met, which takes a second.

So each runs once.
"""
ONLY_CONVERT_SEES = {"tokenizer outside"}
"""`convert` copies the tokenizer."""


# ---- the claim -----------------------------------------------------------------------------------


@contextlib.contextmanager
def in_time(what):
    def late(*_):
        raise TimeoutError(f"{what}: not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(sources, root, seed):
    """(name of the mutation and its seed, the broken folder).

    The folder links to the sound files; some links are replaced.
    """
    rng = np.random.default_rng(seed)
    kind = list(ANY)[seed % len(ANY)]
    source = sources / ("pieces", "base", "plain")[seed // len(ANY) % 3]
    folder = root / str(seed)
    for target in (folder / "broken", folder / "copy"):
        target.mkdir(parents=True)
        for path in source.iterdir():
            os.link(path, target / path.name)
    ANY[kind](rng, folder / "broken")
    return kind, source, folder


@pytest.mark.parametrize(
    "part",
    [0]
    + [pytest.param(part, marks=pytest.mark.slow) for part in range(1, 3)]
    + [pytest.param(part, marks=pytest.mark.long) for part in range(3, PARTS)],
)
def test_every_mutation_ends_in_a_clear_error(sources, tmp_path, part):
    for seed in range(part * MUTATIONS // PARTS, (part + 1) * MUTATIONS // PARTS):
        kind, source, folder = mutated(sources, tmp_path, seed)
        broken, out = folder / "broken", folder / "out"
        orbax = seed // 2 % 2 and kind not in SEEN_WHEN_READ or seed < len(ANY)
        format = "orbax" if orbax else "safetensors"
        entries = {"convert": functools.partial(convert, broken, out, format=format)}
        if kind not in ONLY_CONVERT_SEES:
            pair = ((source, broken), (broken, source))[seed % 2]
            entries |= {
                "load": functools.partial(v4jax.load, broken),
                "compare": functools.partial(compare, *pair),
            }
        for entry, action in entries.items():
            what = f"seed {seed}, {kind}, {source.name}, {entry}"
            with in_time(what):
                try:
                    action()
                except ValueError as error:
                    assert (
                        type(error) is ValueError
                        and str(broken) in str(error)
                        and len(str(error)) < 1000
                    ), f"{what}: {error!r}"
                except Exception as error:
                    raise AssertionError(f"{what}: {error!r}") from error
                else:
                    raise AssertionError(f"{what}: went through")
        assert not out.exists() and not list(folder.glob(".out*")), what
    assert not pathlib.Path("/tmp/v4jax-pickle-was-opened").exists()


def test_links_within_and_those_of_the_hub_are_followed(sources, tmp_path):
    """huggingface_hub keeps files as blobs/HASH and links to them from snapshots/REVISION."""
    hub = tmp_path / "models--x"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "blobs").mkdir()
    for i, path in enumerate(sorted((sources / "pieces").iterdir())):
        os.link(path, hub / "blobs" / str(i))
        (hub / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{i}")
    assert compare(hub / "snapshots" / "abc", sources / "pieces")["worst"] == ""
    inner = tmp_path / "inner"
    inner.mkdir()
    for path in (sources / "plain").iterdir():
        os.link(path, inner / path.name)
    (inner / "model.safetensors").rename(inner / "data")
    (inner / "model.safetensors").symlink_to("data")
    v4jax.load(inner)
