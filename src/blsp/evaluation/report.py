"""The report for readers: tables, pictures, and questions with their answers.

In:  `Results`. Out: report.md with its pictures, results.json, samples.jsonl; the table for the screen.
Try: `print(write_report(results, Path("results/tiny")))`
Flow: evaluation/ — judge.py → **report**; the end of `blsp evaluate`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blsp.data.files import write_text
from blsp.evaluation import pictures
from blsp.evaluation.answers import Answer
from blsp.evaluation.bootstrap import ENOUGH_SPEAKERS
from blsp.evaluation.results import TRANSCRIPTS, Results, TaskResult, read_results, write_results
from blsp.evaluation.scoring import LOWER_IS_BETTER
from blsp.evaluation.summary import NAMES, UNKNOWN, change, shown, summarise, table, with_interval

Figures = dict[str, Any]  # `Results.to_json()`, or the part of it that belongs to one task
MAIN_ROUTES = ("text", "cascade", "speech")
PANELS = {
    "wer": "Recognition: word error rate, %  (lower is better)",
    "accuracy": "Understanding: accuracy, %  (higher is better)",
    "bleu": "Translation: BLEU  (higher is better)",
    "chrf": "Answers like those to the text: chrF  (higher is better)",
}
TO_TEXT = ("chat", "continuation")  # kinds of task whose answers are compared with the text route's
FAULTS = {
    "refusals": "refused",
    "loops": "looped",
    "empty": "empty",
    "wrong_language": "wrong language",
    "cut": "cut at the length limit",
    "no_speech": "no speech found",
}
DIVERGENCES = {
    "kl": "divergence",
    "kl_shuffled": "with another clip's speech",
    "kl_cascade": "cascade",
    "kl_readout": "read-out",
    "kl_deaf": "deaf",
    "kl_minus_cascade": "speech − cascade",
    "top1_agreement": "agreement",
}
EXAMPLES = 4  # questions of a task that are shown with their answers
EXAMPLE_LENGTH = 110  # characters of a table's cell

INTRODUCTION = """\
The same questions were put to the same language model by three routes. **text**: it reads the exact transcript;
this is its own upper bound. **cascade**: a speech recogniser writes a transcript, and the model reads that.
**speech**: the model gets the recording through the adapter, without a recogniser and without a transcript. The three
routes differ in one part of the prompt and in nothing else. Brackets hold 95 % confidence intervals (bootstrap;
{units}). *speech : text* is how much larger (+) or smaller (−) the speech route's figure is than the text route's.
"""
COLUMNS = {
    "recogniser": "**recogniser**: the transcript of the cascade's recogniser, without the language model.",
    "readout": "**readout**: the adapter's own transcript, without the language model.",
    "transcript": "**transcript**: what `blsp transcribe` writes. The adapter proposes several transcripts, and the "
    "language model helps to choose one.",
}
NO_EVIDENCE = """\
No evidence about listening: the language model cannot do these tasks on text either (a read-out does not need the \
language model, so its figure counts all the same):"""
ALIGNMENT = """\
The method aims at a model that behaves on speech as it behaves on text. This is measured at each token of the model's
own answer to the text. **Divergence** is KL(text ‖ speech) over the whole vocabulary, in nats a token (0 is perfect).
**Agreement** is how often both routes find the same next token the most likely. *With another clip's speech* is the
same figure after every recording was exchanged for another one: an adapter that does not listen does as well as that.
The other columns are along the same answers, with something else in the place of the speech vectors: the words of the
*cascade*, the adapter's own transcript as text (*read-out*), copies of one vector (*deaf*). *Speech − cascade* is below
0 where the adapter is nearer to the text than the cascade is; its interval is a paired one.
"""
FOLLOWING = """\
**Does the answer do what was asked?** Each clip is asked under each instruction. Its answer follows the instruction if,
of the answers to the same clip's text, the one to the same instruction is the most similar (chrF): {own} of the answers
do. By their form alone, with answers to another text, {other} do. Where everything is nearest to `repeat`, the adapter
has collapsed to recognition.
"""
INSTRUCTIONS = """\
The next picture shows the state from which the model begins its answer: one point for each clip, route and instruction
(last layer, projected on two principal components). Where the method works, the two points of a clip lie side by side,
and the points of different instructions lie apart. Measured on the states before the projection: for {retrieval} of the
speech states the nearest text state under the same instruction is their own transcript's ({n} clips).
"""


def write_report(results: Results, folder: Path, compare: Sequence[Path] = ()) -> str:
    """Write all files to `folder` and return the table for the screen. compare: other results folders (checkpoints)."""
    write_results(results, folder)
    figures = results.to_json()
    sections = [
        f"# How well does `{results.environment.get('model', 'the model')}` listen?\n\n"
        + INTRODUCTION.format(units=_units(figures)),
        f"## In short\n\n{sentences}" if (sentences := summarise(results, figures)) else "",
        "## At a glance\n\n" + _glance(results, figures) + "\n\n" + _remarks(results, figures),
        _draw_scores(results, figures, folder),
        _alignment(results, figures, folder),
        _checkpoints(figures, folder, compare),
        "## What went wrong\n\nFaults that can be seen without the right answer, by route.\n\n" + _faults(results),
        _left_out(results),
        "## Task by task\n\n"
        + "\n\n".join(_task(result, figures["tasks"][result.task.name]) for result in results.tasks),
        _measured(results),
    ]
    text = "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"
    write_text(folder / "report.md", text)
    lost = f"{len(results.left_out)} recordings cannot be read and were left out\n" if results.left_out else ""
    return f"{_glance(results, figures)}\n\n{_alignment_line(figures)}{lost}report: {folder / 'report.md'}"


def _units(figures: Figures) -> str:
    """The units that the intervals are drawn over, and what the intervals therefore do not cover."""
    counts = figures["speakers"] | ({"alignment": figures["alignment"]["speakers"]} if figures["alignment"] else {})
    several = [name for name, count in counts.items() if count >= ENOUGH_SPEAKERS]
    few = [f"{name} ({count})" for name, count in counts.items() if count < ENOUGH_SPEAKERS]
    parts = [f"speakers are drawn in {', '.join(several)}"] if several else []
    if few:
        parts.append(
            f"questions are drawn in {', '.join(few)}: too few speakers (in brackets; 0: not known), so that these "
            "intervals say nothing about other voices"
        )
    return "; ".join([*parts, "training seeds are not covered"])


# --- tables -------------------------------------------------------------------------------------------------
def _glance(results: Results, figures: Figures) -> str:
    """One line for each task: the main metric on each route."""
    routes = _routes(results)
    header = ["task", "questions", "metric", *routes, "speech : text", "speech : cascade"]
    rows = []
    for result in results.tasks:
        scores = figures["tasks"][result.task.name]
        gaps = figures["gaps"][result.task.name].get(result.metric, {})
        rows.append(
            [
                _starred(result),
                str(len(result.rows)),
                _metric_name(result, result.metric),
                *(_glance_cell(result, scores, route) for route in routes),
                change(gaps.get("speech_vs_text")),
                change(gaps.get("speech_vs_cascade")),
            ]
        )
    return table(header, rows)


def _starred(result: TaskResult) -> str:
    """The task's name, with a star if the task is no evidence about listening."""
    return result.task.name + ("" if result.lacks_evidence() is None else " *")


def _metric_name(result: TaskResult, metric: str) -> str:
    """The metric's name; "to text" is added if the text route is the reference."""
    return f"{NAMES[metric]} to text" if metric == "chrf" and result.task.kind in TO_TEXT else NAMES[metric]


def _glance_cell(result: TaskResult, scores: Figures, route: str) -> str:
    if route == "text" and result.task.kind in TO_TEXT:
        return "(itself)"
    return _cell(scores.get(route, {}), result.metric)


def _routes(results: Results) -> list[str]:
    """The main routes first, then peers, then the columns of transcripts."""
    routes = dict.fromkeys(route for result in results.tasks for route in (*result.scores, *result.unavailable))
    last = [route for route in TRANSCRIPTS if route in routes]
    peers = [route for route in routes if route not in (*MAIN_ROUTES, *last)]
    return [*(route for route in MAIN_ROUTES if route in routes), *peers, *last]


def _cell(score: Figures, metric: str) -> str:
    if "unavailable" in score:
        return UNKNOWN
    return with_interval(metric, score[metric], score[f"{metric}_ci"]) if metric in score else ""


def _remarks(results: Results, figures: Figures) -> str:
    """The meaning of the columns; tasks that are no evidence about listening; missing routes."""
    lines = [words for route, words in COLUMNS.items() if route in _routes(results)]
    doubts = ", ".join(f"{task} ({reason})" for task, reason in figures["no_evidence"].items())
    if doubts:
        lines.append(f"\\* {NO_EVIDENCE} {doubts}.")
    missing: dict[tuple[str, str], list[str]] = {}
    for result in results.tasks:
        for route, reason in result.unavailable.items():
            missing.setdefault((route, reason), []).append(result.task.name)
    lines += [f"{UNKNOWN}, {route} route: {reason} ({', '.join(tasks)})." for (route, reason), tasks in missing.items()]
    return "\n\n".join(lines)


def _faults(results: Results) -> str:
    rows = []
    for result in results.tasks:
        for route, score in result.scores.items():
            counts = [score.counts.get(name) for name in FAULTS]
            if any(counts):
                cells = ["" if not count else str(count) for count in counts]
                rows.append([result.task.name, route, str(len(result.rows)), *cells])
    if not rows:
        return "None."
    return table(["task", "route", "questions", *FAULTS.values()], rows)


def _left_out(results: Results) -> str:
    """The recordings that cannot be read; their questions were not asked on any route."""
    if not results.left_out:
        return ""
    rows = [[row.task, row.id, row.reason] for row in results.left_out]
    return f"## Left out\n\n{len(rows)} recordings cannot be read.\n\n" + table(["task", "row", "reason"], rows)


def _task(result: TaskResult, scores: Figures) -> str:
    """A task's instruction, all its figures, and a few questions with their answers."""
    task = result.task
    question = (
        f"Instruction ({task.order}): “{task.wording}”"
        if task.wording
        else "Without instruction: the speech is the question."
    )
    parts = [f"### {task.name}", f"{task.note} {question}".strip()]
    metrics = list(dict.fromkeys(name for score in result.scores.values() for name in score.figures))
    rows = [[route, *(_cell(scores[route], name) for name in metrics)] for route in result.scores]
    parts.append(table(["route", *(_metric_name(result, name) for name in metrics)], rows))
    if task.kind != "no-speech" or "speech" in result.scores:
        parts.append(_examples(result))
    return "\n\n".join(part for part in parts if part)


def _examples(result: TaskResult) -> str:
    """Questions from the speech route's best to its worst, at equal distances, so that none is chosen by hand."""
    route = "speech" if "speech" in result.answers else next(iter(result.answers), None)
    if route is None:
        return ""
    values = {name: row[result.metric] for name, row in result.scores[route].rows.items() if result.metric in row}
    sign = 1 if result.metric in LOWER_IS_BETTER else -1
    ordered = sorted(result.rows, key=lambda row: (sign * values.get(row.id, 0.0), row.id))
    count = min(EXAMPLES, len(ordered))
    picked = [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = []
    for row in picked:
        reference = row.reference or ("" if result.task.kind != "asr" else row.text)
        answers = [_shown_answer(answers[row.id], row.options) for answers in result.answers.values()]
        spoken = row.text or f"({Path(row.audio).name})"
        cells = [_shortened(text) for text in (spoken, reference, *answers)]
        rows.append([*cells, shown(result.metric, values.get(row.id))])
    header = ["spoken", "expected", *result.answers, f"{_metric_name(result, result.metric)} ({route})"]
    if not any(row[1] for row in rows):  # no reference anywhere: leave the column out
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return f"From best to worst on the {route} route, evenly spread:\n\n" + table(header, rows)


def _shown_answer(answer: Answer, options: Sequence[str] | None) -> str:
    """The likeliest option with the written answer, or only the written answer."""
    if options is None or answer.option_scores is None:
        return answer.text
    scores = answer.option_scores
    chosen = options[max(range(len(options)), key=lambda i: scores[i])]
    return f"{chosen} — “{answer.text}”" if answer.text else chosen


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_LENGTH else text[: EXAMPLE_LENGTH - 1] + "…"


def _measured(results: Results) -> str:
    about = results.environment
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    lines = [
        f"{about['machine']}; {about['threads']} threads, {about['dtype']}; blsp {about['blsp']}, {packages}.",
        f"Speech encoder `{about['audio_model']}`, language model `{about['text_model']}`, adapter "
        f"`{about['adapter']}`{', whose read-outs the language model chooses among' if about['rescore'] else ''}; "
        f"recogniser of the cascade: {about['recogniser'] or 'none'}.",
        f"{about['date']}; {about['seconds'] / 60:.1f} minutes in this run. Intervals: {results.bootstrap} "
        f"bootstrap samples, seed {results.seed}. Every question and answer: `samples.jsonl`; every figure: "
        "`results.json`.",
    ]
    signatures = {
        (name, signature)
        for result in results.tasks
        for score in result.scores.values()
        for name, signature in score.signatures.items()
    }
    lines += [f"{NAMES[name]}: `{signature}`" for name, signature in sorted(signatures)]
    return "## How this was measured\n\n" + "\n\n".join(lines)


# --- pictures -----------------------------------------------------------------------------------------------
def _draw_scores(results: Results, figures: Figures, folder: Path) -> str:
    panels: dict[str, list[pictures.Point]] = {}
    for result in results.tasks:
        metric, title = result.metric, PANELS[result.metric]
        factor = 100.0 if metric in ("wer", "accuracy") else 1.0
        for route, score in figures["tasks"][result.task.name].items():
            values = [score.get(metric), *score.get(f"{metric}_ci", ())]
            if route == "text" and result.task.kind in TO_TEXT:
                continue
            if len(values) == 3 and all(value is not None and math.isfinite(value) for value in values):
                point = pictures.Point(_starred(result), route, *(factor * value for value in values))
                panels.setdefault(title, []).append(point)
    if not panels:
        return ""
    pictures.draw_scores({title: panels[title] for title in PANELS.values() if title in panels}, folder / "scores.png")
    return "![Every task on every route, with 95 % confidence intervals; * no evidence about listening](scores.png)"


def _alignment(results: Results, figures: Figures, folder: Path) -> str:
    alignment = results.alignment
    if alignment is None:
        return ""
    behaviours = figures["alignment"]["behaviours"]
    columns = {name: title for name, title in DIVERGENCES.items() if name in next(iter(behaviours.values()))}
    rows = []
    for behaviour, values in behaviours.items():
        cells = [_with_interval(values, name) for name in columns]
        rows.append([behaviour, str(values["n"]), str(values["tokens"]), *cells])
    header = ["instruction", "clips", "tokens", *columns.values()]
    parts = ["## Behaviour on speech against behaviour on text", ALIGNMENT, table(header, rows)]
    if "nearest_answer" in figures["alignment"]:
        parts.append(_following(figures["alignment"]))
    pictures.draw_positions(alignment, folder / "divergence_by_position.png")
    parts.append("![Divergence along the answer, and over clips](divergence_by_position.png)")
    if alignment.layers is not None:
        pictures.draw_layers(alignment.layers, folder / "layers.png")
        pictures.draw_instructions(alignment.layers, folder / "instructions.png")
        parts += [
            "![Similarity and divergence by layer](layers.png)",
            INSTRUCTIONS.format(retrieval=shown("accuracy", alignment.layers.retrieval), n=alignment.layers.n),
            "![Last-layer states under different instructions](instructions.png)",
        ]
    return "\n\n".join(part.strip() for part in parts)


def _following(values: Figures) -> str:
    shares = values["nearest_answer"]
    rows = [[asked, *(shown("accuracy", share) for share in found.values())] for asked, found in shares.items()]
    header = ["asked of the speech", *(f"nearest: {name}" for name in next(iter(shares.values())))]
    own, other = (
        _with_interval(values, "instruction_following"),
        _with_interval(values, "instruction_following_shuffled"),
    )
    return f"{FOLLOWING.format(own=own, other=other)}\n{table(header, rows)}"


def _with_interval(values: Figures, name: str) -> str:
    low, high = values[f"{name}_ci"]
    return f"{values[name]:.3f} [{low:.3f}–{high:.3f}]"


def _alignment_line(figures: Figures) -> str:
    values = figures["alignment"]
    if not values:
        return ""
    divergence, shuffled = _with_interval(values, "kl"), _with_interval(values, "kl_shuffled")
    agreement = _with_interval(values, "top1_agreement")
    return f"divergence {divergence} nats a token (another clip's speech: {shuffled}), top-1 agreement {agreement}\n"


def _checkpoints(figures: Figures, folder: Path, others: Sequence[Path]) -> str:
    """Divergence against scores over this result and `others`."""
    if not others:
        return ""
    earlier = [read_results(path) for path in others]
    names = [path.name for path in (*others, folder)]
    points = [
        {"name": name, "kl": result["alignment"]["kl"], "scores": _ratios(result["tasks"])}
        for name, result in zip(names, [*earlier, figures], strict=True)
        if result["alignment"]
    ]
    if len(points) < 2:
        return "No picture over checkpoints: fewer than two of the compared results hold an alignment analysis."
    pictures.draw_checkpoints(points, folder / "divergence_against_scores.png")
    return "![Divergence against task scores, over checkpoints](divergence_against_scores.png)"


def _ratios(tasks: Figures) -> dict[str, float]:
    """By task: the speech route's figure divided by the text route's; for WER, the shares of right words."""
    ratios = {}
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
                ratios[task] = speech / text
            break
    return ratios
