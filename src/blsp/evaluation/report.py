"""The page that a person reads: tables, pictures, and what was said and answered.

In:  `Results`. Out: report.md with its pictures, results.json, samples.jsonl; the table for the screen.
Try: `print(write_report(results, Path("results/tiny")))`
Flow: evaluation/ — judge.py → **report**; the end of `blsp evaluate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blsp.evaluation import pictures
from blsp.evaluation.results import TRANSCRIPTS, Results, TaskResult, evidence, write_results
from blsp.evaluation.scoring import LOWER_IS_BETTER
from blsp.evaluation.summary import NAMES, UNKNOWN, change, findings, shown, table, with_interval

MAIN_ROUTES = ("text", "cascade", "speech")
PANELS = {
    "wer": "Recognition: word error rate, %  (lower is better)",
    "accuracy": "Understanding: accuracy, %  (higher is better)",
    "bleu": "Translation: BLEU  (higher is better)",
    "chrf": "Answers like those to the text: chrF  (higher is better)",
}
COMPARED = ("chat", "continuation")  # kinds whose answers are compared with the text route's
FAULTS = {
    "refusals": "refused",
    "loops": "looped",
    "empty": "empty",
    "wrong_language": "wrong language",
    "cut": "cut at the length limit",
    "no_speech": "heard nothing",
}
EXAMPLES = 4

INTRODUCTION = """\
The same questions were put to the same language model by three routes. **text**: it reads the exact transcript;
this is its own upper bound. **cascade**: a speech recogniser writes a transcript, the model reads that. **speech**:
the model hears the recording through the adapter; no recogniser and no transcript are involved. The three differ in
what stands in one place of the prompt, and in nothing else. Brackets hold 95 % confidence intervals (bootstrap over
the questions); *speech : text* is how much larger (+) or smaller (−) the speech route's figure is than the text
route's.
"""
COLUMNS = {
    "recogniser": "**recogniser**: what the cascade's first half wrote, without the language model.",
    "readout": "**readout**: the adapter's own transcript, without the language model.",
    "transcript": "**transcript**: what `blsp transcribe` writes: of the transcripts that the adapter finds likeliest, "
    "the one that the language model, too, would expect.",
}
NO_EVIDENCE = """\
No evidence about listening, since the language model cannot do the task on reading either (a read-out, which does \
without it, is evidence all the same):"""
ALIGNMENT = """\
The method promises that the model behaves on hearing as it behaves on reading. Measured token by token along the
model's own answer to the text: **divergence** is KL(text ‖ speech) over the whole vocabulary, in nats a token (0 is
perfect); **agreement** is how often both routes hold the same next token for the likeliest. *Another clip's speech* is
the same model made to listen to the wrong recording: an adapter that merely does no harm would stand there.
"""
INSTRUCTIONS = """\
The next picture shows what the model is about to do: one point a clip, route and instruction (the last-layer state from
which the answer is begun, t-SNE). Where the method works, a clip's two points lie side by side and instructions part;
an adapter trained on recognition alone ignores the instruction, and they do not. Read off the unprojected states:
{separation} of the speech states lie nearest to the text states of their own instruction (of the text states
themselves, {separation_text}), and for {retrieval} the nearest text state is their own transcript's ({n} clips).
"""


def write_report(results: Results, folder: Path, compare: Sequence[Path] = ()) -> str:
    """Everything in `folder`; returns the table for the screen. compare: other results folders (checkpoints)."""
    write_results(results, folder)
    found = results.to_json()
    sections = [
        f"# How well does `{results.environment.get('model', 'the model')}` listen?\n\n{INTRODUCTION}",
        _in_short(results, found),
        "## At a glance\n\n" + _glance(results, found) + "\n\n" + _remarks(results, found),
        _draw_scores(results, found, folder),
        _alignment(results, found, folder),
        _checkpoints(found, folder, compare),
        "## What went wrong\n\nAnswers with a fault that can be told without knowing the right one, by route.\n\n"
        + _faults(results),
        "## Task by task\n\n"
        + "\n\n".join(_task(each, found["tasks"][each.task.name]) for each in results.tasks),
        _measured(results),
    ]
    text = "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return f"{_glance(results, found)}\n\n{_alignment_line(found)}report: {folder / 'report.md'}"


# --- tables -------------------------------------------------------------------------------------------------


def _in_short(results: Results, found: dict[str, Any]) -> str:
    sentences = findings(results, found)
    return f"## In short\n\n{sentences}" if sentences else ""


def _glance(results: Results, found: dict[str, Any]) -> str:
    """One line a task: the main metric on every route."""
    routes = _routes(results)
    header = ["task", "questions", "metric", *routes, "speech : text", "speech : cascade"]
    rows = []
    for each in results.tasks:
        metric, scores = each.metric, found["tasks"][each.task.name]
        gaps = found["gaps"][each.task.name].get(metric, {})
        rows.append(
            [
                _marked(each),
                str(len(each.rows)),
                _name(each, metric),
                *(_glance_cell(each, scores, route) for route in routes),
                change(gaps.get("speech_vs_text")),
                change(gaps.get("speech_vs_cascade")),
            ]
        )
    return table(header, rows)


def _marked(result: TaskResult) -> str:
    """The task's name, with a star where it is no evidence about listening."""
    return result.task.name + ("" if evidence(result) is None else " *")


def _name(result: TaskResult, metric: str) -> str:
    """The metric's name; of answers that are compared with the text route's, that too."""
    return f"{NAMES[metric]} to text" if metric == "chrf" and result.task.kind in COMPARED else NAMES[metric]


def _glance_cell(result: TaskResult, scores: dict[str, Any], route: str) -> str:
    if route == "text" and result.task.kind in COMPARED:
        return "(itself)"
    return _cell(scores.get(route, {}), result.metric)


def _routes(results: Results) -> list[str]:
    """Main routes first, then peers, then what recognises without the LLM."""
    there = dict.fromkeys(route for each in results.tasks for route in (*each.scores, *each.unavailable))
    last = [route for route in TRANSCRIPTS if route in there]
    peers = [route for route in there if route not in (*MAIN_ROUTES, *last)]
    return [*(route for route in MAIN_ROUTES if route in there), *peers, *last]


def _cell(score: dict[str, Any], metric: str) -> str:
    if "unavailable" in score:
        return UNKNOWN
    return with_interval(metric, score[metric], score[f"{metric}_ci"]) if metric in score else ""


def _remarks(results: Results, found: dict[str, Any]) -> str:
    """What the columns are; tasks that say nothing about listening; routes that are missing."""
    lines = [words for route, words in COLUMNS.items() if route in _routes(results)]
    doubts = ", ".join(f"{task} ({why})" for task, why in found["no_evidence"].items())
    if doubts:
        lines.append(f"\\* {NO_EVIDENCE} {doubts}.")
    missing: dict[tuple[str, str], list[str]] = {}
    for each in results.tasks:
        for route, why in each.unavailable.items():
            missing.setdefault((route, why), []).append(each.task.name)
    lines += [
        f"{UNKNOWN}, {route} route: {why} ({', '.join(tasks)})." for (route, why), tasks in missing.items()
    ]
    return "\n\n".join(lines)


def _faults(results: Results) -> str:
    rows = []
    for each in results.tasks:
        for route, score in each.scores.items():
            counts = [score.counts.get(name) for name in FAULTS]
            if any(counts):
                rows.append(
                    [each.task.name, route, str(len(each.rows)), *("" if not c else str(c) for c in counts)]
                )
    if not rows:
        return "None."
    return table(["task", "route", "questions", *FAULTS.values()], rows)


def _task(result: TaskResult, scores: dict[str, Any]) -> str:
    """What was asked, all figures, and a few questions with their answers."""
    task = result.task
    asked = (
        f"Instruction ({task.order}): “{task.wording}”"
        if task.wording
        else "Without instruction: the speech is the question."
    )
    parts = [f"### {task.name}", f"{task.note} {asked}".strip()]
    metrics = list(dict.fromkeys(name for score in result.scores.values() for name in score.figures))
    rows = [[route, *(_cell(scores[route], name) for name in metrics)] for route in result.scores]
    parts.append(table(["route", *(_name(result, name) for name in metrics)], rows))
    if task.kind != "no-speech" or "speech" in result.scores:
        parts.append(_examples(result))
    return "\n\n".join(part for part in parts if part)


def _examples(result: TaskResult) -> str:
    """Questions from the speech route's best to its worst, evenly spread: nothing is picked by hand."""
    route = "speech" if "speech" in result.answers else next(iter(result.answers), None)
    if route is None:
        return ""
    rows_scores = result.scores[route].rows
    values = {name: row[result.metric] for name, row in rows_scores.items() if result.metric in row}
    sign = 1 if result.metric in LOWER_IS_BETTER else -1
    ordered = sorted(result.rows, key=lambda row: (sign * values.get(row.id, 0.0), row.id))
    count = min(EXAMPLES, len(ordered))
    picked = [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = []
    for row in picked:
        reference = row.reference or ("" if result.task.kind != "asr" else row.text)
        answers = [_short(_said(answers[row.id], row.options)) for answers in result.answers.values()]
        rows.append(
            [
                _short(row.text) or f"({Path(row.audio).name})",
                _short(reference),
                *answers,
                shown(result.metric, values.get(row.id)),
            ]
        )
    header = ["said", "wanted", *result.answers, f"{_name(result, result.metric)} ({route})"]
    if not any(row[1] for row in rows):
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return "From best to worst on the " + route + " route, evenly spread:\n\n" + table(header, rows)


def _said(answer: Any, options: Sequence[str] | None) -> str:
    if options is not None and answer.option_scores is not None:
        chosen = options[max(range(len(options)), key=lambda i: answer.option_scores[i])]
        return f"{chosen} — “{answer.text}”" if answer.text else chosen
    return answer.text


def _short(text: str, limit: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _measured(results: Results) -> str:
    about = results.environment
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    lines = [
        f"{about['machine']}; {about['threads']} threads, {about['dtype']}; blsp {about['blsp']}, {packages}.",
        f"Speech encoder `{about['audio_model']}`, language model `{about['text_model']}`, adapter "
        f"`{about['adapter']}`; recogniser of the cascade: {about['recogniser'] or 'none'}.",
        f"{about['date']}; {about['seconds'] / 60:.1f} minutes in this run. Intervals: {results.bootstrap} "
        f"bootstrap samples, seed {results.seed}. Every question and answer: `samples.jsonl`; every figure: "
        "`results.json`.",
    ]
    signatures = {
        (name, signature)
        for each in results.tasks
        for score in each.scores.values()
        for name, signature in score.signatures.items()
    }
    lines += [f"{NAMES[name]}: `{signature}`" for name, signature in sorted(signatures)]
    return "## How this was measured\n\n" + "\n\n".join(lines)


# --- pictures -----------------------------------------------------------------------------------------------


def _draw_scores(results: Results, found: dict[str, Any], folder: Path) -> str:
    panels: dict[str, list[pictures.Point]] = {}
    for each in results.tasks:
        metric, title = each.metric, PANELS[each.metric]
        factor = 100.0 if metric in ("wer", "accuracy") else 1.0
        for route, score in found["tasks"][each.task.name].items():
            values = [score.get(metric), *score.get(f"{metric}_ci", ())]
            if route == "text" and each.task.kind in COMPARED:
                continue
            if len(values) == 3 and all(value is not None and math.isfinite(value) for value in values):
                point = pictures.Point(_marked(each), route, *(factor * value for value in values))
                panels.setdefault(title, []).append(point)
    if not panels:
        return ""
    pictures.draw_scores(
        {title: panels[title] for title in PANELS.values() if title in panels}, folder / "scores.png"
    )
    return "![Every task on every route, with 95 % confidence intervals; * no evidence about listening](scores.png)"


def _alignment(results: Results, found: dict[str, Any], folder: Path) -> str:
    alignment = results.alignment
    if alignment is None:
        return ""
    rows = []
    for behaviour, figures in found["alignment"]["behaviours"].items():
        cells = [_plain(figures, name) for name in ("kl", "kl_shuffled", "top1_agreement")]
        rows.append([behaviour, str(figures["n"]), str(figures["tokens"]), *cells])
    header = ["instruction", "clips", "tokens", "divergence", "with another clip's speech", "agreement"]
    parts = ["## Behaviour: how far hearing is from reading", ALIGNMENT, table(header, rows)]
    pictures.draw_positions(alignment, folder / "divergence_by_position.png")
    parts.append("![Divergence along the answer, and over clips](divergence_by_position.png)")
    if alignment.layers is not None:
        pictures.draw_layers(alignment.layers, folder / "layers.png")
        pictures.draw_instructions(alignment.layers, folder / "instructions.png")
        parts += [
            "![Similarity and divergence by layer](layers.png)",
            INSTRUCTIONS.format(
                separation=shown("accuracy", alignment.layers.separation),
                separation_text=shown("accuracy", alignment.layers.separation_text),
                retrieval=shown("accuracy", alignment.layers.retrieval),
                n=alignment.layers.n,
            ),
            "![Last-layer states under different instructions](instructions.png)",
        ]
    return "\n\n".join(part.strip() for part in parts)


def _plain(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_ci"]
    return f"{figures[name]:.3f} [{low:.3f}–{high:.3f}]"


def _alignment_line(found: dict[str, Any]) -> str:
    figures = found["alignment"]
    if not figures:
        return ""
    divergence, shuffled = _plain(figures, "kl"), _plain(figures, "kl_shuffled")
    agreement = _plain(figures, "top1_agreement")
    return f"divergence {divergence} nats a token (another clip's speech: {shuffled}), top-1 agreement {agreement}\n"


def _checkpoints(found: dict[str, Any], folder: Path, others: Sequence[Path]) -> str:
    """Divergence against scores over this result and `others`."""
    if not others:
        return ""
    points = []
    for name, each in [
        *((path.name, json.loads((path / "results.json").read_text(encoding="utf-8"))) for path in others),
        (folder.name, found),
    ]:
        if each["alignment"]:
            points.append({"name": name, "kl": each["alignment"]["kl"], "scores": _ratios(each["tasks"])})
    if len(points) < 2:
        return (
            "No picture over checkpoints: fewer than two of the compared results hold an alignment analysis."
        )
    pictures.draw_checkpoints(points, folder / "divergence_against_scores.png")
    return "![Divergence against task scores, over checkpoints](divergence_against_scores.png)"


def _ratios(tasks: dict[str, Any]) -> dict[str, float]:
    """The speech route's figure over the text route's; of error rates, what is right over what is right."""
    found = {}
    for task, routes in tasks.items():
        if "text" not in routes or "n" not in routes.get("speech", {}):
            continue
        for metric in ("wer", "accuracy", "chrf"):
            text, speech = routes["text"].get(metric), routes["speech"].get(metric)
            if text is None or speech is None:
                continue
            if metric == "wer":
                text, speech = max(1 - text, 0.0), max(1 - speech, 0.0)
            if text:
                found[task] = speech / text
            break
    return found
