"""Readers of your own tables: CSV, TSV and JSON Lines with a column of audio, and NeMo's manifests.

In:  a file, or a folder with a file for each split (`train.csv`).
Out: utterances, one at a time.
Try: `blsp prepare csv --root clips.csv --audio-column path --text-column sentence --out clips.jsonl`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

A column with the name of a manifest's field is that field (`end` beside `start` gives the duration); other columns are
kept. Audio may be any address (data/addresses.py), relative to the table's folder. NeMo's layout:
docs.nvidia.com/nemo-framework, "Preparing Custom ASR Data" and "Tarred Datasets" (`shard_id`, and audio_0.tar beside
the manifest).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TextIO

from blsp.data.corpora.columns import AUDIO_COLUMNS, TEXT_COLUMNS, Values, find_column, table_row
from blsp.data.corpora.reading import Corpus, CorpusError, Dropped, Lookup, ReadRequest, Rows, read_objects, read_table
from blsp.data.corpora.shards import tar_members

TABLE = Corpus("a table", "your own disk: a file with a row for each recording, a column of audio and one of text")
NEMO = Corpus("a NeMo manifest", "https://docs.nvidia.com/nemo-framework (its layout)")
Numbered = Iterator[tuple[int, Values | Dropped]]  # line number, cells by column


def csv_table(request: ReadRequest) -> Rows:
    """Comma- or semicolon-separated, with quoting and a header."""
    for path in _files(request, "csv"):
        yield from _rows(path, _read_csv(path), request)


def tsv_table(request: ReadRequest) -> Rows:
    """Tab-separated, without quoting, with a header."""
    for path in _files(request, "tsv"):
        yield from _rows(path, read_table(path, TABLE, []), request)


def jsonl_table(request: ReadRequest) -> Rows:
    """One JSON object a line."""
    for path in _files(request, "jsonl"):
        yield from _rows(path, read_objects(path), request)


def nemo(request: ReadRequest) -> Rows:
    """`audio_filepath`, `text`, `duration`, `offset`; with `shard_id`, `audio_filepath` is a member of that tar."""
    for path in _files(request, "json", "jsonl"):
        first = next((values for _, values in read_objects(path) if not isinstance(values, Dropped)), {})
        if "audio_filepath" not in first:
            raise CorpusError(f"{path}: no row has an audio_filepath; this is not {NEMO.name} as in {NEMO.page}")
        if "shard_id" not in first:
            yield from _rows(path, _nemo_rows(path), request)
            continue
        with Lookup(_nemo_members(path.parent)) as members:
            yield from _rows(path, _nemo_rows(path, members), request)


def _files(request: ReadRequest, *suffixes: str) -> list[Path]:
    """The file named by --root, or SPLIT.csv in that folder for each split."""
    root = TABLE.need(request.folder)
    if root.is_file():
        return [root]
    files = []
    for split in request.splits:
        candidates = [root / f"{split}.{suffix}" for suffix in suffixes]
        files.append(next((path for path in candidates if path.exists()), None) or TABLE.need(*candidates))
    return files


# --- reading ----------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Numbered:
    """Rows of a CSV file. A broken row (an open quotation mark) counts as one line; reading continues with the next."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            comma = ";" if header.count(";") > header.count(",") else ","
            lines = _RowLines(file)
            names = next(csv.reader(lines, delimiter=comma), [])
            reader = csv.reader(lines, delimiter=comma, strict=True)
            first = 1 + len(lines.row)
            while True:
                lines.row.clear()
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    yield first, Dropped(f"{path.name}:{first}", "", f"broken row: {error}")
                    lines.again += reversed(lines.row[1:])
                    reader = csv.reader(lines, delimiter=comma, strict=True)
                    first += 1
                    continue
                if cells is None:
                    return
                last = first + len(lines.row) - 1
                if len(cells) == len(names):
                    yield first, dict(zip(names, cells, strict=True))
                elif cells:
                    where = f"{path.name}:{first}" if first == last else f"{path.name}:{first}-{last}"
                    yield first, Dropped(where, "", f"broken row: {len(cells)} cells under {len(names)} columns")
                first = last + 1
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: is not UTF-8 ({error.reason}); save the table as UTF-8") from error


class _RowLines:
    """The lines of a file. row: lines read since it was cleared; again: lines to read once more, last one first."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.row, self.again = file, list[str](), list[str]()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else next(self.file)
        self.row.append(line)
        return line


def _rows(path: Path, rows: Numbered, request: ReadRequest) -> Rows:
    """The utterances of a table; rows without an id get one from the table's name and the line number."""
    columns: tuple[str, str] | None = None
    for line, values in rows:
        if isinstance(values, Dropped):
            yield values
            continue
        if columns is None:
            audio = find_column(request.audio_column, AUDIO_COLUMNS, list(values), "--audio-column", path)
            columns = audio, find_column(request.text_column, TEXT_COLUMNS, list(values), "--text-column", path)
        made = f"{path.name.split('.')[0]}-{line:08d}"
        yield table_row(made, values, columns, request, path.parent)


# --- NeMo -------------------------------------------------------------------------------------------------


def _nemo_rows(path: Path, members: Lookup | None = None) -> Numbered:
    """Rename `offset` to `start`. A row without it is a whole file, whose rounded `duration` is dropped."""
    for line, values in read_objects(path):
        if not isinstance(values, Dropped):
            start, duration = values.pop("offset", None), values.pop("duration", None)
            values |= {"start": start, "duration": duration} if start is not None else {}
            if members is not None:
                values = _nemo_address(values, members)
        yield line, values


def _nemo_members(folder: Path) -> Iterator[tuple[str, str]]:
    """(shard and name, address) of all members of the numbered tar files."""
    tars = {path: number[1] for path in sorted(folder.glob("*.tar")) if (number := re.search(r"(\d+)$", path.stem))}
    if not tars:
        raise CorpusError(f"{folder}: no audio_0.tar, audio_1.tar, ... here, but the manifest's rows have a shard_id")
    for path, shard in tars.items():
        for member in tar_members(str(path)):
            if not isinstance(member, Dropped):
                yield f"{int(shard)}/{member.name}", member.address


def _nemo_address(values: Values, members: Lookup) -> Values | Dropped:
    """Replace `audio_filepath` by the member's address; segments of one file have the names FILE-sub1, FILE-sub2."""
    name, shard = str(values.pop("audio_filepath", "")), values.pop("shard_id", None)
    whole = re.sub(r"-sub\d+(?=\.\w+$|$)", "", name)
    address = members.get(f"{shard}/{name}") or members.get(f"{shard}/{whole}")
    id = str(values.setdefault("id", f"{shard}/{name}"))
    if address is None:
        return Dropped(id, name, f"no audio: it is not in the tar file of shard {shard}")
    return {"audio_filepath": address, **values}
