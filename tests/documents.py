"""The commands and the Python of written pages, run as a reader would: in order, in one fresh folder.

    page --read_blocks--> blocks --Reader--> what each printed, against what the page shows

A comment before a block excepts it, or the commands in it that begin with what it quotes, and says why:

    <!-- not run: it needs the Hub -->
    <!-- not run: `buleyean void`: it serves until Ctrl-C -->

A block of `console` has commands after `$ ` and below each what it prints: numbers may differ, `...` is any text.

    python tests/documents.py PAGE...     with the `buleyean` and the `python` of PATH, in the current folder
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SHELLS = ("bash", "sh", "console")
COMMANDS = ("buleyean", "make", "python", "pip", "docker", "git", "export", "source", "ollama", "sh", "bash", "cd")
EXCEPTION = re.compile(r"<!-- not run: (?:`([^`]+)`: )?(.+?) -->", re.DOTALL)

# Each of these is read as preferences, as labels and as records.
ROWS = [
    {"prompt": f"Name a {thing}.", "chosen": f"A {thing} is easy to name.", "rejected": f"{thing}, {thing}, {thing}."}
    for thing in ("colour", "river", "number", "fruit", "city", "tool")
]
PROMPTS = (  # to most of which the bundled model repeats itself
    "Brainstorm some ideas for a school science fair project about plants.",
    "Write a job ad for a part-time dog walker.",
    "Make a bingo card with sixteen things you might see on a long car ride.",
    "Create a table comparing three kinds of milk by fat, protein and taste.",
)
HELD_OUT = ("Name a river.", "What is a comet?")
TYPED = "hello\n/exit\n"  # what a reader says to a command that asks
STAND_INS = {  # what a reader's own file has in it, by its suffix
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS),
    ".txt": "".join(f"{prompt}\n" for prompt in PROMPTS),
}
TAKE_A_RUN = ("chat", "evaluate", "export")
OUTPUTS = ("-o", "--output", "--json", "--plot")
SMALL = {  # added where the page does not say so
    "demo": {"--quick": None},
    "chat": {"--max-tokens": "8"},
    "walk": {"--rounds": "1", "--held-out": "held-out.txt"},
    "evaluate": {"--limit": "2", "--max-tokens": "16"},
}


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Args:
        page: its file.
        line: where the block begins, from 1.
        language: one of `SHELLS`, or python.
        text: without its fence or indentation.
        excepted: beginnings of the commands that are not run; ("",) for all.
    """

    page: Path
    line: int
    language: str
    text: str
    excepted: tuple[str, ...]

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command that is run, without what is [optional], and what the page shows of its output."""
        pieces = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:] if self.language == "console" else [self.text]
        for piece in pieces:
            lines = re.sub(r"\\\n\s*", "", piece).splitlines()
            shown = "\n".join(lines[1:]) if self.language == "console" else ""
            for line in lines[:1] if self.language == "console" else lines:
                if line.strip() and not line.startswith("#") and not self._is_excepted(line):
                    yield re.sub(r" \[[^]]*\]", "", line).strip(), shown

    def _is_excepted(self, command: str) -> bool:
        return any(command.startswith(beginning) for beginning in self.excepted)


def read_blocks(page: Path, *, quick_start: bool = False) -> list[Block]:
    """The blocks of a page that hold commands or Python, in order.

    Args:
        page: in Markdown.
        quick_start: only what comes before its first section, and the sections called a quick start.
    """
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, is_wanted, comment = 0, True, ""
    while start < len(lines):
        line, end = lines[start], start + 1
        fence = re.fullmatch(r"(`{3,})(\w*)", line.strip())
        if line.startswith("## "):
            is_wanted = not quick_start or "quick start" in line.lower()
        if fence:
            while end < len(lines) and lines[end].strip() != fence[1]:
                end += 1
            language, text = fence[2], lines[start + 1 : end]
            end += 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = [line[4:] for line in lines[start:end]]
            language = "bash" if text[0].split()[:1] and text[0].split()[0] in COMMANDS else ""
        else:
            while line.startswith("<!--") and not lines[end - 1].endswith("-->"):
                end += 1
            if line.strip():
                comment = comment + "\n".join(lines[start:end]) if line.startswith("<!--") else ""
            start = end
            continue
        exceptions = EXCEPTION.findall(comment)
        if is_wanted and language in (*SHELLS, "python"):
            excepted = tuple(beginning for beginning, _ in exceptions)
            blocks.append(Block(page, start + 1, language, "\n".join(text).strip(), excepted))
        start, comment = end, ""
    return blocks


class Reader:
    """Types what pages say, in the current folder, which is empty at first.

    Args:
        run_command: runs a shell's line and returns what it printed; it raises where the command fails.
        run_python: the same for Python.
    """

    def __init__(self, run_command: Callable[[str], str], run_python: Callable[[str], str]) -> None:
        self.run_command, self.run_python = run_command, run_python

    def read(self, block: Block) -> None:
        """Run what a block says, and compare what it shows.

        Raises:
            AssertionError: it printed something else.
        """
        if block.language == "python":
            if not block.excepted:
                self._prepare_files(re.findall(r"""["']([\w.-]+)["']""", block.text), _python_outputs(block.text))
                self.run_python(block.text)
            return
        for command, shown in block.commands():
            words = shlex.split(command, comments=True)
            outputs = [word for option, word in pairwise(words) if option in OUTPUTS]
            self._prepare_files(words, outputs)
            if words[0] == "buleyean" and words[1] in TAKE_A_RUN and not words[2].startswith("-"):
                self._prepare_model(words[2])
            printed = self.run_command(make_small(command))
            place = f"{block.page.name}:{block.line}: {command}"
            assert is_shown(shown, printed), f"{place}\n--- the page shows\n{shown}\n--- it printed\n{printed}"

    def _prepare_files(self, words: list[str], outputs: list[str]) -> None:
        """Write the reader's own files; remove what an earlier block left where this one writes."""
        for path in map(Path, outputs):
            assert path.parent == Path(), f"{path} is not in the reader's folder"
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        for word in {*words, "held-out.txt"} - set(outputs):
            path = Path(word)
            if path.suffix in STAND_INS and path.parent == Path() and not path.exists():
                is_held_out = path.suffix == ".txt" and path.stem in ("held-out", "unseen")
                text = "".join(f"{prompt}\n" for prompt in HELD_OUT) if is_held_out else STAND_INS[path.suffix]
                path.write_text(text, encoding="utf-8")

    def _prepare_model(self, name: str) -> None:
        """Make the run or the GGUF file that a reader of this page comes with."""
        path = Path(name)
        if path.exists() or path.parent != Path() or name.startswith("smollm2-"):
            return
        if path.suffix == ".gguf":
            self._prepare_model("own-run")
            self.run_command(f"buleyean export own-run -o {name}")
        else:
            Path("own.jsonl").write_text(STAND_INS[".jsonl"], encoding="utf-8")
            self.run_command(f"buleyean train own.jsonl --model smollm2-135m -o {name}")


def make_small(command: str) -> str:
    """A command with less to compute."""
    words = shlex.split(command, comments=True)
    if words[0] != "buleyean" or words[1] not in SMALL:
        return command
    options = {name: value for name, value in SMALL[words[1]].items() if name not in words}
    return shlex.join([*words, *(word for pair in options.items() for word in pair if word is not None)])


def is_shown(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for its numbers."""
    pattern = re.escape(" ".join(shown.split()))
    for escaped, any_of_them in ((r"\\\.\\\.\\\.", ".*"), (r"\\ ", r"\\s+"), (r"\d(?:[\d,]|\\\.(?=\d))*", r"[\\d.,]+")):
        pattern = re.sub(escaped, any_of_them, pattern)
    return re.search(pattern, printed, re.DOTALL) is not None


def _python_outputs(text: str) -> list[str]:
    return re.findall(r"""output(?:_dir)?=["']([^"']+)["']""", text)


def _run(words: list[str]) -> str:
    print("+", words[-1], flush=True)
    done = subprocess.run(words, input=TYPED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words[-1]}\nexit code {done.returncode}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    reader = Reader(lambda line: _run(["bash", "-c", line]), lambda text: _run(["python", "-c", text]))
    for path in sys.argv[1:]:
        for item in read_blocks(Path(path).resolve(), quick_start=Path(path).name != "README.md"):
            reader.read(item)
