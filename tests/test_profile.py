"""--profile traces the steps that it names, and tells the time of each part of the model."""

import dataclasses
import gzip
import json
import pathlib

import pytest
from small_runs import small_run, write_text

from v4jax.cli import main as cli
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics
from v4jax.train.profile_table import OTHER, PARTS, part_of, parts_of, seconds_by_part, table


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text"), documents=8)
    return small_run(text, tmp_path_factory.mktemp("a") / "run", profile="2:2")


def test_a_trace_has_the_steps_and_the_time_of_every_part(cfg, capsys):
    train(cfg)
    run = pathlib.Path(cfg.run_dir)
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    (trace,) = (run / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    started = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert started == {"2", "3"}
    (event,) = [line for line in read_metrics(run) if line.get("event") == "profile"]
    assert (event["step"], event["steps"]) == (3, 2) and set(event["seconds"]) == {*PARTS, OTHER}
    assert min(event["seconds"].values()) > 0
    assert event["seconds"][OTHER] < 0.5 * sum(event["seconds"].values())
    said = capsys.readouterr().out
    for line in table(event["seconds"], 2):
        assert line in said
    # A start again finds them done: nothing is refused, nothing is traced twice.
    train(dataclasses.replace(cfg, steps=5))
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    assert (
        f"profile: step 2 is done, and its trace is in {run / 'profile'}" in capsys.readouterr().err
    )


def test_steps_before_the_resumed_one_are_refused(cfg, tmp_path):
    again = dataclasses.replace(cfg, run_dir=str(tmp_path / "run"), profile="", steps=3)
    train(again)
    with pytest.raises(
        ValueError,
        match="profile: got '3:1'; .*/run resumes after step 3, so the first step to profile must "
        "be 4 or later",
    ):
        train(dataclasses.replace(again, profile="3:1", steps=5))


@pytest.mark.parametrize(
    "text, rule",
    [
        (text, "must be FIRST:COUNT, two integers of at least 1")
        for text in ("3", "0:2", "2:0", "a:b", "1:2:3", "-1:2", "1.5:2", " 1:2", "٣:1")
    ]
    + [("3:3", "must end within steps=4"), ("5:1", "must end within steps=4")],
)
def test_bad_steps_are_refused(cfg, text, rule):
    with pytest.raises(ValueError, match=f"profile: got {text!r}; {rule}"):
        dataclasses.replace(cfg, profile=text)


def test_bad_steps_are_one_line_on_the_command_line(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from configs.demo import get_config\n")
    assert cli.main(["train", str(config), "--profile", "0:1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "profile: got '0:1'" in said


@pytest.mark.parametrize(
    "scopes, part",
    [
        (
            "jit(train_step)/transpose(jvp(Transformer))/block_0/attention/attn/dot_general",
            "attention",
        ),
        ("jit(train_step)/checkpoint/rematted_computation/experts/ffn/mul", "experts"),
        ("jit(train_step)/transpose(jvp(Transformer))/mtp/block/attention/add", "mtp"),
        ("jit(train_step)/transpose(jvp(loss))/add", "loss"),
        ("jit(train_step)/optimizer/while/body/dot_general", "optimizer"),
        ("jit(train_step)/jvp(Transformer)/embed/gather", "embed"),
        ("jit(train_step)/jvp(Transformer)/norm/attn_norm/mul", "other"),
    ],
)
def test_an_operation_belongs_to_its_scope(scopes, part):
    assert part_of(scopes) == part


def test_control_flow_counts_for_what_is_in_it(tmp_path):
    """The time of a loop is not counted beside that of its body; other programs do not count."""
    text = """
  %while.1 = (s32[], f32[2]{0}) while(%t), body=%b, metadata={op_name="jit(f)/attention/while"}
  ROOT %fusion.2 = f32[2]{0} fusion(%a, %b), kind=kLoop, metadata={op_name="jit(f)/attention/add"}
  %copy.3 = f32[2]{0} copy(%a)
"""
    parts = parts_of([text])
    assert parts == {"while.1": None, "fusion.2": "attention", "copy.3": "other"}
    ran = [("while.1", 9e6), ("fusion.2", 3e6), ("fusion.2", 1e6), ("copy.3", 2e6), ("mul.4", 5e6)]
    events = [{"ph": "X", "dur": dur, "name": op, "args": {"hlo_op": op}} for op, dur in ran]
    events.append({"ph": "X", "dur": 1e6, "name": "copy.3"})
    content = json.dumps({"traceEvents": events}).encode()
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(content))
    seconds = seconds_by_part(tmp_path, parts)
    assert {name: value for name, value in seconds.items() if value} == {"attention": 4, "other": 2}
    assert table(seconds, 2)[2] == "attention     2000.00  66.7%"
    assert "no operations" in table(seconds_by_part(tmp_path, {}), 2)[0]
