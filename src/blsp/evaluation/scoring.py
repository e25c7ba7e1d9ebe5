"""Scores of answers: each kind of task's metrics, as figures that can be resampled, and counts of faults.

In:  a task, its rows, one route's answers (and the text route's, where answers are compared with those).
Out: `Score`: corpus figures with their statistics, each row's own values for samples.jsonl, faults by name.
Try: `score(task, rows, answers, None).figures["wer"].point()`
Flow: evaluation/ — routes.py → **scoring** → report.py. docs/evaluation.md explains every metric and its source.

wer, cer: Whisper's normaliser (data/normalisation.py), errors over reference length (jiwer).
bleu, chrf: sacrebleu's defaults.
em, f1: SQuAD's, on the words of Whisper's normaliser. accuracy: for choices, whether the likeliest option (by mean
log-likelihood per token) is right; for short answers, whether the answer contains the reference.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import jiwer
import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from blsp.data.manifest import Utterance
from blsp.data.normalisation import UNSPACED, count_words, normaliser, split_words
from blsp.evaluation.answers import NO_SPEECH, Answer, Answers
from blsp.evaluation.bootstrap import NEVER_NEGATIVE, SHARE, Figure, mean_figure, ratio
from blsp.evaluation.tasks import Task

LOWER_IS_BETTER = frozenset({"wer", "cer"})
MAIN_METRIC = {
    "asr": "wer",
    "st": "bleu",
    "slu": "accuracy",
    "sqa": "accuracy",
    "chat": "chrf",
    "continuation": "chrf",
    "no-speech": "accuracy",
}
BLEU_TOKENIZER = {"zh": "zh", "ja": "char", "th": "char"}
Values = Sequence[float]  # one number a row


@dataclass
class Score:
    """The figures of one route's answers to one task.

    figures: metric -> corpus figure. rows: id -> metric -> value. counts: fault -> number of answers. signatures:
    metric -> sacrebleu's own description of its settings.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, rows: Sequence[Utterance], figure: Figure, values: Values) -> None:
        """Set one metric: its corpus figure and each row's value."""
        self.figures[name] = figure
        for row, value in zip(rows, values, strict=True):
            self.rows.setdefault(row.id, {})[name] = value

    def add_mean(
        self, name: str, rows: Sequence[Utterance], values: Values, limits: tuple[float, float] = SHARE
    ) -> None:
        """Set a metric whose corpus figure is the mean of the rows' values."""
        self.add(name, rows, mean_figure(np.array(values, dtype=float), limits), values)


def score(task: Task, rows: Sequence[Utterance], answers: Answers, text_answers: Answers | None) -> Score:
    """All metrics of the task's kind. text_answers: of the text route; None: no comparison with them."""
    result = Score()
    in_order = [answers[row.id] for row in rows]
    if task.kind in ("chat", "continuation"):
        references = None if text_answers is None else [text_answers[row.id].text for row in rows]
        _score_open(task, rows, in_order, references, result)
    else:
        SCORERS[task.kind](task, rows, in_order, result)
    result.counts = _count_faults(task, rows, in_order)
    return result


def score_transcripts(task: Task, rows: Sequence[Utterance], texts: Sequence[str]) -> Score:
    """WER and CER of transcripts of the recogniser or the adapter."""
    result = Score()
    _add_word_errors(task.language, rows, texts, result)
    result.counts = {"empty": sum(not text.strip() for text in texts)}
    return result


def plain_words(text: str, language: str = "en") -> list[str]:
    """The words of Whisper's normaliser: lower case, no punctuation, numbers as digits (English)."""
    return normaliser(language, split_letters=True)(text).split()


# --- recognition --------------------------------------------------------------------------------------------
def _add_word_errors(language: str, rows: Sequence[Utterance], texts: Sequence[str], result: Score) -> None:
    between = "" if language in UNSPACED else " "  # blanks between split letters are not characters of the text
    pairs = [
        (plain_words(row.text, language), plain_words(text, language)) for row, text in zip(rows, texts, strict=True)
    ]
    for name, align, blank in (("wer", jiwer.process_words, " "), ("cer", jiwer.process_characters, between)):
        counts = [_errors(align, blank.join(reference), blank.join(transcript)) for reference, transcript in pairs]
        values = [errors / max(length, 1) for errors, length in counts]
        # If no reference has a word, every written word is an error, and the figure is their number.
        rate = ratio if any(length for _, length in counts) else lambda total: float(total[0])
        result.add(name, rows, Figure(np.array(counts, dtype=float), rate, NEVER_NEGATIVE), values)


def _errors(align: Callable, reference: str, transcript: str) -> tuple[int, int]:
    """Errors, and the length of the reference, in words or characters."""
    alignment = align([reference], [transcript])
    errors = alignment.substitutions + alignment.deletions + alignment.insertions
    return errors, alignment.hits + alignment.substitutions + alignment.deletions


# --- translation --------------------------------------------------------------------------------------------
def _score_translation(task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], result: Score) -> None:
    references = [row.reference or "" for row in rows]
    texts = [answer.text for answer in answers]
    tokenizer = BLEU_TOKENIZER.get(task.answer_language, "13a")
    sentence_bleu = BLEU(tokenize=tokenizer, effective_order=True)  # otherwise short sentences score 0
    _add_sacrebleu("bleu", BLEU(tokenize=tokenizer), sentence_bleu, rows, texts, references, result)
    _add_sacrebleu("chrf", CHRF(), CHRF(), rows, texts, references, result)


def _add_sacrebleu(
    name: str,
    metric: Metric,
    sentence_metric: Metric,
    rows: Sequence[Utterance],
    texts: Sequence[str],
    references: Sequence[str],
    result: Score,
) -> None:
    """A corpus metric from its sums over sentences, as in sacrebleu's own significance test."""
    statistics = np.array(metric._extract_corpus_statistics(list(texts), [list(references)]), dtype=float)
    values = [
        sentence_metric.corpus_score([text], [[reference]]).score
        for text, reference in zip(texts, references, strict=True)
    ]

    def corpus_score(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([int(count) for count in sums]).score)

    result.add(name, rows, Figure(statistics, corpus_score, (0.0, 100.0)), values)
    result.signatures[name] = str(metric.get_signature())


# --- understanding ------------------------------------------------------------------------------------------
def _score_understanding(task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], result: Score) -> None:
    pairs = list(zip(rows, answers, strict=True))
    if all(row.options is not None for row in rows):
        # A peer gives no likelihoods, so it has only the second figure.
        if all(answer.option_scores is not None or answer.finish == NO_SPEECH for answer in answers):
            result.add_mean("accuracy", rows, [_chose_reference(*pair) for pair in pairs])
        if task.generate:
            values = [_names_reference(*pair, task.answer_language) for pair in pairs]
            result.add_mean("accuracy_generated", rows, values)
        return
    words = [plain_words(answer.text, task.answer_language) for answer in answers]
    # the words of each reference and of its alternative spellings
    spellings = [dict.fromkeys([row.reference or "", *row.extra.get("references", [])]) for row in rows]
    accepted = [[plain_words(spelling, task.answer_language) for spelling in of_row] for of_row in spellings]
    metrics: dict[str, Callable[[list[str], list[list[str]]], float]] = {
        "accuracy": lambda answer, spellings: any(_position(answer, words) is not None for words in spellings if words),
        "em": lambda answer, spellings: answer in spellings,
        "f1": lambda answer, spellings: max(_f1(answer, words) for words in spellings),
    }
    for name, metric in metrics.items():
        result.add_mean(name, rows, [float(metric(*pair)) for pair in zip(words, accepted, strict=True)])


def _chose_reference(row: Utterance, answer: Answer) -> float:
    """1 if the likeliest option is the reference; 0 if not, or if no speech was found."""
    assert row.options is not None
    if answer.option_scores is None:
        return 0.0
    return float(row.options[int(np.argmax(answer.option_scores))] == row.reference)


def _names_reference(row: Utterance, answer: Answer, language: str) -> float:
    """1 if the written answer means the reference.

    It means the first option that it contains (of two that begin at the same word, the longer one). If it contains
    none, it means the option with the most similar letters (chrF).
    """
    assert row.options is not None
    words = plain_words(answer.text, language)
    named = []
    for option in row.options:
        option_words = plain_words(option, language)
        position = _position(words, option_words)
        if position is not None:
            named.append((position, -len(option_words), option))
    if named:
        return float(min(named)[2] == row.reference)
    if answer.finish == NO_SPEECH:
        return 0.0
    chrf = CHRF(lowercase=True)
    likeness = [chrf.sentence_score(answer.text, [option]).score for option in row.options]
    return float(max(likeness) > 0 and row.options[int(np.argmax(likeness))] == row.reference)


def _position(words: list[str], part: list[str]) -> int | None:
    """The index in `words` at which `part` first occurs; None if it does not."""
    return next((i for i in range(len(words) - len(part) + 1) if words[i : i + len(part)] == part), None)


def _f1(answer: list[str], reference: list[str]) -> float:
    """SQuAD's token F1 (Rajpurkar et al. 2016)."""
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


# --- open answers and silence -------------------------------------------------------------------------------
def _score_open(
    task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], references: Sequence[str] | None, result: Score
) -> None:
    """Similarity of the answers to the text route's answers (`references`), and their length in words."""
    texts = [answer.text for answer in answers]
    if references is not None:
        _add_sacrebleu("chrf", CHRF(), CHRF(), rows, texts, references, result)
        same = [float(text == reference) for text, reference in zip(texts, references, strict=True)]
        result.add_mean("agreement", rows, same)
    lengths = [float(count_words(text, task.answer_language)) for text in texts]
    result.add_mean("words", rows, lengths, NEVER_NEGATIVE)


SCORERS: dict[str, Callable[[Task, Sequence[Utterance], Sequence[Answer], Score], None]] = {
    "asr": lambda task, rows, answers, score: _add_word_errors(task.language, rows, [a.text for a in answers], score),
    "st": _score_translation,
    "slu": _score_understanding,
    "sqa": _score_understanding,
    "no-speech": lambda _, rows, answers, score: score.add_mean(
        "accuracy", rows, [float(answer.finish == NO_SPEECH) for answer in answers]
    ),
}


# --- faults, which can be found without knowing the right answer --------------------------------------------

FAULTS = ("refusals", "loops", "empty", "wrong_language")
HELP = r"( \w+){0,2} (assist|help|answer|provide|fulfil?l|process|hear|listen|access|comply|do|translate|repeat)"
REFUSAL = re.compile(
    r"\b(i'?m (really |very |so )?sorry,? (but|i)|i apologi[sz]e"
    r"|as an? (ai|artificial|language model|digital)"
    r"|i (can'?t|cannot|can not|don'?t have the ability to)"
    + HELP
    + r"|i('?m| am) (unable|not able) to"
    + HELP
    + r"|i (don'?t|do not) (understand|have enough (information|context))"
    r"|(could|can) you (please )?(provide|clarify|rephrase)"
    r"|please provide (me )?(with )?(more|the|some|additional))\b",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 160  # characters at the beginning in which a refusal is searched
LOOP_TIMES = 4  # a phrase that is repeated this often in a row is a loop
LOOP_WORDS = 8  # words of the longest phrase that is searched
LOOP_BYTES, COMPRESSION = 60, 2.4  # Whisper's criterion for a loop (Radford et al. 2022, §4.5)
LANGUAGE_WORDS = 3  # fewer words in Latin letters (names, numbers, "OK") do not show the language
OTHER_LANGUAGE = 1e-3  # an answer is in another language if the expected one has a lower probability
NO_LANGUAGE = "zxx"  # py3langid's class for numbers, code and other texts in no language


def _count_faults(task: Task, rows: Sequence[Utterance], answers: Sequence[Answer]) -> dict[str, int]:
    """Faults of the written answers, and how many were cut off, or not given because no speech was found."""
    counts = Counter({name: 0 for name in (*FAULTS, "cut", "no_speech")})
    for row, answer in zip(rows, answers, strict=True):
        if answer.finish == NO_SPEECH:
            counts["no_speech"] += 1
        elif answer.finish:
            names = faults(answer.text, task.answer_language)
            if task.kind == "asr":  # if the speaker said a refusal or a loop, repeating it is right
                names -= faults(row.text, task.language)
            counts.update(names)
            counts["cut"] += answer.finish == "length"
    return dict(counts)


def faults(answer: str, language: str) -> set[str]:
    """The faults of an answer that should be in `language` (ISO 639-1)."""
    if not re.search(r"\w", answer):
        return {"empty"}
    checks = {
        "refusals": REFUSAL.search(answer[:REFUSAL_WITHIN].replace("’", "'")) is not None,
        "loops": loops(answer),
        "wrong_language": is_in_other_language(answer, language),
    }
    return {name for name, is_fault in checks.items() if is_fault}


def loops(answer: str) -> bool:
    """True if a phrase of up to eight words is repeated four times in a row, or the text compresses like a loop."""
    words = split_words(answer.lower())
    for width in range(1, LOOP_WORDS + 1):
        # Count in a row the words that equal the word one phrase earlier: "a b a b a b" has 4 of them at width 2.
        run = 0
        for word, earlier in zip(words[width:], words, strict=False):
            run = run + 1 if word == earlier else 0
            if run >= (LOOP_TIMES - 1) * width:
                return True
    raw = answer.encode()
    return len(raw) >= LOOP_BYTES and len(raw) / len(zlib.compress(raw)) > COMPRESSION


def is_in_other_language(text: str, language: str) -> bool:
    """True if a text is almost certainly not in `language` (ISO 639-1); False if it is too short."""
    letters = "".join(letter for letter in text if unicodedata.category(letter)[0] != "M")  # marks would split words
    words = re.findall(r"[^\W\d_]{2,}", letters)
    latin = all(letter < "\u0370" for word in words for letter in word)
    if not words or (latin and len(words) < LANGUAGE_WORDS):
        return False
    probabilities = dict(_language_identifier().rank(text))  # most probable first
    if next(iter(probabilities)) == NO_LANGUAGE:
        return False
    return probabilities.get(language, 1.0) < OTHER_LANGUAGE


@cache
def _language_identifier() -> LanguageIdentifier:
    """py3langid's own model of 139 languages (4.5 MB inside the package), which takes a second to load."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
