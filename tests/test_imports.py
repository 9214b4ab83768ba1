"""Data flows one way: which module of the package may import which, and what the command may not drag in."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import buleyean_rl

PACKAGE = Path(buleyean_rl.__file__).parent

# The layout's table: to the left a module or folder, to the right all it may import of ours.
MAY_IMPORT = {
    "environment": "",
    "errors": "",
    "records": "errors",
    "importers": "records errors",
    "boundary": "records",
    "tokenised": "boundary cache records",
    "complement": "errors",
    "losses": "complement errors",
    "json_file": "",
    "cache": "json_file",
    "arithmetic": "",
    "kernels": "arithmetic cache",
    "head": "arithmetic kernels",
    "softmax": "arithmetic complement head kernels",
    "fused": "arithmetic losses complement head softmax",
    "likelihood": "head",
    "attention": "arithmetic kernels",
    "batches": "attention boundary complement softmax",
    "allocator": "",
    "gradients": "",
    "lora": "arithmetic gradients kernels",
    "layers": "arithmetic attention kernels lora",
    "decoder": "attention kernels layers lora",
    "pre_tokenizers": "",
    "models": "allocator arithmetic cache cards decoder errors head kernels layers lora pre_tokenizers",
    "reference": "head losses softmax",
    "trainer": "allocator attention batches boundary errors fused gradients head lora losses models reference softmax",
    "evaluate": "batches boundary complement engines errors fused head importers layers likelihood loading "
    "losses models records trainer",
    "cards": "records",
    "report": "cards errors json_file",
    "demo_data": "",
    "settings": "errors trainer",
    "estimate": "allocator attention boundary progress report tokenised trainer",
    "progress": "",
    "guard": "attention batches boundary engines evaluate head likelihood models trainer",
    "train": "boundary cache demo_data engines errors estimate evaluate guard json_file lora losses mine models "
    "progress records reference report tokenised trainer",
    "engines": "errors",
    "gguf_export": "models engines errors pre_tokenizers",
    "export": "cards engines gguf_export models errors",
    "chat": "engines errors",
    "hub": "cards engines errors",
    "judges": "engines errors evaluate records",
    "loading": "engines errors models",
    "mine": "cache engines errors evaluate judges models records",
    "void": "engines errors importers loading models records train trainer",
    "walk": "demo_data engines errors evaluate json_file judges loading mine models records settings train trainer",
    "demo": "demo_data engines errors evaluate export json_file loading mine models records report train walk",
}


def module_name(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted({module_name(path) for path in PACKAGE.rglob("*.py")} - {"__init__"})


def own_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        ours = (name.split(".") for name in names)
        found |= {parts[1] for parts in ours if parts[0] == "buleyean_rl" and parts[1] in MODULES}
    return found


def edges(module: str) -> set[str]:
    files = [path for path in PACKAGE.rglob("*.py") if module_name(path) == module]
    return set().union(*map(own_imports, files)) - {module}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "cli"])
def test_a_module_imports_only_what_the_layout_allows(module: str) -> None:
    assert module in MAY_IMPORT, f"{module} is new: give it a row in the table"
    assert edges(module) <= set(MAY_IMPORT[module].split())


def test_the_table_names_only_modules_that_exist() -> None:
    named = set(MAY_IMPORT) | {name for row in MAY_IMPORT.values() for name in row.split()}
    assert named <= set(MODULES)


def test_there_is_no_cycle() -> None:
    order = list(TopologicalSorter({module: edges(module) for module in MODULES}).static_order())
    assert order.index("records") < order.index("boundary") < order.index("trainer") < order.index("train")


def test_nothing_imports_the_command() -> None:
    assert not any("cli" in edges(module) for module in MODULES)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import buleyean_rl",
        "import buleyean_rl.cli",
        "from buleyean_rl.cli import main; main(['--version'])",
        "import buleyean_rl.records, buleyean_rl.importers, buleyean_rl.engines, buleyean_rl.report",
    ],
)
def test_light_modules_stay_light(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "transformers", "peft", "datasets", "matplotlib", "xllamacpp"}
