"""`blsp generate`: all rows answered in order, resumed after any kill, unreadable clips listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_models import speech_like

from blsp import cli
from blsp.data.audio import load_audio, write_wav
from blsp.data.jobs import JobError
from blsp.data.manifest import Manifest, write_manifest
from blsp.inference import generate as batch
from blsp.inference.listener import Listener, Question
from blsp.settings import GenerateSettings

Generate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Eleven rows: speech, text, a cut, an instruction of its own, silence, and three that cannot be read."""
    for number, seconds in enumerate((0.9, 0.5, 2.0, 1.2, 0.7)):
        write_wav(tmp_path / f"{number}.wav", speech_like(seconds, number))
    write_wav(tmp_path / "silence.wav", speech_like(1.0) * 0)
    (tmp_path / "broken.wav").write_bytes(b"RIFF no wave")
    rows: list[dict[str, Any]] = [
        {"id": "speech", "audio": "0.wav", "text": "hello"},
        {"id": "absent", "audio": "absent.wav", "text": ""},
        {"id": "written", "audio": "", "text": "what is the capital of france"},
        {"id": "own", "audio": "1.wav", "text": "", "instruction": "say it again"},
        {"id": "cut", "audio": "2.wav", "text": "", "start": 0.5, "duration": 0.75, "speaker": "s", "more": [1]},
        {"id": "broken", "audio": "broken.wav", "text": ""},
        {"id": "silent", "audio": "silence.wav", "text": ""},
        {"id": "past", "audio": "0.wav", "text": "", "start": 100.0},
        {"id": "no-audio", "text": "how many days are in a week", "instruction": ""},
        {"id": "é", "audio": "3.wav", "text": "日本"},
        {"id": "last", "audio": "4.wav", "text": ""},
    ]
    write_manifest(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, listener_of, manifest: Path) -> Generate:
    """Run the command on the manifest with the tiny model; the rows that it wrote."""
    monkeypatch.setattr(batch, "load", lambda *_, **__: listener_of("grounded"))

    def run(out: str = "out.jsonl", **changes: Any) -> list[dict[str, Any]]:
        path = manifest.parent / out
        flags = {"model": "tiny", "instruction": "repeat", "max_new_tokens": 6, "batch_size": 1} | changes
        batch.generate(GenerateSettings(manifest=str(manifest), out=path, **flags))
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


def test_rows_come_back_in_order_with_their_responses(generate: Generate, manifest: Path) -> None:
    rows = generate()
    given = {row["id"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    assert [row["id"] for row in rows] == [id for id in given if id not in ("absent", "broken", "past")]
    for row in rows:
        assert isinstance(row.pop("response"), str)
        assert row == {"audio": ""} | given[row["id"]]


def test_each_row_is_answered_as_the_listener_answers_it(generate: Generate, manifest: Path, listener_of) -> None:
    listener: Listener = listener_of("grounded")
    responses = {row["id"]: row["response"] for row in generate(order="instruction-first")}
    folder = manifest.parent

    def answer(audio: str, instruction: str = "repeat", **cut: float) -> str:
        return listener.answer(load_audio(folder / audio, **cut), instruction, max_new_tokens=6)

    assert responses["speech"] == answer("0.wav")
    assert responses["own"] == answer("1.wav", "say it again")
    assert responses["cut"] == answer("2.wav", start=0.5, duration=0.75)
    assert responses["silent"] == listener.model.config.no_speech_sentence
    from dataclasses import replace

    decoding = replace(listener.decoding, max_new_tokens=6)
    written = [
        Question(text="what is the capital of france", instruction="repeat"),
        Question(text="how many days are in a week"),
    ]
    assert [responses["written"], responses["no-audio"]] == listener.generate(written, decoding=decoding)


def test_what_cannot_be_heard_is_listed(generate: Generate, manifest: Path, capsys) -> None:
    generate()
    skipped = [json.loads(line) for line in Path(f"{manifest.parent}/out.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in skipped] == ["absent", "broken", "past"]
    assert all(row["reason"] for row in skipped)
    assert "8 of 11 rows answered; 3 skipped" in capsys.readouterr().out


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_killed_anywhere_it_goes_on_to_the_same_bytes(generate: Generate, manifest: Path, data: st.DataObject) -> None:
    out, skips = manifest.parent / "out.jsonl", manifest.parent / "out.jsonl.skipped.jsonl"
    if not out.exists():
        generate(temperature=0.8)
        manifest.with_name("whole").write_bytes(out.read_bytes())
        manifest.with_name("whole.skips").write_bytes(skips.read_bytes())
    whole, whole_skips = (manifest.with_name(name).read_bytes() for name in ("whole", "whole.skips"))
    out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    # a chunk's skips are written before its rows: all skips before the last row written must be in the file
    written = [json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[:-1]]
    least = {"absent": "written", "broken": "silent", "past": "no-audio"}
    known = sum(
        len(line) + 1 for line, after in zip(whole_skips.split(b"\n"), least.values(), strict=False) if after in written
    )
    skips.write_bytes(whole_skips[: data.draw(st.integers(known, len(whole_skips)))])
    generate(temperature=0.8)
    assert out.read_bytes() == whole
    assert skips.read_bytes() == whole_skips


def test_a_finished_job_loads_no_model(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = generate()
    monkeypatch.setattr(batch, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert generate() == rows


def test_batches_change_no_answer(generate: Generate) -> None:
    assert generate("one.jsonl") == generate("many.jsonl", batch_size=8)


def test_samples_differ_from_row_to_row_and_are_drawn_again(generate: Generate, manifest: Path) -> None:
    write_manifest(manifest, [{"id": str(n), "audio": "", "text": "hello"} for n in range(9)])
    rows = generate(temperature=1.5)
    assert len({row["response"] for row in rows}) > 5
    assert generate("again.jsonl", temperature=1.5, batch_size=3) == rows
    assert generate("other.jsonl", temperature=1.5, seed=100) != rows


def test_limit_takes_the_first_rows(generate: Generate) -> None:
    assert [row["id"] for row in generate(limit=3)] == ["speech", "written"]


def test_other_work_is_not_gone_on_with(generate: Generate, manifest: Path) -> None:
    generate(limit=4)
    with pytest.raises(JobError, match="instruction was 'repeat', is 'translate'"):
        generate(instruction="translate")
    manifest.with_name("strange.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(JobError, match="choose another --out"):
        generate("strange.jsonl")
    rows = [row.to_json() for row in Manifest(manifest)]
    write_manifest(manifest, [rows[0] | {"instruction": "count"}, *rows[1:]])
    with pytest.raises(JobError, match="'speech' was answered when its instruction was"):
        generate()
    write_manifest(manifest, [{"id": "new", "text": "hello"}])
    with pytest.raises(JobError, match="holds id 'speech'"):
        generate()


def test_nothing_asked_is_skipped(generate: Generate, manifest: Path) -> None:
    write_manifest(
        manifest, [{"id": "a", "text": "", "instruction": ""}, {"id": "b", "text": "", "instruction": "sing"}]
    )
    assert [row["id"] for row in generate()] == ["b"]


def test_from_the_command_line(tiny_models_folder: Path, manifest: Path, capsys) -> None:
    from support.tiny_models import tiny_blsp

    from blsp.distributed import find_runtime
    from blsp.model.checkpoint import save_adapter

    save_adapter(*tiny_blsp(tiny_models_folder, runtime=find_runtime("cpu", "float32")), manifest.parent / "adapter")
    out = manifest.parent / "answers.jsonl"
    command = ["generate", "--model", str(manifest.parent / "adapter"), "--manifest", str(manifest), "--out", str(out)]
    assert cli.main([*command, "--max-new-tokens", "3"]) == 0
    assert len(out.read_text().splitlines()) == 8
    assert cli.main([*command, "--max-new-tokens", "4"]) == 1
    assert "max_new_tokens was 3, is 4" in capsys.readouterr().err


def test_nothing_answered_is_an_error_and_the_llm_is_not_asked(
    generate: Generate, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(manifest, [{"id": name, "audio": f"{name}.wav", "text": ""} for name in ("broken", "absent")])
    monkeypatch.setattr(Listener, "generate", None)
    for _ in range(2):
        with pytest.raises(JobError, match=r"0 of 2 rows answered; 2 skipped, see .*out.jsonl.skipped.jsonl"):
            generate()
