"""`blsp transcribe`: one line of JSON for each file, in order; by read-out or by repetition; resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import speech_like

from blsp import cli
from blsp.data.audio import load_audio, write_wav
from blsp.data.jobs import JobError
from blsp.inference import transcribe as command
from blsp.inference.pauses import cut_at_pauses
from blsp.llm.instructions import instruction_for
from blsp.model.hypotheses import BEAM
from blsp.settings import SettingsError, TranscribeSettings


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Four recordings, one of them silent, and two names that are none."""
    for number, seconds in enumerate((0.9, 0.5, 1.4)):
        write_wav(tmp_path / f"{number}.wav", speech_like(seconds, number))
    write_wav(tmp_path / "silence.wav", np.zeros(8000, dtype=np.float32))
    (tmp_path / "broken.mp3").write_text("no audio")
    return [str(tmp_path / name) for name in ("0.wav", "absent.wav", "1.wav", "broken.mp3", "silence.wav", "2.wav")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, listener_of, files: list[str], tmp_path: Path):
    """Run the command with a tiny model of some adapter; the rows that it wrote."""

    def transcribe(adapter: str = "grounded", out: str = "out.jsonl", **changes: Any) -> list[dict[str, str]]:
        monkeypatch.setattr(command, "load", lambda *_, **__: listener_of(adapter))
        flags = {"files": tuple(files), "model": "tiny", "out": tmp_path / out, "batch_size": 2}
        command.transcribe(TranscribeSettings(**flags | changes))
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    return transcribe


def test_a_grounded_adapter_reads_out(run, files: list[str], listener_of) -> None:
    listener = listener_of("grounded")
    rows = run(readout=True)
    assert [row["audio"] for row in rows] == [files[i] for i in (0, 2, 4, 5)]
    assert all(row.keys() == {"audio", "text"} for row in rows)
    for row in rows:
        clips = listener.embed_audio([load_audio(row["audio"])])
        assert row["text"] == listener.readout(clips)[0] == listener.transcribe(row["audio"], method="readout")
    assert rows[0]["text"]
    assert rows[2]["text"] == ""


def test_without_a_flag_the_llm_helps_to_choose_among_the_hypotheses(run, listener_of) -> None:
    listener = listener_of("grounded")
    rows = run()
    for row in rows:
        states = listener.encode([load_audio(row["audio"])])
        (clip,) = listener.model.listen(states, BEAM)
        possible = {listener.tokenizer.decode(list(item.tokens)).strip() for item in clip.hypotheses}
        assert row["text"] == listener.transcribe(row["audio"])
        assert row["text"] in (possible if clip.speech else {""})
    assert rows[2]["text"] == ""


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_the_llm_repeats_for_other_adapters_and_on_request(run, adapter: str, listener_of) -> None:
    listener = listener_of(adapter)
    for row in run(adapter, repeat=adapter == "grounded", max_new_tokens=7):
        answer = listener.answer(row["audio"], instruction_for("repeat"), max_new_tokens=7)
        assert row["text"] == ("" if answer == listener.model.config.no_speech_sentence else answer)


def test_read_out_of_an_adapter_that_has_none_is_refused(run) -> None:
    with pytest.raises(ValueError, match="'conv' does not read out"):
        run("conv", readout=True)


def test_broken_files_are_named_and_the_job_goes_on(run, files: list[str], tmp_path: Path, capsys) -> None:
    run()
    told = capsys.readouterr()
    assert files[1] in told.err
    assert files[3] in told.err
    assert "4 of 6 files transcribed; 2 skipped" in told.out
    skipped = [json.loads(line) for line in (tmp_path / "out.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [row["audio"] for row in skipped] == [files[1], files[3]]


@pytest.mark.parametrize("out", [None, "out.jsonl", "out.txt"])
def test_only_broken_files_end_with_an_error(
    run, monkeypatch: pytest.MonkeyPatch, listener_of, files: list[str], tmp_path: Path, out: str | None
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: listener_of("grounded"))
    broken = (files[1], files[3]) if out != "out.txt" else (files[1],)
    with pytest.raises(JobError, match=r"0 of 2 files transcribed; 2 skipped|none of the \d recordings could be read"):
        command.transcribe(TranscribeSettings(files=broken, model="tiny", out=out and tmp_path / out))


def test_killed_anywhere_it_goes_on_to_the_same_bytes(run, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    for length in range(0, len(whole) + 1, 29):
        out.write_bytes(whole[:length])
        run()
        assert out.read_bytes() == whole


def test_to_the_screen(monkeypatch: pytest.MonkeyPatch, listener_of, files: list[str], capsys) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: listener_of("grounded"))
    command.transcribe(TranscribeSettings(files=(files[0], files[1], files[5]), model="tiny"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["audio"] for row in rows] == [files[0], files[5]]


def test_subtitles_of_several_files_go_to_a_folder_and_other_formats_follow_without_the_model(
    run, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener_of
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: listener_of("grounded"))
    flags = {"files": tuple(files), "model": "tiny", "out": tmp_path / "subtitles"}
    command.transcribe(TranscribeSettings(**flags, format="srt"))
    written = {path.name: path.read_text() for path in (tmp_path / "subtitles").glob("*.srt")}
    assert written.keys() == {"0.srt", "1.srt", "2.srt", "silence.srt"}
    assert written["0.srt"].startswith("1\n00:00:00,") and " --> " in written["0.srt"]
    assert written["silence.srt"] == ""
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("nothing is left to transcribe"))
    for kind, beginning in (("vtt", "WEBVTT\n\n00:00:00."), ("txt", ""), ("json", '{\n  "audio": ')):
        command.transcribe(TranscribeSettings(**flags, format=kind))
        assert (tmp_path / "subtitles" / f"0.{kind}").read_text().startswith(beginning)
    row = json.loads((tmp_path / "subtitles" / "0.json").read_text())
    assert row["times"] == "readout" and row["segments"][0]["words"][0].keys() == {"word", "start", "end"}
    assert (tmp_path / "subtitles" / "0.txt").read_text() == row["text"] + "\n"


def test_the_name_of_the_output_says_the_format(run, files: list[str], tmp_path: Path, listener_of) -> None:
    for name in ("0.vtt", "1.VTT"):
        with pytest.raises(json.JSONDecodeError):  # `run` reads lines of JSON
            run(files=(files[0],), out=name)
        assert (tmp_path / name).read_text().startswith("WEBVTT")
    assert run(timestamps=True)[0].keys() == {"audio", "text", "seconds", "times", "segments"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"files": ("a/x.wav", "b/x.wav"), "format": "srt", "out": Path("out")}, "both would be written to x.srt"),
        ({"files": ("a.wav", "b.wav"), "format": "srt"}, "needs --out FOLDER"),
        ({"files": ("a.wav",), "out": Path(".")}, "is a folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_any_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TranscribeSettings(**flags)


def test_progress_is_counted_in_seconds_of_speech(run, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(command.tqdm):
        def __init__(self, **options: Any) -> None:
            bars.append(self)
            super().__init__(**options | {"disable": False})

    monkeypatch.setattr(command, "tqdm", Bar)
    run()
    (bar,) = bars
    assert bar.unit == "s" and bar.total == 3.3  # 0.9 + 1.4 + 0.5 + 0.5 s
    assert bar.n == pytest.approx(3.3, abs=0.05)


def test_a_long_recording_is_heard_piece_by_piece(listener_of) -> None:
    listener = listener_of("grounded")
    audio = speech_like(64, 3)
    expected = [listener.transcribe(piece) for piece in cut_at_pauses(audio)]
    assert len(expected) > 6
    assert listener.transcribe(audio, vad="none") == " ".join(expected)


def test_from_the_command_line(tiny_models_folder: Path, files: list[str], tmp_path: Path, capsys) -> None:
    from support.tiny_models import tiny_blsp

    from blsp.distributed import find_runtime
    from blsp.model.checkpoint import save_adapter

    pair = tiny_blsp(tiny_models_folder, adapter="grounded", runtime=find_runtime("cpu", "float32"))
    save_adapter(*pair, tmp_path / "adapter")
    assert cli.main(["transcribe", *files, "--model", str(tmp_path / "adapter")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
