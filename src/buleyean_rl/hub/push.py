"""Upload a run, GGUF files or a records file to the Hugging Face Hub, with a card; only ever when asked to.

    paths --plan_upload--> Upload: files and a card --upload--> one commit

The plan is shown before anything is sent: of a run folder its adapter, tokenizer and report, never checkpoints or other
files. `upload` is the only function of the package that uploads. The client is huggingface_hub's own: it heeds
HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buleyean_rl.errors import HubError, UsageError
from buleyean_rl.hub.cards import data_card, gguf_card, run_card
from buleyean_rl.models.model_folder import read_json
from buleyean_rl.models.run_files import read_run
from buleyean_rl.models.source import HUB_ID, public_name_and_license
from buleyean_rl.system.files import encode_json

CARD = "README.md"
RUN_FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "run.json", "loss.png"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
# Keys that name a run's base model, which may be a path on this machine.
BASE_MODEL_KEYS = {"adapter_config.json": "base_model_name_or_path", "run.json": "model"}


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded.

    Args:
        kind: of repository: model or dataset.
        files: by their names in the repository; bytes are the contents of one.
        card: README.md.
    """

    kind: str
    files: dict[str, Path | bytes]
    card: str

    def lines(self) -> list[str]:
        """A line for each file, to be confirmed by a person."""
        sizes = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}
        lines = [f"{name} ({max(size / 1e6, 0.001):,.3g} MB)" for name, size in sizes.items()]
        return [*lines, f"{CARD} (one that is there stays, without --overwrite)"]


def plan_upload(paths: Sequence[Path], repo: str, *, run: Path | None = None, license: str | None = None) -> Upload:
    """Choose the files to upload, and write their card.

    Args:
        paths: a run folder, or GGUF files, or a records file.
        repo: as owner/name, for the card.
        run: of GGUF files, the run they were made from: its table goes into the card.
        license: an SPDX identifier for the card.

    Raises:
        UsageError: paths of different kinds, or of another kind; a repository without an owner.
        RecordError: the records file is bad.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"--to {repo}: name the repository as OWNER/NAME")
    name = repo.rsplit("/", 1)[-1]
    if missing := [path for path in paths if not path.exists()]:
        raise UsageError(f"{missing[0]}: no such file or folder")
    if all(path.suffix == ".gguf" for path in paths):
        report = None if run is None else _read_run_report(run)
        files = [(path.name, _read_quantisation(path), path.stat().st_size) for path in paths]
        card = gguf_card(files, report, name=name, license=license)
        return Upload("model", {path.name: path for path in paths}, card)
    if len(paths) == 1 and paths[0].is_dir():
        card = run_card(_read_run_report(paths[0]), license=license)
        present: dict[str, Path | bytes] = {f: paths[0] / f for f in RUN_FILES if (paths[0] / f).exists()}
        present |= {
            name: _without_local_path(paths[0] / name, key) for name, key in BASE_MODEL_KEYS.items() if name in present
        }
        return Upload("model", present, card)
    if len(paths) == 1 and paths[0].suffix == ".jsonl":
        card = data_card(paths[0], name=name, file=paths[0].name, license=license)
        return Upload("dataset", {paths[0].name: paths[0]}, card)
    raise UsageError("give one run folder, or one .jsonl file of records, or GGUF files: not a mixture")


def upload(
    plan: Upload, repo: str, *, private: bool = True, overwrite_card: bool = False, message: str | None = None
) -> str:
    """Upload in one commit; the repository is made if it is not there.

    Args:
        plan: from `plan_upload`.
        repo: as owner/name.
        private: whether a new repository is private; an existing one is not changed.
        overwrite_card: replace a README.md that the repository has, which somebody may have written.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        HubError: nobody is logged in, the Hub refuses, or it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, utils
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type=plan.kind, private=private, exist_ok=True)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in plan.files.items()
        ]
        if overwrite_card or not api.file_exists(repo, CARD, repo_type=plan.kind):
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=plan.card.encode(errors="replace")))
        summary = message or f"Upload {', '.join(plan.files)}"
        api.create_commit(repo, operations, commit_message=summary, repo_type=plan.kind)
    except LocalTokenNotFoundError:
        raise HubError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise HubError(f"{repo}: the Hub refuses: {str(error).strip().splitlines()[0]}") from error
    except (utils.httpx.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(f"{repo}: the Hub cannot be reached: {error}") from error
    return str(address)


def _read_run_report(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    if not path.exists():
        raise UsageError(f"{run} has no run.json: it is not a run folder, or its training never ended")
    return read_run(run)


def _without_local_path(path: Path, key: str) -> bytes:
    """A JSON file whose base model has its public name, without a folder of this machine."""
    value = read_json(path)
    if key not in value:
        raise UsageError(f"{path} has no {key}: it is not of a run folder")
    public = value | {key: public_name_and_license(str(value[key]))[0]}
    return encode_json(public)


def _read_quantisation(path: Path) -> str:
    """A GGUF file's quantisation by its own header, and whether it is an adapter."""
    from buleyean_rl.inference.gguf_file import check_gguf
    from gguf import LlamaFileType

    metadata = check_gguf(path, model=False).metadata
    file_type = metadata.get("general.file_type")
    name = LlamaFileType(file_type).name.split("_", 1)[1] if file_type is not None else "unknown"
    return f"{name} adapter" if metadata.get("general.type") == "adapter" else name
