"""Claims about runs that go on with other data: refused by name, and allowed when told to."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re

import pytest
from trees import small_config

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.config import DataConfig, Source
from v4jax.data.identity import settings_of
from v4jax.tokenizer import BOS_TOKEN, ByteTokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.data import train_batches
from v4jax.train.loop import train
from v4jax.train.resume import _say_on_resume, check_data, check_source
from v4jax.train.stages import Stage

BYTES, CHAT = ByteTokenizer(), ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
OLD = ("documents", "tokenizer", "seed", "seq_len", "batch_size")
"""The settings of checkpoints from before files were noted."""


def through_json(value):
    return json.loads(json.dumps(value))


def settings(cfg, tokenizer=BYTES, seq_len=32, batch_size=2):
    return through_json(settings_of(cfg, tokenizer, seq_len, batch_size))


def edit(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Changes a file at equal size and time."""
    before = path.stat()
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: the cat sat on the mat")
    return tmp_path / "text"


@pytest.fixture
def records(tmp_path):
    (tmp_path / "r").mkdir()
    for name in "ab":
        texts = [{"text": f"{name}{i} the cat sat", "more": "x"} for i in range(9)]
        (tmp_path / "r" / f"{name}.jsonl").write_text(
            "".join(json.dumps(text) + "\n" for text in texts)
        )
    return tmp_path / "r"


MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(0,),
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    hidden_size=32,
    moe_intermediate_size=16,
)


def config(folder, run_dir, **changes) -> TrainConfig:
    fields = dict(
        model=MODEL,
        data=DataConfig(source=str(folder), held_out=0.2),
        run_dir=str(run_dir),
        steps=2,
        batch_size=2,
        seq_len=32,
        learning_rate=1e-3,
        warmup_steps=1,
        log_every=1,
        eval_every=100,
        eval_batches=1,
        checkpoint_every=2,
        remat=False,
        export="none",
    )
    return TrainConfig(**fields | changes)


def as_saved(run, step, view: TrainConfig) -> None:
    """Writes of a checkpoint what is compared first."""
    path = pathlib.Path(run) / "checkpoints" / str(step) / "data" / "process_0.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {"settings": settings(view.data, BYTES, view.seq_len, view.batch_size), "rows": {}}
        )
    )


def test_data_are_compared_with_the_newest_checkpoint_at_its_stage(folder, tmp_path):
    cfg = config(folder, tmp_path / "run", steps=20, stages=(Stage(after=10, seq_len=64),))
    check_data(cfg, BYTES)  # a run that has not begun
    as_saved(cfg.run_dir, 9, cfg)
    check_data(cfg, BYTES)
    as_saved(cfg.run_dir, 10, cfg)
    check_data(cfg, BYTES)
    as_saved(
        cfg.run_dir,
        12,
        dataclasses.replace(cfg, stages=(), seq_len=64, data=dataclasses.replace(cfg.data, seed=1)),
    )
    check_data(cfg, BYTES)
    edit(folder / "3.txt", b"cat", b"dog")
    with pytest.raises(
        ValueError,
        match=r"^data position: was saved with text/3.txt .* \(--data.allow-change: from a fresh",
    ):
        check_data(cfg, BYTES)
    check_data(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, allow_change=True)), BYTES
    )


def test_another_set_to_evaluate_on_under_an_old_name_is_refused(folder, records, tmp_path):
    sets = [
        Source(path=str(records / f"{name}.jsonl"), format="jsonl", name="extra") for name in "ab"
    ]
    cfg, other = (
        config(folder, tmp_path / "run", data=DataConfig(source=str(folder), evaluate_on=(one,)))
        for one in sets
    )
    as_saved(cfg.run_dir, 2, cfg)
    check_data(cfg, BYTES)
    with pytest.raises(
        ValueError,
        match="evaluate_on extra .*; its loss cannot be compared any more: give it another name",
    ):
        check_data(other, BYTES)


def test_weights_that_go_with_other_tokens_are_refused(folder, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(MODEL.to_dict()))
    cfg = config(folder, tmp_path / "run", init_from=str(tmp_path / "base"))
    check_source(cfg)  # says nothing of its tokens
    CHAT.save(tmp_path / "base")
    check_source(cfg)  # has more tokens than this run's, none other
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"content": "{BOS_TOKEN}"', '"content": "<s>"'))
    with pytest.raises(
        ValueError,
        match=f"init_from: .* has another tokenizer: id 0 is '<s>' there, '{re.escape(BOS_TOKEN)}' here",
    ):
        check_source(cfg)


def digest(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_goes_on_with_other_data_only_when_told_to(folder, tmp_path, capsys):
    run = tmp_path / "run"
    cfg = config(folder, run)
    train(cfg)
    before = digest(run)
    edit(folder / "3.txt", b"cat", b"dog")
    for data in (cfg.data, dataclasses.replace(cfg.data, tokenizer="byte-chat")):
        with pytest.raises(ValueError, match="^data position: was saved with "):
            train(dataclasses.replace(cfg, steps=3, data=data))
        assert digest(run) == before
    capsys.readouterr()
    longer = dataclasses.replace(
        cfg, steps=3, data=dataclasses.replace(cfg.data, allow_change=True)
    )
    train(longer)
    said = [line for line in capsys.readouterr().err.splitlines() if "data changed" in line]
    assert (
        len(said) == 1
        and "was saved with text/3.txt" in said[0]
        and "from a fresh position in the data" in said[0]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line.get("event") == "data changed"]
    assert event["step"] == 2 and "text/3.txt" in event["changed"][0] and lines[-1]["step"] == 3
    fresh = train_batches(longer.data, BYTES, 32, 2, vocab_size=260)
    next(fresh)
    state = json.loads((run / "checkpoints" / "3" / "data" / "process_0.json").read_text())
    assert state["rows"] == through_json(fresh.get_state())["rows"]
    check_data(
        dataclasses.replace(cfg, steps=4), BYTES
    )  # what it went on with is what it goes on with


def test_of_an_older_checkpoint_it_is_said_what_cannot_be_checked(folder, tmp_path, capsys):
    cfg = config(folder, tmp_path / "run")
    as_saved(cfg.run_dir, 2, cfg)
    path = tmp_path / "run" / "checkpoints" / "2" / "data" / "process_0.json"
    state = json.loads(path.read_text())
    state["settings"] = {name: value for name, value in state["settings"].items() if name in OLD}
    path.write_text(json.dumps(state))
    check_data(cfg, BYTES)
    with pytest.raises(ValueError, match="was saved with packing split, this run has best_fit"):
        check_data(
            dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing="best_fit")), BYTES
        )
    for settings_ in (state["settings"], settings(cfg.data)):
        _say_on_resume(tmp_path, settings_, False, ())
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "is of an older v4jax" in said
        and "by tokenizer, seed, seq_len, batch_size alone" in said
    )
