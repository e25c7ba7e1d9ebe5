"""Readers of speech recognition corpora: LibriSpeech, GigaSpeech, TED-LIUM 3.

In:  a corpus' folder as published.
Out: utterances, one at a time.
Try: `next(librispeech(ReadRequest(root="/data/LibriSpeech", split="dev-clean", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

Sources of the layouts: LibriSpeech's README.TXT (openslr.org/12); GigaSpeech's
`toolkits/kaldi/extract_meta.py` and `utils/gigaspeech_scoring.py` (github.com/SpeechColab/GigaSpeech);
TED-LIUM 3's README and Kaldi's `egs/tedlium/s5_r3/local/prepare_data.sh`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from blsp.data.corpora.reading import Corpus, CorpusError, ReadRequest, Rows, iso, make_row, read_lines, subfolders

LIBRISPEECH = Corpus("LibriSpeech", "https://www.openslr.org/12")
GIGASPEECH = Corpus("GigaSpeech", "https://github.com/SpeechColab/GigaSpeech")
TEDLIUM = Corpus("TED-LIUM 3", "https://www.openslr.org/51")

GIGASPEECH_TAGS = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
GIGASPEECH_POINTS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
TEDLIUM_TAGS = ("<sil>", "<unk>")
JSON_BLOCK = 1 << 20  # characters of a large JSON file read at a time


def librispeech(request: ReadRequest) -> Rows:
    """SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID TRANSCRIPT`, and ID.flac beside it."""
    root = LIBRISPEECH.root(request, "LibriSpeech")
    for split in request.splits:
        folder = LIBRISPEECH.need_split(root / split, split, subfolders(root))
        for speaker in subfolders(folder):
            for chapter in subfolders(folder / speaker):
                path = folder / speaker / chapter / f"{speaker}-{chapter}.trans.txt"
                for line, content in read_lines(LIBRISPEECH.need(path), LIBRISPEECH):
                    id, _, text = content.partition(" ")
                    if not id.startswith(f"{speaker}-{chapter}-"):
                        raise LIBRISPEECH.broken(path, line, f"{id!r} is not an utterance of this chapter")
                    yield make_row(id, path.with_name(f"{id}.flac"), text, language="en", speaker=speaker)


# --- GigaSpeech -------------------------------------------------------------------------------------------


def gigaspeech(request: ReadRequest) -> Rows:
    """GigaSpeech.json names long Opus files under audio/, each with segments (begin, end, text, subsets).

    A split is a subset: XL, L, M, S, XS, DEV, TEST. Punctuation tags become punctuation. A segment that is only a tag
    (<SIL>, <MUSIC>, <NOISE>, <OTHER>) is dropped.
    """
    path = GIGASPEECH.need(request.folder / "GigaSpeech.json")
    GIGASPEECH.need(path.parent / "audio")
    subsets = {"{" + split + "}" for split in request.splits}
    for recording in read_json_array(path, "audios", GIGASPEECH):
        try:
            yield from _gigaspeech_recording(recording, subsets, path)
        except (KeyError, TypeError, AttributeError) as error:
            where = recording.get("aid") if isinstance(recording, dict) else recording
            raise CorpusError(f"{path}: the recording {where} is not as published ({error!r})") from error


def _gigaspeech_recording(recording: dict[str, Any], subsets: set[str], path: Path) -> Rows:
    if subsets.isdisjoint(recording.get("subsets", subsets)):
        return
    audio, language = path.parent / recording["path"], iso(recording.get("language", "EN"))
    for segment in recording["segments"]:
        if subsets.isdisjoint(segment["subsets"]):
            continue
        words = segment["text_tn"]
        for tag, point in GIGASPEECH_POINTS.items():
            words = words.replace(f" {tag}", point).replace(tag, "")
        times = GIGASPEECH.times(segment["begin_time"], segment["end_time"], path, 1)
        speaker = None if segment.get("speaker") == "N/A" else segment.get("speaker")
        fields: dict[str, Any] = {"language": language, "speaker": speaker, **times}
        yield make_row(segment["sid"], audio, words, tags=GIGASPEECH_TAGS, **fields)


def read_json_array(path: Path, name: str, corpus: Corpus) -> Iterator[Any]:
    """The items of the array `name` of a JSON file, one at a time; the file may be larger than memory."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from _array_items(file, name, path, corpus)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: is not UTF-8 ({error.reason}); fetch it again") from error


def _array_items(file: IO[str], name: str, path: Path, corpus: Corpus) -> Iterator[Any]:
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text, at = _find_array(file, name, path, corpus)  # text[at:] is read but not parsed yet
    while True:
        while at == len(text) and (block := file.read(JSON_BLOCK)):
            text, at = block, 0
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            block = file.read(max(JSON_BLOCK, len(text)))  # double the text, so that an item is parsed only a few times
            if not block:
                raise CorpusError(f"{path}: is damaged within {name!r} ({error}); fetch it again") from error
            text, at = text[at:] + block, 0
            continue
        yield item


def _find_array(file: IO[str], name: str, path: Path, corpus: Corpus) -> tuple[str, int]:
    """The text read so far, and the position after the array's opening bracket."""
    opening = re.compile(rf'"{re.escape(name)}"\s*:\s*\[')
    text = ""
    while block := file.read(JSON_BLOCK):
        text = text[-1000:] + block
        if match := opening.search(text):
            return text, match.end()
    raise corpus.broken(path, 1, f"no array {name!r}")


# --- TED-LIUM 3 -------------------------------------------------------------------------------------------


def tedlium3(request: ReadRequest) -> Rows:
    """legacy/{train,dev,test}/stm/TALK.stm and sph/TALK.sph (NIST sphere, 16 kHz).

    A line of STM: `talk channel speaker begin end <labels> words`. As in Kaldi, pronunciation variants `(2)` and the
    name at the end of a line are removed, and `it 's` becomes `it's`. Lines to be ignored in scoring are left out.
    """
    root = TEDLIUM.root(request, "TEDLIUM_release-3")
    for split in request.splits:
        folder = TEDLIUM.need_split(root / "legacy" / split, split, subfolders(root / "legacy"))
        audio = TEDLIUM.need(folder / "sph")
        for path in sorted(TEDLIUM.need(folder / "stm").glob("*.stm")):
            for line, content in read_lines(path, TEDLIUM):
                if content.strip() and not content.startswith(";;"):
                    yield from _stm_line(content, audio, path, line)


def _stm_line(content: str, audio: Path, path: Path, line: int) -> Rows:
    fields = content.split(maxsplit=6)
    if len(fields) < 6:
        raise TEDLIUM.broken(path, line, "STM lines have talk, channel, speaker, begin, end, labels and words")
    talk, _, speaker, begin, end = fields[:5]
    text = fields[6] if len(fields) > 6 else ""
    if text.strip() == "ignore_time_segment_in_scoring":
        return
    text = re.sub(r"\s*\([^ ()]*\)", "", text)
    text = re.sub(r"\{[^{} ]*\}|\[[^\[\] ]*\]", "<unk>", text)  # {NOISE}
    text = re.sub(r" '(?=\w)", "'", text)
    times = TEDLIUM.times(begin, end, path, line)
    start, stop = (round(TEDLIUM.seconds(time, path, line) * 100) for time in (begin, end))
    id, clip = f"{talk}-{start:07d}-{stop:07d}", audio / f"{talk}.sph"
    yield make_row(id, clip, text, tags=TEDLIUM_TAGS, language="en", speaker=speaker, **times)
