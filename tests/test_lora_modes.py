"""Runs of adapters in every mode that runs of all weights have, on a mesh."""

import json

import jax
import numpy as np
import pytest
from small_runs import MODEL, small_run, write_text
from trees import random_params

from v4jax.adapters.config import Lora
from v4jax.api import load
from v4jax.checkpoint.export import save_safetensors
from v4jax.data.config import DataConfig
from v4jax.train import run_steps
from v4jax.train.loop import train
from v4jax.train.stability import StabilityConfig
from v4jax.train.stages import Stage

LORA = Lora(rank=2, targets=("*", "indexer.*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    write_text(folder / "text")
    save_safetensors(MODEL, random_params(MODEL), folder / "base", dtype="float32")
    return folder


def run_of(folder, name, **changes):
    fields = dict(lora=LORA, init_from=str(folder / "base"), index_learning_rate=1e-3)
    return small_run(folder / "text", folder / name, **fields | changes)


def lines(folder, name):
    text = (folder / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.long
def test_stages_micro_batches_and_evaluation_on_a_mesh(place):
    """Losses are those of one device; the base stays what it was."""
    changes = dict(
        steps=4,
        batch_size=8,
        gradient_accumulation=2,
        eval_batches=1,
        eval_every=2,
        log_every=1,
        watch_every=2,
        export="bfloat16",
        stages=(Stage(after=2, batch_size=16, seq_len=16),),
        checkpoint_every=2,
    )
    train(run_of(place, "one", **changes))
    train(run_of(place, "mesh", mesh="data=2,expert=2", **changes))
    one, mesh = (
        [line["loss"] for line in lines(place, name) if "loss" in line] for name in ("one", "mesh")
    )
    assert len(one) == 4
    np.testing.assert_allclose(one, mesh, rtol=1e-4)
    assert any("held_out_nll" in line for line in lines(place, "mesh"))
    _, params = load(place / "base", adapter=place / "mesh/adapter")
    _, other = load(place / "base", adapter=place / "one/adapter")
    for got, want in zip(*map(jax.tree.leaves, (params["lora"], other["lora"])), strict=True):
        np.testing.assert_allclose(got, want, atol=0.05)  # AdamW follows rounding in small ones


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.long)])
def test_a_spike_goes_back_and_experts_are_chosen_ahead(place, monkeypatch, step):
    """To a checkpoint, with the base that is there; or to the beginning: the base is read anew."""
    real, calls = run_steps.spike, []

    def once(*args):
        calls.append(args)
        return "made up" if len(calls) == step else real(*args)

    monkeypatch.setattr(run_steps, "spike", once)
    stability = StabilityConfig(rollbacks=1, anticipate=3)
    changes = dict(steps=5, checkpoint_every=2, keep=3, log_every=1, stability=stability)
    name = f"spike-{step}"
    train(run_of(place, name, **changes))
    told = lines(place, name)
    assert any("rollback" in str(line) for line in told)
    assert max(line.get("anticipating", 0) for line in told) == 1
    assert [line["step"] for line in told if "loss" in line][-1] == 5


@pytest.mark.slow
def test_conversations(place):
    """SFT: only answers are learned; the router's bias stays."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(40)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source=str(place / "chats.jsonl"),
        format="chat",
        column="messages",
        tokenizer="byte-chat",
        packing="best_fit",
        held_out=0.2,
    )
    model = MODEL.replace(vocab_size=MODEL.vocab_size + 16)
    save_safetensors(model, random_params(model), place / "chat-base", dtype="float32")
    changes = dict(model=model, data=data, seq_len=64, init_from=str(place / "chat-base"))
    train(run_of(place, "chat", **changes))
    losses = [line["loss"] for line in lines(place, "chat") if "loss" in line]
    assert losses[-1] < losses[0]
