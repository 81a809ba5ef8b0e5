"""metrics.jsonl and --json results are JSON whatever a run measures; null if not finite."""

import json
import math

import numpy as np
import pytest
from trees import small_config

from v4jax.checkpoint.atomic import json_text
from v4jax.cli.printing import print_result
from v4jax.data.config import DataConfig
from v4jax.train import report
from v4jax.train.config import TrainConfig
from v4jax.train.metrics_file import METRICS, plot_losses, read_metrics
from v4jax.train.report import Reporter
from v4jax.train.stability import LossHistory


def strict(text):
    """The value of a JSON text, read as other languages do."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null():
    value = {
        "a": math.nan,
        "b": [1.5, -math.inf, (math.inf, {"c": np.float64("nan")})],
        "d": "nan",
        "e": 10**400,
        "f": True,
    }
    assert strict(json_text(value)) == {
        "a": None,
        "b": [1.5, None, [None, {"c": None}]],
        "d": "nan",
        "e": 10**400,
        "f": True,
    }


def test_a_result_on_the_command_line_is_json(capsys):
    print_result({"mean_nll": math.nan, "log_probs": [-math.inf, -0.5]}, True)
    assert strict(capsys.readouterr().out) == {"mean_nll": None, "log_probs": [None, -0.5]}


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "matmul_rate", lambda dtype: 1.0)
    model = small_config(vocab_size=260)
    return TrainConfig(
        model=model,
        data=DataConfig(),
        run_dir=str(tmp_path),
        steps=9,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=1,
    )


def test_every_line_of_a_run_is_json(cfg, tmp_path):
    step = {
        "loss": 1.0,
        "nll": math.nan,
        "mtp_nll": 2.0,
        "expert_load_max": math.inf,
        "learning_rate": 0.1,
    }
    inside = {
        "layers": {"bias_min": [None, math.nan]},
        "grad_rms": {"head": math.nan},
        "update_rms": {},
    }
    with Reporter(tmp_path, cfg, 0, LossHistory()) as reporter:
        reporter.step(1, dict(step))
        reporter.evaluation(1, {"held_out_nll": math.nan})
        reporter.rollback(
            0, LossHistory(rollbacks=1, skipped=((1, 2),)), 1, "loss is nan", [math.nan]
        )
        reporter.step(1, dict(step))
        reporter.evaluation(1, {"held_out_nll": math.nan})
        reporter.inside(2, {**inside, "layers": {"bias_min": [None]}})
        reporter.event(2, "data changed", was=[math.nan], now="x")
    lines = [strict(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines[0]["losses_given_up"] == [None]
    assert (
        lines[1]["nll"] is None and lines[1]["expert_load_max"] is None and lines[1]["loss"] == 1.0
    )
    assert lines[2] == {"step": 1, "held_out_nll": None} and lines[3]["inside"]["grad_rms"] == {
        "head": None
    }
    assert lines[4] == {"step": 2, "event": "data changed", "was": [None], "now": "x"}
    assert Reporter.last(tmp_path)["held_out_nll"] is None
    assert plot_losses(tmp_path).is_file()


def test_a_run_that_goes_on_mends_the_lines_of_an_older_version(cfg, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "held_out_nll": NaN}\n{"step": 5, "loss": 1.0}\n')
    with Reporter(tmp_path, cfg, 1, LossHistory()):
        pass
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "held_out_nll": null}\n'
    assert read_metrics(tmp_path) == [{"step": 1, "held_out_nll": None}]
