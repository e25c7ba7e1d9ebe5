"""`blsp evaluate`: figures of perfect, deaf and exchanged inputs; the files of the contract; equal figures twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech_copies import shuffled, transcripts_as_speech
from support.tiny_models import CHAT_TEMPLATE, tiny_blsp
from transformers import AutoModelForCausalLM

from blsp.data.clips import load_clip
from blsp.data.manifest import write_manifest
from blsp.evaluation.judge import Evaluation, evaluate, judge
from blsp.evaluation.report import write_report
from blsp.evaluation.results import Results
from blsp.evaluation.routes import speech_fingerprint, speech_input, text_fingerprint
from blsp.evaluation.scoring import score_transcripts
from blsp.evaluation.tasks import AlignmentPlan, Suite, Task, TaskError
from blsp.inference.listener import Listener
from blsp.llm.decoding import Result
from blsp.llm.prompt import fix_template
from blsp.settings import EvaluateSettings

MakeEvaluation = Callable[..., Evaluation]


def figures(results: Results, *path: str) -> Any:
    value: Any = results.to_json()
    for name in path:
        value = value[name]
    return value


@pytest.fixture
def silent_tasks(suite: Suite) -> Suite:
    """The suite without the no-speech task, for a route input that always holds words."""
    return Suite(suite.name, tuple(task for task in suite.tasks if task.kind != "no-speech"), suite.alignment)


def test_the_contracts_files(evaluation_of: MakeEvaluation, suite: Suite, tmp_path: Path) -> None:
    results = judge(evaluation_of(), suite)
    screen = write_report(results, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["tasks"]) == {task.name for task in suite.tasks}
    metrics = {
        "asr": ("wer", "cer"),
        "st-en-fr": ("bleu", "chrf"),
        "slu": ("accuracy",),
        "sqa": ("em", "f1", "accuracy"),
    }
    for task, names in metrics.items():
        for route in ("text", "speech"):
            for name in names:
                low, high = found["tasks"][task][route][f"{name}_ci"]
                assert low <= found["tasks"][task][route][name] <= high
                assert found["tasks"][task][route]["n"] == 7
    assert {"kl", "kl_ci", "top1_agreement", "by_position", "layers", "kl_shuffled", "kl_deaf"} <= set(
        found["alignment"]
    )
    assert set(found["signatures"]["st-en-fr"]) == {"bleu", "chrf"}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 7 + 1 and all("answers" in sample for sample in samples)
    report = (tmp_path / "out" / "report.md").read_text()
    for picture in ("scores", "divergence_by_position", "layers", "instructions"):
        assert f"({picture}.png)" in report
        assert (tmp_path / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "asr" in screen and "divergence" in screen


@pytest.mark.parametrize("rescore", [False, True])
def test_an_adapter_that_reads_out_is_judged_as_a_transcriber_too(
    evaluation_of: MakeEvaluation,
    suite: Suite,
    tiny_models_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rescore: bool,
) -> None:
    reader = Listener(*tiny_blsp(tiny_models_folder, adapter="grounded"))
    reader.model.config.rescore = rescore
    task = suite.tasks[0]
    rows = sorted(task.rows(), key=lambda row: row.id)
    written = reader.transcribe_all([load_clip(row) for row in rows])
    if rescore:  # the speech route has written these transcripts
        monkeypatch.setattr(reader, "transcribe_all", None)
    results = judge(evaluation_of(listener=reader), Suite("recognition", (task,), None))
    expected = score_transcripts(task, rows, written).figures["wer"].point()
    assert figures(results, "tasks", "asr", "transcript", "wer") == pytest.approx(expected)
    report = write_report(results, evaluation_of().folder) and (evaluation_of().folder / "report.md").read_text()
    assert "**transcript**" in report and "`blsp transcribe`, with the model's help" in report
    assert ("whose read-outs the language model chooses among" in report) == rescore
    assert figures(results, "environment", "rescore") == rescore
    assert {"attention", "full_window"} <= set(figures(results, "environment"))


def test_a_clip_of_one_trimmed_piece_is_transcribed_without_what_is_left_out(
    evaluation_of: MakeEvaluation, suite: Suite, tiny_models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speech route heard the whole clip; `blsp transcribe` hears the half that the detector keeps."""
    monkeypatch.setattr("blsp.inference.pauses._searches", lambda audio, vad: True)
    monkeypatch.setattr("blsp.inference.pauses.speech_regions", lambda audio: [(0, len(audio) // 2)])
    reader = Listener(*tiny_blsp(tiny_models_folder, adapter="grounded"))
    reader.model.config.rescore = True
    rows = suite.tasks[0].rows()
    expected = reader.transcribe_all([load_clip(row) for row in rows])
    result = judge(evaluation_of(listener=reader, routes=("speech",)), Suite("one", suite.tasks[:1])).tasks[0]
    assert [result.model_transcripts[row.id] for row in rows] == expected
    assert expected != [result.answers["speech"][row.id].transcript for row in rows]


def test_two_runs_are_equal_to_the_digit(evaluation_of: MakeEvaluation, suite: Suite, tmp_path: Path) -> None:
    first, second = (judge(evaluation_of(folder=tmp_path / name), suite) for name in "ab")
    for part in ("tasks", "gaps", "alignment", "signatures"):
        assert json.dumps(figures(first, part)) == json.dumps(figures(second, part))


def test_a_killed_run_goes_on_to_the_same_numbers(
    evaluation_of: MakeEvaluation, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judge(evaluation_of(folder=tmp_path / "whole", batch_size=1), suite)
    calls = 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    import blsp.evaluation.routes as routes

    real = routes.decode
    monkeypatch.setattr(routes, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        judge(evaluation_of(folder=tmp_path / "torn", batch_size=1), suite)
    log = max((tmp_path / "torn" / "log").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with log.open("ab") as file:
        file.write(b'{"id": "torn')
    monkeypatch.setattr(routes, "decode", real)
    again = judge(evaluation_of(folder=tmp_path / "torn", batch_size=1), suite)
    for part in ("tasks", "gaps", "alignment"):
        assert json.dumps(figures(again, part)) == json.dumps(figures(whole, part))


def test_answers_of_another_model_are_not_reused(
    evaluation_of: MakeEvaluation, suite: Suite, capsys: pytest.CaptureFixture[str], listener: Listener
) -> None:
    results = judge(evaluation_of(), suite)
    other = copy.deepcopy(listener)
    with torch.no_grad():
        for parameter in other.model.model.multi_modal_projector.parameters():
            parameter.mul_(-1.5)
    changed = judge(evaluation_of(listener=other), suite)
    assert "begun again" in capsys.readouterr().out
    assert figures(changed, "alignment", "kl") != figures(results, "alignment", "kl")
    assert figures(changed, "tasks", "chat", "text") == figures(results, "tasks", "chat", "text")


@pytest.mark.parametrize("change", ["chat template", "sentence for silence", "attention"])
def test_what_changes_the_answers_changes_the_fingerprints(listener: Listener, change: str) -> None:
    """A results folder of an adapter of the same LLM, prompted or run in another way, is asked again."""
    other = copy.deepcopy(listener)
    if change == "chat template":
        thinking = CHAT_TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
        other.tokenizer.chat_template = fix_template(thinking, {"enable_thinking": False})
    elif change == "sentence for silence":
        other.model.config.no_speech_sentence = "I hear nothing."
    else:
        other.model.model.language_model.set_attn_implementation("eager")  # as loading does, of the LLM alone
    same = copy.deepcopy(listener)
    for fingerprint in (text_fingerprint, speech_fingerprint):
        assert fingerprint(same) == fingerprint(listener) != fingerprint(other)


def test_transcripts_as_speech_give_divergence_zero_and_the_text_routes_scores(
    evaluation_of: MakeEvaluation, silent_tasks: Suite, listener: Listener
) -> None:
    results = judge(evaluation_of(speech=transcripts_as_speech(listener)), silent_tasks)
    for task, routes in figures(results, "tasks").items():
        assert routes["speech"] == routes["text"], task
    alignment = figures(results, "alignment")
    for behaviour, found in alignment["behaviours"].items():
        assert found["kl"] == 0.0 and found["top1_agreement"] == 1.0, behaviour
        assert found["kl_shuffled"] > 0.05, behaviour
    assert alignment["layers"]["cka"] == pytest.approx([1.0] * 4)
    assert alignment["layers"]["kl"] == [0.0] * 4
    assert alignment["retrieval"] == 1.0
    assert figures(results, "tasks", "continuation", "speech", "agreement") == 1.0


@pytest.mark.parametrize("vectors", ["zeroed", "shuffled"])
def test_the_judge_can_fail(
    evaluation_of: MakeEvaluation, silent_tasks: Suite, listener: Listener, vectors: str
) -> None:
    """A model that hears nothing, or the wrong clip, is far from the text route wherever the judge looks."""
    if vectors == "zeroed":
        deaf = copy.deepcopy(listener)
        with torch.no_grad():
            for parameter in deaf.model.model.multi_modal_projector.parameters():
                parameter.zero_()
        results = judge(evaluation_of(listener=deaf), silent_tasks)
    else:
        results = judge(evaluation_of(speech=shuffled(transcripts_as_speech(listener))), silent_tasks)
    alignment = figures(results, "alignment")
    assert alignment["kl"] > 0.05 and alignment["top1_agreement"] < 0.9
    assert alignment["kl"] > 0.5 * alignment["kl_shuffled"]  # no better than another clip's speech
    continuation = figures(results, "tasks", "continuation")
    assert continuation["text"]["chrf"] == 100.0 and continuation["speech"]["chrf"] < 60
    assert continuation["speech"]["agreement"] < 0.2
    assert alignment["layers"]["cka"][-1] < 0.99


def test_the_text_route_is_the_plain_llm(
    evaluation_of: MakeEvaluation, suite: Suite, listener: Listener, tiny_llm: Callable[[str], str]
) -> None:
    """The same words through transformers' own template and `generate`, without a line of ours."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_llm("llama"), dtype=torch.float64)
    task = next(task for task in suite.tasks if task.name == "chat")
    results = judge(evaluation_of(routes=("text",)), Suite("one", (task,)))
    answers = results.tasks[0].answers["text"]
    for row in task.rows():
        turn = [{"role": "user", "content": f" {row.text}\nTalk."}]
        ids = listener.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = plain.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert listener.tokenizer.decode(written, skip_special_tokens=True).strip() == answers[row.id].text


def test_an_answer_keeps_its_spaces_as_the_other_commands_do(
    evaluation_of: MakeEvaluation, suite: Suite, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers take spaces before punctuation away unless told not to."""
    ids = listener.tokenizer.encode("hello , world !", add_special_tokens=False)
    tidy = copy.deepcopy(listener)
    tidy.tokenizer.clean_up_tokenization_spaces = True
    tidy.tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    monkeypatch.setattr(
        "blsp.evaluation.routes.decode",
        lambda llm, requests, size: {request.key: Result(ids, "stop") for request in requests},
    )
    task = next(task for task in suite.tasks if task.name == "chat")
    answers = judge(evaluation_of(listener=tidy, routes=("text",)), Suite("one", (task,))).tasks[0].answers["text"]
    assert {answer.text for answer in answers.values()} == {"hello , world !"}


def test_silence_is_answered_with_the_set_sentence(evaluation_of: MakeEvaluation, suite: Suite) -> None:
    results = judge(evaluation_of(), suite)
    found = figures(results, "tasks", "no-speech", "speech")
    assert found["accuracy"] == 1.0 and found["no_speech"] == 1 and "text" not in figures(results, "tasks", "no-speech")


def test_the_set_sentence_counts_when_the_llm_says_it(evaluation_of: MakeEvaluation, suite: Suite, monkeypatch) -> None:
    only = Suite("one", tuple(task for task in suite.tasks if task.name == "chat"))
    judged = evaluation_of(routes=("speech",))
    answers = judge(judged, only).tasks[0].answers["speech"]
    name, answer = next((name, answer) for name, answer in answers.items() if answer.text)
    monkeypatch.setattr(judged.listener.model.config, "no_speech_sentence", answer.text)
    again = judge(evaluation_of(routes=("speech",), folder=judged.folder / "again"), only).tasks[0].answers["speech"]
    assert answer.finish != "no-speech" and again[name].finish == "no-speech" and again[name].ids == answer.ids


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"compare": ("gone",)}, r"results\.json: cannot be read .*--compare"),
        ({"compare": ("torn",)}, r"results\.json: cannot be read .*--compare"),
        ({"compare": ("other",)}, r"results\.json: holds no results of `blsp evaluate`"),
        ({"peer": ("ultravox",)}, "MODEL@URL"),
        ({"judge": "gpt"}, "MODEL@URL"),
    ],
)
def test_what_the_report_would_miss_is_refused_before_the_model_is_loaded(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("blsp.evaluation.judge.load", None)
    for name, content in {"torn": '{"tasks": {', "other": '{"loss": 1.0}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    flags = flags | {"compare": tuple(tmp_path / name for name in flags.get("compare", ()))}
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateSettings(suite=str(corpus / "suite.yaml"), out=tmp_path / "out", device="cpu", **flags))


def test_a_task_without_a_readable_recording_is_refused_before_anything_is_asked(
    evaluation_of: MakeEvaluation, suite: Suite, tmp_path: Path
) -> None:
    row = {"id": "gone", "audio": str(tmp_path / "gone.wav"), "text": "hello"}
    write_manifest(tmp_path / "m.jsonl", [row])
    task = Task("t", "chat", str(tmp_path / "m.jsonl"))
    with pytest.raises(TaskError, match=r"task 't': none of its recordings .* row 'gone': .*gone\.wav: no such file"):
        judge(evaluation_of(), Suite("one", (*suite.tasks, task)))
    assert not (tmp_path / "results").exists()
    assert judge(evaluation_of(routes=("text",)), Suite("one", (task,))).tasks[0].answers["text"]


def test_recordings_that_cannot_be_read_are_named_and_the_others_judged(
    evaluation_of: MakeEvaluation, corpus: Path, tmp_path: Path
) -> None:
    """The figures are those of a suite without these questions, on every route and in the alignment."""
    (corpus / "noise.wav").write_bytes(b"RIFF" + bytes(100))
    rows = [json.loads(line) for line in (corpus / "speech.jsonl").read_text().splitlines()]
    bad = [{"id": "bad/1", "audio": "noise.wav", "text": "no sound"}, {"id": "bad/2", "audio": "gone.wav", "text": "x"}]
    bad += [rows[0] | {"id": "bad/3", "start": 99.0}]
    results = {}
    for name, questions in {"all": [bad[0], *rows[:2], *bad[1:], *rows[2:]], "good": rows}.items():
        write_manifest(corpus / f"{name}.jsonl", questions)
        task = Task("asr", "asr", f"{name}.jsonl", behaviour="repeat", max_new_tokens=12, folder=corpus)
        plan = AlignmentPlan(f"{name}.jsonl", ("repeat",), layer_samples=3, max_new_tokens=12, folder=corpus)
        results[name] = judge(evaluation_of(folder=tmp_path / name), Suite("mine", (task,), plan))
    for part in ("tasks", "alignment"):
        assert json.dumps(figures(results["all"], part)) == json.dumps(figures(results["good"], part))
    screen = write_report(results["all"], tmp_path / "all")
    assert "6 recordings cannot be read and were left out" in screen  # three of the task, three of the alignment
    named = json.loads((tmp_path / "all" / "results.json").read_text())["left_out"]
    assert [row["id"] for row in named if row["task"] == "asr"] == ["bad/1", "bad/2", "bad/3"]
    report = (tmp_path / "all" / "report.md").read_text()
    assert "gone.wav: no such file" in report and "start 99.0 s lies past its end" in report
    assert "Left out" not in (
        write_report(results["good"], tmp_path / "good") and (tmp_path / "good" / "report.md").read_text()
    )
    limited = judge(
        evaluation_of(folder=tmp_path / "limited", limit=4), Suite("mine", (replace(task, manifest="all.jsonl"),))
    )
    assert [row.id for row in limited.tasks[0].rows] == [rows[0]["id"], rows[1]["id"]]


def test_limit_asks_the_first_questions_only(evaluation_of: MakeEvaluation, suite: Suite) -> None:
    results = judge(evaluation_of(limit=2), suite)
    assert figures(results, "tasks", "asr", "text", "n") == 2
    assert figures(results, "alignment", "n") == 2


def test_normalised_transcripts_are_the_papers_variant(
    evaluation_of: MakeEvaluation, suite: Suite, corpus: Path
) -> None:
    task = next(task for task in suite.tasks if task.name == "continuation")
    row = task.rows()[1]
    assert evaluation_of(normalise="whisper").transcripts([row])[row.id] == "how many days are in a week"
    assert evaluation_of().transcripts([row])[row.id] == row.text


def test_the_clips_of_an_equal_batch_are_not_heard_again(
    evaluation_of: MakeEvaluation, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, rows = evaluation_of().listener, suite.tasks[0].rows()
    batches: list[int] = []
    embed_audio = listener.embed_audio
    monkeypatch.setattr(listener, "embed_audio", lambda clips: batches.append(len(clips)) or embed_audio(clips))
    route_input = speech_input(listener)
    first, fewer, again = route_input(rows), route_input(rows[:2]), route_input(rows)
    assert batches == [len(rows), 2]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(fewer) == 2
