"""Files are written completely or not at all, and digests depend only on the content."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blsp.data.files import digest_of, file_digest, text_digest, write_atomically, write_json, write_text


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_whole_or_not_at_all(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first", durable=durable)
    with pytest.raises(RuntimeError), write_atomically(path, durable=durable) as partial:
        partial.write_text("half")
        assert path.read_text() == "first" and partial.suffix == ".txt"
        raise RuntimeError
    assert path.read_text() == "first"
    write_text(path, "é", durable=durable)
    assert path.read_bytes() == "é".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with write_atomically(tmp_path / "folder", durable=True) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    with pytest.raises(RuntimeError), write_atomically(tmp_path / "folder") as partial:
        partial.mkdir()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["two"]


def test_weights_are_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read; a shared cache of weights was of no use to others."""
    with write_atomically(tmp_path / "folder") as partial:
        partial.mkdir()
        save_file({"a": torch.zeros(1)}, partial / "model.safetensors")
        (partial / "config.json").write_text("{}")
    modes = {file.stat().st_mode for file in (tmp_path / "folder").iterdir()}
    assert len(modes) == 1


def test_two_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    threads = [
        threading.Thread(target=lambda n=n: [write_json(path, [n] * 1000) for _ in range(20)])  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(json.loads(path.read_text()))) == 1 and os.listdir(tmp_path) == ["a.json"]


def test_digests(tmp_path: Path) -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    assert digest_of({"path": Path("x")}) == digest_of({"path": "x"})
    assert text_digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert len({file_digest(one), file_digest(two), file_digest(one, two), file_digest(two, one)}) == 4
