"""Data flows one way: which wing of the package may import which, and what the command may not drag in."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import buleyean_rl

PACKAGE = Path(buleyean_rl.__file__).parent

# A wing stands on those below it and imports no other. Files at the top of the package count as wings.
WINGS = (
    "__main__",
    "cli",
    "api",
    "demo",
    "void",
    "live",
    "mining",
    "training",
    "evaluation",
    "gguf",
    "hub",
    "batching",
    "inference",
    "objectives",
    "models",
    "kernels",
    "data",
    "web",
    "system",
    "demo_data",
    "errors",
)
NEVER = {  # neighbours that could import each other but must not
    "objectives": {"data"},
    "models": {"data"},
    "kernels": {"data"},
    "inference": {"objectives"},
    "gguf": {"batching", "hub"},
    "training": {"gguf"},
    "evaluation": {"gguf", "hub"},
    "mining": {"gguf", "hub"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if name in FILES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules & FILES.keys()


GRAPH = {module: imports(path) for module, path in FILES.items()}
BELOW_THE_TOP = [module for module in GRAPH if module != "buleyean_rl"]


@pytest.mark.parametrize("module", BELOW_THE_TOP)
def test_a_file_imports_only_its_wing_and_those_below(module: str) -> None:
    own = wing(module)
    allowed = set(WINGS[WINGS.index(own) :]) - NEVER.get(own, set())
    others = {wing(name) for name in GRAPH[module] if name != "buleyean_rl"}
    assert others <= allowed, f"{module} imports {sorted(others - allowed)}"


def test_every_wing_is_in_the_table() -> None:
    assert {wing(module) for module in BELOW_THE_TOP} == set(WINGS)


def test_no_file_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({module: GRAPH[module] - {"buleyean_rl"} for module in BELOW_THE_TOP}).prepare()


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    assert not {path: lines for path, lines in lengths.items() if lines > 400}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_light_modules_stay_light() -> None:
    light = (
        "import buleyean_rl",
        "from buleyean_rl.cli import main; main(['--version'])",
        "import buleyean_rl.data.records, buleyean_rl.data.importers, buleyean_rl.inference.gguf_engines",
        "import buleyean_rl.mining.judges.rules, buleyean_rl.evaluation.repetition, buleyean_rl.hub.cards",
        "import buleyean_rl.training.runs, buleyean_rl.inference.chat",
    )
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "xllamacpp"}
    assert not loaded_by("; ".join(light)) & heavy
