"""`blsp align` and `blsp train --loss embed` and `embed-ctc` on tiny models, alone and beside a loss of the LLM."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import tiny_blsp
from support.training_examples import write_data

from blsp.features.align import align
from blsp.model.checkpoint import save_adapter
from blsp.settings import AlignSettings, SettingsError, TrainSettings
from blsp.training import reporting
from blsp.training.loop import train


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr(reporting, "draw", lambda *_: None)


@pytest.fixture
def settings(tmp_path: Path, tiny_llm, tiny_whisper) -> TrainSettings:
    return TrainSettings(
        data=(str(write_data(tmp_path / "data", rows=22, top_k=4)),),
        out=tmp_path / "run",
        audio_model=tiny_whisper,
        llm=tiny_llm("llama"),
        adapter="conv",
        loss="ce",
        adapter_options=("bottleneck=8",),
        batch_size=6,
        steps=6,
        lr=1e-2,
        held_out=2,
        log_every=2,
        probe_every=3,
    )


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["conv", "stack"])
def test_embed_then_kl_with_a_share_of_embed_ctc(settings, tmp_path: Path, tiny_models_folder, adapter: str) -> None:
    aligner, processor = tiny_blsp(tiny_models_folder, adapter="grounded")
    save_adapter(aligner, processor, tmp_path / "grounded")
    options = {"conv": ("bottleneck=8",), "stack": ("hidden=16",)}[adapter]
    first = replace(settings, adapter=adapter, adapter_options=options, loss="embed", cache=tmp_path / "features")
    first = replace(first, filler="a", steps=40, probe_every=50, log_every=5, batch_size=8)
    with pytest.raises(SettingsError, match="blsp align"):
        train(first)
    align(AlignSettings(settings.data[0], tmp_path / "features", str(tmp_path / "grounded")))
    train(replace(first, out=tmp_path / "embed"))
    losses = [row["loss"] for row in _metrics(tmp_path / "embed")]
    assert losses[-1] < losses[0] - 1.0
    assert 0 <= _metrics(tmp_path / "embed")[-1]["held_out_tokens"] <= 1
    start = (str(tmp_path / "embed" / "adapter"),)
    kept = replace(first, out=tmp_path / "kl", init_from=start, adapter_options=(), loss="kl", embed_weight=0.3)
    kept = replace(kept, cache=tmp_path / "without_times")
    train(replace(kept, steps=2, log_every=1))
    without = replace(kept, out=tmp_path / "without", embed_weight=0.0, steps=2, log_every=1)
    train(without)
    assert _metrics(kept.out)[0]["loss"] > _metrics(without.out)[0]["loss"]


@pytest.mark.parametrize("cached", [True, False])
def test_embed_ctc_needs_no_token_times(settings, tmp_path: Path, cached: bool) -> None:
    cache = tmp_path / "features" if cached else None
    run = replace(settings, loss="embed-ctc", cache=cache, filler="a", steps=40, probe_every=50, log_every=5)
    train(run)
    rows = _metrics(run.out)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[-1]["held_out_wer"] >= 0
    assert not list(tmp_path.rglob("token_times.sqlite"))


def test_embed_needs_a_cache_and_one_filler_token(settings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="blsp align"):
        train(replace(settings, loss="embed"))
    with pytest.raises(SettingsError, match="conv, stack"):
        train(replace(settings, adapter="grounded", embed_weight=0.1, cache=tmp_path))
    with pytest.raises(SettingsError, match="name one"):
        train(replace(settings, loss="embed", cache=tmp_path / "features", filler="a b c"))


def test_cutting_a_step_changes_nothing_but_rounding(settings, tmp_path: Path, tiny_models_folder) -> None:
    aligner, processor = tiny_blsp(tiny_models_folder, adapter="grounded")
    save_adapter(aligner, processor, tmp_path / "grounded")
    cache = tmp_path / "features"
    align(AlignSettings(settings.data[0], cache, str(tmp_path / "grounded")))
    whole = replace(settings, loss="embed", cache=cache, filler="a", dtype="float64", log_every=1)
    cut = replace(whole, out=tmp_path / "cut", batch_tokens=80)
    train(whole)
    train(cut)
    first, second = ([(row["loss"], row["samples"]) for row in _metrics(run.out)] for run in (whole, cut))
    assert len(first) == 6
    for (loss, samples), (other, others) in zip(first, second, strict=True):
        assert loss == pytest.approx(other, rel=1e-9) and samples == others
