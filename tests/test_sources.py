"""Claims about sources, mixtures, packing, fill-in-middle and the token cache."""

import dataclasses
import itertools
import json
import shutil

import grain
import numpy as np
import pytest

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data import token_cache, tokenised
from v4jax.data.config import DataConfig, Source
from v4jax.data.mixture import SLOTS, Joined, shuffled
from v4jax.data.store import open_store
from v4jax.data.tokenised import _maybe_fim
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.data import held_out_batches, held_out_sets, train_batches

BYTES, CHAT = ByteTokenizer(), ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
SIZES = dict(seq_len=32, batch_size=4, vocab_size=273)


def texts(count=30, prefix="t"):
    return [f"{prefix}{i} " + "aé🐋"[i % 3] * (i * 7 % 40) for i in range(count)]


def write(path, values, column="text"):
    """Records of a column, in the format of the file's suffix; the path."""
    if path.suffix == ".jsonl":
        path.write_text(
            "\n\n".join(json.dumps({column: value, "id": i}) for i, value in enumerate(values))
            + "\n"
        )
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(
            pyarrow.table({column: values, "id": list(range(len(values)))}), path, row_group_size=7
        )
    else:
        record = pytest.importorskip("array_record.python.array_record_module")
        writer = record.ArrayRecordWriter(str(path), "group_size:1")
        for value in values:
            writer.write(json.dumps({column: value}).encode() if column else value.encode())
        writer.close()
    return str(path)


def config(path, form, **more):
    return DataConfig(source=str(path), format=form, held_out=0.2, **more)


def segments(batches):
    for batch in batches:
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            yield from (tokens[ids == segment].tolist() for segment in range(1, ids.max() + 1))


def batches(cfg, count, tokenizer=BYTES, **change):
    return list(itertools.islice(train_batches(cfg, tokenizer, **(SIZES | change)), count))


def same(left, right):
    return len(left) == len(right) and all(
        (a[key] == b[key]).all() for a, b in zip(left, right, strict=True) for key in a
    )


FORMS = [("jsonl", "x.jsonl"), ("parquet", "x.parquet"), ("arrayrecord", "x.array_record")]


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_every_record_is_a_document(tmp_path, form, name):
    cfg = config(write(tmp_path / name, texts()), form)
    tokens = open_store(cfg, cfg.sources[0], BYTES)
    ends = tokens.ends.tolist()
    found = [
        tokens.tokens[begin:end].tolist() for begin, end in zip([0, *ends], ends, strict=False)
    ]
    assert found == [[0, *BYTES.encode(text), 1] for text in texts()]


def test_formats_of_the_same_text_give_the_same_batches(tmp_path):
    first, *others = [
        batches(config(write(tmp_path / name, texts()), form), 10)
        for form, name in FORMS
        if form != "parquet"
    ]
    assert all(same(first, other) for other in others)


def test_an_array_record_may_be_the_text_itself(tmp_path):
    cfg = config(write(tmp_path / "x.array_record", texts(), column=""), "arrayrecord", column="")
    assert same(batches(cfg, 5), batches(config(write(tmp_path / "x.jsonl", texts()), "jsonl"), 5))


def test_files_of_a_folder_go_by_suffix_and_name(tmp_path):
    write(tmp_path / "b.jsonl", texts(3, "b")), write(tmp_path / "a.jsonl", texts(3, "a"))
    (tmp_path / "c.txt").write_text("no record")
    cfg = config(tmp_path, "jsonl")
    assert BYTES.decode(open_store(cfg, cfg.sources[0], BYTES).tokens) == "".join(
        texts(3, "a") + texts(3, "b")
    )


def test_a_text_folder_through_the_store_has_the_documents_of_the_files(tmp_path):
    for i, text in enumerate(texts()):
        (tmp_path / f"{i}.txt").write_text(text)
    cfg = config(tmp_path, "text")
    direct, stored = (
        held_out_batches(c, BYTES, **SIZES)
        for c in (cfg, dataclasses.replace(cfg, cache=str(tmp_path / ".cache")))
    )
    assert sorted(BYTES.decode(np.concatenate(list(segments(direct))))) == sorted(
        BYTES.decode(np.concatenate(list(segments(stored))))
    )


def test_equal_records_fall_on_one_side_of_the_split(tmp_path):
    cfg = config(write(tmp_path / "x.jsonl", texts(20) * 3), "jsonl")
    held = {
        BYTES.decode(ids) for ids in segments(held_out_batches(cfg, BYTES, 256, 1, vocab_size=258))
    }
    train = {BYTES.decode(ids) for ids in segments(batches(cfg, 20, seq_len=256, batch_size=1))}
    assert held and not held & train


@pytest.mark.parametrize(
    ("name", "form", "content", "words"),
    [
        ("x.jsonl", "jsonl", '{"text": "a"}\n{"text": ', r"x.jsonl:2: not JSON"),
        ("x.jsonl", "jsonl", "[]\n", r"x.jsonl:1: got list; must be a JSON object"),
        (
            "x.jsonl",
            "jsonl",
            '{"txt": "a", "id": 1}\n',
            r"x.jsonl:1: has no column 'text'; there are: id, txt",
        ),
        ("x.jsonl", "jsonl", '{"text": 5}\n', r"x.jsonl:1: column 'text' is int; must be text"),
        ("x.jsonl", "jsonl", "\n \n", r"in: every document is empty$"),
        ("x.jsonl", "jsonl", '{"text": "a"}\n', r"has 1 document\(s\); at least 2 are needed"),
        ("x.array_record", "arrayrecord", "junk", r"x.array_record: not an ArrayRecord file"),
        (
            "x.parquet",
            "parquet",
            "junk",
            r"x.parquet: (not a Parquet file|reading Parquet needs the package pyarrow; pip "
            r"install)",
        ),
        (
            "x.txt",
            "jsonl",
            "",
            r"in holds no .jsonl, .ndjson or .json file \(0 file\(s\) are read; 1 left out: x.txt",
        ),
    ],
)
def test_broken_sources_are_one_line_with_file_and_place(tmp_path, name, form, content, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        train_batches(config(tmp_path / "in", form), BYTES, **SIZES)
    assert "\n" not in str(caught.value)


def test_an_unknown_parquet_column_shows_those_there_are(tmp_path):
    path = write(tmp_path / "x.parquet", texts(), column="body")
    with pytest.raises(ValueError, match=r"x.parquet:1: has no column 'text'; there are: body, id"):
        train_batches(config(path, "parquet"), BYTES, **SIZES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "csv"}, "format: got 'csv'; allowed: text, jsonl"),
        ({"format": "jsonl", "column": ""}, "column: got ''"),
        ({"packing": "worst_fit"}, "packing: got 'worst_fit'"),
        ({"fim_rate": 1.5}, "fim_rate: got 1.5"),
        ({"mixture": (Source(path="a/x"), Source(path="b/x"))}, "name: got 'x' more than once"),
        ({"evaluate_on": (Source(path="held_out"),)}, "name: got 'held_out' more than once"),
    ],
)
def test_settings_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**fields)
    with pytest.raises(ValueError, match="weight: got 0"):
        Source(path="x", weight=0)


# ---- mixtures ------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path):
    """Short and long documents of a, b and c in the ratio 6 : 3 : 1."""
    sources = []
    for letter, weight, length in (("a", 6.0, 4), ("b", 3.0, 90), ("c", 1.0, 30)):
        path = write(
            tmp_path / f"{letter}.jsonl", [letter * (length + i % 3) + f"{i}" for i in range(50)]
        )
        sources.append(Source(path=path, format="jsonl", weight=weight))
    return DataConfig(mixture=tuple(sources), held_out=0.2)


def test_tokens_come_in_the_ratio_of_the_weights_in_every_row(mixture):
    some = batches(mixture, 300)
    share = np.zeros((4, 3))
    for row in range(4):
        for ids in segments(
            [
                {name: batch[name][row : row + 1] for name in ("tokens", "segment_ids")}
                for batch in some
            ]
        ):
            share[row] += len(ids) * np.array([token in ids for token in BYTES.encode("abc")])
    share /= share.sum(1, keepdims=True)
    # A row reads about 30 documents of b, so its share of 0.3 has a deviation of some 0.05.
    np.testing.assert_allclose(share, [[0.6, 0.3, 0.1]] * 4, atol=0.11)
    np.testing.assert_allclose(share.mean(0), [0.6, 0.3, 0.1], atol=0.04)


def test_weights_are_shares_of_tokens():
    class Part(list):
        mean_tokens = property(lambda self: self[0])

    parts = [Part([10] * 700), Part([40] * 500)]
    mixed = shuffled(parts, [1.0, 1.0], "ab", 0)
    lengths = np.array([mixed[i] for i in range(SLOTS)])
    assert lengths[lengths == 10].sum() == pytest.approx(lengths[lengths == 40].sum(), rel=0.02)
    with pytest.raises(ValueError, match="weight: got 0.001 for b; less than one in 1021"):
        shuffled(parts, [10.0, 0.001], "ab", 0)


def test_a_source_of_a_mixture_is_read_whole_before_again():
    parts = [Joined([list(range(10))]), Joined([list(range(100, 103)), list(range(103, 107))])]
    for part in parts:
        type(part).mean_tokens = 1.0
    mixed = shuffled(parts, [1.0, 2.0], "ab", 3)
    found = [mixed[i] for i in range(200)]
    for low, count in ((0, 10), (100, 7)):
        mine = [x for x in found if low <= x < low + 100][: 5 * count]
        assert all(
            sorted(mine[i : i + count]) == list(range(low, low + count))
            for i in range(0, len(mine), count)
        )


def test_held_out_sets_have_names(mixture, tmp_path):
    extra = Source(path=write(tmp_path / "d.jsonl", ["dddd", "ddd"]), format="jsonl", name="extra")
    sets = held_out_sets(dataclasses.replace(mixture, evaluate_on=(extra,)), BYTES, **SIZES)
    assert list(sets) == ["held_out", "a", "b", "c", "extra"]
    count = {
        name: sum((batch["segment_ids"] > 0).sum() for batch in some) for name, some in sets.items()
    }
    assert count["held_out"] == count["a"] + count["b"] + count["c"] and count["extra"] == 4 + 3 + 4
    assert set(np.concatenate(list(segments(sets["a"])))) <= set(BYTES.encode("a0123456789")) | {
        0,
        1,
    }


# ---- packing -------------------------------------------------------------------------------------


def test_best_fit_keeps_documents_whole_and_fills_rows(tmp_path):
    cfg = config(write(tmp_path / "x.jsonl", texts(200)), "jsonl", packing="best_fit")
    some = batches(cfg, 40, seq_len=64)
    whole = {tuple([0, *BYTES.encode(text), 1]) for text in texts(200)}
    for ids in segments(some):
        assert (
            len(ids) == 64 or ids[0] != 0 or tuple(ids) in whole
        )  # cut only where longer than a row
    assert np.mean([(batch["segment_ids"] > 0).mean() for batch in some]) > 0.9
    assert all((batch["tokens"][batch["segment_ids"] == 0] == 0).all() for batch in some)


def test_best_fit_holds_every_document_once(tmp_path):
    cfg = config(write(tmp_path / "x.jsonl", texts(50)), "jsonl", packing="best_fit")
    found = sorted(map(tuple, segments(held_out_batches(cfg, BYTES, 256, 2, vocab_size=258))))
    split = sorted(
        map(
            tuple,
            segments(
                held_out_batches(
                    dataclasses.replace(cfg, packing="split"), BYTES, 4096, 1, vocab_size=258
                )
            ),
        )
    )
    assert found == split and len(found) >= 5


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_mixtures_resume_exactly_and_do_not_depend_on_processes(mixture, packing):
    cfg = dataclasses.replace(mixture, packing=packing)
    whole = batches(cfg, 60)
    parts = [train_batches(cfg, BYTES, **SIZES, rows=rows) for rows in ([0, 3], [1], [2])]
    for step, batch in enumerate(whole):
        states = [json.loads(json.dumps(part.get_state())) for part in parts]
        found = [next(part) for part in parts]
        for key in batch:
            both, one, two = (part[key] for part in found)
            assert (np.stack([both[0], one[0], two[0], both[1]]) == batch[key]).all(), (step, key)
        if step % 7 == 3:
            fresh = train_batches(cfg, BYTES, **SIZES)
            fresh.set_state(
                {
                    "settings": states[0]["settings"],
                    "rows": {k: v for state in states for k, v in state["rows"].items()},
                }
            )
            expected = whole[step : step + 5]
            assert same(list(itertools.islice(fresh, len(expected))), expected), step


def test_other_weights_or_packing_are_not_gone_on_with(mixture):
    state = train_batches(mixture, BYTES, **SIZES).get_state()
    heavier = (dataclasses.replace(mixture.mixture[0], weight=7.0), *mixture.mixture[1:])
    changes = {"weights": heavier, "packing": "best_fit", "held_out": 0.5}
    for words, value in changes.items():
        change = {"mixture" if words == "weights" else words: value}
        with pytest.raises(ValueError, match=f"was saved with {words}"):
            train_batches(dataclasses.replace(mixture, **change), BYTES, **SIZES).set_state(state)


# ---- fill in the middle --------------------------------------------------------------------------


def test_fill_in_middle_is_prefix_suffix_middle():
    cfg = DataConfig(fim_rate=0.5)
    begin, hole, end = FIM_TOKENS
    turned = 0
    for index in range(400):
        text = f"document {index} é🐋"
        found = _maybe_fim(cfg, index, text)
        if found != text:
            turned += 1
            prefix, rest = found.removeprefix(begin).split(hole)
            suffix, middle = rest.split(end)
            assert prefix + middle + suffix == text
    assert 160 < turned < 240  # 200 expected, 10 the standard deviation
    assert [
        _maybe_fim(dataclasses.replace(cfg, fim_rate=rate), 3, "abc") == "abc"
        for rate in (0.0, 1.0)
    ] == [True, False]


def test_fill_in_middle_reaches_the_batches_as_special_tokens(tmp_path):
    path = write(tmp_path / "x.jsonl", texts(50))
    some = batches(config(path, "jsonl", fim_rate=1.0, packing="best_fit"), 4, CHAT, seq_len=256)
    ids = [CHAT.encode(name)[0] for name in FIM_TOKENS]
    for found in segments(some):
        assert (
            [token for token in found if token in ids] == ids
            and found[:2] == [0, ids[0]]
            and found[-1] == 1
        )
    with pytest.raises(
        ValueError, match="tokenizer: has no token <｜fim▁begin｜>, which fim_rate needs"
    ):
        batches(config(path, "jsonl", fim_rate=0.1), 1)


# ---- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    return config(write(tmp_path / "x.jsonl", texts()), "jsonl", cache=str(tmp_path / "cache"))


def forbid_reading(monkeypatch):
    monkeypatch.setattr(tokenised, "_tokenised", lambda *_: pytest.fail("tokenised again"))


def test_a_cache_is_mapped_and_used_again(cached, tmp_path, monkeypatch):
    first = batches(cached, 10)
    assert same(first, batches(dataclasses.replace(cached, cache=""), 10))
    folder, *more = (tmp_path / "cache").iterdir()
    assert not more and folder.name.startswith("x-")
    forbid_reading(monkeypatch)
    assert same(batches(cached, 10), first)
    assert isinstance(open_store(cached, cached.sources[0], BYTES).tokens, np.memmap)


def test_a_cache_of_other_files_or_tokenizer_or_settings_is_not_used(cached, tmp_path):
    batches(cached, 1)
    write(tmp_path / "x.jsonl", texts(31))
    assert same(batches(cached, 5), batches(dataclasses.replace(cached, cache=""), 5))
    batches(cached, 1, CHAT)
    batches(dataclasses.replace(cached, fim_rate=0.5), 1, CHAT)
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("harm", ["flip", "cut", "lost", "no sums"])
def test_a_damaged_cache_is_noticed_and_made_again(cached, tmp_path, capsys, harm):
    first = batches(cached, 5)
    (folder,) = (tmp_path / "cache").iterdir()
    tokens = folder / "tokens"
    data = tokens.read_bytes()
    if harm == "lost":
        tokens.unlink()
    elif harm == "no sums":
        (folder / token_cache.SUMS_FILE).unlink()
    else:
        tokens.write_bytes(
            data[:40] + bytes([data[40] ^ 1]) + data[41:] if harm == "flip" else data[:-4]
        )
    assert same(batches(cached, 5), first)
    said = capsys.readouterr().err
    assert said.startswith(f"v4jax: token cache {folder} is damaged (") and said.count("\n") == 1
    assert batches(cached, 1) and capsys.readouterr().err == ""


def test_a_cache_that_was_not_finished_is_not_there(cached, tmp_path, monkeypatch):
    real = tokenised._tokenised

    def dies(*args):
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenised, "_tokenised", dies)
    with pytest.raises(KeyboardInterrupt):
        batches(cached, 1)
    monkeypatch.setattr(tokenised, "_tokenised", real)
    assert list((tmp_path / "cache").iterdir()) == []
    assert batches(cached, 1)


def test_of_two_that_make_a_cache_one_is_first(cached, tmp_path, monkeypatch):
    real = token_cache.write_sums

    def other_was_faster(work):
        real(work)
        (target,) = [work.with_name(work.name[1:].rsplit(".", 1)[0])]
        shutil.copytree(work, target)

    monkeypatch.setattr(token_cache, "write_sums", other_was_faster)
    assert same(batches(cached, 5), batches(dataclasses.replace(cached, cache=""), 5))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_states_of_the_pack_iterators_are_small(mixture):
    iterator = train_batches(dataclasses.replace(mixture, packing="best_fit"), BYTES, **SIZES)
    next(iterator)
    assert len(json.dumps(iterator.get_state())) < 3000 and isinstance(
        iterator, grain.DatasetIterator
    )
