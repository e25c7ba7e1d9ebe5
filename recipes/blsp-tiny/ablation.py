"""The ablation: every arm of ablation.yaml trained and evaluated in the same way, and the table of results.

In:  the corpus with its features and continuations, the recipe's last grounding stage (`--grounded`), and an adapter
     of the paper's kind after its stage without the LLM (`--embedded`).
Out: under --out, a run folder an arm and seed, judged on fotaq's development part and on the suite's spoken questions
     (held out: choose nothing by them), and `table.md`: the mean over the seeds that are done, the lowest, the highest.
Where in the flow: beside the recipe; nothing that is shipped comes from here.

After a kill, the same command continues; what was made of other settings or another adapter it names and leaves alone.
Seeds may run in parallel, one process and core each.

Try: `python recipes/blsp-tiny/ablation.py --root corpus --grounded runs/blsp-tiny/stages/grounding-4/adapter \
        --embedded runs/blsp-conv/stages/embed-2/adapter --out out`
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from heldout import read_list
from rows import read_rows, write_rows

from blsp.data.files import file_digest, write_text
from blsp.data.jobs import differences
from blsp.evaluation.summary import table
from blsp.weights.shipped import model_digest

ARMS = Path(__file__).with_suffix(".yaml")
ASKED = ("kokoro", "kokoro_augmented", "piper", "piper_augmented", "flite")  # who speaks the quiz's questions
STARTS = ("grounded", "embedded")  # what an arm may start from; the table has each as it is, too
COLUMNS = {  # of the table: the name of a figure, and where it lies in results.json
    "read-out WER": ("tasks", "repeat", "readout", "wer"),
    "divergence": ("alignment", "kl"),
    "top-1": ("alignment", "top1_agreement"),
    "another clip's": ("alignment", "kl_shuffled"),
    "repeat WER": ("tasks", "repeat", "speech", "wer"),
    "answer chrF": ("tasks", "answer", "speech", "chrf"),
    "spoken questions": ("tasks", "sqa", "speech", "accuracy"),
    "instruction following": ("alignment", "instruction_following"),
}


def write_data(root: Path) -> None:
    """The continuations of one behaviour alone, and questions with their right answers: speech-instruction pairs.

    Nothing is done if they are there and newer than the continuations.
    """
    source, last = root / "behaviours_voices_continued.jsonl", root / "ablation_answers.jsonl"
    if last.exists() and last.stat().st_mtime > source.stat().st_mtime:
        return
    continued = read_rows(source)
    for behaviour in ("continue", "repeat"):
        write_rows(root / f"ablation_{behaviour}.jsonl", (r for r in continued if r["behaviour"] == behaviour))
    quiz = [r for r in read_list("split") if (r["kind"], r["part"]) == ("quiz", "train")]
    answers = {r["text"]: r["answers"][0] for r in quiz}
    spoken = [r for name in ASKED for r in read_rows(root / f"train_{name}.jsonl") if r["text"] in answers]
    write_rows(last, (_answered(row, answers[row["text"]]) for row in spoken))


def _answered(row: dict, answer: str) -> dict:
    return row | {
        "behaviour": "answer",
        "instruction": "",
        "order": "instruction-first",
        "continuation": answer,
        "finish": "stop",
    }


def settings_of(arm: dict[str, Any], root: Path, starts: dict[str, Path], out: Path, seed: int) -> dict[str, Any]:
    """What `blsp train --config` reads for this arm and seed. starts: name -> the adapter that `start` means."""
    arm = arm | {"out": str(out), "seed": seed, "data": [str(root / name) for name in arm["data"]]}
    start = arm.pop("start", None)
    return arm | {"init-from": str(starts[start])} if start else arm


def run(name: str, settings: dict[str, Any], suite: Path) -> None:
    """Train the arm and judge it, or go on where it stands."""
    out = Path(settings["out"])
    start = settings.get("init-from")
    made_of = {
        "start's digest": model_digest(start) if start else None,
        "data's digest": file_digest(*map(Path, settings["data"])),
    }
    note_made_of(out, settings | made_of)
    out.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    write_text(config, yaml.safe_dump(settings))
    if not (out / "adapter").is_dir():
        blsp("train", "--config", str(config))
    judge(out / "adapter", out, suite)
    print(f"{name}, seed {settings['seed']}: done", flush=True)


def judge(adapter: Path, out: Path, suite: Path) -> None:
    """Judge the adapter unless that is done. What arms start from is judged by the first process; the others wait."""
    out.mkdir(parents=True, exist_ok=True)
    judged = out / "judged"
    with FileLock(out / ".judged.lock"):
        tasks = yaml.safe_load(suite.read_text(encoding="utf-8"))
        note_made_of(judged, tasks | {"adapter's digest": model_digest(str(adapter))})
        if not (judged / "results.json").exists():
            routes = ["--routes", "text", "speech"]
            blsp("evaluate", "--model", str(adapter), "--suite", str(suite), "--out", str(judged), *routes)


def note_made_of(folder: Path, facts: dict[str, Any]) -> None:
    """Write beside the folder what it is made of; exit if it is there already and was made of something else."""
    note = folder.with_name(f"{folder.name}.made-of.yaml")
    noted = yaml.safe_load(note.read_text(encoding="utf-8")) if note.exists() else {}
    changed = differences(noted, dict.fromkeys(noted) | facts)
    if changed and folder.exists():
        raise SystemExit(f"{folder}: was made of something else ({changed}); remove it to make it again")
    write_text(note, yaml.safe_dump(facts))


def blsp(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "blsp", *arguments], check=True, stdout=subprocess.DEVNULL)


def figures(folder: Path) -> dict[str, float]:
    """The columns of one judged run; an adapter that does not read out has fewer."""
    results = json.loads((folder / "judged" / "results.json").read_text(encoding="utf-8"))
    at = {column: reduce(lambda node, key: node.get(key, {}), keys, results) for column, keys in COLUMNS.items()}
    found = {column: value for column, value in at.items() if value != {}}
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        found["minutes"] = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["seconds"] / 60
    return found


def written(out: Path, arms: Sequence[str]) -> str:
    """The table over all arms of which a seed is judged, below what they start from."""
    rows = []
    columns = [*COLUMNS, "minutes"]
    for name in (*STARTS, *arms):
        done = [figures(path.parents[1]) for path in sorted(out.glob(f"{name}-seed*/judged/results.json"))]
        if done:
            cells = [_cell([each[column] for each in done if column in each]) for column in columns]
            rows.append([name, str(len(done)), *cells])
    return table(["arm", "seeds", *columns], rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arms = yaml.safe_load(ARMS.read_text(encoding="utf-8"))
    parser.add_argument("--root", type=Path, required=True, help="the corpus folder; run it where features/ lies")
    parser.add_argument("--grounded", type=Path, help="a grounded adapter, from which step 2 starts")
    parser.add_argument("--embedded", type=Path, help="a conv adapter after embed-ctc, from which step 2 starts")
    parser.add_argument("--out", type=Path, required=True, help="runs, judgements and table.md")
    parser.add_argument("--arms", nargs="+", choices=list(arms["arms"]), help="these alone, in this order")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    write_data(options.root)
    options.out.mkdir(parents=True, exist_ok=True)
    suite = options.root / "ablation_suite.yaml"  # its manifests lie beside it
    write_text(suite, yaml.safe_dump(arms["judge"]))
    starts = {name: folder for name in STARTS if (folder := getattr(options, name))}
    names = options.arms or list(arms["arms"])
    for name in names:
        if (start := arms["arms"][name].get("start", name)) in STARTS and start not in starts:
            parser.error(f"{name} starts from an adapter: name it with --{start}")
    for name, folder in starts.items():
        judge(folder, options.out / f"{name}-seed0", suite)
    for name, seed in itertools.product(names, options.seeds):
        out = options.out / f"{name}-seed{seed}"
        run(name, settings_of(arms["arms"][name], options.root, starts, out, seed), suite)
        report = written(options.out, list(arms["arms"]))
        write_text(options.out / "table.md", report + "\n")
    print(report)


if __name__ == "__main__":
    main()
