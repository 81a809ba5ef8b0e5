"""Names of implementations are checked where they are written; one line says what is allowed."""

import dataclasses

import pytest

from v4jax.kernels import attention, index_scores, matmul, pooling, rotate, sinkhorn, streams, top_k
from v4jax.kernels.choice import NAMES, Kernels, kernels_from
from v4jax.kernels.expert_ffn import op as expert_ffn

OPS = {
    "attention": attention,
    "index_scores": index_scores,
    "top_k": top_k,
    "pooling": pooling,
    "expert_ffn": expert_ffn,
    "sinkhorn": sinkhorn,
    "streams": streams,
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
        ("atention=reference", "ops: attention, index_scores"),
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
