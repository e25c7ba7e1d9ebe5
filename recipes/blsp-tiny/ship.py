"""A finished run -> `models/NAME`: the adapter in float16, its training logs, and a card with the measured figures.

In: a run folder (`blsp train`), the manifests it learnt from, and, once that folder has been judged, results.json.
With several `--stages` the mean of their adapters is shipped: of stages that began at the same weights it can hear
better than either (Wortsman et al. 2022). Name them for the card alone, too.
Out: an adapter folder with `README.md` and `training/` (settings, metrics, curves of each stage).
Where in the flow: after `blsp train`; then `blsp evaluate --model models/NAME`; then this again with --results, which
writes the card alone, so that every figure on it was measured on the file beside it.

Try: `python recipes/blsp-tiny/ship.py --run runs/blsp-tiny --out models/blsp-tiny --manifests 'C/train_*.jsonl'`
"""

from __future__ import annotations

import argparse
import glob
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rows import read_rows

from blsp.distributed import find_runtime
from blsp.evaluation.summary import NAMES, shown, table
from blsp.model.card_parts import card_head, measured
from blsp.model.checkpoint import load_mean, save_adapter
from blsp.model.configuration_blsp import open_config

USE = """\
An adapter of {size:.1f} MB that lets the frozen LLM `{llm}` listen through the frozen encoder of `{audio}`.
{what} It was made with this project's own commands on two CPU cores, without speech instructions. The folder holds
the adapter alone; the frozen parts are loaded by name and checked by digest.

    blsp transcribe question.wav --model {name}
    blsp chat --model {name}

```python
import blsp

print(blsp.load("{name}").answer("question.wav"))
```
"""
WHAT = {
    "grounded": "It reads the speech out over the LLM's own tokens (CTC) and gives the LLM the expected embeddings of "
    "what it read: in effect a recogniser inside the LLM's vocabulary (as LegoSLM, arXiv 2505.11352){aligned}.",
    "conv": "It is the paper's own adapter (BLSP, arXiv 2309.00916): three strided convolutions and a bottleneck, 6.25 "
    "vectors a second, no read-out and no token table at inference.",
}
ALIGNED = ", aligned with the LLM's behaviour on text at the end (BLSP, arXiv 2309.00916)"
RESCORED = (  # of an adapter that reads out, where its configuration says `rescore`
    "It reads the speech out over the LLM's own tokens (CTC), and the LLM chooses among the likeliest readings "
    "what it answers to: in effect a recogniser inside the LLM's vocabulary (as LegoSLM, arXiv 2505.11352)."
)
DID = {  # what a loss trains
    "ctc": "the read-out, on transcripts, without the LLM",
    "embed": "the LLM's embedding of the token spoken at each place, without the LLM",
    "embed-ctc": "the LLM's embeddings of the spoken tokens, their times unknown, without the LLM",
    "ce": "the LLM's behaviour on text, along its own answers",
    "kl": "the LLM's behaviour on text, along its own answers",
}
PROBES = {  # of the runs' held-out clips
    "wer": "WER (read-out, or nearest tokens)",
    "tokens": "tokens found",
    "kl": "divergence",
}
MOVED = """\
## Training

None for this LLM. It is the adapter [{origin}](../{origin}/README.md), whose card says what it learnt from, moved
with {tokens:,} words and parts of words (`blsp move`, [docs/adapt.md](../../docs/adapt.md)):

    blsp move --model {origin} --llm {llm} --out runs/moved
    python recipes/blsp-tiny/ship.py --moved runs/moved --origin {origin} --out models/{name}
"""
LIMITS = """\
## Limits

It hears read and acted {languages} with the vocabulary of its transcripts; a token that never occurred there is hardly
ever read out. Noisy rooms, several speakers at once, other languages and accents far from the training voices are heard
badly. What it then says is what a small language model says: check facts. On silence, noise and
music it is trained to say “{no_speech}”; how often it does is the row `no-speech`, if it was measured. Not for
decisions about people.
"""


NAMES_OF_LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian"}
Clips = dict[tuple[str, str], list[dict]]  # rows by source and licence


def write_weights(run: Path | None, out: Path, adapters: Sequence[Path]) -> None:
    """The adapters' mean, weight by weight, in float16, with the logs of the run's stages (none of a moved one)."""
    model, processor = load_mean(adapters, find_runtime(device="cpu", dtype="float32"))
    save_adapter(model, processor, out, dtype=torch.float16)
    tokenizer = out / "tokenizer.json"  # half of it is indentation
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    for stage in stages_of(run) if run else ():
        target = out / "training" / stage.name
        target.mkdir(parents=True)
        for name in ("settings.yaml", "metrics.jsonl", "curves.png"):
            shutil.copy(stage / name, target / name)


def stages_of(run: Path) -> list[Path]:
    """The folders of the run's stages; the run itself if it has none. Skip lists and locks lie beside the stages."""
    return sorted(path for path in (run / "stages").glob("*") if path.is_dir()) or [run]


def card(
    out: Path,
    sources: str,
    results: Path | None,
    stages: Sequence[str] = (),
    origin: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = ("en",),
) -> str:
    """The model card: use, training, data with licences, what was measured, limits; `origin`: what was moved."""
    config = open_config(out)
    size = (out / "model.safetensors").stat().st_size / 1e6
    head = card_head(
        config,
        "adapter",
        [f"adapter-{config.adapter}"],
        out.name,
        measured(results) if results else [],
        datasets=sorted(set(datasets)) or None,
        language=languages[0] if len(languages) == 1 else list(languages),
        license="apache-2.0",
    )
    use = USE.format(
        what=RESCORED if config.rescore else WHAT[config.adapter].format(aligned=ALIGNED if _is_aligned(out) else ""),
        size=size,
        llm=config.text_model_id,
        audio=config.audio_model_id,
        name=out.name,
    )
    parts = [
        f"{head}\n# {out.name}",
        use,
        MOVED.format(origin=origin, tokens=config.readout_size, llm=config.text_model_id, name=out.name)
        if origin
        else "## Training\n\n" + _stages(out / "training", stages),
        sources,
        _results(json.loads(results.read_text()), out.name) if results else "## Measured\n\nNot judged yet.",
        LIMITS.format(
            no_speech=config.no_speech_sentence, languages=", ".join(NAMES_OF_LANGUAGES[each] for each in languages)
        ),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _is_aligned(out: Path) -> bool:
    """Whether a stage of the run taught behaviour."""
    settings = (out / "training").glob("*/settings.yaml")
    return any(yaml.safe_load(path.read_text())["loss"] in ("ce", "kl") for path in settings)


def _stages(training: Path, shipped: Sequence[str]) -> str:
    """What each stage trained, with how many samples, and what that changed on the clips that it held out."""
    rows, samples = [], defaultdict(int)
    read = [
        (stage, yaml.safe_load((stage / "settings.yaml").read_text()), read_rows(stage / "metrics.jsonl"))
        for stage in training.iterdir()
    ]
    seen = set().union(*(line for _, _, lines in read for line in lines))
    probes = {name: title for name, title in PROBES.items() if f"held_out_{name}" in seen}
    for stage, settings, lines in sorted(read, key=lambda each: (each[1]["loss"] in ("ce", "kl"), each[0].name)):
        last = lines[-1]
        samples[settings["loss"]] += last["samples"]
        rows.append(
            [
                stage.name,
                settings["loss"],
                f"{last['step']:,}",
                f"{last['samples']:,}",
                f"{last['audio_seconds'] / 3600:.1f}",
                f"{last['seconds'] / 3600:.2f}",
                *(_change(lines, f"held_out_{probe}") for probe in probes),
            ]
        )
    head = ["stage", "loss", "steps", "samples", "hours of speech heard", "hours of work", *probes.values()]
    whole = sum(samples.values())
    parts = [f"`{loss}` ({DID[loss]}): {count:,}, {count / whole:.1%}" for loss, count in samples.items()]
    did = (
        f"Of {whole:,} samples: {'; '.join(parts)}. The last columns are of clips that each run held out, at its first "
        "and its last probe (24 clips: differences of a tenth are noise)."
    )
    note = "Settings, metrics and curves of each stage: `training/`. A machine with two cores (AMD EPYC), no GPU."
    if len(shipped) > 1:
        note = f"These weights are the mean of the stages {' and '.join(shipped)}. {note}"
    return f"{table(head, rows)}\n\n{did}\n\n{note}"


def _change(lines: Sequence[dict], probe: str) -> str:
    values = [line[probe] for line in lines if probe in line]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else ""


def read_clips(manifests: Sequence[str]) -> Clips:
    """The rows of the manifests by source and licence."""
    clips: Clips = defaultdict(list)
    for path in sorted(path for each in manifests for path in glob.glob(each)):
        for row in read_rows(Path(path)):
            clips[(row["source"].split("/")[0], row["licence"])].append(row)
    return clips


def data_table(clips: Clips) -> str:
    """Hours and clips by source and licence; augmented copies counted apart."""
    spoken, copies = (
        {key: [row["seconds"] / 3600 for row in rows if ("augmented" in row) is copy] for key, rows in clips.items()}
        for copy in (False, True)
    )
    rows = [
        [source, f"{len(each):,}", f"{sum(each):.2f}", f"{sum(copies[source, licence]):.2f}", licence]
        for (source, licence), each in sorted(spoken.items(), key=lambda item: -sum(item[1]))
    ]
    once, again = (sum(map(sum, each.values())) for each in (spoken, copies))
    head = ["source", "clips", "hours", "hours of augmented copies", "licence"]
    return (
        f"## Data\n\n{once:.1f} hours and {again:.1f} of augmented copies, rebuilt by `recipes/blsp-tiny/`; "
        f"held-out sets, "
        f"texts and voices are never in it (`tests/recipes/test_recipe_split.py`).\n\n{table(head, rows)}"
    )


def _results(results: dict, name: str) -> str:
    rows = []
    for task, routes in results["tasks"].items():
        for route, found in routes.items():
            for metric in (each for each in NAMES if each in found and f"{each}_ci" in found):
                low, high = found[f"{metric}_ci"]
                interval = f"{shown(metric, low)} to {shown(metric, high)}"
                rows.append([task, route, NAMES[metric], shown(metric, found[metric]), interval, str(found["n"])])
    alignment = {name: value for name, value in results["alignment"].items() if isinstance(value, float)}
    figures = table(["alignment", "value"], [[name, f"{value:.3f}"] for name, value in alignment.items()])
    figures = f"\n\n{figures}" if alignment else ""
    head = ["task", "route", "metric", "value", "95 % interval", "n"]
    environment = results["environment"]
    limit, dtype = environment["limit"], environment["dtype"]
    asked = "--suite tiny" if results["suite"] == "tiny" else f"--task {' '.join(results['tasks'])}"
    command = f"blsp evaluate --model {name} {asked} --out results/{name}"
    command += f" --limit {limit}" if limit else ""
    command += f" --dtype {dtype}" if dtype != "float32" else ""
    return f"## Measured\n\n`{command}`, this file.\n\n{table(head, rows)}{figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="the finished run; left out: write the card alone")
    parser.add_argument("--stages", nargs="+", help="ship the mean of these stages (default: the last one)")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, models/NAME")
    parser.add_argument("--manifests", nargs="+", default=[], help="manifests that it learnt from, or globs")
    parser.add_argument("--moved", type=Path, help="instead of --run: an adapter that `blsp move` wrote")
    parser.add_argument("--origin", help="the shipped adapter that was moved")
    parser.add_argument("--results", type=Path, help="results.json of `blsp evaluate --model OUT`")
    options = parser.parse_args()
    if options.run is not None:
        stages = [options.run / "stages" / name for name in options.stages or ()] or [options.run]
        write_weights(options.run, options.out, [stage / "adapter" for stage in stages])
    if options.moved is not None:
        write_weights(None, options.out, [options.moved])
    clips = read_clips(options.manifests)
    sources = data_table(clips) if clips else ""
    names = [source for source, _ in clips]
    languages = sorted({row.get("language", "en") for rows in clips.values() for row in rows}) or ["en"]
    text = card(options.out, sources, options.results, options.stages or (), options.origin, names, languages)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    print(f"{options.out}: written")


if __name__ == "__main__":
    main()
