"""Corpora made for recognition: LibriSpeech, GigaSpeech, TED-LIUM 3.

    >>> next(librispeech(Wanted(root="/data/LibriSpeech", split="dev-clean", ...)))
    Utterance(id="1272-128104-0000", audio="/data/LibriSpeech/dev-clean/1272/128104/1272-...flac", ...)

In: a corpus' folder as published (each reader cites where its layout was read). Out: utterances, streaming.

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

from blsp.data.corpora.reading import (
    Corpus,
    CorpusError,
    Read,
    Wanted,
    folders_in,
    heard,
    iso,
    number,
    read_lines,
)

LIBRISPEECH = Corpus("LibriSpeech", "https://www.openslr.org/12")
GIGASPEECH = Corpus("GigaSpeech", "https://github.com/SpeechColab/GigaSpeech")
TEDLIUM = Corpus("TED-LIUM 3", "https://www.openslr.org/51")

GIGASPEECH_TAGS = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
GIGASPEECH_POINTS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
TEDLIUM_TAGS = ("<sil>", "<unk>")
JSON_BLOCK = 1 << 20  # characters of a large JSON file read at a time


def librispeech(wanted: Wanted) -> Read:
    """SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, a line an utterance: `ID TRANSCRIPT`; ID.flac beside
    it."""
    root = LIBRISPEECH.need(wanted.folder)
    root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    for split in wanted.splits:
        folder = LIBRISPEECH.need_split(root / split, split, folders_in(root))
        for speaker in folders_in(folder):
            for chapter in folders_in(folder / speaker):
                path = folder / speaker / chapter / f"{speaker}-{chapter}.trans.txt"
                for line, content in read_lines(LIBRISPEECH.need(path), LIBRISPEECH):
                    id, _, text = content.partition(" ")
                    if not id.startswith(f"{speaker}-{chapter}-"):
                        raise LIBRISPEECH.broken(path, line, f"{id!r} is no utterance of this chapter")
                    yield heard(id, path.with_name(f"{id}.flac"), text, language="en", speaker=speaker)


# --- GigaSpeech -------------------------------------------------------------------------------------------


def gigaspeech(wanted: Wanted) -> Read:
    """GigaSpeech.json names long Opus files under audio/, each with segments (begin, end, text, subsets).

    A part is a subset: XL, L, M, S, XS, DEV, TEST. Punctuation is spelled in tags and becomes punctuation;
    a segment that is a tag alone (<SIL>, <MUSIC>, <NOISE>, <OTHER>) is dropped.
    """
    path = GIGASPEECH.need(wanted.folder / "GigaSpeech.json")
    GIGASPEECH.need(path.parent / "audio")
    subsets = {"{" + split + "}" for split in wanted.splits}
    for recording in read_json_array(path, "audios", GIGASPEECH):
        try:
            yield from _gigaspeech_recording(recording, subsets, path)
        except (KeyError, TypeError, AttributeError) as error:
            where = recording.get("aid") if isinstance(recording, dict) else recording
            raise CorpusError(f"{path}: the recording {where} is not as published ({error!r})") from error


def _gigaspeech_recording(recording: dict[str, Any], subsets: set[str], path: Path) -> Read:
    if subsets.isdisjoint(recording.get("subsets", subsets)):
        return
    audio, language = path.parent / recording["path"], iso(recording.get("language", "EN"))
    for segment in recording["segments"]:
        if subsets.isdisjoint(segment["subsets"]):
            continue
        words = segment["text_tn"]
        for tag, point in GIGASPEECH_POINTS.items():
            words = words.replace(f" {tag}", point).replace(tag, "")
        start = number(segment["begin_time"], path, 1, GIGASPEECH)
        end = number(segment["end_time"], path, 1, GIGASPEECH)
        speaker = segment.get("speaker")
        yield heard(
            segment["sid"],
            audio,
            words,
            tags=GIGASPEECH_TAGS,
            start=start,
            duration=round(end - start, 6),
            language=language,
            speaker=speaker if speaker != "N/A" else None,
        )


def read_json_array(path: Path, name: str, corpus: Corpus) -> Iterator[Any]:
    """The items of the array `name` of a JSON file that is larger than memory, one at a time."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from _array_items(file, name, path, corpus)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: is not UTF-8 ({error.reason}); fetch it again") from error


def _array_items(file: IO[str], name: str, path: Path, corpus: Corpus) -> Iterator[Any]:
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text, place = _find_array(file, name, path, corpus)
    while True:
        while place == len(text) and (block := file.read(JSON_BLOCK)):
            text, place = block, 0
        place = between.match(text, place).end()  # type: ignore[union-attr]
        if text[place : place + 1] == "]":
            return
        try:
            item, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            block = file.read(max(JSON_BLOCK, len(text)))  # doubling: no item is parsed more than a few times
            if not block:
                raise CorpusError(f"{path}: is damaged within {name!r} ({error}); fetch it again") from error
            text, place = text[place:] + block, 0
            continue
        yield item


def _find_array(file: IO[str], name: str, path: Path, corpus: Corpus) -> tuple[str, int]:
    """The text read so far, and the place after the array's opening bracket."""
    opening = re.compile(rf'"{re.escape(name)}"\s*:\s*\[')
    text = ""
    while block := file.read(JSON_BLOCK):
        text = text[-1000:] + block
        if match := opening.search(text):
            return text, match.end()
    raise corpus.broken(path, 1, f"no array {name!r}")


# --- TED-LIUM 3 -------------------------------------------------------------------------------------------


def tedlium3(wanted: Wanted) -> Read:
    """legacy/{train,dev,test}/stm/TALK.stm and sph/TALK.sph (NIST sphere, 16 kHz).

    A line of STM: `talk channel speaker begin end <labels> words`. As in Kaldi, pronunciation variants
    `(2)` and the name at the end of a line go, and `it 's` becomes `it's`; lines to be ignored in scoring
    are left out.
    """
    root = TEDLIUM.need(wanted.folder)
    root = root / "TEDLIUM_release-3" if (root / "TEDLIUM_release-3").is_dir() else root
    for split in wanted.splits:
        folder = TEDLIUM.need_split(root / "legacy" / split, split, folders_in(root / "legacy"))
        audio = TEDLIUM.need(folder / "sph")
        for path in sorted(TEDLIUM.need(folder / "stm").glob("*.stm")):
            for line, content in read_lines(path, TEDLIUM):
                if content.strip() and not content.startswith(";;"):
                    yield from _stm_line(content, audio, path, line)


def _stm_line(content: str, audio: Path, path: Path, line: int) -> Read:
    fields = content.split(maxsplit=6)
    if len(fields) < 6:
        raise TEDLIUM.broken(
            path, line, "a line of STM has talk, channel, speaker, begin, end, labels and words"
        )
    talk, _, speaker, begin, end = fields[:5]
    text = fields[6] if len(fields) > 6 else ""
    if text.strip() == "ignore_time_segment_in_scoring":
        return
    text = re.sub(r"\s*\([^ ()]*\)", "", text)
    text = re.sub(r"\{[^{} ]*\}|\[[^\[\] ]*\]", "<unk>", text)  # {NOISE}
    text = re.sub(r" '(?=\w)", "'", text)
    start, stop = number(begin, path, line, TEDLIUM), number(end, path, line, TEDLIUM)
    yield heard(
        f"{talk}-{round(start * 100):07d}-{round(stop * 100):07d}",
        audio / f"{talk}.sph",
        text,
        tags=TEDLIUM_TAGS,
        start=start,
        duration=round(stop - start, 6),
        language="en",
        speaker=speaker,
    )
