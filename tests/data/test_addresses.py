"""Audio inside tar, Parquet and Arrow files, in a byte range, and behind URLs equals that of the plain file."""

from __future__ import annotations

import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
import soundfile
from support.object_stores import http_files, registered_store, s3_bucket

from blsp.data import addresses
from blsp.data.addresses import Address, AddressError, Shard, audio_size, is_address, parse_address, read_address
from blsp.data.audio import AudioError, load_audio, probe_audio
from blsp.data.manifest import Manifest, write_manifest


def clip(number: int, container: str = "FLAC") -> bytes:
    """A second of noise, or a little more."""
    out = io.BytesIO()
    noise = 0.1 * np.random.default_rng(number).standard_normal(16_000 + 700 * number)
    soundfile.write(out, noise, 16_000, format=container)
    return out.getvalue()


CLIPS = [clip(number) for number in range(5)]


def tar_of(clips: list[bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for number, data in enumerate(clips):
            for name, content in ((f"a/{number}.flac", data), (f"a/{number}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def same(address: str, data: bytes) -> bool:
    return np.array_equal(load_audio(address), load_audio(data))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["file", "memory", "http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[object]:
    """`store(name, data)` keeps a file and gives its path or URL."""
    if request.param == "file":
        yield lambda name, data: ((tmp_path / name).write_bytes(data), str(tmp_path / name))[1]
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        yield lambda name, data: (memory.pipe(f"/{tmp_path.name}/{name}", data), f"memory://{tmp_path.name}/{name}")[1]
        memory.rm(f"/{tmp_path.name}", recursive=True)
    elif request.param == "http":
        files: dict[str, bytes] = {}
        with http_files(files) as base:
            yield lambda name, data: (files.__setitem__(name, data), f"{base}/{name}")[1]
    else:
        folder = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        s3 = fsspec.filesystem("s3")
        yield lambda name, data: (s3.pipe(f"{folder}/{name}", data), f"{folder}/{name}")[1]


# --- the forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "address"),
    [
        ("a.wav", Address("a.wav")),
        ("a#1.wav", Address("a#1.wav")),
        ("a.tar#bytes=5", Address("a.tar#bytes=5")),
        ("a.tar#bytes=5+9", Address("a.tar", span=(5, 9))),
        ("s3://b/a.tar#member=x/#1&2.wav", Address("s3://b/a.tar", member="x/#1&2.wav")),
        ("a.parquet#row=3", Address("a.parquet", row=3)),
        ("a.parquet#row=3&column=clip", Address("a.parquet", row=3, column="clip")),
    ],
)
def test_the_forms_of_an_address(audio: str, address: Address) -> None:
    assert parse_address(audio) == address


def test_paths_and_data_uris_are_no_addresses() -> None:
    assert not any(
        is_address(each) for each in ("a.wav", "/a:b/c.wav", "data:audio/wav;base64,://", "", Path("a#row=1"))
    )
    assert is_address("zip://a.wav::clips.zip") and is_address("a.tar#member=b")


def test_addresses_in_a_manifest(tmp_path: Path) -> None:
    audio = ["clips/a.tar#member=b", "s3://bucket/a.wav", "/abs/a.parquet#row=1", "zip://a.wav::/c.zip"]
    rows = [{"id": str(n), "audio": each, "text": "x"} for n, each in enumerate(audio)]
    write_manifest(tmp_path / "rows.jsonl", rows)
    assert [row.audio for row in Manifest(tmp_path / "rows.jsonl")] == [f"{tmp_path}/{audio[0]}", *audio[1:]]


# --- the same samples from everywhere -----------------------------------------------------------------------


def test_a_whole_file(store: object) -> None:
    path = store("a.flac", CLIPS[0])  # type: ignore[operator]
    assert same(path, CLIPS[0])
    assert probe_audio(path) == probe_audio(CLIPS[0])
    assert np.array_equal(load_audio(path, start=0.3, duration=0.2), load_audio(CLIPS[0], start=0.3, duration=0.2))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_long_file_is_fetched_in_parts(container: str, store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "MOST_BYTES_AT_ONCE", 1000)
    data = clip(1, container)
    path = store(f"a.{container}", data)  # type: ignore[operator]
    assert same(path, data)
    assert np.array_equal(load_audio(path, start=0.5), load_audio(data, start=0.5))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_members_of_a_tar_file(mode: str, store: object) -> None:
    path = store("shard.tar", tar_of(CLIPS, mode))  # type: ignore[operator]
    for number in (0, 1, 3, 2, 0, 4):
        assert same(f"{path}#member=a/{number}.flac", CLIPS[number])


def test_a_span_of_bytes(store: object) -> None:
    path = store("clips.bin", b"".join(CLIPS))  # type: ignore[operator]
    first = 0
    for data in CLIPS:
        assert same(f"{path}#bytes={first}+{len(data)}", data)
        assert audio_size(f"{path}#bytes={first}+{len(data)}") == len(data)
        first += len(data)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("plain", [True, False])
def test_rows_of_a_table(kind: str, plain: bool, store: object) -> None:
    pa = pytest.importorskip("pyarrow")
    values = CLIPS if plain else [{"bytes": data, "path": "x.flac"} for data in CLIPS]
    table, out = pa.table({"clip": values, "text": ["x"] * len(CLIPS)}), io.BytesIO()
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, out, row_group_size=2)
    else:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    path = store(f"part.{kind}", out.getvalue())  # type: ignore[operator]
    for number in (0, 1, 4, 3):
        assert same(f"{path}#row={number}&column=clip", CLIPS[number])
    for address, message in (
        ("row=5&column=clip", "5 rows"),
        ("row=0", "no column 'audio'"),
        ("row=0&column=text", "no b"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(f"{path}#{address}")


def test_a_file_inside_a_zip_inside_a_store(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.writestr("a.flac", CLIPS[0])
    assert same(f"zip://a.flac::{tmp_path}/clips.zip", CLIPS[0])


# --- reading in order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("form", ["member", "bytes"])
def test_rows_in_order_read_a_shard_once_and_forward(
    mode: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (mode, form) == ("w:gz", "bytes"):
        pytest.skip("a compressed tar has no spans")
    path = tmp_path / f"shard-{form}.tar"
    path.write_bytes(tar_of(CLIPS, mode))
    opened: list[Shard] = []
    monkeypatch.setattr(addresses, "Shard", lambda name: opened.append(Shard(name)) or opened[-1])
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith("flac")]
    names = [f"member={m.name}" if form == "member" else f"bytes={m.offset_data}+{m.size}" for m in members]
    places: list[int] = []
    for name in names:
        read_address(f"{path}#{name}")
        (shard,) = opened  # one shard, kept open
        places.append(shard._file.tell())
    assert places == sorted(places)


def test_a_compressed_shard_is_not_begun_again_for_rows_a_little_out_of_order(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CLIPS, "w:gz"))
    shard = Shard(str(tmp_path / "shard.tar"))
    places = []
    for number in (1, 0, 3, 2, 4):
        assert shard.read(Address("", member=f"a/{number}.flac")) == CLIPS[number]
        places.append(shard._tar.fileobj.tell())  # type: ignore[union-attr]
    assert places == sorted(places) and not any(name.endswith("flac") for name in shard._passed)


def test_spans_and_members_of_one_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_of(CLIPS))
    with tarfile.open(path) as tar:
        spans = [f"bytes={member.offset_data}+{member.size}" for member in tar if member.name.endswith("flac")]
    for number in (3, 0, 4):
        assert read_address(f"{path}#{spans[number]}") == CLIPS[number]
        assert read_address(f"{path}#member=a/{number}.flac") == CLIPS[number]


def test_threads_share_a_shard(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CLIPS))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(CLIPS), 50):
            if read_address(f"{tmp_path}/shard.tar#member=a/{number}.flac") != CLIPS[number]:
                wrong.append(int(number))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_shard_that_has_changed_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_of(CLIPS[:1]))
    assert read_address(f"{path}#member=a/0.flac") == CLIPS[0]
    path.write_bytes(tar_of(CLIPS[3:4]))
    assert read_address(f"{path}#member=a/0.flac") == CLIPS[3]


def test_many_shards_leave_few_files_open(tmp_path: Path) -> None:
    for number in range(3 * addresses.SHARDS_KEPT):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(CLIPS[:1]))
        read_address(f"{tmp_path}/{number}.tar#member=a/0.flac")
    held = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert sum(path.is_relative_to(tmp_path) for path in held) <= addresses.SHARDS_KEPT


# --- missing files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("#member=a/9.flac", "no such member"),
        ("#member=a", "no such member"),
        ("#bytes=10+99999999", "ends .* bytes before"),
        ("#bytes=10+9999999999", "at most"),
        ("#bytes=0+4000", "cannot be read as audio"),
        ("#row=0", "cannot be read"),
    ],
)
def test_a_piece_that_is_not_there(piece: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CLIPS))
    with pytest.raises(AudioError, match=message) as refusal:
        load_audio(f"{tmp_path}/shard.tar{piece}")
    assert "shard.tar" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kept", [0, 100, 600, 5000, 30_000])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_that_is_cut_short(kept: int, mode: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CLIPS, mode)[:kept])
    with pytest.raises(AudioError, match=r"shard\.tar"):
        load_audio(f"{tmp_path}/shard.tar#member=a/4.flac")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/a.wav", "no such file"),
        ("http://127.0.0.1:9/a.wav", "no such file, or no answer"),
        ("nonsense://a.wav", "nonsense"),
        ("/nowhere/a.tar#member=b", "no such file"),
        ("file:///nowhere/a.wav", "no such file"),
    ],
)
def test_an_address_where_nothing_is(url: str, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        load_audio(url)
    assert audio_size(url) == 0


LONG = ["WAV", "FLAC", "OGG", "MP3", "AAC"]  # libsndfile, and FFmpeg


@pytest.mark.parametrize("protocol", ["gs", "hf", "az"])
def test_any_protocol_of_fsspec(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose package is not installed here are stood in for: what follows the URL is the same code."""
    files = {"a.flac": CLIPS[0], "shard.tar": tar_of(CLIPS), "shard.tar.gz": tar_of(CLIPS, "w:gz")}
    with registered_store(protocol, files) as url:
        assert same(f"{url}/a.flac", CLIPS[0])
        assert same(f"{url}/shard.tar#member=a/3.flac", CLIPS[3])
        assert same(f"{url}/shard.tar.gz#member=a/3.flac", CLIPS[3])
        assert audio_size(f"{url}/a.flac") == len(CLIPS[0])
        monkeypatch.setattr(addresses, "MOST_BYTES_AT_ONCE", 1000)
        assert np.array_equal(load_audio(f"{url}/a.flac", start=0.5), load_audio(CLIPS[0], start=0.5))
        with pytest.raises(AudioError, match=f"{protocol}://bucket/gone.wav: no such file"):
            load_audio(f"{url}/gone.wav")


def long_clip(container: str) -> bytes:
    """A minute of noise."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(60 * 16_000)
    out = io.BytesIO()
    if container != "AAC":
        soundfile.write(out, noise, 16_000, format=container)
        return out.getvalue()
    with av.open(out, "w", format="adts") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate = 16_000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    return out.getvalue()


@pytest.mark.parametrize("container", LONG)
@pytest.mark.parametrize("start", [0.0, 40.0])
def test_a_connection_that_breaks_is_said_in_one_line(
    container: str, start: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A decoder in C would take the failing read for the file's end, and print the backend's error."""
    monkeypatch.setattr(addresses, "MOST_BYTES_AT_ONCE", 1000)
    monkeypatch.setattr(addresses, "BLOCK_BYTES", 1 << 14)
    data = long_clip(container)
    message = r"^gs://bucket/a: cannot be read \(the connection was reset\)$"
    with registered_store("gs", {"a": data}, len(data) // 2) as url, pytest.raises(AudioError, match=message):
        load_audio(f"{url}/a", start=start)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["w", "parquet"])
def test_a_connection_that_breaks_in_a_shard(kind: str) -> None:
    data, piece = shard_of(kind)
    message = r"^gs://bucket/shard: cannot be read \(the connection was reset\)$"
    with registered_store("gs", {"shard": data}, len(data) // 2) as url, pytest.raises(AddressError, match=message):
        read_address(f"{url}/shard#{piece}")


def test_the_limits_hold_for_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CLIPS))
    with pytest.raises(AudioError, match="cut it"):
        load_audio(f"{tmp_path}/shard.tar#member=a/0.flac", longest=0.5)
    monkeypatch.setattr(addresses, "MOST_BYTES", 100)
    with pytest.raises(AudioError, match="at most 100"):
        load_audio(f"{tmp_path}/shard.tar#member=a/0.flac")


def test_a_missing_package_is_named() -> None:
    fsspec.register_implementation("gone", "gone_package.Files", clobber=True, errtxt="pip install gone-package")
    with pytest.raises(AddressError, match=r"that opens it is missing .*gone-package"):
        read_address("gone://bucket/a.wav")


# --- damage -----------------------------------------------------------------------------------------------


def shard_of(kind: str) -> tuple[bytes, str]:
    """A shard of this kind, and an address inside it."""
    if kind.startswith("w"):
        return tar_of(CLIPS, kind), "member=a/3.flac"
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out, table = io.BytesIO(), pa.table({"audio": CLIPS})
    if kind == "parquet":
        parquet.write_table(table, out, row_group_size=2)
    else:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue(), "row=3"


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "parquet", "arrow"])
@pytest.mark.parametrize("seed", range(12))
def test_damaged_shards_give_audio_or_an_audio_error(kind: str, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, piece = shard_of(kind)
    damaged = bytearray(data[: int(rng.integers(1, len(data) + 1))] if seed % 3 == 0 else data)
    for place in rng.integers(0, len(damaged), 1 + seed % 8):
        damaged[place] = rng.integers(0, 256)
    for end in (0, len(damaged) - 1):  # headers and footers
        if seed % 4 == 1:
            damaged[max(0, end - 300) : end] = rng.bytes(min(300, end))
    (tmp_path / "shard").write_bytes(damaged)
    try:
        assert np.isfinite(load_audio(f"{tmp_path}/shard#{piece}")).all()
    except AudioError as error:
        assert "shard#" in str(error) and "\n" not in str(error)
