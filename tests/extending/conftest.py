"""The code blocks and commands of docs/extending.md, and a way to run them on tiny models."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {  # name -> text of each block that begins with a comment with a file name
    match[2]: match[1] for match in re.finditer(r"```\w+\n(# (\S+\.(?:py|yaml))\n.*?)```", PAGE, re.DOTALL)
}


def commands_with(name: str) -> list[list[str]]:
    """The words of the commands in the block after the file `name`, without `blsp`."""
    block = re.search(rf"# {re.escape(name)}\n.*?```\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None, f"docs/extending.md shows no commands for {name}"
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("blsp ")]


@pytest.fixture
def run_page(tmp_path: Path, tiny_whisper: str, tiny_llm: Callable[[str], str]) -> Callable[..., str]:
    """`run_page(file, *more)` writes the file into a fresh folder and runs its commands there, with tiny models.

    more: flags for every command. Returns what the commands printed.
    """

    def run(name: str, *more: str) -> str:
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
        source = str(Path(__file__).parents[2] / "src")
        environment = os.environ | {"PYTHONPATH": source}
        environment |= {"BLSP_PLUGINS": name} if name.endswith(".py") else {}
        models = {"embedded:whisper-tiny.en": tiny_whisper, "embedded:smollm2-135m-instruct": tiny_llm("llama")}
        printed = ""
        for words in commands_with(name):
            words = [models.get(word, word) for word in words]
            command = [sys.executable, "-m", "blsp", *words, *more]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
        return printed

    return run
