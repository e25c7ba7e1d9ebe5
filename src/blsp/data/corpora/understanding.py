"""Corpora of spoken commands: Fluent Speech Commands, SLURP, SNIPS (three of them).

    >>> next(slurp(Wanted(root="/data/slurp", split="test", ...)))
    Utterance(id="audio-1502099775", ..., text="wake me up at eight o'clock", reference="alarm_set", ...)

In: a corpus' folder as published. Out: utterances, streaming; `reference` is the intent, `options` are all
intents of the corpus, slots stand in the row as the corpus gives them.

Sources of the layouts: lhotse's `recipes/slu.py` and the corpus' README (Fluent Speech Commands); SLURP's
README (github.com/pswietojanski/slurp); `dataset.py` and README of
github.com/sonos/spoken-language-understanding-research-datasets (SNIPS smart lights and smart speaker);
s3prl's `dataio/corpus/snips.py` (Audio SNIPS).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blsp.data.corpora.reading import (
    Corpus,
    CorpusError,
    Dropped,
    Lookup,
    Read,
    Row,
    Wanted,
    folders_in,
    heard,
    read_csv,
    read_lines,
)
from blsp.data.jsonl import parse_row

FLUENT = Corpus(
    "Fluent Speech Commands",
    "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
)
SLURP = Corpus("SLURP", "https://github.com/pswietojanski/slurp (audio: zenodo.org/record/4274930)")
SNIPS = Corpus("SNIPS audio", "https://github.com/sonos/spoken-language-understanding-research-datasets")


# --- Fluent Speech Commands -------------------------------------------------------------------------------


def fluent_speech_commands(wanted: Wanted) -> Read:
    """data/{train,valid,test}_data.csv (path, speakerId, transcription, action, object, location),
    wavs/speakers/*."""
    root = FLUENT.need(wanted.folder)
    inner = root / "fluent_speech_commands_dataset"
    root = inner if inner.is_dir() else root
    options = _fluent_intents(FLUENT.need(root / "data"))
    FLUENT.need(root / "wavs")
    columns = ["path", "speakerId", "transcription", "action", "object", "location"]
    for split in wanted.splits:
        path = FLUENT.need_split(root / "data" / f"{split}_data.csv", split, ("train", "valid", "test"))
        for _, row in read_csv(path, FLUENT, columns):
            slots = {name: row[name] for name in ("action", "object", "location")}
            yield heard(
                Path(row["path"]).stem,
                root / row["path"],
                row["transcription"],
                language="en",
                speaker=row["speakerId"],
                reference=_fluent_intent(row),
                options=options,
                extra=slots,
            )


def _fluent_intents(folder: Path) -> tuple[str, ...]:
    """The corpus' 31 intents."""
    found: set[str] = set()
    for path in sorted(folder.glob("*_data.csv")):
        found |= {_fluent_intent(row) for _, row in read_csv(path, FLUENT, ["action", "object", "location"])}
    return tuple(sorted(found))


def _fluent_intent(row: dict[str, str]) -> str:
    """`activate lights kitchen`; a slot that is `none` says nothing."""
    return " ".join(row[name] for name in ("action", "object", "location") if row[name] != "none")


# --- SLURP ------------------------------------------------------------------------------------------------


def slurp(wanted: Wanted) -> Read:
    """dataset/slurp/{train,devel,test,train_synthetic}.jsonl, a sentence a line with its recordings;
    audio/slurp_real and audio/slurp_synth hold these."""
    root = SLURP.need(wanted.folder)
    texts = SLURP.need(root / "dataset" / "slurp")
    options = _slurp_intents(texts)
    for split in wanted.splits:
        path = SLURP.need_split(
            texts / f"{split}.jsonl", split, [p.stem for p in sorted(texts.glob("*.jsonl"))]
        )
        kind = "slurp_synth" if "synth" in split else "slurp_real"
        audio = SLURP.need(root / "audio" / kind, root / kind)
        for line, content in read_lines(path, SLURP):
            sentence = parse_row(content.encode(), f"{path}:{line}")
            try:
                yield from _slurp_recordings(sentence, audio, options)
            except (KeyError, TypeError) as error:
                raise SLURP.broken(path, line, f"no field {error}") from error


def _slurp_recordings(sentence: dict[str, Any], audio: Path, options: tuple[str, ...]) -> Read:
    words = [token["surface"] for token in sentence.get("tokens", [])]
    entities = [
        {"type": entity["type"], "text": " ".join(words[i] for i in entity["span"])}
        for entity in sentence.get("entities", [])
    ]
    extra = {"scenario": sentence["scenario"], "action": sentence["action"], "entities": entities}
    for recording in sentence["recordings"]:
        yield heard(
            Path(recording["file"]).stem,
            audio / recording["file"],
            sentence["sentence"],
            language="en",
            reference=sentence["intent"],
            options=options,
            extra=extra,
        )


def _slurp_intents(folder: Path) -> tuple[str, ...]:
    found: set[str] = set()
    for path in sorted(folder.glob("*.jsonl")):
        rows = (parse_row(content.encode(), f"{path}:{line}") for line, content in read_lines(path, SLURP))
        found |= {str(row.get("intent")) for row in rows}
    return tuple(sorted(found))


# --- SNIPS ------------------------------------------------------------------------------------------------


def snips(wanted: Wanted) -> Read:
    """One of three layouts: smart lights (no parts: --split all), smart speaker (train, test), Audio
    SNIPS."""
    root = SNIPS.need(wanted.folder)
    try:
        if (root / "all.iob.snips.txt").exists():
            yield from _audio_snips(root, wanted)
        elif (root / "config.json").exists():
            yield from _smart_lights(root, wanted)
        else:
            SNIPS.need(root / "metadata.json")
            yield from _smart_speaker(root, wanted)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{root}: its JSON files are not as published at {SNIPS.page} ({error!r})"
        ) from error


def _smart_lights(root: Path, wanted: Wanted) -> Read:
    """config.json names the dataset and the speech corpus (metadata.json and audio/)."""
    if wanted.splits != ["all"]:
        raise CorpusError(
            f"{root}: SNIPS smart lights is made for cross-validation and has one part: --split all"
        )
    config = _load_json(root / "config.json")
    speech = SNIPS.need(root / str(config.get("speech_corpus", "speech_corpus")))
    intents = _intents(root / str(config.get("dataset", "dataset.json")))
    recordings = _load_json(speech / "metadata.json")
    for name in sorted(recordings, key=lambda name: (len(name), name)):
        item = recordings[name]
        yield _command(
            f"{root.name}-{name}", speech / "audio" / item["filename"], item["text"], intents, "en"
        )


def _smart_speaker(root: Path, wanted: Wanted) -> Read:
    """metadata.json lists text and path_file; training_dataset.json and test_dataset.json say which part a
    text is in."""
    names = {"train": "training_dataset.json", "test": "test_dataset.json"}
    for split in wanted.splits:
        dataset = SNIPS.need_split(root / names.get(split, f"{split}_dataset.json"), split, names)
        language = _load_json(dataset).get("language", "en")
        intents = _intents(dataset)
        for number, item in enumerate(_load_json(root / "metadata.json")):
            if item["text"] in intents:
                id = f"{root.name}-{split}-{number}"
                yield _command(id, root / item["path_file"], item["text"], intents, language)


def _command(id: str, audio: Path, text: str, intents: dict[str, dict[str, Any]], language: str) -> Row:
    known = intents.get(text)
    if known is None:
        return Dropped(id, str(audio), "no intent: the sentence is not in the dataset")
    options = tuple(sorted({entry["intent"] for entry in intents.values()}))
    extra = {"slots": known["slots"]}
    return heard(id, audio, text, language=language, reference=known["intent"], options=options, extra=extra)


def _intents(path: Path) -> dict[str, dict[str, Any]]:
    """Sentence -> intent and slots, of a dataset in Snips' NLU format (a few thousand sentences)."""
    found: dict[str, dict[str, Any]] = {}
    for intent, content in _load_json(path).get("intents", {}).items():
        for utterance in content["utterances"]:
            chunks = utterance["data"]
            slots = {chunk["slot_name"]: chunk["text"] for chunk in chunks if "slot_name" in chunk}
            found["".join(chunk["text"] for chunk in chunks)] = {"intent": intent, "slots": slots}
    return found


def _load_json(path: Path) -> Any:
    with open(SNIPS.need(path), encoding="utf-8") as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: is not JSON ({error}); fetch it again") from error


def _audio_snips(root: Path, wanted: Wanted) -> Read:
    """{train,valid,test}/**/SPEAKER-snips-SPLIT-N.wav; all.iob.snips.txt: `ID BOS words EOS<TAB>O tags
    intent`."""
    lines = read_lines(root / "all.iob.snips.txt", SNIPS)
    named = (content.partition(" ") for _, content in lines)
    with Lookup((id, label) for id, _, label in named) as labels:
        options = _audio_snips_intents(root)
        for split in wanted.splits:
            folder = SNIPS.need_split(root / split, split, folders_in(root))
            for audio in sorted(folder.rglob("*.wav")):
                label = labels.get(audio.stem)
                if label is None:
                    yield Dropped(audio.stem, str(audio), "no transcript")
                    continue
                said, _, tags = label.partition("\t")
                words = [word for word in said.split() if word not in ("BOS", "EOS")]
                marks = tags.split()
                yield heard(
                    audio.stem,
                    audio,
                    " ".join(words),
                    language="en",
                    speaker=audio.stem.split("-")[0],
                    reference=marks[-1] if marks else None,
                    options=options,
                    extra={"iob": marks[1:-1]},
                )


def _audio_snips_intents(root: Path) -> tuple[str, ...]:
    lines = read_lines(root / "all.iob.snips.txt", SNIPS)
    return tuple(sorted({content.split()[-1] for _, content in lines if content.strip()}))
