"""The one-page example: its length, a run, and its two measurements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "examples" / "read_me_first.py"


def test_it_is_one_page() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.embedded
def test_it_runs_and_measures() -> None:
    command = [sys.executable, str(PAGE), "--clips", "3", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"divergence ([\d.]+), with exchanged recordings ([\d.]+): (.*)", done.stdout)
    (fresh, fresh_exchanged, verdict), (own, exchanged, shipped_verdict) = figures
    assert verdict == "it does not listen yet" and abs(float(fresh) - float(fresh_exchanged)) < 0.1
    assert shipped_verdict == "it listens" and float(own) < 0.6 * float(exchanged)
    assert "Ottawa" in done.stdout
