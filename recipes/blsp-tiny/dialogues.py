"""Twenty spoken dialogues of three turns, in which the last turn can only be answered from an earlier one.

In:  the corpus folder of `eval_data.py` (the held-out Kokoro voices), and a model.
Out: for each route (text, cascade, speech) the share of right last answers, with its 95 % interval, and all turns as
     JSONL. Right is an answer in which the wanted word stands.
Where in the flow: beside the tiny suite, whose tasks have one turn each.

Try: `python recipes/blsp-tiny/dialogues.py --root C --model blsp-small --out dialogues.jsonl`
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from eval_data import line_for
from synthesise import audio_path, synthesise
from tqdm import tqdm

from blsp.data.audio import load_audio
from blsp.data.files import read_rows
from blsp.evaluation.bootstrap import draws, interval, mean_figure
from blsp.evaluation.recogniser import Recogniser, recogniser_of
from blsp.evaluation.scoring import plain_words
from blsp.inference.conversation import Conversation
from blsp.inference.listener import Listener, load

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


def turns_of(listener: Listener, recogniser: Recogniser, route: str, said: list[str], clips: list[Path]) -> list:
    """What stands for each of the user's turns in the conversation."""
    if route == "text":
        return said
    if route == "cascade":
        return [recogniser.transcribe_clip(load_audio(clip), "en") for clip in clips]
    return listener.embed_audio(clips)


def talk(listener: Listener, turns: list, max_new_tokens: int) -> list[str]:
    """The answers to the turns, each given with all that was said before."""
    conversation = Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=max_new_tokens))
    return ["".join(conversation.ask(turn)).strip() for turn in turns]


def is_right(answer: str, wanted: str) -> bool:
    """Whether one of the wanted words stands in the answer."""
    return not {word.lower() for word in wanted.split("|")}.isdisjoint(plain_words(answer))


def asked(listener: Listener, clips: list[list[Path]], max_new_tokens: int, done: int) -> Iterator[dict]:
    """One row a dialogue and route, after the first `done`: what was understood, the answers, and whether the last one
    is right.
    """
    recogniser = Recogniser(recogniser_of(listener.model.config.audio_model_id))
    dialogues = list(zip(DIALOGUES, clips, strict=True))
    for number, ((*said, wanted), spoken) in enumerate(tqdm(dialogues, unit="dialogue")):
        for route in ROUTES[max(done - len(ROUTES) * number, 0) :]:
            turns = turns_of(listener, recogniser, route, said, spoken)
            answers = talk(listener, turns, max_new_tokens)
            heard = turns if route != "speech" else listener.readout(turns) if listener.reads_out else None
            right = is_right(answers[-1], wanted)
            yield {"route": route, "said": said, "heard": heard, "answers": answers, "wanted": wanted, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--model", default="blsp-small")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True, help="all turns, as JSONL")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    clips = speak(options.root, options.jobs)
    done = [row for _, row in read_rows(options.out)] if options.out.exists() else []  # of a run that was stopped
    listener = load(options.model, dtype=options.dtype)
    with options.out.open("a", encoding="utf-8") as file:
        for row in asked(listener, clips, options.max_new_tokens, len(done)):
            done.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    for route in ROUTES:
        right = mean_figure(np.array([float(row["right"]) for row in done if row["route"] == route]))
        low, high = interval(right, draws(len(DIALOGUES), 1000, seed=0))
        print(f"{route}: {right.point():.2f} of {len(DIALOGUES)} last answers are right ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
