"""Names of implementations are checked where they are written; one line says what is allowed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from trees import small_config

import v4jax
from configs import demo
from v4jax import score as scoring
from v4jax.chat.tokens import CHAT_TOKENS
from v4jax.cli import main as cli
from v4jax.generate import chat
from v4jax.generate import command as generate
from v4jax.generate.request import check_request
from v4jax.generate.steps import DecodeConfig
from v4jax.kernels import attention, index_scores, matmul, pooling, rotate, sinkhorn, streams, top_k
from v4jax.kernels.choice import NAMES, Kernels, interpreted, kernels_from
from v4jax.kernels.expert_ffn import op as expert_ffn
from v4jax.kernels.fused_attention import op as fused_attention
from v4jax.kernels.hyper_connection import op as hyper_connection
from v4jax.kernels.newton_schulz import op as newton_schulz
from v4jax.parameter_tree import abstract_params
from v4jax.score import score
from v4jax.tokenizer import ByteTokenizer
from v4jax.train import loop

TOKENIZER = ByteTokenizer(CHAT_TOKENS)
WRONG = "top_k=sort"
OPS = {
    "attention": attention,
    "fused_attention": fused_attention,
    "index_scores": index_scores,
    "top_k": top_k,
    "pooling": pooling,
    "expert_ffn": expert_ffn,
    "sinkhorn": sinkhorn,
    "streams": streams,
    "hyper_connection": hyper_connection,
    "matmul": matmul,
    "rotate": rotate,
    "newton_schulz": newton_schulz,
}


def test_every_op_is_a_field():
    assert [field.name for field in dataclasses.fields(Kernels)] == list(NAMES)
    assert all(2 <= len(names) <= 5 and names[0] == "reference" for names in NAMES.values())


@pytest.mark.parametrize("op", NAMES)
def test_names_are_those_of_the_ops(op):
    assert NAMES[op] == tuple(OPS[op].IMPLEMENTATIONS)


def test_what_a_text_chooses():
    assert kernels_from("") == Kernels() and hash(kernels_from("")) == hash(Kernels())
    assert set(dataclasses.astuple(kernels_from("reference"))) == {"reference"}
    some = kernels_from("attention=reference, top_k=bisection")
    assert some == Kernels(attention="reference", top_k="bisection")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("fast", "kernels: got 'fast'; must be empty"),
        ("attention", "op=implementation"),
        ("atention=reference", "ops: attention, fused_attention"),
        ("top_k=groups,top_k=reference", "each op once"),
        ("top_k=groups,", "each op once"),
        ("top_k=sort", "kernels: top_k: got 'sort'; must be one of reference, bisection, groups"),
        ("top_k=", "top_k: got ''; must be one of"),
    ],
)
def test_a_wrong_text_is_one_line(text, line):
    with pytest.raises(ValueError) as error:
        kernels_from(text)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_what_takes_a_text_refuses_a_wrong_one_before_it_begins():
    """The names of a configuration, of a call, of decoding and of scoring."""
    line = "kernels: top_k: got 'sort'"
    with pytest.raises(ValueError, match=line):
        dataclasses.replace(demo.get_config(), kernels=WRONG)
    with pytest.raises(ValueError, match=line):
        check_request(small_config(), [[1]], [0], 1, None, DecodeConfig(kernels=WRONG))
    with pytest.raises(ValueError, match=line):
        score("x", "tokens.npy", "out.npz", kernels=WRONG)
    params, tokens = abstract_params(small_config()), jnp.zeros((1, 8), jnp.int32)
    for call in (
        lambda: v4jax.forward(small_config(), params, tokens, kernels=WRONG),
        lambda: v4jax.loss(small_config(), params, {"tokens": tokens}, kernels=WRONG),
    ):
        with pytest.raises(ValueError, match=line):
            call()


SLOW = "hyper_connection=pallas_tpu,matmul=reference"
LINE = "kernels: hyper_connection=pallas_tpu: the platform is cpu, which interprets"


@pytest.mark.parametrize(
    ("text", "platform", "named"),
    [
        (SLOW, "cpu", "hyper_connection=pallas_tpu"),
        (
            "top_k=pallas_tpu,fused_attention=pallas_tpu",
            "gpu",
            "fused_attention=pallas_tpu, top_k=pallas_tpu",
        ),
        ("expert_ffn=ragged", "cpu", "expert_ffn=ragged"),
        ("expert_ffn=triton", "tpu", "expert_ffn=triton"),
    ],
)
def test_a_kernel_that_the_platform_interprets_is_named(text, platform, named):
    said = interpreted(text, platform)
    assert said.startswith(f"kernels: {named}: the platform is {platform}, which interprets")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("", "cpu"),
        ("reference", "cpu"),
        ("top_k=bisection,expert_ffn=blocked", "cpu"),
        ("hyper_connection=pallas_tpu,top_k=pallas_tpu,expert_ffn=ragged", "tpu"),
        ("expert_ffn=triton", "gpu"),
    ],
)
def test_nothing_is_said_of_kernels_that_the_platform_compiles(text, platform):
    assert interpreted(text, platform) == ""


class _Begun(Exception):
    """The long work of a command begins."""


def _begin(*_):
    raise _Begun


@pytest.mark.parametrize("command", ["train", "generate", "chat", "score"])
def test_a_command_says_it_before_its_long_work(command, tmp_path, capsys, monkeypatch):
    module = {"train": loop, "generate": generate, "chat": chat, "score": scoring}[command]
    monkeypatch.setattr(module, "check_folders" if command == "train" else "load", _begin)
    model = small_config(vocab_size=TOKENIZER.vocab_size)
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
    TOKENIZER.save(tmp_path)
    np.save(tmp_path / "tokens.npy", np.ones((1, 4), np.int32))
    words = {
        "train": ["configs/demo.py", "--run-dir", str(tmp_path / "run")],
        "generate": [str(tmp_path), "--prompt", "a"],
        "chat": [str(tmp_path)],
        "score": [str(tmp_path), "--tokens", str(tmp_path / "tokens.npy")]
        + ["--out", str(tmp_path / "out.npz")],
    }
    with pytest.raises(_Begun):
        cli.main([command, *words[command], "--kernels", SLOW])
    assert [line for line in capsys.readouterr().err.splitlines() if LINE in line]
