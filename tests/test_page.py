"""The report page: one file, no network, and in a browser the same numbers as in Python.

This holds at the requested lengths and at others.
"""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
from test_mesh import CFG

from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from v4jax.planner.command import compare, examine
from v4jax.planner.compiled import LayoutReport
from v4jax.planner.estimate import estimate, terms_of
from v4jax.planner.hardware import target_of
from v4jax.planner.page import merged, report
from v4jax.planner.request import Request
from v4jax.planner.terms import bases, constants_of, total
from v4jax.planner.timing import Timing

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LAYOUT = dataclasses.replace(
    CFG,
    mesh="fsdp=2,context=2,expert=4",
    layout="pod",
    seq_len=1024,
    batch_size=16,
    optimizer_memory="host",
    remat="offload",
)
REQUEST = Request("h100:16", paper=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(str(path), LAYOUT, REQUEST, examine(LAYOUT, REQUEST))
    return path


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r"https?://|src=|@import|<link", text)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])
    assert (
        data["terms"]
        and data["parameters"][0][4] >= data["parameters"][-1][4]
        and 1024 in data["seqs"]
    )
    with pytest.raises(ValueError, match="leave out --compare"):
        report(
            str(page),
            LAYOUT,
            REQUEST,
            compare(LAYOUT, REQUEST, ["pod:fsdp=2,expert=8", "full:fsdp=2,expert=8"]),
        )


def test_the_page_has_what_xla_expects(tmp_path):
    timing = Timing("XLA", {"head": (0.25, 0.5)}, (), (), (), 0.75)
    found = examine(LAYOUT, REQUEST)
    compiled = LayoutReport(
        *("train", LAYOUT.mesh, "pod", "h100:16", 0, 0, 0, "", (), (), None, 0.0, 0.0, timing)
    )
    path = tmp_path / "report.html"
    report(str(path), LAYOUT, REQUEST, dataclasses.replace(found, compiled=compiled))
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text())[1])
    assert data["compiler"]["parts"] == {"head": [0.25, 0.5]}
    assert data["compiler"]["step_seconds"] == 0.75


def test_merging_addends_changes_no_sum():
    sizes = parse_mesh(LAYOUT.mesh)
    rules = layout_for("pod", sizes)
    terms = terms_of(LAYOUT, rules, sizes, "gpu")
    values = bases(constants_of(LAYOUT.model, rules, sizes), 1024, 16)
    few = merged(terms)
    assert len(few) < len(terms) / 4
    for kind in {term.kind for term in terms}:
        assert total((t for t in few if t.kind == kind), values) == pytest.approx(
            total((t for t in terms if t.kind == kind), values)
        )


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("seq, batch", [(1024, 16), (4096, 32)])
def test_a_browser_computes_what_python_does(page, seq, batch):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{page}#seq={seq}&batch={batch}&filter=experts",
    ]
    html = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    shown = {
        name: float(value)
        for name, value in re.findall(
            r'data-(\w+)="([\d.e+-]+)"', re.search(r"<body[^>]*>", html)[0]
        )
    }
    expected = estimate(
        dataclasses.replace(LAYOUT, seq_len=seq, batch_size=batch),
        target_of(REQUEST.target).hardware,
    )
    assert shown["step"] == pytest.approx(expected.step_seconds, rel=1e-9)
    assert shown["memory"] == pytest.approx(expected.memory_bytes, rel=1e-9)
    assert shown["mfu"] == pytest.approx(expected.mfu, rel=1e-9)
    assert 0 < shown["shown"] < 60 and len(re.findall(r'data-i="\d+"', html)) == 16
