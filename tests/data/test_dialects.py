"""The dialects of other tools: context, roles, parts, edits and reasoning; what cannot be used is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from buleyean_rl.data.importers.formats import detect_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Discards
from buleyean_rl.data.importers.reasoning import strip_reasoning
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.importers.suggest import suggest_columns
from buleyean_rl.data.importers.trace_scores import Verdicts, read_verdicts
from buleyean_rl.data.records import RejectionRecord, make_record, parse_messages
from buleyean_rl.errors import RecordError, UnsupportedContent
from rows import convert

USER = {"role": "user", "content": "Name a tool."}
GOOD = {"role": "assistant", "content": "Saw."}
BAD = {"role": "assistant", "content": "Soup."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}]}
EXPECTED = make_record("Name a tool.", ["Soup."])


def shared_gpt(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


# --- pairs and labels


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [shared_gpt("human", "Name a tool.")], "chosen": shared_gpt("gpt", "Saw."),
         "rejected": shared_gpt("gpt", "Soup.")},
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER, GOOD], "rejected_response": "Soup."},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"query": "Name a tool.", "response": "Saw.", "rejected_response": "Soup.", "history": []},
        {"instruction": "Name a tool.", "chosen_response": "Saw.", "rejected_response": "Soup."},
        {"prompt": "Name a tool.", "chosen": str([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": "Name a tool.", "rejected": str([BAD])},
        {"conversations": [shared_gpt("human", "Name a tool."), shared_gpt("gpt", "Soup.")], "kto_tag": False},
        {"messages": f"[{USER}\n {BAD}]", "label": "undesirable"},  # as NumPy prints it
        {"prompt": "Name a tool.", "response": "Soup.", "rating": "BAD", "workspace": "w"},
    ],
)  # fmt: skip
def test_pairs_and_labels_of_other_tools(row: dict[str, Any]) -> None:
    assert convert(row)[0] == [EXPECTED]


@pytest.mark.parametrize(
    "format_keys",
    [
        {"chosen": "Saw.", "rejected": "Soup."},
        {"completion": "Soup.", "label": False},
        {"rejected_responses": ["Soup."]},
    ],
)
def test_context_beside_the_prompt_is_part_of_it(format_keys: dict[str, Any]) -> None:
    row = {"prompt": "Name a tool.", **format_keys}
    system = {"role": "system", "content": "Be brief."}
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert convert(row | {"system": "Be brief."})[0] == [make_record([system, USER], ["Soup."])]
    for history in ([["Hi", "Hello."]], earlier, [["human", "Hi"], ["ai", "Hello."]]):
        records = convert(row | {"history": history, "system": "Be brief."})[0]
        assert records == [make_record([system, *earlier, USER], ["Soup."])]
    assert convert(row | {"system": "", "history": [], "tools": "[]"}) == convert(row)
    assert convert(row | {"context": "A page.", "tools": [{"name": "x"}]})[1].context_dropped == {
        "context": 1,
        "tools": 1,
    }
    with pytest.raises(UnsupportedContent, match="came with images"):
        convert(row | {"images": ["cat.png"]})


def test_calls_of_tools_are_counted_as_what_they_are() -> None:
    for row, reason in (
        ({"messages": [USER, CALL], "label": False}, "rejected answer is a call of a tool"),
        ({"messages": [USER, CALL, {"role": "tool", "content": "3"}, BAD], "label": False}, "an earlier message calls"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [CALL]}, "rejected answer is a call of a tool"),
        (
            {"conversations": [shared_gpt("human", "q"), shared_gpt("function_call", "{}")], "label": False},
            "is a call of",
        ),
        ({"input": [USER], "output": CALL, "score": 0}, "rejected answer is a call of a tool"),
    ):
        with pytest.raises(UnsupportedContent, match=reason):
            convert(row)


def test_roles_are_mapped_or_refused_with_the_list() -> None:
    spoken = [
        ("Human", "a"),
        ("GPT", "b"),
        ("developer", "c"),
        ("observation", "d"),
        ("AIMessage", "e"),
        ("model", "f"),
    ]
    messages = parse_messages([{"role": role, "content": text} for role, text in spoken], "messages")
    assert [role for role, _ in messages] == ["user", "assistant", "system", "tool", "assistant", "assistant"]
    with pytest.raises(RecordError, match=r"the role 'narrator': roles are system, user, assistant, tool .*human"):
        parse_messages([{"role": "narrator", "content": "x"}], "messages")


def test_an_accepted_answer_is_a_round_however_it_is_written() -> None:
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Sa"}, {"type": "text", "text": "w."}]}
    by_column = Choices(columns={"prompt": "q", "answer": "a", "score": "s"})
    for row, choices in (
        ({"prompt": "Name a tool.", "chosen": [parts], "rejected": "Soup."}, NO_CHOICES),
        ({"prompt": "Name a tool.", "chosen": [USER, parts], "rejected": [USER, BAD]}, NO_CHOICES),
        ({"prompt": "Name a tool.", "chosen": str([parts]), "rejected": "Soup."}, NO_CHOICES),
        ({"prompt": "Name a tool.", "completion": [parts], "label": True}, NO_CHOICES),
        ({"prompt": "Name a tool.", "completions": [{"response": [parts], "score": 2}, {"text": "Soup.", "score": 1}]},
         NO_CHOICES),
        ({"q": "Name a tool.", "a": "<think>Hm.</think>Saw.", "s": "up"}, by_column),
    ):  # fmt: skip
        records = list(detect_format([row], choices).read_records(row, Discards(), choices))
        accepted = [record for record in records if not record.rejects]
        assert [(record.rejected_responses, record.rounds) for record in accepted] == [(("Saw.",), (1,))], row


def test_the_accepted_answers_of_a_row_share_its_prompt() -> None:
    answers = [{"response": f"answer {k}", "score": int(k > 0)} for k in range(50)]
    row = {"prompt": "Name a tool.", "completions": [*answers, {"response": None, "score": 1}]}
    records = list(detect_format([row], NO_CHOICES).read_records(row, Discards(), NO_CHOICES))
    (accepted,) = [record for record in records if not record.rejects]
    assert accepted.rejected_responses == tuple(f"answer {k}" for k in range(1, 50))


def test_parts_of_a_content_are_joined() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "So"},
        {"type": "output_text", "text": "up."},
    ]
    row = {"messages": [USER, {"role": "assistant", "content": parts}], "label": False}
    assert convert(row) == ([EXPECTED], Discards(reasoning_removed=1))
    with pytest.raises(UnsupportedContent, match="a part of the kind 'image_url'"):
        parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages")


# --- chats


def chat(rated: dict[str, Any], asked: dict[str, Any] = USER) -> dict[str, Any]:
    messages = {"1": {"parentId": None, **asked}, "2": {"parentId": "1", "annotation": {"rating": -1}, **rated}}
    return {"chat": {"history": {"messages": messages}}}


def test_open_webui_rejects_what_the_model_said() -> None:
    assert convert(chat(GOOD | {"originalContent": "Soup."})) == ([EXPECTED], Discards(edited=1))
    items = [
        {"type": "reasoning", "content": []},
        {"type": "message", "content": [{"type": "output_text", "text": "Soup."}]},
    ]
    assert convert(chat({"role": "assistant", "content": "", "output": items}))[0] == [EXPECTED]
    assert convert(chat(BAD | {"content": "<think>\nhm\n</think>\n\nSoup."})) == (
        [EXPECTED],
        Discards(reasoning_removed=1),
    )
    called = BAD | {"content": '<details type="tool_calls" done="true">\n</details>\nSoup.'}
    image = USER | {"files": [{"type": "image", "url": "x"}]}
    for row, reason in (
        (chat(called), "the rated answer was written after calls of tools"),
        (chat(BAD, image), "its prompt came with image; training reads text"),
        (
            chat({"role": "assistant", "content": "", "error": {"content": "x"}}),
            "the rated answer is an error of the server",
        ),
        (chat(BAD | {"content": "<think>hm"}), "the rejected answer is reasoning alone"),
    ):
        records, discards = convert(row)
        assert (records, list(discards.unusable)) == ([], [reason])


@pytest.mark.parametrize("key", ["messages", "messagesTree"])
def test_librechat(key: str) -> None:
    answer = {"messageId": "2", "parentMessageId": "1", "isCreatedByUser": False, "text": "",
              "content": [{"type": "think", "think": "hm"}, {"type": "text", "text": "Soup."}],
              "feedback": {"rating": "thumbsDown", "tag": {"key": "inaccurate"}}}  # fmt: skip
    asked = {"messageId": "1", "parentMessageId": "0", "isCreatedByUser": True, "text": "Name a tool."}
    messages = [asked, answer] if key == "messages" else [asked | {"children": [answer]}]
    assert convert({"conversationId": "c", key: messages})[0] == [EXPECTED]


# --- traces


@pytest.mark.parametrize(
    ("scores", "counts"),
    [
        ({"scores": [{"name": "u", "dataType": "CATEGORICAL", "value": 0, "stringValue": "good"}]}, None),
        ({"scores": [{"name": "u", "dataType": "CATEGORICAL", "value": 1, "stringValue": "bad"}]}, (1, 1)),
        ({"scores": [{"name": "u", "dataType": "BOOLEAN", "value": 0, "stringValue": "False"}]}, (1, 1)),
        ({"scores": [{"name": "u", "dataType": "NUMERIC", "value": 0}]}, (1, 1)),
        ({"timestamp": "t", "user-feedback": [0, 1, 0], "tags": ["0"]}, (2, 3)),
        ({"timestamp": "t", "user-feedback": None}, None),
        ({"feedback_stats": {"thumb": {"n": 3, "avg": None, "values": {"down": 1, "up": 2}}}}, (1, 3)),
        ({"feedback_stats": {"thumb": {"n": 4, "avg": 0.25, "values": {}}}}, (3, 4)),
        ({"feedback": [{"key": "u", "score": 0, "value": "up"}]}, None),
        ({"feedback": {"rating": "thumbsDown", "tag": "inaccurate"}}, (1, 1)),
        ({"score": "👎🏿"}, (1, 1)),
    ],
)
def test_a_traces_scores_are_verdicts(scores: dict[str, Any], counts: tuple[int, int] | None) -> None:
    records = convert({"input": "Name a tool.", "output": "Soup.", **scores})[0]
    assert [(record.rejection_counts[0], record.rounds[0]) for record in records] == ([counts] if counts else [])


def test_what_a_trace_was_asked_and_answered() -> None:
    def one(given: Any, answer: Any) -> RejectionRecord:
        (record,) = convert({"inputs": given, "outputs": answer, "score": 0})[0]
        return record

    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    parts = [{"type": "text", "text": "So"}, {"type": "text", "text": "up."}]
    assert one({"messages": [USER]}, {"role": "assistant", "content": parts}) == EXPECTED
    assert one({"question": "Name a tool.", "chat_history": [["Hi", "Hello."]]}, "Soup.").prompt[:2] == (
        ("user", "Hi"),
        ("assistant", "Hello."),
    )
    assert (
        one([USER], {"messages": [USER, BAD, {"role": "tool", "content": "ok"}]}) == EXPECTED
    )  # a graph's whole state
    assert one([*earlier, USER], {"choices": [{"message": BAD}]}) == make_record([*earlier, USER], ["Soup."])
    assert one([USER, BAD], "Soup.") == EXPECTED
    for output, reason in (
        ({"choices": [{"message": BAD}, {"message": GOOD}]}, "several choices"),
        ({"generations": [[{"text": "a"}, {"text": "b"}]]}, "several choices"),
    ):
        with pytest.raises(UnsupportedContent, match=reason):
            one([USER], output)
    with pytest.raises(UnsupportedContent, match="ended in an error"):
        convert({"inputs": {"question": "q"}, "outputs": None, "error": "timeout", "score": 0})
    with pytest.raises(RecordError, match=r"no output \(its keys: inputs, outputs, score\)"):
        one([USER], None)
    assert convert({"input": {"question": "q", "page": "p"}, "output": "a", "score": 0})[1].context_dropped == {
        "page": 1
    }


# --- what formats share


def test_a_scale_needs_a_limit() -> None:
    with pytest.raises(RecordError, match="--below 3"):
        is_rejection(4, None, "stars")
    assert [is_rejection(stars, 3, "stars") for stars in (1, "2", 3, 5)] == [True, True, False, False]
    assert [is_rejection(score, None, "score") for score in (-1, 0, "0.4", 0.5, 1, True)] == [True] * 3 + [False] * 3
    assert [is_rejection(word, None, "w") for word in ("", " -- ", "n/a", None, float("nan"))] == [None] * 5
    for word in ("thumbsDown", "thumbs_down", ":thumbsdown:", "👎🏻", "DOWN", "Dislike"):
        assert is_rejection(word, None, "w") is True, word


def test_reasoning_is_taken_out() -> None:
    for text, expected in (
        ("<think>a</think>\n b", "b"),
        ("a</think>b", "b"),
        ("say <think> and go on", "say <think> and go on"),
        ('x <details type="reasoning" done="true">\n> a\n</details>\n\ny', "x y"),
        ("<think>open", ""),
    ):
        assert strip_reasoning(text) == expected, text


def test_an_unknown_row_is_told_the_columns_that_would_read_it() -> None:
    row = {"id": 1, "user question": "q", "bot_reply": "a", "stars": 2}
    line = suggest_columns(row)
    assert line == "--column 'prompt=user question' --column answer=bot_reply --column score=stars"
    with pytest.raises(RecordError, match="--column answer=bot_reply"):
        detect_format([row])
    with pytest.raises(RecordError, match=r"its completion is null \(its keys: prompt, completion, label\)"):
        convert({"prompt": "x", "completion": None, "label": False})


def test_an_embedding_beside_a_trace_is_no_rating() -> None:
    trace = {"input": "q", "output": "a", "timestamp": "t", "embedding": [0.1, 0.9] * 50}
    assert read_verdicts(trace, NO_CHOICES).rounds == 0
    assert read_verdicts(trace | {"quality": [0, 1]}, NO_CHOICES) == Verdicts(1, 2)


def test_ratings_beside_their_own_statistics_count_once() -> None:
    trace = {"feedback": [{"key": "user", "score": 0}], "feedback_stats": {"user": {"n": 1, "avg": 0.0}}}
    assert read_verdicts(trace, NO_CHOICES) == Verdicts(1, 1)
