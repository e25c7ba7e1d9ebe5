"""The terminal chat: the meaning of a line, the output, and that no mistake ends the chat."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import speech_like

from blsp.data.audio import write_wav
from blsp.inference import chat as command
from blsp.inference.chat import Link, converse, parse
from blsp.inference.conversation import Conversation
from blsp.settings import ChatSettings


@pytest.fixture
def talk(listener_of) -> Conversation:
    listener = listener_of("grounded")
    return Conversation(listener, decoding=replace(listener.decoding, max_new_tokens=6))


def _screen(talk: Conversation, *lines: str) -> list[str]:
    """What is shown for some lines."""
    shown: list[str] = []
    converse(talk, lines, shown.append)
    return "".join(shown).splitlines()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("hello, how's it going?", ["hello, how's it going?"]),
        ("a.wav", [Path("a.wav")]),
        ("What is said in a.wav?", ["What is said in", Path("a.wav"), "?"]),
        ("x.OPUS and y.mp3 differ", [Path("x.OPUS"), "and", Path("y.mp3"), "differ"]),
        ('"my clip.wav" please', [Path("my clip.wav"), "please"]),
        ("'my clip.wav'", [Path("my clip.wav")]),
        (r"/tmp/my\ clip.flac", [Path("/tmp/my clip.flac")]),
        ("file:///tmp/my%20clip.ogg", [Path("/tmp/my clip.ogg")]),
        ('say "hello world" now', ['say "hello world" now']),
        ("~/a.wav", [Path.home() / "a.wav"]),
        ("~nobody-here/a.wav", [Path("~nobody-here/a.wav")]),
        ("in https://example.org/a.wav?", ["in", Link("https://example.org/a.wav"), "?"]),
        ("see https://example.org/wav", ["see https://example.org/wav"]),
        ("   ", []),
    ],
)
def test_lines_are_text_and_recordings(line: str, parts: list[str | Path | Link]) -> None:
    assert parse(line) == parts


@given(line=st.text())
def test_no_text_is_lost(line: str) -> None:
    kept = "".join(part for part in parse(line) if isinstance(part, str))
    if all(isinstance(part, str) for part in parse(line)):
        assert kept == line.strip()


def test_a_talk_with_recordings(talk: Conversation, tmp_path: Path) -> None:
    write_wav(tmp_path / "a clip.wav", speech_like(1.0))
    lines = _screen(talk, f'repeat: "{tmp_path}/a clip.wav"', "and now?")
    listener = talk.listener
    readout = listener.readout(listener.embed_audio([tmp_path / "a clip.wav"]))[0]
    assert lines[0] == f"[heard: {readout}]"
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_a_recording_behind_a_url_is_heard(talk: Conversation, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", speech_like(1.0))
    fsspec.filesystem("memory").pipe("/chat/a.wav", (tmp_path / "a.wav").read_bytes())
    by_url, by_path = (_screen(talk, f"{name}", "/reset")[0] for name in ("memory://chat/a.wav", tmp_path / "a.wav"))
    assert by_url == by_path and by_url.startswith("[heard: ")
    assert "memory://chat/absent.wav" in _screen(talk, "memory://chat/absent.wav")[0]
    assert "nowhere://a.wav" in _screen(talk, "nowhere://a.wav")[0]


def test_mistakes_do_not_end_it(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_text("no audio")
    lines = _screen(talk, "~no-one/a.wav", f"{tmp_path}/broken.wav please", "/what", "hello", "/quit", "never")
    assert "~no-one/a.wav: no such file" in lines[0]
    assert "broken.wav" in lines[1]
    assert lines[2] == "There is no /what; /help says what there is."
    assert len(talk.messages) == 2


def test_commands(talk: Conversation) -> None:
    lines = _screen(talk, "hello", "/reset", "/HELP", "")
    assert "A new conversation." in lines
    assert any("/quit" in line for line in lines)
    assert talk.messages == []


def test_an_interrupt_stops_the_answer_alone(talk: Conversation) -> None:
    def interrupted(text: str) -> None:
        if len(talk.messages) == 0 and text != " …\n":
            raise KeyboardInterrupt

    shown: list[str] = []

    def say(text: str) -> None:
        shown.append(text)
        interrupted(text)

    converse(talk, ["hello", "again"], say)
    assert " …\n" in shown
    assert len(talk.messages) == 4


def test_from_the_settings(monkeypatch: pytest.MonkeyPatch, listener_of, capsys) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: listener_of("conv"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
    command.chat(ChatSettings(model="tiny", system="Be brief.", max_new_tokens=4))
    assert command.PROMPT in capsys.readouterr().out


def test_the_end_of_the_input_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed() -> Iterator[str]:
        yield from command.typed_lines()

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert list(typed()) == ["one", "two"]
