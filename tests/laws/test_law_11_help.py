"""Law 11: `blsp --help` answers in under half a second and without torch."""

from __future__ import annotations

import subprocess
import sys
import time


def test_help_answers_in_under_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        answer = subprocess.run([sys.executable, "-m", "blsp", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert answer.returncode == 0 and "transcribe" in answer.stdout
    assert min(seconds) < 0.5  # the least of five: the machine may be busy with something else


def test_help_answers_without_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'numpy', 'tyro') if m in sys.modules]"
    program = f"import sys, blsp, blsp.cli; blsp.cli.main(['--help']); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
