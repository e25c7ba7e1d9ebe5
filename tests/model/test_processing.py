"""The processor, and the ways of transformers to use it: chat templates, Auto classes, the any-to-any pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import speech_like, tiny_blsp
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, BatchFeature, pipeline

import blsp
from blsp.data.audio import write_wav
from blsp.distributed import find_runtime
from blsp.inference.conversation import lay_out, user_turn
from blsp.inference.listener import Listener, Question
from blsp.model.checkpoint import save_adapter
from blsp.model.configuration_blsp import AUDIO_TOKEN, BlspConfig
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor

CLIP = speech_like(1.3)


@pytest.fixture(scope="module", params=["conv", "grounded"])
def pair(request, tiny_models_folder: Path) -> tuple[BlspForConditionalGeneration, BlspProcessor]:
    return tiny_blsp(tiny_models_folder, adapter=request.param, runtime=find_runtime("cpu", "float32"))


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    blsp.register()
    model, processor = pair
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, processor, folder)
    return folder


def _messages(audio: object) -> list[dict]:
    parts = [{"type": "text", "text": "Please repeat:"}, {"type": "audio", "audio": audio}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


def _by_template(processor: BlspProcessor, messages: list, processor_kwargs: dict | None = None) -> BatchFeature:
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def test_a_conversation_with_parts_becomes_the_llms_own_prompt(pair) -> None:
    model, processor = pair
    inputs = _by_template(processor, _messages(CLIP))
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    heard = AUDIO_TOKEN * processor.num_audio_tokens(len(CLIP))
    expected = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nPlease repeat:{heard}<|im_end|>\n"
    assert text == expected + "<|im_start|>assistant\n"
    assert torch.isfinite(model(**inputs).logits).all()


def test_audio_by_path_is_the_same(pair, tmp_path: Path) -> None:
    _, processor = pair
    write_wav(tmp_path / "clip.wav", CLIP)
    by_path = processor(text=AUDIO_TOKEN, audio=str(tmp_path / "clip.wav"))
    by_array = processor(text=AUDIO_TOKEN, audio=blsp.load_audio(tmp_path / "clip.wav"), sampling_rate=16000)
    assert torch.equal(by_path["input_features"], by_array["input_features"])
    from_template = _by_template(processor, _messages(str(tmp_path / "clip.wav")))
    torch.testing.assert_close(from_template["input_features"], by_path["input_features"], rtol=0, atol=1e-5)


def test_what_datasets_and_torch_give_is_audio(pair) -> None:
    _, processor = pair
    expected = processor(text=AUDIO_TOKEN, audio=CLIP)["input_features"]
    for audio in ({"array": CLIP, "sampling_rate": 16000, "path": None}, torch.from_numpy(CLIP)):
        assert torch.equal(processor(text=AUDIO_TOKEN, audio=audio)["input_features"], expected)


def test_other_rates_are_resampled(pair) -> None:
    _, processor = pair
    inputs = processor(text=AUDIO_TOKEN, audio=np.repeat(CLIP, 2), sampling_rate=32000)
    assert inputs["input_features"].shape[2] == 130


def test_what_each_place_became_is_told_on_request(pair) -> None:
    _, processor = pair
    text, clips = f"a {AUDIO_TOKEN} b {AUDIO_TOKEN}", [CLIP, speech_like(0.7)]
    inputs = processor(text=text, audio=clips, return_text_replacement_offsets=True)
    (places,) = inputs["text_replacement_offsets"]
    became = [AUDIO_TOKEN * processor.num_audio_tokens(len(clip)) for clip in clips]
    assert [(place["type"], place["replacement"]) for place in places] == [("audio", text) for text in became]
    assert "text_replacement_offsets" not in processor(text=text, audio=clips)


def test_placeholders_smuggled_into_text_do_not_pass(pair) -> None:
    _, processor = pair
    messages = _messages(CLIP)
    messages[1]["content"][0]["text"] = f"Please {AUDIO_TOKEN} repeat:"
    with pytest.raises(ValueError, match="each clip needs its place"):
        _by_template(processor, messages)


def test_arguments_that_it_does_not_know_are_refused_by_name(pair) -> None:
    _, processor = pair
    with pytest.raises(TypeError, match=r"`paddingside` is not a valid argument .* it takes text, .*padding_side"):
        processor(text=AUDIO_TOKEN, audio=CLIP, paddingside="right")
    with pytest.raises(TypeError, match="`images`"):
        processor(text=AUDIO_TOKEN, audio=CLIP, images=[CLIP])
    with pytest.raises(TypeError, match="`text_kwargs`"):
        _by_template(processor, _messages(CLIP), processor_kwargs={"text_kwargs": {"padding_side": "right"}})
    assert processor(text=AUDIO_TOKEN, audio=CLIP, images=None, videos=None)["input_ids"].shape[0] == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_that_is_asked_for(pair, side: str) -> None:
    model, processor = pair
    texts, clips = [f"say{AUDIO_TOKEN}", f"please say{AUDIO_TOKEN} now"], [CLIP, speech_like(0.7)]
    batch = processor(text=texts, audio=clips, padding_side=side)
    ends = batch["attention_mask"][:, 0 if side == "left" else -1]
    assert ends.tolist().count(0) == 1
    with torch.no_grad():
        logits = model(**batch).logits
        for row, (text, clip) in enumerate(zip(texts, clips, strict=True)):
            alone = processor(text=text, audio=clip)
            real = batch["attention_mask"][row].bool()
            assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
            torch.testing.assert_close(logits[row][real], model(**alone).logits[0], rtol=1e-3, atol=1e-3)
    from_template = _by_template(processor, [_messages(CLIP), _messages(clips[1])], {"padding_side": side})
    assert from_template["attention_mask"][1, 0 if side == "left" else -1] == 0


def test_the_tokenizers_arguments_are_handed_on(pair) -> None:
    _, processor = pair
    whole = processor(text=AUDIO_TOKEN, audio=CLIP)["input_ids"].shape[1]
    assert processor(text=AUDIO_TOKEN, audio=CLIP, pad_to_multiple_of=64)["input_ids"].shape[1] == 64
    with pytest.raises(ValueError, match="truncation"):  # part of a clip's places would be cut
        processor(text=AUDIO_TOKEN, audio=CLIP, truncation=True, max_length=whole - 1)


def test_a_transcription_request_is_what_the_listener_asks(pair, tmp_path: Path) -> None:
    model, processor = pair
    write_wav(tmp_path / "clip.wav", CLIP)
    clips = [blsp.load_audio(tmp_path / "clip.wav"), speech_like(0.7)]
    inputs = processor.apply_transcription_request([str(tmp_path / "clip.wav"), clips[1]], language=["en", None])
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    listener = Listener(model, processor)
    assert texts == listener.transcribe_all(clips, method="repeat", max_new_tokens=12)
    one = processor.apply_transcription_request(np.repeat(clips[1], 2), "de", sampling_rate=32000)
    assert torch.equal(one["input_ids"][0], inputs["input_ids"][1][inputs["attention_mask"][1].bool()])


def test_a_transcription_request_refuses_what_it_cannot_use(pair) -> None:
    _, processor = pair
    with pytest.raises(ValueError, match="'xx'"):
        processor.apply_transcription_request(CLIP, language="xx")
    with pytest.raises(ValueError, match="2 languages for 1 clips"):
        processor.apply_transcription_request(CLIP, language=["en", "de"])
    with pytest.raises(TypeError, match="`model_id`"):
        processor.apply_transcription_request(CLIP, model_id="x/y")


def test_the_processor_survives_its_folder(pair, folder: Path) -> None:
    _, processor = pair
    again = AutoProcessor.from_pretrained(folder)
    assert type(again) is BlspProcessor
    assert (again.strides, again.audio_token_id) == (processor.strides, processor.audio_token_id)
    assert again.chat_template == processor.chat_template
    texts = [f"say{AUDIO_TOKEN}", f"please say{AUDIO_TOKEN} now"]
    clips = [CLIP, speech_like(0.7)]
    found, expected = (p(text=texts, audio=clips, sampling_rate=16000) for p in (again, processor))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_auto_classes_know_the_model(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is BlspConfig
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is BlspForConditionalGeneration


def test_a_tokenizer_without_a_pad_token_pads(tiny_models_folder: Path) -> None:
    _, processor = tiny_blsp(tiny_models_folder)
    tokenizer = processor.tokenizer
    tokenizer.pad_token = None
    bare = BlspProcessor(processor.feature_extractor, tokenizer)
    inputs = bare(text=["one", "one and two"])
    assert inputs["attention_mask"][0, 0] == 0


@pytest.mark.parametrize("source", ["path", "array"])
def test_the_any_to_any_pipeline_answers_as_the_listener_does(pair, folder: Path, tmp_path: Path, source: str) -> None:
    model, processor = pair
    write_wav(tmp_path / "clip.wav", CLIP)
    clip = blsp.load_audio(tmp_path / "clip.wav")
    audio = {"path": str(tmp_path / "clip.wav")} if source == "path" else {"audio": clip}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Please repeat:"}, {"type": "audio", **audio}]}]
    asked = pipeline("any-to-any", model=str(folder))
    found = asked(text=messages, generate_kwargs={"max_new_tokens": 12, "do_sample": False}, return_full_text=False)
    expected = Listener(model, processor).answer(clip, "Please repeat:", max_new_tokens=12)
    assert found[0]["generated_text"].strip() == expected


def test_generate_answers_as_the_listener_does(pair) -> None:
    """model.generate through the processor and the decode loop write the same tokens."""
    model, processor = pair
    listener = Listener(model, processor)
    clips = [speech_like(seconds, seed) for seed, seconds in enumerate((0.6, 1.1, 2.4))]
    prompt = f"<|im_start|>user\nPlease repeat:{AUDIO_TOKEN}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[prompt] * 3, audio=clips, sampling_rate=16000)
    written = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    from dataclasses import replace

    decoding = replace(listener.decoding, max_new_tokens=16)
    questions = [Question(audio=clip, instruction="Please repeat:", order="instruction-first") for clip in clips]
    assert listener.generate(questions, decoding=decoding) == texts


A, B = {"type": "audio", "audio": CLIP}, {"type": "audio", "audio": speech_like(0.7, 2)}


@pytest.mark.parametrize(
    "parts",
    [
        [" Please repeat:\n", A],
        [A, "Who said that?"],
        ["Listen: ", A, " and then ", B],
        [A, B, "\nWhich is longer? "],
        [A, "  "],
        [A, "", "Yes?"],
        ["One,", " two", A],
        ["  "],
    ],
)
def test_the_parts_of_a_turn_are_laid_out_as_in_training(pair, parts: list) -> None:
    """Text is stripped, and begins on a new line after another part: the same prompt as that of our own server."""
    model, processor = pair
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    inputs = _by_template(processor, [{"role": "user", "content": content}])
    listener = Listener(model, processor)
    heard = iter(listener.embed_audio([part["audio"] for part in parts if isinstance(part, dict)]))
    turn = user_turn([part if isinstance(part, str) else next(heard) for part in parts])
    names = lay_out(listener, [turn]).names
    ids = [token for token in inputs["input_ids"][0].tolist() if token != processor.audio_token_id]
    assert ids == [name for name in names if isinstance(name, int)]


def test_two_texts_of_a_turn_are_two_lines(pair) -> None:
    _, processor = pair
    content = [{"type": "text", "text": part} for part in ("", "Say ", " ", "hello")]
    inputs = _by_template(processor, [{"role": "user", "content": content}])
    assert "Say\nhello" in processor.tokenizer.decode(inputs["input_ids"][0])
    assert "".join(user_turn(["", "Say ", " ", "hello"])["content"]) == "Say\nhello"
