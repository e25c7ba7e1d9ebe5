"""How far the LLM that listens is from the LLM that reads, measured on a few clips while training goes on.

In:  examples from the training part and held-out ones, the model.
Out: ``{"held_out_kl": …, "held_out_kl_shuffled": …, "held_out_top1": …, "held_out_wer": …, "train_kl": …}``.
Try: ``measure("held_out", examples, llm, positions=4096)``
Flow: training/loop.py every so many steps -> **probes.py** -> metrics.jsonl, curves.png

`kl` is the mean over response tokens of KL(text || speech), temperature 1, whole vocabulary, nats; it
predicts downstream accuracy (SALAD, 2510.13632). `kl_shuffled` is the same with every clip exchanged for
another one: an adapter that merely became harmless does well there too, one that listens does badly. `wer` is
the word error rate of a `grounded` adapter's own read-out.

Letters: N response positions, D LLM width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jiwer
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from whisper_normalizer.basic import BasicTextNormalizer

from blsp.training.batches import cut
from blsp.training.examples import Example
from blsp.training.losses import kl_loss, rows_per_chunk
from blsp.training.prompted_llm import PromptedLLM
from blsp.training.step import response_states, speech_states, speech_vectors, transcript_vectors


@torch.no_grad()
def measure(
    part: str,
    examples: Sequence[Example],
    llm: PromptedLLM,
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
) -> dict[str, float]:
    """The probes of one part of the data ("train" or "held_out"); those that it has examples for."""
    adapter = llm.model.model.multi_modal_projector
    learning = adapter.training
    adapter.eval()
    spoken = [example for example in examples if not example.no_speech]
    answered = [example for example in spoken if example.response]
    found: dict[str, float] = {}
    if answered:
        found["kl"], found["top1"] = divergence(answered, llm, positions)
        if len(others := shuffled(answered)) > 1:
            found["kl_shuffled"], _ = divergence(others, llm, positions)
    if spoken and llm.model.config.adapter == "grounded":
        found["wer"] = readout_wer(list({e.id: e for e in spoken}.values()), llm, tokenizer, positions)
    adapter.train(learning)
    return {f"{part}_{name}": round(value, 6) for name, value in found.items()}


def divergence(examples: Sequence[Example], llm: PromptedLLM, positions: int) -> tuple[float, float]:
    """Mean KL(text || speech) in nats and top-1 agreement over all response positions."""
    divergence_sum, agreed, count = 0.0, 0, 0
    for batch in _micro_batches(examples, positions):
        heard = llm.model.model.listen(*speech_states(llm.model, batch))
        speech, _ = response_states(llm.model, batch, speech_vectors(heard, range(len(batch))), llm)
        text, _ = response_states(llm.model, batch, transcript_vectors(llm.model, batch), llm)
        for hearing, reading in _chunks(
            speech, text, rows_per_chunk(llm.model.config.text_config.vocab_size)
        ):
            student, teacher = llm.model.compute_logits(hearing), llm.model.compute_logits(reading)
            divergence_sum += kl_loss(student, teacher)[0].item()
            agreed += int((student.argmax(-1) == teacher.argmax(-1)).sum())
            count += len(student)
    return divergence_sum / count, agreed / count


def readout_wer(
    examples: Sequence[Example], llm: PromptedLLM, tokenizer: PreTrainedTokenizerBase, positions: int
) -> float:
    """Word error rate of the adapter's read-out, lower case and without punctuation on both sides."""
    normalise = BasicTextNormalizer()
    references, hypotheses = [], []
    for batch in _micro_batches(examples, positions):
        readouts = llm.model.model.listen(*speech_states(llm.model, batch)).readout or []
        references += [normalise(example.text) for example in batch]
        hypotheses += [normalise(tokenizer.decode(ids)) for ids in readouts]
    kept = [i for i, reference in enumerate(references) if reference.strip()]
    if not kept:
        return 0.0
    return float(jiwer.wer([references[i] for i in kept], [hypotheses[i] for i in kept]))


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """Every example with the speech of another utterance; those for which there is none are left out."""
    found = []
    for place, example in enumerate(examples):
        turned = [*examples[place + 1 :], *examples[:place]]
        other = next((other for other in turned if other.id != example.id), None)
        if other is not None:
            found.append(example.hearing(other))
    return found


def _micro_batches(examples: Sequence[Example], positions: int) -> Iterator[list[Example]]:
    """Examples that share a prefix, under the budget: speech counted at its encoder frames over eight."""
    prefixes = sorted({example.frame.prefix_ids for example in examples})
    groups = np.array([prefixes.index(example.frame.prefix_ids) for example in examples])
    lengths = np.array(
        [round(e.seconds * 50 / 8) + len(e.frame.suffix_ids) + len(e.response) for e in examples]
    )
    for rows in cut(np.arange(len(examples)), lengths, groups, positions):
        yield [examples[row] for row in rows]


def _chunks(speech: Tensor, text: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(speech), rows):
        yield speech[start : start + rows], text[start : start + rows]
