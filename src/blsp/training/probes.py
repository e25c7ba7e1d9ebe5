"""How far the LLM that listens is from the LLM that reads, measured on a few clips while training goes on.

In:  examples from the training part and held-out ones, the model.
Out: ``{"held_out_kl": …, "held_out_kl_shuffled": …, "held_out_top1": …, "held_out_wer": …, "train_kl": …}``.
Try: ``measure(Probe("held_out", examples), prefixes, tokenizer, positions=4096)``
Flow: training/loop.py every so many steps -> **probes.py** -> metrics.jsonl, curves.png

`kl` is the mean over response tokens of KL(text || speech), temperature 1, whole vocabulary, nats; it
predicts downstream accuracy (SALAD, 2510.13632). `kl_shuffled` is the same with every clip exchanged for
another one: an adapter that merely became harmless does well there too, one that listens does badly. `wer` is
the word error rate of the adapter's own read-out, where it has one.

Letters: N response positions, D LLM width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import jiwer
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from whisper_normalizer.basic import BasicTextNormalizer

from blsp.llm.language_model import rows_per_chunk
from blsp.llm.prefix import PrefixCache
from blsp.training.batches import cut
from blsp.training.examples import Example
from blsp.training.losses import kl_loss
from blsp.training.step import response_states, speech_states, speech_vectors, transcript_vectors


@dataclass
class Probe:
    """The clips of one part of the data, and what the LLM makes of their transcripts: computed once, for
    good.

    text: last hidden states (n, D) of the reading LLM at each answered example's response.
    """

    part: str
    examples: list[Example]
    text: dict[int, Tensor] = field(default_factory=dict)

    @property
    def answered(self) -> list[Example]:
        return [example for example in self.examples if example.response and not example.no_speech]


@torch.no_grad()
def measure(
    probe: Probe, prefixes: PrefixCache, tokenizer: PreTrainedTokenizerBase, positions: int
) -> dict[str, float]:
    """The probes of one part of the data ("train" or "held_out"); those that it has examples for."""
    adapter = prefixes.llm.model.multi_modal_projector
    learning = adapter.training
    adapter.eval()
    found: dict[str, float] = {}
    if probe.answered:
        found["kl"], found["top1"] = divergence(probe, probe.answered, prefixes, positions)
        if others := shuffled(probe.answered):
            found["kl_shuffled"], _ = divergence(probe, others, prefixes, positions)
    spoken = {example.id: example for example in probe.examples if not example.no_speech}
    if spoken and prefixes.llm.model.reads_out:
        found["wer"] = readout_wer(list(spoken.values()), prefixes, tokenizer, positions)
    adapter.train(learning)
    return {f"{probe.part}_{name}": round(value, 6) for name, value in found.items()}


def divergence(
    probe: Probe, hearing: Sequence[Example], prefixes: PrefixCache, positions: int
) -> tuple[float, float]:
    """Mean KL(text || speech) in nats and top-1 agreement over all response positions.

    hearing: the probe's answered examples, or the same with other clips to be heard.
    """
    total, agreed, count = 0.0, 0, 0
    rows = rows_per_chunk(prefixes.llm.config.text_config.vocab_size)
    for numbers in micro_batches(hearing, positions):
        batch = [hearing[number] for number in numbers]
        heard = prefixes.llm.model.listen(*speech_states(prefixes.llm, batch))
        speech, _ = response_states(prefixes.llm, batch, speech_vectors(heard, range(len(batch))), prefixes)
        text = _text_states(probe, numbers, batch, prefixes)
        for start in range(0, len(speech), rows):
            part = slice(start, start + rows)
            student, teacher = (
                prefixes.llm.compute_logits(speech[part]),
                prefixes.llm.compute_logits(text[part]),
            )
            total += kl_loss(student, teacher)[0].item()
            agreed += int((student.argmax(-1) == teacher.argmax(-1)).sum())
            count += len(student)
    return total / count, agreed / count


def _text_states(
    probe: Probe, numbers: Sequence[int], batch: Sequence[Example], prefixes: PrefixCache
) -> Tensor:
    """States (N, D) of the reading LLM at the responses of a micro-batch, from the first time on remembered."""
    if any(number not in probe.text for number in numbers):
        states, _ = response_states(prefixes.llm, batch, transcript_vectors(prefixes.llm, batch), prefixes)
        found = states.split([len(example.response) for example in batch])
        probe.text.update(zip(numbers, found, strict=True))
    return torch.cat([probe.text[number] for number in numbers])


def readout_wer(
    examples: Sequence[Example], prefixes: PrefixCache, tokenizer: PreTrainedTokenizerBase, positions: int
) -> float:
    """Word error rate of the adapter's read-out, lower case and without punctuation on both sides."""
    normalise = BasicTextNormalizer()
    references, hypotheses = [], []
    for numbers in micro_batches(examples, positions):
        batch = [examples[number] for number in numbers]
        readouts = prefixes.llm.model.listen(*speech_states(prefixes.llm, batch)).readout or []
        references += [normalise(example.text) for example in batch]
        hypotheses += [normalise(tokenizer.decode(ids)) for ids in readouts]
    kept = [i for i, reference in enumerate(references) if reference.strip()]
    if not kept:
        return 0.0
    return float(jiwer.wer([references[i] for i in kept], [hypotheses[i] for i in kept]))


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """Every example with the speech of another utterance; nothing where there is but one utterance."""
    if len({example.id for example in examples}) < 2:
        return []
    found = []
    for place, example in enumerate(examples):
        turned = [*examples[place + 1 :], *examples[:place]]
        found.append(example.hearing(next(other for other in turned if other.id != example.id)))
    return found


def micro_batches(examples: Sequence[Example], positions: int) -> Iterator[list[int]]:
    """Numbers of examples that share a prefix, under the budget: speech counted at its encoder frames over
    eight.
    """
    prefixes = sorted({example.template.prefix_ids for example in examples})
    groups = np.array([prefixes.index(example.template.prefix_ids) for example in examples])
    lengths = [round(e.seconds * 50 / 8) + len(e.template.suffix_ids) + len(e.response) for e in examples]
    for numbers in cut(np.arange(len(examples)), np.array(lengths), groups, positions):
        yield numbers.tolist()
