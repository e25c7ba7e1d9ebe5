"""Readers of corpora of spoken commands: Fluent Speech Commands, SLURP, SNIPS (three of them).

In:  a corpus' folder as published.
Out: utterances, one at a time; `reference` is the intent, `options` are all intents of the corpus, and slots are
     fields in the corpus' own form.
Try: `next(slurp(ReadRequest(root="/data/slurp", split="test", ...)))`
Flow: data/corpora/ — `data/prepare.py` names the readers in `READERS`.

Sources of the layouts: lhotse's `recipes/slu.py` and the corpus' README (Fluent Speech Commands); SLURP's
README (github.com/pswietojanski/slurp); `dataset.py` and README of
github.com/sonos/spoken-language-understanding-research-datasets (SNIPS smart lights and smart speaker);
s3prl's `dataio/corpus/snips.py` (Audio SNIPS).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blsp.data.corpora.reading import (
    Corpus,
    CorpusError,
    Dropped,
    Lookup,
    ReadRequest,
    Row,
    Rows,
    make_row,
    read_csv,
    read_lines,
    stems,
    subfolders,
)
from blsp.data.files import parse_row

FLUENT = Corpus(
    "Fluent Speech Commands",
    "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
)
SLURP = Corpus("SLURP", "https://github.com/pswietojanski/slurp (audio: zenodo.org/record/4274930)")
SNIPS = Corpus("SNIPS audio", "https://github.com/sonos/spoken-language-understanding-research-datasets")
SLOTS = ("action", "object", "location")  # of Fluent Speech Commands


def _sorted_set(intents: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(intents)))


# --- Fluent Speech Commands -------------------------------------------------------------------------------


def fluent_speech_commands(request: ReadRequest) -> Rows:
    """data/{train,valid,test}_data.csv (path, speakerId, transcription, action, object, location); wavs/speakers/*."""
    root = FLUENT.root(request, "fluent_speech_commands_dataset")
    tables = sorted(FLUENT.need(root / "data").glob("*_data.csv"))
    options = _sorted_set(_fluent_intent(row) for path in tables for _, row in read_csv(path, FLUENT, SLOTS))
    FLUENT.need(root / "wavs")
    columns = ["path", "speakerId", "transcription", *SLOTS]
    for split in request.splits:
        path = FLUENT.need_split(root / "data" / f"{split}_data.csv", split, ("train", "valid", "test"))
        for _, row in read_csv(path, FLUENT, columns):
            slots = {name: row[name] for name in SLOTS}
            fields: dict[str, Any] = {"speaker": row["speakerId"], "reference": _fluent_intent(row), "extra": slots}
            id, text = Path(row["path"]).stem, row["transcription"]
            yield make_row(id, root / row["path"], text, language="en", options=options, **fields)


def _fluent_intent(row: dict[str, str]) -> str:
    """The slots in one text, `activate lights kitchen`, without those that are `none`."""
    return " ".join(row[name] for name in SLOTS if row[name] != "none")


# --- SLURP ------------------------------------------------------------------------------------------------


def slurp(request: ReadRequest) -> Rows:
    """dataset/slurp/{train,devel,test,train_synthetic}.jsonl, with a sentence and its recordings on each line;
    the recordings are in audio/slurp_real and audio/slurp_synth."""
    root = SLURP.need(request.folder)
    texts = SLURP.need(root / "dataset" / "slurp")
    tables = sorted(texts.glob("*.jsonl"))
    options = _sorted_set(str(row.get("intent")) for path in tables for _, row in _slurp_sentences(path))
    for split in request.splits:
        path = SLURP.need_split(texts / f"{split}.jsonl", split, stems(texts, "*.jsonl"))
        kind = "slurp_synth" if "synth" in split else "slurp_real"
        audio = SLURP.need(root / "audio" / kind, root / kind)
        for line, sentence in _slurp_sentences(path):
            try:
                yield from _slurp_recordings(sentence, audio, options)
            except (KeyError, TypeError) as error:
                raise SLURP.broken(path, line, f"no field {error}") from error


def _slurp_recordings(sentence: dict[str, Any], audio: Path, options: tuple[str, ...]) -> Rows:
    words = [token["surface"] for token in sentence.get("tokens", [])]
    entities = [
        {"type": entity["type"], "text": " ".join(words[i] for i in entity["span"])}
        for entity in sentence.get("entities", [])
    ]
    extra = {"scenario": sentence["scenario"], "action": sentence["action"], "entities": entities}
    fields: dict[str, Any] = {"language": "en", "reference": sentence["intent"], "options": options, "extra": extra}
    for recording in sentence["recordings"]:
        file = recording["file"]
        yield make_row(Path(file).stem, audio / file, sentence["sentence"], **fields)


def _slurp_sentences(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in read_lines(path, SLURP):
        yield line, parse_row(content.encode(), f"{path}:{line}")


# --- SNIPS ------------------------------------------------------------------------------------------------


def snips(request: ReadRequest) -> Rows:
    """One of three layouts: smart lights (no splits: --split all), smart speaker (train, test), Audio SNIPS."""
    root = SNIPS.need(request.folder)
    try:
        if (root / "all.iob.snips.txt").exists():
            yield from _audio_snips(root, request)
        elif (root / "config.json").exists():
            yield from _smart_lights(root, request)
        else:
            SNIPS.need(root / "metadata.json")
            yield from _smart_speaker(root, request)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{root}: its JSON files are not as published at {SNIPS.page} ({error!r})") from error


def _smart_lights(root: Path, request: ReadRequest) -> Rows:
    """config.json names the dataset and the speech corpus (metadata.json and audio/)."""
    if request.splits != ["all"]:
        raise CorpusError(f"{root}: SNIPS smart lights is for cross-validation and has only one split: --split all")
    config = _load_json(root / "config.json")
    speech = SNIPS.need(root / str(config.get("speech_corpus", "speech_corpus")))
    intents = _intents(root / str(config.get("dataset", "dataset.json")))
    recordings = _load_json(speech / "metadata.json")
    for name in sorted(recordings, key=lambda name: (len(name), name)):
        item = recordings[name]
        audio = speech / "audio" / item["filename"]
        yield _command(f"{root.name}-{name}", audio, item["text"], intents, "en")


def _smart_speaker(root: Path, request: ReadRequest) -> Rows:
    """metadata.json lists text and path_file; training_dataset.json and test_dataset.json hold the texts of a split."""
    names = {"train": "training_dataset.json", "test": "test_dataset.json"}
    for split in request.splits:
        dataset = SNIPS.need_split(root / names.get(split, f"{split}_dataset.json"), split, names)
        language = _load_json(dataset).get("language", "en")
        intents = _intents(dataset)
        for number, item in enumerate(_load_json(root / "metadata.json")):
            if item["text"] in intents:
                id = f"{root.name}-{split}-{number}"
                yield _command(id, root / item["path_file"], item["text"], intents, language)


def _command(id: str, audio: Path, text: str, intents: dict[str, dict[str, Any]], language: str) -> Row:
    if text not in intents:
        return Dropped(id, str(audio), "no intent: the sentence is not in the dataset")
    options = _sorted_set(entry["intent"] for entry in intents.values())
    fields: dict[str, Any] = {"reference": intents[text]["intent"], "extra": {"slots": intents[text]["slots"]}}
    return make_row(id, audio, text, language=language, options=options, **fields)


def _intents(path: Path) -> dict[str, dict[str, Any]]:
    """Sentence -> intent and slots, from a dataset in Snips' NLU format (a few thousand sentences)."""
    sentences: dict[str, dict[str, Any]] = {}
    for intent, content in _load_json(path).get("intents", {}).items():
        for utterance in content["utterances"]:
            chunks = utterance["data"]
            slots = {chunk["slot_name"]: chunk["text"] for chunk in chunks if "slot_name" in chunk}
            sentences["".join(chunk["text"] for chunk in chunks)] = {"intent": intent, "slots": slots}
    return sentences


def _load_json(path: Path) -> Any:
    with open(SNIPS.need(path), encoding="utf-8") as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: is not JSON ({error}); fetch it again") from error


def _audio_snips(root: Path, request: ReadRequest) -> Rows:
    """{train,valid,test}/**/SPEAKER-snips-SPLIT-N.wav; all.iob.snips.txt: `ID BOS words EOS<TAB>O tags intent`."""
    sentences = root / "all.iob.snips.txt"
    options = _sorted_set(content.split()[-1] for _, content in read_lines(sentences, SNIPS) if content.strip())
    named = (content.partition(" ") for _, content in read_lines(sentences, SNIPS))
    with Lookup((id, label) for id, _, label in named) as labels:
        for split in request.splits:
            folder = SNIPS.need_split(root / split, split, subfolders(root))
            for audio in sorted(folder.rglob("*.wav")):
                label = labels.get(audio.stem)
                if label is None:
                    yield Dropped(audio.stem, str(audio), "no transcript")
                    continue
                sentence, _, tags = label.partition("\t")
                text = " ".join(word for word in sentence.split() if word not in ("BOS", "EOS"))
                marks = tags.split()
                intent, speaker = marks[-1] if marks else None, audio.stem.split("-")[0]
                fields: dict[str, Any] = {"reference": intent, "options": options, "extra": {"iob": marks[1:-1]}}
                yield make_row(audio.stem, audio, text, language="en", speaker=speaker, **fields)
