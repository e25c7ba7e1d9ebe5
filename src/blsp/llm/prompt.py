"""Prompts with a placeholder for the speech, rendered through the LLM's own chat template.

In:  a tokenizer with a chat template; an instruction and an order, or a conversation of text and speech parts.
Out: the ids before and after the speech (`PromptTemplate`), or a conversation as a list of ids and speech indices.
Try: `template = prompt_template(tokenizer, "Please repeat the following words:", "instruction-first")`
Flow: instructions.py → **prompt.py** → step 1, step 2, inference and the judge.

Both routes splice into the same ids:

    text route     prefix_ids + transcript_ids(text) + suffix_ids
    speech route   prefix_ids + speech vectors       + suffix_ids

What a user wrote is never parsed for control tokens. It goes into the template as a numbered mark; the rendered
template is cut at the marks, and the text is tokenised apart, with special tokens taken as plain characters:

    parts       ["Repeat:", Speech(0)]
    rendered    "<|im_start|>user\\n" mark 0 mark 1 "<|im_end|>\\n<|im_start|>assistant\\n"
    segments    ids of the start and of "Repeat:", joined; Speech(0); ids of the rest
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

Order = Literal["speech-first", "instruction-first"]
ORDERS: tuple[Order, ...] = ("speech-first", "instruction-first")
# Private-use characters: no template contains them, and text of users goes in only as marks.
_MARK = "\ue000{}\ue001"
_MARK_PATTERN = re.compile("\ue000(\\d+)\ue001")


class PromptError(ValueError):
    """A prompt that cannot be built; the message says why."""


@dataclass(frozen=True)
class PromptTemplate:
    """The ids around the speech (or its transcript)."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True)
class Speech:
    """The placeholder of the `index`-th speech clip in a conversation."""

    index: int


Part = str | Speech | tuple[int, ...]  # text of a user, a clip, or ids that stay as they are (an earlier answer)
Segment = tuple[int, ...] | Speech


def prompt_template(tokenizer: PreTrainedTokenizerBase, instruction: str, order: Order) -> PromptTemplate:
    """The user turn `instruction + speech` or `speech + instruction`, ready for the assistant's answer.

    An empty instruction makes the speech the whole turn: a spoken question.
    """
    if order not in ORDERS:
        raise PromptError(f"order {order!r}: must be one of {', '.join(ORDERS)}")
    instruction = instruction.strip()
    parts: list[Part] = [instruction, Speech(0)]
    if order == "speech-first":
        parts = [Speech(0), "\n" + instruction if instruction else ""]
    segments = render(tokenizer, [{"role": "user", "content": parts}])
    speech = segments.index(Speech(0))
    return PromptTemplate(_join(segments[:speech]), _join(segments[speech + 1 :]))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, answer: bool = True
) -> list[Segment]:
    """A conversation as ids and speech placeholders, in order.

    messages: `{"role", "content"}`; content is a string or a list of `Part`s.
    answer: end with the template's opening of an assistant turn.
    """
    # Every part becomes a mark with its number.
    parts: list[Part] = []
    marked = []
    for message in messages:
        content = [message["content"]] if isinstance(message["content"], str) else list(message["content"])
        marks = "".join(_MARK.format(len(parts) + i) for i in range(len(content)))
        marked.append({"role": message["role"], "content": marks})
        parts.extend(content)

    # Odd pieces are the numbers of marks, even ones the template's own text between them.
    pieces = _MARK_PATTERN.split(_apply_template(tokenizer, marked, answer))
    if sorted(int(number) for number in pieces[1::2]) != list(range(len(parts))):
        raise PromptError(f"{tokenizer.name_or_path}: its chat template leaves out or repeats a message")
    segments: list[Segment] = []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            segments.append(tuple(tokenizer.encode(piece, add_special_tokens=False)))
        else:
            part = parts[int(piece)]
            segments.append(tuple(text_ids(tokenizer, part)) if isinstance(part, str) else part)
    return _merge(segments)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; BLSP needs an instruct LLM")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except jinja2.TemplateError as error:  # Gemma's, of a system message: "System role not supported"
        raise PromptError(f"{tokenizer.name_or_path}: its chat template refuses this: {error}") from error


def transcript_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A transcript as the LLM reads it instead of the speech: as given, after one leading space."""
    text = text.strip()
    return text_ids(tokenizer, " " + text) if text else []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: the names of control tokens in it stay characters.

    `split_special_tokens` does that for the tokens that the tokenizer calls special; Gemma 2's turn marks are not
    among them. A piece of text that would still become an added token is cut in two and tokenised in halves.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    added = tokenizer.added_tokens_decoder
    control = next((str(added[token]) for token in ids if token in added and not _is_space(added[token])), None)
    if control is None or len(control) < 2:
        return ids
    if control not in text:
        raise PromptError(f"the text would be read as the control token {control!r}; write it otherwise")
    middle = text.index(control) + len(control) // 2
    return [*text_ids(tokenizer, text[:middle]), *text_ids(tokenizer, text[middle:])]


def _is_space(token: object) -> bool:
    """Whether a token is a run of spaces or line breaks, which some tokenizers (Gemma, Phi) add: plain text too."""
    return not str(token).strip(" \n\t\r\u2581")


def _join(segments: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in segments if not isinstance(segment, Speech) for token in segment)


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring runs of ids and drop empty ones."""
    merged: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Speech):
            merged.append(segment)
        elif segment and merged and not isinstance(merged[-1], Speech):
            merged[-1] = merged[-1] + segment
        elif segment:
            merged.append(segment)
    return merged
