"""DSpark on meshes, with the served model's numbers and caches, and from stored prefixes."""

import json

import numpy as np
import pytest
from releases import make_release

from v4jax.cli import main as cli

SIZES = dict(
    num_hidden_layers=3,
    compress_ratios=(4, 128, 4),
    num_hash_layers=1,
    num_attention_heads=8,
    o_groups=8,
    o_lora_rank=8,
    n_routed_experts=8,
    index_head_dim=32,
    vocab_size=104,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function (flags) -> the result of `generate` as JSON, of a drafter that often agrees."""
    folder = tmp_path_factory.mktemp("dspark") / "release"

    def taps(raw, carried):
        raw["dspark_target_layer_ids"] = [0, 1, 2]

    make_release(folder, "flash-0731", change=taps, few_tokens=3, **SIZES)
    prompt = np.random.default_rng(0).integers(0, 96, 600).tolist()

    def result(capsys, *flags, tokens=9):
        command = ["generate", str(folder), "--tokens", ",".join(map(str, prompt[:tokens]))]
        command += ["--json", "--max-new-tokens", "32", "--stop-tokens", "97", "--seed", "5"]
        assert cli.main([*command, "--temperature", "0.5", "--top-k", "3", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return result


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("context=2,expert=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", marks=pytest.mark.long),
    ],
)
def test_drafts_on_a_mesh_change_no_token(run, capsys, mesh):
    plain = run(capsys)
    found = run(capsys, "--mesh", mesh, "--speculative")
    assert found["tokens"] == plain["tokens"]
    assert 0 < found["accepted"] < found["drafted"]


@pytest.mark.long
@pytest.mark.parametrize("cache", ["dtype", "official"])
def test_drafts_with_the_served_models_numbers_change_no_token(run, capsys, cache):
    served = ("--quant", "official", "--cache", cache)
    plain, found = run(capsys, *served), run(capsys, *served, "--speculative")
    assert found["tokens"] == plain["tokens"]
    assert 0 < found["accepted"] < found["drafted"]


@pytest.mark.long
def test_drafts_after_a_stored_prefix_change_no_token(run, capsys, tmp_path):
    """The second run reads the rings of the stages from the store."""
    plain = run(capsys, tokens=600)
    stored = ("--prefix-cache", str(tmp_path / "prefixes"), "--speculative")
    first, again = (run(capsys, *stored, tokens=600) for _ in range(2))
    assert first["tokens"] == again["tokens"] == plain["tokens"]
    assert first["accepted"] == again["accepted"] > 0
