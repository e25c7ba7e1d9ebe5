"""The LLM of step 1 by its weights, and the variables of its chat template.

In:  the settings of `blsp continue`. Out: `TextModel`; the fields that a server is sent beside the messages.
Try: `TextModel(find_weights("embedded:smollm2-135m-instruct"), {}).tokenizer`
Flow: settings → **text_model.py** → writer.py (the header), engines.py, openai_engine.py
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blsp.data.files import text_digest
from blsp.data.jobs import Job
from blsp.distributed import Runtime
from blsp.llm.prompt import PROMPT_DATE
from blsp.llm.sharding import run_together
from blsp.model.loading import load_language_model, load_tokenizer
from blsp.settings import ContinueSettings, SettingsError
from blsp.settings.shared import read_template_args
from blsp.weights.digest import Weights


@dataclass(frozen=True)
class TextModel:
    """The LLM by its weights; the tokenizer is loaded when it is needed."""

    weights: Weights
    template_args: dict[str, Any]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.weights, self.template_args)

    @property
    def template_digest(self) -> str:
        return text_digest(str(self.tokenizer.chat_template))

    def load(self, runtime: Runtime) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        llm, tokenizer = load_language_model(self.weights, runtime, self.template_args)
        if runtime.shard_llm:
            run_together(llm)
        return llm, tokenizer


def template_args_of(settings: ContinueSettings) -> dict[str, Any]:
    """Variables of the chat template: from the flags, a server's body, or (for --score-only) the header."""
    args = read_template_args(settings.template_arg, settings.no_thinking)
    if settings.engine_url:
        body = engine_body(settings).get("chat_template_kwargs") or {}
        if differing := [name for name in body if args.get(name, body[name]) != body[name]]:
            raise SettingsError(f"--engine-body: sets {differing[0]} differently than --template-arg; leave one out")
        args |= body
    if settings.score_only and not args:
        args = (Job(settings.out).header() or {}).get("template_args") or {}
    return args


def server_body(settings: ContinueSettings, llm: TextModel) -> dict[str, Any]:
    """Fields added to each request: a server renders the template itself, so it needs the variables and the date."""
    template = str(llm.tokenizer.chat_template)
    dated = "strftime_now" in template and "date_string" in template
    variables = {"date_string": PROMPT_DATE.strftime("%d %b %Y")} if dated else {}
    variables |= llm.template_args
    return engine_body(settings) | ({"chat_template_kwargs": variables} if variables else {})


def engine_body(settings: ContinueSettings) -> dict[str, Any]:
    try:
        body = json.loads(settings.engine_body)
    except ValueError as error:
        raise SettingsError(f"--engine-body {settings.engine_body!r}: is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise SettingsError(f"--engine-body {settings.engine_body!r}: must be a JSON object")
    return body
