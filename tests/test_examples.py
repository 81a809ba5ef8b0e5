"""The examples run: the loop and the notebook, on the tests' 8 simulated devices.

See also tests/test_own_layout.py.
"""

import contextlib
import io
import json
import runpy
import textwrap

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest
from commands import ROOT

LOOP = ROOT / "examples/own_loop.py"
NOTEBOOK = ROOT / "examples/sharding.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


@pytest.fixture(scope="module")
def notebook():
    """(names that the cells leave, what they print, how many pictures they show)."""
    matplotlib.use("Agg")
    names, pictures = {}, []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(plt, "show", lambda: pictures.append(plt.gcf()))
        for cell in cells():
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    plt.close("all")
    return names, out.getvalue(), pictures


def test_the_notebook_is_stored_without_outputs():
    for cell in cells():
        assert cell["cell_type"] == "markdown" or not (cell["outputs"] or cell["execution_count"])


def test_the_notebook_shows_the_loss_of_one_device(notebook):
    names, printed, pictures = notebook
    assert float(names["loss"]) == pytest.approx(float(names["alone"]), abs=1e-4)
    assert "one" in printed and len(pictures) == 1
    assert len(pictures[0].axes) == len(names["drawn"])


def test_the_notebook_draws_every_shard(notebook):
    """Embedding and queries lie in four parts, experts in four on these axes, the gate in two."""
    _, _, pictures = notebook
    assert [len(panel.patches) for panel in pictures[0].axes] == [4, 4, 4, 2]


def test_a_loop_of_your_own_learns_and_keeps_its_layout():
    with contextlib.redirect_stdout(io.StringIO()):
        weights, state, losses = runpy.run_path(str(LOOP))["train"]()
    assert losses[0] == pytest.approx(5.66, abs=0.1) and losses[-1] < 3.2

    def alike(weight, moment):
        return moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)

    for moments in (state[0].mu, state[0].nu):
        assert all(jax.tree.leaves(jax.tree.map(alike, weights, moments)))
    assert weights["embed"]["weight"].sharding.spec[0] == "tensor"


def test_the_docs_show_the_loop_as_it_is():
    shown = (ROOT / "docs/examples.md").read_text().split("```python\n")[1].split("```")[0]
    assert textwrap.indent(shown, "    ") in LOOP.read_text()
