"""The search for a filler token: tokens keep their order, and every candidate is measured against plain text."""

from __future__ import annotations

import json

import filler
import numpy as np
import pytest
import torch
from support.tiny_models import tiny_blsp


def test_tokens_keep_their_order_between_fillers() -> None:
    tokens = torch.arange(1.0, 31.0)[:, None].expand(-1, 4)
    places = filler.spaced_out(tokens, torch.zeros(4), np.random.default_rng(0))
    spoken = places[:, 0] != 0
    assert torch.equal(places[spoken], tokens)
    assert not spoken[: filler.PAUSE].any() and not spoken[-filler.PAUSE :].any()
    assert len(places) / len(tokens) == pytest.approx(6.25 / 3.4, rel=0.3)


def test_candidates_are_sorted_and_must_be_one_token(tiny_models_folder, capsys, monkeypatch) -> None:
    model, processor = tiny_blsp(tiny_models_folder)
    rows = [
        {
            "text": text,
            "instruction": "please continue",
            "order": order,
            "continuation_ids": [5, 6, 7],
            "finish": "stop",
        }
        for text, order in (("hello world", "speech-first"), ("the capital of france", "instruction-first"))
    ]
    with torch.no_grad():
        figures = filler.measure(model, processor.tokenizer, rows, [".", "hello world hello"])
        assert "left out" in capsys.readouterr().out
        assert set(figures) == {"another transcript", "zeros", "'.'"}
        assert list(figures.values()) == sorted(figures.values()) and min(figures.values()) > 0
        monkeypatch.setattr(filler, "spaced_out", lambda tokens, *_: tokens)  # nothing between the tokens
        assert filler.measure(model, processor.tokenizer, rows, [])["zeros"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows", [[], [{"text": "a"}, {"text": "b"}], [{"text": "a", "continuation_ids": [5]}] * 2])
def test_data_without_two_usable_texts_is_named(tmp_path, capsys, monkeypatch, rows: list[dict]) -> None:
    data = tmp_path / "continued.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["filler.py", "--llm", "x", "--data", str(data)])
    with pytest.raises(SystemExit):
        filler.main()
    assert f"{data}: needs two texts with continuation_ids" in capsys.readouterr().err
