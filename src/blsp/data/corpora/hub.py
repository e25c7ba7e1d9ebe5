"""Reader of any Hugging Face dataset with an audio column (needs `datasets`: pip install "blsp[data]").

In:  a folder (of `save_to_disk`, or of files that `load_dataset` understands), or a hub id, which is fetched
     because the user named it.
Out: utterances, one at a time.
Try: `next(hugging_face(ReadRequest(root="google/fleurs", subset="en_us", split="test", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

Audio is not decoded here. Where the dataset holds a file's bytes, they are written, unchanged, into a folder
beside the manifest; where it names a local file, the row names that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blsp.data.corpora.reading import CorpusError, Dropped, ReadRequest, Row, Rows, iso, make_row
from blsp.data.files import write_atomically
from blsp.data.manifest import FIELD_SET

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "raw_transcription", "normalized_text")
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id")
LANGUAGE_COLUMNS = ("language", "locale", "lang_id")
KINDS_OF_AUDIO = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff"}


def hugging_face(request: ReadRequest) -> Rows:
    """Row N of the split becomes the id SPLIT-N; columns of plain values are kept as further fields."""
    for split in request.splits:
        rows, audio_column, columns = _open(request, split)
        text_column = _text_column(request, columns)
        if request.reference_field and request.reference_field not in columns:
            raise CorpusError(f"{request.root}: no column {request.reference_field!r}; it has {', '.join(columns)}")
        for number, row in enumerate(rows):
            yield _row(f"{split}-{number:08d}", row, audio_column, text_column, request)


def _open(request: ReadRequest, split: str) -> tuple[Iterator[dict[str, Any]], str, list[str]]:
    """The rows of a split, undecoded, the name of the audio column, and all columns."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('prepare hf needs the datasets library: pip install "blsp[data]"') from error
    try:
        dataset = _load(datasets, request, split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(f"{request.root}, split {split!r}: cannot be opened ({first})") from error
    features = dataset.features or dataset._resolve_features().features
    audio = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if len(audio) != 1:
        raise CorpusError(f"{request.root}: {len(audio)} columns of audio among {', '.join(features)}; one is needed")
    # a folder of files yields paths, which the library would not pass on without its own decoder
    as_it_is = datasets.Value("string") if dataset.info.builder_name == "audiofolder" else datasets.Audio(decode=False)
    return iter(dataset.cast_column(audio[0], as_it_is)), audio[0], list(features)


def _load(datasets: Any, request: ReadRequest, split: str) -> Any:
    folder = Path(request.root)
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(request.root)[split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(request.root)
    return datasets.load_dataset(request.root, request.subset, split=split, streaming=True)


def _text_column(request: ReadRequest, columns: list[str]) -> str:
    if request.text_field is not None:
        if request.text_field not in columns:
            raise CorpusError(f"{request.root}: no column {request.text_field!r}; it has {', '.join(columns)}")
        return request.text_field
    for name in TEXT_COLUMNS:
        if name in columns:
            return name
    raise CorpusError(f"{request.root}: which column is the transcript? Say --text-field, one of {', '.join(columns)}")


def _row(id: str, row: dict[str, Any], audio_column: str, text_column: str, request: ReadRequest) -> Row:
    given = row[audio_column] or {}
    audio = _audio_file(id, {"path": given} if isinstance(given, str) else given, request.made_audio)
    if audio is None:
        return Dropped(id, "", "no audio file: the row holds neither bytes nor a local path")
    taken = {audio_column, text_column, request.reference_field, "language", "speaker"}
    extra = {
        f"source_{name}" if name in FIELD_SET else name: value  # its `duration` may be in milliseconds
        for name, value in row.items()
        if name not in taken and _is_plain(value)
    }
    reference = row.get(request.reference_field) if request.reference_field else None
    language = request.language or _first(row, LANGUAGE_COLUMNS)
    return make_row(
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
        with write_atomically(target) as partial:
            partial.write_bytes(data)
    return target
