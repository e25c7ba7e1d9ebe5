"""Instruction following, judged by the answers: the same clip under several instructions.

In:  the answers of the text route and of the speech route to the same clips, under each instruction.
Out: `Following`: for each clip and instruction, which text answer the speech answer is nearest to; and its figures.
Try: results.json, "alignment", "instruction_following"
Flow: evaluation/ — called by alignment.py.

An answer to speech follows its instruction if it is most similar (chrF) to the text route's answer to the same
instruction, among the text route's answers to this clip. If an adapter has collapsed, the LLM repeats the words under
every instruction, and its answers are nearest to `repeat`: with three instructions the figure is 1 in 3. Answers can
also be similar just by their form; the same figure with another text's answers shows how much. If two instructions have
the same text answer, these cannot be distinguished and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF

from blsp.data.partners import partners
from blsp.evaluation.answers import Answers
from blsp.evaluation.bootstrap import SHARE, Figure, draws_of, grouped, interval, ratio

Nearest = dict[str, dict[str, str | None]]  # instruction -> clip -> the instruction of the nearest text answer


@dataclass(frozen=True)
class Following:
    """nearest: of each speech answer; None if two are equally near. exchanged: of the speech answer to another text."""

    clips: Sequence[str]
    nearest: Nearest
    exchanged: Nearest

    def figures(self, units: NDArray[np.int64], samples: int, seed: int, factor: float = 1.0) -> dict[str, Any]:
        """Shares with intervals; and for each instruction, how often each text answer is the nearest.

        factor: of the intervals (`bootstrap.widening`).
        """
        rows, row_of = draws_of(units, samples, seed), {clip: row for row, clip in enumerate(self.clips)}
        figures: dict[str, Any] = {}
        named = {"instruction_following": self.nearest, "instruction_following_shuffled": self.exchanged}
        for name, nearest in named.items():
            counts = np.zeros((len(self.clips), 2))  # followed, judged
            for asked, found in nearest.items():
                for clip, near in found.items():
                    counts[row_of[clip]] += [near == asked, 1]
            figure = grouped(Figure(counts, ratio, SHARE), units)
            figures |= {name: figure.point(), f"{name}_ci": list(interval(figure, rows, factor))}
        shares = {
            asked: {near: float(np.mean([item == near for item in found.values()])) for near in self.nearest}
            for asked, found in self.nearest.items()
            if found
        }
        return figures | {"nearest_answer": shares}


def judge_following(text: dict[str, Answers], speech: dict[str, Answers], transcripts: dict[str, str]) -> Following:
    """text, speech: by instruction, the answers by clip. transcripts: by clip."""
    chrf, clips = CHRF(lowercase=True), list(transcripts)

    def nearest(answer: str, clip: str) -> str | None:
        scores = {asked: chrf.sentence_score(answer, [answers[clip].text]).score for asked, answers in text.items()}
        best = [asked for asked, score in scores.items() if score == max(scores.values())]
        return best[0] if len(best) == 1 else None

    def distinct(asked: str, clip: str) -> bool:
        return all(text[other][clip].text != text[asked][clip].text for other in text if other != asked)

    def all_nearest(heard: dict[str, str]) -> Nearest:
        return {
            asked: {clip: nearest(speech[asked][heard[clip]].text, clip) for clip in clips if distinct(asked, clip)}
            for asked in text
        }

    others = [clips[number] for number in partners(list(transcripts.values()))]
    own, exchanged = (dict(zip(clips, heard, strict=True)) for heard in (clips, others))
    return Following(clips, all_nearest(own), all_nearest(exchanged))
