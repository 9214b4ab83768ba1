"""The files of a model that people take with them: GGUF of several quantisations, adapter, records, card.

    run folder --a child process: `buleyean export`--> files/run-N/q8_0/model.gguf, Modelfile

A GGUF is made once, when it is asked for. A link to a file holds a secret and lasts ten minutes: a browser that
downloads sends no token.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from buleyean_rl.errors import UsageError
from buleyean_rl.gguf.k_quants import K_QUANTS
from buleyean_rl.inference.llama_cpp_python import INSTALL_HINT, is_installed
from buleyean_rl.system.files import atomic_path, remove_folder
from buleyean_rl.system.module_process import module_command, module_environment
from buleyean_rl.void.store import Row

QUANTS = {"q8_0": 8.5, "q4_0": 4.5, "f16": 16.0, "q4_k_m": 4.9, "q5_k_m": 5.7, "q6_k": 6.6}  # bits a weight
OTHERS = ("modelfile", "adapter", "records", "card")
KINDS = (*QUANTS, *OTHERS)
LINK_SECONDS = 600.0
POLL_SECONDS = 0.2
WRITTEN_SHARE = 0.9  # of the progress: then the file is checked
MODEL, MODELFILE = "model.gguf", "Modelfile"
EXPORT = module_command("buleyean_rl", "export")  # what makes a GGUF
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass
class _Making:
    """A GGUF that is being made, or could not be.

    Args:
        process: that makes it.
        progress: from 0 to 1.
        error: why it failed.
    """

    process: subprocess.Popen[str]
    progress: float = 0.0
    error: str = ""

    @property
    def phase(self) -> str:
        """Writing or checking."""
        return "checking" if self.progress >= WRITTEN_SHARE else "writing"


class ModelFiles:
    """The files of every run's model.

    Args:
        folder: where those that are made are kept.
        weights: of the model: how many.
    """

    def __init__(self, folder: Path, weights: int) -> None:
        self._folder, self._weights = folder, weights
        self._lock, self._making = threading.Lock(), dict[tuple[int, str], _Making]()
        self._links: dict[str, tuple[Path, str, float]] = {}
        self._closed = False
        self.changes = 0

    def list(self, run: Row, folder: Path) -> list[Row]:
        """What there is, or can be made, of a run's model.

        Args:
            run: a row of it.
            folder: of the run.
        """
        return [self.get(run, folder, kind) for kind in KINDS]

    def get(self, run: Row, folder: Path, kind: str) -> Row:
        """One file as the page shows it; see `list`."""
        path = self._path(run["id"], folder, kind)
        with self._lock:
            making = self._making.get((run["id"], kind))
        problem = ""
        if kind in K_QUANTS and not is_installed():
            problem = f"is made through llama-cpp-python: {INSTALL_HINT}"
        elif kind == "modelfile" and not path.exists():
            problem = "is made together with a GGUF file"
        state = "ready" if path.exists() or kind == "adapter" else "missing"
        if making is not None:  # until its process has ended, whatever there is by then
            state = "failed" if making.error else "making"
        return {
            "kind": kind,
            "name": self._name(run, kind),
            "bytes": path.stat().st_size if path.exists() else None,
            "state": state,
            "phase": making.phase if making and state == "making" else None,
            "progress": making.progress if making and state == "making" else None,
            "error": making.error if making and state == "failed" else "",
            "possible": not problem,
            "problem": problem or None,
        }

    def make(self, run: Row, folder: Path, kind: str) -> None:
        """Begin to make a file, unless it is there or being made.

        Raises:
            UsageError: it cannot be made here.
            OSError: the disk is full.
        """
        shown = self.get(run, folder, kind)
        if not shown["possible"]:
            raise UsageError(f"{shown['name']} {shown['problem']}")
        if kind not in QUANTS or shown["state"] in ("ready", "making"):
            return
        path = self._path(run["id"], folder, kind)
        with self._lock:
            if self._closed or any(not each.error for each in self._making.values()):
                raise UsageError("another file is being made: wait for it")
            _remove(path.parent)
            path.parent.mkdir(parents=True)
            options = [str(folder), "-o", str(path), "--quant", kind, "--ollama", "--name", run["name"]]
            process = subprocess.Popen(
                [*EXPORT, *options],
                env=module_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            making = self._making[run["id"], kind] = _Making(process)
        threading.Thread(target=self._watch, args=(run["id"], kind, path, making), daemon=True).start()

    def link(self, run: Row, folder: Path, kind: str) -> str:
        """The address of a file, for ten minutes.

        Raises:
            UsageError: it is not there yet.
        """
        path = self._path(run["id"], folder, kind)
        if kind == "adapter":
            _zip_adapter(folder, path)
        if not path.exists():
            raise UsageError("the file is not made yet")
        name, now, secret = self._name(run, kind), time.monotonic(), secrets.token_urlsafe(16)
        if kind == "modelfile":
            path = _write_modelfile(path, self._model_name(run, path.parent.name))
        with self._lock:
            self._links = {key: link for key, link in self._links.items() if link[2] > now}
            self._links[secret] = path, name, now + LINK_SECONDS
        return f"/download/{secret}/{name}"

    def linked(self, secret: str) -> tuple[Path, str] | None:
        """The file of a link, and its name; None of a link that there is not any more."""
        with self._lock:
            path, name, until = self._links.get(secret, (None, "", 0.0))
        return None if path is None or until < time.monotonic() or not path.exists() else (path, name)

    def ollama(self, run: Row) -> str:
        """What makes a model of Ollama of the downloaded files."""
        return f"ollama create {_slug(run)} -f {MODELFILE}"

    def delete(self, run: int) -> None:
        """Delete what was made of a run's model."""
        with self._lock:
            for (other, _), making in self._making.items():
                if other == run:
                    making.process.kill()
            folder = self._folder_of(run)
            self._links = {key: link for key, link in self._links.items() if folder not in link[0].parents}
        _remove(folder)

    def close(self) -> None:
        """End what is being made."""
        with self._lock:
            self._closed = True
            for making in self._making.values():
                making.process.kill()

    def _watch(self, run: int, kind: str, path: Path, making: _Making) -> None:
        expected = self._weights * QUANTS[kind] / 8
        reader = threading.Thread(target=lambda: said.append(making.process.communicate()[1]), daemon=True)
        said: list[str] = []
        reader.start()
        while making.process.poll() is None:
            size = sum(file.stat().st_size for file in _files(path.parent))
            making.progress = round(min(WRITTEN_SHARE, WRITTEN_SHARE * size / expected), 2)
            self.changes += 1
            time.sleep(POLL_SECONDS)
        reader.join()
        with self._lock:
            if making.process.returncode == 0:
                del self._making[run, kind]
            else:
                lines = ["", *said][-1].strip().splitlines()
                making.error = lines[-1].removeprefix("error: ") if lines else "it was ended: try again"
                _remove(path.parent)
        self.changes += 1

    def _folder_of(self, run: int) -> Path:
        return self._folder / f"run-{run}"

    def _path(self, run: int, folder: Path, kind: str) -> Path:
        made = self._folder_of(run)
        match kind:
            case "card":
                return folder / "README.md"
            case "records":
                return folder.with_suffix(".jsonl")
            case "adapter":
                return made / "adapter.zip"
            case "modelfile":
                kinds = [quant for quant in QUANTS if (made / quant / MODEL).exists()]
                return made / (kinds[0] if kinds else "q8_0") / MODELFILE
        return made / kind / MODEL

    def _name(self, run: Row, kind: str) -> str:
        if kind in QUANTS:
            return self._model_name(run, kind)
        slug = _slug(run)
        return {"modelfile": MODELFILE, "adapter": f"{slug}-adapter.zip", "records": f"{slug}-records.jsonl"}.get(
            kind, f"{slug}-README.md"
        )

    def _model_name(self, run: Row, quant: str) -> str:
        return f"{_slug(run)}-{quant.upper()}.gguf"


def _slug(run: Row) -> str:
    """A model's name as a file and Ollama can have it."""
    slug = re.sub(r"[^a-z0-9]+", "-", run["name"].lower()).strip("-")
    return slug[:60].strip("-") or f"run-{run['id']}"


def _remove(folder: Path) -> None:
    if folder.exists():
        remove_folder(folder)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.exists() else []


def _zip_adapter(folder: Path, path: Path) -> None:
    """An adapter with what goes with it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished, zipfile.ZipFile(unfinished, "w") as file:
        for name in ADAPTER_FILES:
            if (folder / name).exists():
                file.write(folder / name, name)


def _write_modelfile(path: Path, model: str) -> Path:
    """A Modelfile that names the model as it is downloaded."""
    target = path.with_name(f"{MODELFILE}.named")
    target.write_text(path.read_text("utf-8").replace(f"FROM ./{MODEL}", f"FROM ./{model}", 1), "utf-8")
    return target
