"""The same prompt on every route: variables and date of the chat template, from step 1 to the trained adapter."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.misbehaving_server import misbehaving_server
from support.step_one import products, read_header, read_rows
from support.templates import DATED, DATED_LLAMA, THINKING
from support.tiny_models import speech_like
from support.training_examples import write_data
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from blsp.continuation.topk import TopKStore, topk_folder
from blsp.continuation.writer import write_continuations
from blsp.data.audio import write_wav
from blsp.data.jobs import JobError
from blsp.data.manifest import write_manifest
from blsp.distributed import find_runtime
from blsp.inference.listener import Listener
from blsp.llm.prompt import TemplateError, prompt_template
from blsp.model.checkpoint import load_blsp
from blsp.model.configuration_blsp import CheckpointError
from blsp.settings import ContinueSettings, SettingsError, TrainSettings
from blsp.training import reporting
from blsp.training.dataset import DataError
from blsp.training.loop import train

NO_THOUGHT = "assistant\n<think>\n\n</think>\n\n"


class _Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Tomorrow:
        return cls(2031, 1, 2)


@pytest.fixture
def llm(stopping_llm: str, tmp_path: Path) -> Callable[[str], str]:
    """`llm(template)`: a tiny LLM's folder with this chat template."""

    def made(template: str) -> str:
        folder = tmp_path / "llm"
        shutil.copytree(stopping_llm, folder)
        (folder / "chat_template.jinja").write_text(template)
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
        return str(folder)

    return made


@pytest.fixture
def training(tmp_path: Path, tiny_whisper: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainSettings]:
    """`training(out, data, llm, **more)`: two steps of `conv`."""
    monkeypatch.setattr(reporting, "draw", lambda *_: None)

    def made(out: str, data: Path, llm: str, **more: Any) -> TrainSettings:
        sizes = {"batch_size": 4, "steps": 2, "held_out": 2, "lr": 1e-3, "device": "cpu", "dtype": "float32"}
        model = {"audio_model": tiny_whisper, "llm": llm, "adapter": "conv", "loss": "ce"}
        given: dict[str, Any] = sizes | model | {"adapter_options": ("bottleneck=8",)} | more
        return TrainSettings(data=(str(data),), out=tmp_path / out, **given)

    return made


def written(folder: Path, **facts: Any) -> Path:
    """Continuations of random answers, with these facts in their header."""
    path = write_data(folder, rows=10)
    header = {"chat_template_sha256": "0" * 64, "template_args": None} | facts
    Path(f"{path}.meta.json").write_text(json.dumps(header))
    return path


def test_step_1_asks_without_thinking_and_says_so(settings: Any, llm: Any, tmp_path: Path) -> None:
    thinking = llm(THINKING)
    write_continuations(settings(tmp_path / "plain.jsonl", llm=thinking))
    write_continuations(settings(tmp_path / "out.jsonl", llm=thinking, no_thinking=True))
    given = settings(tmp_path / "same.jsonl", llm=thinking, template_arg=("enable_thinking=false",))
    write_continuations(given)
    extra = len(AutoTokenizer.from_pretrained(thinking).encode("<think>\n\n</think>\n\n", add_special_tokens=False))
    plain, out = (read_rows(tmp_path / name) for name in ("plain.jsonl", "out.jsonl"))
    # silence is answered by rule, without a prompt
    pairs = [pair for pair in zip(plain, out, strict=True) if pair[0]["id"] != "silence"]
    assert all(row["prompt_tokens"] + extra == without["prompt_tokens"] for row, without in pairs)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    assert read_header(tmp_path / "plain.jsonl")["template_args"] is None
    assert read_header(tmp_path / "out.jsonl")["template_args"] == {"enable_thinking": False}
    with pytest.raises(JobError, match="template_args was"):
        write_continuations(replace(given, template_arg=("enable_thinking=true",)))


def test_the_teacher_reads_the_prompt_of_the_header(settings: Any, llm: Any, tmp_path: Path) -> None:
    given: ContinueSettings = settings(tmp_path / "out.jsonl", llm=llm(THINKING), no_thinking=True)
    write_continuations(given)
    write_continuations(replace(given, out=tmp_path / "kept.jsonl", top_k=4))
    with pytest.raises(JobError, match="written with enable_thinking=false, not with enable_thinking=true"):
        write_continuations(
            replace(given, score_only=True, top_k=4, no_thinking=False, template_arg=("enable_thinking=true",))
        )
    write_continuations(replace(given, score_only=True, top_k=4, no_thinking=False))
    kept, scored = (TopKStore(topk_folder(tmp_path / f"{name}.jsonl")) for name in ("kept", "out"))
    assert all((kept.get(row)[0] == scored.get(row)[0]).all() for row in range(len(kept)))


def test_a_server_is_sent_the_variables(settings: Any, llm: Any, tmp_path: Path) -> None:
    thinking = llm(THINKING)
    with misbehaving_server([]) as server:
        given: ContinueSettings = settings(tmp_path / "out.jsonl", llm=thinking, engine_url=(server.url,))
        write_continuations(replace(given, no_thinking=True))
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.asked)
        body = json.dumps({"chat_template_kwargs": {"enable_thinking": False}})
        write_continuations(replace(given, out=tmp_path / "body.jsonl", engine_body=body))
    assert read_header(tmp_path / "body.jsonl")["template_args"] == {"enable_thinking": False}
    with pytest.raises(SettingsError, match="enable_thinking"):
        write_continuations(replace(given, engine_body=body, template_arg=("enable_thinking=true",)))


def test_a_server_is_sent_the_date_where_its_template_takes_one(settings: Any, llm: Any, tmp_path: Path) -> None:
    with misbehaving_server([]) as server:
        write_continuations(settings(tmp_path / "out.jsonl", llm=llm(DATED_LLAMA), engine_url=(server.url,)))
    assert all(body["chat_template_kwargs"] == {"date_string": "26 Jul 2024"} for body in server.asked)


def test_a_variable_that_the_template_lacks_is_refused(settings: Any, llm: Any, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="--template-arg enable_thinking"):
        write_continuations(settings(tmp_path / "out.jsonl", llm=llm(DATED), no_thinking=True))


@pytest.mark.parametrize("template", [DATED, DATED_LLAMA])
def test_a_job_of_another_day_ends_with_the_same_bytes(
    settings: Any, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    dated = llm(template)
    for day in ("today", "tomorrow"):
        write_continuations(settings(tmp_path / day / "out.jsonl", llm=dated, top_k=3))
        monkeypatch.setattr(chat_template_utils, "datetime", _Tomorrow)
    assert products(tmp_path / "today" / "out.jsonl") == products(tmp_path / "tomorrow" / "out.jsonl")


def test_training_takes_the_prompt_of_the_header_and_the_adapter_keeps_it(
    training: Any, llm: Any, tmp_path: Path
) -> None:
    thinking, data = llm(THINKING), written(tmp_path / "data", template_args={"enable_thinking": False})
    train(training("run", data, thinking))
    adapter = tmp_path / "run" / "adapter"
    model, processor = load_blsp(adapter, find_runtime("cpu", "float32"))
    assert json.loads((adapter / "config.json").read_text())["template_args"] == {"enable_thinking": False}
    assert model.config.template_args == processor.template_args == {"enable_thinking": False}
    template = prompt_template(processor.tokenizer, "Repeat:", "instruction-first")
    assert processor.tokenizer.decode(template.suffix_ids).endswith(NO_THOUGHT)
    turn = [{"role": "user", "content": [{"type": "text", "text": "Repeat:"}, {"type": "audio"}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.endswith(NO_THOUGHT)
    # and once more through a saved processor
    processor.save_pretrained(tmp_path / "again")
    again = type(processor).from_pretrained(tmp_path / "again")
    assert prompt_template(again.tokenizer, "Repeat:", "instruction-first") == template
    assert again(text=text, audio=[speech_like(0.5)])["input_ids"].shape[0] == 1

    # an adapter to start from must have the same prompt
    plain = written(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="trained with enable_thinking=false, not no template variables"):
        train(training("on", plain, thinking, init_from=(str(adapter),), adapter_options=()))
    with pytest.raises(DataError, match="enable_thinking=false, but --template-arg says enable_thinking=true"):
        train(training("x", data, thinking, template_arg=("enable_thinking=true",)))
    both = replace(training("y", data, thinking), data=(str(data), str(plain)))
    with pytest.raises(DataError, match=r"plain/continued.jsonl: was written with no template variables, but .*data/"):
        train(both)


def test_a_start_without_variables_takes_those_of_the_data(training: Any, llm: Any, tmp_path: Path) -> None:
    thinking = llm(THINKING)
    train(training("first", write_data(tmp_path / "bare", rows=10), thinking))
    start = str(tmp_path / "first" / "adapter")
    assert load_blsp(start, find_runtime("cpu", "float32"))[0].config.template_args is None
    data = written(tmp_path / "data", template_args={"enable_thinking": False})
    train(training("second", data, thinking, init_from=(start,), adapter_options=()))
    model, processor = load_blsp(tmp_path / "second" / "adapter", find_runtime("cpu", "float32"))
    suffix = prompt_template(processor.tokenizer, "Repeat:", "instruction-first").suffix_ids
    assert model.config.template_args and processor.tokenizer.decode(suffix).endswith(NO_THOUGHT)


def test_an_adapter_of_a_dated_llm_reads_one_prompt_every_day(
    training: Any, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(training("run", written(tmp_path / "data"), llm(DATED_LLAMA)))
    prompts = []
    for _ in range(2):
        _, processor = load_blsp(tmp_path / "run" / "adapter", find_runtime("cpu", "float32"))
        template = prompt_template(processor.tokenizer, "Repeat:", "instruction-first")
        prompts.append(processor.tokenizer.decode(template.prefix_ids))
        monkeypatch.setattr(chat_template_utils, "datetime", _Tomorrow)
    assert prompts[0] == prompts[1] and "26 Jul 2024" in prompts[0]


def test_a_template_that_begins_with_the_users_words_is_trained_and_listens(
    training: Any, settings: Any, llm: Any, tmp_path: Path
) -> None:
    bare = llm("{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}")
    assert prompt_template(AutoTokenizer.from_pretrained(bare), "", "speech-first").prefix_ids == ()
    data = tmp_path / "continued.jsonl"
    write_continuations(settings(data, llm=bare, orders="speech-first", instruction="Repeat:", behaviours="repeat"))
    rows = [row | {"audio": speech} for row, speech in zip(read_rows(data), clips(tmp_path, 10), strict=False)]
    write_manifest(data, rows)
    for loss in ("ce", "kl"):
        train(training(f"run-{loss}", data, bare, loss=loss))
        model, processor = load_blsp(tmp_path / f"run-{loss}" / "adapter", find_runtime("cpu", "float32"))
        assert isinstance(Listener(model, processor).answer(speech_like(0.5), max_new_tokens=3), str)


def clips(folder: Path, count: int) -> list[str]:
    """Short recordings, by their paths."""
    paths = [folder / f"{number}.wav" for number in range(count)]
    for number, path in enumerate(paths):
        write_wav(path, speech_like(0.8, number))
    return [str(path) for path in paths]
