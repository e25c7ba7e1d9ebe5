"""Prompts of each row of a manifest: one planned prompt for each output row.

In:  a manifest (to be continued) or a continuations file (to be scored), and the LLM's tokenizer.
Out: one `PlannedPrompt` for each output row, in input order. Rows without words, and rows with too long prompts, go to
     the skip list with the reason.
Try: `list(plan_continuations(Manifest("in.jsonl"), tokenizer, policy, SkippedLog("out.jsonl")))`
Flow: manifest → **requests.py** → prompt_plan.py (equal prompts, batches) → engines.py
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from blsp.data.jobs import SkippedLog
from blsp.data.manifest import Utterance
from blsp.data.normalisation import normaliser
from blsp.llm.instructions import instruction_for
from blsp.llm.prompt import Order, prompt_template, transcript_ids

_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")  # <SIL>, <MUSIC>, [noise]
TEMPLATE_LENGTHS = 1024  # instructions whose length is kept; each row may have its own


class RowError(ValueError):
    """A row of a continuations file that cannot be scored; the message names the row and what is missing."""


@dataclass(frozen=True)
class PromptSpec:
    """What the LLM is asked to do with a transcript."""

    behaviour: str
    instruction: str
    order: Order


@dataclass(frozen=True)
class PlannedPrompt:
    """The prompt of one output row.

    row: the input row's number. digest: 16 bytes, the same for equal prompts; None for a row without speech, whose
    answer is a fixed sentence.
    """

    row: int
    spec: PromptSpec
    tokens: int
    digest: bytes | None


@dataclass(frozen=True)
class PromptPolicy:
    """Which prompts a row gets. instruction: replaces the behaviours' texts; a row's own instruction replaces both."""

    behaviours: Mixture
    orders: Mixture
    instruction: str = ""
    normalise: str = "none"
    max_prompt_tokens: int = 192  # the paper drops prompts of this many tokens or more
    seed: int = 0

    def specs_for(self, row: Utterance) -> list[PromptSpec]:
        """One spec for each of the row's behaviours in each of its orders."""
        behaviours = self.behaviours.draw(self.seed, row.id, "behaviour")
        orders = self.orders.draw(self.seed, row.id, "order")
        instruction = row.instruction or self.instruction
        return [
            PromptSpec(behaviour, instruction or instruction_for(behaviour), cast(Order, order))
            for behaviour in behaviours
            for order in orders
        ]


def plan_continuations(
    rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, policy: PromptPolicy, skipped: SkippedLog
) -> Iterator[PlannedPrompt]:
    """The prompts of step 1; prompts that are left out are added to `skipped`."""
    count = prompt_lengths(tokenizer)
    for number, row in enumerate(rows):
        if row.no_speech:
            for spec in policy.specs_for(row):
                yield PlannedPrompt(number, spec, count(spec, ""), None)
            continue
        text = read_text(row, policy.normalise)
        if reason := no_words(row.text) or no_words(text):
            skipped.add(row.id, row.audio, reason)
            continue
        for spec in policy.specs_for(row):
            tokens = count(spec, text)
            if tokens >= policy.max_prompt_tokens:
                limit = f"below {policy.max_prompt_tokens} are continued (--max-prompt-tokens)"
                skipped.add(row.id, row.audio, f"the {spec.behaviour} prompt has {tokens} tokens; {limit}")
                continue
            yield PlannedPrompt(number, spec, tokens, prompt_digest(spec.instruction, spec.order, text))


def plan_scoring(rows: Iterable[Utterance], tokenizer: PreTrainedTokenizerBase, path: str) -> Iterator[PlannedPrompt]:
    """The prompts of `--score-only`. Two are equal if prompt, continuation and its end are equal."""
    count = prompt_lengths(tokenizer)
    for number, row in enumerate(rows):
        spec = spec_of_finished(row, path)
        if row.no_speech:
            yield PlannedPrompt(number, spec, count(spec, ""), None)
            continue
        ids, finish = row.extra["continuation_ids"], row.extra["finish"]
        digest = prompt_digest(spec.instruction, spec.order, row.text, str(ids), finish)
        yield PlannedPrompt(number, spec, count(spec, row.text) + len(ids), digest)


def spec_of_finished(row: Utterance, path: str) -> PromptSpec:
    """The spec with which a row of a continuations file was made."""
    missing = [name for name in ("behaviour", "order", "finish", "continuation_ids") if name not in row.extra]
    if missing or row.instruction is None:
        names = ", ".join(missing) or "instruction"
        raise RowError(f"{path}: row {row.id!r} has no {names}; it is not a finished row of blsp continue")
    return PromptSpec(row.extra["behaviour"], row.instruction, cast(Order, row.extra["order"]))


def prompt_digest(*fields: str) -> bytes:
    """16 bytes that identify a prompt by instruction, order, transcript, and other fields that matter."""
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


def prompt_lengths(tokenizer: PreTrainedTokenizerBase) -> Callable[[PromptSpec, str], int]:
    """A function (spec, transcript) -> tokens of the whole prompt; the tokens of each template are counted once."""

    @lru_cache(TEMPLATE_LENGTHS)
    def around(instruction: str, order: Order) -> int:
        template = prompt_template(tokenizer, instruction, order)
        return len(template.prefix_ids) + len(template.suffix_ids)

    def count(spec: PromptSpec, text: str) -> int:
        return around(spec.instruction, spec.order) + (len(transcript_ids(tokenizer, text)) if text else 0)

    return count


# --- transcripts ------------------------------------------------------------------------------------------
def read_text(row: Utterance, normalise: str) -> str:
    """The transcript as the LLM reads it: as given, or normalised with Whisper's normaliser, as in the paper."""
    if normalise == "none":
        return row.text.strip()
    return normaliser(row.language or "en")(row.text).strip()


def row_as_read(row: Utterance, normalise: str) -> dict[str, Any]:
    """The manifest's row, in which `text` is the transcript that the LLM read and `text_as_given` the original."""
    values, text = row.to_json(), read_text(row, normalise)
    return values | {"text": text, "text_as_given": row.text} if normalise != "none" else values


def no_words(text: str) -> str | None:
    """Why a transcript cannot be continued (it is empty, or only tags and punctuation); None if it can."""
    if not text.strip():
        return "the transcript is empty"
    if not any(character.isalnum() for character in _TAG.sub(" ", text)):
        return f"the transcript holds no words: {text.strip()[:40]!r}"
    return None


# --- mixtures of behaviours and orders --------------------------------------------------------------------
class MixtureError(ValueError):
    """A mixture that cannot be read; the message shows the entry and how it should look."""


@dataclass(frozen=True)
class Mixture:
    """Names, and each one's share of the rows. shares None: every row gets all names."""

    names: tuple[str, ...]
    shares: tuple[float, ...] | None

    def draw(self, seed: int, id: str, purpose: str) -> tuple[str, ...]:
        """The names for the row `id`. purpose: makes the draws of two mixtures independent.

        With shares (0.7, 0.1, 0.2), a number below 0.7 draws the first name, below 0.8 the second, else the third.
        """
        if self.shares is None:
            return self.names
        digest = hashlib.blake2b(f"{seed}\0{purpose}\0{id}".encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "little") / 2**64  # a uniform number in [0, 1)
        for name, share in zip(self.names, self.shares, strict=True):
            left -= share
            if left < 0:
                return (name,)
        return (self.names[-1],)  # the sum of the shares may be slightly below 1


def parse_mixture(text: str) -> Mixture:
    """Read `name:weight,name:weight` or `name,name`; a name may contain a colon (`translate:de`)."""
    entries = [_parse_entry(entry.strip()) for entry in text.split(",") if entry.strip()]
    names = tuple(name for name, _ in entries)
    weights = [weight for _, weight in entries if weight is not None]
    if not names or len(set(names)) != len(names):
        raise MixtureError(f"{text!r}: name each choice once, as in continue:0.7,repeat:0.3")
    if weights and len(weights) != len(names):
        raise MixtureError(f"{text!r}: give all a weight (each row gets one of them) or none (each row gets all)")
    return Mixture(names, tuple(weight / sum(weights) for weight in weights) if weights else None)


def _parse_entry(entry: str) -> tuple[str, float | None]:
    name, colon, last = entry.rpartition(":")
    try:
        weight = float(last)
    except ValueError:
        return entry, None
    if not colon:
        return entry, None
    if not math.isfinite(weight) or weight <= 0:
        raise MixtureError(f"{entry!r}: a weight must be a number above 0")
    return name, weight
