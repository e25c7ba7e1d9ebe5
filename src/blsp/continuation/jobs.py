"""From rows to jobs: what each row is asked, how long its prompt is, and which rows are left out.

In:  a manifest (to be continued) or a continuations file (to be scored), and a tokenizer.
Out: one `Job` an output row, in input order; rows that cannot be asked go to the skip list with a reason.
Try: `list(continuation_jobs(Manifest("in.jsonl"), tokenizer, asking, SkippedLog("out.jsonl")))`
Flow: continuation/ — feeds the plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from blsp.continuation.mixture import Mixture
from blsp.continuation.plan import Ask, Job, prompt_digest
from blsp.continuation.prompts import instruction_for
from blsp.data.manifest import SkippedLog, Utterance
from blsp.model.prompt import Order, frame_prompt, transcript_ids

_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")  # <SIL>, <MUSIC>, [noise]


class RowError(ValueError):
    """A row of a continuations file that cannot be scored; the message names it and what is missing."""


@dataclass(frozen=True)
class Asking:
    """What the rows are asked. instruction overrides the behaviours' texts; a row's own overrides both."""

    behaviours: Mixture
    orders: Mixture
    instruction: str = ""
    normalise: str = "none"
    max_prompt_tokens: int = 192  # the paper drops prompts of this many tokens or more
    seed: int = 0

    def asks(self, row: Utterance) -> list[Ask]:
        """Each behaviour and order that falls to `row`."""
        behaviours = self.behaviours.chosen(self.seed, row.id, "behaviour")
        orders = self.orders.chosen(self.seed, row.id, "order")
        override = row.instruction or self.instruction
        return [
            Ask(behaviour, override or instruction_for(behaviour), cast(Order, order))
            for behaviour in behaviours
            for order in orders
        ]


def read_text(row: Utterance, normalise: str) -> str:
    """The transcript as the LLM reads it: as given, or through Whisper's normaliser, as the paper has it."""
    if normalise == "none":
        return row.text.strip()
    return _normaliser(row.language in (None, "en"))(row.text).strip()


@lru_cache(maxsize=2)
def _normaliser(english: bool):  # type: ignore[no-untyped-def]  # the package has no types
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if english else BasicTextNormalizer()


def nothing_to_read(text: str) -> str | None:
    """Why a transcript cannot be continued, or None: it is empty, or holds tags and punctuation only."""
    if not text.strip():
        return "the transcript is empty"
    if not any(character.isalnum() for character in _TAG.sub(" ", text)):
        return f"the transcript holds no words: {text.strip()[:40]!r}"
    return None


class Lengths:
    """Prompt lengths in tokens: the frame's once an instruction, the transcript's each time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._frames: dict[tuple[str, Order], int] = {}

    def of(self, ask: Ask, text: str) -> int:
        name = (ask.instruction, ask.order)
        if name not in self._frames:
            frame = frame_prompt(self._tokenizer, ask.instruction, ask.order)
            self._frames[name] = len(frame.prefix_ids) + len(frame.suffix_ids)
        return self._frames[name] + (len(transcript_ids(self._tokenizer, text)) if text else 0)


def continuation_jobs(
    rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, asking: Asking, skipped: SkippedLog
) -> Iterator[Job]:
    """The jobs of step 1; what is dropped is noted in `skipped`."""
    lengths = Lengths(tokenizer)
    for number, row in enumerate(rows):
        if row.no_speech:
            for ask in asking.asks(row):
                yield Job(number, ask, lengths.of(ask, ""), None)
            continue
        text = read_text(row, asking.normalise)
        reason = nothing_to_read(row.text) or nothing_to_read(text)
        if reason:
            skipped.add(row.id, row.audio, reason)
            continue
        for ask in asking.asks(row):
            tokens = lengths.of(ask, text)
            if tokens >= asking.max_prompt_tokens:
                limit = f"below {asking.max_prompt_tokens} are continued (--max-prompt-tokens)"
                skipped.add(row.id, row.audio, f"the {ask.behaviour} prompt has {tokens} tokens; {limit}")
                continue
            yield Job(number, ask, tokens, prompt_digest(ask.instruction, ask.order, text))


def scoring_jobs(rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[Job]:
    """The jobs of `--score-only`: equal are rows with equal prompt, continuation and end."""
    lengths = Lengths(tokenizer)
    for number, row in enumerate(rows):
        ask = ask_of(row, where)
        if row.no_speech:
            yield Job(number, ask, lengths.of(ask, ""), None)
            continue
        ids, finish = row.extra["continuation_ids"], row.extra["finish"]
        tokens = lengths.of(ask, row.text) + len(ids)
        yield Job(number, ask, tokens, prompt_digest(ask.instruction, ask.order, row.text, str(ids), finish))


def ask_of(row: Utterance, where: str) -> Ask:
    """What a finished row was asked."""
    missing = [name for name in ("behaviour", "order", "finish", "continuation_ids") if name not in row.extra]
    if missing or row.instruction is None:
        what = ", ".join(missing) or "instruction"
        raise RowError(f"{where}: row {row.id!r} has no {what}; it is not a finished row of step 1")
    return Ask(row.extra["behaviour"], row.instruction, cast(Order, row.extra["order"]))
