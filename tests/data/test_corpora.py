"""`blsp prepare`: each published layout gives its rows, and the message about a wrong root names what is missing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import shard_copies  # noqa: F401 (adds to COPIES)
from support.corpus_copies import COPIES, common_voice, fleurs, folder, gigaspeech, librispeech, must_c, tone
from test_manifest import damage

from blsp import cli
from blsp.data import prepare as preparation
from blsp.data.addresses import read_address
from blsp.data.audio import is_silent, load_audio, write_wav
from blsp.data.clips import load_clip
from blsp.data.corpora import no_speech
from blsp.data.corpora.reading import Corpus, CorpusError, Dropped, Lookup, ReadRequest, iso, make_row
from blsp.data.corpora.recognition import read_json_array
from blsp.data.files import read_rows
from blsp.data.jobs import Job, JobError, Parts
from blsp.data.manifest import Manifest, ManifestError, Utterance, write_manifest
from blsp.data.prepare import prepare
from blsp.settings import PrepareSettings


def settings_of(corpus: str, root: Path, out: Path, flags: dict[str, Any]) -> PrepareSettings:
    given = {"root": str(flags.get("root", root))} | {k: v for k, v in flags.items() if k != "root"}
    return PrepareSettings(corpus=corpus, out=out, **given)  # type: ignore[arg-type]


def make_copy(name: str, root: Path, out: Path, **more: Any) -> tuple[PrepareSettings, list[Any]]:
    """The settings that read a tiny copy of the corpus, and the rows expected."""
    corpus, build = COPIES[name]
    flags, expected = build(root)
    return settings_of(corpus, root, out, flags | more), expected


def skipped(out: Path) -> dict[str, str]:
    path = Path(f"{out}.skipped.jsonl")
    return {row["id"]: row["reason"] for _, row in read_rows(path)} if path.exists() else {}


def test_the_page_on_data_lists_every_corpus() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.split("| CORPUS |")[1].split("\n\n")[0].splitlines()[2:]
    listed = [name.strip("` ") for line in table for name in line.split("|")[1].split(",")]
    assert sorted(listed) == sorted(preparation.READERS)


# --- every layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPIES)
def test_a_published_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, texts, times and further fields as expected; every clip can be read; nothing else is written."""
    out = tmp_path / "out" / "m.jsonl"
    settings, expected = make_copy(name, tmp_path / "corpus", out, check_audio=True)
    prepare(settings)
    found = list(Manifest(out))
    assert [(row.id, row.text) for row in found] == [(id, text) for id, text, _ in expected]
    for row, (_, _, fields) in zip(found, expected, strict=True):
        values = row.to_json()
        assert {name: values.get(name) for name in fields} == fields
        assert len(load_clip(row)) > 0
        assert Path(row.audio).is_absolute()
    assert f"{len(expected)} rows" in capsys.readouterr().out
    lists = ["m.jsonl.skipped.jsonl"] if skipped(out) else []
    assert sorted(os.listdir(out.parent)) == sorted(["m.jsonl", "m.jsonl.idx", "m.jsonl.meta.json", *lists])


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("gigaspeech", {"tags only": 4}),
        ("tedlium3", {"tags only": 1}),
        ("common-voice", {"no transcript": 1}),
        ("must-c", {"tags only": 1}),
        ("snips lights", {"no intent": 1}),
        ("snips audio", {"no transcript": 1}),
        ("folder", {"no transcript": 2}),
        ("kaldi", {"no segment": 1, "no length": 1, "no audio file": 2, "no transcript": 1}),
        ("lhotse cuts", {"no single recording": 1, "unfit recording": 1}),
        ("lhotse recordings", {"no recording": 1, "unfit recording": 1}),
        ("csv", {"broken row": 1}),
        ("csv semicolons", {"no time": 1}),
        ("tsv", {"broken row": 1}),
        ("jsonl", {"no audio": 1, "broken row": 1}),
        ("nemo", {"no transcript": 1}),
        ("nemo tarred", {"no audio": 1}),
        ("webdataset", {"no audio": 1}),
        ("shar", {"no audio": 1}),
    ],
)
def test_what_is_left_out_is_counted(name: str, reasons: dict[str, int], tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    settings, _ = make_copy(name, tmp_path / "corpus", out)
    prepare(settings)
    counted = Counter(reason.partition(":")[0] for reason in skipped(out).values())
    meta = json.loads(Path(f"{out}.meta.json").read_text())
    assert meta["skipped"] == dict(counted)
    assert {name: counted[name] for name in reasons} == reasons


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("wrong", ["missing", "empty", "other"])
def test_a_wrong_root_is_one_line_with_the_path_and_the_page(name: str, wrong: str, tmp_path: Path) -> None:
    settings, _ = make_copy(name, tmp_path / "corpus", tmp_path / "m.jsonl")
    root = tmp_path / "elsewhere"
    if wrong != "missing":
        root.mkdir()
    if wrong == "other":
        (root / "README").write_text("something else")
        (root / "some" / "folders").mkdir(parents=True)
    given = {name: getattr(settings, name) for name in ("split", "language", "target_language")}
    with pytest.raises(CorpusError) as raised:
        prepare(settings_of(settings.corpus, root, tmp_path / "m.jsonl", given))
    message = str(raised.value)
    assert str(root) in message and "\n" not in message
    assert any(word in message for word in ("https://", "--language", "no utterance", "no cuts", "your own"))
    assert not [entry for entry in os.listdir(tmp_path) if "m.jsonl" in entry]


@pytest.mark.parametrize("name", ["librispeech", "tedlium3", "common-voice", "must-c", "fleurs", "slurp", "fluent"])
def test_an_unknown_part_lists_those_there_are(name: str, tmp_path: Path) -> None:
    settings, _ = make_copy(name, tmp_path / "corpus", tmp_path / "m.jsonl", split="training")
    with pytest.raises(CorpusError, match=r"has no part 'training' here; it has \w+"):
        prepare(settings)


def test_several_parts(tmp_path: Path) -> None:
    settings, _ = make_copy("librispeech", tmp_path, tmp_path / "m.jsonl", split="train-clean-100,dev-clean")
    prepare(settings)
    assert [row.id.split("-")[0] for row in Manifest(tmp_path / "m.jsonl")] == ["19"] * 2 + ["174"] * 2 + ["84"] * 2


def test_a_split_of_a_folder_is_read_or_missed(tmp_path: Path) -> None:
    for name in ("train/a", "Test/b"):
        tone(tmp_path / "mine" / f"{name}.wav")
        (tmp_path / "mine" / f"{name}.txt").write_text("words")
    for split, ids in (("train", ["train/a"]), ("Test", ["Test/b"])):
        prepare(PrepareSettings("folder", tmp_path / f"{split}.jsonl", root=str(tmp_path / "mine"), split=split))
        assert [row.id for row in Manifest(tmp_path / f"{split}.jsonl")] == ids
    with pytest.raises(CorpusError, match="no part 'test' here; it has Test, train"):
        prepare(PrepareSettings("folder", tmp_path / "x.jsonl", root=str(tmp_path / "mine"), split="test"))


def test_audio_below_the_manifest_is_named_relative_to_it(tmp_path: Path) -> None:
    folder(tmp_path / "mine")
    prepare(PrepareSettings("folder", tmp_path / "m.jsonl", root=str(tmp_path / "mine")))
    assert [row["audio"] for _, row in read_rows(tmp_path / "m.jsonl")] == ["mine/a two.FLAC", "mine/b/one.wav"]


def test_a_language_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    flags, _ = common_voice(tmp_path)
    with pytest.raises(CorpusError, match="say --language, one of de"):
        prepare(settings_of("common-voice", tmp_path, tmp_path / "m.jsonl", flags | {"language": None}))
    flags, _ = fleurs(tmp_path / "fleurs")
    with pytest.raises(CorpusError, match="say --language"):
        prepare(settings_of("fleurs", tmp_path / "fleurs", tmp_path / "m.jsonl", flags | {"language": None}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty/<language>: missing.*huggingface\.co"):
        prepare(settings_of("fleurs", tmp_path / "empty", tmp_path / "m.jsonl", flags | {"language": None}))
    for corpus in ("covost2", "must-c"):
        with pytest.raises(CorpusError, match="say --target-language"):
            prepare(PrepareSettings(corpus, tmp_path / "m.jsonl", root=str(tmp_path)))  # type: ignore[arg-type]


# --- damaged corpora --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        (
            "librispeech",
            "**/84-121123.trans.txt",
            "84-121123-0000 ",
            "",
            r"trans\.txt:1: .*not an utterance of this chapter",
        ),
        ("gigaspeech", "GigaSpeech.json", '"end_time"', '"stop"', r"POD0000000001 is not as published .*'end_time'"),
        ("gigaspeech", "GigaSpeech.json", '"begin_time": 0.0', '"begin_time": -1', r"-1 is not a time"),
        ("gigaspeech", "GigaSpeech.json", '"audios"', '"sounds"', r"no array 'audios'"),
        ("tedlium3", "**/*.stm", " 2.25 4 ", " 2.25 four ", r"stm:3: 'four' is not a time"),
        ("tedlium3", "**/*.stm", " 4 5 <o,f0,female> <unk>", "", r"stm:4: STM lines have"),
        ("common-voice", "**/dev.tsv", "\tsentence\t", "\ttext\t", r"dev\.tsv:1: no column sentence"),
        ("covost2", "**/covost_v2.en_de.tsv", "translation", "german", r"no column translation"),
        ("must-c", "**/*.yaml", "offset", "onset", r"yaml:1: not a segment"),
        ("must-c", "**/*.yaml", "- {", "- [", r"yaml:1: not a segment"),
        ("must-c", "**/tst-COMMON.de", "Danke.\n", "", r"different numbers of lines"),
        ("fluent", "**/test_data.csv", "transcription", "text", r"no column transcription"),
        ("slurp", "**/test.jsonl", '"recordings"', '"files"', r"jsonl:1: no field 'recordings'"),
        ("snips lights", "**/dataset.json", "{", "", r"dataset\.json: is not JSON"),
        ("kaldi", "**/segments", "0.00 1.50", "zero 1.50", r"'zero' is not a time"),
        ("lhotse recordings", "*supervisions_train*", '"start"', '"from"', r"jsonl:1: not a Lhotse supervision"),
    ],
)
def test_a_damaged_file_is_named(name: str, file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    settings, _ = make_copy(name, tmp_path / "corpus", tmp_path / "m.jsonl")
    (path,) = (tmp_path / "corpus").glob(file)
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    with pytest.raises(CorpusError, match=message) as raised:
        prepare(settings)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_corpora_are_read_or_refused(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90 damaged text files: a good manifest comes out, or one line says what is wrong and where."""
    generator = random.Random(seed)
    for turn in range(30):
        name = generator.choice(list(COPIES))
        settings, _ = make_copy(name, tmp_path / str(turn), tmp_path / f"{turn}.jsonl")
        sounds = {".wav", ".flac", ".mp3", ".opus", ".ogg", ".sph"}
        files = [path for path in sorted((tmp_path / str(turn)).rglob("*")) if path.is_file()]
        path = generator.choice([path for path in files if path.suffix.lower() not in sounds])
        path.write_bytes(damage(generator, path.read_bytes() or b"x"))
        try:
            prepare(settings)
        except (CorpusError, ManifestError) as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
        else:
            assert list(Manifest(settings.out))


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    librispeech(tmp_path)
    path = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123" / "84-121123.trans.txt"
    path.write_bytes(path.read_bytes() + b"84-121123-0002 GR\xfc\xdfE\n")
    with pytest.raises(CorpusError, match="is not UTF-8"):
        prepare(PrepareSettings("librispeech", tmp_path / "m.jsonl", root=str(tmp_path), split="dev-clean"))


def test_a_row_with_the_id_of_an_earlier_one_is_left_out(tmp_path: Path) -> None:
    tone(tmp_path / "mine" / "a.wav")
    (tmp_path / "mine" / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "mine" / "text").write_text("a once\na twice\na\na thrice\n")
    prepare(PrepareSettings("kaldi", tmp_path / "m.jsonl", root=str(tmp_path / "mine")))
    assert [row.text for row in Manifest(tmp_path / "m.jsonl")] == ["once"]
    repeated = "repeated id: an earlier row has it"
    assert skipped(tmp_path / "m.jsonl") == {"a (2)": repeated, "a (3)": "no transcript", "a (4)": repeated}
    assert json.loads((tmp_path / "m.jsonl.meta.json").read_text())["skipped"] == {"repeated id": 2, "no transcript": 1}


def test_check_audio_lists_what_cannot_be_decoded(tmp_path: Path) -> None:
    librispeech(tmp_path)
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    (chapter / "84-121123-0000.flac").write_bytes(b"fLaC")
    (chapter / "84-121123-0001.flac").unlink()
    out = tmp_path / "m.jsonl"
    prepare(PrepareSettings("librispeech", out, root=str(tmp_path), split="dev-clean", check_audio=True))
    assert [row.id for row in Manifest(out)] == ["174-50561-0000", "174-50561-0001"]
    assert set(skipped(out)) == {"84-121123-0000", "84-121123-0001"}
    assert all(reason.startswith("audio: ") and "84-121123" in reason for reason in skipped(out).values())
    assert json.loads(Path(f"{out}.meta.json").read_text())["skipped"] == {"audio": 2}


CV_HEAD = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"


@pytest.mark.parametrize(
    "broken, lines",
    [
        ("c\tx.mp3\tA sentence with\na line break in it.\t2\t0\t\t\t\ten\t\n", "3-4"),
        ("c\tx.mp3\tA sentence\n\nwith two\nof them.\t2\t0\t\t\t\ten\t\n", "3-6"),
        ("c\tx.mp3\tA sentence with\r\na line break\t2\t0\t\t\t\ten\n", "3-4"),  # and without its last, empty cell
        ("c\tx.mp3\tAn accent\t2\t0\t\t\tof the\nnorth\ten\t\n", "3-4"),
        ("c\tx.mp3\n", "3"),
        ("c\tx.mp3\tA sentence\twith a tab\t2\t0\t\t\t\ten\tBenchmark\n", "3"),
    ],
)
def test_a_row_that_is_broken_is_counted_once_and_no_cells_are_shifted(broken: str, lines: str, tmp_path: Path) -> None:
    row = "a\t{}.mp3\tGood {}.\t2\t0\t\t\t\ten\t\n"
    table = tmp_path / "en" / "validated.tsv"
    (tmp_path / "en" / "clips").mkdir(parents=True)
    table.write_text(CV_HEAD + row.format("one", "morning") + broken + row.format("two", "night"), newline="")
    out = tmp_path / "m.jsonl"
    prepare(PrepareSettings("common-voice", out, root=str(tmp_path / "en"), split="validated"))
    assert [(row.id, row.text) for row in Manifest(out)] == [("one", "Good morning."), ("two", "Good night.")]
    assert list(skipped(out)) == [f"validated.tsv:{lines}"]
    assert json.loads(Path(f"{out}.meta.json").read_text())["skipped"] == {"broken row": 1}


@pytest.mark.parametrize("file", ["covost_v2.en_de.tsv", "validated.tsv"])
def test_a_broken_row_of_a_joined_table_is_counted(file: str, tmp_path: Path) -> None:
    settings, expected = make_copy("covost2", tmp_path / "corpus", tmp_path / "m.jsonl")
    (path,) = (tmp_path / "corpus").glob(f"**/{file}")
    path.write_text(path.read_text() + "common_voice_en_a9.mp3\tEin\nZeilenumbruch\ttrain\n")
    prepare(settings)
    assert [row.id for row in Manifest(settings.out)] == [id for id, *_ in expected]
    assert "broken row" in " ".join(skipped(settings.out).values())


def test_check_audio_lists_silence_under_a_transcript(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, level in [("a", 0.3), ("b", 0.0), ("c", 0.0)]:
        write_wav(tmp_path / "mine" / f"{name}.wav", level * np.sin(np.arange(16_000) / 10))
        (tmp_path / "mine" / f"{name}.txt").write_text("Three words here" if name != "c" else "")
    out = tmp_path / "m.jsonl"
    prepare(PrepareSettings("folder", out, root=str(tmp_path / "mine"), check_audio=True))
    assert [row.id for row in Manifest(out)] == ["a"]
    assert skipped(out) == {"b": "silence under a transcript: Three words here", "c": "no transcript"}


# --- continuing an interrupted run ------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    settings, _ = make_copy("librispeech", tmp_path, tmp_path / "m.jsonl")
    prepare(settings)
    before = (tmp_path / "m.jsonl").stat()
    prepare(settings)
    assert (tmp_path / "m.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(JobError, match=r"m\.jsonl: was started with other settings .split was 'dev-clean'"):
        prepare(settings_of("librispeech", tmp_path, tmp_path / "m.jsonl", {"split": "train-clean-100"}))


def test_a_run_stopped_after_a_row_with_the_id_of_one_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.ape", "a.txt", "b.txt"):
        (tmp_path / name).write_text("word")
    for name in ("a.wav", "b.wav"):
        tone(tmp_path / name)
    read = preparation.READERS["folder"]

    def of_one_id(request: ReadRequest) -> Iterator[Any]:
        yield from (replace(row, id="a") if isinstance(row, Dropped) else row for row in read(request))

    def stopped(request: ReadRequest) -> Iterator[Any]:
        yield from islice(of_one_id(request), 2)
        raise KeyboardInterrupt

    settings = PrepareSettings("folder", tmp_path / "m.jsonl", root=str(tmp_path))
    monkeypatch.setitem(preparation.READERS, "folder", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings)
    monkeypatch.setitem(preparation.READERS, "folder", of_one_id)
    prepare(settings)
    assert [row.id for row in Manifest(tmp_path / "m.jsonl")] == ["a", "b"]
    assert skipped(tmp_path / "m.jsonl").keys() == {"a"}


@pytest.mark.parametrize("name", ["librispeech", "gigaspeech", "kaldi", "folder"])
def test_a_run_stopped_anywhere_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after any number of rows, and with a torn last line, it ends with the same files."""
    settings, _ = make_copy(name, tmp_path / "corpus", tmp_path / "whole.jsonl")
    prepare(settings)
    whole, left_out = (tmp_path / "whole.jsonl").read_text(), skipped(tmp_path / "whole.jsonl")
    reader = preparation.READERS[settings.corpus]
    out = tmp_path / "m.jsonl"
    again = PrepareSettings(**{**settings.__dict__, "out": out})
    total = whole.count("\n") + len(left_out)
    for stop in range(1, total):

        def interrupted(request: ReadRequest, stop: int = stop) -> Iterator[Any]:
            for number, row in enumerate(reader(request)):
                if number == stop:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setitem(preparation.READERS, settings.corpus, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(again)
        for partial in tmp_path.glob("m.jsonl.parts/part-*.jsonl"):
            with open(partial, "a") as torn:
                torn.write('{"id": "to')
        monkeypatch.setitem(preparation.READERS, settings.corpus, reader)
        prepare(again)
        assert out.read_text() == whole and skipped(out) == left_out
        for made in tmp_path.glob("m.jsonl*"):
            made.unlink()
        assert not list(tmp_path.glob("*.parts"))


def test_another_jobs_leftovers_are_cleared(tmp_path: Path) -> None:
    settings, _ = make_copy("librispeech", tmp_path, tmp_path / "m.jsonl")
    with Parts(tmp_path / "m.jsonl.parts", {"corpus": "another"}).log() as log:
        log.append({"id": "old", "text": "x"})
    (tmp_path / "m.jsonl.skipped.jsonl").write_text('{"id": "old", "audio": "", "reason": "x"}\n')
    prepare(settings)
    assert not [name for name in os.listdir(tmp_path) if "parts" in name or "skipped" in name]


def test_a_corpus_that_changed_between_two_runs(tmp_path: Path) -> None:
    settings, _ = make_copy("librispeech", tmp_path, tmp_path / "m.jsonl")
    with Job(settings.out).parts(preparation._facts(settings)).log() as log:
        log.append({"id": "gone-1", "audio": "a.wav", "text": "x"})
    with pytest.raises(CorpusError, match="the corpus has changed since the last run"):
        prepare(settings)
    prepare(settings)
    assert len(Manifest(settings.out)) == 4


def test_limit(tmp_path: Path) -> None:
    settings, expected = make_copy("kaldi", tmp_path, tmp_path / "m.jsonl", limit=1)
    prepare(settings)
    assert [row.id for row in Manifest(tmp_path / "m.jsonl")] == [expected[0][0]]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_moments_it_ends_the_same(tmp_path: Path) -> None:
    corpus = tmp_path / "LibriSpeech" / "dev-clean"
    for speaker in range(20):
        path = corpus / str(speaker) / "1" / f"{speaker}-1.trans.txt"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{speaker}-1-{i:04d} SOME WORDS\n" for i in range(300)))
    flags = ["prepare", "librispeech", "--root", str(tmp_path), "--split", "dev-clean", "--out"]
    assert cli.main([*flags, str(tmp_path / "whole.jsonl")]) == 0
    out = tmp_path / "m.jsonl"
    generator = np.random.default_rng(0)
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-m", "blsp", *flags, str(out)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while (
            not list(tmp_path.glob("m.jsonl.parts/part-*.jsonl")) and run.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(float(generator.uniform(0, 0.3)))
        run.kill()
        run.wait()
    assert cli.main([*flags, str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# --- the command ------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    librispeech(tmp_path)
    flags = ["prepare", "librispeech", "--root", str(tmp_path), "--out", str(tmp_path / "m.jsonl"), "--split"]
    assert cli.main([*flags, "dev-clean"]) == 0
    assert cli.main([*flags, "dev-other"]) == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prepare", "librispeech", "--out", str(tmp_path / "n.jsonl")])
    errors = capsys.readouterr().err
    assert "m.jsonl: was started with other settings" in errors and "--root" in errors


# --- silence, noise and babble ----------------------------------------------------------------------------


def test_no_speech_clips(tmp_path: Path) -> None:
    speech = [Utterance(id=f"s{i}", audio=f"{i}.wav", text="words") for i in range(8)]
    for row in speech:
        tone(tmp_path / row.audio, seconds=2.0)
    write_manifest(tmp_path / "speech.jsonl", speech)
    out = tmp_path / "none.jsonl"
    prepare(PrepareSettings("no-speech", out, root=str(tmp_path / "speech.jsonl"), limit=27))
    found = list(Manifest(out))
    assert len(found) == 27
    assert Counter(row.extra["sound"] for row in found) == dict.fromkeys([*no_speech.SOUNDS, "babble"], 3)
    for row in found:
        audio = load_audio(row.audio)
        assert row.text == "" and row.extra["no_speech"] is True
        assert 0.3 * 16_000 <= len(audio) <= 8.0 * 16_000 and np.abs(audio).max() <= 1.0
        assert is_silent(audio) or row.extra["sound"] != "silence"
    before = {row.id: Path(row.audio).read_bytes() for row in found}
    out.unlink()
    Path(found[3].audio).unlink()
    prepare(PrepareSettings("no-speech", out, root=str(tmp_path / "speech.jsonl"), limit=27))
    assert {row.id: Path(row.audio).read_bytes() for row in Manifest(out)} == before
    prepare(PrepareSettings("no-speech", tmp_path / "other.jsonl", limit=16, seed=1))
    assert "babble" not in {row.extra["sound"] for row in Manifest(tmp_path / "other.jsonl")}


def test_the_colour_of_noise() -> None:
    """Power falls as the name says: white by 0, pink by 3, brown by 6 dB an octave; blue rises by 3."""
    for kind, slope in no_speech.SLOPES.items():
        noise = no_speech.make_sound(kind, np.random.default_rng(0), 1 << 18)
        power = np.abs(np.fft.rfft(noise)) ** 2
        low, high = power[1000:2000].mean(), power[8000:16000].mean()
        assert np.log2(low / high) / 3 == pytest.approx(slope, abs=0.15)


def test_babble_needs_readable_clips(tmp_path: Path) -> None:
    write_manifest(tmp_path / "speech.jsonl", [Utterance(id="a", audio="gone.wav", text="x")])
    with pytest.raises(CorpusError, match=r"too few clips .*gone\.wav: no such file"):
        prepare(PrepareSettings("no-speech", tmp_path / "n.jsonl", root=str(tmp_path / "speech.jsonl")))


# --- parts ------------------------------------------------------------------------------------------------


def test_languages() -> None:
    spelled = {"zh-CN": "zh", "cmn_hans_cn": "zh", "EN": "en", "sv-SE": "sv", "English": "en", "ckb_iq": "ckb"}
    assert {name: iso(name) for name in spelled} == spelled
    assert iso(None) is None and iso("") is None


def test_what_counts_as_words() -> None:
    assert isinstance(make_row("a", "a.wav", " 你好 "), Utterance)
    for text in ("", "  ", "...", "♪ ♪", "<MUSIC>", "<MUSIC> <SIL>"):
        row = make_row("a", "a.wav", text, tags=("<MUSIC>", "<SIL>"))
        assert not isinstance(row, Utterance) and row.reason.startswith(
            "tags only" if text.strip() else "no transcript"
        )


@pytest.mark.parametrize("block", [1, 3, 17, 1000])
def test_a_json_array_larger_than_memory(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blsp.data.corpora import recognition

    items = [{"n": i, "text": 'a "]" } \\ é', "list": [1, [2]]} for i in range(20)]
    (tmp_path / "x.json").write_text(json.dumps({"head": {"audio": 1}, "audios": items, "tail": []}, indent=1))
    monkeypatch.setattr(recognition, "JSON_BLOCK", block)
    assert list(read_json_array(tmp_path / "x.json", "audios", Corpus("x", "y"))) == items
    torn = (tmp_path / "x.json").read_text()[:400]
    (tmp_path / "torn.json").write_text(torn)
    with pytest.raises(CorpusError, match=r"torn\.json: is damaged within 'audios'"):
        list(read_json_array(tmp_path / "torn.json", "audios", Corpus("x", "y")))


def test_a_table_on_disk() -> None:
    with Lookup((str(i), f"value {i}") for i in range(1000)) as table:
        assert table.get("17") == "value 17" and table.get("1000") is None


MEASURE = """
import sys, pathlib
from blsp.data.prepare import prepare
from blsp.settings import PrepareSettings
prepare(PrepareSettings("librispeech", pathlib.Path(sys.argv[2]), root=sys.argv[1], split="dev-clean"))
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    megabytes = []
    for count in (10, 20_000):
        chapter = tmp_path / str(count) / "dev-clean" / "1" / "1"
        chapter.mkdir(parents=True)
        (chapter / "1-1.trans.txt").write_text("".join(f"1-1-{i:06d} SOME WORDS\n" for i in range(count)))
        command = [sys.executable, "-c", MEASURE, tmp_path / str(count), tmp_path / f"{count}.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        megabytes.append(float(done.stdout.split()[-1]))
    assert megabytes[1] - megabytes[0] < 25, megabytes


def test_must_c_follows_the_lines_of_its_files(tmp_path: Path) -> None:
    """A line separator inside a sentence (U+2028) is no end of line, in text and YAML alike."""
    flags, expected = must_c(tmp_path)
    prepare(settings_of("must-c", tmp_path, tmp_path / "m.jsonl", flags))
    assert len(Manifest(tmp_path / "m.jsonl")) == len(expected)


def test_gigaspeech_of_another_subset(tmp_path: Path) -> None:
    gigaspeech(tmp_path)
    prepare(PrepareSettings("gigaspeech", tmp_path / "m.jsonl", root=str(tmp_path), split="DEV"))
    assert [row.id[:14] for row in Manifest(tmp_path / "m.jsonl")] == ["YOU0000000001_"] * 3


# --- Hugging Face datasets (needs the extra `data`) ---------------------------------------------------------


def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for i in range(3):
        tone(tmp_path / f"{i}.flac")
    columns = {
        "id": [10, 10, 11],
        "audio": [str(tmp_path / f"{i}.flac") for i in range(3)],
        "sentence": ["one", "", "three"],
        "translation": ["eins", "zwei", "drei"],
        "locale": ["en"] * 3,
        "up_votes": [1, 2, 3],
        "duration": [1000, 1000, 1000],  # milliseconds
        "instruction": ["Transcribe."] * 3,
    }
    made = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())
    made.save_to_disk(tmp_path / "saved")
    out = tmp_path / "m.jsonl"
    flags = {"reference_column": "translation"}
    prepare(PrepareSettings("hf", out, root=str(tmp_path / "saved"), check_audio=True, **flags))  # type: ignore[arg-type]
    first, last = Manifest(out)
    assert (first.id, first.text, first.reference, first.language) == ("train-00000000", "one", "eins", "en")
    assert last.extra["source_id"] == 11 and last.extra["up_votes"] == 3
    assert last.extra["source_duration"] == 1000 and last.duration is None and last.instruction is None
    assert len(load_audio(last.audio)) == 16_000
    assert skipped(out) == {"train-00000001": "no transcript"}
    with pytest.raises(CorpusError, match="no column 'words'; it has id, audio, sentence"):
        prepare(PrepareSettings("hf", tmp_path / "n.jsonl", root=str(tmp_path / "saved"), text_column="words"))


def test_a_hugging_face_folder_of_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = []
    for i in range(2):
        tone(tmp_path / "data" / f"{i}.wav")
        lines.append(json.dumps({"file_name": f"{i}.wav", "transcription": f"number {i}"}) + "\n")
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(lines))
    prepare(PrepareSettings("hf", tmp_path / "m.jsonl", root=str(tmp_path / "data"), check_audio=True))
    assert [row.text for row in Manifest(tmp_path / "m.jsonl")] == ["number 0", "number 1"]


def test_a_hugging_face_dataset_that_holds_the_files(tmp_path: Path) -> None:
    """Nothing is written but the manifest: its rows name the places of the bytes."""
    datasets = pytest.importorskip("datasets")
    files = []
    for name in ("a.flac", "b.wav"):
        tone(tmp_path / name)
        files.append({"bytes": (tmp_path / name).read_bytes(), "path": name})
    made = datasets.Dataset.from_dict({"audio": [*files, None], "text": ["one", "two", "three"]})
    (tmp_path / "data").mkdir()
    made.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    prepare(PrepareSettings("hf", tmp_path / "m.jsonl", root=str(tmp_path / "data"), split="test"))
    first, second = Manifest(tmp_path / "m.jsonl")
    assert read_address(first.audio) == files[0]["bytes"]
    assert first.audio.endswith("test-00000-of-00001.parquet#row=0&column=audio")
    assert read_address(second.audio) == files[1]["bytes"] and second.text == "two"
    assert skipped(tmp_path / "m.jsonl") == {
        "test-00000002": "no audio file: the row holds neither bytes nor a local path"
    }
    assert not list(tmp_path.glob("m_audio"))


def test_clips_of_another_dataset_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "m.jsonl"
    for seconds in (1.0, 2.0):
        tone(tmp_path / "clip.wav", seconds=seconds)
        columns = {"audio": [{"bytes": (tmp_path / "clip.wav").read_bytes(), "path": "clip.wav"}], "text": ["one"]}
        root = tmp_path / f"{seconds}"
        datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio()).save_to_disk(root)
        prepare(PrepareSettings("hf", out, root=str(root)))
        assert len(load_audio(next(iter(Manifest(out))).audio)) == 16_000 * seconds
        out.unlink()
        out.with_name("m.jsonl.meta.json").unlink()


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("mine.csv", r"mine\.csv: no such folder; --root is a folder that exists or a hub id"),
        ("./nope", r"\./nope: no such folder; "),
        ("here/nope", "here/nope: no such folder; "),
        ("a/b/c", "a/b/c: no such folder; "),
        ("table.csv", r"table\.csv: is a file; .* `blsp prepare csv"),
        ("my data", "my data: no such folder, and the hub cannot be asked for it .Repo id must use"),
        ("owner/data", r"owner/data: no such folder, and the hub cannot be asked for it \(Name or service not known\)"),
    ],
)
def test_a_name_that_the_hub_cannot_have_or_be_asked_for_is_refused_at_once(
    root: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name is asked for more than once, and one that can only be a path never."""
    datasets = pytest.importorskip("datasets")
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "table.csv").write_text("audio,text\n")
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the library would ask again"))
    with pytest.raises(CorpusError, match=message) as error:
        prepare(PrepareSettings("hf", tmp_path / "m.jsonl", root=root))
    assert "\n" not in str(error.value)
    assert len(asked) == (root == "owner/data")


def test_without_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"blsp\[data\]\""):
        prepare(PrepareSettings("hf", tmp_path / "m.jsonl", root=str(tmp_path)))
