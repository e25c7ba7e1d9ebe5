"""Option likelihoods equal those of whole sequences run one by one, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, TOLERANCE, tiny_blsp

from blsp.inference.listener import Listener, Question
from blsp.llm.prompt import prompt_template, text_ids, transcript_ids
from blsp.llm.teacher_forcing import option_scores

OPTIONS = [("yes", "no", "maybe tomorrow or never"), ("a", "how many days are in a week"), ("hello world",)]
TEXTS = ["what is the capital", "hi", "please repeat the following words hello world how many days"]


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_whole_sequences(tiny_models_folder: Path, family: str, rows: int) -> None:
    listener = Listener(*tiny_blsp(tiny_models_folder, family=family))
    instructions = ["Choose:", "Choose:", "Which?"]
    requests = [
        listener.request(i, Question(text=text, instruction=instruction), None, listener.decoding)
        for i, (text, instruction) in enumerate(zip(TEXTS, instructions, strict=True))
    ]
    found = option_scores(listener.model, listener.tokenizer, requests, OPTIONS, rows)
    for text, instruction, options, scores in zip(TEXTS, instructions, OPTIONS, found, strict=True):
        assert scores == pytest.approx(
            [_alone(listener, instruction, text, option) for option in options], abs=TOLERANCE[family]
        )


@torch.no_grad()
def _alone(listener: Listener, instruction: str, text: str, option: str) -> float:
    frame = prompt_template(listener.tokenizer, instruction, "instruction-first")
    question = [*frame.prefix_ids, *transcript_ids(listener.tokenizer, text), *frame.suffix_ids]
    answer = text_ids(listener.tokenizer, option)
    logits = listener.model(input_ids=torch.tensor([question + answer])).logits[0].log_softmax(dim=-1)
    places = range(len(question) - 1, len(question) + len(answer) - 1)
    return float(torch.stack([logits[place, token] for place, token in zip(places, answer, strict=True)]).mean())
