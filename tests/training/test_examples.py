"""A row as what a step needs; and the table of what the plan must know of every row."""

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
from blsp.llm.prompt import frame_prompt, text_ids, transcript_ids
from blsp.training.dataset import ROW, DataError, Table, choose_teacher, id_hash, open_sources, open_table
from blsp.training.examples import Example, ExampleReader, Targets, lengths_for

CE, CTC = Targets("ce", reads_out=False, ctc=False), Targets("ctc", reads_out=True, ctc=True)


def _reader(taught: Targets = CE) -> ExampleReader:
    return ExampleReader(
        taught=taught,
        tokenizer=tiny_tokenizer(),
        extractor=WhisperFeatureExtractor(feature_size=16),
        num_audio_tokens=lambda frames: -(-frames // 4),
        end=IM_END,
        no_speech_sentence="nothing",
        classes={token: token - 2 for token in range(3, 300)} if taught.ctc else {},
    )


def _table(path: Path, reader: ExampleReader, folder: Path, hold_out: int = 0, **more) -> tuple[Table, list]:
    sources = open_sources([str(path)], **more)
    with SkippedLog(folder / "run") as skipped:
        return open_table(sources, reader, folder, skipped, hold_out, reader.pairs), sources


def _rewrite(path: Path, change) -> list[dict]:
    rows = [change(number, json.loads(line)) for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_an_answer_cut_at_the_limit_teaches_no_end(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=8)
    reader = _reader()
    table, sources = _table(path, reader, tmp_path)
    for place in table.rows:
        row = sources[0].rows[int(place["row"])]
        example = reader.example(place, sources, epoch=0)
        assert isinstance(example, Example)
        ended = row.extra["finish"] == "stop"
        assert example.response == row.extra["continuation_ids"] + [IM_END] * ended
        assert example.template == frame_prompt(reader.tokenizer, INSTRUCTION, row.extra["order"])
        assert place["tail"] == len(example.template.suffix_ids) + len(example.response) - 1
        assert example.transcript == transcript_ids(reader.tokenizer, row.text)
        assert place["frames"] == -(-example.mel_frames // 2)
        assert place["hash"] == id_hash(row.id)


def test_answers_from_behind_a_url_are_tokenised_here(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=1)
    _rewrite(
        path,
        lambda _, row: {k: v for k, v in row.items() if k != "continuation_ids"} | {"continuation": "hello"},
    )
    reader = _reader()
    table, sources = _table(path, reader, tmp_path)
    example = reader.example(table.rows[0], sources, 0)
    assert example.response[: len(text_ids(reader.tokenizer, "hello"))] == text_ids(reader.tokenizer, "hello")


def test_all_behaviours_of_an_utterance_are_held_out_together(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=40)
    rows = path.read_text().splitlines()
    both = [json.loads(row) for row in rows]
    both += [row | {"behaviour": "repeat", "instruction": "repeat", "order": "speech-first"} for row in both]
    path.write_text("".join(json.dumps(row) + "\n" for row in both))
    table, _ = _table(path, _reader(), tmp_path, hold_out=3)
    held, learnt = set(table.held_out["hash"].tolist()), set(table.rows["hash"].tolist())
    assert len(held) == 3 and len(table.held_out) == 6 and not held & learnt
    assert len(table.rows) == 74


def test_at_most_a_tenth_is_held_out(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=20)
    table, _ = _table(path, _reader(), tmp_path / "once", hold_out=64)
    assert len(table.held_out) == 2
    lines = path.read_text()
    path.write_text(lines + lines.replace('"continue"', '"repeat"'))
    table, _ = _table(path, _reader(), tmp_path / "twice", hold_out=64)
    assert len(table.held_out) == 4  # of utterances, whatever is asked about them
    assert (
        len(_table(write_data(tmp_path / "x", rows=9), _reader(), tmp_path / "x", hold_out=64)[0].held_out)
        == 0
    )


def test_the_table_is_kept_and_other_data_is_refused(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6)
    first, _ = _table(path, _reader(), tmp_path)
    reader = _reader()
    again, sources = _table(path, reader, tmp_path)
    np.testing.assert_array_equal(first.rows, again.rows)
    assert reader.pairs == [(INSTRUCTION, "instruction-first"), (INSTRUCTION, "speech-first")]
    assert isinstance(reader.example(again.rows[0], sources, 0), Example)
    _rewrite(path, lambda number, row: row | {"text": "changed"})
    with pytest.raises(DataError, match="begun with other data"):
        _table(path, _reader(), tmp_path)


def test_no_speech_rows_take_a_prompt_of_the_others_and_the_set_sentence(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=9)
    _rewrite(
        path,
        lambda number, row: (
            row
            if number > 2
            else {
                "id": row["id"],
                "audio": row["audio"],
                "text": "",
                "no_speech": True,
                "behaviour": "",
                "order": "",
            }
        ),
    )
    _rewrite(path, lambda _, row: row)
    for taught, expected in ((CE, "nothing"), (replace(CE, reads_out=True), "")):
        reader = _reader(taught)
        table, sources = _table(path, reader, tmp_path / str(taught.reads_out))
        silent = [place for place in table.rows if place["no_speech"]]
        assert len(silent) == 3
        for place in silent:
            example = reader.example(place, sources, 0)
            assert example.no_speech and example.template.suffix_ids
            answer = [*text_ids(reader.tokenizer, expected), IM_END] if expected else []
            assert example.response == answer


def test_ctc_targets_are_classes_and_what_cannot_be_spelled_is_left_out_with_its_reason(
    tmp_path: Path,
) -> None:
    path = write_data(tmp_path, rows=5)
    texts = ["hello world", "hello " * 40, "hello\u0000", "", "days"]
    _rewrite(path, lambda number, row: row | {"text": texts[number]})
    reader = _reader(CTC)
    reader.classes = {token: 1 + token for token in transcript_ids(reader.tokenizer, "hello world days")}
    table, sources = _table(path, reader, tmp_path)
    assert [json.loads(line)["reason"] for line in (tmp_path / "run.skipped.jsonl").open()] == [
        "no transcript"
    ]
    found = [reader.example(place, sources, 0) for place in table.rows]
    assert found[0].readout == [1 + token for token in found[0].transcript] and found[0].response == []
    assert "more text than its speech can hold" in found[1]
    assert "not in the adapter's read-out vocabulary" in found[2]
    assert isinstance(found[3], Example)


def test_stored_teacher_must_fit(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6, top_k=3)
    assert choose_teacher([str(path)], "auto") == "stored"
    reader = _reader(replace(CE, loss="kl"))
    table, sources = _table(path, reader, tmp_path, teacher="stored")
    example = reader.example(table.rows[2], sources, 0)
    assert example.teacher[0].shape == (len(example.response), 3)
    with pytest.raises(TopKError, match="temperature 1, not 2"):
        open_sources([str(path)], teacher="stored", temperature=2.0)
    rows = _rewrite(path, lambda number, row: row | {"continuation_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]})
    assert "stored top-k has" in reader.example(table.rows[2], open_sources([str(path)], teacher="stored"), 0)
    write_teacher(path, rows[:3], 3, np.random.default_rng(0))
    with pytest.raises(DataError, match="holds 3 rows"):
        open_sources([str(path)], teacher="stored")


def test_one_file_with_and_one_without_a_stored_teacher_is_an_error(tmp_path: Path) -> None:
    with_top = write_data(tmp_path / "a", rows=3, top_k=2)
    without = write_data(tmp_path / "b", rows=3)
    assert choose_teacher([str(without)], "auto") == "online"
    with pytest.raises(DataError, match="--score-only"):
        choose_teacher([str(with_top), str(without)], "auto")


def test_lengths_are_those_of_the_sequence_that_is_run(tmp_path: Path) -> None:
    path = write_data(tmp_path, rows=6)
    reader = _reader()
    table, _ = _table(path, reader, tmp_path)
    np.testing.assert_array_equal(
        lengths_for(reader, table.rows), -(-table.rows["frames"] // 4) + table.rows["tail"]
    )
    lengths = lengths_for(replace(reader, taught=replace(CE, reads_out=True)), table.rows)
    np.testing.assert_array_equal(lengths, table.rows["transcript"] + table.rows["tail"])
    assert ROW.itemsize <= 40  # bytes a row on disk
