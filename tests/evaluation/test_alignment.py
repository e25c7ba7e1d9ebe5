"""Divergence equals the textbook formula, with the answer's end; layer figures and the projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.speech_copies import TEXTS, Exact, shuffled, transcripts_as_speech
from support.tiny_models import FAMILIES, TOLERANCE, tiny_blsp
from transformers import AutoConfig, AutoModelForCausalLM

from blsp.data.manifest import Utterance, write_manifest
from blsp.evaluation.alignment import Comparison, baseline_inputs, by_position, exchanged_speech, summarise
from blsp.evaluation.answers import Answer
from blsp.evaluation.judge import Evaluation, judge
from blsp.evaluation.layers import lens, linear_cka, project, retrieval
from blsp.evaluation.report import write_report
from blsp.evaluation.tasks import AlignmentPlan, Suite
from blsp.inference.listener import Listener, Question
from blsp.llm.language_model import final_norm
from blsp.llm.teacher_forcing import answer_states, answer_tokens, divergence, layer_states
from blsp.model.adapter_parts import AudioEmbeds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_states_along_an_answer_equal_one_plain_pass(tiny_models_folder: Path, family: str, finish: str) -> None:
    listener = Listener(*tiny_blsp(tiny_models_folder, family=family))
    answers = [Answer("", finish, (5, 6, 7, 8)), Answer("", finish, (9,))]
    texts = ["how many days", "hello world what is the capital of france"]
    requests = [
        listener.request(i, Question(text=text, instruction="Say:"), None, listener.decoding)
        for i, text in enumerate(texts)
    ]
    batched = answer_states(listener.model, requests, answers)
    for request, answer, states in zip(requests, answers, batched, strict=True):
        assert request.prefix is not None
        prefix = listener.model.get_input_embeddings()(torch.tensor(request.prefix.ids))
        rest = listener.model.get_input_embeddings()(torch.tensor(answer.ids))
        whole = torch.cat([prefix, request.embeds, rest])[None]
        plain = listener.model.get_decoder()(inputs_embeds=whole).last_hidden_state[0]
        first = len(prefix) + len(request.embeds) - 1
        assert answer_tokens(answer) == len(answer.ids) + (finish == "stop")
        torch.testing.assert_close(states, plain[first : first + answer_tokens(answer)], atol=TOLERANCE[family], rtol=0)
        alone, layers = layer_states(listener.model, [request], [answer])[0]
        torch.testing.assert_close(layers[-1], states, atol=TOLERANCE[family], rtol=0)
        assert alone.shape[1] == len(request.embeds)


def test_divergence_is_the_textbooks(listener: Listener) -> None:
    text, speech = torch.randn(2, 5, 32, dtype=torch.float64)
    kl, agreed = divergence(listener.model, text, speech)
    teacher = torch.distributions.Categorical(logits=listener.model.compute_logits(text))
    student = torch.distributions.Categorical(logits=listener.model.compute_logits(speech))
    assert kl == pytest.approx(torch.distributions.kl_divergence(teacher, student).tolist())
    assert agreed == (teacher.probs.argmax(-1) == student.probs.argmax(-1)).tolist()
    assert divergence(listener.model, text, text) == ([0.0] * 5, [True] * 5)


def test_figures_are_means_over_tokens_not_over_clips() -> None:
    clips = [
        Comparison((1.0, 1.0, 1.0), (True, True, False), {"shuffled": 6.0, "cascade": 0.0}),
        Comparison((5.0,), (False,), {"shuffled": 2.0, "cascade": 2.0}),
    ]
    figures = summarise(clips, samples=100, seed=0)
    assert (figures["kl"], figures["top1_agreement"], figures["kl_shuffled"]) == (2.0, 0.5, 2.0)
    assert (figures["n"], figures["tokens"]) == (2, 4)
    assert figures["kl_ci"] == [1.0, 5.0]
    assert (figures["kl_cascade"], figures["kl_minus_cascade"]) == (0.5, 1.5)
    assert figures["kl_minus_cascade_ci"] == [1.0, 3.0]  # paired: (3 - 0) / 3 and (5 - 2) / 1
    assert by_position(clips) == {"kl": [3.0, 1.0, 1.0], "top1_agreement": [0.5, 1.0, 0.0], "n": [2, 1, 1]}


def test_instructions_that_are_ignored_are_seen(
    evaluation_of: Callable[..., Evaluation], suite: Suite, listener: Listener
) -> None:
    """Perfect speech vectors lie beside their own transcript; those of another clip do not."""
    only = Suite("alignment", (), suite.alignment)
    right = judge(evaluation_of(speech=transcripts_as_speech(listener)), only).to_json()["alignment"]
    wrong = judge(evaluation_of(speech=shuffled(transcripts_as_speech(listener))), only).to_json()["alignment"]
    assert right["retrieval"] == 1.0 and wrong["retrieval"] < 0.5
    assert np.mean(wrong["layers"]["cosine"][1:]) < np.mean(right["layers"]["cosine"][1:])


def test_rows_may_have_instructions_of_their_own(evaluation_of: Callable[..., Evaluation], corpus: Path) -> None:
    rows = [json.loads(line) for line in (corpus / "speech.jsonl").read_text().splitlines()]
    own = [row | ({"instruction": f"Number {i // 2}:"} if i < 4 else {}) for i, row in enumerate(rows)]
    write_manifest(corpus / "own.jsonl", own)
    plan = AlignmentPlan("own.jsonl", ("repeat",), layer_samples=6, max_new_tokens=12, folder=corpus)
    figures = judge(evaluation_of(), Suite("alignment", (), plan)).to_json()["alignment"]
    assert figures["layers"]["n"] == 6 and figures["n"] == 7


def test_without_layer_samples_the_rest_is_measured_and_shown(
    evaluation_of: Callable[..., Evaluation], suite: Suite
) -> None:
    assert suite.alignment is not None
    plan = replace(suite.alignment, behaviours=("repeat",), layer_samples=0)
    results, evaluation = judge(evaluation_of(), Suite("alignment", (), plan)), evaluation_of()
    write_report(results, evaluation.folder)
    figures = json.loads((evaluation.folder / "results.json").read_text())["alignment"]
    assert figures["kl"] > 0 and "layers" not in figures and "retrieval" not in figures
    assert "layers.png" not in (evaluation.folder / "report.md").read_text()


def test_cka_ignores_rotation_and_scale_and_sees_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    turned = 3 * states @ torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0] + 5
    assert linear_cka(states, turned) == pytest.approx(1.0)
    assert linear_cka(states, torch.randn(200, 8, generator=generator, dtype=torch.float64)) < 0.2


@pytest.mark.parametrize("family", ["phi", "gpt2", "gpt_neox", "falcon", "bloom", "mpt", "llama"])
@torch.no_grad()
def test_the_lens_finds_the_final_norm_of_every_family(family: str) -> None:
    """What it finds gives the decoder's last states; equal states have distance 0 in every layer."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.3}
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=2, intermediate_size=32)
    llm = AutoModelForCausalLM.from_config(config).double().eval()
    output = llm.get_decoder()(torch.arange(12)[None], output_hidden_states=True)
    states = torch.stack(output.hidden_states)[:, 0]  # (A, N, D)
    assert lens(llm, states, states) == [0.0] * 3
    assert min(lens(llm, states, states.flip(1))) > 0
    first = {}
    final_norm(llm).register_forward_hook(lambda norm, args, result: first.setdefault("states", result))
    llm.get_decoder()(torch.arange(12)[None])
    torch.testing.assert_close(first["states"][0], states[-1])


def test_the_projection_keeps_clusters_apart_and_is_always_the_same() -> None:
    generator = np.random.default_rng(0)
    states = np.concatenate([generator.normal(20 * i, 1, (30, 6)) for i in range(3)])
    points = project(states)
    assert np.array_equal(points, project(states))
    centres = points.reshape(3, 30, 2).mean(axis=1)
    spread = points.reshape(3, 30, 2).std(axis=1).max()
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 2 * spread
    assert project(states[:3]).shape == (3, 2)


def test_baselines_stand_in_the_place_of_the_speech(
    evaluation_of: Callable[..., Evaluation], suite: Suite, tiny_models_folder: Path
) -> None:
    """A recogniser that writes the transcripts is at 0; a read-out as text has that text's own divergence."""
    listener = Listener(*tiny_blsp(tiny_models_folder, adapter="grounded"))
    only = Suite("alignment", (), suite.alignment)
    evaluation = evaluation_of(listener=listener, routes=("text", "cascade", "speech"), recogniser=Exact())
    results = judge(evaluation, only)
    figures = results.to_json()["alignment"]
    assert figures["kl_cascade"] == 0.0 and figures["kl_cascade_ci"] == [0.0, 0.0]
    assert figures["kl_minus_cascade"] == figures["kl"]
    assert figures["kl_deaf"] > 0.05 and figures["kl_readout"] > 0.05
    for clips in results.alignment.comparisons.values() if results.alignment else ():
        assert all(set(clip.baselines) == {"shuffled", "cascade", "readout", "deaf"} for clip in clips.values())
    write_report(results, evaluation.folder)
    report = (evaluation.folder / "report.md").read_text()
    assert "| speech − cascade " in report and "| deaf " in report


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_a_model_in_bfloat16_is_analysed_and_shown(
    evaluation_of: Callable[..., Evaluation], suite: Suite, tiny_models_folder: Path, adapter: str
) -> None:
    model, processor = tiny_blsp(tiny_models_folder, adapter=adapter)
    evaluation = evaluation_of(listener=Listener(model.to(torch.bfloat16), processor))
    write_report(judge(evaluation, Suite("alignment", (), suite.alignment)), evaluation.folder)
    figures = json.loads((evaluation.folder / "results.json").read_text())["alignment"]
    assert figures["kl"] > 0 and 0 <= figures["retrieval"] <= 1


def test_exchanged_speech_is_of_another_text(listener: Listener) -> None:
    """Of the next such clip in the batch; where the batch has none, of the first one outside it."""
    texts = ["yes", "yes", "no", "maybe", "maybe"]
    everyone = [Utterance(str(number), "", text) for number, text in enumerate(texts)]
    transcripts = {row.id: row.text for row in everyone}

    def heard(rows: list[Utterance]) -> list[str]:
        return [row.id for row in rows]

    assert exchanged_speech(heard, everyone, everyone, transcripts) == ["2", "2", "3", "0", "0"]
    assert exchanged_speech(heard, everyone[3:], everyone, transcripts) == ["0", "0"]
    assert exchanged_speech(heard, everyone[:1], everyone, transcripts) == ["2"]
    assert exchanged_speech(heard, everyone[1:4], everyone, transcripts) == ["2", "3", "1"]
    assert exchanged_speech(heard, everyone[:2], everyone[:2], transcripts) == ["1", "0"]  # nothing else was said


def test_a_clip_is_found_again_by_what_was_said_in_it() -> None:
    """Two speakers read one sentence: the nearest text state may be that of either clip."""
    text = torch.tensor([[0.0, 0], [0.1, 0], [5, 5]])
    ends = {"repeat": {"speech": torch.tensor([[0.1, 0], [0.0, 0], [5, 5]]), "text": text}}
    assert retrieval(ends, ["yes", "yes", "no"]) == 1.0
    assert retrieval(ends, ["yes", "no", "maybe"]) == pytest.approx(1 / 3)


def test_the_deaf_control_does_not_depend_on_the_recording(listener: Listener) -> None:
    speech = transcripts_as_speech(listener)([Utterance(str(i), "", text) for i, text in enumerate(TEXTS[:3])])
    inputs = baseline_inputs(listener, speech)
    assert set(inputs) == {"deaf"}  # conv has no read-out
    vectors = [clip.vectors for clip in inputs["deaf"] if isinstance(clip, AudioEmbeds)]
    assert [len(rows) for rows in vectors] == [len(clip.vectors) for clip in speech if not isinstance(clip, str)]
    assert len(torch.cat(vectors).unique(dim=0)) == 1
