"""`v4jax plot`: one page that needs nothing else, for any run that has begun."""

import base64
import json
import re

import pytest

from v4jax.cli import main as cli

LAYER_NAMES = (
    "load_max",
    "load_entropy",
    "load_dead",
    "bias_min",
    "bias_max",
    "pre",
    "post",
    "gate_range",
    "comb_norm",
    "comb_off",
    "out_max",
    "stream_max",
    "stream_rms",
)


def run_of(folder, steps: int, looks: bool = True, cut: bool = False):
    """A run's metrics, with a rollback at step 30 and values that were not finite.

    A crash cut the last line short.
    """
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": 6 / step,
                "nll": 5 / step,
                "mtp_nll": 6 / step,
                "grad_norm": 1 + step % 3,
                "learning_rate": 1e-3,
                "index_captured": 0.5,
                "anticipating": 1.0,
            }
        )
        if step % 10 == 0 and looks:
            layers = {
                name: [
                    None if name.startswith("bias") and i < 2 else 1.0 + i + step for i in range(5)
                ]
                for name in LAYER_NAMES
            }
            groups = {"embed": 0.1 * step, "experts": None if step == 20 else 0.01}
            lines.append(
                {
                    "step": step,
                    "inside": {"layers": layers, "grad_rms": groups, "update_rms": groups},
                }
            )
        if step == 30:
            lines.append(
                {
                    "step": 30,
                    "event": "rollback",
                    "rollback": 1,
                    "at": 33,
                    "why": "loss is 9 <script>",
                    "skipped": [31, 33],
                    "losses_given_up": [0.2, 0.3, None],
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo' * cut)
    return folder


@pytest.mark.parametrize(
    ("steps", "looks", "cut"), [(1, False, False), (10, True, False), (60, True, True)]
)
def test_a_page_of_any_run_that_has_begun(tmp_path, capsys, steps, looks, cut):
    run = run_of(tmp_path / "run", steps, looks, cut)
    assert cli.main(["plot", str(run), "--json"]) == 0
    page = (run / "summary.html").read_text()
    assert json.loads(capsys.readouterr().out)["picture"] == str(run / "summary.html")
    assert f"Run run, step {steps}" in page and f"<td>{6 / steps:.6g}" in page
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert (
        not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    )  # offline, and a message is only text
    assert ("skipped [31, 33]" in page) == (steps >= 30)


def test_no_run_is_one_line(tmp_path, capsys):
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "no metrics.jsonl with a line in it" in capsys.readouterr().err
