"""Unfinished work: locks, logs, headers, part files, and how a killed job continues.

In:  an output file, and the settings that decide its content.
Out: which part is done already, and where to write the rest; a `JobError` if a job cannot continue.
Try: `with Job("out.jsonl") as job: job.begin({"seed": 1}); job.log.append({"id": "a"})`
Flow: data/ — used by every command that may run for long.

- One file or folder: `write_atomically` (files.py).
- One row for each input, in the inputs' order (generate, transcribe): `Job.begin` writes OUT.meta.json or refuses other
  settings, `count_done` tells where to continue, `log` appends to OUT and `skipped` to OUT.skipped.jsonl.
- An output that is complete only at the end (prepare, continue), from one process or several ranks: `Job.parts` is the
  folder OUT.parts/ with one log for each rank, and `finish` gives the merged file its name.
- Records found by their id, which belong to one task or job (evaluate, tour): `RecordLog`.
"""

import errno
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from filelock import FileLock, Timeout

from blsp.data.files import append_bytes, digest_of, dump_row, read_rows, require_there, show, write_json

In = TypeVar("In")
Out = TypeVar("Out")
Record = TypeVar("Record")
SKIPPED_SUFFIX = ".skipped.jsonl"
WAIT = 0.5  # seconds between two checks of another rank's files


class JobError(ValueError):
    """A job cannot continue: its settings differ, or another process is running; the message says what to do."""


# --- append-only logs -------------------------------------------------------------------------------------
class RowLog:
    """An append-only JSONL file of a job that may be killed; opening it cuts off an incomplete last line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (lives as long as the log)
        self._cut_torn_line()

    def append(self, *rows: dict[str, Any]) -> None:
        """Write whole lines, in one system call."""
        append_bytes(self._file, b"".join(dump_row(row, str(self.path)) for row in rows))

    def require_there(self) -> None:
        """Raise FileNotFoundError if the file has been removed since it was opened."""
        require_there(self._file)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        """Shorten the file to the end of its last newline."""
        end = size = self._file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65_536)
            self._file.seek(begin)
            newline = self._file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            self._file.truncate(end)


class SkippedLog:
    """The rows that a job left out, with reasons: `<out>.skipped.jsonl`, written when the first row is skipped."""

    def __init__(self, out_path: str | os.PathLike[str]) -> None:
        self.path = Path(f"{os.fspath(out_path)}{SKIPPED_SUFFIX}")
        self._log: RowLog | None = None
        self._seen: set[int] = set()  # hashes of ids, which need less memory than ids
        if self.path.exists():
            self._log = RowLog(self.path)
            self._seen = {hash(str(row.get("id"))) for _, row in read_rows(self.path)}

    @property
    def count(self) -> int:
        """Number of rows in the list, with those of earlier runs."""
        return len(self._seen)

    def __contains__(self, id: str) -> bool:
        return hash(id) in self._seen

    def add(self, id: str, audio: str, reason: str) -> None:
        """Add a row to the list, unless its id is in it already."""
        if id in self:
            return
        if self._log is None:
            self._log = RowLog(self.path)
        self._log.append({"id": id, "audio": audio, "reason": reason})
        self._seen.add(hash(id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()


class RecordLog(RowLog, Generic[Record]):
    """Records by their id. The first line holds the job's digest; a log of another job is kept as `<path>.old`.

    from_row, to_row: convert a record from and to its JSON object; by default a record is the object.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        from_row: Callable[[dict[str, Any]], Record] = dict,  # type: ignore[assignment]
        to_row: Callable[[Record], dict[str, Any]] = dict,  # type: ignore[assignment]
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        self._to_row = to_row
        self.records: dict[str, Record] = {}
        earlier = [row for _, row in read_rows(path)]
        if earlier and earlier[0].get("fingerprint") == fingerprint:
            self.records = {row["id"]: from_row(row) for row in earlier[1:]}
            return
        if len(earlier) > 1:
            self._begin_again()
        self._file.truncate(0)
        self.append({"fingerprint": fingerprint})

    def _begin_again(self) -> None:
        """Rename the file, whose records may have taken hours, and open a new one."""
        old = self.path.with_name(f"{self.path.name}.old")
        self.close()
        os.replace(self.path, old)
        super().__init__(self.path)
        print(
            f"{self.path}: was made with another model, task, limit, batch size, number of threads or version; "
            f"it is kept as {old} and begun again"
        )

    def write(self, records: dict[str, Record]) -> None:
        """Store a finished batch, in one system call."""
        self.append(*({"id": name, **self._to_row(record)} for name, record in records.items()))
        self.records.update(records)


# --- one job ----------------------------------------------------------------------------------------------
@contextmanager
def lock_job(output: Path, rank: int = 0) -> Iterator[None]:
    """Lock an output (a file or a folder) against other processes while the block runs; each rank has its own lock.

    Raises JobError with the process that holds the lock. The system frees the lock of a killed process.
    """
    name = f".rank-{rank}.lock" if rank else ".lock"
    path = output / name if output.is_dir() else output.with_name(f".{output.name}{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise JobError(f"{output}: {_holder(path)} here; wait for it, stop it, or choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        yield  # some network file systems have no locks; there, the user must not start a second process
        return
    try:
        now, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with suppress(OSError):
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "command": command}
            path.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # before the release, so that a waiting process finds the file gone and tries again
            path.unlink()
        lock.release()


def _holder(lock: Path) -> str:
    """A description of the process that holds a lock, for messages."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        return (
            f"process {holder['process']} on {holder['host']} ({holder['command']}) has been at work since "
            f"{holder['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):  # a locked file cannot be read on Windows
        return "another process is at work"


def differences(begun: dict[str, Any], now: dict[str, Any], ignore: Collection[str] = ()) -> str:
    """How the settings `now` differ from those that a job was started with, for messages; "" if they are equal.

    Only the names in `now` are compared.
    """
    names = [name for name in now if name not in ignore and begun.get(name) != now[name]]
    return "; ".join(f"{name} was {show(begun.get(name))}, is {show(now[name])}" for name in names)


class Parts:
    """Part files of several ranks in one folder. The ranks wait for each other through files only, since a wait of
    hours is longer than a collective's time-out.

        job.json              digest of the settings
        part-00003.jsonl      rows of rank 3
        rank-3-of-8.done      rank 3 has done its share of 8
    """

    def __init__(self, folder: Path, settings: Any, rank: int = 0) -> None:
        """Open the folder. Rank 0 empties it if it belongs to other settings; the other ranks wait for that."""
        self.folder = folder
        stamp = {"settings": digest_of(settings)}
        note = folder / "job.json"
        while not (note.exists() and json.loads(note.read_text(encoding="utf-8")) == stamp):
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_json(note, stamp)
            else:
                time.sleep(WAIT)

    def log(self, rank: int = 0) -> RowLog:
        """The part file of one rank, for appending."""
        return RowLog(self.folder / f"part-{rank:05d}.jsonl")

    def paths(self) -> list[Path]:
        """All part files, in the order of the ranks."""
        return sorted(self.folder.glob("part-*.jsonl"))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in all part files, without an incomplete last line (a rank is writing, or was killed)."""
        for path in self.paths():
            with open(path, "rb") as lines:
                yield from (json.loads(line) for line in lines if line.endswith(b"\n"))

    def is_finished(self, rank: int, world: int) -> bool:
        return (self.folder / f"rank-{rank}-of-{world}.done").exists()

    def finish(self, rank: int, world: int) -> None:
        """Note that a rank has done its share."""
        (self.folder / f"rank-{rank}-of-{world}.done").touch()

    def wait(self, world: int) -> None:
        """Return when all ranks have done their share."""
        while not all(self.is_finished(rank, world) for rank in range(world)):
            time.sleep(WAIT)


class Job:
    """One output and the files of its unfinished work. Only rank 0 writes the header."""

    def __init__(self, out: str | os.PathLike[str], rank: int = 0) -> None:
        self.out, self.rank = Path(out), rank
        self.header_path = Path(f"{self.out}.meta.json")
        self.skipped_path = Path(f"{self.out}{SKIPPED_SUFFIX}")
        self.parts_folder = Path(f"{self.out}.parts")
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(lock_job(self.out, self.rank))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @cached_property
    def log(self) -> RowLog:
        """The output itself as an append-only log."""
        return self._open.enter_context(RowLog(self.out))

    @cached_property
    def skipped(self) -> SkippedLog:
        """The rows that are left out."""
        return self._open.enter_context(SkippedLog(self.out))

    def header(self) -> dict[str, Any] | None:
        """The content of `<out>.meta.json`; None if there is none."""
        if not self.header_path.exists():
            return None
        try:
            return dict(json.loads(self.header_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise JobError(f"{self.header_path}: is not a JSON object ({error}); remove it") from error

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the settings into the header; if there is one already, raise JobError if its settings differ."""
        if self.header() is not None or (self.out.exists() and self.out.stat().st_size):
            self.require_same(self.require_header(), settings)
        elif self.rank == 0:
            write_json(self.header_path, settings)

    def require_header(self) -> dict[str, Any]:
        """The content of `<out>.meta.json`; raises JobError if there is none."""
        header = self.header()
        if header is None:
            raise JobError(
                f"{self.out}: exists, but {self.header_path}, which says how it was made, does not; "
                "choose another --out"
            )
        return header

    def require_same(self, begun: dict[str, Any], settings: dict[str, Any], ignore: Collection[str] = ()) -> None:
        """Raise JobError if `settings` differ from those that the job was started with."""
        if changes := differences(begun, settings, ignore):
            raise JobError(
                f"{self.out}: was started with other settings ({changes}); give the settings it was started with, "
                f"choose another --out, or remove {self.out} and {self.header_path}"
            )

    def count_done(self, inputs: Iterable[dict[str, Any]], key: str, *answers: str) -> int:
        """How many of `inputs`, from the first on, are done: they are in the log, in this order, or were skipped.

        An input's field `key` identifies it. A row of the log has the input's fields and the fields `answers`. Raises
        JobError if the log holds other rows.
        """
        if not self.log.path.stat().st_size:  # no input could be used: try all again, as they may have been repaired
            self.skipped_path.unlink(missing_ok=True)
        rows = (row for _, row in read_rows(self.log.path))
        row = next(rows, None)
        count = 0
        for given in inputs:
            if row is not None and given[key] == row.get(key):
                changed = [
                    name for name in {**row, **given} if name not in answers and given.get(name) != row.get(name)
                ]
                if changed:
                    raise JobError(
                        f"{self.out}: {key} {show(given[key])} was answered when its {changed[0]} was "
                        f"{show(row.get(changed[0]))}; choose another --out or remove it"
                    )
                row = next(rows, None)
            elif given[key] not in self.skipped:
                break
            count += 1
        if row is not None:
            raise JobError(
                f"{self.out}: holds {key} {show(row.get(key))} where the input has another; choose another "
                "--out or remove it"
            )
        return count

    def report(self, used: int, total: int, what: str) -> None:
        """Print that `used` of `total` inputs are done; raise JobError if none is. what: such as "rows answered"."""
        self.log.require_there()
        summary = f"{self.out}: {used} of {total} {what}"
        summary += f"; {self.skipped.count} skipped, see {self.skipped_path}" if self.skipped.count else ""
        if total and not used:
            raise JobError(summary)
        print(summary)

    def parts(self, settings: Any) -> Parts:
        """The folder of unfinished part files of a job with these settings."""
        return Parts(self.parts_folder, settings, self.rank)

    def finish(self, whole: Path, header: dict[str, Any] | None = None) -> None:
        """Write the header, give the file `whole` the output's name, and remove the part files."""
        if header is not None:
            write_json(self.header_path, header)
        os.replace(whole, self.out)
        shutil.rmtree(self.parts_folder, ignore_errors=True)


# --- threads ----------------------------------------------------------------------------------------------
def in_order(pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """The result of `work` for each item, in order; at most `ahead` items are started before they are needed."""
    futures: deque[Future[Out]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(work, item))
            if len(futures) >= ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:  # the consumer has failed: start no more items
            future.cancel()
