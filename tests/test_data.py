"""Claims about v4jax/train/data.py and v4jax/data."""

import asyncio
import dataclasses
import hashlib
import itertools
import json
import math

import numpy as np
import pytest

from v4jax.data.config import DataConfig, Source, tokenizer_of
from v4jax.data.documents import Document, read_documents, split_documents
from v4jax.data.pieces import Pieces
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.data import held_out_batches, train_batches, unigram_loss

BYTES = ByteTokenizer()
SIZES = dict(seq_len=16, batch_size=4, vocab_size=258)


def text_of(i: int) -> str:
    """Text of 0 to about 400 characters of 1 to 4 bytes, different for each i.

    Some texts fill rows of 16 exactly.
    """
    return f"#{i} " + "aé深🐋"[i % 4] * (i * 7 % 100) if i % 5 else "x" * (16 * (i // 5) + 14)


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / "text" / f"d{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text_of(i).encode())
    return tmp_path / "text"


@pytest.fixture
def cfg(folder):
    return DataConfig(source=str(folder), held_out=0.2)


def segments(batches):
    """All runs of equal segment id, as lists of token ids."""
    for batch in batches:
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, ids.max() + 1):
                yield tokens[ids == segment].tolist()


def same(left, right):
    return len(left) == len(right) and all(
        (a[key] == b[key]).all()
        for a, b in zip(left, right, strict=True)
        for key in ("tokens", "segment_ids")
    )


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("tokenizer", None),
        ("glob", ""),
        ("glob", "/x/*"),
        ("glob", "../*"),
        ("held_out", 0.0),
        ("held_out", 1.0),
        ("held_out", math.nan),
        ("held_out", "0.1"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
    ],
)
def test_config_refuses_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got "):
        DataConfig(**{field: value})


def test_config_is_hashable_and_picks_the_tokenizer(tmp_path):
    assert hash(DataConfig()) == hash(DataConfig())
    assert isinstance(tokenizer_of(DataConfig()), ByteTokenizer)
    BYTES.save(tmp_path)
    assert isinstance(tokenizer_of(DataConfig(tokenizer=str(tmp_path))), ByteTokenizer)


# ---- documents -----------------------------------------------------------------------------------


def test_documents_are_all_files_that_hold_text_sorted(folder, cfg):
    (folder / "empty.txt").touch()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_bytes(b"\xff")
    documents = read_documents(cfg.sources[0])
    assert [document.name for document in documents] == sorted(
        f"d{i % 3}/{i:02}.txt" for i in range(40)
    )
    assert all(document.size == document.path.stat().st_size for document in documents)
    assert len(read_documents(dataclasses.replace(cfg, glob="d0/*.txt").sources[0])) == 14


def test_stdlib_documents_are_its_sources_without_tests():
    documents = read_documents(Source(path="stdlib"))
    names = {document.name for document in documents}
    assert {"ast.py", "json/decoder.py", "asyncio/events.py"} <= names
    assert not any(
        part in name.split("/") for name in names for part in ("test", "tests", "site-packages")
    )
    assert len(documents) > 300 and sum(document.size for document in documents) > 5e6


def test_a_file_that_is_not_utf8_is_refused_by_name(folder, cfg):
    (folder / "bad.bin").write_bytes(b"fine" * 300_000 + b"\xc3")
    with pytest.raises(ValueError, match=r"bad\.bin is not UTF-8 text .*glob='\*\*/\*'"):
        read_documents(cfg.sources[0])
    assert len(read_documents(dataclasses.replace(cfg, glob="**/*.txt").sources[0])) == 40


def test_a_folder_without_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone: no such file or folder$"):
        read_documents(Source(path=str(tmp_path / "gone")))
    with pytest.raises(ValueError) as caught:
        read_documents(Source(path=str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "expected UTF-8 text files" in str(caught.value)
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match="at least 2 are needed"):
        train_batches(DataConfig(source=str(tmp_path)), BYTES, **SIZES)


def test_split_follows_the_name_alone(folder, cfg):
    train, held_out = split_documents(cfg, read_documents(cfg.sources[0]))
    assert (
        2 <= len(held_out) <= 16
        and not set(train) & set(held_out)
        and len(train) + len(held_out) == 40
    )
    for i in range(40, 200):
        (folder / f"{i}.txt").write_text("more")
    _, more = split_documents(dataclasses.replace(cfg, seed=5), read_documents(cfg.sources[0]))
    assert {document.name for document in held_out} == {
        d.name for d in more if d.name.startswith("d")
    }


def test_split_is_that_of_sha256():
    names = [f"f{i}" for i in range(30)]
    documents = [Document(name, None, 1) for name in names]
    _, held_out = split_documents(DataConfig(held_out=0.25), documents)
    below = [name for name in names if hashlib.sha256(name.encode()).digest()[0] < 64]
    assert sorted(document.name for document in held_out) == sorted(below) and below


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_each_side_of_the_split_has_a_document(held_out):
    documents = [Document(name, None, 1) for name in "ab"]
    train, held = split_documents(DataConfig(held_out=held_out), documents)
    assert len(train) == len(held) == 1


# ---- training batches ----------------------------------------------------------------------------


def test_batches_hold_int32_tokens_and_segments_counted_from_one(cfg):
    for batch in itertools.islice(train_batches(cfg, BYTES, **SIZES), 30):
        assert set(batch) == {"tokens", "segment_ids"}
        assert all(array.shape == (4, 16) and array.dtype == np.int32 for array in batch.values())
        steps = np.diff(batch["segment_ids"], axis=1)
        assert (batch["segment_ids"][:, 0] == 1).all() and np.isin(steps, (0, 1)).all()
        # A segment begins with bos unless it continues a document cut before; it ends after eos or
        # a cut piece.
        assert (batch["segment_ids"][batch["tokens"] == 0] > 0).all()
        assert (steps[batch["tokens"][:, :-1] == 1] == 1).all()


def test_short_documents_are_packed_whole_as_bos_text_eos(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    cfg = DataConfig(source=str(tmp_path))
    batches = list(itertools.islice(train_batches(cfg, BYTES, 1024, 1, vocab_size=258), 1))
    found = {BYTES.decode(ids) for ids in segments(batches) if ids[0] == 0 and ids[-1] == 1}
    train, _ = split_documents(cfg, read_documents(cfg.sources[0]))
    assert found == {document.path.read_text() for document in train}


@pytest.mark.parametrize("seq_len", [2, 5, 16])
def test_pieces_put_together_are_the_documents(cfg, seq_len):
    documents = read_documents(cfg.sources[0])
    pieces = Pieces(documents, BYTES, seq_len)
    tokens = np.concatenate([pieces[i]["tokens"] for i in range(len(pieces))]).tolist()
    expected = [
        [0, *BYTES.encode(document.path.read_bytes().decode()), 1] for document in documents
    ]
    assert tokens == list(itertools.chain(*expected))
    assert len(pieces) > len(documents) and all(
        0 < len(pieces[i]["tokens"]) <= 4 * seq_len + 5 for i in range(20)
    )


def test_an_epoch_holds_every_token_once_and_the_next_has_another_order(cfg):
    train, _ = split_documents(cfg, read_documents(cfg.sources[0]))
    pieces = Pieces(train, BYTES, 16)
    total = sum(len(pieces[i]["tokens"]) for i in range(len(pieces)))
    tokens = np.concatenate(
        [
            b["tokens"][0]
            for b in itertools.islice(
                train_batches(cfg, BYTES, seq_len=16, batch_size=1, vocab_size=258), 2 * total // 16
            )
        ]
    )
    first, second = tokens[:total], tokens[total : 2 * total]
    every = np.concatenate([pieces[i]["tokens"] for i in range(len(pieces))])
    assert (np.sort(first) == np.sort(every)).all() and (first[: len(second)] != second).any()


def test_batches_depend_on_the_seed_only(cfg):
    first, again, other = (
        list(
            itertools.islice(train_batches(dataclasses.replace(cfg, seed=seed), BYTES, **SIZES), 20)
        )
        for seed in (0, 0, 1)
    )
    assert same(first, again) and not same(first, other)


def test_batches_are_the_same_on_every_machine(cfg):
    # If this number changes, saved runs cannot resume bit-exactly.
    digest = hashlib.sha256()
    for batch in itertools.islice(train_batches(cfg, BYTES, **SIZES), 20):
        digest.update(
            batch["tokens"].astype("<i4").tobytes() + batch["segment_ids"].astype("<i4").tobytes()
        )
    assert digest.hexdigest()[:16] == "4cf1b0d3c9999291"


def test_processes_share_the_batch_of_one_process(cfg):
    whole = list(itertools.islice(train_batches(cfg, BYTES, **SIZES), 10))
    parts = [
        itertools.islice(train_batches(cfg, BYTES, **SIZES, rows=rows), 10)
        for rows in ([0, 2], [1, 3])
    ]
    joined = [
        {key: np.stack([a[key], b[key]], 1).reshape(4, 16) for key in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(vocab_size=257), r"vocab_size: got 257; .* at least 258"),
        (dict(seq_len=1), "seq_len: got 1"),
        (dict(batch_size=0), "batch_size: got 0"),
        (
            dict(rows=[0, 4]),
            r"rows: got \[0, 4\]; must be one or more rows of the batch, in \[0, 4\)",
        ),
        (dict(rows=[]), r"rows: got \[\]"),
    ],
)
@pytest.mark.parametrize("batches", [train_batches, held_out_batches])
def test_sizes_are_checked_before_anything_is_read(batches, change, text):
    with pytest.raises(ValueError, match=text):
        batches(DataConfig(source="/no/such/folder"), BYTES, **(SIZES | change))


# ---- resume --------------------------------------------------------------------------------------


def test_resume_from_any_step_is_exact_also_through_json(cfg):
    # 60 steps x 4 rows pass many states with an empty remainder, which grain alone restores wrongly
    # from JSON.
    iterator, states, batches = train_batches(cfg, BYTES, **SIZES), [], []
    for _ in range(60):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    fresh = train_batches(cfg, BYTES, **SIZES)
    for step, state in enumerate(states):
        fresh.set_state(json.loads(state))
        expected = batches[step : step + 3]
        assert same(list(itertools.islice(fresh, len(expected))), expected), step


def test_resume_through_orbax_is_exact(cfg, tmp_path):
    from orbax.checkpoint import v1 as ocp

    for step in (0, 7):
        iterator = train_batches(cfg, BYTES, **SIZES)
        for _ in range(step):
            next(iterator)
        ocp.save_checkpointables(tmp_path / str(step), {"data": iterator})
        expected = list(itertools.islice(iterator, 5))
        fresh = train_batches(cfg, BYTES, **SIZES)
        next(fresh)
        ocp.load_checkpointables(tmp_path / str(step), {"data": fresh})
        assert same(list(itertools.islice(fresh, 5)), expected)


def test_asynchronous_save_keeps_the_position_of_the_call(cfg, tmp_path):
    from orbax.checkpoint import v1 as ocp

    iterator = train_batches(cfg, BYTES, **SIZES)
    next(iterator)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables_async(1, {"data": iterator})
        expected = list(itertools.islice(iterator, 5))
        checkpointer.wait()
        fresh = train_batches(cfg, BYTES, **SIZES)
        checkpointer.load_checkpointables(1, {"data": fresh})
    assert same(list(itertools.islice(fresh, 5)), expected)


def test_other_processes_resume_from_the_rows_that_all_have_saved(cfg, tmp_path):
    # Three processes wrote, two of which hold the same row; now two resume, then one.
    whole, before = train_batches(cfg, BYTES, **SIZES), tmp_path / "data"
    before.mkdir()
    for i, rows in enumerate(([0, 2], [2, 3], [1])):
        part = train_batches(cfg, BYTES, **SIZES, rows=rows)
        for _ in range(7):
            next(part)
        (before / f"process_{i}.json").write_text(json.dumps(part.get_state()))
    expected = list(itertools.islice(whole, 12))[7:]
    for rows in ([0, 1], [2, 3], [0, 1, 2, 3]):
        part = train_batches(cfg, BYTES, **SIZES, rows=rows)
        asyncio.run(load(part, before))
        assert same(
            list(itertools.islice(part, 5)), [{key: a[key][rows] for key in a} for a in expected]
        )
    (before / "process_2.json").unlink()
    with pytest.raises(ValueError, match="has no row 1; a file of the checkpoint is missing"):
        asyncio.run(load(train_batches(cfg, BYTES, **SIZES), before))


async def load(iterator, directory):
    await (await iterator.load(directory))


def test_resume_on_other_data_or_sizes_is_refused(folder, cfg):
    state = json.loads(json.dumps(train_batches(cfg, BYTES, **SIZES).get_state()))
    for name, change in (("batch_size", 8), ("seq_len", 32)):
        with pytest.raises(
            ValueError, match=f"data position: was saved with {name} {SIZES[name]}, .* has {change}"
        ):
            train_batches(cfg, BYTES, **(SIZES | {name: change})).set_state(state)
    with pytest.raises(ValueError, match="was saved with seed 0, this run has 3"):
        train_batches(dataclasses.replace(cfg, seed=3), BYTES, **SIZES).set_state(state)
    with (folder / "d1" / "01.txt").open("a") as file:
        file.write("longer")
    words = r"was saved with text/d1/01\.txt 17 bytes \w+, this run has 23 bytes \w+; only"
    with pytest.raises(ValueError, match=words):
        train_batches(cfg, BYTES, **SIZES).set_state(state)


# ---- held out ------------------------------------------------------------------------------------


def test_held_out_batches_hold_every_held_out_token_once(cfg):
    batches = held_out_batches(cfg, BYTES, **SIZES)
    _, documents = split_documents(cfg, read_documents(cfg.sources[0]))
    expected = sum(document.size + 2 for document in documents)
    ids = np.concatenate([batch["segment_ids"] for batch in batches])
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert (ids > 0).sum() == expected and (tokens[ids == 0] == 0).all()
    assert (tokens[ids > 0] == 1).sum() == len(documents)
    assert all(
        array.shape == (4, 16) and array.dtype == np.int32
        for batch in batches
        for array in batch.values()
    )
    assert len(ids) - 4 < math.ceil(expected / 16) <= len(ids)
    assert same(batches, held_out_batches(dataclasses.replace(cfg, seed=9), BYTES, **SIZES))


def test_held_out_batches_can_be_bounded_and_shared(cfg):
    batches = held_out_batches(cfg, BYTES, **SIZES)
    assert (
        same(held_out_batches(cfg, BYTES, **SIZES, max_batches=2), batches[:2]) and len(batches) > 2
    )
    assert same(held_out_batches(cfg, BYTES, **SIZES, max_batches=10_000), batches)
    parts = [held_out_batches(cfg, BYTES, **SIZES, rows=rows) for rows in ([0, 1], [2, 3])]
    assert same(
        [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)], batches
    )
    with pytest.raises(ValueError, match="max_batches: got 0"):
        held_out_batches(cfg, BYTES, **SIZES, max_batches=0)


def test_no_held_out_text_is_trained_on(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>")
    cfg = DataConfig(source=str(tmp_path), held_out=0.3)
    held = {
        BYTES.decode(ids) for ids in segments(held_out_batches(cfg, BYTES, 256, 1, vocab_size=258))
    }
    batches = itertools.islice(train_batches(cfg, BYTES, 256, 1, vocab_size=258), 8)
    train = {BYTES.decode(ids) for ids in segments(batches)}
    assert len(held) >= 5 and not held & train


# ---- unigram -------------------------------------------------------------------------------------


def batch_of(tokens, ids):
    return {"tokens": np.array([tokens], np.int32), "segment_ids": np.array([ids], np.int32)}


def test_unigram_loss_by_hand():
    # Targets of train: 5, 5, 6 (the first token of each segment and the padding are not predicted).
    train = [batch_of([0, 5, 5, 9, 6, 0, 0], [1, 1, 1, 2, 2, 0, 0])]
    held_out = [batch_of([0, 5, 6, 7], [1, 1, 1, 1]), batch_of([0, 9, 9, 9], [1, 2, 3, 0])]
    expected = -(math.log(3 / 13) + math.log(2 / 13) + math.log(1 / 13)) / 3
    assert unigram_loss(train, held_out, vocab_size=10) == pytest.approx(expected)
    assert unigram_loss([], held_out, vocab_size=10) == pytest.approx(math.log(10))
    with pytest.raises(ValueError, match="nothing to predict"):
        unigram_loss(train, held_out[1:], vocab_size=10)


def test_unigram_loss_of_the_standard_library_is_near_three_nats_per_byte():
    cfg = DataConfig()
    train = itertools.islice(train_batches(cfg, BYTES, 512, 8, vocab_size=258), 50)
    loss = unigram_loss(train, held_out_batches(cfg, BYTES, 512, 8, vocab_size=258), 258)
    assert 2.8 < loss < 3.6
