"""The studies from end to end on a tiny model: that they run, go on where they stopped, and show what there is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
import human_counts
import own_loops
import plots
import strength
import ultrafeedback
import walks
from buleyean_rl.data.importers.preferences import Preference
from buleyean_rl.data.records import make_record, read_records
from buleyean_rl.data.trie import build_boundary, merge_responses
from buleyean_rl.evaluation.drift import Drift
from buleyean_rl.mining.walk_report import Round
from harness import Method, Summary
from tiny import tiny_llama, tiny_tokenizer

COMPLEMENT, NPO = "complement-lr0.001-seed42", "npo-lr0.001-seed7"


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("everything was done already")


def test_a_summary_keeps_its_values_and_the_rows_of_others(tmp_path: Path) -> None:
    one, other = Summary(tmp_path), Summary(tmp_path)
    row = {"method": "npo", "label": "", "seed": 7, "loop_rate": 0.25, "rejected_alone": True, "targets": ["a", "b"]}
    one.add("first", row)
    other.add("second", {"runs": 2, "extra": -0.5})
    one.add("first", {"extra": 1e-9})
    summary = Summary(tmp_path)
    first = {"method": "npo", "seed": 7, "loop_rate": 0.25, "rejected_alone": 1, "targets": "a b", "extra": 1e-9}
    assert summary.rows == {"first": first, "second": {"runs": 2, "extra": -0.5}}
    assert list(summary.runs) == ["first"]
    assert summary.run("first", never) == first


def test_a_study_runs_once_and_shows_its_table(
    tiny_study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", tiny_study)
    own_loops.main()
    folder = Path(tiny_study[-1])
    rows = Summary(folder).rows
    assert set(rows) == {"base", COMPLEMENT, NPO}
    for name, row in rows.items():
        loops = json.loads((folder / "cache" / f"{name}.json").read_text())["items"]
        assert (row["prompts"], row["loops"], row["loop_rate"]) == (4, sum(loops), sum(loops) / 4)
    assert rows[COMPLEMENT]["rejected_nll"] != rows["base"]["rejected_nll"]
    assert (rows[COMPLEMENT]["alpha"], rows[NPO]["beta"], rows[NPO]["seed"]) == (0.9, 0.1, 7)
    assert rows[NPO]["compared_with"] == COMPLEMENT
    assert rows[NPO]["loop_rate_more"] == rows[NPO]["loop_rate"] - rows[COMPLEMENT]["loop_rate"]
    table = capsys.readouterr().out
    table = table[table.index("| run") :]
    assert f"| {NPO} |" in table
    assert "| complement-lr0.001 |" in table

    monkeypatch.setattr(harness, "train", never)
    own_loops.main()
    assert capsys.readouterr().out == table
    plots.plot_loops(folder, folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 0


def test_ten_times_the_steps(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loops, "LONG", [Method("npo", 1e-3, 1), Method("npo", 1e-3, 10, label="10")])
    monkeypatch.setattr(sys, "argv", [*tiny_study[:-2], "--long", *tiny_study[-2:]])
    own_loops.main()
    runs = Summary(Path(tiny_study[-1])).runs
    assert set(runs) == {"npo-lr0.001-seed42", "npo-10-lr0.001-seed42"}
    assert runs["npo-10-lr0.001-seed42"]["steps"] == 10 * runs["npo-lr0.001-seed42"]["steps"]


def test_one_training_many_strengths(tiny_study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strength, "METHODS", [Method("complement", 1e-3), Method("complement", 1e-3, seed=43)])
    monkeypatch.setattr(strength, "STRENGTHS", (1.0, 3.0))
    monkeypatch.setattr(sys, "argv", tiny_study)
    strength.main()
    folder = Path(tiny_study[-1])
    rows = Summary(folder).rows
    base, one, three = (rows[name]["rejected_nll"] for name in ("base", f"{COMPLEMENT}-x1", f"{COMPLEMENT}-x3"))
    assert one - base < 0.5 * (three - base)
    drifts = [rows[f"complement-lr0.001-seed{seed}-x3"]["neutral_drift"] for seed in (42, 43)]
    assert rows["complement-lr0.001-x3 (2 seeds)"]["neutral_drift"] == pytest.approx(sum(drifts) / 2)
    plots.plot_strength(folder, folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 0
    monkeypatch.setattr(harness, "train", never)
    strength.main()


def test_runs_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    summary = Summary(tmp_path)
    loops = {"a-seed1": [1, 0, 0, 0], "a-seed2": [1, 1, 0, 0], "b": [1, 1, 1, 0]}
    for name, items in loops.items():
        summary.add(name, {"method": name[0], "neutral_drift": 0.25} | own_loops.loop_columns(items, loops["b"]))
        summary.write_cache(name, {"items": items})
    summary.add("c", {"method": "c"})  # its answers are elsewhere
    for name in summary.runs:
        harness.compare_loops(summary, name, "b")
    row = summary.rows["a-seed1"]
    assert (row["loops_in_both"], row["loop_rate_more"], row["loops_in_base_too"]) == (1, -0.5, 1)
    assert (row["loop_rate_more_low"], row["loop_rate_more_high"]) == (-1, 0)
    assert "compared_with" not in summary.rows["b"]
    assert summary.rows["c"] == {"method": "c"}
    assert harness.alike(loops, "-seed[0-9]") == {"a": ["a-seed1", "a-seed2"]}
    harness.pool_loops(summary, "a (2 seeds)", ["a-seed1", "a-seed2"])
    pooled = summary.rows["a (2 seeds)"]
    assert (pooled["loop_rate"], pooled["loops_in_any"], pooled["loops_in_one"], pooled["loops_in_all"]) == (
        3 / 8,
        2,
        1,
        1,
    )
    harness.compare_loops(summary, "a (2 seeds)", "b")
    assert summary.rows["a (2 seeds)"]["loop_rate_more"] == -3 / 8


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
    anchored = boundary.nodes / len(boundary.judgements)  # where nothing was rejected the loss begins at 0
    assert losses[1] == pytest.approx(anchored * losses[0], rel=1e-4)


def test_nothing_to_train_on_and_too_few_prompts_are_told(
    tiny_study: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_loops, "judge_loops", lambda *_: [])
    monkeypatch.setattr(sys, "argv", tiny_study)
    with pytest.raises(SystemExit, match="nothing to train on"):
        own_loops.main()
    tiny_study[tiny_study.index("8")] = "100"
    with pytest.raises(SystemExit, match="104 are needed"):
        own_loops.main()


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
    monkeypatch.setattr(ultrafeedback, "REFERENCE", COMPLEMENT)
    monkeypatch.setattr(ultrafeedback, "METHODS", [Method(name, 1e-3, 1) for name in ("complement", "dpo", "listwise")])
    pairs, folder = str(files / "pairs.jsonl"), files / "study"
    options = ["--train", pairs, "--test", pairs, "--other", pairs, "--neutral", str(files / "neutral.jsonl")]
    monkeypatch.setattr(sys, "argv", ["ultrafeedback.py", *options, "-o", str(folder)])
    ultrafeedback.main()
    runs = Summary(folder).runs
    assert set(runs) == {f"{name}-lr0.001-seed42" for name in ("complement", "dpo", "listwise")}
    for row in runs.values():
        assert (row["test_pairs"], row["records"]) == (8, 1000)
        assert row["test_right_if_shorter"] == 0  # "No 1." is the worse one
        assert row["neutral_drift"] != 0
    dpo, complement = runs["dpo-lr0.001-seed42"], runs[COMPLEMENT]
    assert dpo["test_right_more"] == pytest.approx(dpo["test_right"] - complement["test_right"])
    tokens = {row["method"]: row["tokens"] for row in runs.values()}
    assert min(tokens["dpo"], tokens["listwise"]) > tokens["complement"]
    for record in read_records(folder / "cache" / "samples.jsonl"):
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
    right = ultrafeedback.right_pairs([pair], own, base)
    assert right == {"right": [0.0], "right_per_token": [1.0], "right_if_shorter": [0.0]}


def test_counts_of_people(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    methods = (
        (Method("listwise", 1e-3, 1), human_counts.ANSWER_VIEWS),
        (
            Method("complement", 1e-3, 1),
            human_counts.TOKEN_VIEWS,
        ),
    )
    monkeypatch.setattr(human_counts, "METHODS", methods)
    monkeypatch.setattr(human_counts, "SEEDS", (0,))
    options = ["--records", str(files / "counted.jsonl"), "--neutral", str(files / "neutral.jsonl"), "--held-out", "3"]
    monkeypatch.setattr(sys, "argv", ["human_counts.py", *options, "--parts", "2", "-o", str(files / "study")])
    human_counts.main()
    rows = Summary(files / "study").rows
    names = [f"{counts}-listwise-lr0.001-seed0" for counts in ("true", "shuffled", "ones")]
    names += [f"{counts}-complement-lr0.001-seed0" for counts in ("true", "merged", "ones")]
    assert set(rows) == {name + part for name in names for part in ("", "-part1", " (2 parts)")}
    true, ones = rows["true-listwise-lr0.001-seed0"], rows["ones-listwise-lr0.001-seed0"]
    assert true["items"] == 3
    assert true["loss_first"] != ones["loss_first"]
    assert true["loss_first"] != rows["true-listwise-lr0.001-seed0-part1"]["loss_first"]
    complement = [rows[f"{counts}-complement-lr0.001-seed0"]["loss_first"] for counts in ("true", "merged")]
    assert complement[0] != complement[1]
    pooled = [rows[f"{counts}-listwise-lr0.001-seed0 (2 parts)"] for counts in ("true", "ones")]
    assert (pooled[0]["items"], pooled[0]["runs"]) == (6, 2)
    assert pooled[1]["true_more"] == pytest.approx(pooled[0]["kendall_tau"] - pooled[1]["kendall_tau"])
    assert "| ones-listwise-lr0.001-seed0 |" in capsys.readouterr().out


def test_counts_merged_by_position_ignore_what_stands_before() -> None:
    answers = [([5, 6, 7], [True] * 3), ([5, 8, 7, 9], [True] * 4), ([4], [True])]
    boundary = merge_responses([1, 2], answers, [3, 1, 0], [3] * 3)
    assert boundary.tokens == [5, 6, 7, 8, 7, 9, 4]  # nodes 1 to 7; the second answer branches off node 1
    first, second, third, fourth = (
        [(4, 0, 3, 3), (5, 4, 6, 3)],
        [(6, 3, 3, 3), (8, 1, 3, 3)],
        [(7, 4, 6, 3)],
        [(9, 1, 3, 3)],
    )
    at = [first, second, third, fourth, third, fourth, [], second]
    merged = human_counts.by_position(boundary)
    assert merged.judgements == [(node, *entry) for node, entries in enumerate(at) for entry in entries]
    assert merged.tokens == boundary.tokens
    alone = merge_responses([1, 2], answers[:1], [3], [3])
    assert human_counts.by_position(alone) == alone


def test_several_seeds_are_told_as_one_beside_the_true_counts(tmp_path: Path) -> None:
    summary = Summary(tmp_path)
    drawn = {"true-a-seed0": (1, 0), "true-a-seed1": (1, 1), "ones-a-seed0": (0, 1), "ones-a-seed1": (0, 0)}
    for name, taus in {**drawn, "true-b-seed0": (1, 1)}.items():
        items = [(tau, 1.0) for tau in taus]
        columns = {"counts": name[:4], "method": "a", "precision": "float32", "neutral_drift": 0.25}
        summary.add(name, columns | human_counts.rank_columns(items))
        summary.write_cache(name, {"items": items})
    human_counts.pool(summary)
    rows = Summary(tmp_path).rows
    assert np.allclose(summary.items("true-a (2 seeds)"), [(1, 1), (0.5, 1)])
    assert set(rows) == {*drawn, "true-b-seed0", "true-a (2 seeds)", "ones-a (2 seeds)"}
    assert (rows["true-a (2 seeds)"]["kendall_tau"], rows["true-a (2 seeds)"]["runs"]) == (0.75, 2)
    (row,) = (row for row in human_counts.table(summary).splitlines() if "ones-a (2 seeds)" in row)
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
        still = Drift(0.0, 3.2, 3.2, 4.0, 4.0)
        measured = Round(0, 0.25, 0.25, 128, 0, 0, 9.6, None, {"own": still, "bundled": still})
        drift = {"own": still, "bundled": still._replace(nll=4.0123)}
        trained = replace(measured, round=rounds, loop_rate=0.02, drift=drift, rejected=len(mined))
        folder.mkdir(parents=True)
        report = {"prompts": 340, "held_out": 128, "training": {"objective": "complement", "alpha": 0.9}}
        (folder / "walk.json").write_text(json.dumps(report | {"rounds": [measured.as_json(), trained.as_json()]}))

    monkeypatch.setattr(walks, "walk", stand_in)
    monkeypatch.setattr(sys, "argv", ["walks.py", "--split", "11", "--rounds", "1", "-o", str(tmp_path)])
    walks.main()
    table = "| 11 | 0 | 25.0% |  |  |  | 10 |\n| 11 | 1 | 2.0% | +0.012 | 340 | 0 | 10 |"
    assert table in capsys.readouterr().out
    assert Summary(tmp_path).rows["split-11-round-1"]["objective"] == "complement"
    monkeypatch.setattr(walks, "walk", never)
    monkeypatch.setattr(sys, "argv", ["walks.py", "--table", "-o", str(tmp_path)])
    walks.main()
    assert table in capsys.readouterr().out
