"""What answers are worth: each kind of task's metrics, as figures that can be resampled.

In:  a task, its rows, one route's answers (and the text route's, where answers are compared with those).
Out: `Score`: corpus figures with their statistics, and each row's own values for samples.jsonl.
Try: `score(task, rows, answers, None).figures["wer"].point()`
Flow: evaluation/ — routes.py → **scoring** → report.py. docs/evaluation.md explains every metric and its source.

wer, cer: Whisper's normaliser, errors over reference length (jiwer). bleu, chrf: sacrebleu's defaults.
em, f1: SQuAD's, on words as Whisper's normaliser writes them. accuracy: for choices, the likeliest option
(mean log-likelihood a token); for short answers, the reference stands in the answer.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import NO_SPEECH, Answer, Answers
from blsp.evaluation.confidence import Figure, mean_figure, ratio
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
UNSPACED = {"zh", "ja", "th"}  # no spaces between words: letters are counted
BLEU_TOKENIZER = {"zh": "zh", "ja": "char", "th": "char"}


@dataclass
class Score:
    """figures: metric -> corpus figure. rows: id -> metric -> value. counts: fault -> how many answers."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, rows: Sequence[Utterance], figure: Figure, values: Sequence[float]) -> None:
        self.figures[name] = figure
        for row, value in zip(rows, values, strict=True):
            self.rows.setdefault(row.id, {})[name] = value


def score(task: Task, rows: Sequence[Utterance], answers: Answers, text_answers: Answers | None) -> Score:
    """All metrics of the task's kind; `text_answers` None: nothing to compare the answers with."""
    result = Score()
    given = [answers[row.id] for row in rows]
    SCORERS[task.kind](task, rows, given, text_answers, result)
    _count_faults(task, rows, given, result)
    return result


def score_transcripts(task: Task, rows: Sequence[Utterance], texts: Sequence[str]) -> Score:
    """WER and CER of transcripts that no LLM wrote: the recogniser's, or the adapter's own."""
    result = Score()
    _transcripts(task.language, rows, texts, result)
    result.counts = {"empty": sum(not text.strip() for text in texts)}
    return result


def plain_words(text: str, language: str = "en") -> list[str]:
    """Words as Whisper's normaliser writes them: lower case, no punctuation, numbers as digits (English)."""
    return _normaliser(language)(text).split()


@cache
def _normaliser(language: str) -> Callable[[str], str]:
    if language == "en":
        return EnglishTextNormalizer()
    return BasicTextNormalizer(split_letters=language in UNSPACED)


# --- recognition --------------------------------------------------------------------------------------------


def _score_asr(
    task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], _: Answers | None, result: Score
) -> None:
    _transcripts(task.language, rows, [answer.text for answer in answers], result)


def _transcripts(language: str, rows: Sequence[Utterance], texts: Sequence[str], result: Score) -> None:
    references = [" ".join(plain_words(row.text, language)) for row in rows]
    written = [" ".join(plain_words(text, language)) for text in texts]
    for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        counts = [_errors(process, *pair) for pair in zip(references, written, strict=True)]
        statistics = np.array(counts, dtype=float)
        result.add(
            name, rows, Figure(statistics, ratio), [wrong / max(length, 1) for wrong, length in counts]
        )


def _errors(process: Callable, reference: str, written: str) -> tuple[int, int]:
    found = process([reference], [written])
    wrong = found.substitutions + found.deletions + found.insertions
    return wrong, found.hits + found.substitutions + found.deletions


# --- translation --------------------------------------------------------------------------------------------


def _score_st(
    task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], _: Answers | None, result: Score
) -> None:
    references = [row.reference or "" for row in rows]
    texts = [answer.text for answer in answers]
    tokenizer = BLEU_TOKENIZER.get(task.answer_language, "13a")
    _sacrebleu(
        "bleu",
        BLEU(tokenize=tokenizer),
        BLEU(tokenize=tokenizer, effective_order=True),
        rows,
        texts,
        references,
        result,
    )
    _sacrebleu("chrf", CHRF(), CHRF(), rows, texts, references, result)


def _sacrebleu(
    name: str,
    metric: Metric,
    sentence_metric: Metric,
    rows: Sequence[Utterance],
    texts: Sequence[str],
    references: Sequence[str],
    result: Score,
) -> None:
    """A corpus metric whose sums over sentences sacrebleu hands out (its own significance test uses them too)."""
    statistics = np.array(metric._extract_corpus_statistics(list(texts), [list(references)]), dtype=float)
    sentences = [
        sentence_metric.corpus_score([text], [[reference]]).score
        for text, reference in zip(texts, references, strict=True)
    ]
    value = lambda total: float(metric._compute_score_from_stats([int(n) for n in total]).score)  # noqa: E731
    result.add(name, rows, Figure(statistics, value), sentences)
    result.signatures[name] = str(metric.get_signature())


# --- understanding ------------------------------------------------------------------------------------------


def _score_understanding(
    task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], _: Answers | None, result: Score
) -> None:
    if all(row.options is not None for row in rows):
        if all(
            answer.option_scores is not None or answer.finish == NO_SPEECH for answer in answers
        ):  # not a peer's
            _means(
                "accuracy",
                rows,
                [_chose(row, answer) for row, answer in zip(rows, answers, strict=True)],
                result,
            )
        if task.generate:
            named = [
                _named(row, answer, task.answer_language) for row, answer in zip(rows, answers, strict=True)
            ]
            _means("accuracy_generated", rows, named, result)
        return
    pairs = [
        (_accepted(row, task.answer_language), _words(answer, task))
        for row, answer in zip(rows, answers, strict=True)
    ]
    _means(
        "accuracy",
        rows,
        [float(any(_contains(given, each) for each in known)) for known, given in pairs],
        result,
    )
    _means("em", rows, [float(given in known) for known, given in pairs], result)
    _means("f1", rows, [max(_f1(given, each) for each in known) for known, given in pairs], result)


def _chose(row: Utterance, answer: Answer) -> float:
    """1 where the likeliest option is the reference; a route that heard nothing has chosen nothing."""
    assert row.options is not None
    if answer.option_scores is None:
        return 0.0
    return float(row.options[int(np.argmax(answer.option_scores))] == row.reference)


def _named(row: Utterance, answer: Answer, language: str) -> float:
    """1 where the written answer means the reference: it is the first option that the answer names (of two that
    begin there, the longer), or, where it names none, the one whose letters the answer is most like (chrF)."""
    assert row.options is not None
    written = plain_words(answer.text, language)
    found = []
    for option in row.options:
        words = plain_words(option, language)
        at = _position(written, words)
        if at is not None:
            found.append((at, -len(words), option))
    if found:
        return float(min(found)[2] == row.reference)
    if answer.finish == NO_SPEECH:
        return 0.0
    likeness = [_letters().sentence_score(answer.text, [option]).score for option in row.options]
    return float(max(likeness) > 0 and row.options[int(np.argmax(likeness))] == row.reference)


@cache
def _letters() -> CHRF:
    return CHRF(lowercase=True)


def _accepted(row: Utterance, language: str) -> list[list[str]]:
    """The reference and its other spellings (`references` in the row)."""
    others = row.extra.get("references", [])
    return [plain_words(each, language) for each in dict.fromkeys([row.reference or "", *others])]


def _words(answer: Answer, task: Task) -> list[str]:
    return plain_words(answer.text, task.answer_language)


def _contains(words: list[str], part: list[str]) -> bool:
    return bool(part) and _position(words, part) is not None


def _position(words: list[str], part: list[str]) -> int | None:
    """Where `part` first stands in `words`, as whole words."""
    return next((i for i in range(len(words) - len(part) + 1) if words[i : i + len(part)] == part), None)


def _f1(given: list[str], reference: list[str]) -> float:
    """SQuAD's token F1 (Rajpurkar et al. 2016)."""
    common = sum((Counter(given) & Counter(reference)).values())
    return 2 * common / (len(given) + len(reference)) if common else 0.0


# --- open answers -------------------------------------------------------------------------------------------


def _score_open(
    task: Task,
    rows: Sequence[Utterance],
    answers: Sequence[Answer],
    text_answers: Answers | None,
    result: Score,
) -> None:
    """How near the answer is to what the LLM answers on reading; and its length."""
    texts = [answer.text for answer in answers]
    if text_answers is not None:
        references = [text_answers[row.id].text for row in rows]
        _sacrebleu("chrf", CHRF(), CHRF(), rows, texts, references, result)
        same = [float(text == reference) for text, reference in zip(texts, references, strict=True)]
        _means("agreement", rows, same, result)
    _means("words", rows, [float(len(re.findall(r"\w+", text))) for text in texts], result)


def _score_no_speech(
    task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], _: Answers | None, result: Score
) -> None:
    _means("accuracy", rows, [float(answer.finish == NO_SPEECH) for answer in answers], result)


def _means(name: str, rows: Sequence[Utterance], values: Sequence[float], result: Score) -> None:
    result.add(name, rows, mean_figure(np.array(values, dtype=float)), values)


def _count_faults(task: Task, rows: Sequence[Utterance], answers: Sequence[Answer], result: Score) -> None:
    """Faults of what was written, and answers that were cut or not given because nothing was heard."""
    counts = Counter(
        {name: 0 for name in ("refusals", "loops", "empty", "wrong_language", "cut", "no_speech")}
    )
    for row, answer in zip(rows, answers, strict=True):
        if answer.finish == NO_SPEECH:
            counts["no_speech"] += 1
        elif answer.finish:
            counts.update(_faults(task, row, answer))
            counts["cut"] += answer.finish == "length"
    result.counts = dict(counts)


def _faults(task: Task, row: Utterance, answer: Answer) -> set[str]:
    """Faults of the answer; a refusal or a loop that the speaker uttered is not one when it is repeated."""
    found = faults(answer.text, task.answer_language)
    return found - faults(row.text, task.language) if task.kind == "asr" else found


SCORERS: dict[str, Callable[[Task, Sequence[Utterance], Sequence[Answer], Answers | None, Score], None]] = {
    "asr": _score_asr,
    "st": _score_st,
    "slu": _score_understanding,
    "sqa": _score_understanding,
    "chat": _score_open,
    "continuation": _score_open,
    "no-speech": _score_no_speech,
}

FAULTS = ("refusals", "loops", "empty", "wrong_language")

_HELP = (
    r"( \w+){0,2} (assist|help|answer|provide|fulfil?l|process|hear|listen|access|comply|do|translate|repeat)"
)
REFUSAL = re.compile(
    r"\b(i'?m (really |very |so )?sorry,? (but|i)|i apologi[sz]e"
    r"|as an? (ai|artificial|language model|digital)"
    r"|i (can'?t|cannot|can not|don'?t have the ability to)"
    + _HELP
    + r"|i('?m| am) (unable|not able) to"
    + _HELP
    + r"|i (don'?t|do not) (understand|have enough (information|context))"
    r"|(could|can) you (please )?(provide|clarify|rephrase)"
    r"|please provide (me )?(with )?(more|the|some|additional))\b",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 160  # characters: a refusal stands at the beginning
LOOP_TIMES = 4  # a phrase this often in a row is a loop
LOOP_WORDS = 8  # the longest phrase looked for
COMPRESSION = 2.4  # Whisper's own mark of a hallucinated loop (Radford et al. 2022, §4.5)

# The commonest short words of a language: enough to tell an answer of a few words from one in another language.
FUNCTION_WORDS = {
    "en": "the of and to in is that it for you are with on this be have from not your at as what how can will i",
    "de": "der die das und ist nicht ein eine zu den mit auf für von ich sie wir es im dem sich auch des werden bitte",
    "fr": "le la les des et est un une pour dans que qui pas vous sur avec ce au du votre en il nous je être plus",
    "es": "el la los las de y es un una para en que no por con su se del al lo usted como más está este ha",
    "it": "il la i gli le di e è un una per in che non con si del della al sono questo da come più ha alla",
    "nl": "de het een en van is in op te dat niet voor met zijn je ik aan er om maar ook als wat bij naar",
    "cs": "a je v na se to že s z do i o jako za by ale jsem není tak co už jen si bude jste",
    "pt": "o a os as de e é um uma para em que não por com seu se do da ao você como mais está no na",
}
SCRIPTS = {
    "ru": re.compile(r"[Ѐ-ӿ]"),
    "el": re.compile(r"[Ͱ-Ͽ]"),
    "zh": re.compile(r"[一-鿿]"),
    "ja": re.compile(r"[぀-ヿ]"),
    "ko": re.compile(r"[가-힯]"),
    "ar": re.compile(r"[؀-ۿ]"),
    "hi": re.compile(r"[ऀ-ॿ]"),
}
_WORDS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}


def faults(answer: str, language: str) -> set[str]:
    """The faults of an answer that should be in `language` (ISO 639-1)."""
    if not re.search(r"\w", answer):
        return {"empty"}
    found = set()
    if REFUSAL.search(answer[:REFUSAL_WITHIN].replace("’", "'")):
        found.add("refusals")
    if loops(answer):
        found.add("loops")
    if (heard := guess_language(answer)) is not None and heard != language:
        found.add("wrong_language")
    return found


def loops(answer: str) -> bool:
    """True where a phrase of up to eight words comes four times in a row, or the text compresses like one."""
    words = re.findall(r"\w+", answer.lower())
    for width in range(1, LOOP_WORDS + 1):
        run = 0
        for here, before in zip(words[width:], words, strict=False):
            run = run + 1 if here == before else 0
            if run >= (LOOP_TIMES - 1) * width:
                return True
    raw = answer.encode()
    return len(raw) >= 60 and len(raw) / len(zlib.compress(raw)) > COMPRESSION


def guess_language(text: str) -> str | None:
    """The language of a text, None where a few rules cannot tell: names, numbers and short answers stay untold.

    A script decides where most letters are of it; else the language whose function words are at least three,
    and twice as many as those of any other.
    """
    letters = re.findall(r"[^\W\d_]", text)
    for language, script in SCRIPTS.items():
        if letters and sum(bool(script.match(letter)) for letter in letters) * 2 > len(letters):
            return language
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = sorted(((sum(w in known for w in words), name) for name, known in _WORDS.items()), reverse=True)
    (most, language), (second, _) = counts[:2]
    return language if most >= 3 and most >= 2 * second else None
