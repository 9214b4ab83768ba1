"""Settings of every test, and a tiny base model with rejections of its own answers to train on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported: a test that reaches out fails
os.environ["OMP_NUM_THREADS"] = "1"  # in models this small, threads only wait for each other
import torch  # after that

from buleyean_rl.kernels import abi, build
from buleyean_rl.system.cache import cache_folder
from marks import needs_c

GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.is_available = lambda: False  # tests are of a CPU, but for those that ask for `gpu`
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels run on the CPU

settings.register_profile("calm", deadline=None, max_examples=60, derandomize=True)  # machines are busy
settings.load_profile("calm")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has a GPU, and a run goes there unless told otherwise."""
    if not GPU:
        pytest.skip("no CUDA here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(params=[pytest.param(name, marks=needs_c) for name in build.instruction_sets()])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels as on this processor, and as on those that have less; which instruction set."""
    flags = build.hiding_flags(request.param, build.instruction_sets())
    monkeypatch.setenv("BULEYEAN_KERNEL_FLAGS", " ".join([os.environ.get("BULEYEAN_KERNEL_FLAGS", ""), *flags]))
    forget_kernels()
    assert build.status().instruction_set == request.param
    yield request.param
    forget_kernels()


@pytest.fixture
def kernels() -> None:
    """The C kernels are used, as on this processor."""
    if build.status().problem is not None:
        pytest.skip(f"no kernels: {build.status().problem}")


def forget_kernels() -> None:
    """Load them anew when they are next used."""
    build.load.cache_clear()
    abi.library.cache_clear()


@pytest.fixture
def use_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Switch to another cache folder that has the compiled kernels, which would take seconds to build again."""
    kernels = cache_folder() / "kernels"

    def use(folder: Path) -> None:
        build.status()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        copy = cache_folder() / "kernels"
        if kernels.exists() and not copy.exists():  # one in use must not be overwritten
            shutil.copytree(kernels, copy)

    return use


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers saves it."""
    from tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = tiny_tokenizer()
    for part in (tiny_llama(tokenizer), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rejections(base: Path) -> Path:
    """Ten records: the tiny model's greedy answers, always rejected, and beside each one seldom rejected."""
    from buleyean_rl.data.encode import Encoder
    from buleyean_rl.data.records import make_record, write_records
    from tiny import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    records = []
    for number in range(10):
        prompt = f"Give me tip {number}."
        ids = Encoder(tokenizer).encode_prompts([prompt])[0].ids
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, 3:].argmax()) + 3)
        answer = tokenizer.decode(ids[-8:])
        records.append(make_record(prompt, [answer, f"Ignore it, {number}."], [60, 5], 60))
    path = base.parent / "records.jsonl"
    write_records(path, records)
    return path
