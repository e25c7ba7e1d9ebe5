"""Check of a chat template: it is rendered once in a process with limited time and memory.

In:  a tokenizer. Out: nothing, or a `TemplateError` that names its folder.
Try: `check_template(AutoTokenizer.from_pretrained("my-llm"))`
Flow: model/loading.py, model/checkpoint.py (once each time they load) → **template_check.py** → prompt.py renders it

A template is a program that comes with the weights. One expression can run for hours or fill the memory, and nothing
in the same process can stop it. A template that writes the date or a random value gives every command a different
prompt. So it is rendered with two dates, and both prompts must be equal. (`fix_template` has set a fixed date before.)
"""

import datetime
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import jinja2
from transformers.utils import chat_template_utils

from blsp.llm.prompt import TemplateError

CHECKED_ROLES = (("user",), ("system", "user"), ("user", "assistant", "user"))
CHECKED_SECONDS = 3  # of processor time; a normal template takes milliseconds
CHECKED_BYTES = 1 << 30  # of memory, in addition to what the process already uses
LONGEST_PROMPT = 1 << 20  # characters of a rendered conversation of three words
PATIENCE = 60.0  # seconds for the process, however busy the machine is
CHANGES = 2  # exit code of the process if the prompt differs between two dates


def check_template(tokenizer: Any) -> None:
    """Raise TemplateError for a chat template that is invalid, takes too much time or memory, or changes by date.

    Short conversations are rendered in a forked process. Systems that cannot fork (Windows) check nothing.
    """
    if not isinstance(tokenizer.chat_template, str) or not hasattr(os, "fork"):
        return
    if not (process := os.fork()):
        _render_limited(tokenizer)
    code = _exit_code(process)
    if code == CHANGES:
        raise TemplateError(
            f"{tokenizer.name_or_path}: its chat template writes a different prompt each day or each time, so the "
            "prompts of step 1 and step 2 would differ; put a chat_template.jinja without a date or random value there"
        )
    if code != 0:
        raise TemplateError(
            f"{tokenizer.name_or_path}: its chat template does not finish, or writes too much (it was stopped at "
            f"{CHECKED_SECONDS} s or {CHECKED_BYTES >> 20} MB); put a chat_template.jinja that you trust there"
        )
    try:
        _render(tokenizer, CHECKED_ROLES[0])
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{tokenizer.name_or_path}: its chat template cannot be read: {error}") from error
    except jinja2.TemplateError:
        return  # it refuses a role; prompt.py reports that when the role is used


def _exit_code(process: int) -> int | None:
    """The exit code of a child process; None where it had to be killed after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _render_limited(tokenizer: Any) -> NoReturn:
    """In a forked process: render the conversations under limits, then exit with 0, or a code that says what failed."""
    code = 1
    try:
        _limit_this_process()
        today = _render_all(tokenizer)
        chat_template_utils.datetime = _AnotherDay  # of this process alone
        code = int(max(map(len, today)) > LONGEST_PROMPT) or CHANGES * (today != _render_all(tokenizer))
    finally:
        os._exit(code)  # without the parent's handlers and buffers


def _render_all(tokenizer: Any) -> list[str]:
    """The prompt of each conversation; "" if the template refuses its roles."""
    prompts = []
    for roles in CHECKED_ROLES:
        prompts.append("")
        with suppress(jinja2.TemplateError):
            prompts[-1] = _render(tokenizer, roles)
    return prompts


class _AnotherDay(datetime.datetime):
    """A clock on which year, month, day, weekday, hour, minute and second all differ from the present ones."""

    @classmethod
    def now(cls, tz: Any = None) -> "_AnotherDay":
        return cls.fromtimestamp(super().now(tz).timestamp() + 400 * 86_400 + 13 * 3600 + 61)


def _limit_this_process() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CHECKED_SECONDS, CHECKED_SECONDS + 1))  # a child's time begins at 0
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as pages:
            size = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + CHECKED_BYTES, size + CHECKED_BYTES))


def _render(tokenizer: Any, roles: Sequence[str]) -> str:
    messages = [{"role": role, "content": "x"} for role in roles]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
