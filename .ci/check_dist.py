"""Check a wheel and an sdist: what is in them, and that README works from the wheel alone.

python .ci/check_dist.py WHEEL SDIST     in any order; as root, everything runs as a user without a home
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SDIST = ("src/", "README.md", "CHANGELOG.md", "LICENSE", "install.sh", "requirements.lock", "pyproject.toml")
BUILT = {"PKG-INFO", ".gitignore"}  # what the build adds
METADATA = {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD"}


def tracked() -> list[str]:
    """The files of the repository, as they stand."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in names.stdout.splitlines() if (ROOT / name).exists()]


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold what the repository has for them, and nothing else."""
    package = {name.removeprefix("src/") for name in tracked() if name.startswith("src/")}
    for needed in ("kernels/c/gemm.c", "demo_data/neutral.txt", "void/page/index.html", "py.typed"):
        assert f"buleyean_rl/{needed}" in package, f"{needed}: no longer in the repository"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folder = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    compare(wheel, names, package | {f"{folder}/{name}" for name in METADATA})
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    compare(sdist, names, {name for name in tracked() if name.startswith(SDIST)} | BUILT)


def compare(archive: Path, names: set[str], expected: set[str]) -> None:
    """Exit with what is too much and what is missing."""
    if names != expected:
        sys.exit(f"{archive}: unexpected {sorted(names - expected)}, missing {sorted(expected - names)}")


def check_commands(wheel: Path, folder: Path) -> None:
    """README's commands run from the wheel, in an environment outside the checkout."""
    environment, work = folder / "environment", folder / "work"
    work.mkdir()
    venv.create(environment, with_pip=True)
    run(["sh", str(ROOT / "install.sh"), str(environment / "bin/python"), f"{wheel.resolve()}[language,void]"])
    pages = folder / "pages"  # the checkout may be closed to the user below
    pages.mkdir()
    for name in ("README.md", "tests/documents.py"):
        (pages / Path(name).name).write_bytes((ROOT / name).read_bytes())
    variables = {name: value for name, value in os.environ.items() if not re.match("PYTHON|XDG_|BULEYEAN_", name)}
    variables |= {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": "/nonexistent"}
    variables |= {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    user = None
    if os.getuid() == 0:
        user = pwd.getpwnam("nobody").pw_uid
        folder.chmod(0o755)
        os.chown(work, user, -1)
    for command in (
        ["buleyean", "doctor", "--need", "bundled-model", "--need", "void"],
        ["buleyean", "demo", "--quick", "-o", "demo"],
        ["python", str(pages / "documents.py"), str(pages / "README.md")],
    ):
        run(command, cwd=work, env=variables, user=user)


def run(command: list[str], **options: object) -> None:
    """Run a command; exit where it fails."""
    print("+", *command, flush=True)
    if code := subprocess.run(command, check=False, **options).returncode:  # type: ignore[call-overload]
        sys.exit(f"{command[0]} ended with {code}")


if __name__ == "__main__":
    (built,) = (Path(name) for name in sys.argv[1:] if name.endswith(".whl"))
    (source,) = (Path(name) for name in sys.argv[1:] if name.endswith(".tar.gz"))
    check_contents(built, source)
    with tempfile.TemporaryDirectory() as temporary:
        check_commands(built, Path(temporary))
    print(f"{built} and {source}: what they hold and what README says are right")
