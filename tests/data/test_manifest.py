"""Manifests: rows are read as they were written, memory does not grow, and errors name the file and the line."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.watched_connections import WatchedConnection

from blsp.data import row_index
from blsp.data.files import read_rows
from blsp.data.manifest import CONTINUATION_KEY, Manifest, ManifestError, Utterance, write_manifest
from blsp.data.row_index import index_path

GOOD = b'{"id": "a", "audio": "a.wav", "text": "one"}\n{"id": "b", "audio": "b.wav", "text": "two"}\n'


def rows(count: int, prefix: str = "row") -> list[Utterance]:
    return [Utterance(id=f"{prefix}-{i}", audio=f"clips/{i}.wav", text=f"text {i}") for i in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


# --- rows are read as they were written -------------------------------------------------------------------


def test_every_field_comes_back(path: Path, tmp_path: Path) -> None:
    full = Utterance(
        id="ü-1",
        audio="clips/1.wav",
        text='He said "hallo", \\ then\u2028left 😀',
        start=1.5,
        duration=2.0,
        language="en",
        speaker="s",
        reference="Er sagte hallo",
        options=("yes", "no"),
        instruction="Translate",
        extra={"no_speech": False, "nested": {"id": "other"}, "null": None},
    )
    write_manifest(path, [full, Utterance(id="text only", audio="", text="hi")])
    read = Manifest(path)
    assert read[0] == Utterance(**{**full.__dict__, "audio": str(tmp_path / "clips/1.wav")})
    assert read[1] == Utterance(id="text only", audio="", text="hi")
    assert read[1].to_json() == {"id": "text only", "audio": "", "text": "hi"}
    assert {hash(read[0]), hash(read[1])}
    assert Utterance.from_json(full.to_json()) == full


def test_audio_paths(path: Path, tmp_path: Path) -> None:
    kinds = ["clips/a.wav", "../b.wav", "/data/c.wav", "data:audio/wav;base64,UklGRg==", ""]
    write_manifest(path, [Utterance(id=str(i), audio=a, text="t") for i, a in enumerate(kinds)])
    expected = [f"{tmp_path}/clips/a.wav", f"{tmp_path}/../b.wav", *kinds[2:]]
    assert [row.audio for row in Manifest(path)] == expected
    write_manifest(path, Manifest(path), relative_to=tmp_path)
    assert json.loads(path.read_text().splitlines()[0])["audio"] == "clips/a.wav"
    assert [row.audio for row in Manifest(path)] == expected


def test_a_sequence(path: Path) -> None:
    write_manifest(path, rows(1000))
    read = Manifest(path)
    assert len(read) == 1000
    assert [row.id for row in read] == [row.id for row in rows(1000)] == [read[i].id for i in range(1000)]
    assert read[-1].id == "row-999" and [row.id for row in read[997:]] == ["row-997", "row-998", "row-999"]
    for place in (1000, -1001):
        with pytest.raises(IndexError):
            read[place]
    again = pickle.loads(pickle.dumps(read))
    assert again[5] == read[5] and len(again) == 1000


def test_globs_join_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for part in (2, 0, 1):
        write_manifest(tmp_path / f"part-{part}.jsonl", rows(10, prefix=str(part)))
        Manifest(tmp_path / f"part-{part}.jsonl")  # leaves an index, which is no part
    (tmp_path / "part-0.jsonl.skipped.jsonl").write_text('{"id": "x", "audio": "", "reason": "r"}\n')
    read = Manifest(tmp_path / "part-*")
    assert [row.id for row in read] == [f"{part}-{i}" for part in range(3) for i in range(10)]
    assert read[10].id == "1-0" and read[29].id == "2-9"


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a[1].jsonl", rows(3))
    assert len(Manifest(tmp_path / "a[1].jsonl")) == 3


def test_what_editors_do_to_files(path: Path) -> None:
    lines = [
        b'{"id": "a", "text": "1"}',
        b"",
        b"  \t ",
        b' {"text": "2", "id"  :  "b"}',
        b'{"text":"3","id":"\\u0063"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))  # byte order mark, CRLF, no newline at the end
    assert [(row.id, row.text) for row in Manifest(path)] == [("a", "1"), ("b", "2"), ("c", "3")]
    assert [line for line, _ in read_rows(path)] == [1, 4, 5]


# --- the index beside it ----------------------------------------------------------------------------------


def test_the_index_is_kept_and_remade(path: Path) -> None:
    write_manifest(path, rows(50))
    Manifest(path)
    beside = path.with_name("train.jsonl.idx")
    first = beside.stat()
    Manifest(path)
    assert beside.stat().st_mtime_ns == first.st_mtime_ns and beside.stat().st_ino == first.st_ino
    write_manifest(path, rows(60))
    assert len(Manifest(path)) == 60
    old = Manifest(path)
    content = path.read_bytes().replace(b"row-0", b"ROW-0")  # same size, and the same time:
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Manifest(path)[0].id == "ROW-0" and len(old) == 60
    for damage in (b"", b"BLSPIDX1", beside.read_bytes()[:-8], beside.read_bytes() + bytes(8), b"x" * 5000):
        beside.write_bytes(damage)
        assert len(Manifest(path)) == 60
    assert sorted(os.listdir(path.parent)) == ["train.jsonl", "train.jsonl.idx"]


def test_a_read_only_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(path, rows(50))
    real = sqlite3.connect

    def refuse(name: str | Path, *rest: Any, **more: Any) -> sqlite3.Connection:
        if Path(name).parent == path.parent:
            raise sqlite3.OperationalError("unable to open database file")
        return real(name, *rest, **more)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    assert [row.id for row in Manifest(path)] == [row.id for row in rows(50)]
    assert os.listdir(path.parent) == ["train.jsonl"]
    write_manifest(path, [*rows(3), *rows(1)])
    with pytest.raises(ManifestError, match=r"train.jsonl:4: .* is in .*train.jsonl:1 already"):
        Manifest(path)


def test_an_index_of_the_first_format_is_made_again(path: Path) -> None:
    write_manifest(path, rows(50))
    beside = index_path(path)
    header = np.array([int.from_bytes(b"BLSPIDX1", "little"), path.stat().st_size, 0, 0, 0, 50, 0, 0], "<u8")
    beside.write_bytes(header.tobytes() + bytes(16 * 50))
    assert [row.id for row in Manifest(path)] == [row.id for row in rows(50)]
    assert beside.read_bytes().startswith(b"SQLite format 3")


def test_several_processes_open_a_manifest_at_once(path: Path) -> None:
    write_manifest(path, rows(2000))
    code = "import sys; from blsp.data.manifest import Manifest; print(len(list(Manifest(sys.argv[1]))))"
    runs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) for _ in range(4)]
    assert [run.communicate()[0].strip() for run in runs] == [b"2000"] * 4
    assert sorted(os.listdir(path.parent)) == ["train.jsonl", "train.jsonl.idx"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_and_forked_processes_share_an_open_manifest(path: Path) -> None:
    write_manifest(path, rows(5000))
    read, expected = Manifest(path), [row.id for row in rows(5000)]

    def check(seed: int) -> bool:
        drawn = random.Random(seed).sample(range(5000), 300)
        return [read[number].id for number in drawn] == [expected[number] for number in drawn]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(check, range(4)))
    fork = multiprocessing.get_context("fork")  # children inherit the open files
    children = [fork.Process(target=lambda seed=seed: sys.exit(not check(seed))) for seed in range(3)]
    for child in children:
        child.start()
    assert check(9)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_threads_take_turns_in_the_index(path: Path) -> None:
    write_manifest(path, rows(200))
    read = Manifest(path)
    (index,) = read._indexes
    index._table = watched = WatchedConnection(index._table)
    with ThreadPoolExecutor(8) as threads:
        assert [row.id for row in threads.map(read.__getitem__, range(200))] == [row.id for row in rows(200)]
    assert watched.most == 1


def test_an_index_stays_right_when_both_files_are_renamed(path: Path) -> None:
    write_manifest(path, rows(50))
    Manifest(path)
    renamed = path.with_name("other.jsonl")
    os.replace(path, renamed)
    os.replace(index_path(path), index_path(renamed))
    before = index_path(renamed).stat().st_ino
    assert len(Manifest(renamed)) == 50 and index_path(renamed).stat().st_ino == before


def test_a_manifest_outlives_its_replacement(path: Path) -> None:
    write_manifest(path, rows(50))
    read = Manifest(path)
    write_manifest(path, rows(5, prefix="new"))
    assert [row.id for row in read] == [row.id for row in rows(50)]


# --- keys -------------------------------------------------------------------------------------------------


def test_ids_are_unique_in_a_file(path: Path) -> None:
    write_manifest(path, [*rows(1000), *rows(3, prefix="other"), Utterance(id="row-7", audio="", text="again")])
    with pytest.raises(ManifestError, match=r"train\.jsonl:1004: \"id\" 'row-7' is in .*train\.jsonl:8 already"):
        Manifest(path)
    with pytest.raises(ManifestError, match="already"):  # no index was left that would hide it
        Manifest(path)


def test_ids_are_unique_across_files(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", rows(30))
    write_manifest(tmp_path / "b.jsonl", [*rows(30, prefix="b"), *rows(1)])
    assert len(Manifest(tmp_path / "b.jsonl")) == 31
    with pytest.raises(ManifestError, match=r"b\.jsonl:31: .*row-0.* is in .*a\.jsonl:1 already"):
        Manifest(tmp_path / "*.jsonl")


def test_the_same_id_spelled_differently(path: Path) -> None:
    path.write_bytes(b'{"id": "abc", "text": ""}\n{"text": "", "id" : "\\u0061bc"}\n')
    with pytest.raises(ManifestError, match="'abc' is in"):
        Manifest(path)


def test_the_key_of_a_continuation(path: Path) -> None:
    behaviours = [{"id": "a", "text": "t", "behaviour": b, "order": o} for b in ("x", "y") for o in ("1", "2")]
    write_manifest(path, [*behaviours, {"id": "a", "text": "no behaviour"}])
    assert len(Manifest(path, key=CONTINUATION_KEY)) == 5
    with pytest.raises(ManifestError, match="must be unique"):
        Manifest(path)
    write_manifest(path, [*behaviours, behaviours[2]])
    with pytest.raises(ManifestError, match=r"\"id\" 'a', \"behaviour\" 'y', \"order\" '1' is in .*:3 already"):
        Manifest(path, key=CONTINUATION_KEY)


JSON_TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | JSON_TEXT | st.sampled_from(["id", '"id": "x"', "\\", '\\"id']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "b", 'i"d']), inner),
    max_leaves=6,
)


# --- constant memory --------------------------------------------------------------------------------------

MEASURE = """
import sys
from blsp.data.manifest import Manifest
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
rows = Manifest(sys.argv[1])
total = sum(len(row.text) for row in rows[::len(rows) // 1000])
print(len(rows), anonymous())
"""


def write_many(path: Path, count: int) -> None:
    with open(path, "w") as out:
        for first in range(0, count, 10_000):
            numbers = range(first, min(first + 10_000, count))
            out.writelines(
                f'{{"id": "clip-{i:09d}", "audio": "{i % 97}/{i}.flac", "text": "say {i}"}}\n' for i in numbers
            )


def anonymous_megabytes(path: Path) -> float:
    measured = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    return float(measured.stdout.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    write_many(tmp_path / "few.jsonl", 1_000)
    write_many(tmp_path / "many.jsonl", 1_000_000)
    few = anonymous_megabytes(tmp_path / "few.jsonl")
    many = anonymous_megabytes(tmp_path / "many.jsonl")  # indexed and checked for uniqueness
    again = anonymous_megabytes(tmp_path / "many.jsonl")  # the index is there
    assert many - few < 60 and again - few < 5, (few, many, again)  # MB


# --- malformed input: always a ManifestError that names file and line ---------------------------------------


def refused(path: Path, line: int | None) -> str:
    """The message, from whichever comes first: opening the manifest or reading its rows."""
    with pytest.raises(ManifestError) as raised:
        list(Manifest(path))
    message = str(raised.value)
    place = str(path) if line is None else f"{path}:{line}: "
    assert message.startswith(place) and "\n" not in message and len(message) < 700, message
    return message


BAD_ROWS: dict[str, bytes] = {
    "not JSON": b"hello",
    "half a row": b'{"id": "c", "audio": "c.wav", "te',
    "single quotes": b"{'id': 'c', 'audio': 'c.wav', 'text': 't'}",
    "trailing comma": b'{"id": "c", "audio": "c.wav", "text": "t",}',
    "two rows on a line": b'{"id": "c", "audio": "", "text": "t"}{"id": "d", "audio": "", "text": "t"}',
    "a list": b'["c", "c.wav", "t"]',
    "a string": b'"c"',
    "a number": b"17",
    "null": b"null",
    "an empty object": b"{}",
    "no id": b'{"audio": "c.wav", "text": "t"}',
    "nested id only": b'{"audio": "c.wav", "text": "t", "meta": {"id": "c"}}',
    "empty id": b'{"id": "", "audio": "c.wav", "text": "t"}',
    "null id": b'{"id": null, "audio": "c.wav", "text": "t"}',
    "number as id": b'{"id": 3, "audio": "c.wav", "text": "t"}',
    "only an id": b'{"id": "c"}',
    "number as text": b'{"id": "c", "audio": "c.wav", "text": 3}',
    "list as text": b'{"id": "c", "audio": "c.wav", "text": ["t"]}',
    "number as audio": b'{"id": "c", "audio": 3, "text": "t"}',
    "audio as object": b'{"id": "c", "audio": {"path": "c.wav"}, "text": "t"}',
    "string as start": b'{"id": "c", "audio": "c.wav", "text": "t", "start": "1.0"}',
    "boolean as start": b'{"id": "c", "audio": "c.wav", "text": "t", "start": true}',
    "negative start": b'{"id": "c", "audio": "c.wav", "text": "t", "start": -0.5}',
    "negative duration": b'{"id": "c", "audio": "c.wav", "text": "t", "duration": -3}',
    "zero duration": b'{"id": "c", "audio": "c.wav", "text": "t", "duration": 0}',
    "NaN duration": b'{"id": "c", "audio": "c.wav", "text": "t", "duration": NaN}',
    "infinite duration": b'{"id": "c", "audio": "c.wav", "text": "t", "duration": Infinity}',
    "1e999 duration": b'{"id": "c", "audio": "c.wav", "text": "t", "duration": 1e999}',
    "a huge integer": b'{"id": "c", "audio": "c.wav", "text": "t", "start": ' + b"9" * 400 + b"}",
    "a colossal integer": b'{"id": "c", "audio": "c.wav", "text": "t", "x": ' + b"9" * 5000 + b"}",
    "NaN elsewhere": b'{"id": "c", "audio": "c.wav", "text": "t", "score": NaN}',
    "options as string": b'{"id": "c", "audio": "c.wav", "text": "t", "options": "yes"}',
    "options of numbers": b'{"id": "c", "audio": "c.wav", "text": "t", "options": [1, 2]}',
    "language as list": b'{"id": "c", "audio": "c.wav", "text": "t", "language": ["en"]}',
    "latin-1": '{"id": "c", "audio": "c.wav", "text": "Grüße"}'.encode("latin-1"),
    "bad UTF-8 in the id": b'{"id": "c\xff\xfe", "audio": "c.wav", "text": "t"}',
    "a lone surrogate": b'{"id": "c", "audio": "c.wav", "text": "\\ud800"}',
    "a lone surrogate id": b'{"id": "\\udfff", "audio": "c.wav", "text": "t"}',
    "a control character": b'{"id": "c", "audio": "c.wav", "text": "a\x00b"}',
    "a tab in a string": b'{"id": "c", "audio": "c.wav", "text": "a\tb"}',
    "deep nesting": b'{"id": "c", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "unclosed nesting": b"[" * 100_000,
    "a comment": b"// the next row is a test",
    "zeros": bytes(300),
    "a byte order mark inside": b'\xef\xbb\xbf{"id": "c", "audio": "c.wav", "text": "t"}',
    "CSV": b"id,audio,text",
    "duplicate": b'{"id": "a", "audio": "c.wav", "text": "t"}',
    "duplicate, escaped": b'{"id": "\\u0061", "audio": "c.wav", "text": "t"}',
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("place", ["first", "middle", "last", "last, torn", "after blank lines"])
def test_bad_rows(kind: str, place: str, path: Path) -> None:
    bad, good = BAD_ROWS[kind], GOOD.splitlines()
    before, after, ending = [good[0]], [good[1]], b"\n"
    if place == "first":
        before, after = [], good
    elif place == "after blank lines":
        before = [good[0], b"", b"  ", b"\r"]
    elif place.startswith("last"):
        before, after, ending = good, [], b"" if "torn" in place else b"\n"
    lines = [*before, bad, *after]
    path.write_bytes(b"\n".join(lines) + ending)
    if kind == "a byte order mark inside" and place == "first":
        assert len(Manifest(path)) == 3
    elif "duplicate" in kind:
        refused(path, len(lines) - 1 if place == "first" else lines.index(bad) + 1)
    else:
        refused(path, lines.index(bad) + 1)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", bytes(10)])
def test_files_without_rows(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    refused(path, None)


def test_other_encodings(path: Path) -> None:
    path.write_bytes(GOOD.decode().encode("utf-16"))
    assert "UTF-8" in refused(path, 1)
    path.write_bytes(b"\x1f\x8b\x08" + random.Random(0).randbytes(500))
    refused(path, None)


def test_paths_that_are_no_manifests(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    for name in (str(missing), str(tmp_path / "*.jsonl"), str(tmp_path / "**/x"), "a\0b", "l" * 5_000, ""):
        with pytest.raises(ManifestError) as raised:
            Manifest(name)
        assert name[:50].strip("\0") in str(raised.value).replace("\\x00", "\0")
    with pytest.raises(ManifestError, match="is a folder"):
        Manifest(tmp_path)
    with pytest.raises(ManifestError, match=r"missing\.jsonl"):
        list(read_rows(missing))


def test_a_line_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "LONGEST_LINE", 1 << 20)
    path.write_bytes(b'{"id": "' + b"a" * (2 << 20))
    assert "longer than 1 MB" in refused(path, None)


def test_a_file_that_grows_while_it_is_indexed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(GOOD)
    real = row_index._key_digest

    def grow(*arguments: Any) -> bytes:
        with open(path, "ab") as out:
            out.write(b'{"id": "c", "text": "t"}\n')
        return real(*arguments)

    monkeypatch.setattr(row_index, "_key_digest", grow)
    assert "changed while" in refused(path, None)


def damage(generator: random.Random, whole: bytes) -> bytes:
    """One of the things that happen to text files."""
    place, length = generator.randrange(len(whole)), generator.randrange(1, 60)
    pieces = [
        b'"',
        b"\\",
        b"{",
        b"}",
        b"\n",
        b"\r\n",
        b"\xff",
        b"\xef\xbb\xbf",
        b":",
        b",",
        b"\0",
        b"null",
        b"-1e999",
        b"\n\n",
    ]
    ways: list[Callable[[], bytes]] = [
        lambda: whole[:place],
        lambda: whole[place:],
        lambda: whole[:place] + whole[place + length :],
        lambda: whole[:place] + generator.choice(pieces) + whole[place:],
        lambda: whole[:place] + generator.choice(pieces) + whole[place + 1 :],
        lambda: whole[:place] + generator.randbytes(length) + whole[place:],
        lambda: whole + whole[place:],
        lambda: whole.replace(b'"', generator.choice([b"'", b'""', b'\\"', "„".encode()])),
        lambda: whole[:place] + bytes(length) + whole[place + length :],
    ]
    return generator.choice(ways)()


@pytest.mark.parametrize("seed", range(6))
def test_damaged_manifests_are_read_or_refused(seed: int, path: Path) -> None:
    """300 damaged files: all their rows come out as utterances, or a ManifestError names the file."""
    generator = random.Random(seed)
    made = [Utterance(id=f"{i}", audio=f"{i}.wav", text=f'né "{i}"', duration=i + 0.5) for i in range(4)]
    write_manifest(path, made)
    whole = path.read_bytes()
    for _ in range(50):
        path.write_bytes(damage(generator, whole))
        try:
            read = Manifest(path)
            found = list(read)
        except ManifestError as error:
            assert str(error).startswith(str(path))
        else:
            assert len(found) == len(read) == len({row.id for row in found})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*Utterance.__dataclass_fields__, "other"]), JSON_VALUES | st.floats()))
def test_any_object_is_an_utterance_or_refused(row: dict[str, object]) -> None:
    try:
        utterance = Utterance.from_json(row, "file:3")
    except ManifestError as error:
        assert str(error).startswith("file:3: ")
    else:
        assert Utterance.from_json(utterance.to_json()) == utterance


# --- writing ----------------------------------------------------------------------------------------------


def test_a_manifest_appears_whole_or_not_at_all(path: Path) -> None:
    def half() -> object:
        yield from rows(3)
        raise RuntimeError("killed")

    write_manifest(path, rows(2))
    with pytest.raises(RuntimeError):
        write_manifest(path, half())  # type: ignore[arg-type]
    assert len(Manifest(path)) == 2
    with pytest.raises(ManifestError, match=r"train\.jsonl: the row 'x' cannot be written"):
        write_manifest(path, [{"id": "x", "score": float("nan")}])
    assert sorted(os.listdir(path.parent)) == ["train.jsonl", "train.jsonl.idx"]
