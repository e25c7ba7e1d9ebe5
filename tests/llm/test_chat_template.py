"""Chat templates: variables and the date are set in the template's text, and nothing else in the prompt changes."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from support.templates import DATED, DATED_LLAMA, THINKING
from support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from transformers.utils import chat_template_utils

from blsp.llm.prompt import PromptError, TemplateError, fix_template, fix_tokenizer, prompt_template
from blsp.llm.template_check import check_template
from blsp.settings import SettingsError
from blsp.settings.shared import read_template_args

TURN = [{"role": "user", "content": "hello"}]


class _Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Tomorrow:
        return cls(2031, 1, 2)


def rendered(template: str, **variables: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(TURN, tokenize=False, add_generation_prompt=True, **variables)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING, "\n  {% if true %}x{% endif %} y"])
def test_a_template_without_a_date_stays_as_it_is(template: str) -> None:
    assert fix_template(template) == fix_template(template, {}) == template


@pytest.mark.parametrize("start", ["", "\n", "\n\n  ", "  {% if true %}x{% endif %}\n"])
def test_a_variable_is_what_the_template_would_be_given(start: str) -> None:
    template = start + THINKING
    fixed = fix_template(template, {"enable_thinking": False})
    assert rendered(fixed) == rendered(template, enable_thinking=False) != rendered(template)
    assert "<think>\n\n</think>" in rendered(fixed)
    assert rendered(fix_template(template, {"enable_thinking": True})) == rendered(template)


@pytest.mark.parametrize("value", ["it's", 'a "word" \\n {% x %} }} é 🎈', 3, -1.5, None, ["a", True], {"k": [1]}])
def test_values_of_every_kind_arrive(value: Any) -> None:
    template = "{{ kind | tojson }}"
    assert rendered(fix_template(template, {"kind": value})) == rendered(template, kind=value)


NAMED_FORMAT = "{% set format = '%A, %-d %B %Y, %-m/%y' %}{% set now = strftime_now %}{{ now(format) }}|{{ now('%H') }}"


@pytest.mark.parametrize("template", [DATED, DATED_LLAMA])
def test_the_date_of_a_prompt_does_not_change_overnight(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = fix_template(template)
    today = rendered(fixed)
    assert "26 Jul 2024" in today
    monkeypatch.setattr(chat_template_utils, "datetime", _Tomorrow)
    assert "02 Jan 2031" in rendered(template)
    assert rendered(fixed) == today


def test_a_format_may_come_from_a_variable() -> None:
    assert rendered(fix_template(NAMED_FORMAT)) == "Friday, 26 July 2024, 7/24|00"


def with_template(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [DATED, DATED_LLAMA, NAMED_FORMAT, THINKING])
def test_a_prompt_that_is_the_same_each_day_is_taken(template: str) -> None:
    check_template(fix_tokenizer(with_template(template)))


@pytest.mark.parametrize("template", [DATED, NAMED_FORMAT, "{{ range(99999) | random }}", "{{ lipsum() }}"])
def test_a_prompt_that_is_another_one_each_time_is_refused(template: str) -> None:
    """As it would be where a date came from something else than `strftime_now`, which is fixed."""
    with pytest.raises(TemplateError, match="its chat template writes a different prompt each day or each time"):
        check_template(with_template(template))
    assert chat_template_utils.datetime is datetime.datetime


def test_of_several_templates_the_default_one_is_fixed() -> None:
    tokenizer = fix_tokenizer(with_template({"default": DATED, "tool_use": "{{ tools }}"}))
    assert tokenizer.chat_template == fix_template(DATED)
    with pytest.raises(PromptError, match="no chat template"):
        prompt_template(fix_tokenizer(with_template({"tool_use": DATED})), "Repeat:", "instruction-first")


def test_a_date_of_ones_own() -> None:
    args = read_template_args(["date_string=2025-03-01"], no_thinking=False)
    assert "Today Date: 2025-03-01" in rendered(fix_template(DATED_LLAMA, args))


def test_fixing_again_replaces_the_head() -> None:
    once = fix_template(DATED + THINKING, {"enable_thinking": False})
    assert fix_template(once) == once == fix_template(once, {"enable_thinking": False})
    assert fix_template(once, {}) == fix_template(DATED + THINKING)
    assert fix_template("part {% set x = 1 %}" + once, {}) == "part {% set x = 1 %}" + fix_template(once, {})


def test_both_routes_read_the_fixed_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    before = prompt_template(tokenizer, "Repeat:", "instruction-first")
    after = prompt_template(fix_tokenizer(tokenizer, {"enable_thinking": False}), "Repeat:", "instruction-first")
    assert before.prefix_ids == after.prefix_ids
    assert tokenizer.decode(after.suffix_ids).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "strftime_now"])
def test_a_variable_that_the_template_does_not_read_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match=f"--template-arg {name}"):
        fix_template(DATED + THINKING, {name: False})


def test_flags_are_read_as_yaml() -> None:
    flags = ["enable_thinking=false", "depth=3", "tone=plain words", "equation=a=b"]
    values = {"enable_thinking": False, "depth": 3, "tone": "plain words", "equation": "a=b"}
    assert read_template_args(flags, no_thinking=True) == values
    for wrong in ("enable_thinking", "=false", "a b=1", "a=[1"):
        with pytest.raises(SettingsError, match="--template-arg"):
            read_template_args([wrong], no_thinking=False)
    with pytest.raises(SettingsError, match="--no-thinking"):
        read_template_args(["enable_thinking=true"], no_thinking=True)
