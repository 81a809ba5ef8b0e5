"""Preference pairs as training data: what is learned, how they lie in rows, what is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from pairs import write_pairs

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.config import ChatFormat, DataConfig, Source
from v4jax.data.documents import held_out_of
from v4jax.data.identity import differences, settings_of
from v4jax.data.listing import Listings
from v4jax.data.pairs import pair_tokens
from v4jax.data.summary import unused_lines
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.data import held_out_batches, train_batches

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
NAMES = {v: k for k, v in CHAT._ids.items()}
E, U, A = "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SIZES = dict(seq_len=96, batch_size=4, vocab_size=280)


def says(role, content="", **more):
    return {"role": role, "content": content} | more


def text_of(ids):
    return "".join(NAMES.get(int(i)) or CHAT.decode([i]) for i in ids)


def learned(record, **chat):
    """The learned spans of chosen and of rejected, as text."""
    made, _, _ = pair_tokens(record, ChatFormat(thinking_mode="chat", **chat), CHAT)
    spans = []
    for ids, marks in made:
        groups = itertools.groupby(zip(ids, marks, strict=True), key=lambda one: one[1])
        spans.append([text_of(i for i, _ in run) for mark, run in groups if mark])
    return spans


ASKED = [says("system", "S"), says("user", "a"), says("assistant", "A1"), says("user", "b")]


@pytest.mark.parametrize(
    "record",
    [
        {
            "prompt": ASKED,
            "chosen": [says("assistant", "yes")],
            "rejected": [says("assistant", "no")],
        },
        {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
        {
            "chosen": [*ASKED, says("assistant", "yes")],
            "rejected": [*ASKED, says("assistant", "no")],
        },
        {
            "prompt": ASKED,
            "chosen": [*ASKED, says("assistant", "yes")],
            "rejected": [*ASKED, says("assistant", "no")],
        },
        {
            "prompt": [message | {"name": None} for message in ASKED],
            "chosen": [*ASKED, says("assistant", "yes", tool_calls=None)],
            "rejected": [*(message | {"tools": []} for message in ASKED), says("assistant", "no")],
        },
        {
            "prompt": "b",
            "chosen": [*ASKED, says("assistant", "yes")],
            "rejected": [*ASKED, says("assistant", "no")],
        },
    ],
    ids=["explicit", "texts", "implicit", "whole and prompt", "empty keys", "last question"],
)
def test_learned_is_what_comes_after_the_common_beginning(record):
    assert learned(record) == [[f"yes{E}"], [f"no{E}"]]
    made, _, unread = pair_tokens(record | {"score": 3}, ChatFormat(), CHAT)
    texts = [text_of(ids) for ids, _ in made]
    assert all(f"S{U}a{A}</think>A1{E}{U}b{A}<think></think>" in text for text in texts)
    assert all(text.count(f"{U}b") == 1 for text in texts)
    assert unread == ["score"]


def test_a_text_prompt_is_the_users_message():
    made, _, _ = pair_tokens({"prompt": "b", "chosen": "y", "rejected": "n"}, ChatFormat(), CHAT)
    assert text_of(made[0][0]).endswith(f"{U}b{A}<think></think>y{E}")


def test_later_turns_are_learned_and_equal_first_answers_are_not():
    turns = [says("assistant", "same"), says("user", "c")]
    record = {
        "prompt": ASKED,
        "chosen": [*turns, says("assistant", "yes"), says("user", "d"), says("assistant", "more")],
        "rejected": [*turns, says("assistant", "no")],
    }
    assert learned(record) == [[f"yes{E}", f"more{E}"], [f"no{E}"]]


def test_equal_prompts_are_on_one_side_of_the_split():
    hashes = {
        pair_tokens({"prompt": "q", "chosen": f"{i}", "rejected": "n"}, ChatFormat(), CHAT)[1]
        for i in range(3)
    }
    filled = {"content": "q", "name": None, "role": "user"}
    hashes.add(
        pair_tokens({"prompt": [filled], "chosen": "a", "rejected": "n"}, ChatFormat(), CHAT)[1]
    )
    assert len(hashes) == 1


def test_even_of_a_few_pairs_equal_prompts_are_on_one_side():
    """Where one side would be empty by chance; of one prompt alone both sides have some."""
    for hashes, held in (
        ([0.5, 0.9, 0.5], [1, 0, 1]),
        ([0.1, 0.05, 0.1], [0, 1, 0]),
        ([0.5, 0.5], [1, 0]),
        ([0.1, 0.1], [1, 0]),
    ):
        assert held_out_of(hashes, 0.2).tolist() == list(map(bool, held))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no column 'rejected'; there are: chosen, prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, r"rejected: got \[\]; must be text, or"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: got null; must be text, or"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: got int; must be text, or a list"),
        (
            {"chosen": "a", "rejected": "b"},
            r"chosen: got text without a .*\(there are: chosen, rejected\)",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [says("user", "b")]},
            "rejected: begins with role 'user' and does not hold the prompt; must be what follows",
        ),
        (
            {
                "prompt": ASKED,
                "chosen": [*ASKED[1:], says("assistant", "a")],
                "rejected": [*ASKED[1:], says("assistant", "b")],
            },
            "chosen: begins with role 'user' and does not hold the prompt",
        ),
        (
            {"chosen": [*ASKED, says("assistant", "b")], "rejected": ASKED},
            r"rejected: has no answer after the 4 message\(s\) of both",
        ),
        (
            {"chosen": ASKED, "rejected": [*ASKED, says("assistant", "b")]},
            r"chosen: has no answer after the 4 message\(s\) of both",
        ),
        (
            {"chosen": [says("user", "a")], "rejected": [says("user", "b")]},
            "chosen and rejected begin with different messages; must share a prompt",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [says("assistant", "b", thought="c")]},
            "rejected: message 1: got key 'thought', which would be lost",
        ),
        (
            {"prompt": "q", "system": "S", "chosen": "a", "rejected": "b"},
            "got key 'system' beside rejected, which would be lost",
        ),
        (
            {
                "prompt": "q",
                "thinking_mode": "chat",
                "chosen": [says("assistant", "a", reasoning="b")],
                "rejected": [says("assistant", "a", reasoning="c")],
            },
            "chosen and rejected become the same text",
        ),
    ],
)
def test_broken_pairs_are_named_by_file_and_line(tmp_path, record, words):
    cfg = write_pairs(tmp_path / "pairs.jsonl", 1)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl:3: {words}") as refused:
        train_batches(cfg, CHAT, **SIZES)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_is_called_one(tmp_path):
    cfg = write_pairs(tmp_path / "pairs.parquet", 0)
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1\x15\xff")
    with pytest.raises(ValueError, match="pairs.parquet:1: a Parquet file; must be JSON lines"):
        train_batches(cfg, CHAT, **SIZES)


def test_rows_hold_whole_pairs_as_neighbours(tmp_path):
    """The reference is each record by itself; all of them come, the held-out ones apart."""
    cfg = write_pairs(tmp_path / "pairs.jsonl", 30)
    whole = set()
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        made, _, _ = pair_tokens(json.loads(line), cfg.chat, CHAT)
        whole.add(tuple((tuple(ids), tuple(marks)) for ids, marks in made))
    seen, held = set(), set()
    for found, batches in (
        (seen, itertools.islice(train_batches(cfg, CHAT, **SIZES), 40)),
        (held, held_out_batches(cfg, CHAT, **SIZES)),
    ):
        for batch in batches:
            assert all(x.shape == (4, 96) and x.dtype == np.int32 for x in batch.values())
            assert batch.keys() == {"tokens", "segment_ids", "loss_mask"}
            for tokens, ids, mask in zip(*batch.values(), strict=True):
                assert ids.max() % 2 == 0 and not mask[ids == 0].any()
                changes = np.diff(ids[ids > 0])
                assert ((changes == 0) | (changes == 1)).all() and (ids[0] in (0, 1))
                for first in range(1, ids.max(), 2):
                    sides = (ids == first, ids == first + 1)
                    found.add(tuple((tuple(tokens[at]), tuple(mask[at])) for at in sides))
    assert seen | held == whole and not seen & held and held


def test_a_pair_longer_than_a_row(tmp_path):
    cfg = write_pairs(tmp_path / "pairs.jsonl")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 50, "chosen": "y", "rejected": "z"}) + "\n")
    with pytest.raises(
        ValueError,
        match="pairs.jsonl:25: this pair has 114 tokens, and a row holds 96; raise seq_len, or set "
        "chat.too_long to drop$",
    ):
        train_batches(cfg, CHAT, **SIZES)
    cfg = dataclasses.replace(cfg, chat=ChatFormat(too_long="drop"))
    (line,) = unused_lines(cfg, CHAT, [96], 96, Listings())
    assert line.endswith("1 of 25 pairs are left out (1 longer than seq_len=96)")
    assert next(train_batches(cfg, CHAT, **SIZES))["segment_ids"].max() >= 2


def test_a_pair_with_nothing_to_learn_on_one_side_is_left_out(tmp_path):
    cfg = write_pairs(tmp_path / "pairs.jsonl")
    silent = {"prompt": "q", "chosen": [says("assistant", "y", weight=0)], "rejected": "z"}
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(silent) + "\n")
    (line,) = unused_lines(cfg, CHAT, [96], 96, Listings())
    assert line.endswith(
        "1 of 25 pairs are left out (1 without a token to learn (weight, train_on))"
    )


def test_a_position_and_a_cache_know_the_format(tmp_path):
    cfg = write_pairs(tmp_path / "pairs.jsonl")
    cfg = dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
    batches = train_batches(cfg, CHAT, **SIZES)
    next(batches)
    state, after = batches.get_state(), next(batches)
    again = train_batches(cfg, CHAT, **SIZES)
    again.set_state(json.loads(json.dumps(state)))
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, after[name])
    saved = settings_of(cfg, CHAT, 96, 4)
    other = settings_of(dataclasses.replace(cfg, format="jsonl", column="chosen"), CHAT, 96, 4)
    assert "formats" in [one.name for one in differences(saved, other)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": "split"}, "packing: got 'split'; conversations must stay whole"),
        ({"chat": ChatFormat(too_long="cut")}, "chat.too_long: got 'cut'; allowed with preference"),
        (
            {"evaluate_on": (Source(path="x.jsonl", format="chat"),)},
            "format: got 'chat' for x beside preference; pairs are not mixed",
        ),
    ],
)
def test_settings_that_would_part_pairs_are_refused(changes, words):
    fields = dict(source="pairs.jsonl", format="preference", packing="best_fit")
    with pytest.raises(ValueError, match=words):
        DataConfig(**fields | changes)
