"""Silence and noise to learn the set answer from: a small folder of clips and their manifest.

In:  a folder, a seed.
Out: ``no_speech.jsonl`` and the wav files it names, as `blsp prepare no-speech` makes them (without babble).
Try: ``write_no_speech(Path("runs/x/no_speech"), seed=0)``
Flow: `--no-speech SHARE` -> **no_speech.py** -> one more data file of the run (training/sources.py). Better:
      name a manifest of recorded silence, noise and music with the same field among --data.
"""

from __future__ import annotations

from pathlib import Path

from blsp.data.corpora.layout import Wanted
from blsp.data.corpora.no_speech import no_speech
from blsp.data.manifest import Utterance, write_manifest

CLIPS = 64


def write_no_speech(folder: Path, seed: int) -> Path:
    """The manifest's path; what is there already is not made again."""
    manifest = folder / "no_speech.jsonl"
    if not manifest.exists():
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wanted = Wanted("", "", None, None, made_audio=folder, limit=CLIPS, seed=seed)
        rows = (row for row in no_speech(wanted) if isinstance(row, Utterance))
        write_manifest(manifest, rows, relative_to=folder)
    return manifest
