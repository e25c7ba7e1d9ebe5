"""Readers of your own data: a folder of audio and text files, a Kaldi data directory.

In:  a folder.
Out: utterances, one at a time.
Try: `next(audio_and_text(ReadRequest(root="my_recordings", ...)))`, with my_recordings/a.wav beside a.txt
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

A Kaldi directory is read as its documentation describes it (kaldi-asr.org/doc/data_prep.html: wav.scp, text,
and optionally segments, utt2spk, utt2lang).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blsp.data.containers import AUDIO_SUFFIXES
from blsp.data.corpora.reading import (
    Corpus,
    CorpusError,
    Dropped,
    Lookup,
    ReadRequest,
    Row,
    Rows,
    iso,
    make_row,
    read_lines,
    subfolders,
)

FOLDER = Corpus("recordings", "your own disk: audio files (wav, mp3, m4a, opus, ...) beside .txt files")
KALDI = Corpus("a Kaldi data directory", "https://kaldi-asr.org/doc/data_prep.html (its layout)")

TEXT_SUFFIXES = (".txt", ".lab")
# commands of wav.scp that only decode a file: flac -c -d -s FILE |, sph2pipe -f wav -p FILE |, cat FILE |
DECODING = re.compile(r"(?:\S*/)?(?:flac(?: -[cds]+)+|sph2pipe(?: -f \w+| -p)+|cat) (\S+) *\|")


def audio_and_text(request: ReadRequest) -> Rows:
    """Every audio file below the folder (or its subfolder SPLIT) with the .txt or .lab file of its name.

    The whole folder is read where it has no `train` and no other split was asked for.
    """
    root = FOLDER.need(request.folder)
    whole = request.splits == ["train"] and not (root / "train").is_dir()
    for split in request.splits:
        if not whole:
            FOLDER.need_split(root / split, split, subfolders(root))
        yield from _pairs(root, root if whole else root / split, iso(request.language))


def _pairs(root: Path, folder: Path, language: str | None) -> Rows:
    """A row for each recording; one that cannot be used is left out with its reason, the others are not touched."""
    last: dict[str, Path] = {}  # the recording of each id of the folder that is being read
    for path, texts in _recordings(folder):
        id = path.relative_to(root).with_suffix("").as_posix()
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        if name != str(path):
            yield Dropped(
                os.fsencode(id).decode("utf-8", "backslashreplace"), name, "file name: it is not UTF-8"
            )
        elif not texts:
            yield Dropped(id, name, f"no transcript: {path.with_suffix(TEXT_SUFFIXES[0]).name} is missing")
        elif (first := last.setdefault(id, path)) != path:
            yield Dropped(id, name, f"two recordings of one name: {first.name} is taken")
        else:
            try:
                text = " ".join(line.strip() for _, line in read_lines(texts[0], FOLDER))
            except CorpusError as error:
                yield Dropped(id, name, f"transcript: {error}")
            else:
                yield make_row(id, path, text, language=language)


def _recordings(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each recording and the text files of its name, in an order that does not change.

    Only one folder's names are in memory. Hidden files and folders (macOS writes a `._a.wav` beside `a.wav`) are
    passed over; suffixes may be in capitals.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        paths = [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
        texts = {(path.stem, path.suffix.lower()): path for path in paths}
        for path in paths:
            if path.suffix.lower() in AUDIO_SUFFIXES:
                candidates = (texts.get((path.stem, suffix)) for suffix in TEXT_SUFFIXES)
                yield path, [text for text in candidates if text]


# --- Kaldi ------------------------------------------------------------------------------------------------


def kaldi(request: ReadRequest) -> Rows:
    """A data directory (or its subdirectory SPLIT): text names the utterances, segments or wav.scp the
    audio."""
    root = KALDI.need(request.folder)
    for split in request.splits:
        if (root / "wav.scp").exists():
            yield from _kaldi_directory(root, request)
        else:
            yield from _kaldi_directory(KALDI.need(root / split / "wav.scp").parent, request)


def _kaldi_directory(folder: Path, request: ReadRequest) -> Rows:
    with ExitStack() as stack:
        tables = {
            name: stack.enter_context(Lookup(_mapping(folder / name)))
            for name in ("wav.scp", "segments", "utt2spk", "utt2lang")
            if (folder / name).exists()
        }
        for line, content in read_lines(KALDI.need(folder / "text"), KALDI):
            id, text = _split_once(content)
            if id:
                yield _kaldi_row(id, text, tables, folder, line, iso(request.language))


def _kaldi_row(
    id: str, text: str, tables: dict[str, Lookup], folder: Path, line: int, language: str | None
) -> Row:
    recording = id
    times: dict[str, Any] = {}
    if "segments" in tables:
        segment = (tables["segments"].get(id) or "").split()
        if len(segment) < 3:
            return Dropped(id, "", "no segment: the utterance is not in segments")
        recording = segment[0]
        times = _kaldi_times(segment[1], segment[2], folder / "segments", line)
    entry = tables["wav.scp"].get(recording)
    audio = _audio_of(entry or "", folder)
    if audio is None:
        reason = f"{entry!r} is a command or archive" if entry else "not in wav.scp"
        return Dropped(id, recording, f"no audio file: {reason}")
    speaker = tables["utt2spk"].get(id) if "utt2spk" in tables else None
    language = iso(tables["utt2lang"].get(id)) if "utt2lang" in tables else language
    return make_row(id, audio, text, language=language, speaker=speaker, **times)


def _kaldi_times(begin: str, end: str, path: Path, line: int) -> dict[str, float]:
    """`start` and `duration`; an end of -1 is the recording's end (Kaldi's extract-segments)."""
    if re.fullmatch(r"-1(\.0*)?", end):
        return {"start": KALDI.seconds(begin, path, line)}
    return KALDI.times(begin, end, path, line)


def _audio_of(entry: str, folder: Path) -> Path | None:
    """The file that an entry of wav.scp names: a path, or a command that only decodes a file."""
    entry = entry.strip()
    if decoded := DECODING.fullmatch(entry):
        entry = decoded[1]
    if not entry or entry.endswith("|") or re.search(r"\.ark:\d+$", entry):
        return None
    if (folder / entry).exists():
        return folder / entry  # an absolute path stays what it is
    return Path(entry).absolute()  # Kaldi's own way: from where it is run


def _mapping(path: Path) -> Iterator[tuple[str, str]]:
    for line, content in read_lines(path, KALDI):
        name, value = _split_once(content)
        if name and not value:
            raise KALDI.broken(path, line, f"{name!r} stands without a value")
        if name:
            yield name, value


def _split_once(content: str) -> tuple[str, str]:
    """Name and rest of a line; Kaldi parts them with blanks or a tab."""
    name, *rest = content.split(maxsplit=1) or [""]
    return name, (rest[0].strip() if rest else "")
