"""Names to engines: what runs what, and what the answers depend on."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from buleyean_rl.errors import EngineError, ModelError, UsageError
from buleyean_rl.inference.endpoint import EndpointEngine
from buleyean_rl.inference.open import answers_key, describe_policy, is_endpoint, locate, open_engine
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.run import train
from standin import standing_in

QUESTION = [[{"role": "user", "content": "Give me a tip."}]]


@pytest.fixture(scope="module")
def run(base: Path, rejections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a few large steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(rejections, str(base), BuleyeanConfig(output_dir=str(folder), max_steps=6, learning_rate=2e-2, guard=False))
    return folder


def test_a_folder_and_a_run_open_in_memory_and_differ(base: Path, run: Path) -> None:
    answers = []
    for name in (base, run):
        with closing(open_engine(str(name))) as engine:
            assert isinstance(engine, TransformersEngine)
            answers.append(engine.complete_many(QUESTION, Sampling(max_tokens=12)))
    assert answers[0] != answers[1]
    assert answers_key(str(base)) != answers_key(str(run)) == answers_key(str(run))
    assert describe_policy(locate(str(base))) == {"model": base.name}
    assert describe_policy(locate(str(run))) == {"model": base.name, "adapter": "run"}


def test_a_url_is_an_endpoint() -> None:
    with standing_in() as server:
        with closing(open_engine(server.url)) as engine:
            assert isinstance(engine, EndpointEngine)
        with pytest.raises(UsageError, match="leave --engine out"):
            open_engine(server.url, "transformers")
        assert answers_key(server.url) == server.url
    assert not is_endpoint("owner/name")


def test_a_key_is_sent_to_its_own_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULEYEAN_API_KEY", "secret")
    with standing_in() as server, standing_in() as other:
        for key_url in (None, server.url + "#another", other.url, "a/folder"):
            with closing(open_engine(server.url, key_url=key_url)) as engine:
                engine.complete_many(QUESTION)
    assert server.keys == ["Bearer secret", "Bearer secret", None, None]


def test_an_endpoint_has_its_own_context_and_no_secret_in_its_address() -> None:
    with pytest.raises(UsageError, match="leave --context out"):
        open_engine("http://127.0.0.1:9/v1", context=99)
    with pytest.raises(UsageError, match="a key belongs in the environment"):
        locate("https://user:secret@host/v1")


@pytest.mark.parametrize(
    ("name", "kind", "error", "problem"),
    [
        ("{base}", "vllm", UsageError, "no engine 'vllm'"),
        ("{base}", "llama.cpp", UsageError, "buleyean export"),
        ("{run}", "llama.cpp", UsageError, "buleyean export"),
        ("nonsense", "auto", ModelError, "unknown model"),
        ("{fake}.gguf", "auto", EngineError, "fake.gguf"),
    ],
)
def test_models_that_an_engine_cannot_run_are_refused(
    base: Path, run: Path, tmp_path: Path, name: str, kind: str, error: type[Exception], problem: str
) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    with pytest.raises(error, match=problem):
        open_engine(name.format(base=base, run=run, fake=tmp_path / "fake"), kind)


def test_sampled_answers_do_not_depend_on_their_batch(base: Path) -> None:
    conversations = [[{"role": "user", "content": f"Give me tip {number}."}] for number in range(6)]
    sampling = Sampling(max_tokens=12, temperature=0.9, seed=3)
    engine = open_engine(str(base))
    assert isinstance(engine, TransformersEngine)
    engine.model.float()  # in bf16 the width of a batch may change last digits
    together = engine.complete_many(conversations, sampling)
    alone = [
        "".join(engine.generate(messages, Sampling(max_tokens=12, temperature=0.9, seed=3 + i)))
        for i, messages in enumerate(conversations)
    ]
    assert together == alone
    assert len(set(together)) == 6
