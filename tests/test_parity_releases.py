"""The trunk of the newer releases against transformers 5, live: logits of the same files.

It needs the extra `parity`.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from reference import transformer
from releases import RELEASES, make_release

import v4jax
from v4jax.checkpoint.names import to_official
from v4jax.convert.conversion import convert

NEWER = [name for name in RELEASES if name != "flash"]
IN_CI = ("flash-0731", "flash-vision-exp")


def logits_of(folder, tokens, saved=None):
    """transformers' logits of a checkpoint, which it then saves to `saved`."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    torch.set_num_threads(2)
    peer = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if saved is not None:
        peer.save_pretrained(saved)
    with torch.no_grad():
        return [peer.eval()(torch.tensor(one)).logits.numpy() for one in tokens]


def compare(folder, theirs, tokens):
    cfg, params = v4jax.load(folder)
    for one, expected in zip(tokens, theirs, strict=True):
        got = np.asarray(v4jax.forward(cfg, params, jnp.asarray(one)).logits)
        if np.abs(got - expected).max() > 2e-4:
            # Two scores of a top-k closer than float32 resolves; then float64 is the judge, as in
            # tests/test_parity_live.py.
            expected = transformer.forward(cfg, to_official(cfg, params), one).logits
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, (2, seq)) for seq in (5, 141)]


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize("release", NEWER)
def test_transformers_reads_the_same_trunk(tmp_path, tokens, release):
    """The folder is opened as it is; of a tower's, without what transformers does not know."""
    folder = tmp_path / "release"
    make_release(folder, release, dtype="float32", change=_tame)
    theirs = folder
    if release == "flash-vision-exp":
        theirs = tmp_path / "text"
        convert(folder, theirs, drop=["vision"])
        assert json.loads((theirs / "config.json").read_text())["dspark_block_size"] == 5
    compare(folder, logits_of(theirs, tokens, tmp_path / "saved"), tokens)
    # What it saves has keys of a drafter and none of its tensors.
    assert v4jax.load(tmp_path / "saved")[0].layer_kinds == v4jax.load(folder)[0].layer_kinds


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "release",
    [name if name in IN_CI else pytest.param(name, marks=pytest.mark.long) for name in RELEASES],
)
def test_low_precision_without_the_drafter_is_the_same_model(tmp_path, tokens, release):
    """fp8 and MXFP4 are read by v4jax; transformers reads what convert made of them."""
    folder = tmp_path / "release"
    make_release(folder, release)
    drop = ["drafter", "vision"] if release == "flash-vision-exp" else ["drafter"]
    convert(folder, tmp_path / "plain", drop=drop)
    raw = json.loads((tmp_path / "plain/config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 0 and len(raw["compress_ratios"]) == 7
    compare(folder, logits_of(tmp_path / "plain", tokens), tokens)


def _tame(raw, carried):
    """transformers would refuse float32 weights beside this key, which files of fp8 have."""
    raw.pop("quantization_config", None)
