"""Clips that are measured during training: from the run's own data, and from the files of --val-data.

In:  the reader of examples; `--val-data NAME=FILE`.
Out: one `Probe` for each part: `held_out`, `train`, and each NAME.
Try: `validation_sources(("clean=dev-clean.jsonl",))`
Flow: training/run.py → **validation.py** → probes.py measures them every `--probe-every` steps
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blsp.data.jobs import SkippedLog
from blsp.distributed import Runtime
from blsp.settings import SettingsError
from blsp.training.dataset import Refused, Source, open_dataset, open_sources
from blsp.training.examples import Example, ExampleReader, RowMeasurer
from blsp.training.probes import Probe

PROBE_ROWS = 24  # of each part; they give the divergence within about a tenth of its value, in seconds
OWN_PARTS = ("held_out", "train")


def validation_sources(flags: Sequence[str]) -> dict[str, Source]:
    """The files of --val-data by their names."""
    sources: dict[str, Source] = {}
    for flag in flags:
        name, _, path = flag.partition("=")
        if not path or not name.isidentifier() or name in (*OWN_PARTS, *sources):
            raise SettingsError(f"--val-data {flag}: must read NAME=FILE, each NAME once and none {OWN_PARTS}")
        (sources[name],) = open_sources([path])
    return sources


def open_probes(reader: ExampleReader) -> tuple[Probe, ...]:
    """The clips of the run's own data."""
    parts = {"held_out": reader.dataset.held_out, "train": reader.dataset.rows}
    return tuple(Probe(part, draw_examples(reader, rows, PROBE_ROWS)) for part, rows in parts.items())


def open_validation(
    reader: ExampleReader, sources: Mapping[str, Source], measurer: RowMeasurer, out: Path, runtime: Runtime
) -> tuple[Probe, ...]:
    """The clips of each file, measured into OUT/validation/NAME."""
    probes = []
    for name, source in sources.items():
        folder = out / "validation" / name
        folder.mkdir(parents=True, exist_ok=True)
        skipped = SkippedLog(folder / f"rows.rank{runtime.rank}")
        own = replace(measurer, templates=[], _numbers={})  # only the prompts of this file
        dataset = open_dataset([source], own, folder, skipped, 0, runtime)
        probes.append(Probe(name, draw_examples(replace(reader, dataset=dataset), dataset.rows, PROBE_ROWS)))
    return tuple(probes)


def draw_examples(reader: ExampleReader, rows: NDArray[np.void], count: int) -> list[Example]:
    """Examples of `count` of the rows: always the same ones, not augmented, all with speech."""
    plain = replace(reader, augmentation=())
    examples: list[Example] = []
    for row in rows[np.random.default_rng(0).permutation(len(rows))[: 2 * count]]:
        try:
            examples += [] if row["no_speech"] else [plain.example(row, epoch=0)]
        except Refused:  # more rows are drawn than needed
            continue
    return examples[:count]
