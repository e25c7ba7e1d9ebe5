"""Rows as examples of a step; and the table of measured rows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import IM_END, tiny_tokenizer
from support.training_examples import INSTRUCTION, write_data, write_teacher
from transformers import WhisperFeatureExtractor

from blsp.continuation.topk import TopKError
from blsp.data.jobs import SkippedLog
from blsp.distributed import find_runtime
from blsp.llm.prompt import prompt_template, text_ids, transcript_ids
from blsp.training.dataset import (
    ROW,
    DataError,
    Dataset,
    Refused,
    choose_teacher,
    open_dataset,
    open_sources,
    text_hash,
)
from blsp.training.examples import ExampleReader, Need, RowMeasurer, RowTexts, Targets

CE = Targets(frozenset({"continuation"}))
KL = Targets(frozenset({"continuation", "teacher"}))
CTC = Targets(frozenset({"readout"}), runs_llm=False, reads_out=True)
TOKENIZER = tiny_tokenizer()


def _dataset(path: Path, folder: Path, targets: Targets = CE, hold_out: int = 0, **more) -> Dataset:
    sources = open_sources([str(path)], **more)
    measurer = RowMeasurer(targets, RowTexts(TOKENIZER, IM_END, "nothing"))
    with SkippedLog(folder / "run") as skipped:
        return open_dataset(sources, measurer, folder, skipped, hold_out, find_runtime("cpu"))


def _reader(dataset: Dataset, targets: Targets = CE, classes: dict[int, int] | None = None) -> ExampleReader:
    return ExampleReader(
        targets,
        RowTexts(TOKENIZER, IM_END, "nothing"),
        dataset,
        WhisperFeatureExtractor(feature_size=16),
        num_audio_tokens=lambda frames: -(-frames // 4),
        classes=classes or {},
    )


def _rewrite(path: Path, change) -> list[dict]:
    rows = [change(number, json.loads(line)) for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_an_answer_cut_at_the_limit_teaches_no_end(tmp_path: Path) -> None:
    dataset = _dataset(write_data(tmp_path, rows=8), tmp_path)
    reader = _reader(dataset)
    for row in dataset.rows:
        utterance, example = dataset.utterance(row), reader.example(row, epoch=0)
        ended = utterance.extra["finish"] == "stop"
        assert example.response == utterance.extra["continuation_ids"] + [IM_END] * ended
        assert example.template == prompt_template(TOKENIZER, INSTRUCTION, utterance.extra["order"])
        assert row["tokens_after_audio"] == len(example.template.suffix_ids) + len(example.response) - 1
        assert example.transcript == transcript_ids(TOKENIZER, utterance.text)
        assert row["encoder_frames"] == -(-example.mel_frames // 2)
        assert row["id_hash"] == text_hash(utterance.id)


def test_answers_from_behind_a_url_are_tokenised_here(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=1)
    _rewrite(path, lambda _, row: {k: v for k, v in row.items() if k != "continuation_ids"} | {"continuation": "hello"})
    dataset = _dataset(path, tmp_path)
    example = _reader(dataset).example(dataset.rows[0], 0)
    assert example.response[: len(text_ids(TOKENIZER, "hello"))] == text_ids(TOKENIZER, "hello")


def test_the_rows_are_kept_and_other_data_is_refused(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6)
    first, again = _dataset(path, tmp_path), _dataset(path, tmp_path)
    np.testing.assert_array_equal(first.rows, again.rows)
    assert again.templates == ((INSTRUCTION, "instruction-first"), (INSTRUCTION, "speech-first"))
    assert _reader(again).example(again.rows[0], 0).response
    _rewrite(path, lambda number, row: row | {"text": "changed"})
    with pytest.raises(DataError, match="started with other data"):
        _dataset(path, tmp_path)


def test_rows_that_an_older_version_measured_are_read(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6)
    new = _dataset(path, tmp_path)
    rows = np.array(new.rows)
    older_names = ["hash", "row", "source", "frame", "frames", "transcript", "tail", "no_speech"]
    older = np.dtype([(name, ROW[field]) for name, field in zip(older_names, ROW.names, strict=True)])
    for name in ("rows.npy", "held_out.npy"):
        np.save(tmp_path / name, np.load(tmp_path / name).view(older))
    head = json.loads((tmp_path / "table.json").read_text())
    head["frames"] = head.pop("templates")
    (tmp_path / "table.json").write_text(json.dumps(head))
    old = _dataset(path, tmp_path)
    assert old.rows.dtype == ROW and old.templates == new.templates
    np.testing.assert_array_equal(old.rows, rows)


def test_no_speech_rows_take_a_prompt_of_the_others_and_the_set_sentence(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=9)
    silent = {"text": "", "no_speech": True, "behaviour": "", "order": ""}
    _rewrite(path, lambda number, row: row if number > 2 else {"id": row["id"], "audio": row["audio"]} | silent)
    for targets, expected in ((CE, "nothing"), (replace(CE, reads_out=True), "")):
        dataset = _dataset(path, tmp_path / str(targets.reads_out), targets)
        reader = _reader(dataset, targets)
        rows = [row for row in dataset.rows if row["no_speech"]]
        assert len(rows) == 3
        for row in rows:
            example = reader.example(row, 0)
            assert example.no_speech and example.template.suffix_ids
            answer = [*text_ids(TOKENIZER, expected), IM_END] if expected else []
            assert example.response == answer


def test_ctc_targets_are_classes_and_what_cannot_be_spelled_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=5)
    texts = ["hello world", "hello " * 40, "hello\u0000", "", "days"]
    _rewrite(path, lambda number, row: row | {"text": texts[number]})
    dataset = _dataset(path, tmp_path, CTC)
    classes = {token: 1 + token for token in transcript_ids(TOKENIZER, "hello world days")}
    assert [json.loads(line)["reason"] for line in (tmp_path / "run.skipped.jsonl").open()] == ["no transcript"]
    strict, lenient = (
        _reader(dataset, CTC, classes),
        _reader(dataset, Targets(frozenset({"continuation"}), extras=frozenset({"readout"})), classes),
    )
    whole, long, unknown, last = dataset.rows
    example = strict.example(whole, 0)
    assert example.readout == [1 + token for token in example.transcript] and example.response == []
    with pytest.raises(Refused, match="more text than its speech can hold"):
        strict.example(long, 0)
    with pytest.raises(Refused, match="not in the adapter's read-out vocabulary"):
        strict.example(unknown, 0)
    assert strict.example(last, 0).readout
    # beside another loss such a row has no CTC term
    assert lenient.example(long, 0).readout is None and lenient.example(last, 0).readout


@pytest.mark.parametrize("extra", ["readout", "fits"])
def test_a_row_without_a_transcript_is_learnt_from_where_the_loss_needs_none(tmp_path: Path, extra: Need) -> None:
    path = write_data(tmp_path, rows=5)
    _rewrite(path, lambda number, row: row | {"text": "" if number == 2 else "hello world"})
    targets = replace(CE, extras=frozenset({extra}), reads_out=extra == "readout")
    dataset = _dataset(path, tmp_path / "ce", targets)
    classes = {token: 1 + token for token in transcript_ids(TOKENIZER, "hello world")}
    reader = _reader(dataset, targets, classes)
    untold, told = reader.example(dataset.rows[2], 0), reader.example(dataset.rows[1], 0)
    assert untold.response and told.response
    # the further term leaves it out: as a target, "" says that nothing is spoken
    assert (untold.readout, untold.fits) == (None, False) and (told.readout or told.fits)
    frames, after = (int(dataset.rows[name][2]) for name in ("encoder_frames", "tokens_after_audio"))
    assert reader.lengths(dataset.rows)[2] == after + (frames // 8 if extra == "readout" else -(-frames // 4))

    own = Targets(frozenset({extra}), runs_llm=False)  # but a loss that needs one refuses it
    assert len(_dataset(path, tmp_path / extra, own).rows) == 4
    assert "no transcript" in (tmp_path / extra / "run.skipped.jsonl").read_text()
    with pytest.raises(Refused, match="no transcript"):
        _reader(dataset, own, classes).example(dataset.rows[2], 0)


def test_stored_teacher_must_fit(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6, top_k=3)
    assert choose_teacher([str(path)], "auto") == "stored"
    dataset = _dataset(path, tmp_path, KL, stored_teacher=True)
    example = _reader(dataset, KL).example(dataset.rows[2], 0)
    assert example.teacher[0].shape == (len(example.response), 3)
    with pytest.raises(TopKError, match="temperature 1, not 2"):
        open_sources([str(path)], stored_teacher=True, temperature=2.0)
    rows = _rewrite(path, lambda number, row: row | {"continuation_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]})
    changed = replace(dataset, sources=tuple(open_sources([str(path)], stored_teacher=True)))
    with pytest.raises(Refused, match="stored top-k has"):
        _reader(changed, KL).example(dataset.rows[2], 0)
    write_teacher(path, rows[:3], 3, np.random.default_rng(0))
    with pytest.raises(DataError, match="holds 3 rows"):
        open_sources([str(path)], stored_teacher=True)


def test_one_file_with_and_one_without_a_stored_teacher_is_an_error(tmp_path: Path) -> None:
    with_top = write_data(tmp_path / "a", rows=3, top_k=2)
    without = write_data(tmp_path / "b", rows=3)
    assert choose_teacher([str(without)], "auto") == "online"
    with pytest.raises(DataError, match="--score-only"):
        choose_teacher([str(with_top), str(without)], "auto")


def test_lengths_are_those_of_the_sequence_that_is_run(tmp_path: Path) -> None:
    dataset = _dataset(write_data(tmp_path, rows=6), tmp_path)
    rows, after = dataset.rows, dataset.rows["tokens_after_audio"]
    np.testing.assert_array_equal(_reader(dataset).lengths(rows), -(-rows["encoder_frames"] // 4) + after)
    reads_out = _reader(dataset, replace(CE, reads_out=True)).lengths(rows)
    np.testing.assert_array_equal(reads_out, rows["transcript_tokens"] + after)
    np.testing.assert_array_equal(_reader(dataset, CTC).lengths(rows), rows["encoder_frames"])
    assert ROW.itemsize <= 40  # bytes a row on disk
