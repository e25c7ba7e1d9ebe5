"""Readers of corpora in several languages: Common Voice, CoVoST 2, MuST-C, FLEURS.

In:  a corpus' folder as published.
Out: utterances, one at a time; a requested translation is in `reference`.
Try: `next(must_c(ReadRequest(root="/data/MUSTC_v1.0", split="dev", target_language="de", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

Sources of the layouts: Common Voice's release notes (github.com/common-voice/cv-dataset); CoVoST's
`get_covost_splits.py` (github.com/facebookresearch/covost) and fairseq's `prep_covost_data.py`; fairseq's
`prep_mustc_data.py`; FLEURS' repository (huggingface.co/datasets/google/fleurs, `data/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

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
    read_table,
    stems,
    subfolders,
)

COMMON_VOICE = Corpus("Common Voice", "https://datacollective.mozillafoundation.org (Common Voice)")
COVOST = Corpus("CoVoST 2", "https://github.com/facebookresearch/covost (and Common Voice 4 for the audio)")
MUST_C = Corpus("MuST-C", "https://mt.fbk.eu/must-c/")
FLEURS = Corpus("FLEURS", "https://huggingface.co/datasets/google/fleurs")

FLEURS_COLUMNS = ["id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender"]
FLEURS_RATE = 16_000


def common_voice(request: ReadRequest) -> Rows:
    """LANGUAGE/{train,dev,test,validated,other,invalidated}.tsv and LANGUAGE/clips/*.mp3, any release."""
    folder = _language_folder(request, COMMON_VOICE)
    for split in request.splits:
        path = COMMON_VOICE.need_split(folder / f"{split}.tsv", split, stems(folder, "*.tsv"))
        for _, row in read_table(path, COMMON_VOICE, ["client_id", "path", "sentence"]):
            if isinstance(row, Dropped):
                yield row
            else:
                yield _clip(row, folder, iso(row.get("locale") or request.language or folder.name))


def _clip(row: dict[str, str], folder: Path, language: str | None, **more: Any) -> Row:
    """A row of Common Voice; paths of early releases have no `.mp3`."""
    name = row["path"] if Path(row["path"]).suffix else f"{row['path']}.mp3"
    more |= {"language": language, "speaker": row.get("client_id") or None}
    return make_row(Path(name).stem, folder / "clips" / name, row["sentence"], **more)


def _language_folder(request: ReadRequest, corpus: Corpus) -> Path:
    """The folder of one language, with `clips` in it: the root itself, or its subfolder."""
    root = corpus.need(request.folder)
    if (root / "clips").exists():
        return root
    there = [name for name in subfolders(root) if (root / name / "clips").exists()]
    if request.language is None and there:
        raise CorpusError(f"{root}: has several languages; say --language, one of {', '.join(there)}")
    for name in there:
        if request.language in (name, iso(name)):
            return root / name
    return corpus.need(root / (request.language or "") / "clips").parent


# --- CoVoST 2 ---------------------------------------------------------------------------------------------


def covost2(request: ReadRequest) -> Rows:
    """Common Voice 4's folder of the source language, with CoVoST's table in it.

    The table is either covost_v2.SRC_TGT.SPLIT.tsv (path, sentence, translation, client_id), written by CoVoST's own
    script, or the published covost_v2.SRC_TGT.tsv (path, translation, split), which is joined with Common Voice's
    validated.tsv by the script's rule: `train` is train and train_covost.
    """
    if not request.target_language:
        raise CorpusError("CoVoST 2 is a translation corpus: say --target-language (and --language)")
    folder = _language_folder(request, COVOST)
    pair = re.compile(rf"covost_v2\.([\w-]+)_{re.escape(request.target_language)}(-\w+)?(\.\w+)?\.tsv")
    tables = {path.name: path for path in sorted(folder.glob("covost_v2.*.tsv")) if pair.fullmatch(path.name)}
    for split in request.splits:
        ready = [path for name, path in tables.items() if name.endswith(f".{split}.tsv")]
        raw = [path for name, path in tables.items() if name.count(".") == 2]
        if ready:
            path, rows = ready[0], _covost_table(ready[0], ["path", "sentence", "translation", "client_id"])
        else:
            usual = f"covost_v2.{request.language or folder.name}_{request.target_language}.tsv"
            path = raw[0] if raw else COVOST.need(folder / usual)
            rows = _covost_joined(path, split, folder)
        language = iso(path.name.split(".")[1].split("_")[0])
        for row in rows:
            yield row if isinstance(row, Dropped) else _translated(row, folder, language, request.target_language)


def _covost_table(path: Path, columns: list[str]) -> Iterator[dict[str, str] | Dropped]:
    r"""Rows of a table in the form of CoVoST's script: without quoting, `\"` is a quotation mark."""
    for _, row in read_table(path, COVOST, columns):
        if isinstance(row, Dropped):
            yield row
        else:
            yield {name: re.sub(r"\\(.)", r"\1", value) for name, value in row.items()}


def _covost_joined(path: Path, split: str, folder: Path) -> Iterator[dict[str, str] | Dropped]:
    """The rows of validated.tsv that have a translation in the table of all splits."""
    chosen = {"train", "train_covost"} if split == "train" else {split}
    broken: list[Dropped] = []
    with Lookup(_translations(path, chosen, broken)) as translations:
        yield from broken
        for row in _covost_table(COVOST.need(folder / "validated.tsv"), ["client_id", "path", "sentence"]):
            if isinstance(row, Dropped):
                yield row
            elif (translation := translations.get(row["path"])) is not None:
                yield row | {"translation": translation}


def _translations(path: Path, chosen: set[str], broken: list[Dropped]) -> Iterator[tuple[str, str]]:
    """(path, translation) of the rows of the chosen splits; broken rows are appended to `broken`."""
    for row in _covost_table(path, ["path", "translation", "split"]):
        if isinstance(row, Dropped):
            broken.append(row)
        elif row["split"] in chosen:
            yield row["path"], row["translation"]


def _translated(row: dict[str, str], folder: Path, language: str | None, target: str) -> Row:
    if not row["translation"].strip():
        return Dropped(Path(row["path"]).stem, str(folder / "clips" / row["path"]), "no translation")
    extra = {"target_language": iso(target)}
    return _clip(row, folder, language, reference=row["translation"].strip(), extra=extra)


# --- MuST-C -----------------------------------------------------------------------------------------------


def must_c(request: ReadRequest) -> Rows:
    """en-TGT/data/SPLIT/{wav/*.wav, txt/SPLIT.yaml, txt/SPLIT.en, txt/SPLIT.TGT}; train, dev, tst-COMMON, tst-HE.

    The YAML file has one line for each sentence: `- {duration: 3.5, offset: 16.1, speaker_id: spk.1, wav: ted_1.wav}`.
    """
    if not request.target_language:
        raise CorpusError("MuST-C is a translation corpus: say --target-language")
    target = request.target_language
    root = MUST_C.need(request.folder)
    data = MUST_C.need(root / f"en-{target}" / "data", root / "data")
    for split in request.splits:
        folder = MUST_C.need_split(data / split, split, subfolders(data))
        yield from _must_c_part(folder, split, target)


def _must_c_part(folder: Path, split: str, target: str) -> Rows:
    listing = MUST_C.need(folder / "txt" / f"{split}.yaml")
    audio = MUST_C.need(folder / "wav")
    texts = read_lines(MUST_C.need(folder / "txt" / f"{split}.en"), MUST_C)
    translations = read_lines(MUST_C.need(folder / "txt" / f"{split}.{target}"), MUST_C)
    lines = zip(_segments(listing), texts, translations, strict=True)
    try:
        for (line, segment), (_, text), (_, translation) in lines:
            id = f"{Path(segment['wav']).stem}-{line:06d}"
            path = audio / segment["wav"]
            if not translation.strip():
                yield Dropped(id, str(path), "no translation")
                continue
            fields: dict[str, Any] = {
                "start": MUST_C.seconds(segment["offset"], listing, line),
                "duration": MUST_C.seconds(segment["duration"], listing, line),
                "speaker": segment.get("speaker_id"),
                "reference": translation.strip(),
                "extra": {"target_language": iso(target)},
            }
            yield make_row(id, path, text, language="en", **fields)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise CorpusError(f"{listing}: the YAML file and the two texts have different numbers of lines") from error


def _segments(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The list in the YAML file, parsed line by line: the whole file at once would take minutes and gigabytes."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for line, content in read_lines(path, MUST_C):
        if not content.strip():
            continue
        try:
            (segment,) = yaml.load(content, Loader=loader)
            if not {"wav", "offset", "duration"} <= set(segment):
                raise TypeError
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise MUST_C.broken(path, line, "not a segment {duration, offset, speaker_id, wav}") from error
        yield line, segment


# --- FLEURS -----------------------------------------------------------------------------------------------


def fleurs(request: ReadRequest) -> Rows:
    """data/LANGUAGE/{train,dev,test}.tsv (no header) and data/LANGUAGE/audio/SPLIT/*.wav, unpacked from SPLIT.tar.gz.

    With a target language, `reference` is the same sentence in that language, from its train, dev and test tables.
    """
    root = FLEURS.root(request, "data")
    folder = _fleurs_folder(root, request.language)
    target = _fleurs_folder(root, request.target_language) if request.target_language else None
    sentences = _fleurs_sentences(target) if target else {}
    for split in request.splits:
        path = FLEURS.need_split(folder / f"{split}.tsv", split, stems(folder, "*.tsv"))
        audio = FLEURS.need(folder / "audio" / split, folder / split)
        for line, row in read_table(path, FLEURS, [], FLEURS_COLUMNS):
            if isinstance(row, Dropped):
                yield row
                continue
            id = f"{folder.name}-{Path(row['file_name']).stem}"
            clip = audio / row["file_name"]
            reference = sentences.get(row["id"])
            if target and reference is None:
                yield Dropped(id, str(clip), f"no translation: sentence {row['id']} is not in {target.name}")
                continue
            duration = FLEURS.seconds(row["num_samples"] or "nan", path, line) / FLEURS_RATE
            more = {"target_language": iso(target.name)} if target else {}
            extra = {"sentence": row["id"], "gender": row["gender"].lower(), "seconds": duration} | more
            text = row["raw_transcription"]
            yield make_row(id, clip, text, language=iso(folder.name), reference=reference, extra=extra)


def _fleurs_folder(root: Path, language: str | None) -> Path:
    there = subfolders(root)
    if language is None and not there:
        FLEURS.need(root / "<language>")
    if language is None:
        raise CorpusError(f"{root}: FLEURS has many languages; say --language ({', '.join(there[:5])}, …)")
    for name in there:
        if language == name or iso(name) == language.lower():
            return root / name
    return FLEURS.need(root / language)


def _fleurs_sentences(folder: Path) -> dict[str, str]:
    """Sentence number -> text; FLEURS has about 3,000 sentences."""
    tables = (FLEURS.need(folder / f"{split}.tsv") for split in ("train", "dev", "test"))
    rows = (row for path in tables for _, row in read_table(path, FLEURS, [], FLEURS_COLUMNS))
    return {row["id"]: row["raw_transcription"].strip() for row in rows if not isinstance(row, Dropped)}
