"""Search for the instruction texts with which an LLM repeats, answers, lists keywords or translates best, on text.

In:  an LLM; sixty sentences (WordNet examples, game lines), thirty questions with short answers, telephone prompts in
     English and French that the evaluation does not ask. Ten of the questions are asked by the evaluation too: the
     wording was chosen on them as text, before there was an adapter.
Out: a table, one line a wording and order: repeat by word error rate, answer by answers that hold the right word,
     keywords by the share of listed words that were said, of said content words that are listed, and of lists,
     translate by BLEU and by the answers' length over the references'.
Try: `python recipes/blsp-tiny/search_prompts.py repeat` (about a minute a dozen wordings on two cores)
Flow: recipes/blsp-tiny — what wins stands in llm/instructions.py; the tables are in docs/log.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jiwer
import sacrebleu
from transformers import AutoModelForCausalLM, AutoTokenizer
from whisper_normalizer.english import EnglishTextNormalizer

from blsp.continuation.engines import Prompt, TransformersEngine
from blsp.llm.decoding import Decoding
from blsp.llm.prompt import ORDERS, Order
from blsp.weights.embedded import resolve_weights

TEXTS = Path(__file__).parent / "texts"
WORDINGS: dict[str, tuple[str, ...]] = {
    "repeat": (
        "Please repeat the following words:",
        "Repeat the following words:",
        "Repeat the following words exactly:",
        "Repeat the following sentence exactly:",
        "Repeat the following text exactly, word for word:",
        "Repeat this text exactly, word for word:",
        "Repeat after me:",
        "Say it again, word for word:",
        "Please repeat the words.",
        "Please repeat this text.",
        "Repeat exactly what is said, and nothing else.",
        "Repeat the text.",
        "Copy the following text:",
        "Copy the text:",
        "Write down the following words:",
        "Transcribe the following words:",
        "Echo:",
        "Repeat:",
    ),
    "answer": (
        "Answer the following question:",
        "Answer the question.",
        "Answer the following question in one short sentence:",
        "Answer the question in one short sentence.",
        "Please answer the question briefly:",
        "Give a short answer:",
        "Answer in one sentence:",
        "Reply to this:",
        "Please respond:",
    ),
    "keywords": (
        "List the keywords of the following text, separated by commas:",
        "Extract the keywords from the following text:",
        "Extract the keywords:",
        "What are the keywords in the following text?",
        "Write only the most important words of the following text:",
        "Write the keywords of the text, separated by commas.",
        "Keywords of the following text:",
        "Which words matter most here? List them, separated by commas.",
    ),
    "translate": (
        "Please translate the following text into French.",
        "Please translate the following text into French text.",
        "Translate the following text into French:",
        "Translate the following text into French. Write only the translation:",
        "Translate the following text into French. Write the translation and nothing else.",
        "Translate the following words into French, without any comment:",
        "Write the following text in French:",
    ),
}
QUESTIONS: tuple[tuple[str, str], ...] = (  # question, what a right answer holds
    ("What is the capital of France?", "paris"),
    ("What is the capital of Italy?", "rome"),
    ("What is the capital of Japan?", "tokyo"),
    ("How many days are in a week?", "seven|7"),
    ("How many months are in a year?", "twelve|12"),
    ("How many legs does a spider have?", "eight|8"),
    ("How many hours are in a day?", "24|twenty"),
    ("What color is the sky on a clear day?", "blue"),
    ("What color is grass?", "green"),
    ("What do bees make?", "honey"),
    ("Which planet do we live on?", "earth"),
    ("Which planet is known as the red planet?", "mars"),
    ("What is the largest ocean on Earth?", "pacific"),
    ("What is the largest planet in the solar system?", "jupiter"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("Who painted the Mona Lisa?", "vinci"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"),
    ("What is frozen water called?", "ice"),
    ("What is two plus two?", "four|4"),
    ("What language is spoken in Brazil?", "portuguese"),
    ("What language do people speak in Germany?", "german"),
    ("What is the name of the star at the center of our solar system?", "sun"),
    ("What animal says meow?", "cat"),
    ("What do you call a baby dog?", "puppy|pup"),
    ("On which continent is Egypt?", "africa"),
    ("On which continent is China?", "asia"),
    ("What gas do plants take in from the air?", "carbon"),
    ("What is the first month of the year?", "january"),
    ("What season comes after winter?", "spring"),
)
COMMON = (
    "a an the of to in on at for with and or but is are was were be been am i you he she it we they me "
    "him her us them my your his its our their this that these those as by from not no do does did have "
    "has had will would can could should may might must so if then than there here what which who how "
    "when where why all any some"
)
STOP_WORDS = frozenset(COMMON.split())
clean = EnglishTextNormalizer()


@dataclass(frozen=True)
class Scored:
    """One line of the table: figures by name, and the first answers."""

    figures: dict[str, float]
    examples: list[str]


def repeat(texts: list[str], answers: list[str]) -> dict[str, float]:
    """Word error rate over all sentences, and the share of sentences without an error."""
    said, repeated = [clean(text) for text in texts], [clean(answer) for answer in answers]
    exact = sum(a == b for a, b in zip(said, repeated, strict=True)) / len(said)
    return {"wer": jiwer.wer(said, repeated), "exact": exact}


def answer(texts: list[str], answers: list[str]) -> dict[str, float]:
    """The share of right answers, and their mean number of words."""
    wanted = dict(QUESTIONS)
    right = [bool(re.search(rf"\b({wanted[text]})", clean(said))) for text, said in zip(texts, answers, strict=True)]
    return {"right": sum(right) / len(right), "words": sum(len(said.split()) for said in answers) / len(answers)}


def keywords(texts: list[str], answers: list[str]) -> dict[str, float]:
    """Precision and recall of listed words against the content words said; the share of comma lists."""
    listed = [{word for word in clean(said).split() if word not in STOP_WORDS} for said in answers]
    content = [{word for word in clean(text).split() if word not in STOP_WORDS} for text in texts]
    hits = sum(len(a & b) for a, b in zip(listed, content, strict=True))
    as_list = sum("," in said or len(said.split()) <= 2 for said in answers) / len(answers)
    return {"precision": hits / sum(map(len, listed)), "recall": hits / sum(map(len, content)), "list": as_list}


def translate(texts: list[str], answers: list[str]) -> dict[str, float]:
    """BLEU against the French prompts, and the answers' words over the references' (above 1: comments around them)."""
    wanted = prompts_in_french()
    references = [wanted[text] for text in texts]
    words = sum(len(said.split()) for said in answers) / sum(len(text.split()) for text in references)
    return {"bleu": sacrebleu.corpus_bleu(answers, [references]).score, "length": words}


SCORES: dict[str, Callable[[list[str], list[str]], dict[str, float]]] = {
    "repeat": repeat,
    "answer": answer,
    "keywords": keywords,
    "translate": translate,
}


def sentences(count: int, seed: int = 0, least: int = 2) -> list[str]:
    """As many WordNet examples as game lines, with at least `least` words."""
    draw = random.Random(seed)
    with gzip.open(TEXTS / "wordnet_examples_en.txt.gz", "rt", encoding="utf-8") as file:
        examples = [line.strip() for line in file if least <= len(line.split()) <= 30]
    with gzip.open(TEXTS / "fotaq_en.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line)["text"] for line in file]
    lines = [text for text in lines if least <= len(text.split()) <= 30]
    return draw.sample(examples, count // 2) + draw.sample(lines, count - count // 2)


def prompts_in_french() -> dict[str, str]:
    """Telephone prompts of four to thirty words with their French version; none that the evaluation asks."""
    english, french, asked = (prompts(name) for name in ("en", "fr", "en_eval"))
    pairs = {text: french[key] for key, text in english.items() if key in french and key not in asked}
    return {text: other for text, other in pairs.items() if 4 <= len(text.split()) <= 30}


def prompts(name: str) -> dict[str, str]:
    """The texts of a list of telephone prompts by their ids."""
    with gzip.open(TEXTS / f"asterisk_{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return {row["id"]: row["text"] for row in map(json.loads, file)}


def try_wording(engine: TransformersEngine, behaviour: str, wording: str, order: Order, texts: list[str]) -> Scored:
    """Ask every text with one wording and score the answers."""
    prompts = [Prompt(key, wording, order, text) for key, text in enumerate(texts)]
    answers = [written.text for written in next(engine.write([prompts]))]
    return Scored(SCORES[behaviour](texts, answers), answers[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("behaviour", choices=SCORES)
    parser.add_argument("--llm", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", help="of the LLM's weights")
    parser.add_argument("--sentences", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48, help="that an answer may have")
    parser.add_argument("--seed", type=int, default=0, help="which sentences are drawn")
    parser.add_argument("--wording", action="append", help="try these instead (repeatable)")
    arguments = parser.parse_args()
    folder = resolve_weights(arguments.llm)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=arguments.dtype).eval()
    engine = TransformersEngine(llm, AutoTokenizer.from_pretrained(folder), Decoding(max_new_tokens=arguments.tokens))
    asked = arguments.behaviour
    if asked == "answer":
        texts = [question for question, _ in QUESTIONS]
    elif asked == "translate":
        texts = random.Random(arguments.seed).sample(list(prompts_in_french()), arguments.sentences)
    else:
        texts = sentences(arguments.sentences, arguments.seed, 6 if asked == "keywords" else 2)
    for wording in arguments.wording or WORDINGS[asked]:
        for order in ORDERS:
            scored = try_wording(engine, asked, wording, order, texts)
            figures = " ".join(f"{name} {value:.3f}" for name, value in scored.figures.items())
            print(f"| {wording} | {order} | {figures} | {' / '.join(scored.examples)[:90]!r} |", flush=True)


if __name__ == "__main__":
    main()
