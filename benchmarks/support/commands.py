"""Attacks on commands that need no server: damaged folders, code in folders, a full disk, two at once.

In:  tiny random models (damage.py). Out: figures of each case; what fails is also said on standard error.
Try: `python -m benchmarks.serve_robustness --only damaged-folders`
Flow: damage.py → **commands.py** → attacks.py (the list of all cases) → serve_robustness.py
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.support.damage import DAMAGES, damaged_copy, make_home, with_code
from benchmarks.support.neighbours import Case, Target, slowdown
from blsp import cli
from blsp.data.audio import write_wav
from blsp.data.files import dump_row
from blsp.data.jobs import lock_job
from blsp.llm import template_check
from tests.support.tiny_models import speech_like

WRONG_CONTENT = ("weights-nan", "weights-infinite", "tokenizer-ids")  # whole files with something wrong in them
ROWS, SHORT_ROWS = 40, 6
FULL_DISK = """
import resource, sys
from blsp import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


def blsp(*arguments: object) -> tuple[int, str]:
    """A command in this process: its exit code, and what it says on standard error."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = cli.main([str(argument) for argument in arguments])
    return code, said.getvalue()


def refused(code: int, said: str, *patterns: str) -> bool:
    """Whether a command ended with one line that says all of this, and no traceback; says it where not."""
    lines = [line for line in said.splitlines() if "blsp: error: " in line]  # a bar of progress may stand before it
    right = code == cli.FAILED and len(lines) == 1 and "Traceback" not in said and "unexpected" not in lines[0]
    right = right and all(re.search(pattern, lines[0]) for pattern in patterns)
    if not right:
        print(f"exit code {code}, not {patterns}: {said[-600:]}", file=sys.stderr)
    return right


@contextmanager
def home_of(rows: int) -> Iterator[Path]:
    """A folder with tiny models (`make_home`) and `rows.jsonl`, a manifest of so many clips."""
    with TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "home"
        home.mkdir()
        make_home(home)
        clips = []
        for number in range(rows):
            write_wav(home / f"{number}.wav", speech_like(1.0, number))
            clips.append({"id": str(number), "audio": f"{number}.wav", "text": "hello world"})
        (home / "rows.jsonl").write_bytes(b"".join(dump_row(clip, "rows.jsonl") for clip in clips))
        yield home


def commands(home: Path, out: Path) -> dict[str, tuple[Path, list[object]]]:
    """The output and the arguments of each command that works for long."""
    rows, adapter, cpu = home / "rows.jsonl", home / "adapter", ["--device", "cpu", "--dtype", "float32"]
    parts = ["--audio-model", home / "whisper", "--llm", home / "llama"]
    short = ["--max-new-tokens", 8]
    loss = ["--adapter", "grounded", "--loss", "ctc", "--readout", "data", "--steps", 2, "--batch-size", 2]
    written: dict[str, tuple[Path, list[object]]] = {
        "encode": (out / "cache", ["--manifest", rows, "--audio-model", home / "whisper", "--cache", out / "cache"]),
        "generate": (out / "answers.jsonl", ["--model", adapter, "--manifest", rows, *short, "--batch-size", 2]),
        "continue": (out / "told.jsonl", ["--llm", home / "llama", "--manifest", rows, *short]),
        "train": (out / "run", ["--data", rows, *parts, *loss]),
    }  # fmt: skip
    return {
        name: (path, [name, *arguments, *([] if name == "encode" else ["--out", path]), *cpu])
        for name, (path, arguments) in written.items()
    }


# --- the cases ------------------------------------------------------------------------------------------------


def damaged(wanted: Callable[[str], bool]) -> Callable[[Target], dict[str, float]]:
    """Each damage with such a name is refused by one line that names the folder."""

    def run(target: Target) -> dict[str, float]:
        every = [(part, name) for part, names in DAMAGES.items() for name in names if wanted(name)]
        chosen = every[:: max(1, round(1 / target.share))]
        figures = {"damages": len(chosen), "slowdown": slowdown(), "not_refused": 0, "slowest_s": 0.0}
        with home_of(0) as home, patch.object(template_check, "CHECKED_SECONDS", 1):
            for part, name in chosen:
                copy = home.with_name("copy")
                damaged_copy(home, part, name, copy)
                began = time.monotonic()
                answer = blsp("transcribe", copy / "a.wav", "--model", copy / "adapter")
                figures["slowest_s"] = max(figures["slowest_s"], round(time.monotonic() - began, 2))
                figures["not_refused"] += not refused(*answer, re.escape(str(copy / part)))
                shutil.rmtree(copy)
        return figures

    return run


def code_in_folders(_: Target) -> dict[str, float]:
    """Folders with code, of known and of unknown kinds of models, and a "y" on standard input."""
    figures = {"ran": 0, "asked": 0, "not_refused": 0}
    with home_of(0) as home:
        for changes in ({}, {"model_type": "mine"}):
            copy, ran, answers = home.with_name("copy"), home.with_name("ran"), io.StringIO("y\n" * 20)
            with_code(home, copy, ran, **changes)
            with patch.object(sys, "stdin", answers):
                code, said = blsp("transcribe", copy / "a.wav", "--model", copy / "adapter")
            figures["ran"] += ran.exists()
            figures["asked"] += answers.tell() > 0
            figures["not_refused"] += bool(changes) and not refused(code, said, re.escape(str(copy)))
            shutil.rmtree(copy)
    return figures


def one_output(target: Target) -> dict[str, float]:
    """A command whose output another one is writing: it says which process that is, and later it can work."""
    figures = {"commands": 0, "not_told": 0, "not_finished": 0}
    with home_of(SHORT_ROWS) as home:
        for name, (out, arguments) in list(commands(home, home / "out").items())[: target.times(4)]:
            if name == "train":
                out.mkdir(parents=True)
            with lock_job(out / "rows" if name == "encode" else out):  # encode: a manifest at a time in one cache
                answer = blsp(*arguments)
            figures["commands"] += 1
            figures["not_told"] += not refused(*answer, f"process {os.getpid()} ")
            figures["not_finished"] += blsp(*arguments)[0] != cli.DONE
    return figures


def full_disk(target: Target) -> dict[str, float]:
    """A disk with room for half of the largest file: which one, how much; the same command goes on afterwards."""
    figures = {"commands": 0, "not_named": 0, "not_finished": 0, "other_bytes": 0}
    with home_of(SHORT_ROWS) as home:
        whole = commands(home, home / "whole")
        for name, (out, arguments) in list(commands(home, home / "out").items())[: target.times(4)]:
            assert blsp(*whole[name][1])[0] == cli.DONE
            largest = max(files_of(whole[name][0]), key=lambda path: path.stat().st_size)
            room = largest.stat().st_size // 2
            limit = [sys.executable, "-c", FULL_DISK, str(room), *map(str, arguments)]
            done = subprocess.run(limit, capture_output=True, text=True, check=False)
            figures["commands"] += 1
            named = [re.escape(str(out.parent)), "no room for it: [^;]* bytes"]
            figures["not_named"] += not refused(done.returncode, done.stderr, *named)
            figures["not_finished"] += blsp(*arguments)[0] != cli.DONE
            again = max(files_of(out), key=lambda path: path.stat().st_size)
            if name != "encode":  # its clips may lie in another order
                figures["other_bytes"] += again.read_bytes() != largest.read_bytes()
    return figures


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]


def output_removed(target: Target) -> dict[str, float]:
    """The output's folder is deleted while the job is at work: it fails and says so."""
    figures = {"commands": 0, "not_told": 0}
    with home_of(ROWS) as home:
        for out, arguments in list(commands(home, home / "out").values())[: target.times(2)]:
            over = threading.Event()
            thread = threading.Thread(target=remove_when_written, args=(out.parent, over))
            thread.start()
            answer = blsp(*arguments)
            over.set()
            thread.join()
            figures["commands"] += 1
            figures["not_told"] += not refused(*answer, "was removed with its content")
    return figures


def remove_when_written(folder: Path, over: threading.Event) -> None:
    """Delete the folder once there is something in a file of it."""
    while not over.wait(0.001):
        if any(path.stat().st_size > 1000 for path in folder.rglob("*.f16")) or any(
            path.stat().st_size for path in folder.glob("*.jsonl")
        ):
            shutil.rmtree(folder)
            return


COMMANDS = (
    Case("damaged-folders", damaged(lambda name: name not in WRONG_CONTENT), {"not_refused": 0, "slowest_s": 20}, None),
    Case("wrong-weights", damaged(lambda name: name in WRONG_CONTENT), {"not_refused": 0}, None),
    Case("code-in-folders", code_in_folders, {"ran": 0, "asked": 0, "not_refused": 0}, None),
    Case("one-output", one_output, {"not_told": 0, "not_finished": 0}, None),
    Case("full-disk", full_disk, {"not_named": 0, "not_finished": 0, "other_bytes": 0}, None),
    Case("output-removed", output_removed, {"not_told": 0}, None),
)  # fmt: skip
