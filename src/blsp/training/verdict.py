"""The verdict at the end of a run: do the LLM's answers depend on what is said?

In:  a trained run, and its held-out rows.
Out: `Verdict`, verdict.json; heldout.jsonl, the utterances that the run did not learn from. Before the first step:
     warnings about a run that is too short.
Try: ``blsp train ...``, whose last lines are the verdict
Flow: training/loop.py at the end -> **verdict.py** (probes.py) -> the screen, curves.png, the adapter's card

The divergence from the text route is measured twice over the same held-out responses: with each clip's own speech, and
with the speech of another clip. If the adapter's vectors carry no information, both figures are equal, even if low.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from blsp.data.files import write_json
from blsp.data.manifest import Utterance, write_manifest
from blsp.model.lora import lora_note
from blsp.training import probes, step
from blsp.training.dataset import recording_of
from blsp.training.run import Run

Array = NDArray[np.float64]
VERDICT_ROWS = 96  # held-out rows that are measured, at most
LISTENS_BELOW = 0.6  # own over exchanged divergence
FEW_STEPS = 200  # no new adapter in our runs listened after fewer steps
STEP_1_FIELDS = ("behaviour", "order", "continuation", "continuation_ids", "finish", "prompt_tokens")


@dataclass(frozen=True)
class Verdict:
    """The finding, and a sentence with the figures and what to do.

    own, exchanged: mean divergence in nats a token with the clips' own and with exchanged speech. difference: the 95 %
    interval of own minus exchanged, over clips. All None, and `clips` 0, if nothing could be measured.
    """

    finding: str
    sentence: str
    own: float | None = None
    exchanged: float | None = None
    difference: tuple[float, float] | None = None
    clips: int = 0

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The verdict of a run folder, if there is one."""
        path = folder / "verdict.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, folder: Path) -> None:
        write_json(folder / "verdict.json", asdict(self), durable=True)

    def __str__(self) -> str:
        return f"{self.finding[0].upper()}{self.finding[1:]}. {self.sentence}"


# --- before the first step --------------------------------------------------------------------------------
def warnings(run: Run) -> list[str]:
    """Warnings about too few steps or too large batches."""
    settings, rows, found = run.settings, run.order.per_epoch, []
    if settings.lora:
        found.append(f"--lora {' '.join(settings.lora)}: {lora_note(settings.lora)}")
    if settings.batch_size > rows:
        found.append(
            f"--batch-size {settings.batch_size}: the data have {rows} rows, so each step takes all of them at once; "
            f"take a smaller one, such as {max(1, min(16, rows // 8))}"
        )
    if run.steps < FEW_STEPS:
        enough = (
            "enough for an adapter that listens already, not to teach one that does not"
            if settings.init_from
            else "too few for a fresh adapter; begin with a trained one (--init-from), or take more --epochs or "
            "a smaller --batch-size"
        )
        found.append(f"{run.steps} steps: {enough} (docs/adapt.md)")
    return found


# --- after the last step ----------------------------------------------------------------------------------
def write_held_out(run: Run) -> None:
    """Write heldout.jsonl: each held-out utterance once, without the fields of step 1.

    Where two data files give one id to two clips, the second one's gets the name of its file before it.
    """
    rows: dict[str, Utterance] = {}
    for row in run.dataset.held_out:
        utterance = run.dataset.utterance(row)
        extra = {name: value for name, value in utterance.extra.items() if name not in STEP_1_FIELDS}
        id, clip = utterance.id, (utterance.audio, utterance.start)
        if id in rows and (rows[id].audio, rows[id].start) != clip:
            id = f"{run.dataset.sources[int(row['source'])].path.stem}/{id}"
        rows.setdefault(id, replace(utterance, id=id, instruction=None, extra=extra))
    write_manifest(run.settings.out / "heldout.jsonl", rows.values(), relative_to=run.settings.out)


@torch.no_grad()
def judge(run: Run) -> Verdict:
    """Measure the held-out rows with their own and with exchanged speech, and compare the two."""
    settings = run.settings
    if not run.objective.runs_llm:
        return Verdict(
            "not judged",
            f"--loss {settings.loss} does not run the LLM. A stage with --loss kl or ce --init-from "
            f"{settings.out / 'adapter'} says whether it listens.",
        )
    probe = probes.Probe("held_out", probes.draw_examples(run.reader, run.dataset.held_out, VERDICT_ROWS))
    others = probes.exchange_speech(probe.answered)
    if not others:
        return Verdict("not judged", "Fewer than two texts are held out (--held-out, and a tenth of the data at most).")
    run.model.model.multi_modal_projector.eval()
    with step.autocast(run.runtime):
        own, exchanged = (
            probes.token_divergences(probe, examples, run.prefixes, settings.batch_tokens)
            for examples in (probe.answered, others)
        )
    # Several responses and copies of a clip count as one. Two data files may give one id to clips of two texts
    sums: dict[tuple[str, str], Array] = defaultdict(lambda: np.zeros(3))
    for example, *tokens in zip(probe.answered, own, exchanged, strict=True):
        nats = [sum(kl for kl, _ in route) for route in tokens]
        sums[recording_of(example.id), example.text] += [*nats, len(example.response)]
    return compare(np.array(list(sums.values())), _way_out(run))


def compare(sums: Array, way_out: str) -> Verdict:
    """The verdict on (clips, 3): divergence summed over a clip's tokens; the same with clips exchanged; tokens."""
    mine, other = (sums[:, :2].sum(axis=0) / sums[:, 2].sum()).tolist()

    # Clips are drawn with replacement; a clip's own and exchanged sums stay together, so the interval is paired
    drawn = sums[np.random.default_rng(0).integers(0, len(sums), (1000, len(sums)))].sum(axis=1)  # (1000, 3)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2], [0.025, 0.975]).tolist()
    figures = (
        f"On {len(sums)} held-out clips it is {mine:.3f} nats a token away from what the LLM does on reading, "
        f"and {other:.3f} with the clips exchanged (difference {low:.3f} to {high:.3f})"
    )
    if high >= 0:
        finding, sentence = "it does not listen yet", f"{figures}: what is said makes no clear difference. {way_out}"
    elif mine > LISTENS_BELOW * other:
        finding, sentence = "it begins to listen", f"{figures}: it misses much of what is said. {way_out}"
    else:
        finding, sentence = "it listens", f"{figures}."
    return Verdict(finding, sentence, round(mine, 6), round(other, 6), (round(low, 6), round(high, 6)), len(sums))


def _way_out(run: Run) -> str:
    if run.settings.init_from:
        return "Give it more steps or more recordings, or a higher --lr (docs/adapt.md)."
    return (
        "Begin with an adapter that listens (--init-from models/blsp-tiny --adapter grounded), or with a stage "
        f"without the LLM (--loss ctc or embed-ctc), and give it more than {run.steps} steps (docs/adapt.md)."
    )
