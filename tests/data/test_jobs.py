"""Unfinished work: logs that survive a kill, headers, parts of several ranks, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.full_disk import run_with_room

from blsp.data import jobs
from blsp.data.files import ManifestError, naming_full_disk, read_rows, take_room, write_atomically, write_json
from blsp.data.jobs import Job, JobError, Parts, RecordLog, RowLog, SkippedLog, differences, lock_job

# --- logs -------------------------------------------------------------------------------------------------


@given(kept=st.integers(0, 200), length=st.integers(1, 70_000))
def test_a_log_goes_on_after_a_kill_at_any_byte(
    kept: int, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "out.jsonl"
    rows = [{"id": str(number), "text": "x" * length} for number in range(3)]
    with RowLog(path) as log:
        log.append(*rows)
    content = path.read_bytes()
    path.write_bytes(content[: min(len(content), kept * len(content) // 200)])
    with RowLog(path) as log:
        done = sum(1 for _ in read_rows(path))
        log.append(*rows[done:])
    assert path.read_bytes() == content


def test_a_log_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with RowLog(tmp_path / "out.jsonl") as log, pytest.raises(ManifestError, match="cannot be written"):
        log.append({"id": "a"}, {"id": "b", "text": object()})
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_list_of_what_was_skipped(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with SkippedLog(out) as skipped:
        assert skipped.count == 0 and not skipped.path.exists()
        skipped.add("a", "a.wav", "no such file")
    skipped.path.write_bytes(skipped.path.read_bytes() + b'{"id": "to')
    with SkippedLog(out) as skipped:
        skipped.add("a", "a.wav", "again")
        skipped.add("b", "b.wav", "is empty")
        assert skipped.count == 2 and "a" in skipped and "c" not in skipped
    assert [row["reason"] for _, row in read_rows(skipped.path)] == ["no such file", "is empty"]


def test_records_of_other_settings_are_kept_as_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log" / "task.jsonl"
    with RecordLog(path, "one") as log:
        log.write({"a": {"n": 1}, "b": {"n": 2}})
    path.write_bytes(path.read_bytes() + b'{"id": "c", "n"')
    with RecordLog(path, "one") as log:
        assert log.records == {"a": {"id": "a", "n": 1}, "b": {"id": "b", "n": 2}}
        log.write({"c": {"n": 3}})
        assert list(log.records) == ["a", "b", "c"]
    with RecordLog(path, "two") as log:
        assert log.records == {}
        log.write({"a": {"n": 4}})
    old = path.with_name("task.jsonl.old")
    message = capsys.readouterr().out
    assert "limit, batch size, number of threads" in message and f"kept as {old} and begun again" in message
    assert path.read_text() == '{"fingerprint": "two"}\n{"id": "a", "n": 4}\n'
    with RecordLog(old, "one") as log:
        assert list(log.records) == ["a", "b", "c"]
    with RecordLog(path.with_name("empty.jsonl"), "one"), RecordLog(path.with_name("empty.jsonl"), "two"):
        assert not path.with_name("empty.jsonl.old").exists()  # there is nothing to keep


# --- headers and rows that are done -----------------------------------------------------------------------


def test_a_job_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    for _ in range(2):
        with Job(out) as job:
            job.begin({"model": "a", "seed": 1})
    assert json.loads(job.header_path.read_text()) == {"model": "a", "seed": 1} == job.header()
    with Job(out) as job, pytest.raises(JobError, match=r"model was 'a', is 'b'; seed was 1, is 2.*--out"):
        job.begin({"model": "b", "seed": 2})
    job.header_path.write_text("[")
    with Job(out) as job, pytest.raises(JobError, match="is not a JSON object"):
        job.begin({})
    job.header_path.unlink()
    out.write_text('{"id": "a"}\n')
    with Job(out) as job, pytest.raises(JobError, match=r"exists, but .*meta\.json, which says"):
        job.begin({"model": "a"})


def test_differences() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1}) == ""
    assert differences({"a": 1}, {"a": 2, "c": None, "d": 3}, ignore=["d"]) == "a was 1, is 2"


def count(out: Path, names: list[str], **fields: str) -> int:
    with Job(out) as job:
        return job.count_done(({"id": name, **fields} for name in names), "id", "response")


def test_rows_that_are_done(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert count(out, ["a", "b"]) == 0
    with Job(out) as job:
        job.log.append({"id": "a", "response": "x"})
        job.skipped.add("b", "b.wav", "broken")
        job.log.append({"id": "c", "response": "y"})
    out.write_bytes(out.read_bytes() + b'{"id": "d"')  # torn
    assert count(out, ["a", "b", "c", "d"]) == 3
    assert count(out, ["a", "b", "c"]) == 3
    with pytest.raises(JobError, match="holds id 'c' where the input has another"):
        count(out, ["a", "b", "d"])
    with pytest.raises(JobError, match=r"id 'a' was answered when its speaker was None"):
        count(out, ["a", "b"], speaker="s")


def test_a_job_in_which_nothing_could_be_used_fails_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Job(tmp_path / "out.jsonl") as job:
        assert job.count_done([{"id": "a"}, {"id": "b"}], "id") == 0
        job.skipped.add("a", "a.wav", "broken")
        job.skipped.add("b", "b.wav", "broken")
        with pytest.raises(
            JobError, match=r"out.jsonl: 0 of 2 rows answered; 2 skipped, see .*out.jsonl.skipped.jsonl"
        ):
            job.report(0, 2, "rows answered")
    with Job(tmp_path / "out.jsonl") as job:
        assert job.count_done([{"id": "a"}, {"id": "b"}], "id") == 0 and not job.skipped.count
        job.log.append({"id": "a"})
        job.skipped.add("b", "b.wav", "broken")
        job.report(1, 2, "rows answered")
    assert "1 of 2 rows answered; 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["before a row", "after the last"])
def test_a_job_whose_folder_was_removed_fails(tmp_path: Path, moment: str) -> None:
    with Job(tmp_path / "runs" / "out.jsonl") as job:
        job.log.append({"id": "a"})
        shutil.rmtree(tmp_path / "runs")
        with pytest.raises(FileNotFoundError, match=r"out.jsonl: was removed with its content"):
            job.log.append({"id": "b"}) if moment == "before a row" else job.report(1, 1, "rows answered")


def test_another_file_of_the_same_name_is_no_output(tmp_path: Path) -> None:
    with RowLog(tmp_path / "out.jsonl") as log:
        (tmp_path / "out.jsonl").rename(tmp_path / "old.jsonl")
        (tmp_path / "out.jsonl").write_text("")
        with pytest.raises(FileNotFoundError, match="was removed"):
            log.append({"id": "a"})


def test_a_full_disk_is_named_and_the_log_goes_on(tmp_path: Path) -> None:
    def append() -> None:
        with RowLog(tmp_path / "out.jsonl") as log:
            for number in range(sum(1 for _ in read_rows(log.path)), 100):
                log.append({"id": str(number), "text": "x" * 100})

    for room in (1_000, 2_500):
        error = run_with_room(append, room, tmp_path / "told")
        assert re.match(
            rf"DiskFullError: {tmp_path}/out.jsonl: no room for it: 1\d\d bytes are needed, [\d,]+ bytes", error
        )
        assert (tmp_path / "out.jsonl").stat().st_size == room
    append()
    assert [row["id"] for _, row in read_rows(tmp_path / "out.jsonl")] == [str(number) for number in range(100)]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"whole": True})
    error = run_with_room(lambda: write_json(tmp_path / "a.json", {"text": "x" * 9_000}), 5_000, tmp_path / "told")
    assert error.startswith(f"DiskFullError: {tmp_path}/a.json: no room for it: 9,")
    assert json.loads((tmp_path / "a.json").read_text()) == {"whole": True}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "told"]


def _save_tensors(path: Path) -> None:
    import torch

    torch.save(torch.zeros(10_000), path)


def _fill_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE a (b); INSERT INTO a VALUES (zeroblob(9000))")


@pytest.mark.parametrize("write", [_save_tensors, _fill_table])
def test_what_libraries_say_of_a_full_disk(tmp_path: Path, write: Callable[[Path], None]) -> None:
    def work() -> None:
        with naming_full_disk(tmp_path / "a", needs=9_000):
            write(tmp_path / "a")

    assert run_with_room(work, 5_000, tmp_path / "told").startswith(f"DiskFullError: {tmp_path}/a: no room for it: 9,")


def test_room_is_taken_before_a_file_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", 100_000)
    assert (tmp_path / "holes").stat().st_blocks == 0
    take_room(tmp_path / "holes")
    assert (tmp_path / "holes").stat().st_blocks >= 100_000 // 512


# --- parts of several ranks -------------------------------------------------------------------------------


def test_ranks_write_parts_and_the_output_appears_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WAIT", 0.01)
    out, settings = tmp_path / "out.jsonl", {"seed": 1}
    Parts(Path(f"{out}.parts"), {"seed": 0}).finish(0, 2)  # of another job
    seen: list[int] = []

    def run(rank: int) -> None:
        with Job(out, rank) as job:
            parts = job.parts(settings)
            with parts.log(rank) as log:
                log.append(*({"id": f"{rank}-{number}"} for number in range(3)))
            parts.finish(rank, 2)
            if rank == 0:
                parts.wait(2)
                (parts.folder / "part-00001.jsonl").open("a").write('{"id": "to')  # torn
                seen.append(len(list(parts.rows())))
                with write_atomically(parts.folder / "merged.jsonl") as merged:
                    merged.write_text("whole\n")
                job.finish(parts.folder / "merged.jsonl", {"rows": 6})

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
        time.sleep(0.05)
    for rank in ranks:
        rank.join(20)
    assert seen == [6] and out.read_text() == "whole\n"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.meta.json"]


# --- one process at a time --------------------------------------------------------------------------------

WORKER = """
import sys, time
from blsp.data.jobs import Job
with Job(sys.argv[1]) as job:
    job.begin({"seed": 1})
    for number in range(job.count_done(({"id": str(n)} for n in range(10**6)), "id"), 10**6):
        job.log.append({"id": str(number)})
        print(number, flush=True)
"""


def start(out: Path) -> subprocess.Popen[str]:
    run = subprocess.Popen([sys.executable, "-c", WORKER, str(out)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline()
    return run


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_second_process_is_told_who_works_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    out, first = tmp_path / "out.jsonl", 0
    for _ in range(3):
        run = start(out)
        with pytest.raises(JobError, match=rf"process {run.pid} on .*-c.* since .* here; wait for it"), Job(out):
            pass
        time.sleep(0.05)
        run.kill()
        run.communicate()
        with Job(out) as job:
            done = job.count_done(({"id": str(n)} for n in range(10**6)), "id")
        assert done > first
        first = done
    assert [row["id"] for _, row in read_rows(out)] == [str(n) for n in range(first)]
    assert not list(tmp_path.glob("*lock*")) and not list(tmp_path.glob(".*"))


def test_the_lock_of_a_folder(tmp_path: Path) -> None:
    with lock_job(tmp_path), pytest.raises(JobError, match="--out"), lock_job(tmp_path):
        pass
    with lock_job(tmp_path), Job(tmp_path / "other"):  # another output
        pass


def test_each_rank_has_a_lock_of_its_own(tmp_path: Path) -> None:
    with Job(tmp_path / "out.jsonl", 0), Job(tmp_path / "out.jsonl", 1):  # two ranks of one job
        for rank in (0, 1):
            with pytest.raises(JobError, match=f"process {os.getpid()} on "), Job(tmp_path / "out.jsonl", rank):
                pass
    assert not list(tmp_path.glob(".*"))


def test_the_lock_file_of_another_version(tmp_path: Path) -> None:
    with lock_job(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(JobError, match="another process is at work"), lock_job(tmp_path):
            pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.FileLock, "acquire", refuse)
    with Job(tmp_path / "out.jsonl") as job:
        job.begin({"seed": 1})
    assert job.header() == {"seed": 1}


def test_fcntl_is_not_needed_to_import_the_module() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import blsp.data.jobs"
    subprocess.run([sys.executable, "-c", code], check=True)
