"""Claims about v4jax/chat: a conversation's text to the letter, and answers read back from it."""

import json
import random
import re

import pytest

from v4jax.chat import tokens
from v4jax.chat.encoding import encode_messages, encode_spans
from v4jax.chat.parse import parse_message

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Météo", "parameters": {"type": "object"}},
}


def says(role, content="", **more):
    return {"role": role, "content": content} | more


def call(name, arguments, **more):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"type": "function", "function": {"name": name, "arguments": text}} | more


def block(*invokes):
    return "<｜DSML｜tool_calls>\n" + "\n".join(invokes) + "\n</｜DSML｜tool_calls>"


def invoke(name, *lines):
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(lines) + "\n</｜DSML｜invoke>"


def parameter(name, value, string="true"):
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


TWO_TURNS = [
    says("system", "Be brief."),
    says("user", "Hi"),
    says("assistant", "Hello.", reasoning_content="A greeting."),
    says("user", "2+2?"),
    says("assistant", "4", reasoning_content="Easy."),
]


# ---- turns and thinking --------------------------------------------------------------------------


def test_chat_closes_thinking_before_it_begins():
    assert (
        encode_messages(TWO_TURNS) == f"{B}Be brief.{U}Hi{A}</think>Hello.{E}{U}2+2?{A}</think>4{E}"
    )
    assert encode_messages(TWO_TURNS[:2]) == f"{B}Be brief.{U}Hi{A}</think>"


def test_thinking_keeps_the_reasoning_of_the_current_turn_only():
    assert encode_messages(TWO_TURNS, "thinking") == (
        f"{B}Be brief.{U}Hi{A}</think>Hello.{E}{U}2+2?{A}<think>Easy.</think>4{E}"
    )
    assert encode_messages(TWO_TURNS[:4], "thinking").endswith(f"Hello.{E}{U}2+2?{A}<think>")
    assert encode_messages(TWO_TURNS, "thinking", drop_thinking=False) == (
        f"{B}Be brief.{U}Hi{A}<think>A greeting.</think>Hello.{E}{U}2+2?{A}<think>Easy.</think>4{E}"
    )


def test_an_answer_without_reasoning_thinks_nothing():
    assert (
        encode_messages([says("user", "a"), says("assistant", None)], "thinking")
        == f"{B}{U}a{A}<think></think>{E}"
    )


def test_tools_keep_all_reasoning():
    messages = [says("system", "S", tools=[WEATHER]), *TWO_TURNS[1:]]
    text = encode_messages(messages, "thinking")
    assert "<think>A greeting.</think>" in text and "<think>Easy.</think>" in text


@pytest.mark.parametrize(
    ("release", "effort", "begin"),
    [
        ("v4", None, U),
        ("v4", "high", U),
        ("v4", "max", "Reasoning Effort: Absolute maximum with no"),
        ("0731", "low", U),
        ("0731", "high", "Reasoning Effort: Absolute maximum with no"),
        ("0731", "max", "Reasoning Effort: Beyond maximum — exhaustive"),
    ],
)
def test_effort_stands_before_the_first_message_when_thinking(release, effort, begin):
    ask = dict(reasoning_effort=effort, release=release)
    text = encode_messages([says("user", "a")], "thinking", **ask)
    assert text.startswith(B + begin) and text.endswith(f"{U}a{A}<think>")
    if begin != U:
        assert f"\n\n{U}a" in text
    assert encode_messages([says("user", "a")], "chat", **ask) == f"{B}{U}a{A}</think>"


def test_an_answer_to_go_on_with_has_no_end():
    assert (
        encode_messages([says("user", "a"), says("assistant", "so", wo_eos=True)])
        == f"{B}{U}a{A}</think>so"
    )


def test_user_messages_in_a_row_are_one_turn():
    assert encode_messages([says("user", "a"), says("user", "b")]) == f"{B}{U}a\n\nb{A}</think>"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([says("user", parts)]) == f"{B}{U}a\n\nb{A}</think>"


def test_bos_can_be_left_out():
    assert encode_messages([says("user", "a")], add_default_bos_token=False) == f"{U}a{A}</think>"


# ---- tools ---------------------------------------------------------------------------------------


def test_tool_prompt_to_the_letter():
    text = encode_messages([says("system", "S", tools=[WEATHER, WEATHER]), says("user", "a")])
    schema = '{"name": "weather", "description": "Météo", "parameters": {"type": "object"}}'
    begin = (
        f"{B}S\n\n## Tools\n\nYou have access to a set of tools to help answer the user's "
        f"question. "
    )
    assert text.startswith(
        begin
        + 'You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:\n\n'
        "<｜DSML｜tool_calls>\n"
    )
    assert (
        f"### Available Tool Schemas\n\n{schema}\n{schema}\n\nYou MUST strictly follow the above"
        in text
    )
    assert text.endswith(f"parameter schemas to invoke tool calls.\n{U}a{A}</think>")
    example = invoke(
        "$TOOL_NAME", parameter("$PARAMETER_NAME", "$PARAMETER_VALUE", "true|false"), "..."
    )
    assert example + "\n" + invoke("$TOOL_NAME2", "...") in text
    assert (
        "(triggered by <think>), you MUST output your complete reasoning inside "
        "<think>...</think> BEFORE any" in text
    )


def test_calls_in_parallel_and_their_results_in_order():
    calls = [
        call("weather", {"city": "Paris", "days": 3, "units": ["C"], "wind": None}, id="x"),
        call("now", {}, id="y"),
    ]
    messages = [
        says("user", "a"),
        says("assistant", "Let me see.", reasoning_content="Two calls.", tool_calls=calls),
        says("tool", "noon", tool_call_id="y"),
        says("tool", [{"type": "text", "text": "rain"}, {"type": "image"}], tool_call_id="x"),
        says("user", "quick!"),
    ]
    lines = [
        parameter("city", "Paris"),
        parameter("days", "3", "false"),
        parameter("units", '["C"]', "false"),
        parameter("wind", "null", "false"),
    ]
    assert encode_messages(messages, "thinking", drop_thinking=False) == (
        f"{B}{U}a{A}<think>Two calls.</think>Let me see.\n\n"
        f"{block(invoke('weather', *lines), invoke('now', ''))}{E}"
        f"{U}<tool_result>rain\n\n[Unsupported image]</tool_result>\n\n"
        f"<tool_result>noon</tool_result>\n\nquick!{A}<think>"
    )


def test_arguments_that_are_no_json_are_one_parameter():
    text = encode_messages([says("user", "a"), says("assistant", tool_calls=[call("f", "x=1")])])
    assert text == f"{B}{U}a{A}</think>\n\n{block(invoke('f', parameter('arguments', 'x=1')))}{E}"


def test_arguments_may_be_the_object_that_their_text_stands_for():
    arguments = {"city": "é", "days": 3, "more": {"a": [None, 1.5]}}
    given, text = (
        {"function": {"name": "f", "arguments": value}}
        for value in (arguments, json.dumps(arguments))
    )
    found = [
        encode_messages([says("user", "a"), says("assistant", tool_calls=[one])])
        for one in (given, text)
    ]
    assert found[0] == found[1] and parameter("city", "é") in found[0]
    empty = [
        says("user", "a"),
        says("assistant", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
    ]
    assert block(invoke("f", "")) in encode_messages(empty)


# ---- search, tasks, developer --------------------------------------------------------------------


def test_search_with_a_developer_and_a_reminder():
    messages = [
        says("system", "S"),
        says("latest_reminder", "2026-02-21"),
        says("developer", "Find it.", tools=[WEATHER], response_format={"type": "json_object"}),
        says("assistant", tool_calls=[call("weather", {"city": "é"})], reasoning_content="Look."),
        says("tool", "[0]"),
        says("assistant", "Done.", reasoning_content="Found."),
    ]
    text = encode_messages(messages, "thinking")
    assert text.startswith(f"{B}S<｜latest_reminder｜>2026-02-21{U}Find it.\n\n## Tools\n\n")
    assert text.endswith(
        "invoke tool calls.\n\n\n## Response Format:\n\nYou MUST strictly adhere to the "
        "following schema to reply:\n"
        f'{{"type": "json_object"}}{A}<think>Look.</think>\n\n'
        f"{block(invoke('weather', parameter('city', 'é')))}{E}"
        f"{U}<tool_result>[0]</tool_result>{A}<think>Found.</think>Done.{E}"
    )


def test_old_developer_messages_go_with_the_reasoning():
    messages = [
        says("developer", "x"),
        says("assistant", "1", reasoning_content="r"),
        says("user", "y"),
    ]
    assert encode_messages(messages, "thinking") == f"{B}1{E}{U}y{A}<think>"
    assert encode_messages(messages, "chat") == f"{B}{U}x{A}</think>1{E}{U}y{A}</think>"


@pytest.mark.parametrize(("mode", "think"), [("chat", "</think>"), ("thinking", "<think>")])
def test_quick_instructions(mode, think):
    assert (
        encode_messages([says("user", "a", task="action")], mode)
        == f"{B}{U}a{A}{think}<｜action｜>"
    )
    for task in ("query", "authority", "domain", "read_url"):
        asked = [
            says("user", "a", task=task),
            says("assistant", "b", reasoning_content="not shown"),
        ]
        assert encode_messages(asked, mode) == f"{B}{U}a<｜{task}｜>b{E}"
    titled = [says("user", "a"), says("assistant", "b", task="title"), says("assistant", "T")]
    end = think.replace("<t", "</t") if mode == "thinking" else ""
    assert encode_messages(titled, mode) == f"{B}{U}a{A}{think}{end}b{E}<｜title｜>T{E}"


def test_a_text_does_not_join_a_turn_with_a_task():
    assert (
        encode_messages([says("user", "a", task="query"), says("user", "b")])
        == f"{B}{U}a{U}b{A}</think>"
    )


# ---- context -------------------------------------------------------------------------------------


def test_what_follows_a_context_is_encoded_alone():
    assert encode_messages(TWO_TURNS[3:], context=TWO_TURNS[:3]) == f"{U}2+2?{A}</think>4{E}"
    calls = [call("f", {}, id="x"), call("f", {}, id="y")]
    results = [says("tool", "2", tool_call_id="y"), says("tool", "1", tool_call_id="x")]
    text = encode_messages(
        results, context=[says("user", "a"), says("assistant", tool_calls=calls)]
    )
    assert text == f"{U}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>{A}</think>"


def test_a_conversation_is_its_context_and_what_follows():
    for seed in range(200):
        rng = random.Random(seed)
        messages = conversation(rng)
        cut = rng.choice([i for i, m in enumerate(messages) if m["role"] == "assistant"]) + 1
        for mode in ("chat", "thinking"):
            kept = dict(thinking_mode=mode, drop_thinking=False)
            parts = (
                encode_messages(messages[:cut], **kept),
                encode_messages(messages[cut:], context=messages[:cut], **kept),
            )
            assert "".join(parts) == encode_messages(messages, **kept)


# ---- there and back ------------------------------------------------------------------------------


def conversation(rng: random.Random) -> list[dict]:
    """System, then user turns answered once or several times with tools in between."""

    def word():
        return rng.choice(["", "yes", " é🐋\n", "a\n\nb", '{"a": 1}', "<b>", "深度 %s {x}"])

    def value():
        return rng.choice([word(), 3, -1.5e-7, True, None, [1, "é"], {"k": {"n": []}}])

    messages = [says("system", word())]
    for _ in range(rng.randint(1, 3)):
        messages.append(says("user", word()))
        for _ in range(rng.randint(0, 2)):
            names = range(rng.randint(1, 3))
            calls = [
                call(
                    f"tool {i}",
                    {rng.choice("abc") + word(): value() for _ in range(rng.randint(0, 3))},
                    id=str(i),
                )
                for i in names
            ]
            messages.append(says("assistant", word(), reasoning_content=word(), tool_calls=calls))
            messages += [says("tool", word(), tool_call_id=str(i)) for i in names]
        messages.append(says("assistant", word(), reasoning_content=word()))
    return messages


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_answers_are_read_back_as_they_were(mode):
    for seed in range(200):
        messages = conversation(random.Random(seed))
        spans = encode_spans(messages, mode, drop_thinking=False)
        answers = [message for message in messages if message["role"] == "assistant"]
        written = [span.text for span in spans if span.written]
        for message, text in zip(answers, written, strict=True):
            found = parse_message(text, mode)
            assert found["content"] == message["content"]
            assert found["reasoning_content"] == (
                message["reasoning_content"] if mode == "thinking" else ""
            )
            wanted = [
                (c["function"]["name"], json.loads(c["function"]["arguments"]))
                for c in message.get("tool_calls", [])
            ]
            assert [
                (c["function"]["name"], json.loads(c["function"]["arguments"]))
                for c in found["tool_calls"]
            ] == wanted


def test_spans_are_the_text_and_tell_who_wrote_it():
    spans = encode_spans(TWO_TURNS, "thinking")
    assert "".join(span.text for span in spans) == encode_messages(TWO_TURNS, "thinking")
    assert [(span.text, span.current) for span in spans if span.written] == [
        (f"Hello.{E}", False),
        (f"Easy.</think>4{E}", True),
    ]
    assert spans[-2].text == f"{A}<think>" and not spans[-2].written


def test_nothing_of_the_arguments_is_changed():
    messages = conversation(random.Random(1))
    before = json.dumps(messages)
    encode_messages(messages, "thinking", context=messages)
    assert json.dumps(messages) == before


CALL = "\n\n" + block(invoke("f", parameter("a", "1"), parameter("b", "2", "false")))


def test_parse_reads_calls():
    found = parse_message("Ok." + CALL + E)
    assert found == says(
        "assistant", "Ok.", reasoning_content="", tool_calls=[call("f", '{"a": "1", "b": 2}')]
    )
    assert parse_message("Ok." + CALL) == found
    assert parse_message("\n\n" + block(invoke("f", "")) + E)["tool_calls"] == [call("f", "{}")]


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("4", "chat", "it is not finished"),
        ("", "chat", "it is not finished"),
        (f"no end of thought{E}", "thinking", "got no </think>"),
        (f"4{E}5", "chat", "got '5' after its end"),
        (f"a<think>b{E}", "chat", "special token <think> inside"),
        (f"a</think>b</think>{E}", "thinking", "special token </think> inside"),
        (f"{B}4{E}", "chat", "special token <｜begin▁of▁sentence｜> inside"),
        (f"a <｜DSML｜tool_calls>{E}", "chat", "special token ｜DSML｜ inside"),
        (f"{CALL}</think>x{E}", "thinking", "special token ｜DSML｜ inside"),
        (CALL + "x" + E, "chat", "got 'x<｜end▁of▁sentence｜>' after tool calls"),
        ("\n\n<｜DSML｜tool_calls", "chat", "expected '<｜DSML｜invoke' or"),
        (CALL[:-1], "chat", "to the end"),
        (
            CALL.replace("tool_calls>\n", "tool_calls> \n", 1),
            "chat",
            "got '> \\n' between tool calls",
        ),
        (CALL.replace('name="f"', "name=f"), "chat", 'expected name="..."'),
        (
            CALL.replace('string="true"', 'string="yes"'),
            "chat",
            'expected name="..." string="true|false"',
        ),
        (CALL.replace('"b"', '"a"'), "chat", "f has parameter 'a' twice"),
        (
            CALL.replace(">2<", ">NaN<"),
            "chat",
            "parameter 'b' is 'NaN'; with string=\"false\" it must be JSON",
        ),
        (
            CALL.replace(">2<", ">two<"),
            "chat",
            "parameter 'b' is 'two'; with string=\"false\" it must be JSON",
        ),
        (
            CALL.replace("</｜DSML｜parameter>\n</", "</｜DSML｜parameter>x\n</"),
            "chat",
            "got '>x\\n' after a parameter",
        ),
        (CALL.split("</｜DSML｜invoke")[0], "chat", "to the end"),
        ("4" + E, "silent", "thinking_mode: got 'silent'"),
    ],
)
def test_malformed_answers_are_refused(text, mode, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_message(text, mode)


def test_every_cut_of_an_answer_is_refused():
    whole = "Because.</think>Ok." + CALL + E
    for length in range(len(whole)):
        if whole[length:] != E:  # the end token may be missing after calls
            with pytest.raises(ValueError):
                parse_message(whole[:length], "thinking")


@pytest.mark.parametrize(
    ("messages", "settings", "words"),
    [
        ([says("robot")], {}, "message 0: got role 'robot'; allowed: system, user"),
        (["hi"], {}, "message 0: got role None"),
        ([says("user", "a", task="sing")], {}, "message 0: got task 'sing'; allowed: action"),
        ([says("user", None)], {}, "message 0: got content None"),
        ([says("user", [{"type": "image_url"}])], {}, "list of text parts"),
        ([says("user"), says("tool", 5)], {}, "message 1: got content 5; a tool's must be text"),
        ([says("developer")], {}, "message 0: got no content; a developer's"),
        ([says("latest_reminder", None)], {}, "a latest_reminder's"),
        ([says("system", ["a"])], {}, "message 0: got content ['a']; must be text"),
        ([says("system", tools=[{"name": "f"}])], {}, "tools: got"),
        ([says("assistant", tool_calls=["f"])], {}, "message 0: got tool_calls ['f']"),
        ([says("assistant", tool_calls=[{"name": "f"}])], {}, "tool_calls: got {'name': 'f'}"),
        (
            [says("assistant", tool_calls=[call("f", "[1]")])],
            {},
            "must be the JSON text of an object",
        ),
        (
            [says("assistant", tool_calls=[{"function": {"name": "f", "arguments": {"a": {1}}}}])],
            {},
            "got {'a': {1}}: ",
        ),
        ([], {"thinking_mode": "deep"}, "thinking_mode: got 'deep'; allowed: chat, thinking"),
        ([], {"reasoning_effort": "low"}, "reasoning_effort: got 'low'; allowed: None, high, max"),
        ([], {"release": "v5"}, "release: got 'v5'; allowed: v4, 0731"),
    ],
)
def test_what_the_format_has_not_is_refused(messages, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        encode_messages(messages, **settings)


def test_special_tokens_are_distinct():
    every = (tokens.BOS, tokens.EOS, *tokens.CHAT_TOKENS, *tokens.FIM_TOKENS)
    assert len(set(every)) == len(every) == 17
