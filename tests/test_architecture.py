"""The house's order, held by its imports: a module imports only from its own row or the rows before it.

Rows: 0 data; 1 model; 2 continuation, training, inference; 3 evaluation, serving. The doors (cli, tour, the
vLLM plugin, the lazy names of `blsp`) stand outside and may open on anything; nothing inside imports them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "blsp"
ROWS = [
    {"settings"},
    {"data", "distributed"},
    {"llm", "weights"},
    {"model", "features"},
    {"continuation", "training", "inference"},
    {"evaluation", "serving"},
]
DOORS = {"__init__", "__main__", "cli", "plugins", "tour"}
TORCH_FREE = {"__init__", "__main__", "cli", "plugins", "settings", "data"}
TORCH = {"torch", "transformers", "accelerate", "torchaudio"}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def part_of(module: Path) -> str:
    """The part of the house that a file belongs to: its folder, or its own name at the top."""
    return module.parts[0].removesuffix(".py")


def row_of(part: str) -> int:
    """The row in which a part stands."""
    return next(row for row, parts in enumerate(ROWS) if part in parts)


def imports(module: Path) -> Iterator[str]:
    """Every module imported anywhere in the file, inside functions too; imports for type checkers are left
    out."""
    tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if node.module == "blsp")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_follow_the_rows(module: Path) -> None:
    part = part_of(module)
    if part in DOORS:
        return
    for name in imports(module):
        if name.startswith("blsp."):
            other = name.split(".")[1]
            assert other not in DOORS, f"{module} imports the door {name}"
            assert row_of(other) <= row_of(part), f"{module} (row of {part}) imports {name} from a later row"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in TORCH_FREE], ids=str)
def test_doors_and_data_never_import_torch(module: Path) -> None:
    assert not TORCH & {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_are_pages(module: Path) -> None:
    text = (SOURCE / module).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{module}: past 400 lines it wants to be two files"
    assert ast.get_docstring(ast.parse(text)), (
        f"{module}: open with what it does, what goes in and out, and a call to try"
    )
    assert not re.search(r"utils|helpers|common|manager|^base", module.stem), (
        f"{module}: name it after what it does"
    )


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports test files by their bare name"
