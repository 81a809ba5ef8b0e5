"""Runs that train adapters: what is saved, what resumes, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp
from small_runs import MODEL, small_run, write_text
from trees import random_params

from v4jax.adapters.config import Lora
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.store import Store
from v4jax.cli.arguments import BadInput
from v4jax.cli.overrides import override
from v4jax.train.loop import train

LORA = Lora(rank=2, alpha=8, targets=("attn.*", "shared_experts.*", "head"), dropout=0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a base of random weights, and a finished run of adapters."""
    folder = tmp_path_factory.mktemp("lora")
    write_text(folder / "text")
    save_safetensors(MODEL, random_params(MODEL), folder / "base", dtype="float32")
    train(run_of(folder, "run"))
    return folder


def run_of(folder, name, **changes):
    fields = dict(lora=LORA, init_from=str(folder / "base"), checkpoint_every=2)
    return small_run(folder / "text", folder / name, **fields | changes)


def saved(run, step=4):
    """The params item of a checkpoint, as NumPy arrays by path."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = ocp.metadata(str(run / f"checkpoints/{step}"), "params").metadata
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored
    )
    with Store(run) as store:
        params = store.load(step, {"params": abstract})["params"]
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def test_checkpoints_hold_pairs_and_name_their_base(place):
    arrays = saved(place / "run")
    assert {path[0] for path in arrays} == {"lora", "router"}
    moved = [np.abs(x).max() for path, x in arrays.items() if path[-1] == "b"]
    assert len(moved) > 15 and min(moved) > 0
    base = json.loads((place / "run/base.json").read_text())
    assert base["path"] == str(place / "base") and len(base["fingerprint"]) == 64
    sizes = [
        sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
        for folder in (place / "run/checkpoints/4/params", place / "base")
    ]
    assert sizes[0] < 0.2 * sizes[1]


def test_a_resumed_run_ends_with_the_same_bits(place):
    """With dropout, which depends on the seed and the step alone."""
    shutil.copytree(place / "run", place / "resumed")
    shutil.rmtree(place / "resumed/checkpoints/4")
    train(run_of(place, "resumed"))
    got, want = saved(place / "resumed"), saved(place / "run")
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, str(path))


def test_another_base_is_refused(place):
    params = random_params(MODEL)
    params["head"]["weight"] = params["head"]["weight"] + 1
    save_safetensors(MODEL, params, place / "other", dtype="float32")
    for changes, said in (
        ({"init_from": str(place / "other")}, "belongs to the base .*other has other weights"),
        ({"lora": None}, "has checkpoints of adapters; this run has no lora"),
        ({"lora": dataclasses.replace(LORA, rank=3)}, "lora.*has shape"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            train(run_of(place, "run", **changes))
        assert "\n" not in str(refused.value)


def test_a_base_that_is_not_there_is_refused_and_nothing_is_made(place):
    with pytest.raises(ValueError, match="nowhere: no such folder; expected config.json"):
        train(run_of(place, "none", init_from=str(place / "nowhere")))
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_from": ""}, "init_from: got ; must be a checkpoint with lora"),
        ({"gather": "step"}, "gather: got step; must be micro_batch with lora"),
        ({"lora": Lora(targets=("indexer.*",))}, "index_learning_rate: got 0.0; must be above 0"),
        ({"index_learning_rate": 1e-3}, "must be 0 where no target of lora begins with indexer"),
        ({"lora": Lora(targets=("q_proj",))}, "'q_proj' matches no matrix"),
    ],
)
def test_what_adapters_cannot_do_is_refused_in_one_line(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        run_of(tmp_path, "run", **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", ["--lora", "--lora.rnk"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_an_unknown_flag_of_adapters_names_the_nearest(tmp_path, lora, given):
    cfg = small_run(tmp_path, tmp_path / "run", lora=lora, init_from="base")
    with pytest.raises(BadInput, match=rf"no option {given} \(did you mean --lora.rank\?\)"):
        override(cfg, [given, "2"], "v4jax train")


def test_a_packed_base_trains_as_its_numbers_in_bfloat16(place, tmp_path):
    """The official formats of the base stay in memory; losses are those of the base read whole."""
    model = MODEL.replace(hidden_size=64, moe_intermediate_size=32)
    save_safetensors(model, random_params(model), tmp_path / "base", dtype="official")
    losses = []
    for base_dtype in ("packed", "bfloat16"):
        lora = Lora(rank=2, targets=("wq_b", "experts.*"), base_dtype=base_dtype)
        changes = dict(model=model, lora=lora, init_from=str(tmp_path / "base"), steps=2)
        train(run_of(place, f"run-{base_dtype}", **changes))
        lines = (place / f"run-{base_dtype}/metrics.jsonl").read_text().splitlines()
        losses.append([one["loss"] for one in map(json.loads, lines) if "loss" in one])
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
