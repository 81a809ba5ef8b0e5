"""A whole run through the public commands: train, stop, resume, score, convert, generate.

Bad input is one line each.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small_run, write_text
from trees import random_params, small_config

import v4jax
from v4jax.checkpoint.store import Store
from v4jax.cli import main as cli
from v4jax.cli.train import sample
from v4jax.train.loop import train
from v4jax.train.stability import TrainingFailed


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """An uninterrupted run of 30 steps: (config, summary)."""
    cfg = small_run(
        text_folder,
        tmp_path_factory.mktemp("a") / "run",
        steps=30,
        batch_size=4,
        seq_len=48,
        decay_steps=5,
        log_every=2,
        eval_every=15,
        eval_batches=2,
        checkpoint_every=10,
        export="float32",
        sample_prompt="the",
        sample_tokens=4,
    )
    return cfg, train(cfg)


def test_a_run_learns_and_leaves_everything_behind(finished):
    cfg, summary = finished
    run = pathlib.Path(cfg.run_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert summary["held_out_nll"] < summary["unigram_nll"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert sample(cfg)["sample"] == (run / "sample.txt").read_text()
    assert (run / "sample.txt").read_text().startswith("the")
    exported_cfg, exported = v4jax.load(run / "export")
    assert exported_cfg == cfg.model
    _, stored = v4jax.load(run)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(exported), jax.tree.leaves(stored), strict=True
    ):
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))


def test_a_run_that_was_killed_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    cfg, _ = finished
    again = dataclasses.replace(cfg, run_dir=str(tmp_path / "run"))
    save = Store.save

    def save_then_die(store, step, items, loss):
        save(store, step, items, loss)
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(Store, "save", save)
    train(again)
    for a, b in zip(
        jax.tree.leaves(v4jax.load(again.run_dir)[1]),
        jax.tree.leaves(v4jax.load(cfg.run_dir)[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    kept = ("step", "loss", "nll", "mtp_nll", "grad_norm", "held_out_nll")

    def results(config):
        text = (pathlib.Path(config.run_dir) / "metrics.jsonl").read_text()
        lines = [
            {name: line[name] for name in kept if name in line}
            for line in map(json.loads, text.splitlines())
        ]
        # a resumed run shows its first step too
        return [
            line
            for line in lines
            if "held_out_nll" in line or line["step"] % cfg.log_every == 0 or line["step"] == 1
        ]

    assert results(again) == results(cfg)


def test_another_model_is_refused_and_nothing_changes(finished):
    cfg, _ = finished
    run = pathlib.Path(cfg.run_dir)
    before = digest(run)
    with pytest.raises(
        ValueError, match="holds a run of another model: o_lora_rank is 8 there, 4 here"
    ):
        train(dataclasses.replace(cfg, model=cfg.model.replace(o_lora_rank=4)))
    assert digest(run) == before


def digest(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(finished, tmp_path):
    cfg, _ = finished
    broken = dataclasses.replace(
        cfg,
        run_dir=str(tmp_path / "run"),
        model=cfg.model.replace(compress_ratios=(0,), num_nextn_predict_layers=0),
        learning_rate=1e30,
        warmup_steps=0,
        decay_steps=0,
        eval_batches=0,
    )
    with pytest.raises(TrainingFailed, match=r"(loss|grad_norm) is (nan|inf)"):
        train(broken)
    with Store(broken.run_dir) as store:
        assert store.latest is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory, cfg, params): a small random model as safetensors."""
    cfg = small_config(
        vocab_size=96,
        hidden_size=48,
        n_routed_experts=8,
        num_attention_heads=6,
        o_groups=2,
        q_lora_rank=20,
        moe_intermediate_size=40,
        head_dim=24,
        index_n_heads=8,
        num_hidden_layers=3,
        compress_ratios=(128, 4, 4, 0),
        num_hash_layers=1,
    )
    params = jax.tree.map(
        lambda a: jnp.asarray(a if a.ndim < 2 or a.shape[-1] == 2 else a * 0.1), random_params(cfg)
    )
    folder = tmp_path_factory.mktemp("ckpt") / "model"
    v4jax.save_safetensors(cfg, params, folder, dtype="float32")
    return folder, cfg, params


def tokens_file(tmp_path, cfg, rows=3, seq=30):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, seq)))
    return path


def test_score_on_one_device_and_on_a_mesh(checkpoint, tmp_path, capsys):
    folder, cfg, params = checkpoint
    tokens = tokens_file(tmp_path, cfg)
    assert (
        cli.main(
            [
                "score",
                str(folder),
                "--tokens",
                str(tokens),
                "--out",
                str(tmp_path / "one.npz"),
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["logits"] == [3, 30, 96]
    mesh = ["--mesh", "data=2,expert=2,tensor=2"]
    assert (
        cli.main(
            [
                "score",
                str(folder),
                "--tokens",
                str(tokens),
                "--out",
                str(tmp_path / "eight.npz"),
                *mesh,
            ]
        )
        == 0
    )
    one, eight = np.load(tmp_path / "one.npz"), np.load(tmp_path / "eight.npz")
    output = v4jax.forward(cfg, params, jnp.asarray(np.load(tokens)))
    np.testing.assert_allclose(one["logits"], output.logits, atol=1e-5)
    log_p = jax.nn.log_softmax(output.logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, jnp.asarray(np.load(tokens))[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(one["nll"], nll, atol=1e-5)
    for name in ("logits", "mtp_logits", "nll"):
        assert one[name].dtype == np.float32
        np.testing.assert_allclose(eight[name], one[name], atol=2e-5)


def test_there_and_back_is_byte_identical(checkpoint, tmp_path):
    folder = checkpoint[0]
    assert cli.main(["convert", str(folder), str(tmp_path / "store"), "--format", "orbax"]) == 0
    assert cli.main(["convert", str(tmp_path / "store"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_greedy_generation_is_the_argmax(checkpoint, capsys):
    folder, cfg, params = checkpoint
    assert (
        cli.main(["generate", str(folder), "--tokens", "3,5,7", "--max-new-tokens", "5", "--json"])
        == 0
    )
    got = json.loads(capsys.readouterr().out)["tokens"]
    ids = [3, 5, 7]
    for token in got:
        # The shape of the tokens above, which is compiled already.
        row = jnp.zeros((3, 30), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
        assert token == int(v4jax.forward(cfg, params, row).logits[0, len(ids) - 1].argmax())
        ids.append(token)


CONFIG = """
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig
from v4jax.config import ModelConfig
def get_config():
    model, data = ModelConfig.from_json({model!r}), DataConfig(source={text!r})
    return TrainConfig(model=model, data=data, run_dir={run!r}, steps=2, batch_size=4, seq_len=16,
                       learning_rate=1e-3, warmup_steps=1)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("train {tmp}/none.py", "no such CONFIG.py"),
        ("train {cfg} --no-such-thing 3", "no-such-thing"),
        ("train {cfg} --steps many", "steps"),
        ("train {cfg} --mesh data=3", "batch_size: got 4; must divide by"),
        ("train {cfg} --mesh data=64", "needs 64 devices; 8 cpu device(s) are there"),
        ("train {cfg} --mesh tensor=4", "does not divide by tensor=4"),
        ("train {cfg} --mesh date=2", "mesh: got axis 'date'"),
        ("train {cfg} --mesh 2x4", "mesh: got '2x4' in '2x4'; must look like data=2,expert=4"),
        ("train {cfg} --quant fp8", "quant: got 'fp8'; allowed: 'none', 'official'"),
        ("train {cfg} --layout best", "layout: got 'best'"),
        ("train {cfg} --mesh tensor=2 --layout dp", "does not use mesh axis tensor=2"),
        ("train {cfg} --data.source {tmp}/empty", "empty"),
        ("train {cfg} --run-dir {tmp}/foreign", "holds no v4jax run"),
        ("score {ckpt} --tokens {tmp}/bad.npy --out {tmp}/o.npz", "96"),
        ("score {ckpt} --tokens {tmp}/float.npy --out {tmp}/o.npz", "must be integers [B, S]"),
        ("score {ckpt} --tokens {tmp}/none.npy --out {tmp}/o.npz", "no such file"),
        (
            "score {ckpt} --tokens {tmp}/good.npy --out {tmp}/o.npz --quant official",
            "quant 'official' needs",
        ),
        ("score {tmp}/empty --tokens {tmp}/good.npy --out {tmp}/o.npz", "config.json"),
        (
            "score {tmp}/none --tokens {tmp}/good.npy --out {tmp}/o.npz",
            "none: no such folder; expected config.json",
        ),
        ("generate {tmp}/none --prompt a", "none: no such folder; expected config.json + safe"),
        ("generate {tmp}/good.npy --prompt a", "npy: is a file; must be a checkpoint folder"),
        ("chat {tmp}/none", "none: no such folder; expected config.json + safetensors, or"),
        ("chat org/name", "org/name: no such folder here, nor in the Hub's cache"),
        ("generate {ckpt} --tokens 1,x", "must be integers separated by commas"),
        ("generate {ckpt} --tokens 1,96", "96"),
        ("generate {ckpt} --prompt hello", "tokenizer.json"),
        ("generate {ckpt} --tokens 1 --temperature -1", "temperature: got -1.0"),
        (
            "generate {ckpt} --tokens 1 --temperature 1e-40",
            "temperature: got 1e-40; must be 0 (the likeliest token), or 1e-6 or above",
        ),
        ("generate {ckpt} --tokens 1 --stop-tokens 999999", "--stop-tokens: got id 999999"),
        (
            "generate {ckpt} --tokens 99999999999999999999999",
            "prompt: got 99999999999999999999999 and others",
        ),
        (
            "generate {ckpt} --tokens 1 --cache-tokens 1000000000000",
            "the cache: got room for 1000000000000 tokens",
        ),
        (
            "generate {ckpt} --tokens 1 --prefix-cache x --prefix-cache-bytes 0",
            "prefix cache: got a limit of 0 bytes",
        ),
        (
            "generate {ckpt} --tokens 1 --prefix-cache {ckpt}/config.json",
            "config.json, which is not a folder",
        ),
        (
            "generate {ckpt} --tokens 1 --top-p 0.5",
            "temperature 0, which takes the likeliest token",
        ),
        ("generate {ckpt} --tokens 1 --temperature 1 --top-p 0", "top_p: got 0.0"),
        ("generate {ckpt} --tokens 1 --samples 2", "--samples: got 2"),
        ("generate {ckpt} --tokens 1 --stop x", "tokenizer is not in use"),
        ("generate {ckpt} --tokens 1,2,3 --cache-tokens 8", "the cache, which has room for 8"),
        (
            "generate {ckpt} --tokens 1 --max-new-tokens 1048576",
            "longer than max_position_embeddings",
        ),
        ("generate {ckpt} --tokens 1 --seed -1", "seeds: got"),
        ("generate {ckpt} --tokens 1 --cache official", "cache: got 'official' with quant 'none'"),
        ("convert {ckpt} {tmp}/foreign", "not an empty directory"),
        ("convert {ckpt} {tmp}/o --dtype official", "input features; must be a multiple of 32"),
        (
            "convert {ckpt} {tmp}/o --format orbax --dtype fp8",
            "a v4jax store holds float32 or bfloat16",
        ),
        ("convert {ckpt} {tmp}/o --workers 0", "workers: got 0"),
        ("train {cfg} --init-from {ckpt}", "is another model: vocab_size is 96 there, 264 here"),
        ("train {cfg} --init-from {tmp}/none", "no such file"),
        ("train {cfg} --export official", "must be a multiple of 32"),
        ("cost {tmp}/foreign/config.json", "model_type: got 'llama'; allowed: 'deepseek_v4'"),
        ("cost {ckpt}/config.json --context 0", "context: got 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments, words, checkpoint, text_folder, tmp_path, capsys
):
    folder, cfg, _ = checkpoint
    np.save(tmp_path / "good.npy", np.zeros((1, 4), np.int64))
    np.save(tmp_path / "bad.npy", np.full((1, 4), 96))
    np.save(tmp_path / "float.npy", np.zeros((1, 4)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text('{"model_type": "llama"}')
    if "--run-dir" in arguments:
        (tmp_path / "foreign/config.json").rename(tmp_path / "foreign/other.txt")
    wide = cfg.replace(vocab_size=264)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/config.json").write_text(json.dumps(wide.to_dict()))
    config = tmp_path / "cfg.py"
    config.write_text(
        CONFIG.format(
            model=str(tmp_path / "wide"), text=str(text_folder), run=str(tmp_path / "run")
        )
    )
    before = digest(tmp_path)
    code = cli.main(arguments.format(tmp=tmp_path, cfg=config, ckpt=folder).split())
    captured = capsys.readouterr()
    assert code == 2, captured
    assert words in captured.err
    assert captured.err.count("\n") == 1
    left = {path for path in digest(tmp_path) if "__pycache__" not in path.parts}
    assert left == set(before)


def test_a_reader_that_leaves_ends_a_command_quietly():
    """The case of `v4jax cost configs/flash.py | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "v4jax", "cost", "configs/flash.py"],
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
