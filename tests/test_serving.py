"""transformers opens what v4jax exports and says the same (extra `parity`).

Logits do not depend on the form of a checkpoint.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from trees import random_params, small_config

import v4jax
from v4jax.cli import main as cli
from v4jax.convert import convert
from v4jax.data.config import DataConfig, tokenizer_of

ROOT = pathlib.Path(__file__).parent.parent
CFG = small_config(vocab_size=264, hidden_size=64, moe_intermediate_size=32)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A float32 export with a tokenizer, of weights small enough for tokens to matter."""
    folder = tmp_path_factory.mktemp("export") / "out"
    params = jax.tree.map(
        lambda leaf: leaf if leaf.ndim < 2 or leaf.shape[-1] == 2 else leaf * np.float32(0.1),
        random_params(CFG),
    )
    v4jax.save_safetensors(CFG, params, folder, dtype="float32")
    tokenizer_of(DataConfig()).save(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    return folder


@pytest.mark.parity
def test_the_script_of_the_page_generates_what_v4jax_generates(export, capsys):
    script = [
        sys.executable,
        ROOT / "docs" / "serve_transformers.py",
        export,
        "--prompt",
        "def ",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        cli.main(["generate", str(export), "--prompt", "def ", "--max-new-tokens", "12", "--json"])
        == 0
    )
    theirs, ours = (
        json.loads(done.stdout.splitlines()[-1])["tokens"],
        json.loads(capsys.readouterr().out)["tokens"],
    )
    assert theirs == ours and len(set(ours)) > 2
    assert "docs/serve_transformers.py out --prompt" in (ROOT / "docs" / "serving.md").read_text()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
def test_logits_through_the_store_and_back_are_the_same_bits(export, tmp_path):
    """The file's own logits beside those of store and export, by transformers and by v4jax."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    convert(export, tmp_path / "store", format="orbax")
    convert(tmp_path / "store", tmp_path / "back", dtype="float32")
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 150))
    theirs = []
    for directory in (export, tmp_path / "back"):
        peer = DeepseekV4ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            theirs.append(peer(torch.tensor(tokens)).logits.numpy())
    np.testing.assert_array_equal(*theirs)
    ours = [
        v4jax.forward(*v4jax.load(directory), tokens)
        for directory in (export, tmp_path / "store", tmp_path / "back")
    ]
    for other in ours[1:]:
        np.testing.assert_array_equal(other.logits, ours[0].logits)
        np.testing.assert_array_equal(other.mtp_logits, ours[0].mtp_logits)
    assert np.isfinite(theirs[0]).all() and np.ptp(theirs[0]) > 0.1
