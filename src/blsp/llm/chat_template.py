"""Chat templates with fixed variables and a fixed date, so that every command renders the same prompt.

In:  a chat template, and the variables that `--template-arg` sets, such as `{"enable_thinking": False}`.
Out: the template with a head that sets them; a template that reads neither is unchanged.
Try: `fix_template(tokenizer.chat_template, {"enable_thinking": False})`
Flow: settings → **chat_template.py** → model/loading.py (tokenizer), model/processing_blsp.py → prompt.py

The head is part of the template's text, and so it is in the adapter folder and in each of its routes:

    {% set enable_thinking = False %}
    {% macro strftime_now(format) %}…{% endmacro %}      only where the template asks for today's date
    {# end of fixed variables #}
    … the LLM's own template, unchanged
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any

# The day of every prompt whose template writes a date: the one that Llama 3's template falls back to.
PROMPT_DATE = datetime.date(2024, 7, 26)
RESERVED = ("messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception")
_BEGIN = "{# fixed variables #}\n"
_END = "{# end of fixed variables #}\n"
_FORMAT = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(\"[^\"]*\"|'[^']*')")


class TemplateError(ValueError):
    """A variable that a chat template does not read; the message names it."""


def fix_template(template: str, template_args: Mapping[str, Any] | None = None) -> str:
    """The template with these variables, and the date, set at its head.

    A head that is there already is replaced; with `template_args` None it stays.
    """
    if template_args is None and _END in template:
        return template
    before, _, own = template.rpartition(_END)
    # A processor's template has its own part before the head, which begins at its first line
    kept = before[: before.index(_BEGIN)] if before else ""
    _check_names(own, template_args or {})
    lines = [f"{{% set {name} = {value!r} %}}\n" for name, value in (template_args or {}).items()]
    if "strftime_now" in own:
        lines.append(_date_macro(own))
    return kept + (_BEGIN + "".join(lines) + _END if lines else "") + own


def _check_names(template: str, template_args: Mapping[str, Any]) -> None:
    for name in template_args:
        if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
            raise TemplateError(
                f"--template-arg {name}: the LLM's chat template has no such variable; read its chat_template.jinja "
                "for those it has, or leave it out (--no-thinking sets enable_thinking)"
            )


def _date_macro(template: str) -> str:
    """`strftime_now` on the fixed day, for every format that the template writes out.

    Line breaks after a tag are not rendered: transformers sets `trim_blocks`.
    """
    formats = {literal[1:-1] for literal in _FORMAT.findall(template)}
    dates = {text: PROMPT_DATE.strftime(text) for text in sorted(formats)}
    other = PROMPT_DATE.strftime("%d %B %Y")
    return f"{{% macro strftime_now(format) %}}{{{{ {dates!r}.get(format, {other!r}) }}}}{{% endmacro %}}\n"


def fix_tokenizer(tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer, its chat template fixed in place."""
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = fix_template(tokenizer.chat_template, template_args)
    elif template_args:
        raise TemplateError(f"--template-arg {', '.join(template_args)}: the LLM has no single chat template")
    return tokenizer


def show_args(template_args: Mapping[str, Any] | None) -> str:
    """`{"enable_thinking": False}` as messages say it: `enable_thinking=false`."""
    words = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in sorted((template_args or {}).items())
    ]
    return ", ".join(words) or "no template variables"
