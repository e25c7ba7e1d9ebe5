"""Any Hugging Face dataset with an audio column (needs the `datasets` library: pip install "blsp[data]").

    >>> next(hugging_face(Wanted(root="google/fleurs", subset="en_us", split="test", ...)))

In: a folder (of `save_to_disk`, or of files that `load_dataset` understands) or a hub id, which is fetched
because the user named it. Out: utterances, streaming. Audio is never decoded here: where the dataset holds
the file's bytes, they are written, as they are, into the folder beside the manifest; where it names a local
file, that file is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blsp.data.corpora.reading import CorpusError, Dropped, Read, Row, Wanted, heard, iso
from blsp.data.manifest import FIELD_SET

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "raw_transcription", "normalized_text")
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id")
LANGUAGE_COLUMNS = ("language", "locale", "lang_id")
KINDS_OF_AUDIO = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff"}


def hugging_face(wanted: Wanted) -> Read:
    """Row N of the split becomes the id SPLIT-N; columns of plain values are kept as further fields."""
    for split in wanted.splits:
        rows, audio_column, columns = _open(wanted, split)
        text_column = _text_column(wanted, columns)
        if wanted.reference_field and wanted.reference_field not in columns:
            raise CorpusError(
                f"{wanted.root}: no column {wanted.reference_field!r}; it has {', '.join(columns)}"
            )
        for number, row in enumerate(rows):
            yield _row(f"{split}-{number:08d}", row, audio_column, text_column, wanted)


def _open(wanted: Wanted, split: str) -> tuple[Iterator[dict[str, Any]], str, list[str]]:
    """The rows of a split, undecoded, the name of the audio column, and all columns."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('prepare hf needs the datasets library: pip install "blsp[data]"') from error
    try:
        found = _load(datasets, wanted, split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(f"{wanted.root}, split {split!r}: cannot be opened ({first})") from error
    features = found.features or found._resolve_features().features
    audio = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if len(audio) != 1:
        raise CorpusError(
            f"{wanted.root}: {len(audio)} columns of audio among {', '.join(features)}; one is needed"
        )
    # a folder of files yields paths, which the library would not pass on without its own decoder
    as_it_is = (
        datasets.Value("string") if found.info.builder_name == "audiofolder" else datasets.Audio(decode=False)
    )
    return iter(found.cast_column(audio[0], as_it_is)), audio[0], list(features)


def _load(datasets: Any, wanted: Wanted, split: str) -> Any:
    folder = Path(wanted.root)
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(wanted.root)[split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(wanted.root)
    return datasets.load_dataset(wanted.root, wanted.subset, split=split, streaming=True)


def _text_column(wanted: Wanted, columns: list[str]) -> str:
    if wanted.text_field is not None:
        if wanted.text_field not in columns:
            raise CorpusError(f"{wanted.root}: no column {wanted.text_field!r}; it has {', '.join(columns)}")
        return wanted.text_field
    for name in TEXT_COLUMNS:
        if name in columns:
            return name
    raise CorpusError(
        f"{wanted.root}: which column is the transcript? Say --text-field, one of {', '.join(columns)}"
    )


def _row(id: str, row: dict[str, Any], audio_column: str, text_column: str, wanted: Wanted) -> Row:
    given = row[audio_column] or {}
    audio = _audio_file(id, {"path": given} if isinstance(given, str) else given, wanted.made_audio)
    if audio is None:
        return Dropped(id, "", "no audio file: the row holds neither bytes nor a local path")
    taken = {audio_column, text_column, wanted.reference_field, "language", "speaker"}
    extra = {
        f"source_{name}" if name in FIELD_SET else name: value  # its `duration` may be in milliseconds
        for name, value in row.items()
        if name not in taken and _is_plain(value)
    }
    reference = row.get(wanted.reference_field) if wanted.reference_field else None
    language = wanted.language or _first(row, LANGUAGE_COLUMNS)
    return heard(
        id,
        audio,
        str(row[text_column] or ""),
        language=iso(language),
        speaker=_first(row, SPEAKER_COLUMNS),
        reference=None if reference is None else str(reference),
        extra=extra,
    )


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    values = [row[name] for name in names if isinstance(row.get(name), str | int)]
    return str(values[0]) if values else None


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | bool) or (isinstance(value, float) and value == value)


def _audio_file(id: str, audio: dict[str, Any], folder: Path) -> Path | None:
    """The file that the row names, or its bytes written to one (once: a second run finds it)."""
    data, path = audio.get("bytes"), audio.get("path")
    if data is None:
        return Path(path).absolute() if path and Path(path).exists() else None
    suffix = Path(path or "").suffix or KINDS_OF_AUDIO.get(bytes(data[:4]), ".mp3")
    target = folder / f"{id}{suffix}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_bytes(data)
        os.replace(partial, target)
    return target
