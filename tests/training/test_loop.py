"""`blsp train` on tiny models: the run folder, stages, errors, caches, unusable rows."""

import errno
import json
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny_models import save_language_model
from support.training_examples import write_data
from torch.utils._python_dispatch import TorchDispatchMode

from blsp.data.audio import write_wav
from blsp.data.files import DiskFullError
from blsp.data.jobs import JobError, SkippedLog, lock_job
from blsp.data.manifest import Manifest
from blsp.distributed import find_runtime
from blsp.features.cache import FeatureCache
from blsp.model.adapter_parts import CachedValue
from blsp.model.checkpoint import load_blsp
from blsp.model.configuration_blsp import CheckpointError
from blsp.settings import SettingsError, TrainSettings
from blsp.settings.flags import read_settings
from blsp.training import loop, reporting, run_state, step
from blsp.training.dataset import DataError
from blsp.training.loop import TrainingError, train
from blsp.training.optimiser import learning_rate
from blsp.training.run import objective_of
from blsp.training.run_state import merge_skipped, newest_complete
from blsp.training.step import Objective
from blsp.training.verdict import Verdict


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=22, top_k=4)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch) -> None:
    """Drawing costs more than a tiny run: once is enough."""
    if "contract" not in request.node.name:
        monkeypatch.setattr(reporting, "draw", lambda *_: None)


@pytest.fixture
def settings(data: Path, tmp_path: Path, tiny_llm, tiny_whisper) -> TrainSettings:
    return TrainSettings(
        data=(str(data),),
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


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "model.safetensors")


def test_the_run_folder_is_what_the_contract_says(settings: TrainSettings, capsys) -> None:
    train(settings)
    out = settings.out
    rows = _metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 6]
    for name in ("step", "loss", "lr", "samples", "audio_seconds", "seconds", "padding"):
        assert all(isinstance(row[name], int | float) for row in rows)
    probed = [row["step"] for row in rows if "held_out_kl" in row]
    assert probed == [1, 3, 6]
    assert {"held_out_kl_shuffled", "held_out_top1", "train_kl", "train_top1"} <= set(rows[-1])
    assert all(before["samples"] < after["samples"] for before, after in pairwise(rows))
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    verdict = Verdict.read(out)
    assert verdict is not None and verdict.clips == 2 and verdict.own > 0 and verdict.exchanged > 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(verdict)
    assert "6 steps: too few for a fresh adapter" in printed.err
    held_out = list(Manifest(out / "heldout.jsonl"))
    assert len(held_out) == 2 and all(Path(row.audio).exists() and row.instruction is None for row in held_out)
    assert newest_complete(out / "checkpoints").name == "step-6"
    card = (out / "adapter" / "README.md").read_text()
    assert "library_name: transformers" in card and "held-out" in card and f"## Measured\n\n{verdict}\n" in card
    shown = {line.split(" | ")[0] for line in card.splitlines() if "next-token divergence" in line and line[0] == "|"}
    assert shown == {"| not learnt from", "| learnt from"}
    model, _ = load_blsp(out / "adapter", find_runtime("cpu"))
    stored = load_file(out / "checkpoints" / "step-6" / "adapter.safetensors")
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, stored[name])
    capsys.readouterr()
    train(settings)  # finished: nothing is done again
    assert "is finished" in capsys.readouterr().out


def test_settings_yaml_can_be_given_back(settings: TrainSettings) -> None:
    train(replace(settings, steps=1))
    read = read_settings(TrainSettings, ["--config", str(settings.out / "settings.yaml")], "blsp train")
    assert replace(read, config=None) == replace(settings, steps=1)


def test_other_settings_are_refused_with_their_names(settings: TrainSettings) -> None:
    train(settings)
    with pytest.raises(JobError, match=r"lr was 0\.01, is 0\.1.*--out"):
        train(replace(settings, lr=0.1))
    train(replace(settings, keep=5))  # not what the result depends on


def test_two_runs_in_one_folder_are_refused_and_nothing_foreign_is_removed(settings: TrainSettings) -> None:
    mine = settings.out / "checkpoints" / "not-ours.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept")
    with lock_job(settings.out), pytest.raises(JobError, match="has been at work"):
        train(settings)
    train(replace(settings, steps=1))
    assert mine.read_text() == "kept"


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(settings: TrainSettings, tmp_path: Path) -> None:
    saving = replace(settings, save_every=2)
    whole, saved = run_state.save_file, []

    def fill_up(tensors: dict[str, torch.Tensor], path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "save_file", fill_up)
        with pytest.raises(DiskFullError, match=r"checkpoints/step-4: no room for it: [\d,]+ bytes are needed"):
            train(saving)
        assert [path.name for path in (saving.out / "checkpoints").iterdir()] == ["step-2"]
        train(saving)  # from step 2: the first two steps are not done again
    assert len(saved) == 4  # of steps 2 and 4 (refused), then of 4 and 6
    train(replace(saving, out=tmp_path / "undisturbed"))
    ours, theirs = _weights(saving.out), _weights(tmp_path / "undisturbed")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_is_caught_in_the_steps_and_not_while_the_run_is_prepared(settings, monkeypatch) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def watched(name: str):
        original = getattr(loop, name)
        return lambda *given: (seen.append((name, signal.getsignal(signal.SIGTERM))), original(*given))[1]

    for name in ("prepare", "learn"):
        monkeypatch.setattr(loop, name, watched(name))
    train(replace(settings, steps=1))
    (_, prepared), (_, learning) = seen
    assert prepared == before and learning != before and signal.getsignal(signal.SIGTERM) == before


def test_loss_falls_and_the_curve_is_the_seed_s(settings: TrainSettings, tmp_path: Path) -> None:
    long = replace(settings, steps=25, probe_every=100, log_every=5)
    train(long)
    losses = [row["loss"] for row in _metrics(long.out)]
    assert losses[-1] < losses[0] - 0.2
    again, other = replace(long, out=tmp_path / "again"), replace(long, out=tmp_path / "other", seed=1)
    train(again)
    train(other)
    assert [row["loss"] for row in _metrics(again.out)] == losses
    assert [row["loss"] for row in _metrics(other.out)] != losses


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_bfloat16_learns_what_float32_learns(settings: TrainSettings, tmp_path: Path, loss: str) -> None:
    exact = replace(settings, loss=loss, steps=1)
    fast = replace(exact, dtype="bfloat16", out=tmp_path / "fast")
    train(exact)
    train(fast)
    wanted, found = _metrics(exact.out)[0], _metrics(fast.out)[0]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.3)


@pytest.mark.parametrize(("adapter", "loss"), [("conv", "ce"), ("grounded", "ctc"), ("grounded", "kl")])
def test_cached_features_and_encoding_on_the_fly_agree(settings, tmp_path: Path, adapter: str, loss: str) -> None:
    online = replace(settings, adapter=adapter, loss=loss, steps=2)
    cached = replace(online, out=tmp_path / "cached", cache=tmp_path / "features")
    train(online)
    train(cached)
    assert len(list((tmp_path / "features").iterdir())) > 0
    ours, theirs = _metrics(cached.out)[0], _metrics(online.out)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)  # the cache holds float16
    assert ours["samples"] == theirs["samples"]


def test_stored_teacher_is_taken_where_it_is_there(settings, monkeypatch) -> None:
    objectives = []
    run = step.run
    monkeypatch.setattr(
        step, "run", lambda m, e, objective, llm: (objectives.append(objective), run(m, e, objective, llm))[1]
    )
    train(replace(settings, loss="kl", steps=1))
    assert objectives[0].stored_teacher
    train(replace(settings, loss="kl", steps=1, teacher="online", out=settings.out.with_name("online")))
    assert not objectives[-1].stored_teacher


def test_stored_teacher_of_another_temperature_is_refused(settings) -> None:
    with pytest.raises(ValueError, match="temperature 1, not 2"):
        train(replace(settings, loss="kl", temperature=2.0))


def test_stages_follow_each_other(settings: TrainSettings, tmp_path: Path) -> None:
    recipe = {
        "data": list(settings.data),
        "out": str(tmp_path / "staged"),
        "audio-model": settings.audio_model,
        "llm": settings.llm,
        "adapter": "grounded",
        "adapter-options": ["bottleneck=8"],
        "batch-size": 6,
        "held-out": 2,
        "lr": 0.01,
        "stages": [{"name": "ground", "loss": "ctc", "steps": 3}, {"name": "align", "loss": "kl", "steps": 2}],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    staged = read_settings(TrainSettings, ["--config", str(file)], "blsp train")
    train(staged)
    out = tmp_path / "staged"
    grounded, aligned = (
        load_file(out / "stages" / name / "adapter" / "model.safetensors") for name in ("ground", "align")
    )
    final = _weights(out)
    assert all(torch.equal(final[name], aligned[name]) for name in aligned)
    assert any(not torch.equal(final[name], grounded[name]) for name in grounded)
    assert [(row["stage"], row["step"]) for row in _metrics(out)] == [
        ("ground", 1), ("ground", 3), ("align", 4), ("align", 5),
    ]  # fmt: skip
    assert Verdict.read(out / "stages" / "ground").finding == "not judged"  # the LLM was not run
    assert Verdict.read(out) == Verdict.read(out / "stages" / "align") and Verdict.read(out).clips == 2
    held_out, of_last = (list(Manifest(str(path / "heldout.jsonl"))) for path in (out, out / "stages" / "align"))
    assert [row.id for row in held_out] == [row.id for row in of_last]
    assert len(held_out) == 2 and all(Path(row.audio).exists() for row in held_out)
    assert "held_out_wer" in _metrics(out)[0] and "held_out_kl" in _metrics(out)[-1]
    first = torch.cat([tensor.flatten() for tensor in grounded.values()])
    last = torch.cat([tensor.flatten() for tensor in aligned.values()])
    assert (first - last).abs().mean() < 0.02  # the second stage began where the first ended
    again = read_settings(TrainSettings, ["--config", str(out / "settings.yaml")], "blsp train")
    assert [stage.loss for stage in again.stages] == ["ctc", "kl"]
    assert again.stages[1].init_from == (str(out / "stages" / "ground" / "adapter"),)


def test_broken_and_unusable_rows_are_listed_and_the_rest_is_learnt(settings, tmp_path: Path) -> None:
    path = write_data(tmp_path / "mixed", rows=10)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    folder = path.parent
    (folder / "0.wav").write_bytes(b"not audio")
    rows[1]["audio"] = "missing.wav"
    rows[2] |= {"continuation": "", "continuation_ids": [], "finish": "length"}
    del rows[3]["continuation"], rows[3]["continuation_ids"]
    rows[4]["audio"] = ""
    write_wav(folder / "5.wav", 0.1 * np.random.default_rng(5).standard_normal(16_000 * 3).astype(np.float32))
    header = (folder / "6.wav").read_bytes()
    (folder / "6.wav").write_bytes(header[:-300])
    write_wav(folder / "7.wav", np.zeros(16_000, np.float32))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = replace(settings, data=(str(path),), steps=2, max_seconds=2.0, held_out=0)
    for chosen in (run, replace(run, out=tmp_path / "cached", cache=tmp_path / "features")):
        train(chosen)
        listed = [json.loads(line) for line in Path(f"{chosen.out}.skipped.jsonl").read_text().splitlines()]
        reasons = {row["id"]: row["reason"] for row in listed}
        assert set(reasons) == {f"clip-{number}" for number in range(8)}
        assert "continuation" in reasons["clip-3"] and "no audio" in reasons["clip-4"]
        assert "--max-seconds 2" in reasons["clip-5"]
        assert _metrics(chosen.out)[-1]["samples"] == 2 * 2
    # why clips were not encoded is the run's own list: another run on the cache, and a resume, leave it as it is
    not_encoded = (chosen.out / "features.skipped.jsonl").read_bytes()
    assert b"missing.wav" in not_encoded and not list(chosen.cache.glob("*.skipped.jsonl"))
    train(replace(chosen, out=tmp_path / "second"))
    train(chosen)
    assert (chosen.out / "features.skipped.jsonl").read_bytes() == not_encoded


def test_clips_of_two_files_that_have_one_id_are_two_clips(settings, tmp_path: Path) -> None:
    for name in ("first", "second"):
        rows = [json.loads(line) for line in write_data(tmp_path / name, rows=20).read_text().splitlines()]
        rows = [row | {"text": f"{name} {number}"} for number, row in enumerate(rows)]
        asked_twice = [row | {"behaviour": "repeat"} for row in rows]
        lines = [json.dumps(row) + "\n" for row in rows + asked_twice]
        (tmp_path / name / f"{name}.jsonl").write_text("".join(lines))
    data = tuple(str(tmp_path / name / f"{name}.jsonl") for name in ("first", "second"))
    train(replace(settings, data=data, steps=1, held_out=2))
    held_out = list(Manifest(settings.out / "heldout.jsonl"))
    of_first, of_second = ([row.id for row in held_out if row.text.startswith(name)] for name in ("first", "second"))
    assert len(of_first) == 2 and of_second == [f"second/{id}" for id in of_first]
    assert len({row.audio for row in held_out}) == 4
    assert Verdict.read(settings.out).clips == 4


def test_nothing_to_learn_from_is_an_error(settings, tmp_path: Path) -> None:
    path = write_data(tmp_path / "none", rows=2)
    path.write_text("".join(json.dumps(json.loads(line) | {"audio": ""}) + "\n" for line in path.open()))
    with pytest.raises(DataError, match=r"skipped\.jsonl"):
        train(replace(settings, data=(str(path),)))


def test_continuations_of_another_llm_are_refused(settings, tmp_path: Path) -> None:
    path = write_data(tmp_path / "others", rows=4)
    (path.parent / "continued.jsonl.meta.json").write_text(json.dumps({"llm_sha256": "f" * 64}))
    (path.parent / "continued.meta.json").write_text(json.dumps({"llm_sha256": "f" * 64}))
    with pytest.raises(DataError, match="written by another LLM"):
        train(replace(settings, data=(str(path),)))


def test_a_loss_that_is_not_a_number_names_its_rows(settings, monkeypatch) -> None:
    run = step.run

    def poisoned(model, examples, objective, llm):
        sums = run(model, examples, objective, llm)
        return replace(sums, terms={name: term * float("nan") for name, term in sums.terms.items()})

    monkeypatch.setattr(step, "run", poisoned)
    with pytest.raises(TrainingError, match=r"step 1.*nan.*clip-\d+"):
        train(settings)


def test_an_unknown_option_of_the_adapter_is_refused_with_those_that_there_are(settings) -> None:
    with pytest.raises(SettingsError, match=r"'conv' has no option 'hiden'; it has bottleneck=512"):
        train(replace(settings, adapter_options=("hiden=12",)))


def test_an_option_whose_value_is_not_yaml_is_refused_by_name(settings) -> None:
    with pytest.raises(SettingsError, match=r"--adapter-options strides=\[2,2: its value is not YAML"):
        train(replace(settings, adapter="grounded", adapter_options=("strides=[2,2",)))
    assert not settings.out.exists()


def test_init_from_goes_on_with_an_adapter_of_its_kind(settings, tmp_path: Path, tiny_llm) -> None:
    train(settings)
    start = str(settings.out / "adapter")
    train(replace(settings, out=tmp_path / "on", init_from=(start,), adapter_options=(), steps=1, lr=1e-9))
    before, after = _weights(settings.out), _weights(tmp_path / "on")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(SettingsError, match="is a conv adapter"):
        train(replace(settings, out=tmp_path / "x", init_from=(start,), adapter="stack", adapter_options=()))
    other = save_language_model(tmp_path / "other-llm", "llama", seed=9)
    with pytest.raises(CheckpointError, match="other weights than --llm"):
        train(replace(settings, out=tmp_path / "y", init_from=(start,), adapter_options=(), llm=other))


def test_init_from_takes_options_that_the_adapter_has_and_names_both_values_of_others(settings, tmp_path: Path) -> None:
    train(replace(settings, adapter="grounded", loss="ctc", steps=1))
    start = (str(settings.out / "adapter"),)
    on = replace(settings, out=tmp_path / "on", init_from=start, adapter="grounded", loss="ctc", steps=1)
    same = ("bottleneck=8", "embedding_std=1", "layers=0", "strides=[2,2,1]")  # the last two are defaults
    train(replace(on, adapter_options=same))
    with pytest.raises(SettingsError, match=r"built with bottleneck=8, not 512;.*\(--adapter-options, --paper\)"):
        train(replace(on, out=tmp_path / "x", adapter_options=("bottleneck=512",)))


def test_init_from_several_starts_at_their_mean(settings, tmp_path: Path) -> None:
    train(settings)
    train(replace(settings, out=tmp_path / "other", seed=5))
    both = tuple(str(out / "adapter") for out in (settings.out, tmp_path / "other"))
    train(replace(settings, out=tmp_path / "on", init_from=both, adapter_options=(), steps=1, lr=1e-9))
    one, other, mean = (_weights(out) for out in (settings.out, tmp_path / "other", tmp_path / "on"))
    assert all(torch.allclose(mean[name], (one[name] + other[name]) / 2, atol=1e-6) for name in mean)


def test_init_from_reads_out_the_new_words_too(settings, tmp_path: Path) -> None:
    grounded = replace(settings, adapter="grounded", adapter_options=(), loss="ctc", readout="data", steps=1)
    rows = Path(settings.data[0]).read_text().splitlines()
    few = Path(settings.data[0]).with_name("few.jsonl")
    few.write_text("\n".join(rows[: len(rows) // 2]) + "\n")
    train(replace(grounded, data=(str(few),), out=tmp_path / "few"))
    train(replace(grounded, out=tmp_path / "all", init_from=(str(tmp_path / "few" / "adapter"),), lr=1e-12))
    before, after = (_weights(tmp_path / n)["model.multi_modal_projector.vocabulary"].tolist() for n in ("few", "all"))
    assert set(before) < set(after)
    bias = {n: _weights(tmp_path / n)["model.multi_modal_projector.bias"] for n in ("few", "all")}
    kept = torch.tensor([after.index(token) for token in before])
    assert torch.allclose(bias["all"][kept], bias["few"], atol=1e-6)
    added = torch.tensor([place for place, token in enumerate(after) if token not in set(before)])
    assert torch.allclose(bias["all"][added], bias["few"].mean(), atol=1e-6)


def test_the_average_of_the_last_steps_is_what_is_shipped(settings, tmp_path: Path, monkeypatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    add = loop.add_to_average

    def watched(run, state, number):
        seen.append({n: t.clone() for n, t in run.model.model.multi_modal_projector.state_dict().items()})
        add(run, state, number)

    monkeypatch.setattr(loop, "add_to_average", watched)
    train(replace(settings, average_last=3))
    weights = _weights(settings.out)
    assert len(seen) == 3
    for name in seen[0]:
        mean = torch.stack([each[name] for each in seen]).mean(0)
        torch.testing.assert_close(weights[f"model.multi_modal_projector.{name}"], mean)


def test_probes_see_the_spelling_as_it_is_learnt(settings, tmp_path: Path, monkeypatch) -> None:
    options = ("bottleneck=8", "spelling=4")
    settings = replace(settings, adapter="grounded", loss="kl", adapter_options=options, probe_every=1, log_every=1)
    train(settings)
    monkeypatch.setattr(CachedValue, "get", lambda self, compute, *sources: compute(*sources))
    train(replace(settings, out=tmp_path / "nothing kept"))
    kept, fresh = ([row["held_out_kl"] for row in _metrics(out)] for out in (settings.out, tmp_path / "nothing kept"))
    assert kept == fresh and len(set(kept)) == 6


def test_no_speech_clips_are_made_and_mixed_in(settings) -> None:
    train(replace(settings, no_speech=0.5, steps=4))
    assert len(list((settings.out / "no_speech").glob("*.wav"))) == 64
    table = np.load(settings.out / "rows.npy")
    assert table["no_speech"].sum() == 64
    # 20 rows (2 are held out) and half as many again: an epoch of 5 steps of 6
    assert _metrics(settings.out)[-1]["samples"] == 4 * 6


def test_learning_rate_warms_up_and_falls(settings) -> None:
    rates = [learning_rate(replace(settings, warmup_steps=5), number, 100) for number in range(1, 101)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert all(a > b for a, b in pairwise(rates[5:])) and 0 < rates[-1] < 1e-5
    short = [learning_rate(settings, number, 20) for number in range(1, 21)]  # 1000 steps do not fit in 20
    assert max(short) == pytest.approx(0.01, rel=0.02) and short.index(max(short)) <= 2
    assert learning_rate(replace(settings, schedule="constant"), 90, 100) == 0.01


def test_features_of_the_run_are_found_again_by_the_cache(settings, tmp_path: Path) -> None:
    cached = replace(settings, cache=tmp_path / "features", steps=1)
    train(cached)
    train(replace(cached, out=tmp_path / "second"))
    assert isinstance(FeatureCache(tmp_path / "features", "other encoder"), FeatureCache)


def test_the_linear_schedule_is_a_line_to_zero(settings) -> None:
    run = replace(settings, schedule="linear", warmup_steps=2, lr=1.0)
    rates = [learning_rate(run, step, 21) for step in range(1, 22)]
    assert rates[:3] == [0.5, 1.0, pytest.approx(0.95)]
    assert all(a - b == pytest.approx(0.05) for a, b in pairwise(rates[1:]))
    assert rates[-1] == pytest.approx(0.05)


def test_the_gradient_is_clipped_before_the_step(settings, monkeypatch) -> None:
    norms = []
    step_of = torch.optim.AdamW.step

    def watched(optimiser, *arguments):
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        return step_of(optimiser, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(replace(settings, steps=2, clip=1e-3))
    train(replace(settings, out=settings.out.with_name("free"), steps=2, clip=1e9))
    assert norms[:2] == [pytest.approx(1e-3, rel=1e-3)] * 2 and min(norms[2:]) > 0.01


def test_weight_decay_is_on_matrices_alone(settings, monkeypatch) -> None:
    decays: dict[str, float] = {}
    learn = loop.learn

    def watched(run, state, *arguments):
        names = {id(p): name for name, p in run.model.model.multi_modal_projector.named_parameters()}
        for group in state.optimiser.param_groups:
            decays.update({names[id(p)]: group["weight_decay"] for p in group["params"]})
        learn(run, state, *arguments)

    monkeypatch.setattr(loop, "learn", watched)
    train(replace(settings, steps=1, weight_decay=0.07))
    assert {"norm.weight", "norm.bias", "stack.convs.0.bias"} <= set(decays)
    for name, decay in decays.items():
        assert decay == (0.0 if name.startswith("norm.") or name.endswith("bias") else 0.07)


def test_the_weight_of_ctc_is_the_settings_(settings) -> None:
    reads_out = replace(settings, adapter="grounded", loss="kl", temperature=2.0)
    assert objective_of(reads_out, stored=False) == Objective({"kl": 1.0, "ctc": 0.3}, temperature=2.0)
    assert objective_of(replace(reads_out, ctc_weight=0.0), stored=True).terms == {"kl": 1.0}
    assert objective_of(replace(reads_out, loss="ctc", ctc_weight=0.1), stored=False).terms == {"ctc": 1.0}
    assert objective_of(replace(settings, ctc_weight=0.5), stored=False).terms == {"ce": 1.0}


def test_settings_of_an_older_version_that_lack_a_flag_are_the_same(settings: TrainSettings) -> None:
    train(replace(settings, steps=1))
    file = settings.out / "settings.yaml"
    older = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name != "schedule"}
    file.write_text(yaml.safe_dump(older))
    train(replace(settings, steps=1))
    with pytest.raises(JobError, match="schedule was 'cosine', is 'linear'"):
        train(replace(settings, steps=1, schedule="linear"))


def test_skip_lists_of_all_ranks_become_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for rank, ids in ((1, ["a", "b"]), (2, ["b", "c"])):
        with SkippedLog(f"{out}.rank{rank}") as log:
            for id in ids:
                log.add(id, f"{id}.wav", f"rank {rank}")
    with SkippedLog(out) as skipped:
        skipped.add("d", "d.wav", "rank 0")
        merge_skipped(skipped, out)
        assert skipped.count == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run.skipped.jsonl"]


def test_each_step_has_its_own_seed_of_dropout(settings, monkeypatch) -> None:
    seeds: list[int] = []
    run = step.run
    monkeypatch.setattr(step, "run", lambda *given: (seeds.append(torch.initial_seed()), run(*given))[1])
    train(replace(settings, steps=3, batch_tokens=100_000, probe_every=100))
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_device_is_waited_for_once_a_step_however_many_micro_batches(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    looks, learn = [], loop.learn

    def counted(name: str):
        original = getattr(torch.Tensor, name)
        return lambda tensor, *args: (looks.append(name), original(tensor, *args))[1]

    def watched(run, state, number, batches) -> None:
        with monkeypatch.context() as patch, Scalars() as scalars:
            patch.setattr(torch.Tensor, "tolist", counted("tolist"))
            learn(run, state, number, batches)
        steps.append((len(batches), scalars.count + len(looks)))
        looks.clear()

    monkeypatch.setattr(loop, "learn", watched)
    steps: list[tuple[int, int]] = []
    run = replace(settings, loss=loss, cache=settings.out / "features", steps=3, no_speech=0.2)
    for tokens in (1, 4096):
        train(replace(run, out=settings.out / str(tokens), batch_tokens=tokens))
    assert {count for count, _ in steps} >= {6, 2}
    assert len({found for _, found in steps}) == 1


class Scalars(TorchDispatchMode):
    """Counts the numbers that are read out of tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
