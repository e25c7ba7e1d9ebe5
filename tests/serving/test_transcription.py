"""Formats of a transcript: times, subtitles, usage; fields that would change it; translation into English."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving.conftest import Running, running, spoken, wav
from support.tiny_models import speech_like, tiny_blsp

from blsp.inference.listener import Listener
from blsp.inference.transcript import transcripts
from blsp.serving.errors import ApiError
from blsp.serving.shared_recogniser import SharedRecogniser

MODEL = "tiny"


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose adapter reads nothing out, so that the LLM repeats what it hears."""
    listener = Listener(*tiny_blsp(tmp_path_factory.mktemp("repeating"), family="llama", adapter="stack"))
    with running(listener) as each:
        yield each


def post(server: Running, clip: bytes, route: str = "transcriptions", **form: Any) -> Any:
    form = {name.replace("granularities", "granularities[]"): value for name, value in form.items()}
    return server.http().post(f"/v1/audio/{route}", files={"file": ("a.wav", clip)}, data=form)


def two_pieces() -> bytes:
    """Speech, a second of silence, speech: 16 s, cut in the silence."""
    return wav(np.concatenate([speech_like(7.5, 1), np.zeros(16_000, np.float32), speech_like(7.5, 2)]))


def test_verbose_json_has_the_segments_and_words_of_the_library(server: Running) -> None:
    clip = two_pieces()
    expected = transcripts(server.listener, [clip], timestamps=True)[0]
    heard = server.client().audio.transcriptions.create(
        model=MODEL, file=("a.wav", clip), response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert heard.text == expected.text and heard.duration == expected.seconds == 16.0
    assert heard.task == "transcribe" and heard.times == "readout"
    assert [(s.start, s.end, s.text) for s in heard.segments] == [(s.start, s.end, s.text) for s in expected.segments]
    words = [word for segment in expected.segments for word in segment.words]
    assert [(word.word, word.start, word.end) for word in heard.words] == [(w.text, w.start, w.end) for w in words]
    assert words and words[-1].end > 8, "the words of the second piece have the recording's time"
    assert heard.usage.type == "duration" and heard.usage.seconds == 16.0


@pytest.mark.parametrize(
    "granularity, there, missing", [("word", "words", "segments"), ("segment", "segments", "words")]
)
def test_granularities_are_those_that_were_asked_for(
    server: Running, granularity: str, there: str, missing: str
) -> None:
    body = post(server, spoken(5, 2.0), response_format="verbose_json", timestamp_granularities=granularity).json()
    assert body[there] and missing not in body


def test_subtitles_are_those_of_the_library(server: Running) -> None:
    clip = two_pieces()
    expected = transcripts(server.listener, [clip], timestamps=True)[0]
    for form, text in (("srt", expected.srt()), ("vtt", expected.vtt())):
        answer = post(server, clip, response_format=form)
        assert answer.text == text and "-->" in text
        assert answer.headers["content-type"].startswith("text/vtt" if form == "vtt" else "text/plain")


def test_an_adapter_that_reads_nothing_out_times_its_pieces(repeating: Running) -> None:
    clip = two_pieces()
    body = post(repeating, clip, response_format="verbose_json").json()
    assert body["times"] == "pieces" and len(body["segments"]) == 2
    assert body["segments"][0]["end"] <= 8 <= body["segments"][1]["start"] + 1
    assert " ".join(segment["text"] for segment in body["segments"]) == body["text"]
    assert post(repeating, clip, response_format="srt").text.startswith("1\n00:00:0")
    error = refused(post(repeating, clip, response_format="verbose_json", timestamp_granularities="word"))
    assert error["param"] == "timestamp_granularities" and "segments" in error["message"]
    assert post(repeating, spoken(), temperature="0.5").status_code == 200


def test_json_and_the_end_of_a_stream_tell_the_usage(server: Running) -> None:
    clip = spoken(5, 2.0)
    wanted = {"type": "duration", "seconds": 2.0}
    assert post(server, clip).json()["usage"] == wanted
    *_, last = server.client().audio.transcriptions.create(model=MODEL, file=("a.wav", clip), stream=True)
    assert last.type == "transcript.text.done" and last.to_dict()["usage"] == wanted


def test_a_stream_that_fails_ends_with_the_error_and_is_counted(server_with: Any) -> None:
    with server_with() as server:
        server.app.state.scheduler.submit = fail_after(1, server.app.state.scheduler.submit)
        form = {"file": ("a.wav", two_pieces())}
        lines = server.http().post("/v1/audio/transcriptions", files=form, data={"stream": "true"}).text.split("\n\n")
        assert "transcript.text.delta" in lines[0] and "no room" in lines[1] and not lines[2]
        assert 'blsp_requests_total{route="transcriptions",status="429"} 1.0' in server.http().get("/metrics").text


def test_a_recording_is_one_file(server: Running) -> None:
    path = "/v1/audio/transcriptions"
    two = refused(server.http().post(path, files=[("file", ("a.wav", spoken())), ("file", ("b.wav", spoken(1)))]))
    assert two["param"] == "file" and "more than once" in two["message"]
    text = refused(server.http().post(path, data={"file": "abc"}))
    assert text["param"] == "file" and "UploadFile" not in text["message"] and "curl -F" in text["message"]


def fail_after(count: int, submit: Any) -> Any:
    def submit_or_fail(job: Any, left: list[int] = [count]) -> None:  # noqa: B006  it counts the calls
        if not left[0]:
            raise ApiError(429, "no room")
        left[0] -= 1
        submit(job)

    return submit_or_fail


def refused(answer: Any) -> dict[str, str]:
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


@pytest.mark.parametrize(
    "form, param, said",
    [
        ({"language": "klingon"}, "language", "ISO 639-1"),
        ({"language": "fr", "english_only": True}, "language", "English alone"),
        ({"prompt": "Ottawa"}, "prompt", "not supported"),
        ({"temperature": "0.7"}, "temperature", "read out"),
        ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy", "not supported"),
        ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy", "not supported"),
        ({"route": "translations", "stream": "true"}, "stream", "not supported"),
        ({"route": "translations", "model": "recogniser"}, "model", "does not translate"),
        ({"response_format": "srt", "stream": "true"}, "stream", "written whole"),
        ({"response_format": "srt", "model": "recogniser"}, "response_format", "no times"),
        (
            {"response_format": "verbose_json", "timestamp_granularities": "letter"},
            "timestamp_granularities",
            "word or",
        ),
        ({"response_format": "srt", "timestamp_granularities": "word"}, "timestamp_granularities", "verbose_json"),
    ],
)
def test_what_would_change_the_transcript_is_used_or_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], param: str, said: str
) -> None:
    if form.pop("english_only", False):
        monkeypatch.setattr(server.listener.model.config.audio_config, "vocab_size", 51864)
        with running(server.listener) as english:
            error = refused(post(english, spoken(), **form))
    else:
        error = refused(post(server, spoken(), **form))
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and said in error["message"]


def test_a_language_is_named_by_code_name_or_tag(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.listener.model.config.audio_config, "vocab_size", 51865)
    with running(server.listener) as multilingual:
        names = {"en": "english", "German": "german", "en-US": "english", "auto": "unknown", None: "unknown"}
        for language, name in names.items():
            form = {"language": language} if language else {}
            body = post(multilingual, spoken(), response_format="verbose_json", **form).json()
            assert body.get("language") == name, body


def test_a_model_of_english_alone_translates_by_transcribing(server: Running) -> None:
    clip = spoken(6, 2.0)
    written, translated = post(server, clip).json(), post(server, clip, "translations").json()
    assert translated["text"] == written["text"] != ""
    body = post(server, clip, "translations", response_format="verbose_json").json()
    assert (body["task"], body["language"], body["times"]) == ("translate", "english", "readout")


def test_the_llm_is_shown_translations_before_it_translates(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.listener.model.config.audio_config, "vocab_size", 51865)
    with running(server.listener) as multilingual:
        asked: list[Any] = []
        submit = multilingual.app.state.scheduler.submit
        monkeypatch.setattr(multilingual.app.state.scheduler, "submit", lambda job: asked.append(job) or submit(job))
        body = post(multilingual, spoken(6), "translations", response_format="verbose_json").json()
    assert (body["language"], body["times"]) == ("english", "pieces")
    (job,) = asked
    *shown, last = job.messages
    assert [message["role"] for message in shown] == ["user", "assistant"] * 3
    assert not job.readout and all(message["parts"][0].startswith(last["parts"][0]) for message in shown[::2])


class Hears:
    """A recogniser that writes the language in which it listens."""

    def __init__(self, multilingual: bool) -> None:
        self.multilingual = multilingual

    def supports_language(self, language: str) -> bool:
        return self.multilingual or language == "en"

    def transcribe_clip(self, clip: np.ndarray, language: str | None) -> str:
        return f"heard {language}"


@pytest.mark.parametrize("multilingual, unsaid", [(True, "None"), (False, "en")])
def test_a_multilingual_recogniser_finds_the_language_itself(
    server: Running, monkeypatch: pytest.MonkeyPatch, multilingual: bool, unsaid: str
) -> None:
    monkeypatch.setattr(SharedRecogniser, "available", True)
    with running(server.listener) as each:
        shared = next(route for route in each.app.routes if getattr(route, "path", "") == "/health").endpoint.__self__
        shared.recogniser._loaded = Hears(multilingual)
        assert post(each, spoken(), model="recogniser").json()["text"] == f"heard {unsaid}"
        assert post(each, spoken(), model="recogniser", language="en").json()["text"] == "heard en"
        french = post(each, spoken(), model="recogniser", language="fr")
        assert french.json()["text"] == "heard fr" if multilingual else french.status_code == 400
