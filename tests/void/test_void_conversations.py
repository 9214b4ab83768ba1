"""The store's conversations, batches and runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buleyean_rl.data.records import make_record
from buleyean_rl.void.store import Store, TurnSettings
from buleyean_rl.void.store.runs import Sample
from void_rows import answered, asked


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "void.db")
    yield opened
    opened.close()


def test_a_turn_has_its_answers_and_what_is_rejected_of_them(store: Store) -> None:
    turn = answered(store, "hello", "hello", blind=True)
    assert asked(store)["answers"] == turn["answers"]  # asked again under the same name
    assert not turn["revealed"]
    first, second = turn["answers"]
    row = store.rejections.add("n-1", first, ((0, 1),), "why")["id"]
    store.rejections.undo([store.rejections.add("n-2", first)["id"]])
    shown = [answer["rejections"] for answer in store.conversations.turn(turn["id"])["answers"]]  # type: ignore[index]
    assert shown == [[{"id": row, "spans": [[0, 1]], "reason": "why"}]] * 2  # the same words are rejected as well
    assert store.conversations.answer(second["id"])["rejections"] == shown[1]  # type: ignore[index]
    store.conversations.reveal(turn["id"])
    assert store.conversations.turn(turn["id"])["revealed"]  # type: ignore[index]
    assert store.conversations.turn("nobody") is None


def test_what_is_said_again_is_rejected_still_and_elsewhere_not(store: Store) -> None:
    first = answered(store, "hello", "other")["answers"][0]
    store.rejections.add("n-1", first)
    again = answered(store, "hello", "x", uid="turn-0002", conversation="talk-0002")["answers"][0]
    assert len(again["rejections"]) == 1
    in_context = answered(store, "hello", "x", uid="turn-0003", conversation="talk-0002")["answers"][0]
    with_system = answered(store, "hello", "x", uid="turn-0004", conversation="talk-0004", system="Be brief.")
    assert in_context["rejections"] == with_system["answers"][0]["rejections"] == []


def test_each_model_has_the_conversation_as_it_led_it(store: Store) -> None:
    answered(store, "one", "two", system="Be brief.")
    for answer in asked(store, "turn-0002", "and?")["answers"]:
        store.conversations.save(answer, "", "failed", error="broken")
    turn = asked(store, "turn-0003", "what?", system="Be kind.")
    for answer, said in zip(turn["answers"], ("one", "two"), strict=True):
        assert [(each["role"], each["content"]) for each in json.loads(answer["context"])] == [
            ("system", "Be kind."), ("user", "hi"), ("assistant", said), ("user", "what?"),
        ]  # fmt: skip
    row = store.rejections.add("n-1", turn["answers"][1] | {"text": "no"})["id"]
    assert store.rejections.records()[0].prompt[-1] == ("user", "what?")
    assert store.rejections.page()["rows"][0]["prompt"].endswith("assistant: two\nuser: what?")
    assert row


def told(answer: Any) -> list[str]:
    """What a model is asked: the words of every message."""
    context = json.loads(answer["context"])
    return [context] if isinstance(context, str) else [message["content"] for message in context]


def test_what_was_rejected_is_left_out_of_what_comes_next(store: Store) -> None:
    loops, good = "Sleep. Sleep. Sleep.", "Dim the lights."
    first = answered(store, loops, good, prompt="tips?")
    later = answered(store, "sure", "yes", uid="turn-0002", prompt="more?")
    whole = store.rejections.add("n-1", first["answers"][0])["id"]
    base, trained = asked(store, "turn-0003", "tips?")["answers"]
    # another model's answer stands in for the one that was rejected, so that the later turns still follow from it
    assert told(base) == ["tips?", good, "more?", "sure", "tips?"]
    assert told(trained) == ["tips?", good, "more?", "yes", "tips?"]
    assert told(first["answers"][0]) == ["tips?"]
    assert told(later["answers"][0]) == ["tips?", loops, "more?"]  # which is what it was asked
    for answer in (base, trained):
        store.conversations.save(answer, "", "failed")
    store.rejections.add("n-2", first["answers"][1])
    assert [told(answer) for answer in asked(store, "turn-0004", "tips?")["answers"]] == [
        ["more?", "sure", "tips?"], ["more?", "yes", "tips?"],
    ]  # fmt: skip
    store.rejections.add("n-3", trained | {"text": "no"})
    record = store.rejections.records()[-1]
    assert [words for _, words in record.prompt] == told(trained)  # type: ignore[misc]
    store.rejections.undo([whole])
    store.conversations.again(later["answers"][1])
    assert told(store.conversations.turn("turn-0002")["answers"][1]) == ["tips?", loops, "more?"]  # type: ignore[index]


def test_of_an_answer_rejected_in_part_the_rest_is_told(store: Store) -> None:
    answer = answered(store, "Sleep. Sleep. Dim the lights.", "x", prompt="tips?")["answers"][0]
    store.rejections.add("n-1", answer, spans=((6, 13),))
    assert told(asked(store, "turn-0002", "more?")["answers"][0])[1] == "Sleep. Dim the lights."


def test_no_question_while_an_answer_is_written(store: Store) -> None:
    asked(store)
    settings = TurnSettings()
    assert not store.conversations.ask("turn-0002", "talk-0001", "p", settings, [("base", "m")])
    assert store.conversations.ask("turn-0002", "talk-0002", "p", settings, [("base", "m")])


def test_an_answer_is_written_on_and_drawn_again(store: Store) -> None:
    turn = asked(store, max_tokens=7)
    answer = turn["answers"][0]
    store.conversations.save(answer, "half", "writing")
    unfinished = store.conversations.unfinished()
    assert [(row["text"], row["state"], row["max_tokens"]) for row in unfinished] == [
        ("half", "writing", 7), ("", "waiting", 7),
    ]  # fmt: skip
    store.conversations.save(answer, "half of it", "cut", drawn={"token_ids": [1], "ended": False, "tokenizer": "t"})
    store.conversations.wait(answer["id"])
    assert store.conversations.answer(answer["id"])["state"] == "waiting"  # type: ignore[index]
    store.conversations.save(answer, "all of it", "done")
    for _ in range(2):  # asked for twice at once, it comes once
        store.conversations.again(answer)
    again = store.conversations.turn(turn["id"])["answers"][0]  # type: ignore[index]
    assert (again["attempt"], again["state"], again["temperature"], again["seed"]) == (1, "waiting", 0.7, 1)
    assert again["id"] != answer["id"]


def test_conversations_are_listed_by_their_last_turn_and_found_by_their_words(store: Store) -> None:
    first = answered(store, "a", "b", prompt="How do  I\ncook rice?")
    answered(store, "a", "b", uid="turn-0002", conversation="talk-0002", prompt="50% of it")
    answered(store, "a", "b", uid="turn-0003", prompt="And beans?")
    store.rejections.add("n-1", first["answers"][1])

    def listed(**options: Any) -> list[tuple[str, int, bool]]:
        rows = store.conversations.page(**options)["conversations"]
        return [(row["title"], row["turns"], row["rejected"]) for row in rows]

    rice, half = ("How do I cook rice?", 2, True), ("50% of it", 1, False)
    assert listed() == [rice, half]
    assert listed(words="BEANS") == [rice]
    assert listed(words="50%") == [half]
    newest = store.conversations.page()["conversations"][0]
    assert listed(before=newest["changed"]) == [half]
    assert store.conversations.delete("talk-0001")
    assert listed() == [half]
    assert store.conversations.get("talk-0001") is None
    assert store.rejections.count() == 1  # it stays
    assert store.conversations.delete("talk-0001", deleted=False)
    assert len(listed()) == store.conversations.count() == 2
    assert not store.conversations.delete("nobody")


def batch(store: Store, prompts: int = 3) -> dict[str, Any]:
    names = [f"prompt {number}" for number in range(prompts)]
    return store.batches.add("batch-001", "mine", names, TurnSettings(max_tokens=9), [("base", "m")])


def test_a_batch_is_answered_in_groups_and_judged(store: Store) -> None:
    assert batch(store) == batch(store)
    group = store.batches.waiting(2)
    assert [(answer["context"], answer["max_tokens"]) for answer in group] == [('"prompt 0"', 9), ('"prompt 1"', 9)]
    assert store.conversations.unfinished() == []  # it has its own time
    assert store.batches.next("batch-001") == {"card": None, "waiting": True}
    for answer in group:
        store.conversations.save(answer, "said", "done")
    card = store.batches.next("batch-001")["card"]
    assert card["prompt"] == "prompt 0"
    judged = store.batches.judge(card, "verdict-1", "rejected", spans=((0, 1),), reason="why")
    assert (judged["verdict"], len(judged["answers"][0]["rejections"])) == ("rejected", 1)
    judged = store.batches.judge(judged, "verdict-2", "fine")
    assert (judged["verdict"], judged["answers"][0]["rejections"]) == ("fine", [])
    assert store.rejections.records() == [make_record("prompt 0", ["said"], [0], 1)]
    found = store.batches.get("batch-001")
    assert found is not None
    assert [found[name] for name in ("state", "prompts", "answered", "judged", "rejected")] == ["answering", 3, 2, 1, 0]
    store.batches.judge(judged, "verdict-3", None)
    assert store.rejections.records() == []
    assert store.batches.next("batch-001")["card"]["prompt"] == "prompt 0"
    store.batches.judge(judged, "verdict-4", "skipped")
    assert [card["prompt"] for card in store.batches.cards("batch-001", 1, 5)] == ["prompt 1", "prompt 2"]


def test_a_batch_is_paused_and_deleted(store: Store) -> None:
    batch(store)
    assert store.batches.set("batch-001", paused=True)
    assert (store.batches.all()[0]["state"], store.batches.waiting(9)) == ("paused", [])
    assert not store.batches.is_active("batch-001")
    assert store.batches.set("batch-001")
    assert len(store.batches.waiting(9)) == 3
    assert store.batches.set("batch-001", deleted=True)
    assert (store.batches.all(), store.batches.waiting(9), store.batches.get("batch-001")) == ([], [], None)


def test_runs_and_their_steps_are_not_doubled(store: Store) -> None:
    run = store.runs.add("run-uid", "folder", 3, 4, 12)
    assert store.runs.add("run-uid", "folder", 3, 4, 12) == run
    for loss in (1.0, 0.5):
        store.runs.add_point(run, {"step": 1, "loss": loss, "floor": 0.1, "gap": loss - 0.1})
    store.runs.add_samples(run, [Sample("p", "b", "a", None, ((0, 1),))])
    store.runs.end(run, "failed", "why")
    found = store.runs.get(run)
    assert found is not None
    assert [point["loss"] for point in found["points"]] == [0.5]
    assert (found["state"], found["error"], found["samples"][0]["after"]) == ("failed", "why", "a")
    assert (found["samples"][0]["unlearned"], found["samples"][0]["spans"]) == (None, "[[0, 1]]")
    assert (found["name"], found["rejections"], found["decision"], found["step"]) == (f"run {run}", 4, None, 1)
    assert store.runs.set(run, name="sleep", decision="kept")
    assert not store.runs.set(99, name="sleep")
    assert [(row["id"], row["step"]) for row in store.runs.list()] == [(run, 1)]
    assert store.runs.get(99) is None
    store.runs.delete(run)
    assert (store.runs.list(), store.runs.get(run), store.runs.newest_id()) == ([], None, run)


def test_settings(store: Store) -> None:
    assert store.settings.get("pair", ["base"]) == ["base"]
    store.settings.set("pair", ["base", "run-1"])
    assert store.settings.get("pair") == ["base", "run-1"]
