"""The cascade gives the recogniser's words to the same LLM; peers and the judge are asked over OpenAI's API."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from support.speech_copies import Parrot
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from blsp.data.manifest import Manifest, Utterance
from blsp.evaluation.answers import NO_SPEECH, Answer, answer_log
from blsp.evaluation.endpoints import Endpoint, PeerError, parse_endpoint, parse_peers, read_mark
from blsp.evaluation.judge import Evaluation, judge
from blsp.evaluation.recogniser import Recogniser, RecogniserError, recogniser_of
from blsp.evaluation.tasks import Suite
from blsp.weights.embedded import resolve_weights


class Unwritten:
    """A speech recognition pipeline without a tokenizer."""

    tokenizer = ()
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2))


@pytest.fixture
def chat(suite: Suite) -> Suite:
    return Suite("chat", tuple(task for task in suite.tasks if task.name in ("chat", "asr")))


def test_the_cascade_is_the_text_route_on_the_recognisers_words(
    evaluation_of: Callable[..., Evaluation], chat: Suite
) -> None:
    asr, talk = judge(evaluation_of(routes=("text", "cascade"), recogniser=Parrot()), chat).tasks
    text, cascade = talk.answers["text"], talk.answers["cascade"]
    assert all(cascade[name] == text[name] for name in text if name not in ("en/0", "en/1"))
    assert cascade["en/0"].text != text["en/0"].text and cascade["en/0"].transcript == "misheard"
    assert cascade["en/1"].finish == NO_SPEECH  # nothing was written: there is nothing to ask about
    assert asr.scores["recogniser"].figures["wer"].point() > 0


def test_a_language_that_nobody_hears_is_not_available(evaluation_of: Callable[..., Evaluation], chat: Suite) -> None:
    french = Suite("fr", tuple(replace(task, language="fr") for task in chat.tasks))
    results = judge(evaluation_of(routes=("text", "cascade", "speech"), recogniser=Parrot()), french)
    tasks = results.to_json()["tasks"]["chat"]
    assert tasks["speech"]["n"] == tasks["cascade"]["n"] == 0 and "English only" in tasks["speech"]["unavailable"]
    assert tasks["text"]["n"] == 0 and "nothing to compare" in tasks["text"]["unavailable"]


@pytest.mark.parametrize("routes", [("text",), ("text", "speech", "cascade")])
def test_text_is_asked_alone_or_beside_a_recogniser_of_the_language(
    evaluation_of: Callable[..., Evaluation], chat: Suite, monkeypatch: pytest.MonkeyPatch, routes: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Parrot, "supports_language", lambda self, language: True)
    french = Suite("fr", tuple(replace(task, language="fr") for task in chat.tasks))
    tasks = judge(evaluation_of(routes=routes, recogniser=Parrot()), french).to_json()["tasks"]["chat"]
    assert tasks["text"]["n"] == 7 and tasks.get("cascade", {"n": 7})["n"] == 7


def test_the_default_recogniser_is_the_models_own_whisper() -> None:
    assert recogniser_of("embedded:whisper-tiny.en") == "embedded:whisper-tiny.en:ct2"
    assert recogniser_of("openai/whisper-small") == "openai/whisper-small"


@pytest.mark.embedded
def test_faster_whisper_on_real_speech(tmp_path: Path) -> None:
    rows = list(Manifest(Path(__file__).parents[1] / "clips" / "clips.jsonl"))
    spoken = [row for row in rows if row.text]
    recogniser = Recogniser("embedded:whisper-tiny.en:ct2", "int8")
    with answer_log(tmp_path / "log.jsonl", "x") as log:
        written = recogniser.transcribe(spoken, log)
        assert recogniser.transcribe(spoken, log) == written
    assert not recogniser.supports_language("fr")
    shared = [set(a.lower().split()) & set(b.text.lower().split()) for a, b in zip(written, spoken, strict=True)]
    assert sum(map(bool, shared)) >= len(spoken) / 2


@pytest.mark.parametrize(
    "device, place",
    [("cpu", {"device": "cpu"}), ("mps", {"device": "cpu"}), ("cuda:1", {"device": "cuda", "device_index": 1})],
)
def test_the_recogniser_is_loaded_where_the_llm_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, place: dict[str, Any]
) -> None:
    """CTranslate2 knows CUDA and the CPU only; transformers' pipeline takes every device."""
    asked: dict[str, Any] = {}

    def stub(folder: str, **options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(model=SimpleNamespace(is_multilingual=False))

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=stub))
    (tmp_path / "model.bin").touch()
    recogniser = Recogniser(str(tmp_path), "int8", torch.device(device))
    assert {name: asked[name] for name in asked if name.startswith("device")} == place
    assert (recogniser.workers == 1) == (device == "cuda:1" or os.cpu_count() == 1)
    (tmp_path / "model.bin").unlink()
    monkeypatch.setattr("transformers.pipeline", lambda task, **options: asked.update(options) or Unwritten())
    with pytest.raises(RecogniserError, match="no tokenizer"):
        Recogniser(str(tmp_path), "int8", torch.device(device))
    assert asked["device"] == torch.device(device)


@pytest.fixture
def whisper_stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a recogniser whose weights faster-whisper does not read."""
    heard = SimpleNamespace(transcribe=lambda *_, **__: ((), None), model=SimpleNamespace(is_multilingual=False))
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=lambda *_, **__: heard))
    (tmp_path / "model.bin").write_bytes(b"weights")
    return tmp_path


def test_a_changed_recogniser_has_another_mark(whisper_stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(device: str = "cpu", compute: str = "int8") -> str:
        return Recogniser(str(whisper_stub), compute, torch.device(device)).mark

    first = mark()
    assert mark() == mark("mps") == first  # CTranslate2 takes the CPU instead
    changed = {mark("cuda"), mark(compute="float32")}
    monkeypatch.setattr("blsp.evaluation.recogniser.version", lambda name: "0.0")
    changed.add(mark())
    os.utime(whisper_stub / "model.bin", (0, 0))
    changed.add(mark())
    (whisper_stub / "model.bin").write_bytes(b"others")
    os.utime(whisper_stub / "model.bin", (0, 0))
    changed.add(mark())
    assert len(changed - {first}) == 5


def test_the_number_format_that_was_chosen_is_the_one_that_is_stored(
    whisper_stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the transcripts of a resumed run could be of two formats."""
    chosen = []
    for kind in ("int8", "float32"):
        monkeypatch.setattr("blsp.evaluation.recogniser._faster_type", lambda *_, kind=kind: kind)
        chosen.append(Recogniser(str(whisper_stub), "auto"))
    assert [recogniser.compute for recogniser in chosen] == ["int8", "float32"]
    assert chosen[0].mark == Recogniser(str(whisper_stub), "int8").mark != chosen[1].mark


def test_the_cascades_recogniser_gets_the_llms_device(
    evaluation_of: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blsp.evaluation.judge.Recogniser", lambda name, compute, device: device)
    assert evaluation_of(asr="any").load_recogniser() == torch.device("cpu")


@pytest.mark.embedded
def test_a_recogniser_leaves_the_llm_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Recogniser("embedded:whisper-tiny.en:ct2", "int8")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_whisper_that_cannot_write_is_refused_by_name(tiny_whisper: str) -> None:
    with pytest.raises(RecogniserError, match="no tokenizer"):
        Recogniser(tiny_whisper, "int8")


@pytest.mark.embedded
def test_a_whisper_in_transformers_format_recognises_too(tmp_path: Path, corpus: Path) -> None:
    """Random weights write nonsense, the same twice; what is tested is the way there and back."""
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 16}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 16, "vocab_size": 51864}
    ids = {"decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256, "bos_token_id": 50256}
    model = WhisperForConditionalGeneration(WhisperConfig(d_model=16, **sizes, **decoder, **ids))
    options = {"is_multilingual": False, "no_timestamps_token_id": 50362, "max_new_tokens": 8}
    model.generation_config = GenerationConfig(**ids, **options)
    model.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    words = Path(resolve_weights("embedded:whisper-tiny.en:ct2"), "tokenizer.json")
    WhisperTokenizer(tokenizer_file=str(words)).save_pretrained(tmp_path / "whisper")
    recogniser = Recogniser(str(tmp_path / "whisper"))
    rows = list(Manifest(corpus / "speech.jsonl"))[:2]
    written = []
    for name in "ab":
        with answer_log(tmp_path / f"{name}.jsonl", "x") as log:
            written.append(recogniser.transcribe(rows, log))
    assert written[0] == written[1] and all(isinstance(text, str) for text in written[0])
    assert recogniser.compute == "float32"
    assert not recogniser.supports_language("fr")


# --- over HTTP ----------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers every chat completion; remembers what it was sent."""

    requests: list[dict[str, Any]]
    reply: str

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        choice = {"message": {"role": "assistant", "content": self.reply}, "finish_reason": "stop"}
        answer = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[Callable[[str], tuple[str, list[dict[str, Any]]]]]:
    """`server(reply)` is a URL and the list of requests that come there."""
    running: list[ThreadingHTTPServer] = []

    def start(reply: str) -> tuple[str, list[dict[str, Any]]]:
        handler = type("Handler", (Server,), {"requests": [], "reply": reply})
        running.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/v1", handler.requests

    yield start
    for running_server in running:
        running_server.shutdown()
        running_server.server_close()


def test_a_peer_hears_the_clip_and_gets_a_column(
    evaluation_of: Callable[..., Evaluation], suite: Suite, server: Any
) -> None:
    url, requests = server("A turn on the days.")
    only = Suite("peer", tuple(task for task in suite.tasks if task.name in ("slu", "chat", "no-speech")))
    results = judge(evaluation_of(routes=("text",), peers=(Endpoint("org/big-ears", url),)), only)
    slu, chat = (results.to_json()["tasks"][name]["big-ears"] for name in ("slu", "chat"))
    assert "accuracy" not in slu and slu["accuracy_generated"] == pytest.approx(1 / 7)
    assert chat["n"] == 7 and "chrf" in chat
    silence = results.to_json()["tasks"]["no-speech"]["big-ears"]
    assert silence["n"] == 0 and "set sentence" in silence["unavailable"]
    sent = next(request for request in requests if "Talk." in json.dumps(request))
    audio, words = sent["messages"][0]["content"]  # the task is speech-first
    assert words == {"type": "text", "text": "Talk."} and sent["model"] == "org/big-ears"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])))
    assert rate == 16_000 and len(samples) > 3000
    count = len(requests)
    judge(evaluation_of(routes=("text",), peers=(Endpoint("org/big-ears", url),)), only)
    assert len(requests) == count  # answers are kept


def test_a_judge_rates_open_answers_only(evaluation_of: Callable[..., Evaluation], suite: Suite, server: Any) -> None:
    url, requests = server("I would say 7 of 10.")
    only = Suite("rated", tuple(task for task in suite.tasks if task.name in ("sqa", "chat")))
    results = judge(evaluation_of(rater=Endpoint("", url)), only)
    tasks = results.to_json()["tasks"]
    assert tasks["chat"]["speech"]["judge"] == 7.0 and "judge" not in tasks["sqa"]["speech"]
    assert len(requests) == 2 * 7 and "model" not in requests[0]
    assert "Rating:" in requests[0]["messages"][0]["content"]


def test_marks_are_compared_over_the_questions_that_have_one_on_every_route(
    evaluation_of: Callable[..., Evaluation], suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge gives 3 to one route's first answer and to the other's no mark; all else is 7."""
    calls: list[int] = []

    def rate(rater: Endpoint, rows: Sequence[Utterance], *_: Any) -> dict[str, float]:
        calls.append(len(rows))
        return {row.id: 7.0 for row in rows} | {rows[0].id: 3.0 if len(calls) == 1 else float("nan")}

    monkeypatch.setattr("blsp.evaluation.judge.rate", rate)
    only = Suite("rated", tuple(task for task in suite.tasks if task.name == "chat"))
    routes = judge(evaluation_of(rater=Endpoint("", "http://x/v1")), only).to_json()["tasks"]["chat"]
    assert {route: (found["judge"], found["unmarked"]) for route, found in routes.items()} == {
        "text": (7.0, 1),
        "speech": (7.0, 1),
    }


def test_endpoints_and_marks() -> None:
    assert parse_endpoint("a/b@http://x:1/v1") == Endpoint("a/b", "http://x:1/v1")
    assert parse_endpoint("http://x:1/v1").name == "x:1"
    with pytest.raises(PeerError, match="MODEL@URL"):
        parse_endpoint("ultravox")
    assert [read_mark(text) for text in ("10", "Rating: 8/10", "100")][:2] == [10.0, 8.0]
    assert read_mark("no idea") != read_mark("no idea")


@pytest.mark.parametrize("names", [["a@http://x/v1", "b/a@http://y/v1"], ["speech@http://x/v1"]])
def test_each_peer_needs_a_column_of_its_own(names: list[str]) -> None:
    with pytest.raises(PeerError, match="its column would have the name"):
        parse_peers(names)


def test_an_answer_survives_its_log(tmp_path: Path) -> None:
    answer = Answer("hi", "stop", (1, 2), (-0.1234567890123456789, -2.0), "hey")
    with answer_log(tmp_path / "a.jsonl", "x") as log:
        log.write({"q": answer})
    assert answer_log(tmp_path / "a.jsonl", "x").records == {"q": answer}
    assert answer_log(tmp_path / "a.jsonl", "y").records == {}
