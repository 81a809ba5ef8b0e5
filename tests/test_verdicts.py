"""What one process of a job finds wrong, all refuse with one line, and soon.

None waits for a process that has gone.
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import pytest
from commands import MINUTE, environment, launched
from test_processes import MODEL

from sharding.agreement import agreed, gather_text
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import layout_for
from v4jax.chat.tokens import CHAT_TOKENS
from v4jax.checkpoint.store import Store
from v4jax.data.config import DataConfig, Source
from v4jax.tokenizer import ByteTokenizer
from v4jax.tokenizer.table import tokens_in
from v4jax.train import loop
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.initial import check_source_tokens
from v4jax.train.prepare import as_read, check_folders, stage_batches
from v4jax.train.resume import items_of, start
from v4jax.train.rollback import go_back
from v4jax.train.same_data import check_data
from v4jax.train.stability import LossHistory, StabilityConfig, TrainingFailed
from v4jax.train.stages import Batches
from v4jax.train.step import init_state, state_shardings

BYTES = ByteTokenizer()
SMALL = MODEL.replace(
    vocab_size=272, num_nextn_predict_layers=0, compress_ratios=(0,), num_hash_layers=0
)


def config(home: pathlib.Path, **changes) -> TrainConfig:
    fields = dict(
        model=SMALL,
        data=DataConfig(source=str(home / "text"), held_out=0.2),
        run_dir=str(home / "run"),
        steps=12,
        batch_size=8,
        seq_len=16,
        learning_rate=1e-3,
        warmup_steps=1,
        checkpoint_every=4,
        eval_batches=1,
        remat=False,
        export="none",
    )
    return TrainConfig(**fields | changes)


def write_sources(home: pathlib.Path) -> None:
    """Text, the same with one word changed, and a conversation that no row holds."""
    for name, animal in (("text", "cat"), ("other/text", "dog")):
        (home / name).mkdir(parents=True)
        for i in range(20):
            text = f"document {i}: " + f"the {animal} sat on the mat. " * 9
            (home / name / f"{i}.txt").write_text(text)
    long = {
        "messages": [{"role": "user", "content": "u" * 99}, {"role": "assistant", "content": "a"}]
    }
    (home / "long.jsonl").write_text(json.dumps(long) + "\n")
    ByteTokenizer(CHAT_TOKENS).save(home / "chat")


# ---- one process ---------------------------------------------------------------------------------


def test_one_process_agrees_with_itself():
    assert gather_text("é") == ["é"]
    fault = ValueError("no")
    with pytest.raises(ValueError) as raised, agreed():
        raise fault
    assert raised.value is fault


def test_a_cache_inside_a_new_run_is_refused_before_work_and_in_one_that_is_there_is_not(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for cache in ("run", "run/cache", "run/a/b", "link/run/cache"):
        data = DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / cache))
        cfg = config(tmp_path, data=data)
        with pytest.raises(
            ValueError, match=r"^cache: got .*, inside run_dir .*/run; a run begins"
        ):
            loop.train(cfg)
    assert not (tmp_path / "run").exists()
    check_folders(dataclasses.replace(cfg, run_dir=str(tmp_path / "run/cache/run")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(SMALL.to_dict()))
    check_folders(cfg)


def test_sets_to_evaluate_on_are_not_read_where_nothing_is_evaluated(tmp_path):
    extra = Source(path=str(tmp_path / "none"), format="jsonl", name="extra")
    data = DataConfig(source="stdlib", evaluate_on=(extra,))
    with_evaluation = config(tmp_path, data=data)
    assert as_read(with_evaluation) is with_evaluation
    assert as_read(config(tmp_path, data=data, eval_batches=0)).data.evaluate_on == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[]", "expected a JSON object with model.vocab"),
        ('{"model": 3}', "expected a JSON object with model.vocab"),
        ('{"model": {"vocab": [3]}}', "expected a JSON object with model.vocab"),
        ('{"model": {"vocab": {"a": []}}}', "expected a JSON object with model.vocab"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "KeyError: 'content'"),
    ],
)
def test_weights_whose_tokenizer_cannot_be_read_are_refused_by_its_name(tmp_path, text, words):
    cfg = config(tmp_path, init_from=str(tmp_path))
    check_source_tokens(cfg, BYTES)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError) as raised:
        check_source_tokens(cfg, BYTES)
    assert str(raised.value).startswith(f"{tmp_path}/tokenizer.json: ") and words in str(
        raised.value
    )
    check_source_tokens(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, allow_change=True)), BYTES
    )


def test_a_tokenizer_of_a_foreign_checkpoint_is_not_read_through_a_link_out_of_it(tmp_path):
    BYTES.save(tmp_path / "elsewhere")
    (tmp_path / "given").mkdir()
    (tmp_path / "given/tokenizer.json").symlink_to(tmp_path / "elsewhere/tokenizer.json")
    with pytest.raises(ValueError, match="given/tokenizer.json: .* is a link to "):
        tokens_in(tmp_path / "given")
    assert tokens_in(tmp_path / "elsewhere")[2] == "Ā"


@contextlib.contextmanager
def on_mesh(cfg: TrainConfig):
    """(rules, shardings) with the run's mesh set."""
    sizes = parse_mesh(cfg.mesh)
    rules, mesh = layout_for(cfg.layout, sizes), make_mesh(sizes)
    with jax.set_mesh(mesh):
        yield rules, state_shardings(cfg, rules, mesh)


def with_nan(state, place: tuple[int, int]):
    weight = state.params["head"]["weight"]
    head = state.params["head"] | {"weight": weight.at[place].set(jnp.nan)}
    return dataclasses.replace(state, params=state.params | {"head": head})


@pytest.fixture
def rolling_back(tmp_path):
    """(store, a function that saves, a function that rolls back).

    The first saves the initial state as a step's, whole or with a NaN. The second rolls back after
    a spike at step 10.
    """
    cfg = config(tmp_path, steps=40, stability=StabilityConfig(rollbacks=2))
    with on_mesh(cfg) as (_, shardings), Store(tmp_path / "run") as store:
        state = init_state(cfg, shardings)

        def save(step: int, whole: bool) -> None:
            kept = state if whole else with_nan(state, (1, 2))
            store.save(step, items_of(kept, LossHistory()))
            store.wait()

        def back():
            return go_back(cfg, shardings, store, state, LossHistory(), 10, 10, "loss is nan")

        yield store, save, back


def test_a_rollback_passes_over_a_checkpoint_that_is_not_finite(rolling_back, caplog):
    """An older version, which did not check, saved the checkpoint."""
    _, save, back = rolling_back
    save(4, whole=True)
    save(8, whole=False)
    begin = back()
    assert (begin.step, begin.history.base, begin.history.skipped) == (4, 4, ((5, 10),))
    assert not_finite(begin.state) is None
    assert "checkpoints/8: params/head/weight is not finite; it is passed over" in caplog.text


def test_a_rollback_without_a_finite_checkpoint_fails_the_run_and_is_no_bad_input(rolling_back):
    _, save, back = rolling_back
    save(8, whole=False)
    with pytest.raises(TrainingFailed, match="step 10: loss is nan; no checkpoint of step 8 or"):
        back()


def test_a_rollback_that_finds_only_damage_fails_the_run(rolling_back):
    store, save, back = rolling_back
    save(4, whole=True)
    (store.path(4) / "record/note.json").write_text("{}")
    words = "step 10: loss is nan; there is nothing to go back to: .*checkpoints/4 is damaged"
    with pytest.raises(TrainingFailed, match=words):
        back()


# ---- two processes -------------------------------------------------------------------------------


WORKER = """
    import json, pathlib, sys, jax
    from sharding.agreement import wait_for_all
    from sharding.processes import start
    start()
    import test_verdicts
    home = pathlib.Path(sys.argv[1])
    found = test_verdicts.verdicts(home)
    (home / f"{jax.process_index()}.json").write_text(json.dumps(found))
    wait_for_all("done")
"""


class Reached(Exception):
    """The run is about to read its first state."""


def verdict(call, *arguments) -> str:
    """The message of what the call raises; "" for nothing."""
    try:
        call(*arguments)
    except (ValueError, Reached, TrainingFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def verdicts(home: pathlib.Path) -> dict[str, object]:
    """What this process finds in a job of two; the second one has other files."""
    second = jax.process_index() == 1
    cfg = config(home, mesh="data=2,fsdp=4")
    text = cfg.data
    extra = Source(path=str(home / "long.jsonl"), format="chat", column="messages", name="extra")
    chat = dataclasses.replace(
        text, tokenizer=str(home / "chat"), packing="best_fit", evaluate_on=(extra,)
    )

    def refused(data=text, **changes) -> str:
        return verdict(loop.train, dataclasses.replace(cfg, data=data, **changes))

    def missing(name: str) -> str:
        return str(home / name) if second else str(home / "text")

    def reached(*_):
        raise Reached

    loop.first_state = reached
    found = {
        "texts": gather_text("zwei, größer" if second else ""),
        "no texts": gather_text(""),
        "source": refused(dataclasses.replace(text, source=missing("none"))),
        "cache": refused(dataclasses.replace(text, cache=str(home / "run/cache"))),
        "too long": refused(chat),
        "not evaluated": refused(chat, eval_batches=0),
        "cached": refused(
            dataclasses.replace(text, source=str(home / "none"), cache=str(home / "c"))
        ),
    }
    return found | resumed(home, cfg, second)


def resumed(home: pathlib.Path, cfg: TrainConfig, second: bool) -> dict[str, object]:
    """What a process finds of one checkpoint, whose data the second process has changed."""
    source = str(home / "other/text") if second else str(home / "text")
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=source))
    allowed = dataclasses.replace(other, data=dataclasses.replace(other.data, allow_change=True))

    def batches(view: TrainConfig) -> Batches:
        return Batches(view, lambda one: stage_batches(one, BYTES, list(range(4))))

    with on_mesh(cfg) as (rules, shardings):
        state = init_state(cfg, shardings)
        with Store(home / "run", writes=True) as store:
            store.save(4, items_of(state, LossHistory()) | {"data": batches(cfg)})
            store.wait()
            begin = start(allowed, rules, shardings, store, batches(allowed), loop.first_state)
        last = state.params["head"]["weight"].shape[0] - 1
        return {
            "changed": list(begin.changed),
            "refused": verdict(check_data, other, BYTES),
            "not finite": not_finite(with_nan(state, (last, 0))),
        }


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(what each of two processes found, the lines on stderr, the folder of their files)."""
    home = tmp_path_factory.mktemp("job")
    write_sources(home)
    done = subprocess.run(
        [*launched(WORKER), str(home)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=3 * MINUTE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((home / f"{i}.json").read_text()) for i in (0, 1)]
    return found, done.stderr, home


def test_two_processes_find_the_same(job):
    found, _, _ = job
    assert found[0] == found[1]
    assert found[0]["texts"] == ["", "zwei, größer"] and found[0]["no texts"] == ["", ""]


def test_what_the_second_process_finds_wrong_is_said_with_its_number(job):
    (found, _), _, home = job
    none = f"{home}/none"
    assert found["source"].startswith(
        f"ValueError: process 1: source: {none}: no such file or folder"
    )
    words = "ValueError: process 1: data position: was saved with text/0.txt "
    assert found["refused"].startswith(words)


def test_what_all_or_the_first_find_wrong_is_said_as_it_is(job):
    (found, _), _, home = job
    assert found["cache"].startswith(f"ValueError: cache: got {home}/run/cache, inside run_dir")
    assert found["cached"].startswith(f"ValueError: source: {home}/none: no such file or folder")
    assert found["too long"].startswith(f"ValueError: {home}/long.jsonl:1: this conversation has")


def test_without_evaluation_a_set_that_cannot_be_evaluated_on_is_no_hindrance(job):
    (found, _), _, _ = job
    assert found["not evaluated"] == "Reached: "


def test_a_change_of_data_that_only_the_second_process_sees_is_not_silent(job):
    (found, _), said, _ = job
    assert found["changed"][0].startswith("process 1: was saved with text/0.txt ")
    assert all(one.startswith("process 1: was saved with ") for one in found["changed"])
    (line,) = [line for line in said.splitlines() if "data changed" in line]
    assert line.startswith("[0] ") and "process 1: was saved with text/0.txt" in line


def test_a_nan_that_only_the_second_process_holds_is_seen_by_both(job):
    (found, _), _, _ = job
    assert found["not finite"] == "params/head/weight is not finite"
