"""The written pages against what they describe."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import buleyean_rl

ROOT = Path(__file__).parent.parent
PACKAGE = Path(buleyean_rl.__file__).parent
ARCHITECTURE = ROOT / "docs/architecture.md"


def test_the_command_reference_is_what_the_commands_say() -> None:
    generated = subprocess.run(
        [sys.executable, "docs/commands.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs/commands.md").read_text() == generated.stdout, "run `make docs`"


def test_the_table_of_settings_is_what_the_package_accepts() -> None:
    page = runpy.run_path(str(ROOT / "docs/config.py"))["page"]
    assert (ROOT / "docs/config.md").read_text() == page(), "run `make docs`"


def tree() -> dict[Path, str]:
    """Each path in the tree of docs/architecture.md, and what its line says."""
    block = ARCHITECTURE.read_text(encoding="utf-8").split("## The tree\n\n```text\n")[1].split("```")[0]
    lines: dict[Path, str] = {}
    parents: list[Path] = []
    for line in block.splitlines():
        name, what = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        path = Path(*parents[depth - 1 : depth], name)
        parents[depth:] = [path]
        assert path not in lines, f"{path} has two lines"
        lines[path] = what
    return lines


def test_every_file_of_the_package_has_its_line_and_every_line_its_file() -> None:
    files = {path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    files -= {path for path in files if path.name in ("__init__.py", "py.typed")}
    files |= {path.parent for path in files} | {Path("src/buleyean_rl/__init__.py")}
    listed = set(tree())
    assert sorted(files - listed) == [], "files without a line in docs/architecture.md"
    assert sorted(listed - files) == [], "lines in docs/architecture.md without a file"


def test_every_path_that_the_architecture_names_exists() -> None:
    text = re.sub(r"```text\n.*?```", "", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.DOTALL)
    linked = re.findall(r"\]\(([^)#]+)", text)
    quoted = {name for name in re.findall(r"`([\w./-]+)`", text) if "/" in name}
    assert [name for name in linked if not (ARCHITECTURE.parent / name).exists()] == []
    assert sorted(name for name in quoted if not any((at / name).exists() for at in (ROOT, PACKAGE))) == []


PAGES = [
    ROOT / name for name in sorted(subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split())
]


def headings(page: Path) -> set[str]:
    """The anchors of a page's sections, as the pages of a repository are shown."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix("")))
def test_what_a_page_links_to_is_there_and_its_lines_fit(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for name, section in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = page.parent / name if name else page
        if not target.exists() or (section and target.suffix == ".md" and section not in headings(target)):
            missing.append(f"{name}#{section}")
    assert missing == []
    if page.name not in ("commands.md", "config.md"):  # generated
        assert [line for line in text.splitlines() if len(line) > 160] == []


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_messages_of_the_troubleshooting_are_said() -> None:
    section = (ROOT / "docs/index.md").read_text(encoding="utf-8").split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    said = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", said)
    parts = [part.strip(" '") for message in messages[1:] for part in message.split("...")]  # the first is a shell's
    assert len(messages) > 10
    assert [part for part in parts if part and part not in said] == []


def test_the_lock_names_versions_and_nothing_else() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []
    assert "torch" not in {line.partition("==")[0] for line in lines}
