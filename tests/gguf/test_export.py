"""`buleyean export` as a user runs it: names, notes, Modelfiles, adapters, and what is left when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny_export import needs_llama_cpp_python

import gguf
from buleyean_rl.cli import main
from buleyean_rl.gguf import blueprint, export_gguf
from buleyean_rl.gguf import export as exporting
from buleyean_rl.inference import llama_cpp_python
from buleyean_rl.inference.gguf_engines import ENGINES, open_gguf
from buleyean_rl.inference.protocol import Sampling
from buleyean_rl.models import run_folder, source
from go_template import parse_modelfile, render_go
from hostile.attack import untouched
from tiny import tiny_llama, tiny_run, tiny_tokenizer

ASK = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "run", base)


def export(run: Path, *words: object) -> int:
    return main(["export", str(run), *map(str, words)])


def test_one_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = ("--name", "my model", "--author", "me", "--license", "mit", "--url", "https://example.org/card")
    assert export(run, "-o", tmp_path / "m.gguf", *about, "--json") == 0
    out, err = capsys.readouterr()
    (report,) = json.loads(out)["files"]
    assert (report["path"], report["quant"]) == (str(tmp_path / "m.gguf"), "q8_0")
    assert "checked in xllamacpp" in " ".join(err.split())
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "name": "my model",
        "author": "me",
        "license": "mit",
        "url": "https://example.org/card",
        "base_model.0.name": "base",
        "base_model.count": 1,
        "type": "model",
        "size_label": "87K",
        "quantized_by": "buleyean-rl",
    }
    assert {key: said.get(f"general.{key}") for key in expected} == expected
    assert not [value for value in said.values() if str(run.parent) in str(value)]


def test_a_gguf_base_is_resolved_and_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    base = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "base.gguf", "f32", gate=False).path
    folder = tiny_run(tmp_path / "run", base)
    calls: list[str] = []
    for module, name in ((run_folder, "find_model"), (source, "file_sha256")):
        original = getattr(module, name)

        def counted(argument: object, name: str = name, original: Any = original) -> Any:
            if not isinstance(argument, source.Source):
                calls.append(name)
            return original(argument)

        for user in (module, exporting, blueprint):
            if hasattr(user, name):
                monkeypatch.setattr(user, name, counted)
    assert export(folder, "-o", tmp_path / "m.gguf") == 0
    assert sorted(calls) == ["file_sha256", "find_model"]


@pytest.mark.slow
@needs_llama_cpp_python
def test_two_quantisations_and_an_answer_in_both_engines(run: Path, tmp_path: Path) -> None:
    assert export(run, "-o", tmp_path / "m.gguf", "--quant", "q4_k_m,Q8_0", "--engine", "llama-cpp-python") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    for path in tmp_path.iterdir():
        likeliest = set()
        for engine in ENGINES:
            with closing(open_gguf(path, engine, context=128)) as opened:
                assert "".join(opened.generate(ASK, Sampling(max_tokens=4)))
                likeliest.add(tuple(opened.top_logprobs(opened.prompt_ids(ASK), 3)))
        assert len(likeliest) == 1
        assert main(["chat", str(path), "--prompt", "Hello!", "--max-tokens", "4", "--engine", "llama-cpp-python"]) == 0


def test_a_modelfile(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "-o", tmp_path / "m.gguf", "--ollama", "--license", "mit") == 0
    assert f"ollama create NAME -f {tmp_path / 'Modelfile'}" in capsys.readouterr().err
    modelfile = parse_modelfile((tmp_path / "Modelfile").read_text())
    assert (modelfile["FROM"], modelfile["LICENSE"]) == (["./m.gguf"], ["mit"])
    expected = tiny_tokenizer().apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert render_go(modelfile["TEMPLATE"][0], ASK) == expected


def test_a_modelfile_of_another_model_stays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ("-o", tmp_path / "m.gguf", "--ollama"), ("-o", tmp_path / "n.gguf", "--ollama")
    assert export(run, *first) == export(run, *first) == 0  # the same one again
    with untouched(tmp_path):
        assert export(run, *second) == 2
        assert "Modelfile is there already, of another model or changed" in capsys.readouterr().err
        assert export(run, *first, "--license", "mit") == 2
    assert export(run, *second, "--overwrite") == 0
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./n.gguf\n")


def test_names_that_nobody_could_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with untouched(tmp_path):
        assert export(run, "-o", tmp_path / "m.gguf", "--name", os.fsdecode(b"caf\xe9")) == 2
        assert "holds a line break or another control character" in capsys.readouterr().err
        assert export(run, "-o", tmp_path / os.fsdecode(b"caf\xe9.gguf")) == 2
        assert "is not UTF-8" in capsys.readouterr().err
        assert export(run, "-o", tmp_path / "two\nlines.gguf", "--ollama") == 2
        assert "a Modelfile is lines: name another file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [(), ("--adapter",)])
def test_only_ggufs_of_ours_are_replaced(
    kind: tuple[str, ...], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, pipe = tmp_path / "m.gguf", tmp_path / "pipe"
    writer = gguf.GGUFWriter(output, "llama")  # somebody else's
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    os.mkfifo(pipe)
    with untouched(tmp_path):
        assert export(run, "-o", output, *kind) == 2
        assert "m.gguf is there already" in capsys.readouterr().err
        assert export(run, "-o", pipe, *kind) == 2
    assert pipe.is_fifo()
    assert export(run, "-o", output, *kind, "--overwrite") == 0
    assert export(run, "-o", output, *kind) == 0


def test_a_model_is_not_exported_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    base = export_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "base.gguf", "f32", gate=False).path
    for model in (base, tiny_run(tmp_path / "run", base)):
        with untouched(tmp_path):
            assert export(model, "-o", base, "--overwrite") == 2
        assert "is the model that is read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [(), ("--adapter",)])
def test_what_a_run_is_read_from_is_not_replaced_through_a_link(
    kind: tuple[str, ...], run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, file in enumerate((run / "adapter_model.safetensors", base / "model.safetensors")):
        link = tmp_path / f"{number}.gguf"
        link.symlink_to(file)
        with untouched(run, base):
            assert export(run, "-o", link, *kind, "--overwrite") == 2
        assert "is the model that is read" in capsys.readouterr().err


def test_an_adapter(run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "-o", tmp_path / "a.gguf", "--adapter", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["files"]
    assert report["quant"] == "f16"
    assert report["bytes"] < 50_000
    assert export(base, "-o", tmp_path / "b.gguf", "--adapter") == 1
    assert export(run, "-o", tmp_path / "b.gguf", "--adapter", "--ollama") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--quant", "q3"], 1, "unknown quantisation 'q3'; there are f32"),
        (["--quant", "q8_0,q8_0"], 2, "wants different quantisations"),
        (["--engine", "ollama"], 2, "unknown engine 'ollama'"),
    ],
)
def test_bad_requests(
    words: list[str], code: int, problem: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "-o", tmp_path / "m.gguf", *words) == code
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_missing_engine_names_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp_python, "is_installed", lambda: False)
    assert export(run, "-o", tmp_path / "m.gguf", "--engine", "llama-cpp-python") == 1
    assert "pip install llama-cpp-python" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_writing(how: signal.Signals, run: Path, tmp_path: Path) -> None:
    """Told to end, an export leaves nothing (SIGTERM is made Ctrl-C); killed, the next one deletes what it left."""
    program = (
        "import signal, sys, time; from buleyean_rl.gguf import write; from buleyean_rl.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests run in the background inherit it ignored
        "real = write.quantise\n"
        "def slow(*a):\n    print('writing', flush=True); time.sleep(0.2); return real(*a)\n"
        "write.quantise = slow; sys.exit(main())"
    )
    words = [sys.executable, "-c", program, "export", str(run), "-o", str(tmp_path / "m.gguf")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    process.send_signal(how)
    code = process.wait(timeout=30)
    process.stdout.close()
    time.sleep(0.1)
    if how is signal.SIGKILL:
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
        assert export(run, "-o", tmp_path / "m.gguf") == 0
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    else:
        assert code == 130
        assert not list(tmp_path.iterdir())
