"""`v4jax layout`: an option without effect, or a compiler that is missing, is one line at once."""

import argparse

import pytest

from sharding import targets
from v4jax.cli import layout
from v4jax.cli import main as cli

GIVEN = {
    "config": ["configs/demo.py"],
    "mesh": ["--mesh", "fsdp=8"],
    "layout": ["--layout", "pod"],
    "target": ["--target", "v5p:2x2x2"],
    "what": ["--what", "decode"],
    "seq": ["--seq", "512"],
    "batch": ["--batch", "16"],
    "gradient_accumulation": ["--gradient-accumulation", "2"],
    "remat": ["--remat", "none"],
    "fp8": ["--fp8"],
    "released": ["--released"],
    "paper": ["--paper"],
    "lower_only": ["--lower-only"],
    "effort": ["--effort", "full"],
    "estimate": ["--estimate", "compiler"],
    "search": ["--search"],
    "chips": ["--chips", "8"],
    "confirm": ["--confirm", "1"],
    "compare": ["--compare", "full:fsdp=8", "dp:data=8"],
    "report": ["--report", "out.html"],
    "stablehlo": ["--stablehlo", "out.bin"],
    "measure": ["--measure", "out.json"],
}
"""Every option of the command, as it is given."""

ALL = frozenset(GIVEN)
WITHOUT_EFFECT = {
    "measure": ALL - {"measure"},
    "stablehlo": ALL
    - {"config", "mesh", "layout", "target", "seq", "batch", "gradient_accumulation", "remat"}
    - {"stablehlo", "measure"},
    "compare": {"mesh", "layout", "lower_only", "effort", "estimate", "chips", "confirm", "report"}
    | {"search"},
    "search": {"mesh", "layout", "lower_only", "effort", "estimate"},
    "paper": {"lower_only", "effort", "estimate"},
    "lower_only": {"effort", "estimate"},
    "what": {"gradient_accumulation", "remat"},
}
"""What is asked for -> the options that it does not read."""
PAIRS = [(job, name) for job, names in WITHOUT_EFFECT.items() for name in sorted(names)]


def refusal(words: list[str], capsys) -> str:
    assert cli.main(["layout", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_every_option_is_known():
    parser = argparse.ArgumentParser()
    layout.declare(parser)
    assert set(vars(parser.parse_args([]))) == ALL


@pytest.mark.parametrize("job, name", PAIRS)
def test_an_option_without_effect_is_refused_and_both_are_named(job, name, capsys):
    config = [] if job == "measure" else GIVEN["config"]
    error = refusal([*config, *GIVEN[job], *GIVEN[name]], capsys)
    assert GIVEN[job][0] in error, error
    assert ("CONFIG" if name == "config" else GIVEN[name][0]) in error, error


@pytest.mark.parametrize(
    "words, line",
    [
        (["--chips", "8"], "--chips has no effect without --search"),
        (["--confirm", "1"], "--confirm has no effect without --search"),
        (["--released"], "--released has no effect without --what decode"),
        (["--what", "lora", "--released"], "--released has no effect without --what decode"),
        (["--search", "--effort", "full"], "--effort has no effect without --confirm K"),
        (["--search", "--confirm", "1", "--paper"], "--confirm has no effect with --paper"),
        (["--search", "--confirm", "-1"], "--confirm: got -1; must be 0 or more"),
        (
            ["--search", "--target", "v5p:2x2x1", "--confirm", "1", "--chips", "8"],
            "--confirm: target v5p:2x2x1 has 4 devices; --chips asks for 8",
        ),
    ],
)
def test_an_option_that_lacks_another_is_refused(words, line, capsys):
    assert line in refusal(["configs/demo.py", *words], capsys)


@pytest.mark.parametrize(
    "more", [[], ["--lower-only"], ["--estimate", "compiler"], ["--search", "--confirm", "1"]]
)
@pytest.mark.parametrize("target, extra", [("h200:8", "gpu"), ("v5p:2x2x2", "tpu")])
def test_without_the_compiler_its_extra_is_named(target, extra, more, capsys, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    error = refusal(["configs/demo.py", "--target", target, *more], capsys)
    line = f"compiling for '{target}' needs the extra `{extra}`: pip install 'v4jax[{extra}]'"
    assert line in error, error


@pytest.mark.parametrize("target", ["h100:8", "v5p:2x2x2"])
def test_an_estimate_needs_no_compiler(target, capsys, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for more in (["--paper"], ["--search", "--batch", "8"]):
        assert cli.main(["layout", "configs/demo.py", "--target", target, "--json", *more]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "target, more, line",
    [
        ("h100:8", ["--effort", "full"], "only the compiler for TPUs has a choice"),
        ("h100:12", ["--search", "--confirm", "1"], "or a multiple of 8 (GPUs of a host)"),
        ("b200:8", ["--lower-only"], "--lower-only: JAX cannot compile for 'b200:8'"),
        ("v5p:8", ["--effort", "full"], "--effort: JAX cannot compile for 'v5p:8'"),
        ("b200:8", ["--search", "--confirm", "1"], "--confirm: JAX cannot compile for 'b200:8'"),
    ],
)
def test_what_no_compiler_can_do_is_refused(target, more, line, capsys):
    assert line in refusal(["configs/demo.py", "--target", target, *more], capsys)


def test_a_profile_of_a_cpu_is_estimated(capsys):
    """Only the target cpu itself is compiled for."""
    words = ["--target", "v4jax/planner/cpu.json:8", "--json"]
    assert cli.main(["layout", "configs/demo.py", *words]) == 0
    assert "lower_seconds" not in capsys.readouterr().out
