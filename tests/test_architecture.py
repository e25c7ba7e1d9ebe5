"""Architecture: the direction of imports, no cycles, no torch where help must be fast, files that can be read.

Rows, from first to last: settings; data, distributed; llm, weights; model, features; continuation, training,
inference; evaluation, serving. A module imports only from its own row or from the rows before it. The top modules
(cli, tour, vllm_plugin, the lazy names of `blsp`) are outside the rows: they may import anything, and no room imports
them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
TOP = {"__init__", "__main__", "cli", "tour", "vllm_plugin"}
TORCH_FREE = {"__init__", "__main__", "cli", "settings", "data"}
TORCH = {"torch", "transformers", "accelerate", "torchaudio"}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def room_of(module: Path) -> str:
    """The room of a file: its folder, or its own name at the top."""
    return module.parts[0].removesuffix(".py")


def row_of(room: str) -> int:
    return next(row for row, rooms in enumerate(ROWS) if room in rooms)


def imports(module: Path) -> Iterator[str]:
    """Every module imported anywhere in the file, also inside functions; not those for type checkers."""
    tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
    for_type_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            assert node.module is not None
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                yield submodule if file_of(submodule) else node.module


def file_of(name: str) -> Path | None:
    """The file of a module of ours, `blsp.data.audio` or `blsp.data`; None for anything else."""
    first, *parts = name.split(".")
    path = Path(*parts)
    if first != "blsp":
        return None
    candidates = (path.with_suffix(".py") if parts else Path(), path / "__init__.py")
    return next((file for file in candidates if file in MODULES), None)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_follow_the_rows(module: Path) -> None:
    room = room_of(module)
    if room in TOP:
        return
    for name in imports(module):
        if name.startswith("blsp."):
            other = name.split(".")[1]
            assert other not in TOP, f"{module} imports the top module {name}"
            assert row_of(other) <= row_of(room), f"{module} (row of {room}) imports {name} from a later row"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too: a circle may not be hidden there."""
    graph = {
        module: {file for name in imports(module) if (file := file_of(name)) and file != module} for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(map(str, error.args[1]))) from None


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in TORCH_FREE], ids=str)
def test_help_and_data_never_import_torch(module: Path) -> None:
    assert not TORCH & {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_can_be_read_in_one_sitting(module: Path) -> None:
    text = (SOURCE / module).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{module}: split it, it has more than 400 lines"
    assert ast.get_docstring(ast.parse(text)), (
        f"{module}: begin with what it is, what goes in and out, and a call to try"
    )
    assert not re.search(r"utils|helpers|common|manager|^base", module.stem), f"{module}: name it after what it does"


def test_every_package_names_its_files() -> None:
    for init in (module for module in MODULES if module.name == "__init__.py" and len(module.parts) == 2):
        told = ast.get_docstring(ast.parse((SOURCE / init).read_text(encoding="utf-8"))) or ""
        files = [file.name for file in (SOURCE / init).parent.glob("*.py") if file != SOURCE / init]
        missing = [name for name in sorted(files) if name not in told]
        assert not missing, f"{init}: its docstring does not name {', '.join(missing)}"


def test_the_page_on_architecture_names_every_file() -> None:
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.split(r"^  (\w+)/ ", page.split("```")[1], flags=re.MULTILINE)  # top, room, its text, room, …
    rooms = {"": tree[0]} | dict(zip(tree[1::2], tree[2::2], strict=True))
    for module in MODULES:
        room = module.parts[0] if len(module.parts) > 1 else ""
        name = module.name if module.parts[1:2] != ("corpora",) else module.stem
        assert module.name == "__init__.py" or name in rooms[room], f"docs/architecture.md: no line for {module}"


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports test files by their bare name"
