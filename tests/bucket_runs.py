"""Shared by tests of runs in buckets: text, the same run on a disk, and what a run left.

A test file names the fixtures it needs, text = bucket_runs.text, and has the run's CHOICES.
"""

import pytest
from small_runs import small_run, write_text

from v4jax import storage
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def on_disk(request, text, tmp_path_factory):
    """The folder of a run on a disk that nothing disturbed."""
    run = tmp_path_factory.mktemp("run") / "run"
    train(small_run(text, run, **request.module.CHOICES))
    return run


def losses(run):
    return [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]


def exported(run):
    return {name: storage.read(run / "export" / name) for name in storage.listing(run / "export")}
