"""Claims about conversations as training data: which tokens are learned, how rows are packed, what a run does with them."""

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
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.data.conversations import conversation_tokens
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_batches, train_batches, unigram_loss
from v4jax.train.loop import train

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
    """The learned stretches of a record, as text."""
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


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_learned_is_what_the_assistant_wrote():
    assert learned({"messages": TURNS}) == [f"A1{E}", f"r2</think>A2{E}"]
    assert learned({"messages": TURNS}, drop_thinking=False) == [f"r1</think>A1{E}", f"r2</think>A2{E}"]
    assert learned({"messages": TURNS}, thinking_mode="chat") == [f"A1{E}", f"A2{E}"]
    assert learned({"messages": TURNS}, train_on="last") == [f"r2</think>A2{E}"]


def test_calls_are_learned_and_results_are_not():
    messages = [says("user", "a"), says("assistant", "", reasoning_content="r", tool_calls=[LOOK]), says("tool", "seen"), says("assistant", "ok")]
    first, second = learned({"messages": messages, "tools": [TOOL]})
    assert first.startswith("r</think>\n\n<｜DSML｜tool_calls>\n") and first.endswith(f"</｜DSML｜tool_calls>{E}")
    assert second == f"</think>ok{E}"


def test_a_message_of_no_weight_is_not_learned():
    messages = [TURNS[1], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert learned({"messages": messages}, drop_thinking=False) == [f"r2</think>A2{E}"]


def test_the_answer_to_a_task_is_learned():
    assert learned({"messages": [says("user", "a", task="query"), says("assistant", "q")]}) == [f"q{E}"]


def test_a_record_has_its_own_mode_and_tools():
    record = {"messages": TURNS[1:3], "tools": [TOOL], "thinking_mode": "thinking", "reasoning_effort": "max"}
    ids, _ = conversation_tokens(record, "messages", ChatFormat(thinking_mode="chat"), CHAT)
    declared = [says("system", "", tools=[TOOL]), *TURNS[1:3]]
    assert text_of(ids) == encode_messages(declared, "thinking", reasoning_effort="max")


def test_tokens_are_those_of_the_whole_text(tmp_path):
    # Merges must not be hidden by encoding span by span: a tokenizer that merges, with the special tokens.
    from test_tokenizer import small_bpe

    from v4jax.tokenizer import BOS_TOKEN, EOS_TOKEN, load_tokenizer

    merging = load_tokenizer(small_bpe(tmp_path, specials=(BOS_TOKEN, EOS_TOKEN, *CHAT_TOKENS)))
    messages = [says("system", "ab"), says("user", "ab"), says("assistant", "abab", reasoning_content="ba"), says("user", "b")]
    ids, _ = conversation_tokens({"messages": messages}, "messages", ChatFormat(), merging)
    assert ids.tolist() == merging.encode(encode_messages(messages, "thinking"))
    assert 2 in ids


# ---- files and rows --------------------------------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(source=str(path), format="chat", column="messages", packing="best_fit", tokenizer="byte-chat", held_out=0.2)


def conversation(i):
    return {"messages": [says("user", f"{i}?" * (i % 5 + 1)), says("assistant", f"{i}!", reasoning_content="so " * (i % 7))]}


@pytest.fixture
def cfg(tmp_path):
    return write(tmp_path / "chat.jsonl", [conversation(i) for i in range(40)])


SIZES = dict(seq_len=96, batch_size=4, vocab_size=280)


def test_rows_hold_whole_conversations_with_their_masks(cfg):
    whole = {tuple(ids): marks for i in range(40) for ids, marks in [conversation_tokens(conversation(i), "messages", cfg.chat, CHAT)]
             for ids in [ids.tolist()]}  # fmt: skip
    seen = set()
    for batch in itertools.islice(train_batches(cfg, CHAT, **SIZES), 30):
        assert all(array.shape == (4, 96) and array.dtype == np.int32 for array in batch.values()) and len(batch) == 3
        for tokens, ids, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True):
            assert not mask[ids == 0].any()
            for segment in range(1, ids.max() + 1):
                found = tuple(tokens[ids == segment].tolist())
                assert (mask[ids == segment] == whole[found]).all()
                seen.add(found)
    held = sum((batch["tokens"][batch["segment_ids"] > 0] == 0).sum() for batch in held_out_batches(cfg, CHAT, **SIZES))
    assert len(seen) + held == 40 and held >= 1


@pytest.mark.parametrize(("too_long", "most"), [("drop", 13), ("cut", 14)])
def test_conversations_longer_than_a_row(tmp_path, too_long, most):
    cfg = write(tmp_path / "chat.jsonl", [{"messages": [says("user", "u" * i), says("assistant", "yes")]} for i in range(1, 30)])
    with pytest.raises(ValueError, match=r"conversation 28 of .*chat.jsonl \(counted from 0\) has 38 tokens, a row 22; raise seq_len"):
        train_batches(cfg, CHAT, 22, 2, vocab_size=280)
    cfg = dataclasses.replace(cfg, chat=ChatFormat(too_long=too_long))
    batches = itertools.islice(train_batches(cfg, CHAT, 22, 2, vocab_size=280), 40)
    sizes = {(ids == segment).sum() for batch in batches for ids in batch["segment_ids"] for segment in range(1, ids.max() + 1)}
    assert max(sizes) == 22 and (len(sizes) <= most)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"chat.jsonl:3: not JSON"),
        ("[1]", r"chat.jsonl:3: got list; must be a JSON object"),
        ('{"turns": []}', r"chat.jsonl:3: has no column 'messages'; there are: turns"),
        ('{"messages": "hi"}', r"chat.jsonl:3: messages: got str"),
        ('{"messages": [{"role": "bot", "content": ""}]}', r"chat.jsonl:3: message 0: got role 'bot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"chat.jsonl:3: messages: no assistant message to learn from"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]}',
         r"chat.jsonl:3: message 0: got arguments {'a': 1}; must be the JSON text of an object"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "thinking_mode": "deep"}', r"chat.jsonl:3: thinking_mode: got 'deep'"),
    ],
)  # fmt: skip
def test_broken_conversations_are_named_by_file_and_line(tmp_path, line, words):
    cfg = write(tmp_path / "chat.jsonl", [conversation(1)])
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(ValueError, match=words):
        train_batches(cfg, CHAT, **SIZES)


def test_settings_that_do_not_fit_conversations_are_refused(cfg):
    with pytest.raises(ValueError, match="tokenizer: has no token <｜User｜>, which a conversation needs"):
        train_batches(cfg, ByteTokenizer(), **SIZES)
    with pytest.raises(ValueError, match="packing: got 'split'; conversations must stay whole"):
        dataclasses.replace(cfg, packing="split")
    for change, words in (({"thinking_mode": "x"}, "thinking_mode: got 'x'"), ({"reasoning_effort": "low"}, "reasoning_effort: got 'low'"),
                          ({"too_long": "x"}, "too_long: got 'x'"), ({"train_on": "some"}, "train_on: got 'some'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ChatFormat(**change)


# ---- loss and run ----------------------------------------------------------------------------------------------------


def test_loss_is_over_learned_tokens_only():
    cfg = small_config(vocab_size=40, num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1, hidden_size=32, moe_intermediate_size=16)
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    rng = np.random.default_rng(0)
    tokens_BS, ids_BS = rng.integers(0, 40, (2, 20)), np.repeat([[1] * 9 + [2] * 8 + [0] * 3], 2, axis=0)
    mask_BS = rng.integers(0, 2, (2, 20))
    batch = {"tokens": jnp.asarray(tokens_BS), "segment_ids": jnp.asarray(ids_BS), "loss_mask": jnp.asarray(mask_BS)}
    _, metrics = v4jax.loss(cfg, params, batch)
    out = v4jax.forward(cfg, params, batch["tokens"], batch["segment_ids"])
    for name, logits, ahead in (("nll", out.logits, 1), ("mtp_nll", out.mtp_logits, 2)):
        log_p = np.asarray(jax.nn.log_softmax(logits))
        wanted = [-log_p[b, t, tokens_BS[b, t + ahead]] for b in range(2) for t in range(20 - ahead)
                  if ids_BS[b, t] == ids_BS[b, t + ahead] > 0 and mask_BS[b, t + ahead]]  # fmt: skip
        assert 5 < len(wanted) < 30
        assert float(metrics[name]) == pytest.approx(np.mean(wanted), rel=1e-5)  # float32 sums of 30 numbers
    everything, _ = v4jax.loss(cfg, params, batch | {"loss_mask": jnp.ones((2, 20), jnp.int32)})
    plain, _ = v4jax.loss(cfg, params, {name: batch[name] for name in ("tokens", "segment_ids")})
    assert float(everything) == pytest.approx(float(plain), rel=1e-6)  # two programs: the last bits of float32 sums are the compiler's


def test_unigram_loss_counts_learned_tokens():
    one = {"tokens": np.array([[0, 5, 6]]), "segment_ids": np.array([[1, 1, 1]]), "loss_mask": np.array([[0, 0, 1]])}
    assert unigram_loss([one], [one], 10) == pytest.approx(-np.log(2 / 11))


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_learns_and_keeps_the_router_bias(cfg, tmp_path):
    model = small_config(vocab_size=280, num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1, hidden_size=32, moe_intermediate_size=16)
    params = jax.tree.map(lambda a: jnp.asarray(a * 0.1 if a.ndim >= 2 and a.shape[-1] != 2 else a), random_params(model))
    v4jax.save_safetensors(model, params, tmp_path / "base", dtype="float32")
    run = TrainConfig(
        model=model, data=cfg, run_dir=str(tmp_path / "run"), init_from=str(tmp_path / "base"), steps=12, batch_size=4, seq_len=96,
        learning_rate=5e-3, warmup_steps=2, log_every=2, eval_every=6, eval_batches=2, checkpoint_every=12, remat=False, export="none",
    )  # fmt: skip
    summary = train(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["nll"] for line in lines if "nll" in line]
    assert losses[-1] < 0.8 * losses[0] and 0 < summary["held_out_nll"] < losses[0]
    _, trained = v4jax.load(tmp_path / "run")
    for before, after in zip(jax.tree.leaves(params["router"]), jax.tree.leaves(trained["router"]), strict=True):
        np.testing.assert_array_equal(before, after)
    assert run.router_bias_rate == 0 and dataclasses.replace(run, bias_rate=0.5).router_bias_rate == 0.5
    assert dataclasses.replace(run, data=DataConfig()).router_bias_rate == 1e-3


def test_the_shipped_example_fits_its_configuration():
    from configs.sft_demo import get_config

    run = get_config()
    batch = next(train_batches(run.data, CHAT, run.seq_len, run.batch_size, vocab_size=run.model.vocab_size))
    assert 0.3 < batch["loss_mask"].mean() < 0.6 and (batch["segment_ids"] > 0).mean() > 0.85
    assert re.search(f"{A}<think>.*</think>.*{E}", text_of(batch["tokens"][0]))
