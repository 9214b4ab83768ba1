"""The whole evaluation of tiny models: against plain log-softmaxes, in both directions, of runs and GGUF files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from buleyean_rl import demo_data
from buleyean_rl.cli import main
from buleyean_rl.data.answer_text import AnswerText
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.importers import Preference, Preferences
from buleyean_rl.errors import RecordError, UsageError
from buleyean_rl.evaluation.forest_plot import is_our_plot
from buleyean_rl.evaluation.kept_answers import kept_answers, unchanged_share
from buleyean_rl.evaluation.measure import Material, evaluate
from buleyean_rl.evaluation.measured_model import Settings
from buleyean_rl.evaluation.neutral_text import Passage
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.evaluation.scoring import EngineScorer, PackedScorer
from buleyean_rl.evaluation.show import as_json, is_evaluation
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import resolve
from loads import counting_loads
from tiny import SENTENCES, tiny_llama, tiny_run, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTIONS = (
    Preference("How do you handle conflict?", ("Ignore it.", "Ignore the friend.", "Talk."), (3, 1, 0), 3),
    Preference("Capital?", ("Paris", "Paris of France", "dog"), (0, 2, 1), 3),
    Preference((("system", "Be kind."), ("user", "Tips?")), ("Sleep.", "Phone"), (0, 3), 3),
)
KEYS = (
    "pairs accuracy accuracy_ci accuracy_vs_reference accuracy_length_matched kendall_tau ndcg rejected_nll "
    "neutral_nll neutral_kl loop_rate distinct_4 mean_length ended_share entropy"
)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"), base)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_cache: Callable[[Path], None]) -> None:
    """The tiny models are compared number by number."""
    for module in ("model", "placement"):
        monkeypatch.setattr(f"buleyean_rl.models.{module}.preferred_dtype", lambda *_: torch.float32)
    use_cache(tmp_path / "cache")


def in_memory(module: Any) -> Model:
    return Model.from_module(module, TOKENIZER)


def plain_nats(prompt: Any, answer: str) -> tuple[float, int]:
    (question,) = Encoder(TOKENIZER).encode([(prompt, [AnswerText(answer)])])
    before, ids = question.prompt.ids, question.answers[0].ids
    with torch.no_grad():
        log_pi = tiny_llama(TOKENIZER)(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    return -sum(log_pi[len(before) + k - 1, token].item() for k, token in enumerate(ids)), len(ids)


def test_packed_scores_are_those_of_single_answers() -> None:
    questions = [(question.prompt, question.answers) for question in QUESTIONS]
    counts: list[int] = []
    packed = PackedScorer(in_memory(tiny_llama(TOKENIZER)), 256).answers(questions, counts.append)
    slow = EngineScorer(TransformersEngine(tiny_llama(TOKENIZER), TOKENIZER), 256).answers(questions)
    assert counts[-1] == len(questions)
    for scores, others, (prompt, answers) in zip(packed, slow, questions, strict=True):
        for score, other, answer in zip(scores, others, answers, strict=True):
            nats, tokens = plain_nats(prompt, answer)
            assert (score.nats, score.tokens) == (pytest.approx(nats, rel=1e-4), tokens)
            assert (other.nats, other.tokens) == (pytest.approx(nats, rel=1e-4), tokens)
            assert score.reference_nats is None
            assert not score.cut


def test_the_base_of_a_peft_model_is_scored_with_reference() -> None:
    model = in_memory(attach_lora(tiny_llama(TOKENIZER), lora_config(4, 8, 0.0, None)).eval())
    questions = [("Tips?", ("Sleep well.",))]
    ((both,),) = PackedScorer(model, 256).answers(questions)
    ((alone,),) = PackedScorer(model, 256, with_reference=False).answers(questions)
    assert both.reference_nats == pytest.approx(both.nats)  # a fresh adapter does nothing
    assert (alone.nats, alone.reference_nats) == (pytest.approx(both.nats), None)


def test_max_length_truncates_answers() -> None:
    questions = [("Tips?", ("Sleep well and leave the phone.", "No"))]
    room = Encoder(TOKENIZER).encode_prompts(["Tips?"])[0].length
    scorer = PackedScorer(in_memory(tiny_llama(TOKENIZER)), room + 2)
    ((long, short),) = scorer.answers(questions)
    assert (long.tokens, long.cut) == (2, True)
    assert short.tokens <= 2
    ((none, _),) = PackedScorer(in_memory(tiny_llama(TOKENIZER)), room).answers(questions)
    assert (none.tokens, none.nats) == (0, 0.0)


def test_a_run_beside_its_base(base: Path, run: Path) -> None:
    material = Material(Preferences("candidates", QUESTIONS), texts={"neutral": SENTENCES[:4]}, passages=2)
    trained, plain = (evaluate(str(name), material) for name in (run, base))
    assert trained.reference == str(base)
    # what the run calls its reference is what the base says of itself
    for name in ("accuracy", "rejected_nll", "neutral_nll"):
        expected = plain.figures[name].value
        assert trained.figures[f"{name}_reference"].value == pytest.approx(expected, rel=1e-4)
        assert f"{name}_reference" not in plain.figures
    assert (trained.figures["neutral_kl"].value or 0.0) > 0
    assert "neutral_kl" not in plain.figures
    for kind in ("own_", ""):  # the entropies of neutral texts have no prefix
        expected = plain.figures[f"{kind}entropy"].value
        assert trained.figures[f"{kind}entropy_reference"].value == pytest.approx(expected, rel=1e-4)
    assert (trained.figures["own_kl"].value or 0.0) > 0
    by_reference = evaluate(str(base), material, reference=str(base))
    assert by_reference.figures["accuracy_vs_reference"].value == 0.5  # log pi/pi_ref is 0 everywhere: ties
    with pytest.raises(UsageError, match="whose reference is its base"):
        evaluate(str(run), material, reference=str(base))


def test_a_base_is_loaded_once_for_itself_and_its_runs(
    base: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--neutral", "bundled", "--prompts", "bundled", "--limit", "2", "--max-tokens", "4"]
    with counting_loads(monkeypatch) as loaded:
        assert main(["evaluate", str(run), "--compare", str(base), "--compare", str(run), *words]) == 0
    assert len(loaded) == 1, capsys.readouterr().err


def test_answers_to_keep_are_those_of_the_base_that_do_not_loop(base: Path, run: Path) -> None:
    prompts = ("Tips?", "Hello", "Capital?")
    model = open_model(resolve(str(base)).with_adapter(run), keep_adapter=True)
    kept = kept_answers(model, prompts, 6, None, Console(quiet=True))
    engine = TransformersEngine(open_model(str(base)).plain, TOKENIZER)
    for prompt, passage in zip(prompts, kept, strict=True):
        conversation = [{"role": "user", "content": prompt}]
        ids, (answer,) = engine.prompt_ids(conversation), engine.answer_many([conversation], Sampling(max_tokens=6))
        assert isinstance(answer, Answer)
        if passage.ids:
            assert passage.ids == [*ids, *(answer.token_ids or ())]
            assert passage.start == len(ids)
        else:
            assert not answer.token_ids or is_looping(answer.text)
    assert any(passage.ids for passage in kept)
    material, settings = Material(prompts=prompts), Settings(samplings=(Sampling(max_tokens=6),))
    figures = evaluate(str(run), material, settings).figures
    assert (figures["kept_kl"].value or 0.0) > 0
    assert figures["kept_share"].items[:, 1].sum() == sum(bool(passage.ids) for passage in kept)
    assert not any(name.startswith("kept") for name in evaluate(str(base), material, settings).figures)


def test_what_share_of_answers_begins_as_the_base() -> None:
    kept = [Passage([1, 7, 8], 1), Passage([1, 7, 8], 1), Passage([]), Passage([1, 7], 1)]
    outcomes = [
        Answer("a", 2, True, (7, 8)),
        Answer("a", 2, True, (7, 9)),
        Answer("a", 1, True, (7,)),
        Answer("a", 1, True),
    ]
    assert unchanged_share(kept, outcomes).items.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    long = [1, *range(40)]
    begun = [Answer("a", 33, False, (*range(32), 99))]
    assert unchanged_share([Passage(long, 1)], begun).value == 1


def test_answers_are_drawn_in_every_way(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompts", "bundled", "--limit", "3", "--json", "-"]
    ways = ["--max-tokens", "4", "--max-tokens", "9", "--temperature", "0", "--temperature", "0.8"]
    assert main(["evaluate", str(base), *words, *ways]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    suffixes = ("", "_t0_9", "_t0.8_4", "_t0.8_9")
    lengths = [result[f"mean_length{suffix}"] for suffix in suffixes]
    assert lengths[0] <= 4 < lengths[1]
    assert lengths[2] <= 4 < lengths[3]
    for name in ("loop_rate", "ended_share", "distinct_4"):
        assert all(f"{name}{suffix}" in result for suffix in suffixes)
    assert "at temperature 0.8, 9 tokens" in err
    assert main(["evaluate", str(base), *words, *ways[:2]]) == 0
    assert json.loads(capsys.readouterr().out)["mean_length"] == lengths[0]


def test_bundled_texts_are_beside_those_of_a_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("A plain text.\nAnd another.\n")
    assert main(["evaluate", str(base), "--neutral", str(tmp_path / "t.txt"), "--limit", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len({result["own_nll"], result["bundled_nll"], result["neutral_nll"]}) == 3


def test_accuracies_of_swapped_pairs_are_mirrored(run: Path) -> None:
    turned = tuple(
        Preference(q.prompt, q.answers, tuple(q.rounds - v for v in q.rejections), q.rounds) for q in QUESTIONS
    )
    there, back = (evaluate(str(run), Material(Preferences("candidates", items))) for items in (QUESTIONS, turned))
    for name in ("accuracy", "accuracy_vs_reference", "accuracy_length_matched"):
        one, other = there.figures[name].value, back.figures[name].value
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one == pytest.approx(1 - other)
    assert there.figures["kendall_tau"].value == pytest.approx(-(back.figures["kendall_tau"].value or 0.0))


def test_a_gguf_file_and_its_model(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    export_gguf(tiny_llama(TOKENIZER), TOKENIZER, path, "f32", gate=False)
    material = Material(
        Preferences("candidates", QUESTIONS), texts={"neutral": SENTENCES[:2]}, passages=2, prompts=("Tips?",)
    )
    settings = Settings(samplings=(Sampling(max_tokens=4),))
    expected = as_json([evaluate(str(base), material, settings)])
    quick = as_json([evaluate(str(path), material, settings)])
    slow = as_json([evaluate(str(path), material, Settings(samplings=(Sampling(max_tokens=4),), engine="llama.cpp"))])
    for name in ("accuracy", "kendall_tau", "ndcg", "rejected_nll", "neutral_nll", "mean_length", "ended_share"):
        assert quick[name] == pytest.approx(expected[name], rel=2e-3), name
        assert slow[name] == pytest.approx(expected[name], rel=2e-3), name
    assert quick["entropy"] == pytest.approx(expected["entropy"], rel=1e-3)
    assert slow["entropy"] is None
    assert any("no full distributions" in note for note in slow["notes"])


def test_regenerated_rejections_are_recognised(base: Path) -> None:
    answers = TransformersEngine(tiny_llama(TOKENIZER), TOKENIZER).complete_many(
        [[{"role": "user", "content": "Tips?"}]]
    )
    records = Preferences("records", (Preference("Tips?", (answers[0], "x"), (1, 1), 1),))
    result = evaluate(str(base), Material(records=records), Settings(samplings=(Sampling(max_tokens=256),)))
    assert result.figures["regeneration_prefix"].value == 1
    assert result.figures["regeneration_overlap"].value == 1


def test_the_command(base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": s, "chosen": "Talk.", "rejected": "Ignore it."} for s in SENTENCES[:4]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture, file = tmp_path / "e.png", tmp_path / "e.json"
    words = ["evaluate", str(run), "--pairs", str(pairs), "--neutral", "bundled", "--prompts", "bundled"]
    words += ["--limit", "3", "--max-tokens", "4", "--compare", str(base)]
    assert main([*words, "--json", str(file), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "pairs ranked right" in err
    assert f"{run} against {base}: " in err.splitlines()[-2]
    assert err.splitlines()[-1].startswith("Next: ")
    result = json.loads(file.read_text())
    assert set(KEYS.split()) <= result.keys()
    assert result["pairs"] == 3
    assert result["kendall_tau"] is None  # a pair has no counts
    assert result["neutral_kl"] > 0
    (other,) = result["compare"]
    expected = result["neutral_nll"] - other["neutral_nll"]
    assert other["differences"]["neutral_nll"]["difference"] == pytest.approx(expected)
    low, high = other["differences"]["neutral_nll"]["interval"]
    assert low <= expected <= high
    assert picture.stat().st_size > 10_000
    assert is_our_plot(picture)
    assert is_evaluation(file)
    assert main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == result  # again, the same


def test_bundled_data_is_the_default(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(base), "--limit", "2", "--max-tokens", "3", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert all(line.strip() for line in err.splitlines())  # a bar that cannot move would leave empty lines
    result = json.loads(out)
    assert result["pairs"] is result["accuracy"] is None
    texts = [TOKENIZER(text).input_ids for text in demo_data.neutral_texts()[:2]]
    assert result["counts"]["neutral_tokens"] == sum(map(len, texts)) - 2
    assert result["mean_length"] <= 3


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--json", "nowhere/e.json"], 2, "create the folder"),
        (["--plot", "e.txt"], 2, "end it in .png"),
        (["--pairs", "missing.jsonl"], 1, "missing.jsonl: no such file"),
        (["--neutral", "missing.txt"], 1, "no such file"),
    ],
)
def test_bad_requests(words: list[str], code: int, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "smollm2-135m", *words]) == code
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_of_somebody_else_stays(
    option: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs := tmp_path / "figure.png").write_bytes(b'{"model": "theirs"}')
    words = ["evaluate", str(base), "--limit", "1", "--max-tokens", "1", option, str(theirs)]
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert theirs.read_bytes() == b'{"model": "theirs"}'
    assert main([*words, "--overwrite"]) == 0
    assert main(words) == 0  # its own file


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_pipe_is_written_into(option: str, base: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.png")
    with ThreadPoolExecutor() as pool:
        content = pool.submit(pipe.read_bytes)
        assert main(["evaluate", str(base), "--limit", "1", "--max-tokens", "1", option, str(pipe)]) == 0
        assert content.result(timeout=10).startswith(b"{" if option == "--json" else b"\x89PNG")
    assert pipe.is_fifo()


def test_texts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n{"content": "three"}\n')
    assert read_texts(tmp_path / "a.txt") == ("one", "two")
    assert read_texts(tmp_path / "a.jsonl", 1) == ("one\ntwo",)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(RecordError, match=r"bad\.jsonl:2: text is the number 3"):
        read_texts(tmp_path / "bad.jsonl")
