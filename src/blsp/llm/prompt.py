"""Prompts with a placeholder for the speech, rendered through the LLM's own chat template.

In:  a tokenizer with a chat template; an instruction and an order, or a conversation of text and speech parts;
     the variables that `--template-arg` sets, such as `{"enable_thinking": False}`.
Out: the ids before and after the speech (`PromptTemplate`), or a conversation as a list of ids and speech indices.
Try: `template = prompt_template(tokenizer, "Please repeat the following words:", "instruction-first")`
Flow: instructions.py → **prompt.py** → step 1, step 2, inference and the judge.

Both routes splice into the same ids:

    text route     prefix_ids + transcript_ids(text) + suffix_ids
    speech route   prefix_ids + speech vectors       + suffix_ids

A user's text is never parsed for control tokens. A numbered mark takes its place in the template. The rendered
template is cut at the marks, and the text is tokenised on its own, with special tokens as plain characters:

    parts       ["Repeat:", Speech(0)]
    rendered    "<|im_start|>user\\n" mark 0 mark 1 "<|im_end|>\\n<|im_start|>assistant\\n"
    segments    ids of the start and of "Repeat:", joined; Speech(0); ids of the rest

`fix_template` sets variables and a fixed date at the head of a template, so that every command renders the same
prompt. The head is part of the template's text, so the adapter folder and both routes have it too:

    {% set enable_thinking = False %}
    {% macro strftime_now(format) %}…{% endmacro %}      only where the template asks for today's date
    {# end of fixed variables #}
    … the LLM's own template, unchanged
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

Order = Literal["speech-first", "instruction-first"]
ORDERS: tuple[Order, ...] = ("speech-first", "instruction-first")
# Private-use characters: no template contains them, and no user's text is put into a template.
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


Part = str | Speech | tuple[int, ...]  # a user's text, a clip, or ids that are used as they are (an earlier answer)
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
    # the speech may be first or last: add empty ids on both sides
    segments: list[Segment] = [(), *render(tokenizer, [{"role": "user", "content": parts}]), ()]
    speech = segments.index(Speech(0))
    prefix, suffix = segments[:speech][-1], segments[speech + 1]
    assert not isinstance(prefix, Speech) and not isinstance(suffix, Speech)
    return PromptTemplate(prefix, suffix)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, answer: bool = True
) -> list[Segment]:
    """A conversation as ids and speech placeholders, in order.

    messages: `{"role", "content"}`; content is a string or a list of `Part`s.
    answer: end with the beginning of an assistant turn.
    """
    # Replace every part by a mark with its number.
    parts: list[Part] = []
    marked = []
    for message in messages:
        content = [message["content"]] if isinstance(message["content"], str) else list(message["content"])
        marks = "".join(_MARK.format(len(parts) + i) for i in range(len(content)))
        marked.append({"role": message["role"], "content": marks})
        parts.extend(content)

    # Odd pieces are the numbers of the marks, even pieces the template's own text between them.
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
    """Ids of a transcript in the place of the speech: the text after one leading space."""
    text = text.strip()
    return text_ids(tokenizer, " " + text) if text else []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text, in which the names of control tokens are plain characters.

    `split_special_tokens` does that for the tokens that the tokenizer calls special, but Gemma 2's turn marks are
    not among them. Text that would still become an added token is cut in the middle of it and tokenised in halves.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    added = tokenizer.added_tokens_decoder
    # some tokenizers (Gemma, Phi) have runs of spaces or line breaks as added tokens; these are plain text
    names = [str(added[token]) for token in ids if token in added]
    control = next((name for name in names if name.strip(" \n\t\r\u2581")), None)
    if control is None or len(control) < 2:
        return ids
    if control not in text:
        raise PromptError(f"the text would be read as the control token {control!r}; write it in another way")
    middle = text.index(control) + len(control) // 2
    return [*text_ids(tokenizer, text[:middle]), *text_ids(tokenizer, text[middle:])]


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring runs of ids and drop empty ones."""
    merged: list[Segment] = []
    for is_speech, run in groupby(segments, key=lambda segment: isinstance(segment, Speech)):
        parts: list[Any] = list(run)
        merged += parts if is_speech else [tuple(chain.from_iterable(parts))]
    return [segment for segment in merged if segment]


# --- variables and a date at the head of a chat template ----------------------------------------------------

# The date in every prompt whose template writes one: the default of Llama 3's template.
PROMPT_DATE = datetime.date(2024, 7, 26)
RESERVED = ("messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception")
_BEGIN = "{# fixed variables #}\n"
_END = "{# end of fixed variables #}\n"
_DATE_CODES = "aAbBdHIjmMpSuUVwWxXyY"  # codes of strftime that are the same on every system


class TemplateError(ValueError):
    """A chat template that cannot be used, or a variable that it does not have; the message names it."""


def fix_template(template: str, template_args: Mapping[str, Any] | None = None) -> str:
    """The template with these variables and the date set at its head.

    An existing head is replaced, or kept if `template_args` is None.
    """
    if template_args is None and _END in template:
        return template
    before, _, own = template.rpartition(_END)
    # A processor's template has a part of its own before the head: keep it.
    kept = before[: before.index(_BEGIN)] if before else ""
    for name in template_args or ():
        if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", own):
            raise TemplateError(
                f"--template-arg {name}: the LLM's chat template has no such variable; read its chat_template.jinja "
                "for those it has, or leave it out (--no-thinking sets enable_thinking)"
            )
    lines = [f"{{% set {name} = {value!r} %}}\n" for name, value in (template_args or {}).items()]
    if "strftime_now" in own:
        lines.append(_date_macro())
    return kept + (_BEGIN + "".join(lines) + _END if lines else "") + own


def _date_macro() -> str:
    """`strftime_now` with the fixed date: each code of a format becomes its value, `%-d` the value without its zero.

    Line breaks after a tag are not rendered: transformers sets `trim_blocks`.
    """
    values = {code: PROMPT_DATE.strftime(f"%{code}") for code in _DATE_CODES}
    codes = {f"%{code}": value for code, value in values.items()}
    codes |= {f"%-{code}": value.lstrip("0") or "0" for code, value in values.items()}
    replaced = "".join(f".replace({code!r}, {value!r})" for code, value in codes.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def fix_tokenizer(tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> Any:
    """Fix the tokenizer's chat template in place and return it; of several templates, keep the default one."""
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = fix_template(tokenizer.chat_template, template_args)
    elif template_args:
        raise TemplateError(f"--template-arg {', '.join(template_args)}: the LLM has no chat template")
    return tokenizer


def show_args(template_args: Mapping[str, Any] | None) -> str:
    """`{"enable_thinking": False}` as it is written in messages: `enable_thinking=false`."""
    words = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in sorted((template_args or {}).items())
    ]
    return ", ".join(words) or "no template variables"
