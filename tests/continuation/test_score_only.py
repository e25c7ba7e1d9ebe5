"""`--score-only`: the teacher's top-k is the same as if generation had stored it."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.misbehaving_server import misbehaving_server
from support.step_one import in_a_process, products, read_header, read_rows
from transformers import AutoModelForCausalLM

from blsp.continuation.topk import TopKStore, topk_folder
from blsp.continuation.writer import TOKENISED, write_continuations
from blsp.data.jobs import JobError
from blsp.settings import ContinueSettings

Settings = Callable[..., ContinueSettings]


@pytest.fixture
def plain(tmp_path: Path, settings: Settings) -> Path:
    """Continuations without a top-k."""
    write_continuations(settings(tmp_path / "out.jsonl"))
    return tmp_path / "out.jsonl"


def test_scored_afterwards_is_kept_while_writing(tmp_path: Path, settings: Settings, plain: Path) -> None:
    rows = plain.read_bytes()
    write_continuations(settings(tmp_path / "kept.jsonl", top_k=6))
    write_continuations(settings(plain, top_k=6, score_only=True))
    assert plain.read_bytes() == rows == (tmp_path / "kept.jsonl").read_bytes()
    kept, scored = TopKStore(topk_folder(tmp_path / "kept.jsonl")), TopKStore(topk_folder(plain))
    assert len(kept) == len(scored) == len(read_rows(plain)) and kept.meta["steps"] == scored.meta["steps"]
    for row in range(len(kept)):
        for written, forced in zip(kept.get(row), scored.get(row), strict=True):
            assert written.shape == forced.shape and np.allclose(written, forced, atol=4e-3)
    assert read_header(plain)["top_k"] == {"k": 6, "temperature": 1.0}
    assert scored.meta["source"] == "teacher-forced" and kept.meta["source"] == "generated"


def test_a_temperature_softens_before_the_top_is_taken(settings: Settings, plain: Path) -> None:
    write_continuations(settings(plain, top_k=320, score_only=True, top_k_temperature=2.0))
    ids, logp = TopKStore(topk_folder(plain)).get(0)
    assert np.allclose(np.exp(logp.astype(np.float64)).sum(axis=1), 1.0, atol=2e-3)
    shutil.rmtree(topk_folder(plain))
    write_continuations(settings(plain, top_k=320, score_only=True))
    ids_1, logp_1 = TopKStore(topk_folder(plain)).get(0)
    softened = torch.tensor(logp_1.astype(np.float32) / 2).log_softmax(-1).numpy()
    assert np.array_equal(ids[:, 0], ids_1[:, 0]) and np.allclose(softened, logp, atol=1e-2)


def test_temperatures_agree_while_writing_too(tmp_path: Path, settings: Settings, plain: Path) -> None:
    write_continuations(settings(tmp_path / "kept.jsonl", top_k=6, top_k_temperature=2.0))
    write_continuations(settings(plain, top_k=6, score_only=True, top_k_temperature=2.0))
    for row in range(10):
        kept, scored = (TopKStore(topk_folder(out)).get(row)[1] for out in (tmp_path / "kept.jsonl", plain))
        assert np.allclose(kept, scored, atol=4e-3)


def test_ten_kills_change_nothing(tmp_path: Path, settings: Settings, plain: Path) -> None:
    header = Path(f"{plain}.meta.json").read_bytes()
    write_continuations(settings(plain, top_k=4, score_only=True))
    whole, draw, killed = products(plain), random.Random(1), 0
    while killed < 10:
        if topk_folder(plain).exists():  # a run that outlived its kill: begin again
            shutil.rmtree(topk_folder(plain))
            Path(f"{plain}.meta.json").write_bytes(header)
        process = in_a_process(settings(plain, top_k=4, score_only=True))
        process.join(draw.uniform(0.02, 0.8))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    write_continuations(settings(plain, top_k=4, score_only=True))
    assert products(plain) == whole


def test_rows_of_a_server_get_ids_of_their_text(tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "out.jsonl"
    with misbehaving_server([]) as server:
        write_continuations(settings(out, engine_url=(server.url,)))
    before = read_rows(out)
    write_continuations(settings(out, top_k=3, score_only=True))
    rows, store = read_rows(out), TopKStore(topk_folder(out))
    assert [row | {"continuation_ids": None} for row in rows] == [row | {"continuation_ids": None} for row in before]
    assert read_header(out)["continuation_ids"] == TOKENISED
    for number, row in enumerate(rows):
        steps = len(row["continuation_ids"]) + (row["finish"] == "stop")
        assert len(store.get(number)[0]) == (0 if row["id"] == "silence" else steps)


def test_the_teacher_must_be_the_writer(tmp_path: Path, settings: Settings, plain: Path, stopping_llm: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(stopping_llm, other)
    llm = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        llm.get_input_embeddings().weight[7] += 1
    llm.save_pretrained(other)
    with pytest.raises(JobError, match="the LLM that wrote"):
        write_continuations(settings(plain, llm=str(other), top_k=4, score_only=True))


def test_another_k_is_refused_and_the_same_is_left_alone(settings: Settings, plain: Path) -> None:
    write_continuations(settings(plain, top_k=4, score_only=True))
    before = products(plain)
    write_continuations(settings(plain, top_k=4, score_only=True))
    assert products(plain) == before
    with pytest.raises(JobError, match="remove it to score anew"):
        write_continuations(settings(plain, top_k=5, score_only=True))


def test_the_first_command_still_finds_its_work_done(settings: Settings, plain: Path) -> None:
    with pytest.raises(JobError, match="--score-only"):
        write_continuations(settings(plain, top_k=4))
    write_continuations(settings(plain, top_k=4, score_only=True))
    before = products(plain)
    write_continuations(settings(plain))
    write_continuations(settings(plain, top_k=4))
    assert products(plain) == before


def test_nothing_to_score_is_told(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(JobError, match="does not exist"):
        write_continuations(settings(tmp_path / "nothing.jsonl", top_k=4, score_only=True))
