"""How the frozen parts of an adapter are found, and the errors about parts that cannot be used."""

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_language_model, speech_like, tiny_blsp

from blsp import cli
from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.model.checkpoint import export_merged, load_blsp, save_adapter
from blsp.model.configuration_blsp import CheckpointError
from blsp.model.modeling_blsp import BlspForConditionalGeneration

F32 = find_runtime("cpu", "float32")


@pytest.fixture
def home(tiny_models_folder: Path, tmp_path: Path) -> Path:
    """A folder with `llama`, `whisper` and `runs/x/adapter`, which names them by paths relative to the folder."""
    model, processor = tiny_blsp(tiny_models_folder, runtime=F32)
    home = tmp_path / "home"
    for part in ("llama", "whisper"):
        shutil.copytree(tiny_models_folder / part, home / part)
    model.config.audio_model_id, model.config.text_model_id = "whisper", "llama"
    save_adapter(model, processor, home / "runs/x/adapter")
    return home


def test_relative_names_are_found_from_the_adapter_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    for folder, adapter in ((home, "runs/x/adapter"), (elsewhere, "../home/runs/x/adapter")):
        monkeypatch.chdir(folder)
        model, _ = load_blsp(adapter, F32)
        assert Path(model.config.text_model_id, "config.json").is_file()


@pytest.fixture
def moved(home: Path) -> Path:
    """The same folder after both frozen parts have been moved."""
    for part in ("llama", "whisper"):
        (home / part).rename(home.parent / f"moved-{part}")
    return home


def test_parts_that_have_moved_are_named_with_the_flag_that_finds_them(moved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter: whisper: .*say with --audio-model where"):
        load_blsp(moved / "runs/x/adapter", F32)
    with pytest.raises(CheckpointError, match=r"adapter: llama: .*say with --llm where"):
        load_blsp(moved / "runs/x/adapter", F32, audio_model=str(moved.parent / "moved-whisper"))


def test_moved_parts_are_loaded_from_where_they_lie(moved: Path, tiny_models_folder: Path) -> None:
    folder, parts = moved / "runs/x/adapter", moved.parent
    places = {"audio_model": str(parts / "moved-whisper"), "llm": str(parts / "moved-llama")}
    model, _ = load_blsp(folder, F32, **places)
    again = BlspForConditionalGeneration.from_pretrained(folder, **places)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert model.config.text_model_id == places["llm"]  # a folder that is written now names it
    save_language_model(parts / "other", "llama", seed=7)
    with pytest.raises(CheckpointError, match=r"other weights than --llm .*other holds now"):
        load_blsp(folder, F32, **places | {"llm": str(parts / "other")})


def test_a_merged_model_has_its_own_parts(tiny_models_folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_blsp(tiny_models_folder, runtime=F32)
    export_merged(model, processor, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds its own encoder and LLM"):
        load_blsp(tmp_path / "merged", F32, llm=str(tiny_models_folder / "llama"))


@pytest.mark.parametrize("command", ["generate", "transcribe", "chat", "export", "align", "serve", "evaluate"])
def test_every_command_takes_the_places_of_the_frozen_parts(
    moved: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The LLM's place is wrong, so that each command stops when it has loaded the adapter."""
    write_wav(moved / "a.wav", speech_like(0.5))
    (moved / "rows.jsonl").write_text('{"id": "a", "audio": "a.wav", "text": "hello", "reference": "hello"}\n')
    (moved / "task.yaml").write_text("name: mine\nkind: asr\nmanifest: rows.jsonl\nlanguage: en\n")
    monkeypatch.chdir(moved)
    flags = {
        "generate": ["--manifest", "rows.jsonl", "--out", "out.jsonl"],
        "transcribe": ["a.wav"],
        "chat": [],
        "export": ["--out", "merged"],
        "align": ["--manifest", "rows.jsonl", "--cache", "features"],
        "serve": ["--port", "0"],
        "evaluate": ["--task", "task.yaml", "--out", "results"],
    }
    save_language_model(moved / "other", "llama", seed=7)
    places = ["--audio-model", str(moved.parent / "moved-whisper"), "--llm", "other"]
    assert cli.main([command, *flags[command], "--model", "runs/x/adapter", *places]) == cli.FAILED
    assert "other weights than --llm other holds now" in capsys.readouterr().err
