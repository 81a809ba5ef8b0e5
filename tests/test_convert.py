"""Claims about v4jax/convert/: every format both ways, bytes kept, nothing half-written."""

import contextlib
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors import safe_open
from trees import random_params, small_config

import v4jax
import v4jax.checkpoint.load
from v4jax.checkpoint import load_safetensors, official_names, save_safetensors, to_official
from v4jax.checkpoint.files import headers_of, read_tensor
from v4jax.checkpoint.formats import FORMATS, decode
from v4jax.checkpoint.load import open_safetensors
from v4jax.cli import main as cli
from v4jax.convert.compare import compare
from v4jax.convert.conversion import convert
from v4jax.convert.sources import open_checkpoint

CFG = small_config(
    hidden_size=160, moe_intermediate_size=64
)  # MXFP4 needs multiples of 32; 160 makes partial fp8 blocks
PARAMS = random_params(CFG)
EXPERT, DENSE = "layers.4.ffn.experts.3.w2.weight", "layers.4.attn.wo_b.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint in each format, as others release it: several files, with others beside them."""
    root = tmp_path_factory.mktemp("sources")
    for format in FORMATS:
        save_safetensors(CFG, PARAMS, root / format, dtype=format, max_file_bytes=1_000_000)
        (root / format / "tokenizer.json").write_text("{}")
        raw = json.loads((root / format / "config.json").read_text())
        (root / format / "config.json").write_text(json.dumps(raw | {"note": "kept"}))
    return root


def test_tensors_of_zeros_are_in_a_store_too(tmp_path):
    """As sinks and biases of fresh weights are. Orbax refuses a store that leaves them out."""
    zeros = jax.tree.map(np.zeros_like, PARAMS["head"])
    save_safetensors(CFG, PARAMS | {"head": zeros}, tmp_path / "source", dtype="float32")
    convert(tmp_path / "source", tmp_path / "store", format="orbax")
    loaded = v4jax.load(tmp_path / "store")[1]
    assert not np.asarray(loaded["head"]["weight"]).any()


def tensors_of(directory):
    """Name in the file -> (dtype, bytes)."""
    files = sorted(pathlib.Path(directory).glob("*.safetensors"))
    return {
        one.stored: (one.dtype, read_tensor(one).tobytes())
        for file in files
        for one in headers_of(file)
    }


@pytest.mark.parametrize("format", FORMATS)
def test_release_to_store_to_release_is_byte_identical(sources, tmp_path, format):
    convert(sources / format, tmp_path / "store", format="orbax")
    convert(tmp_path / "store", tmp_path / "back", dtype=format)
    assert tensors_of(tmp_path / "back") == tensors_of(sources / format)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (sources / format, tmp_path / "back")
    )
    assert after == before and after["note"] == "kept"
    assert open_checkpoint(tmp_path / "store").format == format


def test_matrices_larger_than_a_chunk(sources, tmp_path, monkeypatch):
    """Every real model's embedding is read so: 64 MB at a time, the last band shorter."""
    from v4jax.checkpoint import stream

    monkeypatch.setattr(stream, "_CHUNK_BYTES", 9_000)
    convert(sources / "official", tmp_path / "store", format="orbax")
    leaf = stream.open_leaves(tmp_path / "store", CFG)["embed", "weight"]
    assert (
        1 < leaf.chunk_layout.write_chunk.shape[0] < CFG.vocab_size
        and CFG.vocab_size % leaf.chunk_layout.write_chunk.shape[0]
    )
    assert compare(sources / "official", tmp_path / "store")["equal"] == len(official_names(CFG))


def test_a_scale_that_does_not_follow_from_the_numbers_is_kept(tmp_path):
    """6.1 rounds down to 6 with scale 2 (code 3); its numbers alone would give scale 1 (code 6)."""
    params = jax.tree.map(np.copy, PARAMS)
    params["mtp"]["block"]["ffn"]["experts"]["w1"][:, :32, 0] = 6.1
    save_safetensors(CFG, params, tmp_path / "a", dtype="official")
    convert(tmp_path / "a", tmp_path / "store", format="orbax")
    convert(tmp_path / "store", tmp_path / "b", dtype="official")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    name = "mtp.0.ffn.experts.0.w1"
    assert open_safetensors(tmp_path / "b").scale(f"{name}.weight")[0, 0] == 2
    save_safetensors(CFG, load_safetensors(tmp_path / "a")[1], tmp_path / "anew", dtype="official")
    assert (
        tensors_of(tmp_path / "anew")[f"{name}.scale"]
        != tensors_of(tmp_path / "a")[f"{name}.scale"]
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_stored_as_what(sources, dtype):
    found = {name: kind for name, (kind, _) in tensors_of(sources / dtype).items()}
    low = {
        "float32": ("F32", "F32"),
        "bfloat16": ("BF16", "BF16"),
        "fp8": ("F8_E4M3", "F8_E4M3"),
        "official": ("F8_E4M3", "I8"),
    }[dtype]
    assert (found[DENSE], found[EXPERT]) == low
    assert found.get("layers.4.attn.wo_b.scale") == {"fp8": "F32", "official": "F8_E8M0"}.get(dtype)
    plain = "F32" if dtype == "float32" else "BF16"
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.4.ffn.gate.weight",
        "layers.4.attn.compressor.wkv.weight",
        "layers.4.attn.indexer.weights_proj.weight",
    ):
        assert found[name] == plain
    for name in (
        "layers.4.attn.attn_sink",
        "layers.4.attn.compressor.ape",
        "layers.4.hc_attn_fn",
        "layers.4.ffn.gate.bias",
    ):
        assert found[name] == "F32"
    assert found["layers.2.ffn.gate.tid2eid"] == "I64"
    raw = json.loads((sources / dtype / "config.json").read_text())
    assert raw.get("quantization_config", {}).get("quant_method") == (
        "fp8" if dtype in ("fp8", "official") else None
    )
    assert raw.get("expert_dtype") == ("fp4" if dtype == "official" else None)


@pytest.mark.parity
@pytest.mark.parametrize("format", [pytest.param("fp8", marks=pytest.mark.long), "official"])
def test_loading_is_official_dequantisation(sources, format):
    """Reads with torch's own types: code times scale, MXFP4 by its table."""
    import torch

    expected = {}
    for file in sorted((sources / format).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            expected |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    _, params = load_safetensors(sources / format)
    for name, got in to_official(CFG, params).items():
        stored, scale = expected[name], expected.get(name.removesuffix("weight") + "scale")
        if scale is not None and stored.dtype == torch.int8:
            byte = stored.view(torch.uint8).long()
            stored = table[
                torch.stack([byte & 15, byte >> 4], -1).flatten(1)
            ] * scale.float().repeat_interleave(32, 1)
        elif scale is not None:
            wide = (
                scale.float()
                .repeat_interleave(128, 0)[: got.shape[0]]
                .repeat_interleave(128, 1)[:, : got.shape[1]]
            )
            stored = stored.float() * wide
        np.testing.assert_array_equal(
            got,
            stored.float().numpy() if stored.is_floating_point() else stored.numpy(),
            err_msg=name,
        )


def test_a_plain_export_drops_what_says_low_precision(sources, tmp_path):
    convert(sources / "official", tmp_path / "plain", dtype="bfloat16")
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert raw["note"] == "kept" and raw["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in raw and "expert_dtype" not in raw
    assert compare(sources / "official", tmp_path / "plain")["equal"] == len(official_names(CFG))


def test_scales_may_be_bytes(sources, tmp_path):
    """Some tools write ue8m0 as U8."""
    target = tmp_path / "bytes"
    target.mkdir()
    for file in (sources / "official").iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            size = int.from_bytes(data[:8], "little")
            head = data[8 : 8 + size].replace(b'"F8_E8M0"', b'"U8"     ')
            data = data[:8] + head + data[8 + size :]
        (target / file.name).write_bytes(data)
    for kind in (EXPERT, DENSE):
        ours, theirs = (open_safetensors(d) for d in (target, sources / "official"))
        assert ours.kinds[kind].scale == "U8"
        np.testing.assert_array_equal(ours.numbers(kind), theirs.numbers(kind))


def test_compare_names_the_worst_tensor(sources, tmp_path):
    params = jax.tree.map(np.copy, PARAMS)
    params["layers_3_6"]["block_1"]["attn"]["wo_b"][0] += 100
    save_safetensors(CFG, params, tmp_path / "b", dtype="float32")
    found = compare(sources / "float32", tmp_path / "b")
    assert (
        found["worst"] == DENSE
        and found["equal"] == found["tensors"] - 1
        and found["difference"] == pytest.approx(100, rel=1e-3)
    )
    save_safetensors(small_config(), random_params(small_config()), tmp_path / "other")
    with pytest.raises(ValueError, match="these are two models"):
        compare(sources / "float32", tmp_path / "other")


def test_numbers_without_meaning_are_named(sources, tmp_path):
    target = tmp_path / "bad"
    target.mkdir()
    for file in (sources / "official").iterdir():
        data = bytearray(file.read_bytes())
        for one in headers_of(file) if file.suffix == ".safetensors" else ():
            if one.stored == EXPERT.replace("weight", "scale"):
                data[one.start + 1] = 255
        (target / file.name).write_bytes(data)
    for action in (lambda: load_safetensors(target), lambda: convert(target, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"{EXPERT}: scale: got byte 255 \(NaN\)"):
            action()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_bad_requests_leave_nothing(sources, tmp_path):
    with pytest.raises(ValueError, match="a v4jax store holds float32 or bfloat16"):
        convert(sources / "official", tmp_path / "out", format="orbax", dtype="official")
    with pytest.raises(ValueError, match="dtype: got 'int4'; allowed"):
        convert(sources / "official", tmp_path / "out", dtype="int4")
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        convert(sources / "official", sources / "fp8")
    odd = small_config()  # hidden width 40: no MXFP4
    save_safetensors(odd, random_params(odd), tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"w\d.weight: MXFP4: got \d+ input features; must be a multiple of 32"
    ):
        convert(tmp_path / "odd", tmp_path / "out", dtype="official")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_killed_conversion_goes_on_where_it_was(sources, tmp_path, format):
    # With larger groups all of this small model is one.
    code = "from v4jax.convert import conversion as c, targets; targets._GROUP_BYTES = 30_000; "
    code += (
        f"c.convert({str(sources / 'official')!r}, {str(tmp_path / 'out')!r}, {format!r}, "
        f"max_file_bytes=300_000)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    partial, deadline = tmp_path / ".out.partial", time.time() + 120
    noted = partial / "written.txt"

    def done():
        return len(list(partial.glob("*.safetensors"))) > 3 or (
            noted.exists() and b"\n" in noted.read_bytes()
        )

    while not done() and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and done()
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    if format == "orbax":  # a line that was being written when the process died
        with open(noted, "a") as log:
            log.write("layers.0.attn.wkv.wei")
    seen = []
    original = v4jax.checkpoint.load.Source.numbers
    v4jax.checkpoint.load.Source.numbers = lambda self, name: (
        seen.append(name),
        original(self, name),
    )[1]
    try:
        convert(sources / "official", tmp_path / "out", format, max_file_bytes=300_000)
    finally:
        v4jax.checkpoint.load.Source.numbers = original
    assert len(seen) < len(official_names(CFG))
    for path, when in kept.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == when
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert compare(sources / "official", tmp_path / "out")["equal"] == len(official_names(CFG))


def test_another_conversion_to_the_same_place_waits_for_nobody(sources, tmp_path):
    import fcntl

    with open(tmp_path / ".out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another conversion is writing there"):
            convert(sources / "official", tmp_path / "out")


@contextlib.contextmanager
def full_disk(limit: int):
    """No file may become longer, so writing says what it says when a disk is full.

    Only the number of the OSError differs.
    """
    limits, before = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_full_disk_is_an_error_and_the_next_try_goes_on(sources, tmp_path, format, capsys):
    arguments = [
        "convert",
        str(sources / "official"),
        str(tmp_path / "out"),
        "--format",
        format,
        "--workers",
        "1",
    ]
    with full_disk(100_000 if format == "safetensors" else 10_000):
        assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("v4jax: failed: ")
        and said.count("\n") == 1
        and "could not be written" in said
        and "too large" in said.lower()
    ), said
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert cli.main([*arguments, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] == len(official_names(CFG))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_during_an_export_leaves_the_earlier_one(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="official")
    before = tensors_of(tmp_path / "out")
    with (
        full_disk(1_000_000),
        pytest.raises(OSError, match="model.safetensors.tmp could not be written: File too large"),
    ):
        save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", overwrite=True)
    assert tensors_of(tmp_path / "out") == before and [
        path.name for path in tmp_path.iterdir()
    ] == ["out"]


def test_logits_of_a_store_are_those_of_its_source(sources, tmp_path, caplog):
    import v4jax

    caplog.set_level(logging.WARNING)
    convert(sources / "official", tmp_path / "store", format="orbax")
    tokens = np.arange(40)[None] % CFG.vocab_size
    logits = [
        v4jax.forward(*v4jax.load(d), tokens).logits
        for d in (sources / "official", tmp_path / "store")
    ]
    np.testing.assert_array_equal(*logits)
    assert np.isfinite(logits[0]).all()
    source = open_safetensors(sources / "official")
    assert (
        decode(source.kinds[EXPERT], source.stored(EXPERT)).dtype == "bfloat16"
    )  # float16 holds these numbers exactly
