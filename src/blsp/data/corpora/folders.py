"""Readers of your own data: a folder of audio and text files, a Kaldi data directory, Lhotse manifests.

In:  a folder; for Lhotse also a file of cuts.
Out: utterances, one at a time.
Try: `next(audio_and_text(ReadRequest(root="my_recordings", ...)))`, with my_recordings/a.wav beside a.txt
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

A Kaldi directory has the files that its documentation describes (kaldi-asr.org/doc/data_prep.html: wav.scp, text, and
optionally segments, utt2spk, utt2lang). Lhotse's format is plain JSON (lhotse.readthedocs.io, "Representing a corpus"
and "Cuts"), so the library is not needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blsp.data.addresses import is_url
from blsp.data.containers import AUDIO_SUFFIXES, UNREAD_SUFFIXES
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
    read_objects,
    subfolders,
)

FOLDER = Corpus("recordings", "your own disk: audio files (wav, mp3, m4a, opus, ...) beside .txt files")
KALDI = Corpus("a Kaldi data directory", "https://kaldi-asr.org/doc/data_prep.html (its layout)")
LHOTSE = Corpus("Lhotse manifests", "https://lhotse.readthedocs.io (their format)")

TEXT_SUFFIXES = (".txt", ".lab")
# commands in wav.scp that only decode a file: flac -c -d -s FILE |, sph2pipe -f wav -p FILE |, cat FILE |
DECODING = re.compile(r"(?:\S*/)?(?:flac(?: -[cds]+)+|sph2pipe(?: -f \w+| -p)+|cat) (\S+) *\|")


def audio_and_text(request: ReadRequest) -> Rows:
    """Each audio file in the folder (or its subfolder SPLIT) with the .txt or .lab file of the same name.

    If there is no subfolder `train` and no other split is requested, the whole folder is read.
    """
    root = FOLDER.need(request.folder)
    whole = request.splits == ["train"] and not (root / "train").is_dir()
    for split in request.splits:
        if not whole:
            FOLDER.need_split(root / split, split, subfolders(root))
        yield from _pairs(root, root if whole else root / split, iso(request.language))


def _pairs(root: Path, folder: Path, language: str | None) -> Rows:
    """A row for each recording; `Dropped` with the reason for one that cannot be used, whose id has the suffix."""
    last: dict[str, Path] = {}  # id -> recording
    for path, texts in _recordings(folder):
        id = path.relative_to(root).with_suffix("").as_posix()
        file = path.relative_to(root).as_posix()  # tells a.wav from a.ape, whose id would be the same
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        if name != str(path):
            yield Dropped(os.fsencode(file).decode("utf-8", "backslashreplace"), name, "file name: it is not UTF-8")
        elif not texts:
            yield Dropped(file, name, f"no transcript: {path.with_suffix(TEXT_SUFFIXES[0]).name} is missing")
        elif path.suffix.lower() in UNREAD_SUFFIXES:
            yield Dropped(file, name, f"format: {path.suffix} files are not read; convert it to wav or flac")
        elif (first := last.setdefault(id, path)) != path:
            yield Dropped(file, name, f"two recordings of one name: {first.name} is used")
        else:
            try:
                text = " ".join(line.strip() for _, line in read_lines(texts[0], FOLDER))
            except CorpusError as error:
                yield Dropped(file, name, f"transcript: {error}")
            else:
                yield make_row(id, path, text, language=language)


def _recordings(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each recording and the text files with its name, always in the same order.

    Only one folder's names are in memory. Hidden files and folders are skipped (macOS writes `._a.wav` beside
    `a.wav`). Suffixes may be in upper case.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        paths = [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
        texts = {(path.stem, path.suffix.lower()): path for path in paths}
        for path in paths:
            candidates = (texts.get((path.stem, suffix)) for suffix in TEXT_SUFFIXES)
            found = [text for text in candidates if text]
            if path.suffix.lower() in AUDIO_SUFFIXES or (found and path.suffix.lower() in UNREAD_SUFFIXES):
                yield path, found


# --- Kaldi ------------------------------------------------------------------------------------------------


def kaldi(request: ReadRequest) -> Rows:
    """A data directory (or its subdirectory SPLIT): `text` lists the utterances, `segments` or `wav.scp` the audio."""
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


def _kaldi_row(id: str, text: str, tables: dict[str, Lookup], folder: Path, line: int, language: str | None) -> Row:
    recording = id
    times: dict[str, Any] = {}
    if "segments" in tables:
        segment = (tables["segments"].get(id) or "").split()
        if len(segment) < 3:
            return Dropped(id, "", "no segment: the utterance is not in segments")
        recording, begin, end = segment[:3]
        where = folder / "segments", line
        # an end of -1 is the recording's end (Kaldi's extract-segments)
        whole = re.fullmatch(r"-1(\.0*)?", end)
        times = {"start": KALDI.seconds(begin, *where)} if whole else KALDI.times(begin, end, *where)
    audio = _audio_of(tables["wav.scp"].get(recording) or "", folder)
    if isinstance(audio, Dropped):
        return Dropped(id, recording, audio.reason)
    speaker = tables["utt2spk"].get(id) if "utt2spk" in tables else None
    language = iso(tables["utt2lang"].get(id)) if "utt2lang" in tables else language
    return make_row(id, audio, text, language=language, speaker=speaker, **times)


def _audio_of(entry: str, folder: Path) -> Path | str | Dropped:
    """The file of an entry of wav.scp: a path, a command that only decodes a file, or a byte position in an ark."""
    entry = entry.strip()
    if decoded := DECODING.fullmatch(entry):
        entry = decoded[1]
    if not entry:
        return Dropped("", "", "no audio file: not in wav.scp")
    if entry.endswith("|"):
        return Dropped("", "", f"no audio file: {entry!r} is a command; run it, and name the file that it writes")
    path, place = (entry[: ark.start()], int(ark[1])) if (ark := re.search(r":(\d+)$", entry)) else (entry, None)
    if is_url(path):
        return path if place is None else Dropped("", "", f"no audio file: {entry!r} is an ark behind a URL; copy it")
    # relative to the directory if it exists there; otherwise to the working directory, as in Kaldi
    file = folder / path if (folder / path).exists() else Path(path).absolute()
    return file if place is None else _wav_in_ark(file, place)


def _wav_in_ark(path: Path, place: int) -> str | Dropped:
    """The address of a wav that begins at byte `place` of an archive; its length is in its header."""
    try:
        with open(path, "rb") as file:
            file.seek(place)
            head = file.read(8)
    except OSError as error:
        return Dropped("", "", f"no audio file: {path}: {error.strerror}")
    if head[:4] != b"RIFF" or not 0 < (size := int.from_bytes(head[4:8], "little")) < 0x7FFF0000:
        return Dropped("", "", f"no audio file: no wav of a known length begins at byte {place} of {path}")
    return f"{path}#bytes={place}+{size + 8}"


def _mapping(path: Path) -> Iterator[tuple[str, str]]:
    for line, content in read_lines(path, KALDI):
        name, value = _split_once(content)
        if name and not value:
            raise KALDI.broken(path, line, f"{name!r} has no value")
        if name:
            yield name, value


def _split_once(content: str) -> tuple[str, str]:
    """Name and rest of a line, which Kaldi separates with blanks or a tab."""
    name, *rest = content.split(maxsplit=1) or [""]
    return name, (rest[0].strip() if rest else "")


# --- Lhotse -----------------------------------------------------------------------------------------------


def lhotse(request: ReadRequest) -> Rows:
    """PREFIX_cuts_SPLIT.jsonl(.gz), or else PREFIX_recordings_SPLIT and PREFIX_supervisions_SPLIT, joined."""
    root = LHOTSE.need(request.folder)
    if root.is_file():
        yield from _from_cuts(root)
        return
    for split in request.splits:
        cuts = _find(root, "cuts", split)
        if cuts is not None:
            yield from _from_cuts(cuts)
            continue
        recordings, supervisions = _find(root, "recordings", split), _find(root, "supervisions", split)
        if recordings is None or supervisions is None:
            there = ", ".join(sorted(path.name for path in root.glob("*.jsonl*"))[:8]) or "no .jsonl file"
            raise CorpusError(f"{root}: no cuts and no recordings with supervisions of {split!r}; it has {there}")
        yield from _from_supervisions(recordings, supervisions)


def _find(root: Path, kind: str, split: str) -> Path | None:
    """The one file of a kind and split, such as librispeech_recordings_train-clean-5.jsonl.gz or cuts_dev.jsonl."""
    word = r"(^|[_.]){}([_.]|$)"
    named = [path for path in sorted(root.glob("*.jsonl*")) if re.search(word.format(kind), path.name)]
    files = [path for path in named if re.search(word.format(re.escape(split)), path.name)]
    if len(files) > 1:
        raise CorpusError(f"{root}: {files[0].name} and {files[1].name} both are {kind} of {split!r}; name one file")
    return files[0] if files else None


def _from_cuts(path: Path) -> Rows:
    """The supervisions of each cut; their times are relative to the cut's start."""
    for line, cut in read_objects(path):
        if isinstance(cut, Dropped):
            yield cut
            continue
        recording = cut.get("recording")
        if not isinstance(recording, dict):
            kind = cut.get("type", "no recording")
            yield Dropped(str(cut.get("id")), "", f"no single recording: the cut is a {kind}")
            continue
        with _as_published(path, line):
            for supervision in cut.get("supervisions", []):
                yield _utterance(supervision, recording, float(cut.get("start", 0.0)), path)


def _from_supervisions(recordings: Path, supervisions: Path) -> Rows:
    whole = (recording for _, recording in read_objects(recordings) if not isinstance(recording, Dropped))
    listed = ((str(recording.get("id")), json.dumps(recording)) for recording in whole)
    with Lookup(listed) as known:
        for line, supervision in read_objects(supervisions):
            if isinstance(supervision, Dropped):
                yield supervision
                continue
            recording = known.get(str(supervision.get("recording_id")))
            if recording is None:
                reason = f"no recording: {supervision.get('recording_id')} is not in {recordings.name}"
                yield Dropped(str(supervision.get("id")), "", reason)
            else:
                with _as_published(supervisions, line):
                    yield _utterance(supervision, json.loads(recording), 0.0, recordings)


@contextmanager
def _as_published(path: Path, line: int) -> Iterator[None]:
    """Turn errors about a missing or wrong field into a CorpusError that names the line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CorpusError(f"{path}:{line}: not a Lhotse supervision with its recording ({error!r})") from error


def _utterance(supervision: dict[str, Any], recording: dict[str, Any], offset: float, path: Path) -> Row:
    sources, seconds = recording["sources"], float(recording["duration"])
    if unfit := _why_unfit(recording, sources):
        return Dropped(str(supervision["id"]), str(recording.get("id")), f"unfit recording: {unfit}")
    audio = Path(str(sources[0]["source"]))
    audio = path.parent / audio if (path.parent / audio).exists() else audio.absolute()
    return supervision_row(supervision, audio, offset, seconds)


def supervision_row(supervision: dict[str, Any], audio: Path | str, offset: float, seconds: float) -> Row:
    """The utterance of a supervision. offset: its cut's start in the audio; seconds: the length of the audio."""
    start, duration = offset + float(supervision["start"]), float(supervision["duration"])
    whole = start <= 0 and abs(duration - seconds) < 0.001
    times: dict[str, Any] = {} if whole else {"start": round(max(0.0, start), 6), "duration": round(duration, 6)}
    fields: dict[str, Any] = {"language": iso(supervision.get("language")), "speaker": supervision.get("speaker")}
    return make_row(str(supervision["id"]), audio, str(supervision.get("text") or ""), **fields, **times)


def _why_unfit(recording: dict[str, Any], sources: Any) -> str | None:
    """Why the recording cannot be read as one file with one channel, or None."""
    if len(sources) != 1 or sources[0].get("type") != "file":
        return "its audio is not one file"
    if len(sources[0].get("channels", [0])) > 1:
        return "it has several channels, and each supervision belongs to one of them"
    if recording.get("transforms"):
        return "it is transformed on the fly (speed, volume); save it as audio first"
    return None
