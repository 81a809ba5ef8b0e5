"""Conversations as training data: what is learned, how rows are packed, what a run does."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params, small_config

import v4jax
from v4jax.chat.encoding import encode_messages
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.config import ChatFormat, DataConfig, Source
from v4jax.data.conversations import conversation_tokens
from v4jax.data.listing import Listings
from v4jax.data.selection import used_conversations
from v4jax.data.store import open_store
from v4jax.data.summary import unused_lines
from v4jax.data.tokenised import TokenStore
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_batches, train_batches, unigram_loss
from v4jax.train.loop import train
from v4jax.train.prepare import say_unused
from v4jax.train.stages import Stage

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
NAMES = {v: k for k, v in CHAT._ids.items()}
E, A = "<｜end▁of▁sentence｜>", "<｜Assistant｜>"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
LOOK = {"function": {"name": "look", "arguments": '{"at": "it"}'}}


def says(role, content="", **more):
    return {"role": role, "content": content} | more


def text_of(ids):
    return "".join(NAMES.get(int(i)) or CHAT.decode([i]) for i in ids)


def learned(record, **chat):
    """The learned spans of a record, as text."""
    ids, marks = conversation_tokens(record, "messages", ChatFormat(**chat), CHAT)
    groups = itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1])
    return [text_of(i for i, _ in run) for mark, run in groups if mark]


TURNS = [
    says("system", "S"),
    says("user", "a"),
    says("assistant", "A1", reasoning_content="r1"),
    says("user", "b"),
    says("assistant", "A2", reasoning_content="r2"),
]


# ---- what is learned -----------------------------------------------------------------------------


def test_learned_is_what_the_assistant_wrote():
    assert learned({"messages": TURNS}) == [f"A1{E}", f"r2</think>A2{E}"]
    assert learned({"messages": TURNS}, drop_thinking=False) == [
        f"r1</think>A1{E}",
        f"r2</think>A2{E}",
    ]
    assert learned({"messages": TURNS}, thinking_mode="chat") == [f"A1{E}", f"A2{E}"]
    assert learned({"messages": TURNS}, train_on="last") == [f"r2</think>A2{E}"]


def test_calls_are_learned_and_results_are_not():
    messages = [
        says("user", "a"),
        says("assistant", "", reasoning_content="r", tool_calls=[LOOK]),
        says("tool", "seen"),
        says("assistant", "ok"),
    ]
    first, second = learned({"messages": messages, "tools": [TOOL]})
    assert first.startswith("r</think>\n\n<｜DSML｜tool_calls>\n") and first.endswith(
        f"</｜DSML｜tool_calls>{E}"
    )
    assert second == f"</think>ok{E}"


def test_a_message_of_no_weight_is_not_learned():
    messages = [TURNS[1], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert learned({"messages": messages}, drop_thinking=False) == [f"r2</think>A2{E}"]


def test_the_answer_to_a_task_is_learned():
    assert learned({"messages": [says("user", "a", task="query"), says("assistant", "q")]}) == [
        f"q{E}"
    ]


def test_a_record_has_its_own_mode_and_tools():
    record = {
        "messages": TURNS[1:3],
        "tools": [TOOL],
        "thinking_mode": "thinking",
        "reasoning_effort": "max",
    }
    ids, _ = conversation_tokens(record, "messages", ChatFormat(thinking_mode="chat"), CHAT)
    declared = [says("system", "", tools=[TOOL]), *TURNS[1:3]]
    assert text_of(ids) == encode_messages(declared, "thinking", reasoning_effort="max")


def test_tokens_are_those_of_the_whole_text(tmp_path):
    # Encoding span by span must not hide merges, so the tokenizer merges and has the special
    # tokens.
    from test_tokenizer import small_bpe

    from v4jax.tokenizer import BOS_TOKEN, EOS_TOKEN, load_tokenizer

    merging = load_tokenizer(small_bpe(tmp_path, specials=(BOS_TOKEN, EOS_TOKEN, *CHAT_TOKENS)))
    messages = [
        says("system", "ab"),
        says("user", "ab"),
        says("assistant", "abab", reasoning_content="ba"),
        says("user", "b"),
    ]
    ids, _ = conversation_tokens({"messages": messages}, "messages", ChatFormat(), merging)
    assert ids.tolist() == merging.encode(encode_messages(messages, "thinking"))
    assert 2 in ids


# ---- files and rows ------------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        source=str(path),
        format="chat",
        column="messages",
        packing="best_fit",
        tokenizer="byte-chat",
        held_out=0.2,
    )


def conversation(i):
    return {
        "messages": [
            says("user", f"{i}?" * (i % 5 + 1)),
            says("assistant", f"{i}!", reasoning_content="so " * (i % 7)),
        ]
    }


@pytest.fixture
def cfg(tmp_path):
    return write(tmp_path / "chat.jsonl", [conversation(i) for i in range(40)])


SIZES = dict(seq_len=96, batch_size=4, vocab_size=280)


def test_rows_hold_whole_conversations_with_their_masks(cfg):
    whole = {
        tuple(ids): marks
        for i in range(40)
        for ids, marks in [conversation_tokens(conversation(i), "messages", cfg.chat, CHAT)]
        for ids in [ids.tolist()]
    }
    seen = set()
    for batch in itertools.islice(train_batches(cfg, CHAT, **SIZES), 30):
        assert (
            all(array.shape == (4, 96) and array.dtype == np.int32 for array in batch.values())
            and len(batch) == 3
        )
        for tokens, ids, mask in zip(
            batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True
        ):
            assert not mask[ids == 0].any()
            for segment in range(1, ids.max() + 1):
                found = tuple(tokens[ids == segment].tolist())
                assert (mask[ids == segment] == whole[found]).all()
                seen.add(found)
    held = sum(
        (batch["tokens"][batch["segment_ids"] > 0] == 0).sum()
        for batch in held_out_batches(cfg, CHAT, **SIZES)
    )
    assert len(seen) + held == 40 and held >= 1


@pytest.mark.parametrize(("too_long", "most"), [("drop", 13), ("cut", 14)])
def test_conversations_longer_than_a_row(tmp_path, too_long, most):
    cfg = write(
        tmp_path / "chat.jsonl",
        [{"messages": [says("user", "u" * i), says("assistant", "yes")]} for i in range(1, 30)],
    )
    with pytest.raises(
        ValueError,
        match=r"chat.jsonl:29: this conversation has 38 tokens, and a row holds 22; raise "
        r"seq_len, or set chat.too_long",
    ):
        train_batches(cfg, CHAT, 22, 2, vocab_size=280)
    cfg = dataclasses.replace(cfg, chat=ChatFormat(too_long=too_long))
    batches = itertools.islice(train_batches(cfg, CHAT, 22, 2, vocab_size=280), 40)
    sizes = {
        (ids == segment).sum()
        for batch in batches
        for ids in batch["segment_ids"]
        for segment in range(1, ids.max() + 1)
    }
    assert max(sizes) == 22 and (len(sizes) <= most)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"chat.jsonl:3: not JSON"),
        ("[1]", r"chat.jsonl:3: got list; must be a JSON object"),
        ('{"turns": []}', r"chat.jsonl:3: has no column 'messages'; there are: turns"),
        ('{"messages": "hi"}', r"chat.jsonl:3: messages: got str"),
        (
            '{"messages": [{"role": "bot", "content": ""}]}',
            r"chat.jsonl:3: message 0: got role 'bot'",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            r"chat.jsonl:3: messages: no assistant message to learn from",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", '
            '"arguments": "x=1"}}]}]}',
            r"chat.jsonl:3: message 0: got arguments 'x=1'; must be an object, or its JSON text",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
            '"y", "thought": "z"}]}',
            r"chat.jsonl:3: message 1: got key 'thought', which would be lost; assistant "
            r"messages may have role, content, task",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            r"chat.jsonl:3: message 0: this assistant message would not follow",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
            '"x"}], "thinking_mode": "deep"}',
            r"chat.jsonl:3: thinking_mode: got 'deep'",
        ),
    ],
)
def test_broken_conversations_are_named_by_file_and_line(tmp_path, line, words):
    cfg = write(tmp_path / "chat.jsonl", [conversation(1)])
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(ValueError, match=words):
        train_batches(cfg, CHAT, **SIZES)


# ---- conversations of which nothing is learned ---------------------------------------------------


def asked_for(prompt, **answer):
    return {"messages": [says("user", prompt), says("assistant", "yes", **answer)]}


def rows_of(cfg, count, **sizes):
    """The rows of `count` training batches of one row each: (tokens, segments, mask)."""
    batches = itertools.islice(
        train_batches(cfg, CHAT, **(SIZES | sizes | {"batch_size": 1})), count
    )
    return [
        tuple(batch[name][0] for name in ("tokens", "segment_ids", "loss_mask"))
        for batch in batches
    ]


def is_predicted(row):
    tokens, segments, mask = row
    return ((segments[1:] == segments[:-1]) & (segments[1:] > 0) & (mask[1:] > 0)).any()


def unused(cfg, seq_lens, held_seq_len=96):
    return unused_lines(cfg, CHAT, seq_lens, held_seq_len, Listings())


def cut(path, records):
    cfg = write(path, records)
    return dataclasses.replace(cfg, chat=ChatFormat(too_long="cut"))


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_a_source_of_which_nothing_is_learned_is_refused_before_training(tmp_path, too_long):
    cfg = cut(tmp_path / "chat.jsonl", [asked_for(f"{i} long prompt" * 20) for i in range(20)])
    cfg = dataclasses.replace(cfg, chat=ChatFormat(too_long=too_long))
    for batches, purpose in ((train_batches, "to train on"), (held_out_batches, "to evaluate on")):
        with pytest.raises(
            ValueError,
            match=rf"no conversation of .*chat.jsonl is left {purpose}: \d+ (without|longer)",
        ) as caught:
            batches(cfg, CHAT, **SIZES)
        assert "\n" not in str(caught.value)


def test_a_held_out_part_of_which_nothing_is_learned_is_refused():
    cfg = DataConfig(
        source="x", format="chat", packing="best_fit", held_out=0.1, chat=ChatFormat(too_long="cut")
    )
    learned = np.array([0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1], np.uint8)  # of 5, 3 and 3 tokens
    store = TokenStore(
        np.zeros(11, np.int32), learned, np.array([5, 8, 11]), np.array([0.05, 0.5, 0.6]), ""
    )
    assert used_conversations(cfg, cfg.sources[0], store, 5, "held_out").tolist() == [
        True,
        False,
        False,
    ]
    for part, wanted in (("train", [False, True, True]), ("all", [False, True, True])):
        assert used_conversations(cfg, cfg.sources[0], store, 4, part).tolist() == wanted
    with pytest.raises(
        ValueError,
        match="of x is left to evaluate on: 1 without a token to learn once cut to seq_len=4; "
        "raise seq_len or held_out$",
    ):
        used_conversations(cfg, cfg.sources[0], store, 4, "held_out")


def test_advice_for_a_part_without_conversations_helps_that_part():
    """A larger held_out leaves less to train on; it changes nothing where evaluation takes all."""
    cfg = DataConfig(
        source="x", format="chat", packing="best_fit", held_out=0.1, chat=ChatFormat(too_long="cut")
    )
    tokens, ends = np.zeros(10, np.int32), np.array([5, 10])
    late = TokenStore(tokens, np.array([0, 0, 0, 0, 1] * 2, np.uint8), ends, np.array([0, 1.0]), "")
    none = late._replace(learned=np.zeros(10, np.uint8))
    for store, part, advice in (
        (late, "train", "raise seq_len, or lower held_out"),
        (late, "held_out", "raise seq_len or held_out"),
        (late, "all", "raise seq_len"),
        (none, "train", "see weight of messages and train_on"),
        (none, "all", "see weight of messages and train_on"),
    ):
        with pytest.raises(ValueError, match=f"; {advice}$"):
            used_conversations(cfg, cfg.sources[0], store, 4, part)


def test_a_single_conversation_to_learn_is_refused_with_its_source():
    cfg = DataConfig(source="some.jsonl", format="chat", packing="best_fit")
    ends = np.array([2, 4])
    store = TokenStore(np.zeros(4, np.int32), np.array([0, 1, 0, 0], np.uint8), ends, ends / 9, "")
    with pytest.raises(ValueError, match=r"^some.jsonl: source: has 1 document\(s\); at least 2"):
        used_conversations(cfg, cfg.sources[0], store, 4, "train")


def test_every_reason_is_counted_in_one_line(tmp_path):
    records = [asked_for(f"{i}") for i in range(8)]
    records += [asked_for(f"{i}", weight=0) for i in range(3)]
    records += [asked_for(f"{i}" * 200) for i in range(10, 15)]
    records += [
        {"messages": [says("user", f"{i}"), says("assistant", "so " * 50)]} for i in range(2)
    ]
    cfg = cut(tmp_path / "chat.jsonl", records)
    (line,) = unused(cfg, [96, 96])
    assert line == (
        f"source chat ({cfg.source}): 8 of 18 conversations are left out "
        "(3 without a token to learn (weight, train_on), "
        "5 without a token to learn once cut to seq_len=96), "
        "2 of 18 conversations are cut to seq_len=96"
    )
    dropping = dataclasses.replace(cfg, chat=ChatFormat(too_long="drop"))
    (line,) = unused(dropping, [96])
    assert "10 of 18" in line and "7 longer than seq_len=96" in line and "cut" not in line
    (line,) = unused(dataclasses.replace(cfg, held_out=0.5), [96, 4096])
    short, long = line.split("; ")
    assert "at seq_len=96, 8 of 18" in short and "at seq_len=4096, 3 of 18" in long
    assert unused(write(tmp_path / "chat.jsonl", records[:8]), [96]) == []


def test_train_on_last_leaves_out_what_has_no_last_answer(tmp_path):
    unanswered = {"messages": [*asked_for("a")["messages"], says("user", "b")]}
    cfg = write(tmp_path / "chat.jsonl", [unanswered, *(asked_for(f"{i}") for i in range(5))])
    assert unused(cfg, [96]) == []
    cfg = dataclasses.replace(cfg, chat=ChatFormat(train_on="last"))
    assert "1 of 6 conversations are left out (1 without a token" in unused(cfg, [96])[0]


def test_evaluation_sources_are_counted_too(tmp_path):
    cfg = write(tmp_path / "chat.jsonl", [asked_for(f"{i}") for i in range(8)])
    write(tmp_path / "other.jsonl", [asked_for("a", weight=0), asked_for("b")])
    other = Source(path=str(tmp_path / "other.jsonl"), format="chat", column="messages")
    cfg = dataclasses.replace(cfg, evaluate_on=(other,))
    (line,) = unused(cfg, [96])
    assert line.startswith(f"{other.title}: 1 of 2 conversations are left out")
    assert unused(cfg, [96], None) == []


def test_a_run_that_evaluates_nothing_reads_no_source_to_evaluate_on(tmp_path):
    cfg = write(tmp_path / "chat.jsonl", [asked_for(f"{i}") for i in range(8)])
    write(tmp_path / "other.jsonl", [asked_for("long " * 99)])
    other = Source(path=str(tmp_path / "other.jsonl"), format="chat", column="messages")
    cfg = dataclasses.replace(cfg, evaluate_on=(other,))
    with pytest.raises(ValueError, match="other.jsonl:1: this conversation has .* row holds 96"):
        unused(cfg, [96])
    assert unused(cfg, [96], None) == []


def test_the_split_does_not_depend_on_the_length_of_rows(tmp_path):
    cfg = cut(tmp_path / "chat.jsonl", [asked_for(f"{i} " * (1 + 9 * (i % 9))) for i in range(60)])
    sides = {}
    for seq_len in (48, 96, 512):
        store = open_store(cfg, cfg.sources[0], CHAT)
        parts = [
            used_conversations(cfg, cfg.sources[0], store, seq_len, part)
            for part in ("train", "held_out")
        ]
        for side, used in zip(("train", "held_out"), parts, strict=True):
            for place in used.nonzero()[0]:
                assert sides.setdefault(place, side) == side
    assert len(sides) == 60


@pytest.mark.parametrize("seed", range(2))
def test_no_row_is_without_a_token_to_learn(tmp_path, seed):
    """Then no batch is, with any number of rows: a step on it would only decay the weights."""
    rng = np.random.default_rng(seed)
    records = [
        asked_for(
            "u" * int(rng.integers(1, 60)) + f"{i}",
            weight=int(rng.random() < 0.5),
            reasoning_content="r" * int(rng.integers(0, 40)),
        )
        for i in range(60)
    ]
    cfg = cut(tmp_path / "chat.jsonl", records)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i % 10}" * (31 + 32 * (i % 3))}) + "\n" for i in range(20))
    )
    text = Source(
        path=str(tmp_path / "text.jsonl"), format="jsonl", weight=20.0
    )  # of 1 + 32 n tokens each
    cfg = dataclasses.replace(cfg, held_out=0.5)
    mixed = dataclasses.replace(cfg, mixture=(*cfg.sources, text))
    for data in (cfg, mixed):
        rows = rows_of(data, 150, seq_len=32)
        assert all(is_predicted(row) for row in rows)
        held = held_out_batches(data, CHAT, **(SIZES | {"seq_len": 32}))
        filled = [
            (t, s, m)
            for b in held
            for t, s, m in zip(b["tokens"], b["segment_ids"], b["loss_mask"], strict=True)
            if s.any()
        ]
        assert filled and all(is_predicted(row) for row in filled)


def run_of(data, tmp_path, **more):
    model = small_config(
        vocab_size=280,
        num_hidden_layers=2,
        compress_ratios=(0, 4, 0),
        num_hash_layers=1,
        hidden_size=32,
        moe_intermediate_size=16,
    )
    return TrainConfig(
        model=model,
        data=data,
        run_dir=str(tmp_path / "run"),
        steps=4,
        batch_size=4,
        seq_len=96,
        learning_rate=5e-3,
        warmup_steps=2,
        **more,
    )


def test_a_run_says_in_one_line_a_source_what_it_leaves_out(tmp_path, capsys):
    cfg = cut(
        tmp_path / "chat.jsonl", [*(asked_for(f"{i}") for i in range(8)), asked_for("u" * 99)]
    )
    stages = (Stage(after=1, batch_size=2), Stage(after=2, seq_len=48))
    say_unused(run_of(cfg, tmp_path, stages=stages), CHAT, Listings())
    (line,) = capsys.readouterr().err.splitlines()
    short, long = line.removeprefix(f"v4jax: {cfg.sources[0].title}: ").split("; ")
    assert short.startswith("at seq_len=48, 1 of 9 conversations are left out")
    assert long.startswith("at seq_len=96, 1 of 9 conversations are left out")


@pytest.mark.parametrize("stages", [(), (Stage(after=2, seq_len=16),)])
def test_a_run_without_a_token_to_learn_in_any_stage_leaves_nothing_behind(tmp_path, stages):
    prompt = "u" * (20 if stages else 99)
    cfg = run_of(
        cut(tmp_path / "chat.jsonl", [asked_for(f"{i}{prompt}") for i in range(8)]),
        tmp_path,
        stages=stages,
    )
    with pytest.raises(
        ValueError, match="is left to train on: . without a token to learn once cut to"
    ):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_without_a_token_to_predict_are_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    cfg = DataConfig(source=str(tmp_path / "text.jsonl"), format="jsonl")
    assert held_out_batches(cfg, ByteTokenizer(), 2, 1, vocab_size=280)
    stuck = [{"tokens": np.zeros(4, int), "tokens_segment_ids": np.arange(4)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v4jax.train.data.packed", lambda *_: stuck)
        with pytest.raises(ValueError, match="held_out: got no token to predict in 1 row"):
            held_out_batches(cfg, ByteTokenizer(), 4, 1, vocab_size=280)


def test_settings_that_do_not_fit_conversations_are_refused(cfg):
    with pytest.raises(
        ValueError, match="tokenizer: has no token <｜User｜>, which a conversation needs"
    ):
        train_batches(cfg, ByteTokenizer(), **SIZES)
    with pytest.raises(ValueError, match="packing: got 'split'; conversations must stay whole"):
        dataclasses.replace(cfg, packing="split")
    for change, words in (
        ({"thinking_mode": "x"}, "thinking_mode: got 'x'"),
        ({"reasoning_effort": "least"}, "reasoning_effort: got 'least'"),
        ({"reasoning_effort": "low", "release": "v4"}, "reasoning_effort: got 'low'"),
        ({"too_long": "x"}, "too_long: got 'x'"),
        ({"train_on": "some"}, "train_on: got 'some'"),
    ):
        with pytest.raises(ValueError, match=words):
            ChatFormat(**change)


# ---- loss and run --------------------------------------------------------------------------------


def test_loss_is_over_learned_tokens_only():
    cfg = small_config(
        vocab_size=40,
        num_hidden_layers=1,
        compress_ratios=(0, 0),
        num_hash_layers=0,
        hidden_size=32,
        moe_intermediate_size=16,
    )
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    rng = np.random.default_rng(0)
    tokens_BS, ids_BS = (
        rng.integers(0, 40, (2, 20)),
        np.repeat([[1] * 9 + [2] * 8 + [0] * 3], 2, axis=0),
    )
    mask_BS = rng.integers(0, 2, (2, 20))
    batch = {
        "tokens": jnp.asarray(tokens_BS),
        "segment_ids": jnp.asarray(ids_BS),
        "loss_mask": jnp.asarray(mask_BS),
    }
    _, metrics = v4jax.loss(cfg, params, batch)
    out = v4jax.forward(cfg, params, batch["tokens"], batch["segment_ids"])
    for name, logits, ahead in (("nll", out.logits, 1), ("mtp_nll", out.mtp_logits, 2)):
        log_p = np.asarray(jax.nn.log_softmax(logits))
        wanted = [
            -log_p[b, t, tokens_BS[b, t + ahead]]
            for b in range(2)
            for t in range(20 - ahead)
            if ids_BS[b, t] == ids_BS[b, t + ahead] > 0 and mask_BS[b, t + ahead]
        ]
        assert 5 < len(wanted) < 30
        assert float(metrics[name]) == pytest.approx(
            np.mean(wanted), rel=1e-5
        )  # float32 sums of 30 numbers
    everything, _ = v4jax.loss(cfg, params, batch | {"loss_mask": jnp.ones((2, 20), jnp.int32)})
    plain, _ = v4jax.loss(cfg, params, {name: batch[name] for name in ("tokens", "segment_ids")})
    assert float(everything) == pytest.approx(
        float(plain), rel=1e-6
    )  # two programs: the last bits of float32 sums are the compiler's


def test_unigram_loss_counts_learned_tokens():
    one = {
        "tokens": np.array([[0, 5, 6]]),
        "segment_ids": np.array([[1, 1, 1]]),
        "loss_mask": np.array([[0, 0, 1]]),
    }
    assert unigram_loss([one], [one], 10) == pytest.approx(-np.log(2 / 11))


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_learns_and_keeps_the_router_bias(cfg, tmp_path):
    model = small_config(
        vocab_size=280,
        num_hidden_layers=2,
        compress_ratios=(0, 4, 0),
        num_hash_layers=1,
        hidden_size=32,
        moe_intermediate_size=16,
    )
    params = jax.tree.map(
        lambda a: jnp.asarray(a * 0.1 if a.ndim >= 2 and a.shape[-1] != 2 else a),
        random_params(model),
    )
    v4jax.save_safetensors(model, params, tmp_path / "base", dtype="float32")
    run = TrainConfig(
        model=model,
        data=cfg,
        run_dir=str(tmp_path / "run"),
        init_from=str(tmp_path / "base"),
        steps=12,
        batch_size=4,
        seq_len=96,
        learning_rate=5e-3,
        warmup_steps=2,
        log_every=2,
        eval_every=6,
        eval_batches=2,
        checkpoint_every=12,
        remat=False,
        export="none",
    )
    summary = train(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["nll"] for line in lines if "nll" in line]
    assert losses[-1] < 0.8 * losses[0] and 0 < summary["held_out_nll"] < losses[0]
    _, trained = v4jax.load(tmp_path / "run")
    for before, after in zip(
        jax.tree.leaves(params["router"]), jax.tree.leaves(trained["router"]), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert (
        run.router_bias_rate == 0
        and dataclasses.replace(run, bias_rate=0.5).router_bias_rate == 0.5
    )
    assert dataclasses.replace(run, data=DataConfig()).router_bias_rate == 1e-3


def test_the_shipped_example_fits_its_configuration():
    from configs.sft_demo import get_config

    run = get_config()
    batch = next(
        train_batches(run.data, CHAT, run.seq_len, run.batch_size, vocab_size=run.model.vocab_size)
    )
    assert 0.3 < batch["loss_mask"].mean() < 0.6 and (batch["segment_ids"] > 0).mean() > 0.85
    assert re.search(f"{A}<think>.*</think>.*{E}", text_of(batch["tokens"][0]))
