"""A user's own layout: made and checked like the named ones, and accepted wherever a name is."""

import ast
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from test_mesh import CFG, MODEL
from trees import random_params, small_config

import v4jax
from sharding.axes import ARRAYS, LOGICAL_AXES, MESH_AXES
from sharding.params import named_shardings
from sharding.rules import LAYOUTS, AxisRules, layout, layout_for
from v4jax import api
from v4jax.cli import main as cli
from v4jax.cli.train import sample
from v4jax.data.config import DataConfig
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.planner.command import examine, look_for
from v4jax.planner.hardware import hardware_of
from v4jax.planner.page import page_data
from v4jax.planner.plan import as_dict
from v4jax.planner.request import Request
from v4jax.python_files import read_layout
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics

EXAMPLE = ROOT / "examples/own_layout.py"
EP = {"act_batch": "slice data expert", "experts": "expert"}


def test_a_layout_of_the_same_table_is_the_named_one():
    mine = layout(name="mine", **EP)
    assert mine == LAYOUTS["ep"] and hash(mine) == hash(LAYOUTS["ep"])
    assert layout(act_batch=("slice", "data", "expert"), experts=["expert"], embed=None) == mine
    assert layout(act_batch="data expert", experts="expert") != mine != layout(exchange=True, **EP)
    assert mine.mesh_axes("embed") == (), "what is left out is replicated"


def test_a_layout_is_frozen_and_shows_how_it_was_made():
    mine = layout(name="mine", exchange=True, **EP)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.exchange = False
    assert (str(mine), str(layout(**EP)), str(LAYOUTS["ep"])) == ("mine", "own", "ep")
    assert (
        repr(mine)
        == "layout(experts='expert', act_batch='slice data expert', exchange=True, name='mine')"
    )
    again = eval(repr(mine))
    assert (again, again.name) == (mine, "mine")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (
            {"expert": "expert"},
            r"got logical axis 'expert' \(did you mean .*'experts'.*\); known: layers, vocab",
        ),
        (
            {"experts": "experts"},
            r"experts: got mesh axis 'experts' \(did you mean 'expert'\?\); allowed: "
            + ", ".join(MESH_AXES),
        ),
        ({"act_batch": "data data"}, "act_batch: mesh axis 'data' is twice in 'data data'"),
        ({"act_batch": 3}, "act_batch: got 3; must be mesh axes"),
        ({"act_batch": ("data", 3)}, "act_batch: got .*; must be mesh axes"),
        (
            {"act_batch": "data", "act_heads": "data"},
            "'data' is used twice by an array with axes act_batch, act_seq, act_heads: by "
            "act_batch and act_heads",
        ),
        (
            {"act_batch": "data", "index_heads": "data"},
            "'data' is used twice .*: by act_batch and index_heads",
        ),
        (
            {"act_batch": "fsdp", "embed": "fsdp", "heads": "fsdp", "groups": "fsdp"},
            "'fsdp' is used twice .*: by groups and embed",
        ),
        (
            {"act_seq": "context data"},
            "act_seq: got 'context data'; a sequence is split over one mesh axis",
        ),
        ({"cache_slots": "data"}, "cache_slots: leave it out"),
        (
            {"experts": "expert"},
            "experts: got mesh axis 'expert', which must split tokens too; .* over nothing",
        ),
        (
            {"act_batch": "data", "embed": "tensor"},
            "embed: got mesh axis 'tensor', which must split tokens too; .* over 'data'",
        ),
        (
            {"act_batch": "data", "expert_embed": "fsdp"},
            "expert_embed: got mesh axis 'fsdp', which must split tokens too",
        ),
        (
            {"act_batch": "data tensor", "vocab": "tensor"},
            "vocab: got mesh axis 'tensor', which splits tokens",
        ),
        (
            {"act_batch": "fsdp", "expert_hidden": "fsdp"},
            "expert_hidden: got mesh axis 'fsdp', which splits tokens",
        ),
        ({"act_batch": "data", "exchange": True}, "exchange=True .* experts is not split"),
        ({"exchange": "yes"}, "got exchange 'yes'"),
        ({"name": "pod"}, "'pod' is a layout of v4jax"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(axes, words):
    with pytest.raises(ValueError, match=words) as error:
        layout(**axes)
    assert str(error.value).startswith("layout: ") and "\n" not in str(error.value)


def _named_in_calls():
    """(file, logical axes) of each call of constrain or spec that names some."""
    paths = [
        path
        for room in ("model", "cache", "kernels")
        for path in (ROOT / "v4jax" / room).glob("*.py")
    ]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("constrain", "spec"):
                texts = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                yield path, {one for one in texts if isinstance(one, str)} - {"cache_slots"}


def test_the_checks_know_every_array_of_the_model():
    known = [set(names) for names in ARRAYS]
    for names in jax.tree.leaves(param_axes(MODEL), is_leaf=lambda x: isinstance(x, tuple)):
        assert any(set(names) - {None} <= one for one in known), names
    called = set()
    for path, names in _named_in_calls():
        assert any(names <= one for one in known), (path, names)
        called |= names
    assert (
        {"act_heads", "act_hidden", "act_vocab", "act_streams", "index_heads"}
        <= called
        <= set(LOGICAL_AXES)
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ful", r"layout: got 'ful' \(did you mean 'full'\?\); known: full, dp"),
        ("", "layout: got ''; known: full"),
        (3, "layout: got 3; must be a name or an AxisRules"),
        (None, None),
        (AxisRules(), "got an AxisRules without 'layers'; make it with sharding.rules.layout"),
        (AxisRules((("batch", ("data",)),)), "got logical axis 'batch'"),
        (AxisRules(tuple((name, ("data",)) for name in LOGICAL_AXES)), "'data' is used twice"),
    ],
)
def test_a_config_takes_a_name_or_a_layout_and_nothing_else(value, words):
    if words is None:
        assert dataclasses.replace(CFG, layout=layout(**EP)).layout == LAYOUTS["ep"]
        return
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CFG, layout=value)


def test_a_mesh_axis_that_the_layout_leaves_out_is_refused():
    with pytest.raises(ValueError, match="layout 'own' does not use mesh axis tensor=2"):
        layout_for(layout(**EP), {"data": 2, "tensor": 2})


@pytest.mark.parametrize("given", ["ep", layout(**EP)])
def test_a_layout_without_a_mesh_is_refused_not_ignored(given, tmp_path):
    for call in (
        lambda: api.place_on(None, given),
        lambda: v4jax.load(tmp_path, layout=given),
        lambda: train(dataclasses.replace(CFG, layout=given)),
        lambda: as_dict(dataclasses.replace(CFG, layout=given)),
        lambda: examine(dataclasses.replace(CFG, layout=given), Request(paper=True)),
    ):
        with pytest.raises(
            ValueError, match="needs a mesh; give one, for example --mesh data=2"
        ) as error:
            (tmp_path / "config.json").write_text(json.dumps(MODEL.to_dict()))
            call()
        assert "\n" not in str(error.value)
    assert not api.place_on(None, "full")[1] and not api.place_on("data=1", given)[1]


WRONG = """
from sharding.rules import AxisRules, layout
mine = layout(act_batch="data expert", experts="expert")
other = layout(name="pretty", act_batch="data")
half = AxisRules((("act_batch", ("data",)),))
number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my.py").write_text(WRONG)
    (tmp_path / "bad.py").write_text(
        "from sharding.rules import layout\nx = layout(experts='expart')"
    )
    return tmp_path / "my.py"


def test_a_layout_of_a_file_is_called_as_it_was_asked_for(file):
    assert read_layout(f"{file}:mine") == layout(act_batch="data expert", experts="expert")
    assert str(read_layout(f"{file}:mine")) == f"{file}:mine"
    assert (
        read_layout("ep") == "ep"
        and read_layout(None) is None
        and read_layout(LAYOUTS["ep"]) is LAYOUTS["ep"]
    )
    assert api.place_on("expert=2", f"{file}:mine")[1] == read_layout(f"{file}:mine")


PLANS = [
    "train {demo} --dry-run --layout {text}",
    "layout {demo} --paper --layout {text}",
    "layout {demo} --compare {text}:data=8 dp:data=8",
]
USES = [
    "score x --tokens y --out z.npz --mesh data=2 --layout {text}",
    "generate {tmp} --tokens 1 --mesh data=2 --layout {text}",
    "chat {tmp} --mesh data=2 --layout {text}",
]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{tmp}/my.py:mne",
            "my.py: has no layout 'mne' (did you mean 'mine'?); layouts there: mine, other, half",
        ),
        ("{tmp}/my.py", "must be FILE.py:NAME; layouts there: mine, other, half"),
        ("{tmp}/my.py:", "must be FILE.py:NAME; layouts there: mine"),
        ("{tmp}/my.py:number", "number is of type int; must be made by sharding.rules.layout"),
        ("{tmp}/my.py:half", "got an AxisRules without 'layers'"),
        ("{tmp}/none.py:mine", "none.py: no such"),
        ("{tmp}:mine", "is a folder"),
        ("{tmp}/bad.py:x", "bad.py:2: ValueError: layout: experts: got mesh axis 'expart'"),
        ("my:mine", "my: no such"),
    ],
)
@pytest.mark.parametrize("command", [*PLANS, *USES])
def test_a_bad_layout_of_a_file_is_one_line_of_every_command(file, capsys, command, text, words):
    text = text.format(tmp=file.parent)
    demo = ROOT / "configs/demo.py"
    assert cli.main(command.format(demo=demo, text=text, tmp=file.parent).split()) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1, said.err
    assert not said.out


@pytest.mark.parametrize("command", PLANS)
def test_an_unknown_name_of_a_layout_is_one_line_before_anything_is_planned(capsys, command):
    """The other commands resolve a layout's name with the checkpoint's mesh."""
    demo = ROOT / "configs/demo.py"
    assert cli.main(command.format(demo=demo, text="ful").split()) == 2
    said = capsys.readouterr()
    assert "did you mean 'full'" in said.err and said.err.count("\n") == 1 and not said.out


def test_the_command_line_of_train_takes_names_and_files(capsys):
    def plan(*words):
        assert cli.main(["train", *map(str, words), "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["layout"]

    demo, mesh = ROOT / "configs/demo.py", ("--mesh", "fsdp=2,expert=4")
    assert plan(demo) == "full"
    assert plan(demo, *mesh, "--layout", "pod") == "pod"
    assert plan(demo, *mesh, f"--layout={EXAMPLE}:mine") == f"{EXAMPLE}:mine"
    assert plan(EXAMPLE) == "mine"
    assert plan(EXAMPLE, "--layout", "pod") == "pod"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(EXAMPLE), "--help"])
    said = capsys.readouterr().out
    assert (
        not stop.value.code and "--layout NAME|FILE.py:NAME" in said and "(default: mine)" in said
    )


def test_the_layout_lab_estimates_compares_searches_and_draws_it(capsys):
    assert cli.main(["layout", str(EXAMPLE), "--paper", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["layout"] == "mine"
    pair = [f"{EXAMPLE}:mine:fsdp=2,expert=4", "pod:fsdp=2,expert=4"]
    assert cli.main(["layout", str(ROOT / "configs/demo.py"), "--json", "--compare", *pair]) == 0
    both = json.loads(capsys.readouterr().out)
    assert (both["first"]["layout"], both["second"]["layout"]) == (f"{EXAMPLE}:mine", "pod")
    assert both["first"]["step_seconds"] != both["second"]["step_seconds"]


def test_a_search_ranks_it_among_the_named_ones():
    cfg = dataclasses.replace(
        CFG,
        layout=layout(name="mine", act_batch="expert", experts="expert", embed="expert"),
        mesh="",
    )
    found = look_for(cfg, Request(), 8).found
    assert {"mine", "full", "pod"} <= {one.layout for one in found.ranked}
    best = next(one for one in found.ranked if one.layout == "mine")
    lone = dataclasses.replace(cfg, mesh=best.mesh)
    page = page_data(
        lone, hardware_of("cpu"), examine(lone, Request(paper=True)), Request(paper=True)
    )
    assert page["title"] == f"mine on {best.mesh}" and "experts" in page["cuts"]["expert"]


TINY = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(4,),
    num_nextn_predict_layers=0,
    num_hash_layers=0,
    n_routed_experts=8,
    q_lora_rank=24,
)


def test_values_in_it_are_those_of_one_device():
    """The whole training step is in tests/test_mesh.py."""
    params, tokens = random_params(TINY), jnp.arange(64).reshape(4, 16)
    one = v4jax.forward(TINY, params, tokens).logits
    mesh, rules = api.place_on("fsdp=2,expert=2", read_layout(f"{EXAMPLE}:mine"))
    with jax.set_mesh(mesh):
        places = named_shardings(mesh, rules, abstract_params(TINY), param_axes(TINY))
        own = v4jax.forward(TINY, jax.device_put(params, places), tokens, rules=rules).logits
    np.testing.assert_allclose(own, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.slow
def test_a_run_samples_exports_resumes_and_is_scored_in_it(tmp_path, capsys):
    """Two steps in it and one in another layout have the losses of three steps on one device."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / f"text/{i}.txt").write_text(f"document {i}: the cat sat on the mat. " * 20)
    (tmp_path / "my.py").write_text(EXAMPLE.read_text())
    cfg = TrainConfig(
        model=TINY,
        data=DataConfig(source=str(tmp_path / "text")),
        run_dir=str(tmp_path / "one"),
        steps=3,
        batch_size=4,
        seq_len=16,
        learning_rate=1e-3,
        warmup_steps=0,
        log_every=1,
        eval_batches=0,
        remat=False,
        export="float32",
    )
    train(cfg)
    mine = layout(
        name="mine",
        act_batch="fsdp expert",
        experts="expert",
        expert_embed="fsdp",
        embed="expert fsdp",
    )
    ours = dataclasses.replace(
        cfg, run_dir=str(tmp_path / "own"), mesh="fsdp=2,expert=2", layout=mine
    )
    train(dataclasses.replace(ours, steps=2, export="none"))
    train(dataclasses.replace(ours, layout="ep_fsdp", sample_prompt="the", sample_tokens=2))
    one, own = ([line["loss"] for line in read_metrics(tmp_path / run)] for run in ("one", "own"))
    assert len(one) == 3 and own == pytest.approx(one, rel=1e-5)
    asks = dataclasses.replace(ours, sample_prompt="the", sample_tokens=2)
    assert sample(asks)["sample"].startswith("the")

    np.save(tmp_path / "tokens.npy", np.arange(16).reshape(2, 8))
    score = f"score {tmp_path}/own/export --tokens {tmp_path}/tokens.npy --out {tmp_path}"
    assert cli.main(f"{score}/a.npz".split()) == 0
    flags = f"--mesh fsdp=2,expert=4 --layout {tmp_path}/my.py:mine"
    assert cli.main(f"{score}/b.npz {flags}".split()) == 0
    one_nll, own_nll = (np.load(tmp_path / name)["nll"] for name in ("a.npz", "b.npz"))
    np.testing.assert_allclose(own_nll, one_nll, rtol=1e-5)
