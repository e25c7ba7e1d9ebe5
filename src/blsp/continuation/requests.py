"""From rows to jobs: what each row is asked, how long its prompt is, and which rows are left out.

In:  a manifest (to be continued) or a continuations file (to be scored), and a tokenizer.
Out: one `PlannedPrompt` an output row, in input order; rows that cannot be asked go to the skip list with a reason.
Try: `list(continuation_jobs(Manifest("in.jsonl"), tokenizer, asking, SkippedLog("out.jsonl")))`
Flow: continuation/ — feeds the plan.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from blsp.continuation.plan import PlannedPrompt, PromptSpec, prompt_digest
from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Utterance
from blsp.llm.instructions import instruction_for
from blsp.llm.prompt import Order, frame_prompt, transcript_ids

_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")  # <SIL>, <MUSIC>, [noise]


class RowError(ValueError):
    """A row of a continuations file that cannot be scored; the message names it and what is missing."""


@dataclass(frozen=True)
class PromptPolicy:
    """What the rows are asked. instruction overrides the behaviours' texts; a row's own overrides both."""

    behaviours: Mixture
    orders: Mixture
    instruction: str = ""
    normalise: str = "none"
    max_prompt_tokens: int = 192  # the paper drops prompts of this many tokens or more
    seed: int = 0

    def asks(self, row: Utterance) -> list[PromptSpec]:
        """Each behaviour and order that falls to `row`."""
        behaviours = self.behaviours.chosen(self.seed, row.id, "behaviour")
        orders = self.orders.chosen(self.seed, row.id, "order")
        override = row.instruction or self.instruction
        return [
            PromptSpec(behaviour, override or instruction_for(behaviour), cast(Order, order))
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

    def of(self, ask: PromptSpec, text: str) -> int:
        name = (ask.instruction, ask.order)
        if name not in self._frames:
            frame = frame_prompt(self._tokenizer, ask.instruction, ask.order)
            self._frames[name] = len(frame.prefix_ids) + len(frame.suffix_ids)
        return self._frames[name] + (len(transcript_ids(self._tokenizer, text)) if text else 0)


def continuation_jobs(
    rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, asking: PromptPolicy, skipped: SkippedLog
) -> Iterator[PlannedPrompt]:
    """The jobs of step 1; what is dropped is noted in `skipped`."""
    lengths = Lengths(tokenizer)
    for number, row in enumerate(rows):
        if row.no_speech:
            for ask in asking.asks(row):
                yield PlannedPrompt(number, ask, lengths.of(ask, ""), None)
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
            yield PlannedPrompt(number, ask, tokens, prompt_digest(ask.instruction, ask.order, text))


def scoring_jobs(
    rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[PlannedPrompt]:
    """The jobs of `--score-only`: equal are rows with equal prompt, continuation and end."""
    lengths = Lengths(tokenizer)
    for number, row in enumerate(rows):
        ask = ask_of(row, where)
        if row.no_speech:
            yield PlannedPrompt(number, ask, lengths.of(ask, ""), None)
            continue
        ids, finish = row.extra["continuation_ids"], row.extra["finish"]
        tokens = lengths.of(ask, row.text) + len(ids)
        yield PlannedPrompt(
            number, ask, tokens, prompt_digest(ask.instruction, ask.order, row.text, str(ids), finish)
        )


def ask_of(row: Utterance, where: str) -> PromptSpec:
    """What a finished row was asked."""
    missing = [name for name in ("behaviour", "order", "finish", "continuation_ids") if name not in row.extra]
    if missing or row.instruction is None:
        what = ", ".join(missing) or "instruction"
        raise RowError(f"{where}: row {row.id!r} has no {what}; it is not a finished row of step 1")
    return PromptSpec(row.extra["behaviour"], row.instruction, cast(Order, row.extra["order"]))


class MixtureError(ValueError):
    """A mixture that cannot be read; the message shows the entry and how it should look."""


@dataclass(frozen=True)
class Mixture:
    """Names, and the share of the rows that each one gets; shares None: each name for every row."""

    names: tuple[str, ...]
    shares: tuple[float, ...] | None

    def chosen(self, seed: int, id: str, salt: str) -> tuple[str, ...]:
        """The names for row `id`; `salt` keeps two mixtures over the same rows independent."""
        if self.shares is None:
            return self.names
        digest = hashlib.blake2b(f"{seed}\0{salt}\0{id}".encode(), digest_size=8).digest()
        lot = int.from_bytes(digest, "little") / 2**64
        for name, share in zip(self.names, self.shares, strict=True):
            lot -= share
            if lot < 0:
                return (name,)
        return (self.names[-1],)


def parse_mixture(text: str) -> Mixture:
    """Read `name:weight,name:weight` or `name,name`; a name may hold a colon of its own (`translate:de`)."""
    entries = [_entry(part.strip()) for part in text.split(",") if part.strip()]
    names = tuple(name for name, _ in entries)
    weights = [weight for _, weight in entries if weight is not None]
    if not names or len(set(names)) != len(names):
        raise MixtureError(f"{text!r}: name each choice once, as in continue:0.7,repeat:0.3")
    if weights and len(weights) != len(names):
        raise MixtureError(
            f"{text!r}: give all a weight (each row gets one of them) or none (each row gets all)"
        )
    return Mixture(names, tuple(weight / sum(weights) for weight in weights) if weights else None)


def _entry(part: str) -> tuple[str, float | None]:
    name, colon, last = part.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        return part, None
    if weight is None:
        return part, None
    if not math.isfinite(weight) or weight <= 0:
        raise MixtureError(f"{part!r}: a weight must be a number above 0")
    return name, weight
