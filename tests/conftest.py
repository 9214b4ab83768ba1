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


WITHOUT_AMX = ("-U__AMX_BF16__",)
BLOCKS = {  # ways to multiply blocks: what the processor has to have, and flags that choose the way
    "own": (None, ()),
    "bf16 vectors": ("avx512_bf16", WITHOUT_AMX),
    "vectors of 16": ("avx512f", (*WITHOUT_AMX, "-U__AVX512BF16__")),
    "vectors of 8": ("avx2", ("-mno-avx512f", *WITHOUT_AMX, "-U__AVX512BF16__")),
    "pairs": (None, ("-mno-avx2", *WITHOUT_AMX, "-U__AVX512BF16__", "-DIN_WORD=2")),
    "loops": (None, ("-mno-avx2", *WITHOUT_AMX, "-U__AVX512BF16__")),
    "loops of 16": (None, ("-mno-avx2", *WITHOUT_AMX, "-U__AVX512BF16__", "-DLANES=16")),
}


@pytest.fixture(params=[pytest.param(name, marks=needs_c) for name in BLOCKS])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels that go block by block are used: as on this processor, and as on others."""
    feature, flags = BLOCKS[request.param]
    if feature is not None and feature not in processor_features():
        pytest.skip(f"a processor without {feature}")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    monkeypatch.setattr(abi, "_tiles", lambda: 2)
    abi._library.cache_clear()
    yield
    abi._library.cache_clear()


def processor_features() -> set[str]:
    """As Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


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
    from buleyean_rl.data.encode import encode_prompt
    from buleyean_rl.data.records import make_record, write_records
    from tiny import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    records = []
    for number in range(10):
        prompt = f"Give me tip {number}."
        ids = encode_prompt(tokenizer, prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, 3:].argmax()) + 3)
        answer = tokenizer.decode(ids[-8:])
        records.append(make_record(prompt, [answer, f"Ignore it, {number}."], [60, 5], 60))
    path = base.parent / "records.jsonl"
    write_records(path, records)
    return path
