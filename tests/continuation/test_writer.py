"""Step 1 against its contract: rows and order, equal prompts once, skipped rows, the LLM's answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.step_one import in_a_process, products, read_header, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from blsp.continuation.engines import Prompt, TransformersEngine, Written
from blsp.continuation.topk import TopKError, TopKStore, topk_folder
from blsp.continuation.writer import write_continuations
from blsp.data.jobs import JobError
from blsp.data.manifest import CONTINUATION_KEY, Manifest
from blsp.distributed import Runtime
from blsp.llm.instructions import NO_SPEECH_SENTENCE, instruction_for
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.settings import ContinueSettings, SettingsError

Settings = Callable[..., ContinueSettings]


@pytest.fixture
def written(tmp_path: Path, settings: Settings) -> Path:
    out = tmp_path / "out.jsonl"
    write_continuations(settings(out, top_k=5))
    return out


def test_rows_are_the_manifests_in_input_order(written: Path, manifest: Path) -> None:
    rows, given = read_rows(written), {row["id"]: row for row in read_rows(manifest)}
    ids = [row["id"] for row in rows]
    assert list(dict.fromkeys(ids)) == [id for id in given if id not in ("tags", "empty", "long")]
    for row in rows:
        assert {name: row[name] for name in ("id", "text")} == {name: given[row["id"]][name] for name in ("id", "text")}
        assert row["finish"] in ("stop", "length") and row["prompt_tokens"] > 0
        assert len(row["continuation_ids"]) <= 10 or row["id"] == "silence"
    assert len({(row["id"], row["behaviour"], row["order"]) for row in rows}) == len(rows) == 2 * 37
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert Manifest(written, key=CONTINUATION_KEY)[3].extra["behaviour"] in ("continue", "repeat")


def test_what_is_left_out_is_listed_with_a_reason(written: Path) -> None:
    skipped = {row["id"]: row["reason"] for row in read_rows(Path(f"{written}.skipped.jsonl"))}
    assert list(skipped) == ["tags", "empty", "long"]
    assert "no words" in skipped["tags"] and "empty" in skipped["empty"] and "192" in skipped["long"]


def test_silence_is_answered_by_rule(written: Path, stopping_llm: str) -> None:
    (row, _) = [row for row in read_rows(written) if row["id"] == "silence"]
    tokenizer = AutoTokenizer.from_pretrained(stopping_llm)
    assert row["continuation"] == NO_SPEECH_SENTENCE == tokenizer.decode(row["continuation_ids"])
    assert row["finish"] == "stop" and row["source"] == "made" and row["no_speech"] is True


def test_a_rows_own_instruction_wins(written: Path) -> None:
    assert {row["instruction"] for row in read_rows(written) if row["id"] == "own"} == {"Say it in French:"}


def test_what_is_written_is_what_the_llm_generates(written: Path, stopping_llm: str) -> None:
    llm = AutoModelForCausalLM.from_pretrained(stopping_llm)
    tokenizer = AutoTokenizer.from_pretrained(stopping_llm)
    for row in read_rows(written)[::9]:
        if row["id"] == "silence":
            continue
        frame = prompt_template(tokenizer, row["instruction"], row["order"])
        ids = torch.tensor([[*frame.prefix_ids, *transcript_ids(tokenizer, row["text"]), *frame.suffix_ids]])
        plain = llm.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
        stopped = row["finish"] == "stop"
        assert ids.shape[1] == row["prompt_tokens"]
        assert (plain[:-1] if stopped else plain) == row["continuation_ids"]


def test_equal_prompts_are_generated_once(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    write = TransformersEngine._write
    monkeypatch.setattr(TransformersEngine, "_write", lambda self, batch: asked.extend(batch) or write(self, batch))
    write_continuations(settings(tmp_path / "out.jsonl", behaviours="continue"))
    assert len({(p.instruction, p.order, p.text) for p in asked}) == len(asked) == 2 * (20 + 1)
    rows = read_rows(tmp_path / "out.jsonl")
    answers: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        answers.setdefault((row["instruction"], row["order"], row["text"]), set()).add(row["continuation"])
    assert len(rows) == 2 * 37 and all(len(each) == 1 for each in answers.values())


def test_the_header_names_writer_and_plan(written: Path, stopping_llm: str) -> None:
    header = read_header(written)
    assert header["llm"] == stopping_llm and len(header["llm_sha256"]) == 64
    assert header["decoding"] == {"max_new_tokens": 10, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert header["plan"]["rows"] == 2 * 37 and header["plan"]["skipped"] == 3
    assert header["plan"]["batches"] == -(-header["plan"]["prompts"] // 4)
    assert header["instructions"]["continue"] == instruction_for("continue")
    assert header["continuation_ids"] == "generated" and header["top_k"] == {"k": 5, "temperature": 1.0}


def test_top_k_is_the_teachers_distribution(written: Path, stopping_llm: str) -> None:
    """Every step, the one that stopped included: rows with equal prompts share it, silence has none."""
    llm = AutoModelForCausalLM.from_pretrained(stopping_llm)
    tokenizer = AutoTokenizer.from_pretrained(stopping_llm)
    store, rows = TopKStore(topk_folder(written)), read_rows(written)
    assert len(store) == len(rows) and store.k == 5 and store.temperature == 1.0
    for number, row in enumerate(rows):
        ids, logp = store.get(number)
        if row["id"] == "silence":
            assert len(ids) == 0
            continue
        assert ids.shape == logp.shape == (len(row["continuation_ids"]) + (row["finish"] == "stop"), 5)
        assert ids[: len(row["continuation_ids"]), 0].tolist() == row["continuation_ids"]
        if number % 7 == 0:
            frame = prompt_template(tokenizer, row["instruction"], row["order"])
            prompt = [*frame.prefix_ids, *transcript_ids(tokenizer, row["text"]), *frame.suffix_ids]
            logits = llm(torch.tensor([prompt + row["continuation_ids"]])).logits[0, len(prompt) - 1 :]
            top = logits.log_softmax(-1).topk(5)
            assert np.allclose(logp, top.values[: len(logp)].detach().numpy(), atol=2e-3)


def test_top_k_of_one_temperature_refuses_another(written: Path) -> None:
    store = TopKStore(topk_folder(written))
    store.require_temperature(1.0)
    with pytest.raises(TopKError, match="temperature 1, not 2"):
        store.require_temperature(2.0)


def test_a_torn_top_k_folder_is_refused(written: Path) -> None:
    with open(topk_folder(written) / "ids.u32", "ab") as file:
        file.write(b"1234")
    with pytest.raises(TopKError, match=r"ids\.u32"):
        TopKStore(topk_folder(written))


def test_a_finished_job_is_left_alone(written: Path, settings: Settings) -> None:
    before = products(written)
    write_continuations(settings(written, top_k=5))
    assert products(written) == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"max_new_tokens": 11}, {"behaviours": "continue"}, {"batch_size": 5}])
def test_going_on_in_another_way_is_refused(written: Path, settings: Settings, other: dict) -> None:
    with pytest.raises(JobError, match="started with other settings"):
        write_continuations(settings(written, top_k=5, **other))


def test_a_changed_manifest_is_refused(written: Path, settings: Settings, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("seven", "eight"))
    with pytest.raises(JobError, match="manifest"):
        write_continuations(settings(written, top_k=5))


def test_a_foreign_file_is_never_overwritten(tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(JobError, match="says how it was made"):
        write_continuations(settings(out))
    assert out.read_text() == "mine\n"


def test_ranks_write_what_one_process_writes(
    tmp_path: Path, settings: Settings, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ranks.jsonl"
    monkeypatch.setattr("blsp.data.jobs.WAIT", 0.02)
    runtimes = [Runtime(torch.device("cpu"), torch.float32, rank, 3) for rank in range(3)]
    processes = []
    for runtime in runtimes:
        monkeypatch.setattr("blsp.continuation.writer.find_runtime", lambda *_, runtime=runtime, **__: runtime)
        processes.append(in_a_process(settings(out, top_k=5)))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert products(out) == products(written)


def test_whispers_normaliser_is_the_papers_variant(tmp_path: Path, settings: Settings, manifest: Path) -> None:
    manifest.write_text(json.dumps({"id": "a", "audio": "a.wav", "text": "Hello, Mr. World!"}) + "\n")
    write_continuations(settings(tmp_path / "out.jsonl", normalise="whisper", orders="speech-first"))
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row["text"] == "hello mister world" and row["text_as_given"] == "Hello, Mr. World!"


def test_sampling_depends_on_the_prompt_and_the_seed_alone(tmp_path: Path, settings: Settings, manifest: Path) -> None:
    """The same row, alone or among others, in batches of any size: the same draws (in exact arithmetic)."""
    more = {"temperature": 1.0, "dtype": "float64", "orders": "speech-first"}
    write_continuations(settings(tmp_path / "all.jsonl", **more))
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(reversed(lines)) + "\n")
    write_continuations(settings(tmp_path / "turned.jsonl", batch_size=7, **more))
    write_continuations(settings(tmp_path / "other.jsonl", seed=1, **more))
    first, turned, other = (
        {row["id"]: row["continuation_ids"] for row in read_rows(tmp_path / f"{name}.jsonl")}
        for name in ("all", "turned", "other")
    )
    assert first == turned != other


def test_a_limit_reads_the_first_rows(tmp_path: Path, settings: Settings) -> None:
    write_continuations(settings(tmp_path / "out.jsonl", limit=3))
    assert {row["id"] for row in read_rows(tmp_path / "out.jsonl")} == {"r0", "r1", "r2"}


def test_nothing_to_continue_is_an_error(tmp_path: Path, settings: Settings, manifest: Path) -> None:
    manifest.write_text(json.dumps({"id": "a", "audio": "a.wav", "text": "<MUSIC>"}) + "\n")
    for _ in range(2):
        with pytest.raises(JobError, match=r"out.jsonl: no row can be continued; .*out.jsonl.skipped.jsonl says why"):
            write_continuations(settings(tmp_path / "out.jsonl", top_k=3))
    assert not (tmp_path / "out.jsonl").exists()
    manifest.write_text(json.dumps({"id": "a", "audio": "a.wav", "text": "hello"}) + "\n")  # mended
    write_continuations(settings(tmp_path / "out.jsonl", top_k=3))
    assert {row["id"] for row in read_rows(tmp_path / "out.jsonl")} == {"a"}


def test_a_removed_folder_ends_the_job(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(engine: TransformersEngine, batches: Iterator[list[Prompt]]) -> Iterator[list[Written]]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        yield [Written(prompt.key, "x", (5,), "stop") for prompt in next(batches)]

    monkeypatch.setattr(TransformersEngine, "write", write)
    with pytest.raises(FileNotFoundError, match=r"part-00000.jsonl: was removed with its content"):
        write_continuations(settings(tmp_path / "runs" / "out.jsonl"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"behaviours": "sing"}, "'sing'"),
        ({"orders": "sideways"}, "--orders sideways"),
        ({"instruction": "Do:", "behaviours": "continue,repeat"}, "--instruction is for one"),
        ({"engine_body": "{"}, "not JSON"),
        ({"engine_body": "[1]"}, "JSON object"),
        ({"top_k": 5000}, "--top-k 5000"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: Settings, wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        write_continuations(settings(tmp_path / "out.jsonl", **wrong))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_and_top_k_do_not_go_together(tmp_path: Path, settings: Settings) -> None:
    for more in ({"top_k": 4}, {"top_k": 4, "score_only": True}):
        with pytest.raises(SettingsError):
            settings(tmp_path / "out.jsonl", engine_url=("http://localhost:1/v1",), **more)
