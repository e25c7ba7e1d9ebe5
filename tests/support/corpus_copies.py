"""Tiny copies of published corpora: their folders, file formats, quirks and all, with tones for speech.

In: an empty folder. Out: the corpus in it; each function returns the flags that read it, and the rows it
should give as (id, text, further fields). The readers, `src/blsp/data/corpora/`, cite the layouts' sources.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000
Expected = list[tuple[str, str, dict[str, Any]]]
Copy = tuple[dict[str, Any], Expected]


def tone(path: Path, seconds: float = 1.0, rate: int = RATE, format: str = "", subtype: str = "") -> None:
    """A file of sound in the format that its name says, or that `format` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_tone(seconds, rate, format or path.suffix[1:].upper(), subtype or None))


@functools.cache
def encoded_tone(seconds: float, rate: int, format: str, subtype: str | None) -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    out = io.BytesIO()
    audio = (0.3 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
    soundfile.write(out, audio, rate, format=format, subtype=subtype)
    return out.getvalue()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def librispeech(root: Path) -> Copy:
    corpus = root / "LibriSpeech"
    for split, speaker, chapter in [("dev-clean", 84, 121123), ("dev-clean", 174, 50561), ("train-clean-100", 19, 198)]:
        folder = corpus / split / str(speaker) / str(chapter)
        lines = []
        for number in range(2):
            id = f"{speaker}-{chapter}-{number:04d}"
            tone(folder / f"{id}.flac")
            lines.append(f"{id} GO DO YOU HEAR {number}\n")
        write(folder / f"{speaker}-{chapter}.trans.txt", "".join(lines))
    write(corpus / "SPEAKERS.TXT", ";ID  |SEX| SUBSET           |MINUTES| NAME\n84   | F | dev-clean | 8.0 | x\n")
    ids = ["174-50561-0000", "174-50561-0001", "84-121123-0000", "84-121123-0001"]
    rows = [(id, f"GO DO YOU HEAR {id[-1]}", {"language": "en", "speaker": id.split("-")[0]}) for id in ids]
    return {"split": "dev-clean"}, rows


def gigaspeech(root: Path) -> Copy:
    texts = [
        ("AS THEY'RE LEAVING <COMMA> CAN KASH PULL ZAHRA ASIDE <QUESTIONMARK>", ["{XL}", "{M}"]),
        ("<MUSIC>", ["{XL}", "{M}"]),
        ("DOUGLAS <PERIOD>", ["{XL}"]),
        ("<SIL>", ["{M}"]),
        ("<OTHER>", ["{M}"]),
        ("<NOISE>", ["{M}"]),
        ("YES <EXCLAMATIONPOINT>", ["{XL}", "{M}"]),
    ]
    recordings = []
    for name, subsets in [("POD0000000001", ["{XL}", "{L}", "{M}"]), ("YOU0000000001", ["{DEV}"])]:
        path = f"audio/podcast/P0000/{name}.opus"
        tone(root / path, seconds=12.0, format="OGG", subtype="OPUS")
        segments = [
            {
                "sid": f"{name}_S{number:07d}",
                "speaker": "N/A",
                "begin_time": 1.5 * number,
                "end_time": 1.5 * number + 1.25,
                "text_tn": text,
                "subsets": found if name.startswith("POD") else ["{DEV}"],
            }
            for number, (text, found) in enumerate(texts)
        ]
        recording = {"title": "t", "url": "u", "path": path, "aid": name, "source": "podcast", "duration": 12.0}
        recording |= {"sample_rate": 16000, "codec": "opus", "channels": 1, "format": "opus", "language": "EN"}
        recordings.append(recording | {"speaker": "N/A", "subsets": subsets, "segments": segments})
    head = {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": recordings}
    write(root / "GigaSpeech.json", json.dumps(head, indent=2))
    times = {"duration": 1.25, "language": "en"}
    return {"split": "M"}, [
        ("POD0000000001_S0000000", "AS THEY'RE LEAVING, CAN KASH PULL ZAHRA ASIDE?", {"start": 0.0, **times}),
        ("POD0000000001_S0000006", "YES!", {"start": 9.0, **times}),
    ]


def tedlium3(root: Path) -> Copy:
    folder = root / "TEDLIUM_release-3" / "legacy" / "test"
    tone(folder / "sph" / "AimeeMullins_2009P.sph", seconds=8.0, format="NIST", subtype="PCM_16")
    write(
        folder / "stm" / "AimeeMullins_2009P.stm",
        "AimeeMullins_2009P 1 inter_segment_gap 0 0.5 <o,,unknown> ignore_time_segment_in_scoring\n"
        "AimeeMullins_2009P 1 AimeeMullins 0.5 2.25 <o,f0,female> i 'd share(2) with {NOISE} a discovery\n"
        "AimeeMullins_2009P 1 AimeeMullins 2.25 4 <o,f0,female> it 's <sil> good <unk>\n"
        "AimeeMullins_2009P 1 AimeeMullins 4 5 <o,f0,female> <unk>\n"
        "AimeeMullins_2009P 1 AimeeMullins 5.0 7.5 <o,f0,female> the end (AimeeMullins_2009P-5)\n",
    )
    same = {"language": "en", "speaker": "AimeeMullins"}
    talk = "AimeeMullins_2009P"
    return {"split": "test"}, [
        (f"{talk}-0000050-0000225", "i'd share with a discovery", {"start": 0.5, "duration": 1.75, **same}),
        (f"{talk}-0000225-0000400", "it's good", {"start": 2.25, "duration": 1.75, **same}),
        (f"{talk}-0000500-0000750", "the end", {"start": 5.0, "duration": 2.5, **same}),
    ]


COMMON_VOICE_HEAD = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender"
COMMON_VOICE_HEAD += "\taccents\tvariant\tlocale\tsegment\n"


def common_voice(root: Path) -> Copy:
    """Release 17 and later; the sentence holds quotation marks, which the table does not escape."""
    folder = root / "cv-corpus-17.0-2024-03-15" / "de"
    sentences = ['"Ja", sagte sie.', "Wie geht's?", "  "]
    lines = [
        f"0a{n}\tcommon_voice_de_{n}.mp3\tf00{n}\t{sentence}\t\t2\t0\t\t\t\t\tde\t\n"
        for n, sentence in enumerate(sentences)
    ]
    write(folder / "dev.tsv", COMMON_VOICE_HEAD + "".join(lines))
    write(folder / "train.tsv", COMMON_VOICE_HEAD)
    for n in range(3):
        tone(folder / "clips" / f"common_voice_de_{n}.mp3", rate=32_000)
    flags = {"root": folder.parent, "split": "dev", "language": "de"}
    return flags, [
        ("common_voice_de_0", '"Ja", sagte sie.', {"language": "de", "speaker": "0a0"}),
        ("common_voice_de_1", "Wie geht's?", {"language": "de", "speaker": "0a1"}),
    ]


def common_voice_2(root: Path) -> Copy:
    """The release of the paper: paths without suffix, fewer columns; the root is the language's folder."""
    folder = root / "en"
    head = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"
    write(folder / "validated.tsv", head + "4f\tcb6f\tGood morning.\t2\t0\n")
    tone(folder / "clips" / "cb6f.mp3", rate=48_000)
    return {"root": folder, "split": "validated"}, [("cb6f", "Good morning.", {"language": "en", "speaker": "4f"})]


COMMON_VOICE_4_HEAD = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"


def covost2(root: Path) -> Copy:
    """As published: Common Voice 4 and a table of translations and splits."""
    folder = root / "en"
    splits = {"a1": "train", "a2": "train_covost", "a3": "dev", "a4": "test"}
    validated, table = COMMON_VOICE_4_HEAD, "path\ttranslation\tsplit\n"
    for name, split in splits.items():
        validated += f'c{name}\tcommon_voice_en_{name}.mp3\tShe said \\"{name}\\".\t2\t0\t\t\t\n'
        table += f"common_voice_en_{name}.mp3\tSie sagte „{name}“.\t{split}\n"
        tone(folder / "clips" / f"common_voice_en_{name}.mp3", rate=48_000)
    validated += "cx\tcommon_voice_en_x.mp3\tNot translated.\t2\t0\t\t\t\n"
    write(folder / "validated.tsv", validated)
    write(folder / "covost_v2.en_de.tsv", table)
    write(folder / "covost_v2.en_tr.tsv", "path\ttranslation\tsplit\n")
    same = {"language": "en", "target_language": "de"}
    rows = [
        (
            f"common_voice_en_{name}",
            f'She said "{name}".',
            {"reference": f"Sie sagte „{name}“.", "speaker": f"c{name}"} | same,
        )
        for name in ("a1", "a2")
    ]
    return {"root": folder, "split": "train", "target_language": "de"}, rows


def covost2_split(root: Path) -> Copy:
    """As CoVoST's own script leaves it: a table a split."""
    folder = root / "fr"
    head = "path\tsentence\ttranslation\tclient_id\n"
    write(folder / "covost_v2.fr_en.test.tsv", head + 'common_voice_fr_1.mp3\tBonjour.\t\\"Hello.\\"\tc1\n')
    write(folder / "covost_v2.fr_en.dev.tsv", head)
    tone(folder / "clips" / "common_voice_fr_1.mp3", rate=48_000)
    flags = {"root": root, "split": "test", "language": "fr", "target_language": "en"}
    row = {"reference": '"Hello."', "language": "fr", "target_language": "en", "speaker": "c1"}
    return flags, [("common_voice_fr_1", "Bonjour.", row)]


def must_c(root: Path) -> Copy:
    folder = root / "en-de" / "data" / "tst-COMMON"
    for name in ("ted_1096", "ted_1097"):
        tone(folder / "wav" / f"{name}.wav", seconds=20.0)
    segments = [("ted_1096", 16.08, 3.5), ("ted_1096", 12.61, 3.449999), ("ted_1097", 0.0, 2.0), ("ted_1097", 3, 4)]
    listing = "".join(
        f"- {{duration: {length:f}, offset: {start:f}, rW: 9, uW: 0, speaker_id: spk.{wav[4:]}, wav: {wav}.wav}}\n"
        for wav, start, length in segments
    )
    write(folder / "txt" / "tst-COMMON.yaml", listing)
    write(folder / "txt" / "tst-COMMON.en", "Thank you.\n(Laughter)\n\u2028What is it?\n♪\n")
    write(folder / "txt" / "tst-COMMON.de", "Danke.\n(Gelächter)\nWas ist das?\n♪\n")
    same = {"language": "en", "target_language": "de"}
    return {"split": "tst-COMMON", "target_language": "de"}, [
        (
            "ted_1096-000001",
            "Thank you.",
            {"start": 16.08, "duration": 3.5, "speaker": "spk.1096", "reference": "Danke."} | same,
        ),
        ("ted_1096-000002", "(Laughter)", {"start": 12.61, "duration": 3.449999, "reference": "(Gelächter)"} | same),
        ("ted_1097-000003", "What is it?", {"start": 0.0, "duration": 2.0, "reference": "Was ist das?"} | same),
    ]


def fleurs(root: Path) -> Copy:
    said = {"en_us": "The cat's out, isn't it?", "cmn_hans_cn": "猫在外面。", "de_de": "Die Katze ist draußen."}
    for language, text in said.items():
        folder = root / "data" / language
        for split, id in [("train", 7), ("dev", 8), ("test", 9)]:
            files = [f"{language[:2]}{id}{take}.wav" for take in range(2 if language == "en_us" else 1)]
            line = "{}\t{}\t{} {}\tlower\tl o w e r |\t16000\tFEMALE\n"
            write(folder / f"{split}.tsv", "".join(line.format(id, name, text, id) for name in files))
            for name in files:
                tone(folder / "audio" / split / name)
    flags = {"split": "test", "language": "en", "target_language": "zh"}
    fields = {
        "language": "en",
        "reference": "猫在外面。 9",
        "target_language": "zh",
        "gender": "female",
        "sentence": "9",
    }
    return flags, [(f"en_us-en9{take}", "The cat's out, isn't it? 9", fields) for take in range(2)]


def fluent_speech_commands(root: Path) -> Copy:
    corpus = root / "fluent_speech_commands_dataset"
    head = ["", "path", "speakerId", "transcription", "action", "object", "location"]
    data = {
        "train": [["Turn on the lights, please", "activate", "lights", "kitchen"]],
        "valid": [["Set my phone's language to Chinese", "change language", "Chinese", "none"]],
        "test": [["Louder", "increase", "volume", "none"], ["Lights on", "activate", "lights", "none"]],
    }
    for split, rows in data.items():
        path = corpus / "data" / f"{split}_data.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(head)
            for number, (text, *slots) in enumerate(rows):
                wav = f"wavs/speakers/2BqVo8kVB2Skwgyb/{split}{number}.wav"
                table.writerow([number, wav, "2BqVo8kVB2Skwgyb", text, *slots])
                tone(corpus / wav)
    options = ["activate lights", "activate lights kitchen", "change language Chinese", "increase volume"]
    same = {"language": "en", "speaker": "2BqVo8kVB2Skwgyb", "options": options}
    return {"split": "test"}, [
        ("test0", "Louder", {"reference": "increase volume", "action": "increase", "location": "none"} | same),
        ("test1", "Lights on", {"reference": "activate lights", "object": "lights"} | same),
    ]


def slurp(root: Path) -> Copy:
    def sentence(id: int, text: str, intent: str, files: list[str]) -> str:
        scenario, action = intent.split("_", 1)
        tokens = [{"surface": word, "id": i, "lemma": word, "pos": "X"} for i, word in enumerate(text.split())]
        row = {"slurp_id": id, "sentence": text, "sentence_annotation": text, "intent": intent, "action": action}
        recordings = [{"file": file, "wer": 0, "ent_wer": 0, "status": "correct"} for file in files]
        entities = [{"span": [4, 5], "type": "time"}] if len(tokens) > 5 else []
        more = {"tokens": tokens, "scenario": scenario, "recordings": recordings, "entities": entities}
        return json.dumps(row | more) + "\n"

    texts = root / "dataset" / "slurp"
    files = ["audio-1502099775-headset.flac", "audio--1504194195.flac"]
    write(texts / "test.jsonl", sentence(4489, "wake me up at eight o'clock", "alarm_set", files))
    write(texts / "train.jsonl", sentence(1, "play jazz", "play_music", ["audio-1.flac"]))
    write(texts / "train_synthetic.jsonl", sentence(2, "play rock", "play_music", ["synth-1.flac"]))
    for file in [*files, "audio-1.flac"]:
        tone(root / "audio" / "slurp_real" / file)
    tone(root / "audio" / "slurp_synth" / "synth-1.flac")
    fields = {"reference": "alarm_set", "options": ["alarm_set", "play_music"], "scenario": "alarm", "action": "set"}
    fields |= {"language": "en", "entities": [{"type": "time", "text": "eight o'clock"}]}
    return {"split": "test"}, [(file[:-5], "wake me up at eight o'clock", fields) for file in files]


def snips_nlu(intents: dict[str, list[list[dict[str, str]]]]) -> dict[str, Any]:
    """A dataset in Snips' NLU format."""
    content = {name: {"utterances": [{"data": chunks} for chunks in said]} for name, said in intents.items()}
    return {"language": "en", "intents": content, "entities": {}}


LIGHTS_ON = [{"text": "Turn on the lights in the "}, {"text": "kitchen", "slot_name": "room", "entity": "room"}]


def snips_lights(root: Path) -> Copy:
    corpus = root / "smart-lights-en-close-field"
    write(corpus / "config.json", json.dumps({"dataset": "dataset.json", "speech_corpus": "speech_corpus"}))
    write(
        corpus / "dataset.json",
        json.dumps(snips_nlu({"SwitchLightOn": [LIGHTS_ON], "SwitchLightOff": [[{"text": "Off"}]]})),
    )
    metadata = {
        "0": {"text": "Off", "filename": "0.wav", "worker": {"gender": "f"}},
        "10": {"text": "Turn on the lights in the kitchen", "filename": "10.wav", "worker": {}},
        "2": {"text": "Nobody wrote this down", "filename": "2.wav", "worker": {}},
    }
    write(corpus / "speech_corpus" / "metadata.json", json.dumps(metadata))
    for item in metadata.values():
        tone(corpus / "speech_corpus" / "audio" / str(item["filename"]))
    same = {"language": "en", "options": ["SwitchLightOff", "SwitchLightOn"]}
    return {"root": corpus, "split": "all"}, [
        ("smart-lights-en-close-field-0", "Off", {"reference": "SwitchLightOff", "slots": {}} | same),
        (
            "smart-lights-en-close-field-10",
            "Turn on the lights in the kitchen",
            {"reference": "SwitchLightOn", "slots": {"room": "kitchen"}} | same,
        ),
    ]


def snips_speaker(root: Path) -> Copy:
    corpus = root / "smart-speaker-en-close-field"
    play = [{"text": "play some music by "}, {"text": "Queen", "slot_name": "artist_name", "entity": "artist"}]
    write(corpus / "training_dataset.json", json.dumps(snips_nlu({"NextSong": [[{"text": "next song"}]]})))
    write(corpus / "test_dataset.json", json.dumps(snips_nlu({"PlayMusic": [play]})))
    texts = ["next song", "play some music by Queen"]
    metadata = [{"text": text, "path_file": f"audio_corpus/{n}.wav"} for n, text in enumerate(texts)]
    write(corpus / "metadata.json", json.dumps(metadata))
    for item in metadata:
        tone(corpus / item["path_file"])
    fields = {"reference": "PlayMusic", "slots": {"artist_name": "Queen"}, "options": ["PlayMusic"], "language": "en"}
    id = "smart-speaker-en-close-field-test-1"
    return {"root": corpus, "split": "test"}, [(id, "play some music by Queen", fields)]


def snips_audio(root: Path) -> Copy:
    lines = [
        "Ivy-snips-train-0 BOS listen to westbam EOS\tO O O B-artist O PlayMusic",
        "Joey-snips-valid-3 BOS rate this book EOS\tO O O B-object_type O RateBook",
    ]
    write(root / "all.iob.snips.txt", "\n".join(lines) + "\n")
    for split, name in [
        ("train", "Ivy-snips-train-0"),
        ("valid", "Joey-snips-valid-3"),
        ("valid", "Joey-snips-valid-4"),
    ]:
        tone(root / split / f"{name}.wav")
    fields = {"reference": "RateBook", "options": ["PlayMusic", "RateBook"], "speaker": "Joey", "language": "en"}
    return {"split": "valid"}, [
        ("Joey-snips-valid-3", "rate this book", fields | {"iob": ["O", "O", "B-object_type", "O"]})
    ]


def folder(root: Path) -> Copy:
    for name, text in [
        ("b/one.wav", "First.\nSecond."),
        ("a two.FLAC", "Grüße"),
        ("b/empty.ogg", "\n"),
        ("c.mp3", None),
    ]:
        tone(root / name)
        if text is not None:
            write((root / name).with_suffix(".txt"), text + "\n")
    write(root / "notes.txt", "no audio has this name")
    return {}, [("a two", "Grüße", {}), ("b/one", "First. Second.", {})]


def kaldi(root: Path) -> Copy:
    data = root / "data" / "dev"
    tone(root / "audio" / "call1.wav", seconds=10.0)
    tone(root / "audio" / "call2.flac", seconds=10.0)
    write(
        data / "wav.scp",
        f"call1 {root}/audio/call1.wav\n"
        f"call2 flac -c -d -s {root}/audio/call2.flac |\n"
        f"call3 sox {root}/audio/call2.flac -t wav - remix 1 |\n"
        "call4 /data/raw.ark:1234\n",
    )
    segments = ["spk1-u1 call1 0.00 1.50", "spk1-u2 call1 1.5 1.5", "spk2-u3 call2 2 4.25"]
    write(data / "segments", "\n".join([*segments, "spk2-u4 call3 0 1", "spk2-u5 call4 0 1", "spk1-u0 call1 3 4", ""]))
    texts = [
        "spk1-u1 HELLO THERE",
        "spk1-u2 NOTHING",
        "spk2-u3\tTABBED",
        "spk2-u4 PIPED",
        "spk2-u5 ARK",
        "spk2-u6 LOST",
        "spk1-u0",
    ]
    write(data / "text", "\n".join(texts) + "\n")
    write(data / "utt2spk", "".join(f"{line.split()[0]} {line[:4]}\n" for line in texts))
    write(data / "utt2lang", "".join(f"{line.split()[0]} english\n" for line in texts))
    return {"root": root / "data", "split": "dev"}, [
        ("spk1-u1", "HELLO THERE", {"start": 0.0, "duration": 1.5, "speaker": "spk1", "language": "en"}),
        ("spk2-u3", "TABBED", {"start": 2.0, "duration": 2.25, "speaker": "spk2", "language": "en"}),
    ]


def lhotse_recording(id: str, path: Path, **more: Any) -> dict[str, Any]:
    source = {"type": "file", "channels": [0], "source": str(path)}
    sizes = {"sampling_rate": 16000, "num_samples": 160000, "duration": 10.0, "channel_ids": [0]}
    return {"id": id, "sources": [source], **sizes, **more}


def lhotse_supervision(id: str, recording: str, start: float, duration: float, text: str) -> dict[str, Any]:
    times = {"start": start, "duration": duration, "channel": 0}
    return {"id": id, "recording_id": recording, **times, "text": text, "language": "English", "speaker": "s1"}


def lhotse_cuts(root: Path) -> Copy:
    tone(root / "r.flac", seconds=10.0)
    recording = lhotse_recording("r", root / "r.flac")
    cut = {"id": "r-0", "start": 2.0, "duration": 6.0, "channel": 0, "recording": recording, "type": "MonoCut"}
    said = [lhotse_supervision("s1", "r", 0.5, 1.25, "one"), lhotse_supervision("s2", "r", 3.0, 2.0, "two")]
    whole = cut | {"id": "r-1", "start": 0.0, "duration": 10.0}
    moved = cut | {"id": "r-2", "recording": recording | {"transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}}
    lines = [
        cut | {"supervisions": said},
        whole | {"supervisions": [lhotse_supervision("s3", "r", 0.0, 10.0, "all")]},
        moved | {"supervisions": [lhotse_supervision("s4", "r", 0.0, 1.0, "fast")]},
        {"id": "m-0", "tracks": [], "type": "MixedCut"},
    ]
    with gzip.open(root / "mine_cuts_dev.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    same = {"language": "en", "speaker": "s1"}
    return {"split": "dev"}, [
        ("s1", "one", {"start": 2.5, "duration": 1.25} | same),
        ("s2", "two", {"start": 5.0, "duration": 2.0} | same),
        ("s3", "all", same),
    ]


def lhotse_recordings(root: Path) -> Copy:
    tone(root / "r.flac", seconds=10.0)
    recordings = [lhotse_recording("r", Path("r.flac")), lhotse_recording("two", Path("r.flac"))]
    recordings[1]["sources"][0]["channels"] = [0, 1]
    supervisions = [
        lhotse_supervision("s1", "r", 0.5, 1.25, "one"),
        lhotse_supervision("s2", "gone", 3.0, 2.0, "two"),
        lhotse_supervision("s3", "two", 3.0, 2.0, "three"),
    ]
    for kind, items in [("recordings", recordings), ("supervisions", supervisions)]:
        for split in ("train-clean-5", "dev-clean-2"):
            lines = items if split == "train-clean-5" else []
            write(root / f"librispeech_{kind}_{split}.jsonl", "".join(json.dumps(item) + "\n" for item in lines))
    fields = {"start": 0.5, "duration": 1.25, "language": "en", "speaker": "s1"}
    return {"split": "train-clean-5"}, [("s1", "one", fields)]


COPIES: dict[str, tuple[str, Callable[[Path], Copy]]] = {
    "librispeech": ("librispeech", librispeech),
    "gigaspeech": ("gigaspeech", gigaspeech),
    "tedlium3": ("tedlium3", tedlium3),
    "common-voice": ("common-voice", common_voice),
    "common-voice 2": ("common-voice", common_voice_2),
    "covost2": ("covost2", covost2),
    "covost2, split": ("covost2", covost2_split),
    "must-c": ("must-c", must_c),
    "fleurs": ("fleurs", fleurs),
    "fluent": ("fluent-speech-commands", fluent_speech_commands),
    "slurp": ("slurp", slurp),
    "snips lights": ("snips", snips_lights),
    "snips speaker": ("snips", snips_speaker),
    "snips audio": ("snips", snips_audio),
    "folder": ("folder", folder),
    "kaldi": ("kaldi", kaldi),
    "lhotse cuts": ("lhotse", lhotse_cuts),
    "lhotse recordings": ("lhotse", lhotse_recordings),
}
