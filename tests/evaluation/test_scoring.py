"""Every metric on answers with known scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, corpus_chrf

from blsp.data.manifest import Utterance
from blsp.evaluation.answers import NO_SPEECH, Answer
from blsp.evaluation.bootstrap import Figure, draws, interval, mean_figure, ratio, relative_gap
from blsp.evaluation.scoring import Score, faults, is_in_other_language, loops, score, score_transcripts
from blsp.evaluation.tasks import Task


def scored(
    kind: str, rows: list[Utterance], answers: list[Answer], texts: list[str] | None = None, **task: str
) -> Score:
    text_answers = None if texts is None else {row.id: Answer(text) for row, text in zip(rows, texts, strict=True)}
    by_id = {row.id: answer for row, answer in zip(rows, answers, strict=True)}
    return score(Task("t", kind, "m.jsonl", **task), rows, by_id, text_answers)  # type: ignore[arg-type]


def row(text: str = "hi", **fields: object) -> Utterance:
    return Utterance(id=f"{text}{sorted(fields.items(), key=str)}", audio="", text=text, **fields)  # type: ignore[arg-type]


def test_word_errors_are_summed_over_the_corpus_after_whispers_normaliser() -> None:
    rows = [row("I've got twenty-one dollars."), row("Press the pound key")]
    result = scored("asr", rows, [Answer("i have got $21", "stop"), Answer("press a key", "stop")])
    assert result.figures["wer"].point() == pytest.approx(2 / 8)  # (0 of 4) and (2 of 4)
    assert result.rows[rows[1].id]["wer"] == pytest.approx(2 / 4)
    assert result.figures["cer"].point() > 0


def test_an_empty_reference_counts_insertions_and_a_silent_transcript_deletions() -> None:
    rows = [row("..."), row("one two three")]
    result = score_transcripts(Task("t", "asr", "m"), rows, ["made up words", ""])
    assert result.figures["wer"].point() == pytest.approx((3 + 3) / 3)
    assert result.counts == {"empty": 1}


@pytest.mark.parametrize(
    "language, reference, transcript, wer, cer",
    [
        ("hi", "आज का दिन अच्छा है", "आज का दान अच्छा है", 1 / 5, 1 / 18),  # day, gift
        ("hi", "आज का दिन अच्छा है।", "आज का दिन अच्छा है", 0, 0),
        ("bn", "আমি ভাত খাই", "আমা ভুত খেই", 3 / 3, 3 / 11),
        ("ta", "நான் வீடு", "நான் விடு", 1 / 2, 1 / 9),  # house, let go
        ("th", "บ้าน", "บาน", 1 / 3, 1 / 4),  # บ้ า น, without the tone sign
        ("th", "น้ำ ดี", "น้ำดี", 0, 0),
        ("zh", "今天天气很好", "今天天氣很好", 1 / 6, 1 / 6),
        ("zh", "今天天气很好。", "今天天气好", 1 / 6, 1 / 6),
        ("ja", "かがみです", "かかみです", 1 / 5, 1 / 5),
        ("ja", "ガラス", "ｶﾞﾗｽ", 0, 0),  # half width
        ("ar", "كَتَبَ الوَلَد", "كتب البلد", 1 / 2, 1 / 9),  # boy, country; points do not count
        ("he", "שָׁלוֹם לך", "שלום לה", 1 / 2, 1 / 7),
        ("te", "పాలు నీళ్ళు", "పాలు నీళ్ళ", 1 / 2, 1 / 11),
        ("my", "စာ", "စ", 1 / 2, 1 / 2),
        ("tr", "IŞIK İYİ", "ışık iyi", 0, 0),
        ("ru", "Ещё раз", "ещё час", 1 / 2, 2 / 7),
        ("fr", "Ça va, l'été ?", "ca va l'ete", 2 / 4, 3 / 11),
        ("en", "Uh.", "", 0, 0),  # Whisper's English normaliser leaves nothing of a hesitation
        ("en", "Uh.", "made up", 2, 7),
        ("hi", "।", "दिन", 1, 3),
    ],
)
def test_error_rates_worked_out_by_hand(language: str, reference: str, transcript: str, wer: float, cer: float) -> None:
    rows = [row(reference)]
    result = score_transcripts(Task("t", "asr", "m", language=language), rows, [transcript])
    assert result.figures["wer"].point() == pytest.approx(wer)
    assert result.figures["cer"].point() == pytest.approx(cer)
    assert result.rows[rows[0].id] == pytest.approx({"wer": wer, "cer": cer})
    for figure in result.figures.values():
        assert np.isfinite(interval(figure, draws(1, 10, seed=0))).all()


def test_short_answers_differ_by_vowel_signs() -> None:
    rows = [row("a", reference="दिन"), row("b", reference="दिन")]
    answers = [Answer("दान", "stop"), Answer("यह दिन है।", "stop")]
    result = scored("sqa", rows, answers, answer_language="hi")
    figures = {name: figure.point() for name, figure in result.figures.items()}
    assert figures == pytest.approx({"accuracy": 1 / 2, "em": 0, "f1": (0 + 2 / 4) / 2})


def test_open_answers_are_counted_in_words_of_their_script() -> None:
    for language, text, words in [("hi", "हिंदी में बात", 3), ("zh", "今天很好", 4), ("en", "It's fine", 3)]:
        result = scored("chat", [row("a")], [Answer(text, "stop")], [text], answer_language=language)
        assert result.figures["words"].point() == words


def test_translation_is_sacrebleus_corpus_score() -> None:
    rows = [
        row(str(i), reference=text) for i, text in enumerate(["le chat est là", "un chien dort ici", "bonjour à tous"])
    ]
    texts = ["le chat est ici", "un chien dort", "bonjour à tous"]
    result = scored("st", rows, [Answer(text, "stop") for text in texts], answer_language="fr")
    references = [[row.reference for row in rows]]
    assert result.figures["bleu"].point() == pytest.approx(corpus_bleu(texts, references).score)
    assert result.figures["chrf"].point() == pytest.approx(corpus_chrf(texts, references).score)
    assert "tok:13a" in result.signatures["bleu"] and "nc:6" in result.signatures["chrf"]


def test_choices_go_to_the_likeliest_option_and_to_the_first_that_is_named() -> None:
    options = ("turn on", "turn on the fan", "lock")
    rows = [row(str(i), options=options, reference="turn on the fan") for i in range(4)]
    answers = [
        Answer("Turn on the fan, then lock.", "stop", option_scores=(-2.0, -1.0, -3.0)),
        Answer("Lock it and turn on the fan.", "stop", option_scores=(-1.0, -2.0, -3.0)),
        Answer("Turning on that fan.", "stop", option_scores=(-1.0, -0.5, -3.0)),
        Answer("I could not hear any speech.", NO_SPEECH),
    ]
    result = scored("slu", rows, answers)
    assert result.figures["accuracy"].point() == 0.5
    named = [result.rows[row.id]["accuracy_generated"] for row in rows]
    assert named == [1, 0, 1, 0]  # the third by likeness
    assert result.counts["no_speech"] == 1


def test_a_peer_without_likelihoods_has_no_likelihood_accuracy() -> None:
    rows = [row("a", options=("yes", "no"), reference="no")]
    assert set(scored("sqa", rows, [Answer("No.", "stop")]).figures) == {"accuracy_generated"}


def test_short_answers_accept_every_spelling() -> None:
    rows = [row(str(i), reference="seven", extra={"references": ["a week's worth"]}) for i in range(3)]
    result = scored(
        "sqa", rows, [Answer("7.", "stop"), Answer("There are seven days.", "stop"), Answer("Seventy.", "stop")]
    )
    assert [result.figures[name].point() for name in ("em", "accuracy")] == pytest.approx([1 / 3, 2 / 3])
    assert result.figures["f1"].point() == pytest.approx((1 + 2 / 5 + 0) / 3)


def test_open_answers_are_compared_with_the_text_routes() -> None:
    rows = [row("a"), row("b")]
    result = scored(
        "chat", rows, [Answer("one answer", "stop"), Answer("other", "length")], ["one answer", "another answer"]
    )
    assert result.figures["agreement"].point() == 0.5
    assert result.figures["words"].point() == 1.5
    assert result.counts["cut"] == 1
    assert "chrf" not in scored("chat", rows, [Answer("x"), Answer("y")]).figures


@pytest.mark.parametrize(
    "answer, language, expected",
    [
        ("I'm sorry, but I can't assist with that.", "en", {"refusals"}),
        ("As an AI language model, I have no ears.", "en", {"refusals"}),
        ("I’m unable to help you.", "en", {"refusals"}),
        ("I can help you with that.", "en", set()),
        ("go on and on and on and on and on", "en", {"loops"}),
        ("  ...  ", "en", {"empty"}),
        ("La maison est dans le jardin et les fleurs sont belles.", "en", {"wrong_language"}),
        ("La maison est dans le jardin et les fleurs sont belles.", "fr", set()),
        ("The house is in the garden and it is for you.", "fr", {"wrong_language"}),
        ("Пожалуйста, введите номер", "en", {"wrong_language"}),
        ("Paris.", "de", set()),
        ("Bonjour à tous et bienvenue", "en", {"wrong_language"}),
        ("กรุณากดหมายเลขที่ต้องการ", "th", set()),
        ("நான் சோறு சாப்பிடுகிறேன்", "ta", set()),
        ("நான் சோறு சாப்பிடுகிறேன்", "en", {"wrong_language"}),
    ],
)
def test_faults(answer: str, language: str, expected: set[str]) -> None:
    assert faults(answer, language) == expected


def test_a_long_loop_of_sentences_is_found_and_an_ordinary_list_is_not() -> None:
    assert loops("The number you have dialed is not in service today, sorry. " * 8)
    assert not loops("one two three four five six seven eight nine ten eleven twelve thirteen")
    assert not is_in_other_language("42", "en")


def test_what_the_speaker_said_is_no_fault_when_it_is_repeated() -> None:
    rows = [row("I'm sorry, I can't help you.")]
    assert scored("asr", rows, [Answer("I'm sorry, I can't help you.", "stop")]).counts["refusals"] == 0
    assert scored("chat", rows, [Answer("I'm sorry, I can't help you.", "stop")]).counts["refusals"] == 1


def test_an_interval_holds_the_middle_95_percent() -> None:
    """1,001 draws of one utterance each, whose figures are 0, 1, …, 1000: 2.5 % lie below 25 and 2.5 % above 975."""
    figure = Figure(np.stack([np.arange(1001.0), np.ones(1001)], axis=1), ratio)
    assert interval(figure, np.arange(1001)[:, None]) == pytest.approx((25, 975))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_intervals_hold_the_mean_and_depend_on_the_seed_alone(values: list[float]) -> None:
    figure = mean_figure(np.array(values))
    rows = draws(len(values), 200, seed=1)
    low, high = interval(figure, rows)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert (low, high) == interval(figure, draws(len(values), 200, seed=1))


def test_the_interval_of_a_ratio_of_sums_weighs_long_utterances() -> None:
    figure = Figure(np.array([[0.0, 100.0], [1.0, 1.0]]), ratio)
    assert figure.point() == pytest.approx(1 / 101)
    assert interval(figure, draws(2, 400, seed=0)) == (0.0, 1.0)


def test_gaps_are_paired() -> None:
    """A route that is always 10 % below another has a gap of 10 % without doubt, however uncertain both are."""
    values = np.random.default_rng(0).uniform(0.5, 1, 40)
    gap, (low, high) = relative_gap(mean_figure(0.9 * values), mean_figure(values), draws(40, 200, seed=0))
    assert (gap, low, high) == pytest.approx((-10, -10, -10))


def test_undefined_figures_are_nan_not_zero() -> None:
    assert np.isnan(mean_figure(np.array([np.nan])).point())
    assert np.isnan(relative_gap(mean_figure(np.ones(1)), mean_figure(np.zeros(1)), draws(1, 5, seed=0))[0])
