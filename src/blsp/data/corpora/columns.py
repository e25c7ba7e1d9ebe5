"""Columns of tables: which one is the audio and which the text; and the utterance in a row.

In:  a row's values by column.
Out: an utterance, or `Dropped` with the reason why the row is left out.
Try: `table_row("clips-00000002", {"path": "a.wav", "text": "hello"}, ("path", "text"), request, folder)`
Flow: data/corpora/ — used by the readers of tables, shards and Hugging Face datasets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blsp.data.addresses import is_url
from blsp.data.corpora.reading import CorpusError, Dropped, ReadRequest, Row, iso, make_row
from blsp.data.manifest import FIELD_SET

AUDIO_COLUMNS = ("audio", "audio_filepath", "audio_path", "path", "file", "file_name", "filename", "wav", "clip")
TEXT_COLUMNS = (
    *("text", "sentence", "transcription", "transcript", "raw_transcription", "normalized_text"),
    *("answer_text", "label"),
)
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
LANGUAGE_COLUMNS = ("language", "locale", "lang", "lang_id")

Values = dict[str, Any]


def find_column(asked: str | None, known: Sequence[str], columns: Sequence[str], flag: str, source: Path | str) -> str:
    """The column named by the flag, or the first one with a known name (upper or lower case)."""
    spelt = {column.strip().lower(): column for column in reversed(columns)}
    name = asked if asked is not None else next((spelt[name] for name in known if name in spelt), None)
    if name in columns:
        return str(name)
    problem = f"no column {name!r}" if name else f"which column is it? Say {flag}"
    raise CorpusError(f"{source}: {problem}; it has {', '.join(columns) or 'no columns'}")


def table_row(
    made_id: str, values: Values, columns: tuple[str, str], request: ReadRequest, folder: Path | None = None
) -> Row:
    """The utterance in a table's row. folder: where relative paths start."""
    audio_column, text_column = columns
    id = made_id if values.get("id") in (None, "") else str(values["id"])
    audio = values.get(audio_column)
    if not isinstance(audio, str) or not audio.strip():
        return Dropped(id, "", f"no audio: column {audio_column} is empty")
    if folder is not None and not is_url(audio) and not audio.startswith("data:"):
        audio = os.path.join(folder, audio)
    times: dict[str, Any] = {}
    names = ("start", "duration", "end") if "start" in values else ("start", "duration")
    for name in names:
        if (given := values.get(name)) not in (None, ""):
            try:
                times[name] = float(given)
            except (TypeError, ValueError):
                return Dropped(id, audio, f"no time: {name} is {given!r}, which is not a number of seconds")
            if not 0 <= times[name] < 1e9:
                return Dropped(id, audio, f"no time: {name} is {given!r} seconds")
    if (end := times.pop("end", None)) is not None:
        if end <= times.get("start", 0.0):
            return Dropped(id, audio, f"no time: end is {end:g} seconds, and start {times.get('start', 0.0):g}")
        times.setdefault("duration", round(end - times.get("start", 0.0), 6))
    reference_column = request.reference_column or "reference"
    taken = {"id", audio_column, text_column, reference_column, *names, "language", "speaker"}
    fields: dict[str, Any] = {
        "language": iso(request.language or first_text(values, LANGUAGE_COLUMNS)),
        "speaker": first_text(values, SPEAKER_COLUMNS),
        "reference": first_text(values, (reference_column,)),
    }
    if isinstance(values.get("instruction"), str):
        fields["instruction"] = values["instruction"]
    if _is_texts(values.get("options")):
        fields["options"] = tuple(values["options"])
    extra = {name: value for name, value in values.items() if name not in taken | set(fields) and name}
    extra = {f"source_{name}" if name in FIELD_SET else name: value for name, value in extra.items()}
    if "no_speech" in extra:  # tables without types hold it as a word
        extra["no_speech"] = str(extra["no_speech"]).strip().lower() in ("true", "1")
    text = values.get(text_column)
    return make_row(id, audio, "" if text is None else str(text), extra=extra, **times, **fields)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def first_text(values: Values, names: Sequence[str]) -> str | None:
    """The value of the first of these columns that holds a text or a number."""
    found = [values[name] for name in names if isinstance(values.get(name), str | int) and values[name] != ""]
    return str(found[0]) if found else None
