"""Names of implementations are checked where they are written; one line says what is allowed."""

import dataclasses

import jax.numpy as jnp
import pytest
from trees import small_config

import v4jax
from configs import demo
from v4jax.generate.request import check_request
from v4jax.generate.steps import DecodeConfig
from v4jax.kernels import attention, index_scores, matmul, pooling, rotate, sinkhorn, streams, top_k
from v4jax.kernels.choice import NAMES, Kernels, kernels_from
from v4jax.kernels.expert_ffn import op as expert_ffn
from v4jax.kernels.fused_attention import op as fused_attention
from v4jax.kernels.hyper_connection import op as hyper_connection
from v4jax.parameter_tree import abstract_params
from v4jax.score import score

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
