"""The studies from end to end on a tiny model: that they run, go on where they stopped, and show what there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import harness
import human_counts
import own_loops
import strength
import ultrafeedback
import walks
from buleyean_rl.data.importers.preferences import Preference
from buleyean_rl.data.records import RejectionRecord, make_record, read_records
from buleyean_rl.data.trie import build_boundary, merge_responses
from buleyean_rl.evaluation.statistics import Figure
from buleyean_rl.mining.walk_report import Round
from harness import Method
from tiny import tiny_llama, tiny_tokenizer


def reject_all(prompts: Sequence[str], answers: Sequence[str]) -> list[RejectionRecord]:
    return [make_record(*pair, [60], 60) for pair in zip(prompts, ([answer] for answer in answers), strict=True)]


@pytest.fixture
def tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a study of two runs on a model made on the spot."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(harness, "base", lambda *_: tiny_llama(tokenizer))
    monkeypatch.setattr(own_loops, "load_tokenizer", lambda _name: tokenizer)
    monkeypatch.setattr(own_loops, "METHODS", [Method("complement", 1e-3), Method("npo", 1e-3, seed=7)])
    monkeypatch.setattr(own_loops, "reject_loops", reject_all)
    monkeypatch.setattr(own_loops, "UNSEEN", 4)
    monkeypatch.setattr(own_loops, "NEUTRAL", 2)
    monkeypatch.setattr(harness, "ANSWER_TOKENS", 60)
    prompts, neutral = tmp_path / "prompts.txt", tmp_path / "neutral.jsonl"
    prompts.write_text("".join(f"Give me tip {n}.\n" for n in range(20)))
    neutral.write_text("".join(json.dumps({"text": f"The {n} cats sat on the mat."}) + "\n" for n in range(2)))
    files = ["--prompts", str(prompts), "--neutral", str(neutral)]
    return ["own_loops.py", *files, "--mined", "12", "-o", str(tmp_path / "study")]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    own_loops.main()


def test_a_study_runs_once_and_shows_its_table(
    tiny_study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_study, monkeypatch)
    folder = Path(tiny_study[-1])
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(runs) == {"base", "complement-lr0.001-seed42", "npo-lr0.001-seed7"}
    for figures in runs.values():
        assert len(figures["loops"]) == 4
        assert figures["loop_rate"] == sum(figures["loops"]) / 4
    assert runs["complement-lr0.001-seed42"]["rejected_nll"] != runs["base"]["rejected_nll"]
    printed = capsys.readouterr().out
    assert "| npo-lr0.001-seed7 |" in printed
    assert "| complement-lr0.001 |" in printed
    assert (folder / "pareto.png").stat().st_size > 0

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("everything was done already")

    monkeypatch.setattr(harness, "train", never)
    run(tiny_study, monkeypatch)
    assert capsys.readouterr().out == printed[printed.index("| run") :]


def test_ten_times_the_steps(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loops, "LONG", [Method("npo", 1e-3, 1), Method("npo", 1e-3, 10, label="10")])
    run([*tiny_study[:-2], "--long", *tiny_study[-2:]], monkeypatch)
    runs = harness.read_runs(Path(tiny_study[-1]))
    assert runs["npo-10-lr0.001-seed42"]["steps"] == 10 * runs["npo-lr0.001-seed42"]["steps"]
    assert "complement-lr0.001-seed42" not in runs


def test_one_training_many_strengths(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strength, "METHODS", [Method("complement", 1e-3)])
    monkeypatch.setattr(strength, "STRENGTHS", (1.0, 3.0))
    monkeypatch.setattr(sys, "argv", tiny_study)
    strength.main()
    own_loops.main()
    runs = harness.read_runs(Path(tiny_study[-1]))
    base, one, three, alone = (
        runs[name]["rejected_nll"]
        for name in ("base", *(f"complement-lr0.001-seed42{strength}" for strength in ("-x1", "-x3", "")))
    )
    assert alone == one
    assert one - base < 0.5 * (three - base)
    assert (Path(tiny_study[-1]) / "strength.png").stat().st_size > 0

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("everything was done already")

    monkeypatch.setattr(harness, "train", never)
    monkeypatch.setattr(strength, "plot", lambda _: None)  # the folder holds a run of another study by now
    strength.main()


def test_without_the_tokens_that_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(harness, "base", lambda *_: tiny_llama(tokenizer))
    record = make_record("Tip?", ["Sleep well. Sleep well."], [60], 60, [[(12, 23)]])
    boundary = build_boundary(record, tokenizer, 64)
    assert boundary is not None
    losses = [
        harness.train(Method("complement", 1e-3, 1, rejected_alone=alone), [boundary])[1]["loss_first"]
        for alone in (False, True)
    ]
    anchored = boundary.nodes / len(boundary.rejections)  # where nothing was rejected the loss begins at 0
    assert losses[1] == pytest.approx(anchored * losses[0], rel=1e-4)


def test_nothing_to_train_on_is_told(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loops, "reject_loops", lambda *_: [])
    with pytest.raises(SystemExit, match="nothing to train on"):
        run(tiny_study, monkeypatch)


def test_too_few_prompts_are_told(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_study[tiny_study.index("12")] = "100"
    with pytest.raises(SystemExit, match="104 are needed"):
        run(tiny_study, monkeypatch)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pairs, counted answers and neutral texts, and a model made on the spot for both studies of them."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(harness, "base", lambda *_: tiny_llama(tokenizer))
    for study in (ultrafeedback, human_counts):
        monkeypatch.setattr(study, "load_tokenizer", lambda _name: tokenizer)
        monkeypatch.setattr(study, "NEUTRAL", 2)
    pairs = [{"prompt": f"Tip {n}?", "chosen": f"Sleep {n} hours.", "rejected": f"No {n}."} for n in range(8)]
    counted = [
        {
            "prompt": f"Tip {n}?",
            "candidates": [
                {"response": f"Sleep {n} hours.", "rejection_count": n % 2},
                {"response": f"No {n}.", "rejection_count": 3},
            ],
            "total_rounds": 3,
        }
        for n in range(8)
    ]
    for name, lines in (("pairs", pairs), ("counted", counted), ("neutral", [{"text": "The cat sat."}] * 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_rejections_of_pairs(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ultrafeedback, "METHODS", [Method(name, 1e-3, 1) for name in ("complement", "dpo", "listwise")])
    pairs, folder = str(files / "pairs.jsonl"), files / "study"
    given = ["--train", pairs, "--test", pairs, "--other", pairs, "--neutral", str(files / "neutral.jsonl")]
    monkeypatch.setattr(sys, "argv", ["ultrafeedback.py", *given, "-o", str(folder)])
    ultrafeedback.main()
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(runs) == {f"{name}-lr0.001-seed42" for name in ("complement", "dpo", "listwise")}
    for run in runs.values():
        assert run["test"]["pairs"] == len(run["test"]["right"]) == 8
        assert run["test"]["right_if_shorter"] == [0.0] * 8  # "No 1." is the worse one
        assert run["neutral_drift"] != 0
    tokens = {run["method"]["name"]: run["tokens"] for run in runs.values()}
    assert min(tokens["dpo"], tokens["listwise"]) > tokens["complement"]
    for record in read_records(folder / "scores" / "samples.jsonl"):
        assert record.rejection_counts == (1, 0)  # the chosen answer is not among them
        assert "Sleep" not in record.rejected_responses[1]
    printed = capsys.readouterr().out
    assert "| dpo-lr0.001-seed42 |" in printed
    assert "| the shorter answer | 0.0% " in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--records", "5"])
    with pytest.raises(SystemExit, match="has runs on 1000 records"):
        ultrafeedback.main()


def test_a_sum_favours_the_shorter_answer_and_a_mean_does_not() -> None:
    pair = Preference("?", ("a a a a", "b"), (0, 1), 1)
    own, base = {"nats": [[8.0, 3.0]], "tokens": [[4, 1]]}, {"nats": [[4.0, 1.0]]}  # 1 nat and 2 nats a token more
    found = ultrafeedback.accuracy([pair], own, base)
    assert found == {"pairs": 1, "right": [0.0], "right_per_token": [1.0], "right_if_shorter": [0.0]}


def test_counts_of_people(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    methods = (Method("listwise", 1e-3, 1), human_counts.OF_ANSWERS), (Method("ratio", 1e-3, 1), human_counts.OF_TOKENS)
    monkeypatch.setattr(human_counts, "METHODS", methods)
    monkeypatch.setattr(human_counts, "SEEDS", (0,))
    given = ["--records", str(files / "counted.jsonl"), "--neutral", str(files / "neutral.jsonl"), "--held-out", "3"]
    monkeypatch.setattr(sys, "argv", ["human_counts.py", *given, "--parts", "2", "-o", str(files / "study")])
    human_counts.main()
    runs = {path.stem: json.loads(path.read_text()) for path in (files / "study").glob("*.json")}
    names = [f"{counts}-listwise-lr0.001-seed0" for counts in ("true", "shuffled", "ones")]
    names += [f"{counts}-ratio-lr0.001-seed0" for counts in ("true", "merged", "ones")]
    assert set(runs) == {name + part for name in names for part in ("", "-part1")}
    assert all(len(run["items"]) == 3 for run in runs.values())
    true, ones = runs["true-listwise-lr0.001-seed0"], runs["ones-listwise-lr0.001-seed0"]
    assert true["loss_first"] != ones["loss_first"]
    assert true["loss_first"] != runs["true-listwise-lr0.001-seed0-part1"]["loss_first"]
    assert runs["true-ratio-lr0.001-seed0"]["loss_first"] != runs["merged-ratio-lr0.001-seed0"]["loss_first"]
    assert len(human_counts.pooled(files / "study")["true-listwise-lr0.001-seed0"]["items"]) == 6
    assert "| ones-listwise-lr0.001-seed0 |" in capsys.readouterr().out


def test_counts_merged_by_position_ignore_what_stands_before() -> None:
    answers = [([5, 6, 7], [True] * 3), ([5, 8, 7, 9], [True] * 4), ([4], [True])]
    boundary = merge_responses([1, 2], answers, [3, 1, 0], 3)
    assert boundary.tokens == [5, 6, 7, 8, 7, 9, 4]  # nodes 1 to 7; the second answer branches off node 1
    first, second, third, fourth = [(5, 4)], [(6, 3), (8, 1)], [(7, 4)], [(9, 1)]
    at = [first, second, third, fourth, third, fourth, [], second]
    merged = human_counts.by_position(boundary)
    assert merged.rejections == [(node, *entry) for node, entries in enumerate(at) for entry in entries]
    assert merged.tokens == boundary.tokens
    alone = merge_responses([1, 2], answers[:1], [3], 3)
    assert human_counts.by_position(alone) == alone


def test_a_rankings_lead_is_over_the_same_prompts() -> None:
    better, worse = Figure([(1.0, 1.0)] * 4), Figure([(0.5, 1.0)] * 4)
    assert human_counts.written(better.value, worse.value, worse.difference(better)) == "+0.500 (+0.500 to +0.500)"


def test_several_seeds_are_told_as_one_beside_the_true_counts(tmp_path: Path) -> None:
    drawn = {"true-a-seed0": (1, 0), "true-a-seed1": (1, 1), "ones-a-seed0": (0, 1), "ones-a-seed1": (0, 0)}
    for name, taus in {**drawn, "true-b-seed0": (1, 1)}.items():
        run = {"items": [(tau, 1.0) for tau in taus], "neutral_drift": 0.25}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    runs = human_counts.pooled(tmp_path)
    assert runs["true-a, 2 seeds"] == {"items": [[1.0, 1.0], [0.5, 1.0]], "drifts": [0.25, 0.25]}
    assert len(runs) == 7
    (row,) = (row for row in human_counts.table(tmp_path).splitlines() if "ones-a, 2 seeds" in row)
    assert "| +0.250 (" in row
    assert "| +0.500 (+0.000 to +1.000) |" in row


def test_another_split_holds_out_prompts_that_were_mined() -> None:
    bundled, (mined, unseen) = walks.split(0), walks.split(11)
    assert (len(mined), len(unseen)) == tuple(map(len, bundled)) == (340, 128)
    assert set(unseen) < set(bundled[0])
    assert not set(unseen) & set(mined)
    assert set(mined) | set(unseen) == set(bundled[0]) | set(bundled[1])
    assert walks.split(11) == (mined, unseen) != walks.split(12)


def test_walks_go_on_and_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(
        mined: list[str], _unseen: list[str], _model: str, folder: Path, *_: Any, rounds: int, **__: Any
    ) -> None:
        measured = Round(0, 0.25, 0.25, 4.0, 0, 0, 9.6, None)
        trained = replace(measured, round=rounds, loop_rate=0.02, neutral_nll=4.0123, rejected=len(mined))
        folder.mkdir(parents=True)
        (folder / "walk.json").write_text(json.dumps({"rounds": [asdict(measured), asdict(trained)]}))

    monkeypatch.setattr(walks, "walk", stand_in)
    monkeypatch.setattr(sys, "argv", ["walks.py", "--split", "11", "--rounds", "1", "-o", str(tmp_path)])
    walks.main()
    assert (
        "| split-11 | 0 | 25.0% |  |  |  | 10 |\n| split-11 | 1 | 2.0% | +0.012 | 340 | 0 | 10 |"
        in capsys.readouterr().out
    )
