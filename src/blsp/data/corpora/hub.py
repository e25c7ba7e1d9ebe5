"""Reader of any Hugging Face dataset with an audio column (needs `datasets`: pip install "blsp[data]").

In:  a folder (of `save_to_disk`, or of files that `load_dataset` understands), or a hub id, whose files are fetched.
Out: utterances, one at a time.
Try: `next(hugging_face(ReadRequest(root="google/fleurs", subset="en_us", split="test", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

Audio is not decoded or copied. If the dataset contains a file's bytes, the row has their address in the Parquet or
Arrow file (data/addresses.py). If it names a file, the row names the same file. The audio column itself is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from blsp.data.addresses import is_url, open_url
from blsp.data.corpora.columns import TEXT_COLUMNS, Values, find_column, table_row
from blsp.data.corpora.reading import CorpusError, Dropped, ReadRequest, Rows
from blsp.data.corpora.shards import read_webdataset
from blsp.data.hub_names import hub_trouble, is_missing_path

AT_A_TIME = 1024  # rows of a table that are read at once, without their audio


def hugging_face(request: ReadRequest) -> Rows:
    """Row N of a split gets the id SPLIT-N; columns of plain values are kept as further fields."""
    _check_path(request.root)
    try:
        import datasets
    except ImportError as error:
        raise ImportError('prepare hf needs the datasets library: pip install "blsp[data]"') from error
    _check_hub(datasets, request.root)
    for split in request.splits:
        try:
            kind, files, dataset = _load(datasets, request, split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorpusError(f"{request.root}, split {split!r}: cannot be opened ({first})") from error
        if kind == "webdataset":
            for file in files:
                yield from read_webdataset(file, request)
            continue
        rows, features = _stored(datasets, files) if kind in ("parquet", "arrow") else _streamed(datasets, dataset)
        columns = _columns(datasets, features, request)
        for number, row in enumerate(rows(columns[0])):
            yield _row(f"{split}-{number:08d}", row, columns, request)


def _check_path(root: str) -> None:
    """Raise CorpusError for a file, and for a path that does not exist."""
    if Path(root).is_file():
        raise CorpusError(f"{root}: is a file; --root is a folder or a hub id (tables: `blsp prepare csv|tsv|jsonl`)")
    if not is_url(root) and is_missing_path(root):
        raise CorpusError(f"{root}: no such folder; --root is a folder that exists or a hub id (owner/name)")


def _check_hub(datasets: Any, root: str) -> None:
    """Raise CorpusError for a hub id if the hub does not answer, unless the dataset is in the local cache."""
    loaded_before = Path(datasets.config.HF_DATASETS_CACHE, root.replace("/", "___"))
    if Path(root).is_dir() or is_url(root) or loaded_before.is_dir():
        return
    if trouble := hub_trouble("datasets", root):
        raise CorpusError(f"{root}: no such folder, and the hub cannot be asked for it ({trouble})")


def _load(datasets: Any, request: ReadRequest, split: str) -> tuple[str, list[str], Any]:
    """The kind of a split's files and their paths or URLs; for kinds that are not read here, also the dataset."""
    folder = Path(request.root)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(request.root)
        saved = saved[split] if isinstance(saved, dict) else saved
        return "arrow", [str(file["filename"]) for file in saved.cache_files], None
    builder = datasets.load_dataset_builder(request.root, request.subset)
    kind = builder.info.builder_name
    if kind in ("parquet", "arrow", "webdataset"):
        files = builder.config.data_files
        if split not in files:
            raise ValueError(f"it has {', '.join(map(str, files))}")
        return kind, [str(file) for file in files[split]], None
    return kind, [], datasets.load_dataset(request.root, request.subset, split=split, streaming=True)


def _columns(datasets: Any, features: dict[str, Any], request: ReadRequest) -> tuple[str, str]:
    """The columns of audio and of text."""
    audio = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if request.audio_column is None and len(audio) > 1:
        raise CorpusError(f"{request.root}: {len(audio)} columns of audio: {', '.join(audio)}; say --audio-column")
    names = list(features)
    if request.reference_column and request.reference_column not in names:
        raise CorpusError(f"{request.root}: no column {request.reference_column!r}; it has {', '.join(names)}")
    found = find_column(request.audio_column, [*audio, "audio"], names, "--audio-column", request.root)
    return found, find_column(request.text_column, TEXT_COLUMNS, names, "--text-column", request.root)


def _row(id: str, row: Values, columns: tuple[str, str], request: ReadRequest) -> Any:
    """The utterance of a row; `duration` may be in milliseconds there, so it becomes `source_duration`."""
    if row[columns[0]] is None:
        return Dropped(id, "", "no audio file: the row holds neither bytes nor a local path")
    kept = {name: value for name, value in row.items() if name in columns or _is_plain(value)}
    for name in ("id", "start", "duration", "end", "instruction", "reference"):
        if name in kept and name not in columns and name != request.reference_column:
            kept[f"source_{name}"] = kept.pop(name)
    request = replace(request, reference_column=request.reference_column or "")
    return table_row(id, kept, columns, request)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | bool) or (isinstance(value, float) and value == value)


# --- files that hold the audio ----------------------------------------------------------------------------


def _stored(datasets: Any, files: list[str]) -> tuple[Any, dict[str, Any]]:
    """Rows of Parquet or Arrow files with an address in the audio column; and the features of their columns."""
    import pyarrow
    from pyarrow import ipc, parquet

    @contextmanager
    def opened(file: str) -> Iterator[Any]:
        try:
            with open_url(file) if is_url(file) else open(file, "rb") as source:
                yield source
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise CorpusError(f"{file}: damaged, or no Parquet or Arrow file ({reason}); fetch it again") from error

    def rows(audio: str) -> Iterator[Values]:
        for file in files:
            with opened(file) as source:
                if file.endswith(".arrow"):
                    batches = iter(ipc.open_stream(source))
                    groups: Iterator[tuple[Any, bool | None]] = ((batch, None) for batch in batches)
                else:
                    groups = _parquet_batches(parquet.ParquetFile(source), audio)
                first = 0
                for batch, has_bytes in groups:
                    yield from _addressed(batch, has_bytes, audio, file, first)
                    first += batch.num_rows

    with opened(files[0]) as source:
        schema = ipc.open_stream(source).schema if files[0].endswith(".arrow") else parquet.read_schema(source)
    return rows, datasets.Features.from_arrow_schema(schema)


def _parquet_batches(file: Any, audio: str) -> Iterator[tuple[Any, bool | None]]:
    """Batches of rows, and True if each row of the row group holds the audio's bytes, which are then not read."""
    schema = file.schema_arrow
    plain = [name for name in schema.names if name != audio]
    parts = [field.name for field in schema.field(audio).type] if hasattr(schema.field(audio).type, "fields") else []
    for group in range(file.metadata.num_row_groups):
        chunks = [file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns)]
        chunk = next((c for c in chunks if c.path_in_schema in (audio, f"{audio}.bytes")), None)
        stored = chunk is not None and chunk.statistics is not None and chunk.statistics.null_count == 0
        columns = plain + ([] if stored else [f"{audio}.{part}" for part in parts] or [audio])
        for batch in file.iter_batches(AT_A_TIME, row_groups=[group], columns=columns):
            yield batch, stored or None


def _addressed(batch: Any, stored: bool | None, audio: str, file: str, first: int) -> Iterator[Values]:
    """The rows of a batch; the audio column is an address, or a path, or None."""
    plain = batch.drop_columns([audio]) if audio in batch.schema.names else batch
    for number, row in enumerate(plain.to_pylist()):
        address: str | None = f"{file}#row={first + number}&column={audio}"
        if not stored:
            value = batch.column(audio)[number]
            held = value["bytes"] if value.is_valid and hasattr(value, "keys") else value
            if not held.is_valid:
                address = value["path"].as_py() if value.is_valid and hasattr(value, "keys") else None
            elif isinstance(text := held.as_py(), str):
                address = text
        yield row | {audio: address}


def _streamed(datasets: Any, dataset: Any) -> tuple[Any, dict[str, Any]]:
    """Rows of a dataset whose audio is in separate files (audiofolder, tables of paths)."""
    features = dataset.features or dataset._resolve_features().features

    def rows(audio: str) -> Iterator[Values]:
        # with this cast the library gives paths instead of decoded audio
        yield from dataset.cast_column(audio, datasets.Value("string"))

    return rows, features
