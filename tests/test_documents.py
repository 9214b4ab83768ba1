"""README and the quick starts do what they say: their commands and their Python, run."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from typer.main import get_command

from buleyean_rl.cli import app, main
from bundled import needs_bundled, use_tiny_bundled
from documents import TYPED, Block, Reader, is_shown, make_small, read_blocks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    return read_blocks(page, quick_start=page.parent == ROOT / "docs")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


RUNNABLE = [page for page in PAGES if any(next(block.commands(), None) for block in blocks_of(page))]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Reader:
    """Reads in this process, in a fresh folder."""
    monkeypatch.chdir(tmp_path)

    def run_command(line: str) -> str:
        program, *arguments = shlex.split(line, comments=True)
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", StringIO(TYPED))
        if program == "buleyean":
            code = main(arguments)
        elif program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        else:
            code = subprocess.run(["bash", "-c", line], check=False).returncode
        printed = "".join(capsys.readouterr())
        assert code == 0, f"{line}\n{printed}"
        return printed

    def run_python(text: str) -> str:
        exec(text, {"__name__": "__main__"})
        return "".join(capsys.readouterr())

    return Reader(run_command, run_python)


@pytest.mark.parametrize("page", RUNNABLE, ids=page_name)
def test_what_a_page_says_runs(
    page: Path,
    reader: Reader,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_tiny_bundled(monkeypatch, tmp_path_factory.mktemp("bundled"))
    copy_example_files(page, tmp_path)
    for block in blocks_of(page):
        reader.read(block)


@pytest.mark.slow
@needs_bundled
@pytest.mark.parametrize("page", RUNNABLE, ids=page_name)
def test_what_a_page_says_runs_with_the_bundled_model(page: Path, tmp_path: Path) -> None:
    copy_example_files(page, tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, str(ROOT / "tests/documents.py"), str(page)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_example_files(page: Path, folder: Path) -> None:
    """The page's own folder, if it is an example's."""
    if page.parent == ROOT / "examples":
        shutil.copytree(page.parent, folder, dirs_exist_ok=True)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_page_names_commands_and_options_that_exist(page: Path) -> None:
    commands = command_options()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in read_blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines() if block.language != "python" else []:
            words = re.sub(r"[\[\]|]", " ", line.removeprefix("$ ").partition(" #")[0]).split()
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.name}:{block.line}: no `{line}`"
            if words[:1] == ["buleyean"]:
                name = " ".join(words[1:3] if words[1] == "data" else words[1:2])
                assert name.startswith("-") or name in commands, f"{page.name}:{block.line}: no `{line}`"
                options = {word.partition("=")[0] for word in words if word.startswith("-")}
                assert options <= commands.get(name, options), f"{page.name}:{block.line}: no such option: {line}"


def command_options() -> dict[str, set[str]]:
    """The options of each command, by its name."""
    options: dict[str, set[str]] = {}

    def visit(command: object, name: str) -> None:
        for child, subcommand in getattr(command, "commands", {}).items():
            visit(subcommand, f"{name} {child}".strip())
        parameters = getattr(command, "params", [])
        options[name] = {text for each in parameters for text in (*each.opts, *each.secondary_opts)}

    visit(get_command(app), "")
    return {name: {*own, "--help", "--debug"} for name, own in options.items()}


def test_a_page_is_read_as_it_is_shown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    first, second, *rest = read_blocks(page)
    assert [command for command, _ in first.commands()] == ["buleyean doctor  # what there is", "buleyean train a -o b"]
    assert list(second.commands()) == [("buleyean runs", "2 runs in 0.5 s\n...\nlast"), ("buleyean doctor", "")]
    assert [(block.language, block.line, list(block.commands())) for block in rest[:1]] == [("bash", 24, [])]
    assert [(block.language, block.text) for block in rest[1:]] == [("python", "print(1)")]
    assert read_blocks(page, quick_start=True) == [first, second]


def test_output_may_differ_in_its_numbers_alone() -> None:
    shown = "2 runs in 0.5 s\n...\nlast: 1,234"
    assert is_shown(shown, "found:\n12 runs in 1.25 s\nmore\nlast: 7\n")
    assert not is_shown(shown, "2 walks in 0.5 s\nmore\nlast: 7\n")
    assert is_shown("", "anything")


def test_a_small_command_keeps_what_it_says() -> None:
    assert make_small("buleyean chat m --max-tokens 3 # hm") == "buleyean chat m --max-tokens 3"
    assert make_small("buleyean demo") == "buleyean demo --quick"
    assert make_small("buleyean runs") == "buleyean runs"


def test_a_reader_s_own_files_are_there_and_outputs_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "old.jsonl").write_text("old")
    seen: list[tuple[str, list[str]]] = []
    record: Callable[[str], str] = lambda line: (seen.append((line, sorted(os.listdir()))), "2")[1]  # noqa: E731
    block = Block(tmp_path, 1, "console", "$ buleyean train log.jsonl -o run --json old.jsonl\n1", ())
    Reader(record, record).read(block)
    assert seen == [("buleyean train log.jsonl -o run --json old.jsonl", ["held-out.txt", "log.jsonl"])]
    with pytest.raises(AssertionError, match="the page shows"):
        Reader(record, record).read(Block(tmp_path, 1, "console", "$ buleyean doctor\nno", ()))


PAGE = """# A page

<!-- not run: `buleyean void`: it serves
until Ctrl-C -->
<!-- not run: `pip`: it changes the environment -->

    pip install x
    buleyean doctor  # what there is
    buleyean void
    buleyean train a \\
      -o b

```console
$ buleyean runs
2 runs in 0.5 s
...
last
$ buleyean doctor
```

## More

<!-- not run: it needs the Hub -->
```bash
buleyean train uf.jsonl
```

    no command

```python
print(1)
```
"""
