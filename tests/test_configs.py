"""Each shipped configuration fits the chips that it names, and runs: here with a small model."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

import v4jax
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.cli import main as cli
from v4jax.cli.overrides import override
from v4jax.config import CSA, HCA, WINDOW_ONLY
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import target_of
from v4jax.planner.plan import plan
from v4jax.planner.search import search
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics

CHIPS = {
    "flash": "v5p:4x4x8",
    "pro": "v5p:8x8x8",
    "v5e_8": "v5e:2x4",
    "gpu_node": "h100:8",
    "flash_continue": "v5p:4x4x4",
    "flash_sft": "h200:32",
    "flash_lora": "h100:8",
    "pro_lora": "h200:16",
}
"""Configuration -> the chips that its docstring names."""
ONE_SEARCH = sorted({*CHIPS} - {"flash", "pro", "v5e_8", "flash_lora", "pro_lora"})
"""Those whose mesh and micro-batches the search chose for their first stage alone."""
SMALL_MESHES = {
    "v5e_8": "fsdp=4,expert=2",
    "gpu_node": "fsdp=8",
    "flash_continue": "expert=8",
    "flash_sft": "expert=4,tensor=2",
}
"""Configuration -> its mesh, with axes so short that 8 devices make it."""


def shipped(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CHIPS)
def test_every_stage_fits_the_chips_that_the_docstring_names(name):
    target = CHIPS[name]
    assert f"--target {target}" in importlib.import_module(f"configs.{name}").__doc__
    for stage in plan(shipped(name), target):
        assert stage.step.fits, stage


@pytest.mark.parametrize("name", ONE_SEARCH)
def test_mesh_and_micro_batches_are_what_the_search_finds(name):
    """Nothing is faster; of equally fast layouts the one that says least is shipped."""
    target = target_of(CHIPS[name])
    cfg = dataclasses.replace(shipped(name), stages=())
    best = search(
        dataclasses.replace(cfg, gradient_accumulation=1), target.hardware, target.devices
    ).ranked[0]
    own = estimate(cfg, target.hardware)
    assert own.step_seconds == pytest.approx(best.step_seconds, rel=1e-6), best
    assert own.micro_batches == best.micro_batches and own.memory_bytes == best.memory_bytes


def test_the_mesh_of_v5e_8_is_nearly_the_fastest():
    """libtpu 0.0.42 ends the process when it compiles the fastest, fsdp=8."""
    cfg, target = dataclasses.replace(shipped("v5e_8"), stages=()), target_of(CHIPS["v5e_8"])
    one = dataclasses.replace(cfg, gradient_accumulation=1)
    best = search(one, target.hardware, target.devices).ranked[0]
    assert estimate(cfg, target.hardware).step_seconds < 1.02 * best.step_seconds


def reduced(name, run):
    """The shipped run with a model of 3 layers on 8 devices: two steps of its first stage.

    Everything else is as shipped.
    """
    cfg = shipped(name)
    model = dataclasses.replace(
        cfg.model,
        vocab_size=280,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_hash_layers=1,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        sliding_window=8,
        compress_ratios=(WINDOW_ONLY, CSA, HCA, WINDOW_ONLY),
    )
    return dataclasses.replace(
        cfg,
        model=model,
        mesh=SMALL_MESHES[name],
        run_dir=str(run),
        steps=2,
        batch_size=8 * cfg.micro_batches,
        seq_len=144,
        warmup_steps=1,
        decay_steps=1,
        log_every=1,
        eval_every=2,
        eval_batches=1,
        checkpoint_every=2,
        stages=(),
    )


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer(CHAT_TOKENS + FIM_TOKENS).save(folder)
    return folder


def write_records(path, name):
    """Conversations for the fine-tuning configuration, otherwise documents, as JSON lines."""
    if name == "flash_sft":
        turns = [
            ("user", "Is {} odd or even?"),
            ("assistant", "I cannot tell, for {} has a last digit."),
        ]
        records = [
            {"messages": [{"role": role, "content": text.format(i)} for role, text in turns]}
            for i in range(64)
        ]
    else:
        records = [{"text": f"document {i}: " + "the cat sat on the mat. " * 20} for i in range(64)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# One that starts afresh and one from released weights; the other two have the same stages.
@pytest.mark.long
@pytest.mark.parametrize("name", ["v5e_8", "flash_sft"])
def test_it_runs_with_the_flags_that_its_docstring_asks_for(name, tmp_path, tokenizer_folder):
    cfg = reduced(name, tmp_path / "run")
    write_records(tmp_path / "my.jsonl", name)
    flags = ["--data.source", str(tmp_path / "my.jsonl")]
    if cfg.init_from:
        release, store = tmp_path / "release", tmp_path / "store"
        params = v4jax.init_params(cfg.model, jax.random.key(1))
        v4jax.save_safetensors(cfg.model, params, release, dtype="bfloat16")
        ByteTokenizer(CHAT_TOKENS + FIM_TOKENS).save(release)
        assert cli.main(["convert", str(release), str(store), "--format", "orbax"]) == 0
        flags += ["--init-from", str(store), "--data.tokenizer", str(store)]
    else:
        flags += ["--data.tokenizer", str(tokenizer_folder)]
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert all(flag in doc for flag in flags[::2])
    summary = train(override(cfg, flags, "v4jax train"))
    lines = [line for line in read_metrics(cfg.run_dir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, cfg.steps + 1))
    assert np.isfinite([line["loss"] for line in lines]).all()
    exported = v4jax.load(summary["export"], dtype="bfloat16")[0]
    assert exported.difference(cfg.model) is None


@pytest.mark.parametrize(
    "name, has, words",
    [
        ("v5e_8", (), "tokenizer: tokenizer.json: no such file"),
        ("gpu_node", ("tokenizer",), "source: text: no such file or folder"),
        ("flash_continue", (), "init_from: .*/checkpoints/flash-base: no such file"),
        ("flash_sft", (), "init_from: .*/checkpoints/flash: no such file"),
    ],
)
def test_what_is_missing_is_refused_in_one_line_before_anything_is_written(
    name, has, words, tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--data.tokenizer", str(tokenizer_folder)] if "tokenizer" in has else []
    cfg = dataclasses.replace(shipped(name), mesh=SMALL_MESHES[name])
    with pytest.raises(ValueError, match=words) as refused:
        train(override(cfg, flags, "v4jax train"))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
