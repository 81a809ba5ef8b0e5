"""Claims about runs that resume with other data: refused by name, and allowed on request."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

import jax
import pytest
from trees import small_config

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.checkpoint.checksums import write_sums
from v4jax.checkpoint.run_config import write_config
from v4jax.checkpoint.store import Store
from v4jax.data.config import DataConfig, Source
from v4jax.tokenizer import BOS_TOKEN, ByteTokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.data import train_batches
from v4jax.train.initial import check_source_tokens
from v4jax.train.loop import train
from v4jax.train.prepare import stage_batches
from v4jax.train.resume import items_of
from v4jax.train.same_data import check_data
from v4jax.train.stability import LossHistory
from v4jax.train.stages import Batches, Stage
from v4jax.train.step import init_state, state_shardings

BYTES, CHAT = ByteTokenizer(), ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
OLD = ("documents", "tokenizer", "seed", "seq_len", "batch_size")
"""The settings of checkpoints from before files were noted."""


def through_json(value):
    return json.loads(json.dumps(value))


def edit(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Changes a file at equal size and time."""
    before = path.stat()
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def text_in(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"document {i}: the cat sat on the mat")
    return folder


def records_in(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for name in "ab":
        texts = [{"text": f"{name}{i} the cat sat", "more": "x"} for i in range(9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder


@pytest.fixture
def folder(tmp_path):
    return text_in(tmp_path / "text")


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, folder of it and its text): a run of two stages, with checkpoints of steps 2 and 4.

    Each stage has one; the weights' training is left out.
    """
    home = tmp_path_factory.mktemp("finished")
    text_in(home / "text")
    extra = Source(path=str(records_in(home / "r") / "a.jsonl"), format="jsonl", name="extra")
    data = DataConfig(source=str(home / "text"), held_out=0.2, evaluate_on=(extra,))
    stages = (Stage(after=3, seq_len=40),)
    cfg = config(home / "text", home / "run", steps=4, data=data, stages=stages)
    batches = Batches(cfg, lambda view: stage_batches(view, BYTES, None))
    mesh = make_mesh(parse_mesh(cfg.mesh))
    with jax.set_mesh(mesh), Store(cfg.run_dir) as store:
        write_config(cfg.run_dir, MODEL)
        state = init_state(cfg, state_shardings(cfg, AxisRules(), mesh))
        for step in (2, 4):
            next(batches.at(step - 1))
            store.save(step, items_of(state, LossHistory()) | {"data": batches})
    return cfg, home


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, copied with its text; its files may be changed."""
    cfg, home = finished
    shutil.copytree(home, tmp_path / "copy")
    extra = dataclasses.replace(cfg.data.evaluate_on[0], path=str(tmp_path / "copy/r/a.jsonl"))
    data = dataclasses.replace(cfg.data, source=str(tmp_path / "copy/text"), evaluate_on=(extra,))
    return dataclasses.replace(cfg, data=data, run_dir=str(tmp_path / "copy/run"))


def position(cfg, step: int) -> pathlib.Path:
    return pathlib.Path(cfg.run_dir) / "checkpoints" / str(step) / "data" / "process_0.json"


def rewrite(path: pathlib.Path, text: str) -> None:
    """Writes a file of a checkpoint as if it had always been so."""
    path.write_text(text)
    write_sums(path.parent.parent)


def test_data_are_compared_with_the_newest_checkpoint_at_its_stage(copied):
    assert json.loads(position(copied, 4).read_text())["settings"]["seq_len"] == 40
    check_data(copied, BYTES)
    edit(pathlib.Path(copied.data.source) / "3.txt", b"cat", b"dog")
    words = r"^data position: was saved with text/3.txt .* \(--data.allow-change: from a fresh"
    with pytest.raises(ValueError, match=words):
        check_data(copied, BYTES)
    changed = dataclasses.replace(copied.data, allow_change=True)
    check_data(dataclasses.replace(copied, data=changed), BYTES)


def test_another_set_to_evaluate_on_under_an_old_name_is_refused(copied):
    extra = copied.data.evaluate_on[0]
    other = dataclasses.replace(extra, path=extra.path.replace("a.jsonl", "b.jsonl"))
    data = dataclasses.replace(copied.data, evaluate_on=(other,))
    words = "evaluate_on extra .*; its loss cannot be compared any more: give it another name"
    with pytest.raises(ValueError, match=words):
        check_data(dataclasses.replace(copied, data=data), BYTES)


def test_data_are_compared_with_the_checkpoint_that_the_run_will_resume_from(copied):
    """A flipped byte damages the newest checkpoint; it does not change the data."""
    edit(position(copied, 4), b'"held_out": 0.2', b'"held_out": 0.3')
    check_data(copied, BYTES)
    with pytest.raises(ValueError, match="checkpoints/4 is damaged: data/process_0.json"):
        check_data(dataclasses.replace(copied, strict=True), BYTES)
    edit(pathlib.Path(copied.data.source) / "3.txt", b"cat", b"dog")
    with pytest.raises(ValueError, match="^data position: was saved with text/3.txt"):
        check_data(copied, BYTES)
    edit(position(copied, 2), b'"held_out": 0.2', b'"held_out": 0.3')
    with pytest.raises(ValueError, match="checkpoints/2 is damaged: data/process_0.json"):
        check_data(copied, BYTES)


@pytest.mark.parametrize(
    ("change", "words"), [(dict(batch_size=4), "batch_size 2"), (dict(seq_len=16), "seq_len 32")]
)
def test_an_earlier_stage_that_changed_is_refused_before_anything_runs(copied, change, words):
    """The checkpoint of step 4 belongs to the second stage; what that stage sets stays as it is."""
    (stage,) = copied.stages
    stages = (dataclasses.replace(stage, batch_size=2),)
    cfg = dataclasses.replace(copied, stages=stages, **change)
    ((name, value),) = change.items()
    with pytest.raises(
        ValueError, match=f"^data position of stage 0: was saved with {words}, this"
    ):
        check_data(cfg, BYTES)
    before = digest(pathlib.Path(cfg.run_dir))
    with pytest.raises(ValueError, match=f"{words}, this run has {value}; only the same can go on"):
        train(dataclasses.replace(cfg, steps=5))
    assert digest(pathlib.Path(cfg.run_dir)) == before
    allowed = dataclasses.replace(cfg.data, allow_change=True)
    check_data(dataclasses.replace(cfg, data=allowed), BYTES)


def test_an_earlier_stage_that_was_allowed_to_change_begins_anew(copied, capsys):
    cfg = dataclasses.replace(
        copied,
        stages=(dataclasses.replace(copied.stages[0], batch_size=2),),
        batch_size=4,
        data=dataclasses.replace(copied.data, allow_change=True),
    )
    train(cfg)  # resumes at its end, without a step
    assert (
        "was saved with batch_size 2, this run has 4 (stage 0 from a fresh position, should the "
        "run go back to it); allow_change: going on where it was" in capsys.readouterr().err
    )
    batches = Batches(cfg, lambda view: stage_batches(view, BYTES, None)).at(3)
    fresh = through_json(batches.at(0).position)
    batches.at(3).skip([0])
    with Store(cfg.run_dir) as store:
        store.load(4, {"data": batches})
    assert (
        through_json(batches.position)["rows"] == json.loads(position(cfg, 4).read_text())["rows"]
    )
    assert through_json(batches.at(0).position) == fresh


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 3}'])
def test_a_position_that_cannot_be_read_is_not_taken_for_an_older_one(copied, text):
    rewrite(position(copied, 4), text)
    words = (
        r"^data position: .*4/data/process_0.json cannot be read \(.*; remove .*checkpoints/4 to"
    )
    with pytest.raises(ValueError, match=words):
        train(copied)


def test_weights_that_go_with_other_tokens_are_refused(folder, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(MODEL.to_dict()))
    cfg = config(folder, tmp_path / "run", init_from=str(tmp_path / "base"))
    check_source_tokens(cfg, BYTES)  # says nothing of its tokens
    CHAT.save(tmp_path / "base")
    check_source_tokens(cfg, BYTES)  # has more tokens than this run's, none other
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"content": "{BOS_TOKEN}"', '"content": "<s>"'))
    with pytest.raises(
        ValueError,
        match=f"init_from: .* has another tokenizer: id 0 is '<s>' there, "
        f"'{re.escape(BOS_TOKEN)}' here",
    ):
        check_source_tokens(cfg, BYTES)


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
    check_data(dataclasses.replace(cfg, steps=4), BYTES)  # a resumed run keeps what it resumed with


def test_of_an_older_checkpoint_it_is_said_what_cannot_be_checked(copied, capsys):
    state = json.loads(position(copied, 4).read_text())
    state["settings"] = {name: value for name, value in state["settings"].items() if name in OLD}
    rewrite(position(copied, 4), json.dumps(state))
    train(dataclasses.replace(copied, init_from="none"))  # which is not read any more
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "is of an older v4jax" in said
        and "by tokenizer, seed, seq_len, batch_size, documents alone" in said
    )
    data = dataclasses.replace(copied.data, packing="best_fit")
    with pytest.raises(ValueError, match="was saved with packing split, this run has best_fit"):
        check_data(dataclasses.replace(copied, data=data), BYTES)
