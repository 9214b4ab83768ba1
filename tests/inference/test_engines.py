"""Engines: llama.cpp and transformers say the same, number by number, and fail clearly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from buleyean_rl.errors import EngineError, UsageError
from buleyean_rl.gguf import export_gguf
from buleyean_rl.inference import gguf_context, llama_cpp_python, llama_server
from buleyean_rl.inference import transformers_engine as in_memory
from buleyean_rl.inference.context import affordable_tokens, choose_context
from buleyean_rl.inference.gguf_engines import ENGINES, open_gguf
from buleyean_rl.inference.protocol import Answer, Engine, GgufEngine, Sampling, Unanswered
from buleyean_rl.inference.sampling import sample_token
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.gguf_header import read_header
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


GGUF_ENGINES = [  # the second is compiled for minutes
    pytest.param(name, marks=pytest.mark.slow if name == "llama-cpp-python" else []) for name in ENGINES
]


@pytest.fixture(scope="module", params=GGUF_ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    """Every engine that runs a GGUF file, by its name."""
    if request.param == "llama-cpp-python" and not llama_cpp_python.is_installed():
        pytest.skip(f"needs llama-cpp-python: {llama_cpp_python.INSTALL_HINT}")
    return request.param


@pytest.fixture(scope="module")
def llama(gguf: Path, name: str) -> Iterator[GgufEngine]:
    engine = open_gguf(gguf, name, parallel=3, context=256, threads=1, exact=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    tokenizer = tiny_tokenizer()
    return TransformersEngine(tiny_llama(tokenizer), tokenizer, batch=2, context=256)


def test_both_are_engines(llama: GgufEngine, reference: TransformersEngine) -> None:
    assert isinstance(llama, Engine)
    assert isinstance(reference, Engine)


@pytest.mark.parametrize("parse_special", [True, False])
def test_same_token_ids(llama: GgufEngine, reference: TransformersEngine, parse_special: bool) -> None:
    for text in [*TEXTS, "", "<|im_end|> x"]:
        expected = reference.tokenize(text, parse_special=parse_special)
        assert llama.tokenize(text, parse_special=parse_special) == expected
    assert (len(llama.tokenize("<|im_end|>", parse_special=parse_special)) == 1) is parse_special


def test_same_prompt(llama: GgufEngine, reference: TransformersEngine) -> None:
    assert llama.render(ASK) == reference.render(ASK)
    assert llama.render(ASK, add_generation_prompt=False) == reference.render(ASK, add_generation_prompt=False)
    assert llama.prompt_ids(ASK) == reference.prompt_ids(ASK)


def test_same_next_token_log_probabilities(llama: GgufEngine, reference: TransformersEngine) -> None:
    ids = llama.tokenize(TEXTS[0])
    actual, expected = llama.top_logprobs(ids, 5), reference.top_logprobs(ids, 5)
    assert list(actual) == list(expected)
    assert list(actual.values()) == pytest.approx(list(expected.values()), abs=1e-3)
    whole = llama.top_logprobs(ids, 1000)
    assert sum(map(math.exp, whole.values())) == pytest.approx(1, abs=1e-4)


def test_same_log_probability_of_every_token(llama: GgufEngine, reference: TransformersEngine) -> None:
    sequences = [llama.tokenize(text) for text in TEXTS]
    sequences[0].append(llama.tokenize("<|im_end|>")[0])  # the end of an answer can be scored too
    actual, expected = llama.logprobs(sequences), reference.logprobs(sequences)
    assert [len(f) for f in actual] == [len(s) - 1 for s in sequences]
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_same_greedy_answers(llama: GgufEngine, reference: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=4)
    words = (
        "Hello!",
        "1",
        "fox",
        "dog",
        "Paris",
        "help",
        "mind",
        "tips",
        "lazy",
        "quick",
        "two",
        "phone",
        "jumps",
        "over",
    )
    conversations = [ASK, *([{"role": "user", "content": word}] for word in words)]
    answers = reference.complete_many(conversations, sampling)
    # a random model says bytes that make no character; llama-cpp-python leaves those out
    indices = [i for i, answer in enumerate(answers) if "\N{REPLACEMENT CHARACTER}" not in answer]
    assert len(indices) >= 4
    conversations, expected = [conversations[i] for i in indices], [answers[i] for i in indices]
    counts: list[int] = []
    assert llama.complete_many(conversations, sampling, counts.append) == expected
    assert sorted(counts) == list(range(1, len(indices) + 1))
    for conversation, answer in zip(conversations[:2], expected, strict=False):
        assert "".join(llama.generate(conversation, sampling)) == answer
        assert "".join(reference.generate(conversation, sampling)) == answer


@pytest.fixture(params=[*GGUF_ENGINES, "transformers"])
def engine(request: pytest.FixtureRequest, gguf: Path, reference: TransformersEngine) -> Iterator[Engine]:
    if request.param == "transformers":
        yield reference
        return
    if request.param == "llama-cpp-python" and not llama_cpp_python.is_installed():
        pytest.skip(f"needs llama-cpp-python: {llama_cpp_python.INSTALL_HINT}")
    with closing(open_gguf(gguf, request.param, context=256, threads=1)) as opened:
        yield opened


def test_the_output_head_gets_contiguous_rows() -> None:
    """After a prompt they are slices of all its states, and torch copies a bf16 weight for every one of them."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    together: list[bool] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: together.append(inputs[0].is_contiguous()))
    TransformersEngine(model, tokenizer).complete_many([ASK, ASK[:1] * 3], Sampling(max_tokens=2))
    assert together
    assert all(together)
    hook.remove()
    assert not model.lm_head._forward_pre_hooks


def test_a_long_prompt_makes_its_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a batch has room for the longest prompt: 64 of them beside one of 1,500 tokens took 7 GB."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    engine, sampling = TransformersEngine(model, tokenizer, batch=8), Sampling(max_tokens=4)
    conversations = [[{"role": "user", "content": "word " * words}] for words in (30, 1, 60, 2, 3)]
    expected = engine.complete_many(conversations, sampling)
    longest = len(engine.prompt_ids(conversations[2]))
    monkeypatch.setattr(in_memory, "MAX_BATCH_TOKENS", longest + sampling.max_tokens - 1)  # a row alone may pass it
    shapes: list[tuple[int, int]] = []
    continue_batch = engine._continue_batch
    monkeypatch.setattr(
        engine,
        "_continue_batch",
        lambda prompts, *rest: shapes.append((len(prompts), len(prompts[-1]))) or continue_batch(prompts, *rest),
    )
    assert engine.complete_many(conversations, sampling) == expected
    assert sum(rows for rows, _ in shapes) == 5
    assert shapes[-1] == (1, longest)
    assert all(rows == 1 or rows * (width + 4) < longest + 4 for rows, width in shapes)


@pytest.mark.parametrize(("top_p", "expected"), [(1.0, [0.5, 0.3, 0.2]), (0.7, [0.625, 0.375, 0.0])])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_frequencies_are_their_probabilities(top_p: float, expected: list[float], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, sampling = torch.tensor([0.5, 0.3, 0.2]).log() + 7, Sampling(1, temperature, top_p)
    drawn = torch.tensor([sample_token(logits, sampling, generator) for _ in range(4000)])
    weights = torch.tensor(expected) ** (1 / temperature)
    assert torch.allclose(drawn.bincount(minlength=3) / 4000, weights / weights.sum(), atol=0.025)  # 3 standard errors


def test_sampling_repeats_with_its_seed(engine: Engine) -> None:
    drawn = ["".join(engine.generate(ASK, Sampling(max_tokens=16, temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stop_text_ends_the_answer_and_is_left_out(engine: Engine) -> None:
    whole = "".join(engine.generate(ASK, Sampling(max_tokens=12)))
    stop = whole[4:7]
    cut = "".join(engine.generate(ASK, Sampling(max_tokens=12, stop=(stop,))))
    assert cut == whole[: whole.index(stop)]


def test_closing_an_answer_leaves_the_engine_usable(llama: GgufEngine) -> None:
    answer = llama.generate(ASK, Sampling(max_tokens=200))
    next(answer)
    answer.close()
    assert llama.complete_many([ASK], Sampling(max_tokens=4))[0]


def test_is_end_token(llama: GgufEngine) -> None:
    assert llama.is_end_token(llama.tokenize("<|im_end|>")[0])
    assert not llama.is_end_token(llama.tokenize("a")[0])


CONTEXT = 512  # of the tiny model
LONG = [{"role": "user", "content": "word " * 400}]


def test_a_conversation_longer_than_the_context(engine: Engine) -> None:
    """It is left out among many, alone an error; one that almost fills the context has a short answer."""
    first, long, last = engine.answer_many([ASK, LONG, ASK], Sampling(max_tokens=2))
    assert isinstance(first, Answer)
    assert first[:3] == last[:3]
    assert isinstance(long, Unanswered)
    assert long.cause == "longer than the context"
    with pytest.raises(EngineError, match=r"has [\d,]+ tokens and the context holds 256"):
        list(engine.generate(LONG))
    with pytest.raises(EngineError, match="the context holds 256"):
        engine.complete_many([LONG])
    size = len(engine.prompt_ids(ASK))
    filler = [{"role": "user", "content": ASK[0]["content"] + " a" * (250 - size)}]
    free = 256 - len(engine.prompt_ids(filler))
    (short,) = engine.answer_many([filler], Sampling(max_tokens=100))
    assert isinstance(short, Answer)
    assert 0 < free < 20
    assert len("".join(engine.generate(filler, Sampling(max_tokens=100)))) > 0
    assert short.tokens is not None
    assert short.tokens <= free
    assert short.ended is (short.tokens < free)


def test_the_tokens_that_were_drawn_are_the_answer(gguf: Path, reference: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=3, logprobs=True)
    with closing(open_gguf(gguf, "xllamacpp", parallel=2, context=256, threads=1, exact=True)) as engine:
        for each in (engine, reference):
            counted: list[int] = []
            for _, outcome in each.answers([ASK, ASK[:1]], sampling, on_tokens=counted.append):
                assert isinstance(outcome, Answer)
                assert outcome.token_ids is not None
                assert outcome.tokens == len(outcome.token_ids) <= 6
                assert reference.tokenizer.decode(outcome.token_ids) == outcome.text or "\ufffd" in outcome.text
                prompt = reference.prompt_ids(ASK)
                (expected,) = reference.logprobs([[*prompt, *outcome.token_ids]], [len(prompt)])
                assert outcome.logprobs == pytest.approx(expected, abs=1e-3)
            assert sum(counted) >= 2


def test_tokens_under_way_are_counted(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "POLL_SECONDS", 0.001)
    counted: list[int] = []
    with closing(open_gguf(gguf, "xllamacpp", parallel=2, context=500, threads=1)) as engine:
        asked = [ASK] * 40  # one alone may be done between two looks
        outcomes = [answer for _, answer in engine.answers(asked, Sampling(400), on_tokens=counted.append)]
    total = sum(outcome.tokens or 0 for outcome in outcomes if isinstance(outcome, Answer))
    assert total <= sum(counted) <= total + len(asked)  # an end token is counted while it is under way
    assert len(counted) > len(asked)


def test_conversations_wait_for_room_in_the_cache(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one conversation at full length: eight are asked at once, and all are answered."""
    monkeypatch.setattr(gguf_context, "affordable_tokens", lambda *_: 256)
    asked = [[{"role": "user", "content": f"{number} " * 60}] for number in range(8)]
    with closing(open_gguf(gguf, "xllamacpp", parallel=8, threads=1)) as engine:
        assert engine.context == 256  # type: ignore[attr-defined]
        assert all(isinstance(outcome, Answer) for outcome in engine.answer_many(asked, Sampling(max_tokens=8)))


def test_the_context_is_the_models_own_as_memory_allows(gguf: Path) -> None:
    header = read_header(gguf)
    assert gguf_context.gguf_context(header, None, exact=False, parallel=2) == (CONTEXT, 2 * CONTEXT)
    assert gguf_context.gguf_context(header, 99, exact=False) == (99, 99)
    assert gguf_context.gguf_context(header, 10**9, exact=False) == (CONTEXT, CONTEXT)
    assert choose_context(None, 8192, affordable_tokens(1000, 2_000_000)) == 1000
    assert choose_context(None, 8192, affordable_tokens(10**9, 0)) == 512
    with pytest.raises(UsageError, match="at least 2"):
        choose_context(1, 8192, 8192)


def test_messages_that_the_template_refuses_are_left_out(reference: TransformersEngine) -> None:
    tokenizer = tiny_tokenizer()
    refusal = "{% if 'brief' in messages[-1].content %}{{ raise_exception('not so') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    engine = TransformersEngine(reference.model, tokenizer)
    brief = [*ASK[:-1], {"role": "user", "content": "Be brief."}]
    refused, answered = engine.answer_many([brief, ASK], Sampling(max_tokens=2))
    assert isinstance(refused, Unanswered)
    assert refused.cause == "refused"
    assert "not so" in refused.detail
    assert isinstance(answered, Answer)


def test_llama_cpp_prints_nothing(gguf: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    engine = open_gguf(gguf, name, context=64, threads=1)
    engine.complete_many([ASK], Sampling(max_tokens=2))
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_an_unused_engine_can_be_closed(gguf: Path, name: str) -> None:
    for _ in range(10):
        open_gguf(gguf, name, context=64, threads=1).close()


def test_a_closed_engine_is_an_error(gguf: Path, name: str) -> None:
    engine = open_gguf(gguf, name, context=64, threads=1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.tokenize("a")


def test_files_that_are_not_models_are_refused(tmp_path: Path, name: str) -> None:
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
            open_gguf(path, name)


@pytest.mark.parametrize("size", [24, 9000])
def test_a_truncated_file(gguf: Path, name: str, tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[:size])
    with pytest.raises(EngineError, match="cut short or damaged"):
        open_gguf(short, name)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(EngineError, match="no chat template"):
        TransformersEngine(tiny_llama(tokenizer), tokenizer).render(ASK)


def test_an_unknown_engine_is_refused_with_the_choices(gguf: Path) -> None:
    with pytest.raises(UsageError, match="unknown engine 'ollama'; there are xllamacpp and llama-cpp-python"):
        open_gguf(gguf, "ollama")


def test_a_missing_extra_is_an_error_with_the_command(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_python, "is_installed", lambda: False)
    with pytest.raises(EngineError, match="not installed: pip install llama-cpp-python"):
        open_gguf(gguf, "llama-cpp-python")
