"""Make the spoken questions, commands and chat of the evaluation, in voices that are never trained on.

In: the evaluation part of `texts/split.jsonl.gz`, English originals of the fillets; Kokoro. Out, under
`--root`: `audio/eval/…flac`, `eval_sqa.jsonl` (200 questions; `reference`, `references`),
`eval_sqa_{fr,es,it,de}.jsonl` (those whose answer `texts/answers.tsv` translates, with that answer),
`eval_slu.jsonl` (200 commands, ten intents in `options`), `eval_chat.jsonl` (60), `eval_st_spoken.jsonl`
(50 sentences with their Czech `reference`), `eval_no_speech.jsonl` (25 of each kind), and the recordings and
manifests of `fetch.py` that the suite asks for.
Where in the flow: once before `blsp evaluate --suite tiny`; nothing here is ever trained on. Resumable.

Try: `python recipes/blsp-tiny/eval_data.py --root C` (about a quarter of an hour on two cores)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path

import soundfile
from containers import RATE
from fetch import SOURCES, fetch, write_parts
from heldout import HELD_OUT_VOICES, read_list
from lines import Line
from no_speech import make as make_no_speech
from rows import fraction, summary, write_rows
from synthesise import synthesise

RECORDINGS = ("fotaq", "asterisk_en", "asterisk_es", "asterisk_fr", "asterisk_it", "asterisk_ru", "drascula", "music")
TEMPO = (0.95, 1.1)
QUESTIONS, CHATS, SENTENCES, NO_SPEECH_EACH = 200, 60, 50, 25
COMMANDS_AN_INTENT = 20
LANGUAGES = ("fr", "es", "it", "de")  # in which spoken English questions are to be answered
INTENTS = {  # in plain words: what the small LLM is asked to choose from
    "HassTurnOn": "turn something on",
    "HassTurnOff": "turn something off",
    "HassLightSet": "change the brightness or color",
    "HassSetVolumeRelative": "change the volume",
    "HassStartTimer": "start a timer",
    "HassTimerStatus": "ask how much time is left",
    "HassMediaPause": "pause the music",
    "HassMediaPrevious": "play the previous song",
    "HassFanSetSpeed": "set the speed of the fan",
    "HassGetState": "ask if something is open or on",
}
# Tables of quiz.py that SmolLM2-135M answers wrongly even as text (0 to 20 % right; the others 65 % together).
HARD_TABLES = frozenset({"sum", "color", "past"})


def questions() -> Iterator[dict]:
    rows = [row for row in _split("quiz") if row["table"] not in HARD_TABLES]
    for row in _drawn(rows, QUESTIONS):
        yield {
            "text": row["text"],
            "reference": row["answers"][0],
            "references": row["answers"],
            "wrong": row["wrong"],
            "table": row["table"],
        }


# What a command must say to be a clear case: "open the curtain" is a HassTurnOn, too.
CLEAR = {
    "HassTurnOn": r"\b(on|activate|enable)\b",
    "HassTurnOff": r"\b(off|out|deactivate|disable)\b",
    "HassStartTimer": r"\btimer\b",
}


def commands() -> Iterator[dict]:
    for intent, plain in INTENTS.items():
        rows = [row for row in _split("command") if row["intent"] == intent and len(row["text"].split()) <= 12]
        rows = [row for row in rows if re.search(CLEAR.get(intent, ""), row["text"].lower())]
        for row in _drawn(rows, COMMANDS_AN_INTENT):
            yield {"text": row["text"], "reference": plain, "options": list(INTENTS.values()), "intent": intent}


def chats() -> Iterator[dict]:
    rows = [row for row in _split("chat") if 4 <= len(row["text"].split()) <= 20 and row["text"].endswith("?")]
    for row in _drawn(rows, CHATS):
        yield {"text": row["text"]}


def translations() -> Iterator[dict]:
    """English originals of the Czech game lines, whose Czech recordings are in another task."""
    rows = [row | {"czech": row["text"], "text": row["en"]} for row in read_list("fillets_cs")]
    for row in _drawn([row for row in rows if 5 <= len(row["text"].split()) <= 15], SENTENCES):
        yield {"text": row["text"], "reference": row["czech"]}


SPOKEN = {"sqa": questions, "slu": commands, "chat": chats, "st_spoken": translations}


def answered_in(language: str, asked: list[dict]) -> list[dict]:
    """The questions that have a translated answer, with it instead of the English one; the speech stays English."""
    with (Path(__file__).parent / "texts" / "answers.tsv").open(encoding="utf-8") as file:
        answers = {row["en"]: row[language].split("/") for row in csv.DictReader(file, delimiter="\t")}
    return [
        row | {"reference": answers[row["reference"]][0], "references": answers[row["reference"]]}
        for row in asked
        if row["reference"] in answers
    ]


def _split(kind: str) -> list[dict]:
    return [row for row in read_list("split") if row["kind"] == kind and row["part"] == "eval"]


def _drawn(rows: list[dict], size: int) -> list[dict]:
    """So many rows, every text once, in an order that depends on the texts alone."""
    unique = {row["text"].lower(): row for row in rows}
    if len(unique) < size:
        raise ValueError(f"only {len(unique)} of {size} texts: run build_texts.py with more a template")
    return sorted(unique.values(), key=lambda row: fraction("eval", row["text"]))[:size]


def line_for(task: str, text: str) -> Line:
    """Named by its text, so that a clip is never taken for another sentence's."""
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    share = fraction("eval voice", text)
    tempo = TEMPO[0] + (TEMPO[1] - TEMPO[0]) * fraction("eval tempo", text)
    voice = HELD_OUT_VOICES[int(share * len(HELD_OUT_VOICES))]
    return Line(f"eval/{task}/{name}", text, task, voice, round(tempo, 3), 1.0, share)


def speak(root: Path, task: str, jobs: int) -> list[dict]:
    """Make the clips of one task; returns its rows."""
    asked = list(SPOKEN[task]())
    lines = [line_for(task, row["text"]) for row in asked]
    synthesise("kokoro", root, lines, jobs)
    rows = []
    for line, row in zip(lines, asked, strict=True):
        audio = f"audio/{line.id}.flac"
        seconds = round(soundfile.info(root / audio).frames / RATE, 3)
        head = {"id": line.id, "audio": audio, "language": "en", "speaker": f"kokoro-{line.voice}", "seconds": seconds}
        rows.append(head | row | {"source": f"kokoro/{task}", "licence": "voice Apache-2.0"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    for source in RECORDINGS:
        assert source in SOURCES
        print(*write_parts(source, fetch(source, options.root), options.root), sep="\n")
    for task in SPOKEN:
        rows = speak(options.root, task, options.jobs)
        write_rows(options.root / f"eval_{task}.jsonl", rows)
        print(summary(f"eval_{task}", rows))
        for language in LANGUAGES if task == "sqa" else ():
            write_rows(options.root / f"eval_sqa_{language}.jsonl", answered_in(language, rows))
    rows = make_no_speech(options.root, "eval", NO_SPEECH_EACH, seed=0)
    write_rows(options.root / "eval_no_speech.jsonl", rows)
    print(summary("eval_no_speech", rows))


if __name__ == "__main__":
    main()
