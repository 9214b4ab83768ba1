"""Mining: answers are drawn once, judged, voted on, and resumed from the journal to the same bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from buleyean_rl.data.records import make_record, read_records
from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.inference.protocol import GREEDY, Answer, BaseEngine, OnTokens, Outcome, Sampling, Unanswered
from buleyean_rl.mining import draws
from buleyean_rl.mining.draws import MineSettings
from buleyean_rl.mining.journal import journal_path
from buleyean_rl.mining.judges import Verdict, find_judge
from buleyean_rl.mining.mine import Mined, mine
from buleyean_rl.mining.votes import record_votes

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, use_cache: Callable[[Path], None]) -> Path:
    use_cache(tmp_path)
    return tmp_path / "buleyean-rl"


# --- mining -------------------------------------------------------------------------------------------

PROMPTS = [f"prompt {number}" for number in range(10)]


class Talker(BaseEngine):
    """An engine whose answer depends on prompt, seed and what is computed beside it; it may die after some answers."""

    is_batched = True

    def __init__(self, lifetime: float = math.inf) -> None:
        self.lifetime, self.asked = lifetime, 0

    def answers(
        self,
        conversations: Sequence[Any],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,  # noqa: ARG002
    ) -> Generator[tuple[int, Outcome]]:
        assert seeds is not None
        for index, messages in enumerate(conversations):
            if self.lifetime <= 0:
                raise EngineError("gone")
            self.lifetime -= 1
            self.asked += 1
            seed = seeds[index] if sampling.temperature else 0
            yield index, self.answer(messages[-1]["content"], f"seed {seed} of {len(conversations)}")

    def answer(self, prompt: str, how: str) -> Outcome:
        return Answer(f"{prompt} {how}", None, True, (1, 2))

    def close(self) -> None:
        pass


class Refusing(Talker):
    """Has no answer to some prompts."""

    is_batched = False

    def __init__(self, refusals: dict[str, Unanswered]) -> None:
        super().__init__()
        self.refusals = refusals

    def answer(self, prompt: str, how: str) -> Outcome:
        return self.refusals.get(prompt) or super().answer(prompt, how)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "WINDOW", 4)


def go(
    folder: Path,
    talker: Talker,
    *judges: str,
    prompts: Sequence[Any] = PROMPTS,
    overwrite: bool = False,
    keep_accepted: bool = True,
    **settings: Any,
) -> Mined:
    chosen = [find_judge(judge) for judge in judges or ("regex:[02468] seed",)]
    output, drawing = folder / "r.jsonl", MineSettings(**settings)
    kept = {"overwrite": overwrite, "keep_accepted": keep_accepted}
    return mine(prompts, lambda: talker, "model", chosen, output, drawing, **kept)


def test_answers_are_asked_judged_and_written(tmp_path: Path) -> None:
    mined = go(tmp_path, Talker())
    assert list(read_records(tmp_path / "r.jsonl")) == mined.records
    assert [record.prompt for record in mined.records] == PROMPTS
    assert mined.records[2].rejected_responses == ("prompt 2 seed 0 of 4",)
    assert mined.records[2].rejected_spans == (((7, 13),),)
    assert [record.rejection_counts for record in mined.records] == [(1,), (0,)] * 5
    assert {record.rounds for record in mined.records} == {(1,)}
    report = mined.report
    assert (report.prompts, report.answers, report.records, report.answers_reused) == (10, 10, 10, 0)
    assert (report.rejected, report.accepted) == (5, 5)
    assert report.verdicts == {"regex:[02468] seed": {"rejected": 5, "accepted": 5, "abstained": 0}}
    assert "5 rejected, 5 accepted answers kept as anchors: 10 records" in report.lines()[0]


def test_accepted_answers_are_left_out_when_that_is_asked(tmp_path: Path) -> None:
    mined = go(tmp_path, Talker(), keep_accepted=False)
    assert [record.prompt for record in mined.records] == PROMPTS[::2]
    assert (mined.report.rejected, mined.report.accepted) == (5, 0)
    assert "5 rejected: 5 records" in mined.report.lines()[0]


def test_samples_have_their_own_seeds_and_the_same_seed_gives_the_same_records(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        (tmp_path / name).mkdir()
        mined = go(tmp_path / name, Talker(), "length:9-", samples=2, temperature=1.0, seed=seed)
        runs.append((tmp_path / name / "r.jsonl").read_bytes())
    assert runs[0] == runs[1] != runs[2]
    drawn = {int(text.split()[3]) for answers in mined.answers for text in answers}
    assert drawn == set(range(8, 28))


@pytest.mark.parametrize("lifetime", [1, 8, 9])
def test_a_stopped_mining_resumes_to_the_same_bytes(tmp_path: Path, lifetime: int) -> None:
    (tmp_path / "whole").mkdir()
    go(tmp_path / "whole", Talker())
    with pytest.raises(EngineError):
        go(tmp_path, Talker(lifetime))
    again = Talker()
    assert go(tmp_path, again).report.answers_reused == lifetime  # each was kept as it came
    assert again.asked == 10 - lifetime // 4 * 4  # whole windows
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole" / "r.jsonl").read_bytes()


def test_a_journal_cut_anywhere_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    go(tmp_path, Talker())
    records, journal = (tmp_path / "r.jsonl").read_bytes(), journal_path(tmp_path / "r.jsonl").read_bytes()
    for cut in range(0, len(journal), 83):
        journal_path(tmp_path / "r.jsonl").write_bytes(journal[:cut])
        (tmp_path / "r.jsonl").unlink()
        go(tmp_path, Talker())
        assert (tmp_path / "r.jsonl").read_bytes() == records
        assert journal_path(tmp_path / "r.jsonl").read_bytes().count(b"\n") >= journal.count(b"\n")


def test_a_prompt_without_an_answer_is_counted_and_left_out(tmp_path: Path) -> None:
    refusals = {
        PROMPTS[0]: Unanswered("longer than the context", "900 tokens"),
        PROMPTS[2]: Unanswered("failed", "status 500", is_permanent=False),
    }
    report = go(tmp_path, Refusing(refusals), "regex:[02468] seed").report
    assert (report.answers, report.rejected, report.asked_again) == (8, 3, 1)
    assert report.unanswered == {"longer than the context": 1, "failed": 1}
    assert "without an answer: 1 longer than the context, 1 failed; the same command asks for 1" in report.lines()[-1]
    again = Refusing({})
    report = go(tmp_path, again).report
    assert (again.asked, report.answers, report.unanswered) == (1, 9, {"longer than the context": 1})


def test_no_answer_at_all_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    refusals = {prompt: Unanswered("refused", "status 400: no", is_permanent=False) for prompt in PROMPTS}
    with pytest.raises(EngineError, match="no prompt has an answer: refused: status 400: no"):
        go(tmp_path, Refusing(refusals))
    assert not (tmp_path / "r.jsonl").exists()
    assert go(tmp_path, Refusing({})).report.answers == 10
    (tmp_path / "long").mkdir()
    long = {prompt: Unanswered("longer than the context", "900 tokens") for prompt in PROMPTS}
    for _ in range(2):
        with pytest.raises(EngineError, match="no prompt has an answer: longer than the context: 900 tokens"):
            go(tmp_path / "long", Refusing(long))


def test_other_judges_judge_the_same_answers(tmp_path: Path) -> None:
    go(tmp_path, Talker())
    mined = go(tmp_path, Talker(0), "length:9-", "regex:prompt 3")
    assert (mined.report.answers_reused, mined.report.records) == (10, 10)


def test_each_verdict_is_a_round(tmp_path: Path) -> None:
    mined = go(tmp_path, Talker(), "regex:prompt", "regex:pro.pt", r"regex:\d seed", prompts=PROMPTS[:1])
    (record,) = mined.records
    assert record.rejected_spans == (((0, 6),), ((7, 13),))
    assert (record.rejection_counts, record.rounds) == ((2, 1), (3, 3))


A, B = Answer("a", 1, True), Answer("b", 1, True)


def test_a_judge_that_abstains_has_no_vote() -> None:
    record = record_votes("p", [A, B], [[Verdict(True), Verdict(None)], [Verdict(False), Verdict(None)]])
    assert record == make_record("p", ["a", "b"], [1, 0], 1, ended=[True, True])
    assert record_votes("p", [A], [[Verdict(None)]]) is None


def test_an_answer_that_no_judge_rejects_is_an_anchor_with_its_rounds() -> None:
    votes = [[Verdict(True), Verdict(False)], [Verdict(False), Verdict(False)]]
    assert record_votes("p", [A, B], votes) == make_record("p", ["a", "b"], [1, 0], 2, ended=[True, True])
    assert record_votes("p", [A, B], votes, keep_accepted=False) == make_record("p", ["a"], [1], 2, ended=[True])
    assert record_votes("p", [B], votes[1:]) == make_record("p", ["b"], [0], 2, ended=[True])
    assert record_votes("p", [B], votes[1:], keep_accepted=False) is None


def test_where_parts_overlap_their_verdicts_add_up() -> None:
    answer = Answer("abcdef", 6, True)
    record = record_votes("p", [answer], [[Verdict(True, ((0, 4),)), Verdict(True, ((2, 6),)), Verdict(False)]])
    assert record is not None
    parts = dict(zip(record.rejected_spans, zip(record.rejection_counts, record.rounds, strict=True), strict=True))
    assert parts == {((0, 2), (4, 6)): (1, 3), ((2, 4),): (2, 3)}


def test_conversations_are_mined_too(tmp_path: Path) -> None:
    prompt = (("system", "Be brief."), ("user", "hello"))
    mined = go(tmp_path, Talker(), "length:9-", prompts=[prompt])
    assert mined.records[0].prompt == prompt
    assert mined.answers == [["hello seed 0 of 1"]]


def test_nothing_but_space_is_an_empty_answer(tmp_path: Path) -> None:
    talker = Talker()
    talker.answer = lambda *_: Answer(" \n", 1, True, (1,))  # type: ignore[method-assign]
    assert go(tmp_path, talker, "length:1-").records[0].rejected_responses == ("",)


def test_a_wrong_request(tmp_path: Path) -> None:
    for judges, settings, problem in (
        (("loops", "loops"), {}, "named twice"),
        ((), {"samples": 2}, "are the same answer"),
        ((), {"samples": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=problem):
            go(tmp_path, Talker(), *judges, **settings)  # type: ignore[arg-type]


def test_records_are_never_replaced_unasked(tmp_path: Path) -> None:
    records, journal = tmp_path / "r.jsonl", tmp_path / "r.mined.jsonl"
    records.write_text("theirs\n")
    with pytest.raises(
        UsageError, match=r"r.jsonl is there already: name another file, or replace it with --overwrite"
    ):
        go(tmp_path, Talker())
    assert (records.read_text(), journal.exists()) == ("theirs\n", False)
    go(tmp_path, Talker(), overwrite=True)
    go(tmp_path, Talker(), "length:99-")  # ours, and the settings are the same
    with records.open("a") as file:
        file.write("edited\n")
    with pytest.raises(UsageError, match=r"r.jsonl is there already"):
        go(tmp_path, Talker(0))
    assert records.read_text().endswith("edited\n")


def test_a_journal_of_other_settings_is_replaced_only_when_asked(tmp_path: Path) -> None:
    go(tmp_path, Talker())
    with pytest.raises(
        UsageError, match="mined with another max_tokens, seed: name another output, or begin anew with"
    ):
        go(tmp_path, Talker(), max_tokens=9, seed=3)
    assert go(tmp_path, Talker(), max_tokens=9, seed=3, overwrite=True).report.answers_reused == 0


def test_a_folder_or_a_pipe_is_no_output(tmp_path: Path) -> None:
    judge, settings = [find_judge("loops")], MineSettings()
    os.mkfifo(tmp_path / "pipe")
    for output, problem in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path(), "folder"),
    ):
        with pytest.raises(UsageError, match=problem):
            mine(PROMPTS, Talker, "model", judge, output, settings)


def test_links_to_one_file_have_one_journal(tmp_path: Path) -> None:
    go(tmp_path, Talker())
    link = tmp_path / "link.jsonl"
    link.symlink_to("r.jsonl")
    mined = mine(PROMPTS, Talker, "model", [find_judge("loops")], link, MineSettings())
    assert (mined.report.answers_reused, link.is_symlink()) == (10, True)


def test_the_root_folder_is_no_output() -> None:
    with pytest.raises(UsageError, match="is a folder"):
        mine(PROMPTS, Talker, "model", [find_judge("loops")], Path("/"), MineSettings())
