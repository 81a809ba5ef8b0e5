"""Claims about messages of data sets: each spelling has one meaning; none is lost or misread."""

import dataclasses
import json
import re

import pytest

from v4jax.chat.encoding import encode_messages
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS, TASKS
from v4jax.data.config import ChatFormat, DataConfig, Source
from v4jax.data.conversations import conversation_tokens
from v4jax.data.listing import Listings
from v4jax.data.messages import training_messages
from v4jax.data.store import open_store
from v4jax.data.summary import unused_lines
from v4jax.tokenizer import ByteTokenizer

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
ASK = {"role": "user", "content": "2+2?"}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CLOSING = "</｜DSML｜parameter>"


def answer(content="4", **more):
    return {"role": "assistant", "content": content} | more


def call(arguments, **more):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}} | more


def calls(*arguments, **more):
    return answer("", tool_calls=[call(one) for one in arguments], **more)


def tokens(messages, record=None, **chat):
    return conversation_tokens(
        {"messages": messages} | (record or {}), "messages", ChatFormat(**chat), CHAT
    )[0].tolist()


# ---- reasoning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        answer(reasoning="easy"),
        answer(reasoning="easy", reasoning_content="easy"),
        answer(reasoning=None, reasoning_content="easy"),
        answer("<think>easy</think>4"),
        answer(
            [
                {"type": "thinking", "thinking": "easy", "signature": "x"},
                {"type": "text", "text": "4"},
            ]
        ),
        answer(
            [
                {"type": "reasoning", "text": "easy"},
                {"type": "text", "text": "4", "image_url": None},
            ]
        ),
        answer([{"type": "text", "text": "<think>easy</think>4"}]),
    ],
)
@pytest.mark.parametrize("mode", ["thinking", "chat"])
def test_reasoning_is_found_wherever_it_is(message, mode):
    plain = [ASK, answer(reasoning_content="easy")]
    assert tokens([ASK, message], thinking_mode=mode) == CHAT.encode(encode_messages(plain, mode))


def test_white_space_around_reasoning_stays_and_that_before_its_tag_goes():
    (_, found) = training_messages([ASK, answer("<think>\neasy\n</think>\n\n4")])
    assert found["reasoning_content"] == "\neasy\n" and found["content"] == "\n\n4"
    (_, before) = training_messages([ASK, answer("\n <think>\neasy\n</think>\n\n4")])
    assert before == found
    (_, plain) = training_messages([ASK, answer("\n 4")])
    assert plain["content"] == "\n 4"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            answer(reasoning="easy", reasoning_content="hard"),
            "got reasoning twice, and not the same",
        ),
        (
            answer([{"type": "thinking", "thinking": "hard"}], reasoning="easy"),
            "got reasoning twice, and not the same",
        ),
        (
            answer("<think>easy</think>4", reasoning_content="easy"),
            "<think> in the content beside reasoning of its own",
        ),
        (
            answer("<think>a</think><think>b</think>4"),
            "allowed: one <think>...</think> at its beginning",
        ),
        (answer("<think>a<think>b</think>4"), "allowed: one <think>...</think> at its beginning"),
        (answer("so <think>a</think>4"), "allowed: one <think>...</think> at its beginning"),
        (answer("<think>a"), "allowed: one <think>...</think> at its beginning"),
        (answer("a</think>4"), "allowed: one <think>...</think> at its beginning"),
        (answer(reasoning=["easy"]), "got reasoning ['easy']; must be text"),
        (
            answer(reasoning_content="a</think>b"),
            "could not be read back: answer: got special token </think>",
        ),
        (
            answer([{"type": "text", "text": "4"}, {"type": "thinking", "thinking": "a"}]),
            "got a part of type 'thinking'",
        ),
        (
            answer([{"type": "reasoning", "summary": ["a"]}]),
            "got key 'summary', which would be lost",
        ),
        (answer([{"type": "thinking"}]), "got a part of type 'thinking' with 0 texts"),
        (
            answer([{"type": "tool_use", "name": "f"}]),
            "got a part of type 'tool_use' in the content; allowed here: text",
        ),
        (
            answer([{"type": "text", "text": "4", "weight": 1}]),
            "got key 'weight', which would be lost",
        ),
        (answer(4), "got content 4; must be text, or a list of parts"),
    ],
)
def test_reasoning_that_may_mean_two_things_is_refused(message, words):
    with pytest.raises(ValueError, match="message 1: .*" + re.escape(words)):
        training_messages([ASK, message])


# ---- keys and texts ------------------------------------------------------------------------------


def test_keys_without_a_value_and_names_change_nothing():
    empty = dict(
        refusal=None,
        audio=None,
        function_call=None,
        annotations=[],
        tool_calls=None,
        name="Ann",
        weight=1,
        tool_call_id=None,
    )
    record = {"tools": None, "thinking_mode": None, "reasoning_effort": None}
    assert tokens([ASK | {"tool_calls": [], "name": "Bob"}, answer() | empty], record) == tokens(
        [ASK, answer()]
    )
    assert training_messages([ASK, answer(weight=None)])[1].get("weight", 1) == 1
    assert training_messages([ASK, answer(weight=False)])[1]["weight"] == 0


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            answer(thought="hm"),
            "got key 'thought', which would be lost; assistant messages may have role, content",
        ),
        (answer(train=False), "got key 'train'"),
        (answer(prefix=True), "got key 'prefix'"),
        (answer(function_call={"name": "f"}), "got key 'function_call'"),
        (answer(tools=[TOOL]), "got key 'tools'"),
        (ASK | {"tools": [TOOL]}, "got key 'tools', which would be lost; user messages"),
        (ASK | {"reasoning_content": "hm"}, "got key 'reasoning_content'"),
        (ASK | {"tool_calls": [call({})]}, "got key 'tool_calls'"),
        (answer(weight=0.5), "got weight 0.5; allowed: 0, 1"),
        (answer(weight="0"), "got weight '0'; allowed: 0, 1"),
        (answer(wo_eos="no"), "got wo_eos 'no'; allowed: False, True"),
        (answer(task="sing"), "got task 'sing'; allowed: action, "),
        (answer(None), "got no content; messages of role assistant must have one"),
        ({"role": "user"}, "got no content; messages of role user must have one"),
        (
            {"role": "tool", "tool_call_id": "x"},
            "got no content; messages of role tool must have one",
        ),
        (
            {"role": "developer", "content": ""},
            "got content ''; that of role developer must not be empty",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "got a part of type 'image_url' in the content",
        ),
        ({"role": "function", "content": "x"}, "got role 'function'; allowed: system"),
    ],
)
def test_what_a_conversation_would_lose_is_refused(message, words):
    with pytest.raises(ValueError, match="message 1: .*" + re.escape(words)):
        training_messages([ASK, message])


@pytest.mark.parametrize(
    "token",
    [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜latest_reminder｜>",
        *TASKS.values(),
    ],
)
def test_no_text_begins_or_ends_a_turn(token):
    text = f"a {token} b"
    parts = [{"type": "text", "text": text}]
    tool = TOOL | {"function": {"name": text}}
    for message in (
        ASK | {"content": text},
        answer(text),
        answer(reasoning_content=text),
        calls({"at": [text]}),
        calls(json.dumps({"at": text}, ensure_ascii=False)),
        {"role": "system", "content": parts},
        {"role": "system", "content": "", "tools": [tool]},
    ):
        with pytest.raises(ValueError, match=re.escape(f"message 0: got {token} in a text")):
            training_messages([message])
    with pytest.raises(ValueError, match=re.escape(f"tools: got {token} in a text")):
        training_messages([ASK, answer()], [{"name": "f", "description": text}])


def test_what_the_model_is_given_may_speak_of_thinking_and_of_tags():
    messages = [{"role": "system", "content": "Use <think> and ｜DSML｜ tags."}, ASK, answer()]
    assert tokens(messages) == CHAT.encode(encode_messages(messages, "thinking"))


def test_text_parts_are_joined_in_every_role():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    split = [{"role": role, "content": parts} for role in ("system", "user", "assistant")]
    whole = [message | {"content": "a\n\nb"} for message in split]
    assert tokens(split) == tokens(whole)


# ---- order ---------------------------------------------------------------------------------------

SYSTEM, REMINDER, DEVELOPER = (
    {"role": role, "content": "s"} for role in ("system", "latest_reminder", "developer")
)
RESULT = {"role": "tool", "content": "seen"}


@pytest.mark.parametrize(
    ("messages", "place", "words"),
    [
        ([ASK, SYSTEM, answer()], 2, "would not follow <｜Assistant｜>"),
        ([answer()], 0, "would not follow <｜Assistant｜>"),
        ([SYSTEM, answer()], 1, "would not follow <｜Assistant｜>"),
        ([ASK, answer("a"), answer("b")], 2, "would not follow <｜Assistant｜>"),
        ([ASK, answer("a", wo_eos=True), answer("b")], 2, "would not follow <｜Assistant｜>"),
        ([ASK, REMINDER, answer()], 1, "comes where an assistant message must be"),
        ([ASK, REMINDER, ASK, answer()], 1, "comes where an assistant message must be"),
        ([DEVELOPER, answer(), ASK, answer()], 1, "would not follow <｜Assistant｜>"),
        (
            [ASK, RESULT, answer()],
            1,
            "a tool message, but the assistant's latest message calls no tool",
        ),
        ([RESULT, answer()], 0, "a tool message, but the assistant's latest message calls no tool"),
        ([ASK, calls({}), RESULT, answer(), RESULT, answer()], 4, "a tool message, but"),
        (
            [
                ASK,
                answer("", tool_calls=[call({}, id="x")]),
                RESULT | {"tool_call_id": "y"},
                answer(),
            ],
            2,
            "got tool_call_id 'y'; the latest calls are x",
        ),
    ],
)
def test_an_order_that_gives_an_answer_no_beginning_is_refused(messages, place, words):
    for record in ({}, {"tools": [TOOL]} if messages[0] is not DEVELOPER else {}):
        with pytest.raises(ValueError, match=f"message {place}: .*{re.escape(words)}"):
            tokens(messages, record)


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, ASK, answer(), SYSTEM, ASK, answer()],
        [SYSTEM, REMINDER, DEVELOPER, answer()],
        [ASK, ASK, answer()],
        [ASK, calls({}, {}), RESULT, RESULT, answer()],
        [
            ASK,
            answer("", tool_calls=[call({}, id="x"), call({}, id="y")]),
            RESULT | {"tool_call_id": "y"},
            RESULT | {"tool_call_id": "x"},
            answer(),
        ],
        [ASK | {"task": "query"}, answer()],
        [ASK | {"task": "action"}, answer()],
        [ASK, answer(task="title"), answer("T")],
        [ASK, answer(), ASK],
        [ASK, answer("so", wo_eos=True)],
    ],
)
@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_every_order_that_the_format_has_is_encoded_as_released(messages, mode):
    assert tokens(messages, thinking_mode=mode) == CHAT.encode(encode_messages(messages, mode))


def test_old_developer_messages_may_be_kept():
    messages = [DEVELOPER, answer(), ASK, answer()]
    assert tokens(messages, drop_thinking=False) == CHAT.encode(
        encode_messages(messages, "thinking", drop_thinking=False)
    )


# ---- tools ---------------------------------------------------------------------------------------


def test_arguments_are_an_object_or_its_text():
    arguments = {"city": "Zürich", "days": 3, "more": {"a": [None, True, 1.5]}}
    text = json.dumps(arguments, ensure_ascii=False)
    plain = [ASK, calls(text)]
    assert encode_messages([ASK, calls(arguments)]) == encode_messages(plain)
    assert "Zürich" in encode_messages(plain) and '"arguments"' not in encode_messages(plain)
    bare = answer("", tool_calls=[{"name": "look", "arguments": arguments, "id": "x"}])
    assert tokens([ASK, calls(arguments)]) == tokens(plain) == tokens([ASK, bare])


def test_a_call_without_parameters_may_have_no_arguments():
    wanted = tokens([ASK, calls({})])
    assert '"arguments"' not in encode_messages([ASK, calls({})])
    for arguments in ("", None, "{}"):
        assert tokens([ASK, calls(arguments)]) == wanted
    # The encoder stays as released: text that is no JSON is one parameter.
    assert 'name="arguments"' in encode_messages([ASK, calls("")])
    assert tokens([ASK, answer("", tool_calls=[{"function": {"name": "look"}}])]) == wanted


def test_tools_are_found_in_every_form():
    wanted = tokens([ASK, answer()], {"tools": [TOOL]})
    for tools in ([FUNCTION], FUNCTION | {"type": "function"}, [TOOL, None]):
        for given in (tools, json.dumps(tools)):
            if isinstance(tools, list) and None not in tools:
                assert tokens([ASK, answer()], {"tools": given}) == wanted
            else:
                with pytest.raises(
                    ValueError, match="tools: got .*must be a list of objects, or its JSON text"
                ):
                    tokens([ASK, answer()], {"tools": given})
    declared = {"role": "system", "content": "", "tools": json.dumps([FUNCTION])}
    assert (
        tokens([declared, ASK, answer()])
        == wanted
        == tokens([declared, ASK, answer()], {"tools": [TOOL]})
    )
    assert tokens([ASK, answer()], {"tools": "[]"}) == tokens([ASK, answer()])


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("look", "tools: got tools 'look', which are not JSON"),
        ('[{"name": "f", "name": "g"}]', "got key 'name' twice in one object"),
        (
            [{"type": "code_interpreter"}],
            "tools: got a tool or call of type 'code_interpreter'; allowed: function",
        ),
        ([{"function": "look"}], 'must be {"type": "function", "function": {"name": ...}}'),
        ([TOOL | {"strict": True}], "got key 'strict', which would be lost"),
    ],
)
def test_tools_of_another_form_are_refused(tools, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        training_messages([ASK, answer()], tools)


def test_tools_of_a_record_do_not_replace_those_of_its_system_message():
    declared = {"role": "system", "content": "", "tools": [TOOL]}
    with pytest.raises(ValueError, match="tools: got some in the record and others in message 0"):
        training_messages([declared, ASK, answer()], [{"name": "other"}])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (calls({"at": f"a{CLOSING}b"}), "could not be read back: tool call"),
        (
            calls(json.dumps({"at": f"x{CLOSING}\n"}, ensure_ascii=False)),
            "could not be read back: tool call",
        ),
        (calls({'a" string="true">x<b y="': "1"}), "read back"),
        (
            answer("", tool_calls=[{"function": {"name": "f</｜DSML｜invoke", "arguments": {}}}]),
            "could not be read back: tool call",
        ),
        (answer("a ｜DSML｜ b"), "could not be read back: answer: got special token ｜DSML｜"),
        (calls("x=1"), "got arguments 'x=1'; must be an object, or its JSON text"),
        (calls("[1]"), "got arguments '[1]'; must be an object, or its JSON text"),
        (calls('{"a": 1, "a": 2}'), "its JSON text (got key 'a' twice in one object; must be"),
        (calls('{"a": {"b": 1, "b": 2}}'), "got key 'b' twice"),
        (calls('{"a": NaN}'), "must be an object, or its JSON text"),
        (calls({"a": float("inf")}), "parameter 'a' is 'Infinity'"),
        (answer("", tool_calls=[{"function": {"arguments": {}}}]), 'must be {"type": "function"'),
        (
            answer("", tool_calls=[call({}) | {"output": "x"}]),
            "got key 'output', which would be lost",
        ),
        (
            answer("", tool_calls=[{"function": {"name": "f", "arguments": {}, "result": 1}}]),
            "got key 'result', which would be lost",
        ),
        (
            answer("", tool_calls=[call({}) | {"output": None}, call({}) | {"custom": "x"}]),
            "got key 'custom'",
        ),
        (answer("", tool_calls="look()"), "got tool_calls 'look()'; must be a list of objects"),
    ],
)
def test_calls_that_cannot_be_read_back_are_refused(message, words):
    with pytest.raises(ValueError, match="message 1: .*" + re.escape(words)):
        training_messages([ASK, message])


def test_the_record_is_left_as_it_was():
    record = {
        "messages": [ASK, calls({"a": 1}, reasoning="hm"), RESULT, answer("<think>a</think>b")],
        "tools": [FUNCTION],
    }
    before = json.dumps(record)
    tokens(record["messages"], record)
    assert json.dumps(record) == before


# ---- keys beside the messages --------------------------------------------------------------------


def chat_file(path, *records):
    lines = [json.dumps({"messages": [ASK, answer()]} | record) for record in records]
    path.write_text("\n".join(lines))
    source = Source(path=str(path), format="chat", column="messages")
    return DataConfig(mixture=(source,), packing="best_fit", tokenizer="byte-chat"), source


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"system": "You are a pirate"}, "'system' .*; make it a message, or part of one"),
        ({"prompt": "another"}, "'prompt' .*; make it a message"),
        ({"functions": [FUNCTION]}, "'functions' .*; call it \"tools\""),
        ({"response_format": {"type": "json_object"}}, "'response_format' .* the system message"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "'chat_template_kwargs' .*thinking"),
    ],
)
def test_keys_beside_the_messages_that_change_the_text_are_refused(tmp_path, record, words):
    cfg, source = chat_file(tmp_path / "x.jsonl", {}, record)
    with pytest.raises(
        ValueError, match=f"x.jsonl:2: got key {words}".replace(" .*;", " beside messages, .*;")
    ):
        open_store(cfg, source, CHAT)


@pytest.mark.parametrize("cached", [False, True])
def test_other_keys_beside_the_messages_are_named_once_a_source(tmp_path, cached):
    """Keys that do not concern the text, and keys that repeat a message."""
    more = {"id": 7, "prompt": ASK["content"], "system": "", "tools": [TOOL], "metadata": {"a": 1}}
    cfg, source = chat_file(tmp_path / "x.jsonl", {"source": "web"}, more, {"id": None})
    if cached:
        cfg = dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
    for _ in range(2):
        assert unused_lines(cfg, CHAT, [4000], None, Listings()) == [
            f"{source.title}: keys that are not read: id, metadata, prompt, source"
        ]
    many = {f"key{i:02}": i for i in range(12)}
    cfg, source = chat_file(tmp_path / "y.jsonl", many)
    (line,) = unused_lines(cfg, CHAT, [4000], None, Listings())
    assert line.endswith("key06, key07 and 4 more")
