"""Examples and data files for the training tests: random speech, prompts through the tiny tokenizer, random
answers.

In:  a tiny model's processor, or a folder. Out: `Example`s; or continuation files with their clips.
Try: ``examples = make_examples(processor, count=5)``
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from support.tiny_models import SPOKEN, speech_like

from blsp.continuation.topk import topk_folder
from blsp.data.audio import write_wav
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.model.processing_blsp import BlspProcessor
from blsp.model.speech_encoder import mel_features, mel_frames
from blsp.training.examples import Example

WORDS = SPOKEN.split()
INSTRUCTION = "please continue"
END = 2


def make_examples(
    processor: BlspProcessor, count: int, *, order: str = "speech-first", seed: int = 0, ctc: bool = True
) -> list[Example]:
    """Clips of 0.4 to 2 seconds with transcripts of one to four words and answers of one to nine tokens."""
    generator = np.random.default_rng(seed)
    frame = prompt_template(processor.tokenizer, INSTRUCTION, order)
    examples = []
    for number in range(count):
        audio = speech_like(float(generator.uniform(0.4, 2.0)), seed=seed * 100 + number)
        mel, _ = mel_features(processor.feature_extractor, [audio])
        text = " ".join(generator.choice(WORDS, size=generator.integers(1, 5)))
        read = transcript_ids(processor.tokenizer, text)
        examples.append(
            Example(
                id=f"clip-{number}",
                seconds=len(audio) / 16_000,
                template=frame,
                transcript=read,
                response=[*generator.integers(3, 300, size=generator.integers(1, 9)).tolist(), END],
                no_speech=False,
                mel=mel[0].numpy(),
                mel_frames=mel_frames(len(audio)),
                readout=[token - 3 + 1 for token in read[:2]] if ctc else None,
                text=text,
            )
        )
    return examples


def silent(example: Example, response: list[int]) -> Example:
    """The example as one of no speech."""
    return replace(example, no_speech=True, transcript=[], readout=[], response=response, text="")


def write_data(folder: Path, rows: int, *, seed: int = 0, top_k: int = 0) -> Path:
    """A continuations file as `blsp continue` writes it (random answers), its clips beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(rows):
        seconds = float(generator.uniform(0.3, 1.5))
        write_wav(folder / f"{number}.wav", speech_like(seconds, seed=number))
        ids = generator.integers(3, 300, size=generator.integers(1, 8)).tolist()
        lines.append(
            {
                "id": f"clip-{number}",
                "audio": f"{number}.wav",
                "text": " ".join(generator.choice(WORDS, size=2)),
                "behaviour": "continue",
                "instruction": INSTRUCTION,
                "order": ["speech-first", "instruction-first"][number % 3 == 0],
                "continuation": "…",
                "continuation_ids": ids,
                "finish": ["stop", "length"][number % 4 == 0],
            }
        )
    path = folder / "continued.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if top_k:
        write_teacher(path, lines, top_k, generator)
    return path


def write_teacher(
    path: Path, lines: list[dict], top_k: int, generator: np.random.Generator, temperature: float = 1.0
) -> None:
    """Random top-k log-probabilities beside a continuations file."""
    folder = topk_folder(path)
    folder.mkdir(exist_ok=True)
    steps = [len(line["continuation_ids"]) + (line["finish"] == "stop") for line in lines]
    index = np.stack([np.cumsum([0, *steps[:-1]]), steps], axis=1)
    np.save(folder / "index.npy", index)
    logits = torch.from_numpy(generator.standard_normal((sum(steps), 300)) * 3)
    logp, ids = torch.log_softmax(logits, -1).topk(top_k, -1)
    ids.numpy().astype("<u4").tofile(folder / "ids.u32")
    logp.numpy().astype("<f2").tofile(folder / "logp.f16")
    meta = {"k": top_k, "temperature": temperature, "rows": len(lines), "steps": sum(steps)}
    (folder / "meta.json").write_text(json.dumps(meta))
