"""The `Listener`: answers, streams, a limited cache of prefixes, and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import speech_like

from blsp.cli import parse
from blsp.data.audio import AudioError, write_wav
from blsp.evaluation.tasks import Task
from blsp.inference.listener import PREFIXES_KEPT, Listener, Question, load, load_options
from blsp.llm.decoding import Request, Result, decode
from blsp.llm.language_model import embed
from blsp.model.checkpoint import CheckpointError
from blsp.settings import GenerateSettings

ADAPTERS = pytest.mark.parametrize("adapter", ["conv", "stack", "grounded"])


@ADAPTERS
def test_a_stream_is_the_answer(listener_of, adapter: str) -> None:
    listener = listener_of(adapter)
    for seed, instruction in enumerate(("", "Please repeat:")):
        clip = speech_like(1.0, seed)
        pieces = list(listener.stream(clip, instruction, max_new_tokens=20))
        assert "".join(pieces) == listener.answer(clip, instruction, max_new_tokens=20)
        assert len(pieces) > 1
    assert list(listener.stream(clip * 0)) == [listener.model.config.no_speech_sentence]


def test_clips_come_as_path_bytes_or_array(listener_of, tmp_path: Path) -> None:
    listener = listener_of("conv")
    write_wav(tmp_path / "a.wav", speech_like(0.7))
    from blsp.data.audio import load_audio

    path = tmp_path / "a.wav"
    answers = {listener.answer(clip) for clip in (path, str(path), path.read_bytes(), load_audio(path))}
    assert len(answers) == 1
    with pytest.raises(AudioError, match=r"absent\.wav"):
        listener.answer(tmp_path / "absent.wav")


def test_arrays_of_integers_and_of_channels_are_speech_too(listener_of) -> None:
    listener = listener_of("grounded")
    clip = np.round(speech_like(0.7) * 32768).astype(np.int16)
    expected = listener.transcribe(clip.astype(np.float32) / 32768)
    assert expected
    stereo = np.stack([clip, clip], axis=1)
    assert [listener.transcribe(array) for array in (clip, stereo, stereo.T)] == [expected] * 3
    with pytest.raises(AudioError, match="one or two axes"):
        listener.transcribe(clip[None, None])


def test_speech_and_text_are_asked_side_by_side(listener_of) -> None:
    listener = listener_of("grounded")
    questions = [
        Question(audio=speech_like(1.0, 1)),
        Question(text="hello world"),
        Question(audio=speech_like(1.0) * 0),
        Question(audio=speech_like(0.4, 2), instruction="repeat", order="speech-first"),
    ]
    together = listener.generate(questions)
    assert together == [listener.generate([question])[0] for question in questions]
    assert together[2] == listener.model.config.no_speech_sentence
    assert listener.generate([]) == []


def test_the_llm_is_given_its_choice_where_the_configuration_says_so(listener_of, monkeypatch) -> None:
    listener, clips = listener_of("grounded"), [speech_like(1.0, 1), speech_like(1.0) * 0]
    greedy, silence = listener.embed_audio(clips)
    monkeypatch.setattr(listener.model.config, "rescore", True)
    monkeypatch.setattr("blsp.model.hypotheses.LENGTH", 100.0)  # an untrained read-out would rather say nothing
    chosen, silent = listener.embed_audio(clips)
    assert listener.readout([chosen]) == [listener.transcribe(clips[0], method="rescored")]
    assert chosen.token_ids and torch.equal(chosen.vectors, embed(listener.model, chosen.token_ids))
    assert silent.speech is silence.speech is False
    assert torch.equal(listener.embed_audio(clips, rescore=False)[0].vectors, greedy.vectors)


def test_prefixes_are_kept_within_bounds(listener_of) -> None:
    shared = listener_of("conv")
    listener = Listener(shared.model, shared.processor)
    for number in range(PREFIXES_KEPT + 5):
        listener.prefixes.get((3, 4, 5 + number))
    first = listener.prefixes.get((3, 4, 5 + PREFIXES_KEPT))
    assert listener.prefixes.get((3, 4, 5 + PREFIXES_KEPT)) is first
    assert len(listener.prefixes) == PREFIXES_KEPT
    assert listener.prefixes.get(()) is None


def test_read_out_needs_an_adapter_that_reads_out(listener_of) -> None:
    listener = listener_of("conv")
    assert not listener.reads_out
    with pytest.raises(ValueError, match="does not read out"):
        listener.transcribe(np.ones(16000, dtype=np.float32) * 0.1, method="readout")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    import blsp

    with pytest.raises(CheckpointError, match=r"no config\.json"):
        blsp.load(tmp_path)


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_frozen_parts_in_bfloat16(tiny_models_folder: Path, tmp_path: Path, adapter: str) -> None:
    """The adapter stays in float32 between them, on every route."""
    from support.tiny_models import tiny_blsp

    from blsp.distributed import find_runtime
    from blsp.inference.conversation import Conversation
    from blsp.model.checkpoint import load_blsp, save_adapter
    from blsp.model.configuration_blsp import AUDIO_TOKEN

    save_adapter(*tiny_blsp(tiny_models_folder, adapter=adapter), tmp_path / "adapter")
    listener = Listener(*load_blsp(tmp_path / "adapter", find_runtime("cpu", "bfloat16")))
    assert listener.model.lm_head.weight.dtype == torch.bfloat16
    assert next(listener.model.model.multi_modal_projector.parameters()).dtype == torch.float32
    clip = speech_like(1.0)
    assert listener.answer(clip, max_new_tokens=5) == "".join(listener.stream(clip, max_new_tokens=5))
    talk = Conversation(listener)
    for _ in range(2):
        assert isinstance("".join(talk.ask(*listener.embed_audio([clip]), "what?")), str)
    inputs = listener.processor(text=f"say{AUDIO_TOKEN}", audio=clip, sampling_rate=16000)
    assert listener.model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_answers_have_the_papers_128_tokens(listener_of) -> None:
    """Without a stop token, an answer is as long as the zero-shot setting allows, however it is asked for."""
    shared = listener_of("conv")
    listener = Listener(shared.model, shared.processor)
    assert listener.decoding.max_new_tokens == 128
    listener.decoding = replace(listener.decoding, stop_ids=())
    lengths = []

    def counted(model: torch.nn.Module, requests: list[Request], batch_size: int) -> dict[object, Result]:
        results = decode(model, requests, batch_size)
        lengths.extend(len(result.ids) for result in results.values())
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blsp.inference.listener.decode", counted)
        answer = listener.answer(speech_like(0.5))
        listener.generate([Question(text="hello")])
    assert lengths == [128, 128]
    assert "".join(listener.stream(speech_like(0.5))) == answer
    assert GenerateSettings(manifest="in.jsonl", out=Path("out.jsonl")).max_new_tokens == 128
    assert Task("t", "chat", "in.jsonl").max_new_tokens == 128


@pytest.mark.parametrize(("flag", "expected"), [("auto", False), ("always", True), ("never", False)])
def test_the_flag_says_whether_the_llm_chooses(pair_of, monkeypatch, flag: str, expected: bool) -> None:
    model, processor = pair_of("grounded")
    monkeypatch.setattr(model.config, "rescore", flag == "never")
    monkeypatch.setattr("blsp.inference.listener.load_blsp", lambda *_: (model, processor))
    settings = parse("generate", ["--manifest", "m", "--out", "o", "--rescore", flag])
    assert load("any", **load_options(settings)).model.config.rescore is expected
