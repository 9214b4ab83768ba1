"""Damaged model folders, GGUF files and adapters, through every command that loads a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from buleyean_rl.gguf import export_gguf
from buleyean_rl.kernels import build
from buleyean_rl.system.cache import cache_folder
from hostile.attack import assert_clear, untouched
from hostile.mutations import damage_bytes, damage_gguf, damage_json, damage_tensors
from hostile.scale import runs
from hostile.worker import Worker
from tiny import tiny_llama, tiny_run, tiny_tokenizer

pytestmark = pytest.mark.slow

ATTACKS = 320  # on each kind of model
SEED = 33
Damage = Callable[[Path, Random], str]
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model folder, a GGUF file and a run."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    tiny_run(folder / "run", folder / "base")
    export_gguf(model, tokenizer, folder / "model.gguf", "q8_0", gate=False)
    (folder / "prompts.txt").write_text("Give me a tip.\n")
    (folder / "held_out.txt").write_text("Give me another.\n")
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    cache = tmp_path_factory.mktemp("cache")
    if build.status().problem is None:  # compiling them again would take longer than the attacks
        shutil.copytree(cache_folder() / "kernels", cache / cache_folder().name / "kernels")
    with Worker({"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}) as worker:
        yield worker


def damage_folder(folder: Path, random: Random) -> str:
    kind = random.choice(("bytes", "json", "json", "tensors", "missing"))
    if kind == "tensors":
        return damage_tensors(folder / "model.safetensors", random)
    if kind == "json":
        return damage_json(folder / random.choice(JSON_FILES), random)
    path = random.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if kind == "bytes":
        return damage_bytes(path, random)
    path.unlink()
    return f"{path.name}: missing"


def damage_run(folder: Path, random: Random) -> str:
    kind = random.choice(("bytes", "json", "json", "tensors"))
    if kind == "tensors":
        return damage_tensors(folder / "adapter_model.safetensors", random)
    if kind == "json":
        return damage_json(folder / "adapter_config.json", random)
    return damage_bytes(folder / random.choice(("adapter_config.json", "adapter_model.safetensors")), random)


def damage_file(path: Path, random: Random) -> str:
    return damage_bytes(path, random) if random.random() < 0.3 else damage_gguf(path, random)


def commands(model: Path, models: Path, records: Path, output: Path) -> dict[str, list[str | Path]]:
    """The commands that load a model, by name."""
    prompts = models / "prompts.txt"
    short = ["--max-tokens", "8"]
    rejecting: list[str | Path] = ["--judge", "length:9999-", *short]
    held_out = ["--held-out", models / "held_out.txt"]
    return {
        "train": ["train", records, "--model", model, "-o", output / "run", "--max-steps", "1", "--no-guard"],
        "mine": ["mine", prompts, "--model", model, "-o", output / "mined.jsonl", *rejecting],
        "evaluate": ["evaluate", model, "--records", records, "--prompts", prompts, *short],
        "validate": ["data", "validate", records, "--model", model],
        "chat": ["chat", model, "--prompt", "Hello", *short],
        "export": ["export", model, "-o", output / "model.gguf"],
        "walk": ["walk", prompts, "--model", model, "-o", output / "walk", "--rounds", "1", *held_out, *rejecting],
    }


@pytest.mark.parametrize(
    ("name", "damage"), [("base", damage_folder), ("model.gguf", damage_file), ("run", damage_run)]
)
def test_a_damaged_model_is_refused_or_works(
    name: str, damage: Damage, models: Path, rejections: Path, worker: Worker, tmp_path: Path
) -> None:
    random = Random(f"{SEED} {name}")
    problems = []
    for number in range(runs(ATTACKS)):
        attack = tmp_path / str(number)
        attack.mkdir()
        model = attack / name
        (shutil.copytree if (models / name).is_dir() else shutil.copy)(models / name, model)
        what = damage(model, random)
        command = random.choice(sorted(commands(model, models, rejections, attack)))
        with untouched(model) if model.is_dir() else untouched():
            outcome = worker.run(*commands(model, models, rejections, attack)[command])
        try:
            assert_clear(outcome)
        except AssertionError:
            problems.append((number, command, what, outcome.code, outcome.err[-1500:]))
        shutil.rmtree(attack)
    assert not problems, "\n\n".join(map(str, problems))
