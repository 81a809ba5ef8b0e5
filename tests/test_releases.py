"""The newer releases open, and what is no part of the trunk comes back with its bytes."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from releases import (
    DSPARK,
    ENCODERS,
    OTHER_FILES,
    RELEASES,
    STAGES,
    VISION,
    carried_tensors,
    drafter_shapes,
    make_release,
    tensors_of,
    trunk_config,
)
from small_runs import small_run, write_text
from trees import close

import v4jax
from configs import models
from v4jax.checkpoint import save_safetensors
from v4jax.checkpoint.carried import check_carried
from v4jax.checkpoint.load import open_safetensors
from v4jax.checkpoint.names import official_shapes
from v4jax.checkpoint.run_config import check_config
from v4jax.cli import main as cli
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.convert.compare import compare
from v4jax.convert.conversion import convert
from v4jax.data.config import DataConfig
from v4jax.drafter_parameters import drafter_tensors
from v4jax.storage import Claim
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.initial import check_source_model
from v4jax.train.loop import train
from v4jax.train.prepare import write_run

NEWER = [name for name in RELEASES if name != "flash"]


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Release -> (folder, cfg, params)."""
    root = tmp_path_factory.mktemp("releases")
    return {name: (root / name, *make_release(root / name, name)) for name in RELEASES}


def files_of(folder):
    """Name -> bytes of what is no weight and no config."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json"
        if not path.name.endswith("index.json")
    }


@pytest.mark.parametrize("release", RELEASES)
def test_the_trunk_opens(releases, release):
    folder, cfg, params = releases[release]
    found, loaded = v4jax.load(folder)
    assert found == cfg == trunk_config(release)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert ("mtp" in loaded) == (release == "flash")
    close(
        loaded["layers_0_1"]["block_0"]["hc_attn"]["fn"],
        params["layers_0_1"]["block_0"]["hc_attn"]["fn"],
        0,
    )


@pytest.mark.parametrize("release", RELEASES)
def test_release_to_store_to_release_is_byte_identical(releases, tmp_path, release):
    folder, *_ = releases[release]
    convert(folder, tmp_path / "store", format="orbax")
    convert(tmp_path / "store", tmp_path / "back", dtype="official")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert after == before
    assert sum(name.startswith("mtp.") for name in after) > (30 if release == "flash" else 100)
    assert ("vision.norm.weight" in after) == (release == "flash-vision-exp")
    old, new = (
        json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "back")
    )
    assert new == old
    assert files_of(tmp_path / "back") == files_of(folder)
    assert set(OTHER_FILES) <= set(files_of(folder)) | {"inference/config.json"}
    assert (tmp_path / "back/inference/config.json").exists()


def test_a_store_has_the_encoder_and_the_tokenizer_where_commands_read_them(releases, tmp_path):
    convert(releases["flash-0731"][0], tmp_path / "store", format="orbax")
    assert (tmp_path / "store/encoding/encoding_dsv4.py").read_bytes() == ENCODERS["0731"]
    assert (tmp_path / "store/tokenizer.json").exists()
    assert (tmp_path / "store/carried/files/README.md").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_carried_keeps_its_bytes_in_every_precision(releases, tmp_path, dtype):
    folder, cfg, _ = releases["flash-0731"]
    said = convert(folder, tmp_path / "out", dtype=dtype)
    carried = tensors_of(folder).items() - tensors_of(tmp_path / "out").items()
    assert not any(name.startswith("mtp.") for name, _ in carried)
    assert said["carried"].startswith("the drafter (")
    assert compare(folder, tmp_path / "out")["tensors"] > 0


@pytest.mark.parametrize("release", NEWER)
def test_an_export_of_other_weights_carries_the_rest(releases, tmp_path, release):
    folder, cfg, params = releases[release]
    trained = jax.tree.map(lambda x: x, params)
    trained["embed"] = {"weight": params["embed"]["weight"] * 2}
    save_safetensors(cfg, trained, tmp_path / "out", dtype="official", source=folder)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in carried_tensors(cfg, release):
        assert after[name] == before[name], name
    assert after["embed.weight"] != before["embed.weight"]
    assert files_of(tmp_path / "out") == files_of(folder)
    # A second export replaces the first one, encoding/ and all.
    save_safetensors(cfg, params, tmp_path / "out", source=folder, overwrite=True)
    assert files_of(tmp_path / "out") == files_of(folder)


def test_drop_leaves_parts_out_and_config_follows(releases, tmp_path, capsys):
    folder, cfg, _ = releases["flash-vision-exp"]
    command = ["convert", str(folder), str(tmp_path / "text"), "--dtype", "official"]
    assert cli.main([*command, "--drop", "drafter", "--drop", "vision", "--verify"]) == 0
    raw = json.loads((tmp_path / "text/config.json").read_text())
    assert not raw.keys() & (DSPARK.keys() | VISION.keys())
    assert raw["compress_ratios"] == list(cfg.compress_ratios)
    assert (raw["num_nextn_predict_layers"], raw["note"]) == (0, "kept")
    names = tensors_of(tmp_path / "text")
    assert not any(name.startswith(("mtp.", "vision.", "aligner.", "image_")) for name in names)
    assert not any(name.endswith("bias_vl") for name in names)
    assert "layers.0.ffn.gate.bias" not in names and "layers.3.ffn.gate.bias" in names
    assert v4jax.load(tmp_path / "text")[0] == cfg

    convert(folder, tmp_path / "store", format="orbax", drop=["vision"])
    convert(tmp_path / "store", tmp_path / "back", dtype="official")
    raw = json.loads((tmp_path / "back/config.json").read_text())
    assert raw.keys() & DSPARK.keys() == DSPARK.keys() and not raw.keys() & VISION.keys()
    assert "mtp.2.norm.weight" in tensors_of(tmp_path / "back")


def test_drop_takes_an_mtp_module_out_too(releases, tmp_path, capsys):
    folder, cfg, _ = releases["flash"]
    convert(folder, tmp_path / "out", dtype="official", drop=["drafter"])
    found, _ = v4jax.load(tmp_path / "out")
    assert found.num_nextn_predict_layers == 0 and not found.difference(
        cfg.replace(num_nextn_predict_layers=0, compress_ratios=cfg.compress_ratios[:-1])
    )
    arguments = ["convert", str(folder), str(tmp_path / "no"), "--drop", "vision"]
    assert cli.main(arguments) == 2
    assert "has no vision" in capsys.readouterr().err


@pytest.mark.parametrize("release", RELEASES)
def test_info_says_what_a_checkpoint_is(releases, release, capsys):
    folder, cfg, _ = releases[release]
    assert cli.main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ending = {"flash": "64", "flash-vision-exp": "-Vision-Exp"}.get(release, "-0731")
    assert found["release"] == f"a DeepSeek-V4 of 7 layers and width 64{ending.removeprefix('64')}"
    assert found["format"] == "official" and "encoding/encoding_dsv4.py" in found["encoder"]
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["routed experts"]["precision"] == "MXFP4" and parts["routed experts"]["trained"]
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    assert parts["routed experts"]["parameters"] == 7 * cfg.n_routed_experts * expert
    assert ("MTP module" in parts) == (release == "flash")
    carried = [name for name, part in parts.items() if not part["trained"]]
    expected = {"flash": [], "flash-vision-exp": ["drafter", "vision"]}
    assert carried == expected.get(release, ["drafter"])
    numbers = sum(np.prod(shape) for shape, _ in drafter_shapes(cfg).values())
    if release != "flash":
        assert parts["drafter"]["parameters"] == numbers
        assert found["drafter"].startswith("DSpark: 5 tokens a draft, 3 stages, which see layers 4")
    assert sum(part["size"] for part in parts.values()) == sum(
        len(content) for _, _, content in tensors_of(folder).values()
    )


def test_info_of_a_store_and_for_people(releases, tmp_path, capsys):
    folder, *_ = releases["flash-vision-exp"]
    convert(folder, tmp_path / "store", format="orbax")
    assert cli.main(["info", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    assert "format: a v4jax store" in out and "only carried" in out and "generation: none" in out
    (total,) = (line for line in out.splitlines() if "total" in line)
    assert "trained" not in total  # it counts what is only carried, too


def test_the_published_counts():
    """Pro-0813 has 1,650,497,936,906 parameters, Flash-0731's drafter 19,845,850,983."""
    for cfg, drafter, total in (
        (models.flash_0731(), 19_845_850_983, None),
        (models.pro_0813(), None, 1_650_497_936_906),
    ):
        rank, taps = (256, (40, 41, 42)) if total is None else (512, (58, 59, 60))
        dspark = DSparkConfig(
            stages=3, block_size=5, noise_token_id=128799, target_layer_ids=taps, markov_rank=rank
        )
        own = sum(math.prod(one.shape) for one in drafter_tensors(cfg, dspark).values())
        assert drafter is None or own == drafter
        numbers = [math.prod(shape) for shape in official_shapes(cfg).values()]
        assert total is None or own + sum(numbers) == total


def test_keys_without_tensors_open_without_a_drafter_and_say_so(tmp_path, caplog):
    folder = tmp_path / "model"
    make_release(folder, "flash-0731", change=lambda raw, carried: carried.clear())
    with caplog.at_level("WARNING"):
        assert not open_safetensors(folder).carried
    assert "DSpark drafter, and there are no mtp.* tensors" in caplog.text


def _without(*keys):
    def change(raw, carried):
        for key in keys:
            raw.pop(key, None)
            carried.pop(key, None)

    return change


def _with(**values):
    return lambda raw, carried: raw.update(values)


def _tensor(name, to=None):
    """A change that puts a tensor of another name or shape."""

    def change(raw, carried):
        carried[name] = np.zeros(3, np.float32) if to is None else to

    return change


def _rename(old, new):
    def change(raw, carried):
        for name in [name for name in carried if name.startswith(old)]:
            carried[name.replace(old, new, 1)] = carried.pop(name)

    return change


RATIOS = [*trunk_config("flash-0731").compress_ratios]
HOSTILE = {
    "one key lacks": (_without("dspark_markov_rank"), "dspark_markov_rank: missing beside"),
    "one key only": (
        _without(*list(DSPARK)[1:]),
        "dspark_noise_token_id: missing beside dspark_block_size",
    ),
    "unknown key": (_with(dspark_other=1), "dspark_other: not a key of a DSpark drafter"),
    "other head": (_with(dspark_markov_head_type="gated"), "got 'gated'; v4jax builds only"),
    "other anchor": (_with(sample_from_anchor=False), "sample_from_anchor: got False"),
    "no keys": (_without(*DSPARK), "config.json has no dspark_* keys"),
    "a stage lacks": (
        lambda raw, carried: [carried.pop(n) for n in list(carried) if n.startswith("mtp.1.")],
        "got 2 draft stages (mtp.N) and 3 entries",
    ),
    "stages far apart": (_rename("mtp.1.", "mtp.7."), "missing tensor mtp.1."),
    "short tail": (_with(compress_ratios=[*RATIOS, 0, 0]), "got 3 draft stages (mtp.N) and 2"),
    "no tail": (_with(compress_ratios=RATIOS), "got 3 draft stages (mtp.N) and 0"),
    "tail not zero": (_with(compress_ratios=[*RATIOS, 0, 4, 0]), "got 4 after the 7 entries"),
    "stages said otherwise": (_with(n_mtp_layers=2), "n_mtp_layers: got 2; must be 3"),
    "block of nothing": (_with(dspark_block_size=0), "dspark_block_size: got 0"),
    "noise outside": (_with(dspark_noise_token_id=97), "dspark_noise_token_id: got 97"),
    "taps outside": (_with(dspark_target_layer_ids=[6, 7]), "must be in [0, num_hidden_layers=7)"),
    "taps twice": (_with(dspark_target_layer_ids=[5, 5]), "must be a list of distinct layers"),
    "other rank": (_with(dspark_markov_rank=13), "mtp.2.markov_head.markov_w1.weight: got shape"),
    "other taps": (_with(dspark_target_layer_ids=[5, 6]), "mtp.0.main_proj.weight: got shape"),
    "a tensor lacks": (_without("mtp.0.attn.attn_sink"), "missing tensor mtp.0.attn.attn_sink"),
    "a scale lacks": (_without("mtp.0.main_proj.scale"), "F8_E4M3 without scales"),
    "a tensor too many": (_tensor("mtp.1.attn.compressor.ape"), "unexpected tensor mtp.1.attn."),
    "an MTP module's": (_tensor("mtp.0.e_proj.weight"), "is of an MTP module"),
    "a name of nothing": (_tensor("mtp.x"), "tensor mtp.x: not a tensor"),
    "vision unsaid": (_tensor("vision.norm.weight"), "config.json has no vision_n_layers"),
    "routing unsaid": (_tensor("layers.0.ffn.gate.bias_vl"), "config.json has no vision_n_layers"),
}
HOSTILE_VISION = {
    "unknown key": (_with(vision_window=7), "vision_window: not a key of the vision tower"),
    "words for numbers": (_with(vision_dim="wide"), "vision_dim: got 'wide'"),
    "blocks without number": (_with(vision_n_layers=1.5), "vision_n_layers: got 1.5"),
    "fewer blocks": (_with(vision_n_layers=1), "unexpected tensor vision.blocks.1."),
    "more blocks": (_with(vision_n_layers=3), "missing tensor vision.blocks.2."),
    "unknown tensor": (_tensor("vision.other.weight"), "unexpected tensor vision.other.weight"),
    "a bias lacks": (_without("layers.4.ffn.gate.bias_vl"), "missing tensor layers.4.ffn.gate"),
    "another width": (_tensor("image_pad"), "tensor image_pad: got shape [3]; must be [64]"),
    "a stage's bias lacks": (
        _without("mtp.1.ffn.gate.bias_vl"),
        "missing tensor mtp.1.ffn.gate.bias_vl",
    ),
    "a stage without layer": (_tensor("mtp.9.ffn.gate.bias_vl"), "mtp.9.ffn.gate.bias_vl"),
    "a bias of no stage": (
        _tensor("mtp.9.ffn.gate.bias_vl", np.zeros(6, np.float32)),
        "unexpected tensor mtp.9.ffn.gate.bias_vl: there are 3 draft stages",
    ),
    "a matrix of integers": (
        _tensor("vision.blocks.0.mlp.w2.weight", np.zeros((16, 24), np.int64)),
        "tensor vision.blocks.0.mlp.w2.weight: got I64; allowed: F32, BF16",
    ),
    "a norm in fp8": (
        _tensor("vision.norm.weight", np.zeros(16, ml_dtypes.float8_e4m3fn)),
        "tensor vision.norm.weight: got F8_E4M3; allowed: F32, BF16",
    ),
    "a matrix that is a vector": (
        _tensor("vision.blocks.1.attn.wo.weight"),
        "tensor vision.blocks.1.attn.wo.weight: got shape [3]; must be [16, any]",
    ),
    "a matrix that is a number": (
        _tensor("aligner.w1.weight", np.zeros((), np.float32)),
        "tensor aligner.w1.weight: got shape []; must be [any, any]",
    ),
    "a norm of another width": (_tensor("vision.blocks.0.norm2.weight"), "must be [16]"),
    "a bias longer than its matrix": (
        _tensor("vision.blocks.0.attn.wqkv.bias"),
        "tensor vision.blocks.0.attn.wqkv.bias: got shape [3]; must be [48]",
    ),
    "matrices the wrong way round": (
        _tensor("vision.blocks.0.mlp.w1.weight", np.zeros((16, 48), np.float32)),
        "tensor vision.blocks.0.mlp.w1.weight: got shape [16, 48]; must be [any, 16]",
    ),
    "patches in five axes": (
        _tensor("vision.patch_embed.proj.weight", np.zeros((16, 3, 1, 14, 14), np.float32)),
        "must be [16, any]",
    ),
    "an aligner to another model": (
        _tensor("aligner.w2.weight", np.zeros((48, 64), np.float32)),
        "tensor aligner.w2.weight: got shape [48, 64]; must be [64, any]",
    ),
    "an aligner of nothing": (
        _tensor("aligner.w1.weight", np.zeros((64, 0), np.float32)),
        "tensor aligner.w1.weight: got shape [64, 0]",
    ),
    "another tower's width": (_with(vision_dim=17), "must be [17"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_harm_to_a_drafter_ends_in_one_line(tmp_path, capsys, name):
    change, words = HOSTILE[name]
    _refused(tmp_path, capsys, "flash-0731", change, words)


@pytest.mark.parametrize("name", HOSTILE_VISION)
def test_harm_to_a_tower_ends_in_one_line(tmp_path, capsys, name):
    change, words = HOSTILE_VISION[name]
    _refused(tmp_path, capsys, "flash-vision-exp", change, words)


def _refused(tmp_path, capsys, release, change, words):
    make_release(tmp_path / "model", release, dtype="bfloat16", change=change)
    command = ["convert", str(tmp_path / "model"), str(tmp_path / "out")]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


def test_the_written_keys_stay_and_the_trunk_has_no_mtp():
    raw = trunk_config("flash-0731").to_dict() | DSPARK
    raw |= {"compress_ratios": [*RATIOS, *[0] * STAGES], "num_nextn_predict_layers": 1}
    cfg = ModelConfig.from_dict(raw)
    assert (cfg.num_nextn_predict_layers, list(cfg.compress_ratios)) == (0, RATIOS)


def _run_config(cfg, folder, run, text):
    return small_run(
        text,
        run,
        model=cfg,
        data=DataConfig(source=str(text), held_out=0.2),
        init_from=str(folder),
        steps=1,
        warmup_steps=0,
        seq_len=16,
        export="official",
    )


@pytest.mark.parametrize("release", NEWER)
def test_a_run_carries_what_it_does_not_train(releases, tmp_path, capsys, release):
    folder, cfg, params = releases[release]
    for source in (folder, tmp_path / "store"):
        if source != folder:
            convert(folder, source, format="orbax")
        run = tmp_path / f"run_of_{source.name}"
        run.mkdir()
        (run / "carried").mkdir()  # left by a start that was killed
        (run / "carried/model.safetensors").write_bytes(b"half")
        config = _run_config(cfg, source, run, tmp_path)
        check_config(run, cfg)
        check_source_model(config)
        write_run(run, config, ByteTokenizer(), Claim(run))
        err = capsys.readouterr().err
        assert "carried as it is, not trained: the drafter (" in err
        assert ("vision" in err) == (release == "flash-vision-exp")
        (run / "checkpoints").mkdir()
        save_safetensors(cfg, params, run / "export", dtype="official", source=run)
        before, after = tensors_of(folder), tensors_of(run / "export")
        assert before.keys() == after.keys()
        assert all(after[name] == before[name] for name in carried_tensors(cfg, release))
        names = files_of(run / "export").keys()
        assert names == files_of(folder).keys() | {"tokenizer_config.json"}
        raw = json.loads((run / "export/config.json").read_text())
        assert raw == json.loads((folder / "config.json").read_text())


def test_a_start_without_a_checkpoint_is_begun_anew(releases, tmp_path):
    """After one that was ended early: what is carried is that of the weights begun from now."""
    (folder, cfg, _), run = releases["flash-0731"], tmp_path / "run"
    for source in ("", folder, "", folder):
        config = _run_config(cfg, source, run, tmp_path)
        write_run(run, config, ByteTokenizer(), Claim(run))
        raw = json.loads((run / "config.json").read_text())
        assert ("dspark_block_size" in raw) == bool(source)
        carried = carried_tensors(cfg, "flash-0731") if source else {}
        assert check_carried(cfg, raw, run).keys() == carried.keys()
    assert (run / "encoding/encoding_dsv4.py").exists()
    # A run with a checkpoint keeps all, though its source is gone.
    write_run(run, _run_config(cfg, "gone", run, tmp_path), ByteTokenizer(), Claim(run), newest=1)
    assert json.loads((run / "config.json").read_text()) == raw
    assert check_carried(cfg, raw, run)


@pytest.mark.slow
def test_fine_tuning_changes_the_trunk_alone(tmp_path):
    """One step of a run from Vision-Exp, with a vocabulary for bytes."""
    folder, text = tmp_path / "release", write_text(tmp_path / "text")
    cfg, _ = make_release(folder, "flash-vision-exp", vocab_size=260)
    ByteTokenizer().save(folder)
    train(_run_config(cfg, folder, tmp_path / "run", text))
    before, after = tensors_of(folder), tensors_of(tmp_path / "run/export")
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    carried = carried_tensors(cfg, "flash-vision-exp").keys()
    assert carried <= same
    assert {"embed.weight", "head.weight", "layers.3.attn.wkv.weight"} & same == set()
    assert (tmp_path / "run/export/encoding/encoding_dsv4.py").exists()
    assert v4jax.load(tmp_path / "run/export")[0] == cfg
