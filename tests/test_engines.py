"""Engines: llama.cpp and transformers say the same, number by number, and fail clearly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from buleyean_rl.engines import Engine, LlamaCppEngine, Sampling, TransformersEngine, neutral_nll
from buleyean_rl.errors import EngineError
from buleyean_rl.gguf_export import export_gguf
from tiny import tiny_llama, tiny_tokenizer

ASK = [{"role": "user", "content": "How do you handle conflict?"}]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Déjà vu, 漢字 🙂 and 10 tips.", "a"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp32: llama.cpp computes it as exactly as transformers does."""
    path = tmp_path_factory.mktemp("engines") / "tiny.gguf"
    tokenizer = tiny_tokenizer()
    export_gguf(tiny_llama(tokenizer), tokenizer, path, "f32", gate=False)
    return path


@pytest.fixture(scope="module")
def llama(gguf: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(gguf, parallel=3, context=256, threads=1, exact=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    tokenizer = tiny_tokenizer()
    return TransformersEngine(tiny_llama(tokenizer), tokenizer, batch=2)


def test_both_are_engines(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    assert isinstance(llama, Engine)
    assert isinstance(reference, Engine)


@pytest.mark.parametrize("parse_special", [True, False])
def test_same_token_ids(llama: LlamaCppEngine, reference: TransformersEngine, parse_special: bool) -> None:
    for text in [*TEXTS, "", "<|im_end|> x"]:
        expected = reference.tokenize(text, parse_special=parse_special)
        assert llama.tokenize(text, parse_special=parse_special) == expected
    assert (len(llama.tokenize("<|im_end|>", parse_special=parse_special)) == 1) is parse_special


def test_same_prompt(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    assert llama.render(ASK) == reference.render(ASK)
    assert llama.render(ASK, add_generation_prompt=False) == reference.render(ASK, add_generation_prompt=False)
    assert llama.prompt_ids(ASK) == reference.prompt_ids(ASK)


def test_same_next_token_log_probabilities(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    ids = llama.tokenize(TEXTS[0])
    found, expected = llama.top_logprobs(ids, 5), reference.top_logprobs(ids, 5)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-3)
    whole = llama.top_logprobs(ids, 1000)
    assert sum(map(math.exp, whole.values())) == pytest.approx(1, abs=1e-4)


def test_same_log_probability_of_every_token(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    sequences = [llama.tokenize(text) for text in TEXTS]
    sequences[0].append(llama.tokenize("<|im_end|>")[0])  # the end of an answer can be scored too
    found, expected = llama.logprobs(sequences), reference.logprobs(sequences)
    assert [len(f) for f in found] == [len(s) - 1 for s in sequences]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_neutral_nll_adds_up(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    nats, tokens = neutral_nll(llama, TEXTS)
    expected_nats, expected_tokens = neutral_nll(reference, TEXTS)
    assert tokens == expected_tokens
    assert nats == pytest.approx(expected_nats, abs=1e-2)


def test_same_greedy_answers(llama: LlamaCppEngine, reference: TransformersEngine) -> None:
    conversations = [ASK, [{"role": "user", "content": "Hello!"}], [{"role": "user", "content": "1 2 3"}]]
    counts: list[int] = []
    sampling = Sampling(max_tokens=12)
    answers = llama.complete_many(conversations, sampling, counts.append)
    assert sorted(counts) == [1, 2, 3]
    assert answers == reference.complete_many(conversations, sampling)
    assert answers[0] == "".join(llama.generate(ASK, sampling)) == "".join(reference.generate(ASK, sampling))


@pytest.mark.parametrize("name", ["llama", "reference"])
def test_sampling_repeats_with_its_seed(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)
    drawn = ["".join(engine.generate(ASK, Sampling(max_tokens=16, temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["llama", "reference"])
def test_stop_text_ends_the_answer_and_is_left_out(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)
    whole = "".join(engine.generate(ASK, Sampling(max_tokens=12)))
    stop = whole[4:7]
    cut = "".join(engine.generate(ASK, Sampling(max_tokens=12, stop=(stop,))))
    assert cut == whole[: whole.index(stop)]


def test_closing_an_answer_leaves_the_engine_usable(llama: LlamaCppEngine) -> None:
    answer = llama.generate(ASK, Sampling(max_tokens=200))
    next(answer)
    answer.close()
    assert llama.complete_many([ASK], Sampling(max_tokens=4))[0]


def test_ends_at(llama: LlamaCppEngine) -> None:
    assert llama.ends_at(llama.tokenize("<|im_end|>")[0])
    assert not llama.ends_at(llama.tokenize("a")[0])


def test_a_conversation_longer_than_the_context(llama: LlamaCppEngine) -> None:
    with pytest.raises(EngineError, match=r"has \d+ tokens and the context holds 256"):
        list(llama.generate([{"role": "user", "content": "word " * 400}]))


def test_an_error_in_one_of_many_is_raised(llama: LlamaCppEngine) -> None:
    with pytest.raises(EngineError, match="context"):
        llama.complete_many([ASK, [{"role": "user", "content": "word " * 400}], ASK], Sampling(max_tokens=2))


def test_nothing_of_llama_cpp_reaches_the_terminal(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = LlamaCppEngine(gguf, context=64, threads=1)
    engine.complete_many([ASK], Sampling(max_tokens=2))
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_an_engine_that_was_never_asked_can_be_closed(gguf: Path) -> None:
    for _ in range(10):
        LlamaCppEngine(gguf, context=64, threads=1).close()


def test_a_closed_engine_says_so(gguf: Path) -> None:
    engine = LlamaCppEngine(gguf, context=64, threads=1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.tokenize("a")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    version = tmp_path / "version.gguf"
    version.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + b"\0" * 64)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for path, problem in (
        (tmp_path / "missing.gguf", "no such file"),
        (tmp_path, "is not a file"),
        (text, "is not a GGUF file"),
        (empty, "is not a GGUF file"),
        (version, "version 99"),
    ):
        with pytest.raises(EngineError, match=problem):
            LlamaCppEngine(path)


@pytest.mark.parametrize("kept", [24, 200, 9000, -1000])
def test_a_truncated_file(gguf: Path, tmp_path: Path, kept: int, capfd: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[:kept])
    with pytest.raises(EngineError, match="cut short or damaged"):
        LlamaCppEngine(short)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(EngineError, match="no chat template"):
        TransformersEngine(tiny_llama(tokenizer), tokenizer).render(ASK)
