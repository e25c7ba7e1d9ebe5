"""Probes: divergence between the text route and the speech route on a few clips, during training.

In:  the reader of examples, `--val-data NAME=FILE`, the model.
Out: one `Probe` for each part of the data (`held_out`, `train`, and each NAME); its figures,
     ``{"held_out_kl": …, "held_out_kl_shuffled": …, "held_out_top1": …, "held_out_wer": …}``.
Try: ``measure(Probe("held_out", examples), prefixes, tokenizer, positions=4096)``
Flow: training/run.py opens the clips; loop.py every so many steps -> **probes.py** -> metrics.jsonl, curves.png

- `kl`: mean over response tokens of KL(text || speech), temperature 1, whole vocabulary, nats. It predicts accuracy on
  tasks (SALAD, 2510.13632).
- `kl_shuffled`: the same with the speech of another clip. An adapter that does not listen has the same `kl` and
  `kl_shuffled`.
- `top1`: share of response tokens for which both routes have the same likeliest token.
- `wer`: word error rate of the read-out, for adapters that read out.
- `tokens`: share of the spoken tokens whose embedding is the nearest of all to the vector at their place (by the cosine
  of vectors without the table's mean), if the times of the tokens are known.

Shapes: S adapter places, U transcript tokens, V vocabulary, N response positions of a micro-batch, n of an example,
D LLM width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import jiwer
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blsp.data.jobs import SkippedLog
from blsp.data.normalisation import basic_normaliser
from blsp.data.partners import partners
from blsp.distributed import Runtime
from blsp.llm import teacher_forcing
from blsp.llm.language_model import at_least_float32
from blsp.llm.prefix import PrefixCache
from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.speech_encoder import FRAMES_PER_SECOND
from blsp.settings import SettingsError
from blsp.training.batches import cut
from blsp.training.dataset import Refused, Source, open_dataset, open_sources
from blsp.training.examples import Example, ExampleReader, RowMeasurer
from blsp.training.step import response_states, speech_states, speech_vectors, transcript_states

PROBE_ROWS = 24  # of each part; they give the divergence within about a tenth of its value, in seconds
OWN_PARTS = ("held_out", "train")


@dataclass
class Probe:
    """The clips of one part of the data, and the states of their text route, which are computed once.

    text: last hidden states (n, D) at the response of each answered example.
    answered: those whose routes can be compared. Without a transcript there is no text route.
    """

    part: str
    examples: list[Example]
    text: dict[int, Tensor] = field(default_factory=dict)

    @property
    def answered(self) -> list[Example]:
        return [example for example in self.examples if example.response and example.transcript]


# --- the clips --------------------------------------------------------------------------------------------
def validation_sources(flags: Sequence[str]) -> dict[str, Source]:
    """The files of --val-data by their names."""
    sources: dict[str, Source] = {}
    for flag in flags:
        name, _, path = flag.partition("=")
        if not path or not name.isidentifier() or name in (*OWN_PARTS, *sources):
            raise SettingsError(f"--val-data {flag}: must read NAME=FILE, each NAME once and none {OWN_PARTS}")
        found = open_sources([path])
        if len(found) > 1:
            raise SettingsError(f"--val-data {flag}: matches {len(found)} files; name one")
        (sources[name],) = found
    return sources


def open_probes(reader: ExampleReader) -> tuple[Probe, ...]:
    """The clips of the run's own data."""
    parts = {"held_out": reader.dataset.held_out, "train": reader.dataset.rows}
    return tuple(Probe(part, draw_examples(reader, rows, PROBE_ROWS)) for part, rows in parts.items())


def open_validation(
    reader: ExampleReader, sources: Mapping[str, Source], measurer: RowMeasurer, out: Path, runtime: Runtime
) -> tuple[Probe, ...]:
    """The clips of each file, measured into OUT/validation/NAME."""
    probes = []
    for name, source in sources.items():
        folder = out / "validation" / name
        folder.mkdir(parents=True, exist_ok=True)
        skipped = SkippedLog(folder / f"rows.rank{runtime.rank}")
        own = replace(measurer, templates=[], _numbers={})  # only the prompts of this file
        dataset = open_dataset([source], own, folder, skipped, 0, runtime)
        probes.append(Probe(name, draw_examples(replace(reader, dataset=dataset), dataset.rows, PROBE_ROWS)))
    return tuple(probes)


def draw_examples(reader: ExampleReader, rows: NDArray[np.void], count: int) -> list[Example]:
    """Examples of `count` of the rows: always the same ones, not augmented, all with speech."""
    plain = replace(reader, augmentation=())
    examples: list[Example] = []
    for row in rows[np.random.default_rng(0).permutation(len(rows))[: 2 * count]]:
        try:
            examples += [] if row["no_speech"] else [plain.example(row, epoch=0)]
        except Refused:  # more rows are drawn than needed
            continue
    return examples[:count]


# --- the figures ------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(
    probe: Probe, prefixes: PrefixCache, tokenizer: PreTrainedTokenizerBase, positions: int, filler: int = 0
) -> dict[str, float]:
    """The probes of one part of the data ("train" or "held_out") for which it has examples.

    filler: the LLM's token at places without speech, for adapters that do not read out.
    """
    adapter = prefixes.llm.model.multi_modal_projector
    was_training = adapter.training
    adapter.eval()
    figures: dict[str, float] = {}
    if probe.answered:
        figures["kl"], figures["top1"] = divergence(probe, probe.answered, prefixes, positions)
        if others := exchange_speech(probe.answered):
            figures["kl_shuffled"], _ = divergence(probe, others, prefixes, positions)
    # Several rows of a clip count as one. Two data files may give one id to clips of two texts
    spoken = {(example.id, example.text): example for example in probe.examples if example.transcript}
    if spoken and prefixes.llm.model.reads_out:
        figures["wer"] = readout_wer(list(spoken.values()), prefixes, tokenizer, positions)
    placed = [example for example in spoken.values() if example.places is not None]
    if placed:
        figures["tokens"] = tokens_found(placed, prefixes.llm)
    fitting = [example for example in spoken.values() if example.fits]
    if fitting:
        nearest = nearest_tokens(fitting, prefixes.llm)  # (S,) each
        figures["wer"] = word_errors(fitting, [ids[ids != filler].tolist() for ids in nearest], tokenizer)
    adapter.train(was_training)
    return {f"{probe.part}_{name}": round(value, 6) for name, value in figures.items()}


def divergence(probe: Probe, examples: Sequence[Example], prefixes: PrefixCache, positions: int) -> tuple[float, float]:
    """Mean KL(text || speech) in nats and top-1 agreement over all response positions.

    examples: the probe's answered examples, with their own speech or with that of other clips.
    """
    tokens = [token for tokens in token_divergences(probe, examples, prefixes, positions) for token in tokens]
    nats, agreed = zip(*tokens, strict=True)
    return sum(nats) / len(nats), sum(agreed) / len(agreed)


def token_divergences(
    probe: Probe, examples: Sequence[Example], prefixes: PrefixCache, positions: int
) -> list[list[tuple[float, bool]]]:
    """For each example and position: KL(text || speech) in nats, and whether the likeliest tokens agree."""
    model, found = prefixes.llm, dict[int, list[tuple[float, bool]]]()
    for numbers in micro_batches(examples, positions):
        batch = [examples[number] for number in numbers]
        audio = model.model.listen(*speech_states(model, batch))
        vectors = speech_vectors(model, audio, batch)
        speech, _ = response_states(model, batch, vectors, prefixes)  # (N, D)
        text = _text_states(probe, numbers, batch, prefixes)  # (N, D)
        tokens = zip(*teacher_forcing.divergence(model, text, speech), strict=True)
        found |= {number: list(islice(tokens, len(examples[number].response))) for number in numbers}
    return [found[number] for number in range(len(examples))]


def _text_states(probe: Probe, numbers: Sequence[int], batch: Sequence[Example], prefixes: PrefixCache) -> Tensor:
    """States (N, D) of the text route at the responses of a micro-batch, computed the first time and then kept."""
    if any(number not in probe.text for number in numbers):
        states = transcript_states(prefixes.llm, batch, prefixes)
        by_example = states.split([len(example.response) for example in batch])  # (n, D) each
        probe.text.update(zip(numbers, by_example, strict=True))
    return torch.cat([probe.text[number] for number in numbers])


def readout_wer(
    examples: Sequence[Example], prefixes: PrefixCache, tokenizer: PreTrainedTokenizerBase, positions: int
) -> float:
    """Word error rate of the adapter's read-out."""
    read: dict[int, list[int]] = {}
    for numbers in micro_batches(examples, positions):
        batch = [examples[number] for number in numbers]
        readouts = prefixes.llm.model.listen(*speech_states(prefixes.llm, batch)).readout or []
        read |= dict(zip(numbers, readouts, strict=True))
    return word_errors(examples, [read[number] for number in range(len(examples))], tokenizer)


def word_errors(
    examples: Sequence[Example], read: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Word error rate of tokens that were read, lower case and without punctuation on both sides."""
    normalise = basic_normaliser()
    pairs = [(normalise(e.text), normalise(tokenizer.decode(ids))) for e, ids in zip(examples, read, strict=True)]
    kept = [pair for pair in pairs if pair[0].strip()]
    return float(jiwer.wer([text for text, _ in kept], [found for _, found in kept])) if kept else 0.0


def nearest_tokens(examples: Sequence[Example], llm: BlspForConditionalGeneration) -> list[Tensor]:
    """For each clip (S,): the token of the whole vocabulary whose embedding is the nearest to each vector."""
    mean, _ = llm.model.embedding_moments()
    table = torch.nn.functional.normalize(at_least_float32(llm.model.embedding_table()) - mean, dim=-1)  # (V, D)
    found = []
    for example in examples:
        audio = llm.model.listen(*speech_states(llm, [example]))
        vectors = audio.vectors[0][audio.valid[0]]  # (S, D)
        found.append(((vectors - mean).to(table.dtype) @ table.T).argmax(dim=-1).cpu())
    return found


def tokens_found(examples: Sequence[Example], llm: BlspForConditionalGeneration) -> float:
    """Share of the spoken tokens that are the nearest of the whole vocabulary to the vector at their place."""
    right, count = 0, 0
    for example, nearest in zip(examples, nearest_tokens(examples, llm), strict=True):
        found = nearest[torch.from_numpy(np.asarray(example.places))]  # (U,)
        right += int((found == torch.tensor(example.transcript)).sum())
        count += len(found)
    return right / max(1, count)


def exchange_speech(examples: Sequence[Example]) -> list[Example]:
    """Each example with the speech of another text; empty if an example has no such partner."""
    texts = [tuple(example.transcript) for example in examples]
    others = partners(texts)
    if any(texts[number] == texts[other] for number, other in enumerate(others)):
        return []
    pairs = zip(examples, (examples[other] for other in others), strict=True)
    return [replace(one, features=other.features, mel=other.mel, mel_frames=other.mel_frames) for one, other in pairs]


def micro_batches(examples: Sequence[Example], positions: int) -> Iterator[list[int]]:
    """Indices of examples that share a prefix, within the budget; eight encoder frames count as one position."""
    prefixes = sorted({example.template.prefix_ids for example in examples})
    groups = np.array([prefixes.index(example.template.prefix_ids) for example in examples])
    lengths = [
        round(example.seconds * FRAMES_PER_SECOND / 8) + len(example.template.suffix_ids) + len(example.response)
        for example in examples
    ]
    for numbers in cut(np.arange(len(examples)), np.array(lengths), groups, positions):
        yield numbers.tolist()
