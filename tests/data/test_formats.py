"""Formats: each shape of row, what is discarded, what is wrong with a bad one, and how a format is chosen."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buleyean_rl.data.importers import Choices
from buleyean_rl.data.importers.formats import FORMATS, detect_format, find_format
from buleyean_rl.data.importers.protocol import NO_CHOICES, Discards
from buleyean_rl.data.records import make_record
from buleyean_rl.errors import RecordError, UsageError
from rows import assistant, convert, user

TURNS = [user("Hi"), assistant("Hello."), user("And?")]
SYSTEM = [{"role": "system", "content": "s"}, user("q")]


def accepted(row: dict[str, Any]) -> list[tuple[object, str]]:
    """The (prompt, answer) pairs of a row that are handed on as rounds without a rejection."""
    records = detect_format([row]).read_records(row, Discards(), NO_CHOICES)
    return [(record.prompt, record.rejected_responses[0]) for record in records if not record.rejects]


def refused(problem: str, row: dict[str, Any], **options: Any) -> None:
    with pytest.raises(RecordError, match=problem):
        convert(row, **options)


# --- pairs and labels


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"instruction": "Hi", "input": "", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {  # a binarised UltraFeedback: `messages` is the chosen conversation and must not be taken for the prompt
            "prompt": "Hi",
            "messages": [user("Hi"), assistant("Yes.")],
            "chosen": [user("Hi"), assistant("Yes.")],
            "rejected": [user("Hi"), assistant("No.")],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
    ],
)
def test_a_pair_yields_the_rejected_answer_only(row: dict[str, Any]) -> None:
    assert detect_format([row]).name == "pairs"
    assert convert(row) == ([make_record("Hi", ["No."])], Discards(chosen_discarded=1))


def test_a_pair_of_conversations_shares_its_prompt() -> None:
    row = {"chosen": [*TURNS, assistant("Yes.")], "rejected": [*TURNS, assistant("No.")]}
    assert convert(row)[0] == [make_record(TURNS, ["No."])]
    row = {"instruction": "Translate.", "input": "Hi", "chosen": "No.", "rejected": "No."}
    records, discards = convert(row)
    assert records[0].prompt == "Translate.\nHi"
    assert discards.same_as_chosen == 1


def test_a_transcript_is_a_conversation() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\nYou?\n\nHuman: And?\n\nAssistant:"
    row = {"chosen": f"{start} Yes.", "rejected": f"{start} No."}
    turns = [user("Hi"), assistant("Hello.\nYou?"), user("And?")]
    assert convert(row) == ([make_record(turns, ["No."])], Discards(chosen_discarded=1))
    # beside a prompt, or after other text, it is an answer like any other
    assert convert(row | {"prompt": "Hi"})[0] == [make_record("Hi", [row["rejected"]])]
    refused("has no prompt", {"chosen": f"Well. {start}", "rejected": f"Well. {start}"})


def test_a_bad_pair_is_refused() -> None:
    for change, problem in (
        ({"chosen": [user("A"), assistant("Yes.")], "rejected": [user("B"), assistant("No.")]}, "part ways"),
        ({"rejected": [assistant("A"), user("b"), assistant("C")]}, "more than one"),
        ({"rejected": [user("A")]}, "ends with a user message"),
        ({"rejected": None}, "has no rejected answer"),
        ({"rejected": 3}, "rejected_responses is the number 3"),
        ({"prompt": None}, "has no prompt"),
        ({"rejected": "\n"}, "only whitespace"),
    ):
        refused(problem, {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."} | change)


@pytest.mark.parametrize(
    "row",
    [{"messages": [user("Hi"), assistant("No.")]}, {"prompt": [user("Hi")], "completion": [assistant("No.")]}],
)
def test_a_label_decides_whether_an_answer_is_rejected(row: dict[str, Any]) -> None:
    assert convert({**row, "label": False}) == ([make_record("Hi", ["No."])], Discards())
    assert convert({**row, "label": True}) == ([], Discards(chosen_discarded=1, without_rejection=1))
    assert accepted({**row, "label": True}) == [("Hi", "No.")]
    for label in (0, "False", "0", "undesirable", "Bad", "thumbsDown", "👎🏽", "👎\ufe0f"):
        assert convert({**row, "label": label})[0] == [make_record("Hi", ["No."])], label
    for label in (None, "--", "", "N/A", float("nan")):
        assert convert({**row, "label": label}) == ([], Discards(unrated=1, without_rejection=1)), label
    refused("its label is 'meh'", {**row, "label": "meh"})


def test_a_labelled_conversation_rejects_its_last_answer() -> None:
    row = {"messages": [*TURNS, assistant("No.")], "label": False}
    assert convert(row)[0] == [make_record(TURNS, ["No."])]
    refused("an answer without a prompt", {"messages": [assistant("No.")], "label": False})
    bad = {"prompt": "Hi", "completion": [user("a"), assistant("b")], "label": False}
    refused("2 messages: one answer is wanted", bad)


# --- several answers


def test_scores_are_rounds_of_every_pair() -> None:
    scored = {"best": 9.0, "tied": 5.0, "Tied": 5.0, "worst": 1}
    completions = [{"response": text, "overall_score": score} for text, score in scored.items()]
    records, discards = convert({"instruction": "Hi", "completions": completions})
    assert records == [make_record("Hi", ["tied", "Tied", "worst"], [1, 1, 3], 3)]
    assert discards == Discards(chosen_discarded=1, ties=1)
    assert convert({"prompt": "Hi", "completions": []}) == ([], Discards(without_rejection=1, unrated=1))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_rounds_are_won_lost_or_tied(scores: list[int]) -> None:
    row = {"prompt": "Hi", "responses": [f"answer {k}" for k in range(len(scores))], "scores": scores}
    records, discards = convert(row)
    lost = sum(sum(record.rejection_counts) for record in records)
    assert lost + discards.ties == len(scores) * (len(scores) - 1) // 2
    assert all(set(record.rounds) == {len(scores) - 1} for record in records)
    assert f"answer {scores.index(max(scores))}" not in [r for rec in records for r in rec.rejected_responses]


def test_scores_of_ultrafeedbacks_aspects() -> None:
    def rated(*ratings: str) -> dict[str, Any]:
        names = ("helpfulness", "honesty", "truthfulness")
        return {name: {"Rating": rating} for name, rating in zip(names, ratings, strict=False)}

    good = {"response": "good", "annotations": rated("5", "N/A"), "overall_score": None}
    poor = {"response": "poor", "annotations": rated("1", "2", "3")}
    assert convert({"instruction": "Hi", "completions": [good, poor]})[0] == [make_record("Hi", ["poor"])]


def test_a_bad_score_or_count_is_refused() -> None:
    for row, problem in (
        ({"completions": [{"response": "a", "score": "high"}]}, "score of candidate 0 is text"),
        ({"completions": [{"response": "a", "score": True}]}, "score of candidate 0 is true"),
        ({"completions": [{"response": "a", "score": 1}, {"response": "b"}]}, "candidate 1 has no score"),
        ({"completions": ["a"]}, "candidate 0 is text"),
        ({"completions": [{"score": 1}, {"score": 2}]}, "candidate 0 has no response"),
        ({"responses": ["a", "b"], "scores": [1]}, "1 score for 2 answers"),
        ({"candidates": [{"response": "a", "rejection_count": -1}]}, "rejection_count of candidate 0"),
        ({"candidates": [{"response": "a", "rejection_count": 1.5}]}, "the number 1.5"),
        ({"candidates": [{"response": "a", "rejection_count": 4}], "total_rounds": 3}, "count is 4"),
    ):
        refused(problem, {"prompt": "Hi", **row})


def test_candidates_carry_counts_or_scores() -> None:
    counted = {
        "prompt": [user("Hi")],
        # An answer nobody rejected is not looked at.
        "candidates": [{"response": "No.", "rejection_count": 2}, {"response": True, "rejection_count": 0}],
        "total_rounds": 3,
    }
    assert convert(counted) == ([make_record("Hi", ["No."], [2], 3)], Discards(chosen_discarded=1))
    candidates = [{"response": [assistant("No.")], "score": 1.5}, {"response": "Yes.", "score": 2}]
    scored = {"prompt": "Hi", "candidates": candidates}
    assert convert(scored)[0] == convert(scored, "scored")[0] == [make_record("Hi", ["No."])]


# --- Open WebUI


def open_webui(rating: object) -> dict[str, Any]:
    """A row of Open WebUI's feedback export: the conversation is a tree, and one message was rated."""
    thinking = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\n'
    messages = {
        "1": {"id": "1", "parentId": None, "childrenIds": ["2"], **user("Hi")},
        "2": {"id": "2", "parentId": "1", "childrenIds": ["3"], **assistant("Hello.")},
        "3": {"id": "3", "parentId": "2", "childrenIds": ["4", "5"], **user("And?")},
        "4": {"id": "4", "parentId": "3", "childrenIds": [], **assistant(thinking + "No.")},
        "5": {"id": "5", "parentId": "3", "childrenIds": [], **assistant("Yes.")},
    }
    chat = {"history": {"messages": messages, "currentId": "5"}, "params": {}, "messages": []}
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": None, "reason": "", "comment": ""},
        "meta": {"arena": False, "chat_id": "c", "message_id": "4", "message_index": 4},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": chat}},
    }


def test_open_webui_feedback() -> None:
    assert (
        convert(open_webui("-1"))
        == convert(open_webui(-1))
        == (
            [make_record(TURNS, ["No."])],
            Discards(reasoning_removed=1),
        )
    )
    assert convert(open_webui(1)) == ([], Discards(chosen_discarded=1, without_rejection=1))
    row = open_webui(-1)
    row["snapshot"]["chat"]["chat"]["params"]["system"] = "Be kind."
    assert convert(row)[0][0].prompt[0] == ("system", "Be kind.")
    for _ in range(2):  # older exports wrap the conversation less deeply
        row["snapshot"] = {"chat": {}} | row["snapshot"]["chat"]
        assert len(convert(row)[0]) == 1
    refused("without its conversation", row | {"snapshot": None})


def test_open_webui_chats() -> None:
    chat = open_webui(-1)["snapshot"]["chat"]["chat"]
    chat["history"]["messages"]["4"]["annotation"] = {"rating": -1}
    chat["history"]["messages"]["5"]["annotation"] = {"rating": 1}
    row = {"id": "c", "title": "t", "chat": chat}
    assert convert(row) == ([make_record(TURNS, ["No."])], Discards(chosen_discarded=1, reasoning_removed=1))


# --- traces

LANGCHAIN = {
    "inputs": {"messages": [[{"id": ["x"], "kwargs": {"type": "system", "content": "s"}},
                             {"id": ["x"], "kwargs": {"type": "human", "content": "q"}}]]},
    "outputs": {"generations": [[{"text": "a", "message": {"kwargs": {"content": "a"}}}]]},
    "feedback": [{"key": "user_score", "score": False}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"input": "q", "output": "a", "scores": [{"name": "user", "value": 0}]}, "q"),
        ({"input": SYSTEM, "output": [{"content": "a"}], "scores": [{"stringValue": "thumbs_down"}]}, SYSTEM),
        ({"inputs": {"question": "q"}, "outputs": {"answer": "a"}, "feedback_stats": {"user": {"avg": 0.0}}}, "q"),
        (LANGCHAIN, SYSTEM),
        ({"input": [*SYSTEM, assistant("a")], "output": "a", "score": "bad"}, SYSTEM),
        ({"inputs": {"anything": "q"}, "outputs": {"anything": "a"}, "score": 0.49}, "q"),
    ],
)
def test_traces(row: dict[str, Any], prompt: object) -> None:
    assert convert(row)[0] == [make_record(prompt, ["a"])]


def test_a_traces_scores_are_rounds_and_good_ones_are_discarded() -> None:
    trace = {"input": "q", "output": "a"}
    assert convert(trace | {"scores": [{"name": "u", "value": v} for v in (0, 1, 0)]})[0] == [
        make_record("q", ["a"], [2], 3)
    ]
    good = convert(trace | {"scores": [{"name": "u", "value": 1}]})
    assert good == ([], Discards(chosen_discarded=1, without_rejection=1))
    assert convert(trace | {"scores": []}) == ([], Discards(without_rejection=1, unrated=1))
    two = trace | {"scores": [{"name": "u", "value": 4}, {"name": "length", "value": 900}]}
    refused("has the scores length, u: choose one with --score", two)
    assert len(convert(two, choices=Choices(score="u", below=5))[0]) == 1
    assert convert(two, choices=Choices(score="u", below=4))[0] == []
    refused("the score u is 'meh'", trace | {"scores": [{"name": "u", "value": "meh"}]})


# --- all of them


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["role", "content", "response", "score", "rejection_count", "rating", "chat", "history"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    st.sampled_from(
        ["prompt", "messages", "chosen", "rejected", "label", "completion", "completions", "candidates", "data", "chat"]
    ),
    st.sampled_from([row_format.name for row_format in FORMATS if row_format.name != "columns"]),
)
@example([{}, None], "chosen", "pairs")
@example({"rating": -1}, "data", "openwebui")
@example({"history": {"messages": []}}, "chat", "openwebui")
def test_no_row_crashes_a_format(value: object, key: str, name: str) -> None:
    rows = [{"prompt": "Hi", "rejected": "No.", "label": False, "completion": "No.", key: value}, {key: value}]
    for row in rows:
        with suppress(RecordError):
            convert(row, name)
        with suppress(RecordError):
            if (rank := find_format(name).read_preference) is not None:
                rank(row)


def test_the_first_row_that_matches_decides() -> None:
    rows = [{"text": "x"}, {"prompt": "Hi", "rejected": ["No."]}]
    assert detect_format(rows).name == "records"
    assert detect_format(rows, Choices({"prompt": "prompt", "answer": "text"})).name == "columns"
    with pytest.raises(RecordError, match=r"keys text, date(.|\n)*pairs: prompt, chosen, rejected"):
        detect_format([{"text": "x", "date": 1}])
    with pytest.raises(UsageError, match="choose auto, records, pairs"):
        find_format("zip")
    with pytest.raises(UsageError, match="--column prompt=NAME"):
        find_format("columns")


def test_columns_that_do_not_fit_are_refused() -> None:
    for columns, problem in (
        ({"prompt": "q"}, "no column for answer"),
        ({"prompt": "q", "answer": "a", "stars": "s"}, "no role stars"),
    ):
        with pytest.raises(UsageError, match=problem):
            Choices(columns)
