"""Every benchmark, one after another, gathered into one file.

In:  the scripts beside this file (or those named). Out: results/bench.json: script name → the JSON of its last line.
Try: `make bench`, or `python -m benchmarks generate_step1 --out results/bench.json`
Flow: benchmarks/ — quiet the machine first: the scripts interleave what they compare, but not with other work.

A script that fails is named at the end and leaves the figures that an earlier run has put under its name.
The server's (`serve_…`) are left to `make bench-serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

APART = {"__main__", "serve_load", "serve_robustness"}  # `make bench-serve` runs these


def main() -> int:
    """Run what was named, or everything, and write what came out after each script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts, without .py; none: all of them")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    arguments = parser.parse_args()
    folder = Path(__file__).parent
    names = arguments.names or sorted(path.stem for path in folder.glob("*.py") if path.stem not in APART)
    failed = gather([folder / f"{name}.py" for name in names], arguments.out)
    print(f"{arguments.out}: {len(names) - len(failed)} of {len(names)} benchmarks")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def gather(scripts: Sequence[Path], out: Path) -> list[str]:
    """Run the scripts, keep the figures of each in `out`; returns the names of those that failed."""
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in scripts:
        print(f"── {script.stem}", flush=True)
        figures = figures_of(script)
        if figures is None:
            failed.append(script.stem)
            continue
        found[script.stem] = figures
        fresh = out.with_suffix(".writing")
        fresh.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(out)
    return failed


def figures_of(script: Path) -> dict[str, Any] | None:
    """The JSON object on the script's last line, its output passed on; None when there is none."""
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},  # scripts import their neighbours
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    if process.wait() != 0:
        return None
    try:
        figures = json.loads(last)
    except ValueError:
        return None
    return figures if isinstance(figures, dict) else None


if __name__ == "__main__":
    sys.exit(main())
