"""The documentation: all commands that it shows are valid, and all files that it names exist."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from blsp import cli, settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_WITH_COMMANDS = [
    *(page for page in PAGES if page.name != "extending.md"),  # tests/extending runs the commands of that one
    *sorted(path for name in ("examples", "models", "recipes") for path in (ROOT / name).rglob("*.md")),
]


def commands_in(text: str) -> list[str]:
    """Lines that call `blsp COMMAND`, joined where they go on, without prompt, comment and environment."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"(?:^|\s|&& )(?:\$ )?(?:-m )?blsp ([a-z]+ .*|[a-z]+$)", line)
        if match and match[1].split()[0] in cli.COMMANDS:
            found.append(match[1].removesuffix("; done"))
    return found


def shown() -> list[tuple[str, str]]:
    """Where each command is shown, and the command."""
    found = []
    for page in PAGES_WITH_COMMANDS:
        where = str(page.relative_to(ROOT))
        found += [(where, command) for command in commands_in(page.read_text(encoding="utf-8"))]
    for command in cli.COMMANDS.values():
        found += [(command.settings, shown) for shown in commands_in(getattr(settings, command.settings).__doc__)]
    return found


@pytest.mark.parametrize(("where", "command"), shown())
def test_every_command_that_is_shown_is_one(where: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    name, flags = words[0], words[1:]
    if "--config" in flags and not Path(flags[flags.index("--config") + 1]).exists():
        return  # a file of the reader's own
    try:
        cli.parse(name, flags)
    except SystemExit as left:
        assert left.code == 0, f"{where}: blsp {command}"


RECIPES = [
    path
    for name in ("examples", "recipes")
    for path in sorted((ROOT / name).rglob("*.yaml"))
    if path.name != "ablation.yaml"  # not a recipe itself: tests/recipes/ reads each of its arms
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.relative_to(ROOT)))
def test_every_training_recipe_can_be_read(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    data = [] if "data:" in text else ["--data", "continued.jsonl"]
    settings = cli.parse("train", ["--config", str(recipe), *data, "--out", "runs/x"])
    assert bool(settings.stages) == ("stages:" in text)


def test_the_tour_script_is_made_of_commands() -> None:
    script = (ROOT / "examples" / "tour.sh").read_text(encoding="utf-8")
    shown = [line for line in commands_in(script) if "`" not in line]
    assert [line.split()[0] for line in shown] == ["continue", "encode", "train", "generate", "transcribe"]
    for line in shown:
        words = [re.sub(r"\$(\w+)", r"\1", word) for word in shlex.split(line)]
        cli.parse(words[0], [str(ROOT / word) if word.endswith(".yaml") else word for word in words[1:]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_pointed_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"
    if page.name == "log.md":
        return  # its entries name the files of their day
    for path in re.findall(r"`((?:docs|examples|tests|src|models|recipes|requirements)/[\w./-]+)`", text):
        if "blsp-" not in path and os.sep in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("config", sorted((ROOT / "models").glob("*/config.json")), ids=lambda each: each.parent.name)
def test_a_shipped_adapter_names_its_parts_not_the_makers_folders(config: Path) -> None:
    written = json.loads(config.read_text(encoding="utf-8"))
    for part in ("audio", "text"):
        assert written[f"{part}_config"]["_name_or_path"] == written[f"{part}_model_id"]
