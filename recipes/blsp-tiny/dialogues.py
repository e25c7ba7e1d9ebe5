"""Twenty spoken dialogues of three turns, in which the last turn can only be answered from an earlier one.

In:  the corpus folder of `eval_data.py` (the held-out Kokoro voices), and a model.
Out: for each route (text, cascade, speech) the share of right last answers, with its 95 % interval, and all turns as
     JSONL. Right is an answer in which the wanted word stands. A run that was stopped goes on with the next route.
Where in the flow: beside the tiny suite, whose tasks have one turn each.

Try: `python recipes/blsp-tiny/dialogues.py --root C --model blsp-small --out dialogues.jsonl`
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from eval_data import line_for
from rows import read_rows, write_rows
from synthesise import audio_path, synthesise
from tqdm import tqdm

from blsp.data.audio import load_audio
from blsp.data.jobs import differences
from blsp.evaluation.bootstrap import draws, interval, mean_figure
from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.inference.conversation import Memory, lay_out, request_for, user_turn
from blsp.inference.listener import Listener, load
from blsp.llm.decoding import answer_text, decode
from blsp.weights.shipped import model_digest

ROUTES = ("text", "cascade", "speech")
DIALOGUES: tuple[tuple[str, str, str, str], ...] = (  # three turns, and a word of the right last answer
    ("My name is Sarah.", "What is the capital of Italy?", "What is my name?", "Sarah"),
    ("I have two cats and a horse.", "How many legs does a spider have?", "Which large animal do I have?", "horse"),
    ("My favorite color is green.", "What is five plus three?", "What is my favorite color?", "green"),
    ("I live in London.", "What do bees make?", "In which country do I live?", "England|Kingdom|Britain|UK"),
    ("My brother is a doctor.", "What is frozen water called?", "What is the job of my brother?", "doctor"),
    ("I was born in May.", "What is the opposite of hot?", "Which month comes after the month I was born in?", "June"),
    ("I bought four apples.", "I ate one of them.", "How many apples do I have now?", "three|3"),
    ("The meeting is on Monday.", "What color is the sky?", "On which day is the meeting?", "Monday"),
    ("My dog is called Rex.", "What is the largest ocean?", "What is the name of my dog?", "Rex"),
    ("I am going to Paris.", "What is two plus two?", "In which country is the city I am going to?", "France"),
    ("I play the piano.", "Who wrote Hamlet?", "Which instrument do I play?", "piano"),
    ("The secret word is banana.", "What is the opposite of up?", "What is the secret word?", "banana"),
    ("I am allergic to nuts.", "How many days are in a week?", "What must I not eat?", "nuts"),
    ("My car is red.", "Which planet is known as the red planet?", "What color is my car?", "red"),
    ("I have ten dollars.", "I spend four dollars.", "How many dollars are left?", "six|6"),
    ("My sister lives in Japan.", "What is the capital of Germany?", "Where does my sister live?", "Japan"),
    ("I want to drink tea.", "What is the largest planet?", "What do I want to drink?", "tea"),
    ("The train leaves at seven.", "What animal says meow?", "When does the train leave?", "seven|7"),
    ("My birthday is in December.", "What gas do plants take in?", "In which season is my birthday?", "winter"),
    ("I am reading a book about birds.", "What is the first month of the year?", "What is my book about?", "birds"),
)


def speak(root: Path, jobs: int) -> list[list[Path]]:
    """The clips of every dialogue's turns, made where they are missing."""
    lines = [[line_for("dialogue", turn) for turn in dialogue[:3]] for dialogue in DIALOGUES]
    lines = [[replace(line, voice=turns[0].voice) for line in turns] for turns in lines]  # one speaker a dialogue
    synthesise("kokoro", root, [line for turns in lines for line in turns], jobs)
    return [[audio_path(root, line) for line in turns] for turns in lines]


def turns_of(listener: Listener, route: str, clips: list[list[Path]]) -> list[list]:
    """By dialogue, what stands for each of the user's turns in the conversation."""
    if route == "text":
        return [list(said) for *said, _ in DIALOGUES]
    shown = tqdm(clips, desc=route, unit="dialogue")
    if route == "speech":
        return [listener.embed_audio(spoken) for spoken in shown]
    recogniser = Recogniser(recogniser_of(listener.model.config.audio_model_id))
    return [[recogniser.transcribe_clip(load_audio(clip), "en") for clip in spoken] for spoken in shown]


def talk(listener: Listener, dialogues: list[list], max_new_tokens: int) -> list[list[str]]:
    """The answers to each dialogue's turns, each given with all that was said before. The n-th turns of all dialogues
    are answered together.
    """
    decoding = replace(listener.decoding, max_new_tokens=max_new_tokens)
    said: list[list[dict]] = [[] for _ in dialogues]
    answers: list[list[str]] = [[] for _ in dialogues]
    for turns in zip(*dialogues, strict=True):
        for messages, turn in zip(said, turns, strict=True):
            messages.append(user_turn([turn]))
        requests = [
            request_for(listener, number, lay_out(listener, messages), decoding, Memory())
            for number, messages in enumerate(said)
        ]
        results = decode(listener.model, requests, batch_size=len(requests))
        for number, result in results.items():
            said[number].append({"role": "assistant", "content": [tuple(result.ids)]})
            answers[number].append(answer_text(listener.tokenizer, result.ids).strip())
    return answers


def is_right(answer: str, wanted: str) -> bool:
    """Whether one of the wanted words stands in the answer."""
    # a normaliser would write "six dollars" as "$6"
    return not {word.lower() for word in wanted.split("|")}.isdisjoint(re.findall(r"\w+", answer.lower()))


def asked(listener: Listener, route: str, clips: list[list[Path]], max_new_tokens: int) -> list[dict]:
    """One row a dialogue: what was understood, the answers, and whether the last one is right."""
    dialogues = turns_of(listener, route, clips)
    answered = talk(listener, dialogues, max_new_tokens)
    rows = []
    for (*said, wanted), turns, answers in zip(DIALOGUES, dialogues, answered, strict=True):
        heard = turns if route != "speech" else listener.readout(turns) if listener.reads_out else None
        right = is_right(answers[-1], wanted)
        rows.append(
            {"route": route, "said": said, "heard": heard, "answers": answers, "wanted": wanted, "right": right}
        )
    return rows


def earlier_rows(out: Path, settings: dict) -> list[dict]:
    """The rows of a run that was stopped, whole routes; exits if they were asked of another model or otherwise."""
    rows = read_rows(out) if out.exists() else []
    for row in rows:
        if changed := differences(row, settings):
            raise SystemExit(f"{out}: was written with other settings ({changed}); choose another --out or remove it")
    return rows


def share_right(route: str, rows: Sequence[dict]) -> str:
    """How many last answers of a route are right, and the share with its interval."""
    right = mean_figure(np.array([float(row["right"]) for row in rows]))
    low, high = interval(right, draws(len(rows), 1000, seed=0))
    count = sum(row["right"] for row in rows)
    share = f"{right.point():.2f}, 95 % interval {low:.2f} to {high:.2f}"
    return f"{route}: {count} of {len(rows)} last answers are right ({share})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--model", default="blsp-small")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True, help="all turns, as JSONL")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    settings = {"model": options.model, "sha256": model_digest(options.model)}
    settings |= {"dtype": options.dtype, "max_new_tokens": options.max_new_tokens}
    done = earlier_rows(options.out, settings)
    clips = speak(options.root, options.jobs)
    listener = load(options.model, dtype=options.dtype)
    for route in ROUTES[len(done) // len(DIALOGUES) :]:
        done += [settings | row for row in asked(listener, route, clips, options.max_new_tokens)]
        write_rows(options.out, done)
    for route in ROUTES:
        print(share_right(route, [row for row in done if row["route"] == route]))


if __name__ == "__main__":
    main()
