"""The digest depends on the tensors, not on their division into files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from blsp.weights import digest
from blsp.weights.digest import Weights, find_weights, tensor_digest
from blsp.weights.embedded import EmbeddedWeightsError
from blsp.weights.folder import WeightsNotFoundError
from blsp.weights.shipped import find_model, model_digest

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLSP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, tensors: Tensors, model_type: str = "llama", shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def some_tensors(prefix: str = "") -> Tensors:
    rng = np.random.default_rng(0)
    return {f"{prefix}layers.{i}.weight": rng.standard_normal((3, i + 1)).astype(np.float32) for i in range(5)}


def test_it_is_the_hash_that_the_docstring_says(tmp_path: Path) -> None:
    tensors = some_tensors()
    expected = hashlib.sha256()
    for name in sorted(tensors):
        expected.update(f"{name} F32 {list(tensors[name].shape)}\n".encode() + tensors[name].tobytes())
    assert tensor_digest(write(tmp_path / "m", tensors)) == expected.hexdigest()


def test_shards_do_not_matter(tmp_path: Path) -> None:
    tensors = some_tensors()
    whole, sharded = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors, shards=3)
    (sharded / "consolidated.safetensors").write_bytes(b"not in the index, not read")
    assert tensor_digest(whole) == tensor_digest(str(sharded))


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_every_part_matters(tmp_path: Path, change: str) -> None:
    tensors = some_tensors()
    changed = dict(tensors)
    first = changed.pop("layers.0.weight")
    if change == "value":
        first = np.nextafter(first, np.float32(np.inf))
    if change == "dtype":
        first = first.view(np.int32)
    if change == "shape":
        first = first.reshape(1, 3)
    changed["layers.zero.weight" if change == "name" else "layers.0.weight"] = first
    assert tensor_digest(write(tmp_path / "a", tensors)) != tensor_digest(write(tmp_path / "b", changed))


def test_a_full_whisper_and_its_encoder_agree(tmp_path: Path) -> None:
    others = some_tensors("model.decoder.") | {"proj_out.weight": np.ones((2, 2), np.float32)}
    digests = {
        tensor_digest(write(tmp_path / "hub", some_tensors("model.encoder.") | others, "whisper")),
        tensor_digest(write(tmp_path / "bare", some_tensors("encoder."), "whisper")),
        tensor_digest(write(tmp_path / "tower", some_tensors(), "whisper", shards=2)),
    }
    assert len(digests) == 1
    full = write(tmp_path / "llm", some_tensors("model.encoder.") | others, "llama")
    assert tensor_digest(full) not in digests


def age(folder: Path, seconds: int) -> None:
    for file in folder.iterdir():
        past = file.stat().st_mtime_ns - seconds * 10**9
        os.utime(file, ns=(past, past))


def test_it_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", some_tensors())
    age(folder, 60)
    first = tensor_digest(folder)
    with monkeypatch.context() as patch:
        patch.setattr(digest, "_hash_tensors", lambda *_: pytest.fail("hashed again"))
        assert tensor_digest(folder) == first
    save_file(some_tensors() | {"more": np.ones(1, np.float32)}, folder / "model.safetensors")
    assert tensor_digest(folder) != first


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    tensor_digest(write(tmp_path / "m", some_tensors()))
    assert not (own_cache / "digests").exists()


def test_no_weights_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFoundError, match=r"empty/model\.safetensors"):
        tensor_digest(tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFoundError, match="no-such-owner/no-such-model"):
        tensor_digest("no-such-owner/no-such-model")


def test_a_torn_file_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", some_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        tensor_digest(folder)


def test_large_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "matrix": rng.standard_normal((7, 5)).astype(np.float16),
        "vector": rng.standard_normal(11).astype(np.float32),
        "number": np.array(3, np.int64),
        "nothing": np.zeros((0, 4), np.float32),
        "no_columns": np.zeros((4, 0), np.float32),
    }
    whole = tensor_digest(write(tmp_path / "a", tensors))
    monkeypatch.setattr(digest, "CHUNK", 20)
    assert tensor_digest(write(tmp_path / "b", tensors)) == whole


@pytest.mark.parametrize("model", ["blsp-tiny", "blsp-small", "blsp-base", "blsp-conv", "blsp-romance"])
@pytest.mark.parametrize("part", ["audio", "text"])
@pytest.mark.embedded
def test_shipped_adapters_keep_their_digests(model: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were stored by an earlier reader of the files: the digest must never change."""
    monkeypatch.undo()  # the cache of the embedded weights is where it always is
    config = json.loads((Path(__file__).parents[2] / "models" / model / "config.json").read_text())
    try:
        folder = Path(find_weights(config[f"{part}_model_id"]).folder)
    except EmbeddedWeightsError as error:
        pytest.skip(str(error))
    hashed = digest._hash_tensors(digest.weight_files(folder), encoder_only=part == "audio")
    assert hashed == config[f"{part}_model_sha256"]


def test_a_name_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", some_tensors())
    weights = find_weights(folder)
    assert weights == Weights(str(folder), str(folder))
    first = weights.sha256
    monkeypatch.setattr(digest, "tensor_digest", lambda name: pytest.fail("taken again"))
    assert weights.sha256 == first


def test_a_tilde_is_expanded_in_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write(tmp_path / "m", some_tensors())
    assert find_weights("~/m") == Weights("~/m", str(folder))
    assert find_weights("~/m").sha256 == tensor_digest(folder)
    (folder / "config.json").write_text("{}")
    assert find_model("~/m") == str(folder)
    assert model_digest("~/m") == model_digest(str(folder)) is not None


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./whisper",
        "../whisper",
        "~/whisper",
        "runs/x/adapter",
        "here/whisper",
        "models/mine",
        "runs/x",
    ],
)
def test_a_path_that_is_not_there_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name_of_call in ("snapshot_download", "get_session"):
        monkeypatch.setattr(f"huggingface_hub.{name_of_call}", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        find_weights(name)
    monkeypatch.setattr(digest, "require_on_hub", lambda name: None)
    assert find_weights("openai/whisper-small").folder == "openai/whisper-small"
    assert find_weights("gpt2").folder == "gpt2"
