"""`v4jax layout`: full-size models lower on hundreds of absent devices, with large weights cut."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.export
import pytest
from test_mesh import CFG

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import layout_for
from v4jax.cli import main as cli
from v4jax.generate.cache import cache_shardings, decoding_rules, empty_cache
from v4jax.planner import report_layout
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import hardware_of
from v4jax.planner.portable import write_stablehlo

long = functools.partial(pytest.param, marks=pytest.mark.long)


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "v4jax", "layout", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, parameters", [long("flash", 284e9), ("pro", 1.6e12)])
def test_full_models_lower_on_512_devices(name, parameters):
    mesh = "slice=2,fsdp=4,context=2,expert=16,tensor=2"
    out = run(f"configs/{name}.py", "--mesh", mesh, "--layout", "pod", "--lower-only", "--json")
    report = json.loads(out)
    # Weights and momentum, float32, are held once in each of the two slices; tables, AdamW's second
    # moment and norms are the rest.
    assert 8 * parameters / 256 < report["state_bytes"] < 1.15 * 8 * parameters / 256
    dense = [row for row in report["largest"] if "/experts/" not in row[0]]
    assert all(size < 64e6 for _, _, size in dense), dense
    assert report["temporary_bytes"] is None and report["collectives"] == []


@pytest.mark.slow
def test_a_small_step_reports_what_it_sends():
    report = report_layout(dataclasses.replace(CFG, mesh="fsdp=2,expert=4"))
    sent = {(axes, kind): size for axes, kind, _, size in report.collectives}
    # Tokens travel to the devices that hold experts and back; weights are gathered over fsdp,
    # gradients scattered.
    for key in (
        ("expert", "all-gather"),
        ("expert", "reduce-scatter"),
        ("fsdp", "all-gather"),
        ("fsdp", "reduce-scatter"),
    ):
        assert sent[key] > 0, sent
    assert not any("?" in axes for axes, _ in sent)
    assert report.temporary_bytes > 0 and report.compile_seconds > 0
    assert "P(" in report.largest[0][1] and report.largest[0][2] >= report.largest[-1][2]
    assert all(len(row) == 4 for row in report.rows())
    # This is the estimate of the same layout, for simulated devices.
    predicted = estimate(dataclasses.replace(CFG, mesh="fsdp=2,expert=4"), hardware_of("cpu"))
    assert predicted.memory["weights"] + predicted.memory["optimizer"] == pytest.approx(
        report.state_bytes, rel=1e-3
    )
    assert sum(row[0] for row in predicted.sent.values()) == pytest.approx(
        sum(row[3] for row in report.collectives), rel=0.1
    )


TWO_LAYERS = dataclasses.replace(
    CFG,
    batch_size=8,
    seq_len=1024,
    model=CFG.model.replace(
        num_hidden_layers=2, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(4, 128)
    ),
)


@pytest.mark.parametrize(
    "mesh, layout", [("context=4,tensor=2", "full"), ("fsdp=2,expert=4", "pod")]
)
def test_a_step_of_decoding_lowers_and_holds_what_the_estimate_says(mesh, layout):
    cfg = dataclasses.replace(TWO_LAYERS, mesh=mesh, layout=layout)
    report, paper = (
        report_layout(cfg, lower_only=True, what="decode"),
        estimate(cfg, hardware_of("cpu"), "decode"),
    )
    assert paper.memory["weights"] + paper.memory["caches"] == pytest.approx(
        report.state_bytes, rel=1e-3
    )
    assert report.what == "decode" and report.temporary_bytes is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, layout",
    [
        long("context=4,tensor=2", "full"),
        long("expert=4,tensor=2", "ep_tp"),
        ("fsdp=2,expert=4", "pod"),
    ],
)
def test_a_step_of_decoding_sends_what_the_estimate_says(mesh, layout):
    cfg = dataclasses.replace(TWO_LAYERS, mesh=mesh, layout=layout)
    report, paper = report_layout(cfg, what="decode"), estimate(cfg, hardware_of("cpu"), "decode")
    assert sum(row[0] for row in paper.sent.values()) == pytest.approx(
        sum(row[3] for row in report.collectives), rel=0.1
    )
    if report.expert_bytes:  # gates and headroom come on top
        assert report.expert_bytes[0] >= report.expert_bytes[1] > 0


@pytest.mark.slow
def test_the_best_of_a_search_is_compiled():
    """The command makes as many simulated devices as it searches on."""
    out = run(
        "configs/demo.py",
        "--search",
        "--chips",
        "4",
        "--batch",
        "4",
        "--seq",
        "512",
        "--what",
        "decode",
        "--confirm",
        "1",
        "--json",
    )
    found = json.loads(out)
    (report,), best = found["confirmed"], found["ranked"][0]
    assert (report["what"], report["mesh"], report["layout"]) == (
        "decode",
        best["mesh"],
        best["layout"],
    )
    assert report["state_bytes"] == pytest.approx(
        best["memory"]["weights"] + best["memory"]["caches"], rel=1e-2
    )


def test_a_cache_lies_where_the_report_says():
    """Shardings of abstract arrays, beside the arrays that decoding begins with."""
    sizes = parse_mesh("data=2,context=4")
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        rules = decoding_rules(layout_for("full", sizes))
        make = functools.partial(empty_cache, TWO_LAYERS.model, 2, 1024, rules=rules)
        places, arrays = cache_shardings(mesh, rules, jax.eval_shape(make)), jax.jit(make)()
    for place, array in zip(jax.tree.leaves(places), jax.tree.leaves(arrays), strict=True):
        assert place.is_equivalent_to(array.sharding, array.ndim), (
            array.shape,
            place.spec,
            array.sharding,
        )


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--mesh", "fsdp=2,context=5"], "seq_len: got 384; must divide"),
        (["--mesh", "fsdp=2", "--batch", "3"], "batch_size: got 3; must divide"),
        (["--mesh", "expert=2", "--layout", "dp"], "layout 'dp' does not use mesh axis expert=2"),
        (
            ["--target", "v5p:4x4"],
            "mesh has 8 devices; target v5p:4x4 has 16; nearest mesh: data=2,expert=4,tensor=2",
        ),
        (["--target", "gb200:8"], "nearest: b200"),
        (["--search", "--target", "h100"], "--search needs --chips"),
        (
            ["--mesh", "fsdp=2", "--effort", "full"],
            "effort: got 'full' for 'cpu'; only the compiler",
        ),
        (["--mesh", "fsdp=2", "--estimate", "compiler"], "XLA gives none for 'cpu'"),
        (["--batch", "0", "--paper"], "batch_size: got 0; must be at least 1"),
        (["--gradient-accumulation", "0", "--paper"], "gradient_accumulation: got 0; must be"),
    ],
)
def test_bad_input_is_one_line(arguments, line, capsys):
    assert cli.main(["layout", "configs/demo.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1, error


def test_a_portable_module_says_what_it_lacks_or_reads_back(tmp_path):
    small = dataclasses.replace(TWO_LAYERS, mesh="fsdp=2,expert=2", seq_len=CFG.seq_len)
    path = tmp_path / "step.bin"
    if importlib.util.find_spec("flatbuffers") is None:
        with pytest.raises(ValueError, match="extra `export`"):
            write_stablehlo(str(path), small, hardware_of("v5p"))
        return
    said = write_stablehlo(str(path), small, hardware_of("v5p"))
    module = jax.export.deserialize(path.read_bytes())
    assert (module.nr_devices, module.platforms, said["platform"]) == (4, ("tpu",), "tpu")
    assert "stablehlo.all_gather" in module.mlir_module() and "sdy.mesh" in module.mlir_module()
