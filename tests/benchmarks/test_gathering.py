"""`make bench` stores one JSON object for each script, and keeps the earlier one if a script fails."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.__main__ import gather


def test_last_lines_are_gathered_and_failures_named(tmp_path: Path) -> None:
    out = tmp_path / "results" / "bench.json"
    scripts = {
        "good": "print('at work'); print('{\"ratio\": 4.5}')",
        "broken": "raise SystemExit(3)",
        "silent": "print('no figures')",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    out.parent.mkdir()
    out.write_text('{"broken": {"ratio": 2}}')
    failed = gather([tmp_path / f"{name}.py" for name in scripts], out)
    assert failed == ["broken", "silent"]
    assert json.loads(out.read_text()) == {"broken": {"ratio": 2}, "good": {"ratio": 4.5}}
