"""BLSP on one page: a frozen Whisper, a frozen LLM and the paper's adapter between them, in plain PyTorch.

    python examples/read_me_first.py          # about three minutes on a laptop's CPU

Step 1: the LLM reads transcripts and continues them. Step 2: the adapter is trained until the LLM, given the speech,
writes the same. `blsp continue`, `blsp encode` and `blsp train` do this at full size. A minute is not enough for random
weights, as this page measures; then it measures an adapter that was trained for hours.

Shapes: T encoder frames (50 per second), S audio vectors (6.25 per second), N tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import blsp
from blsp.data.audio import load_audio
from blsp.distributed import find_runtime
from blsp.llm.prompt import prompt_template, transcript_ids
from blsp.model.checkpoint import load_blsp, new_blsp
from blsp.model.speech_encoder import encode_speech, mel_features
from blsp.weights.digest import find_weights

SPEECH = Path(__file__).parent / "speech"
CONTINUE = "Continue the following text in a coherent and engaging style with less than 40 words."


class Clip(NamedTuple):
    """One recording: what was said, and what the LLM wrote when it read that."""

    states: Tensor  # (T, E) of the frozen encoder
    transcript: Tensor  # (N,) token ids
    continuation: Tensor  # (N,) token ids


class Parts:
    """The three parts: encoder and LLM are frozen, the adapter is what learns."""

    def __init__(self, model: blsp.BlspForConditionalGeneration, processor: blsp.BlspProcessor) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.encoder, self.llm = model.model.audio_tower, model.model.language_model
        self.adapter = model.model.multi_modal_projector
        self.table = model.get_input_embeddings().weight  # (V, D)
        self.prompt = prompt_template(self.tokenizer, CONTINUE, "instruction-first")  # ids around the speech

    def encode(self, audio: Path) -> Tensor:
        """Encoder states (T, E): computed once, because the encoder never changes."""
        mel, mask = mel_features(self.processor.feature_extractor, [load_audio(audio)])
        with torch.no_grad():
            return encode_speech(self.encoder, mel, mask)[0][0]

    def listen(self, states: Tensor) -> Tensor:
        """Audio vectors (S, D): what stands in the prompt in place of the transcript's embeddings."""
        output = self.adapter(states[None], torch.tensor([len(states)]), self.model.model.readout_table())
        return output.vectors[0, output.valid[0]]

    def log_probs(self, spoken: Tensor, answer: Tensor) -> Tensor:
        """Log-probabilities (N, V) of each token of `answer`, after the prompt with `spoken` (S, D) in it."""
        before, after = (self.table[list(ids)] for ids in (self.prompt.prefix_ids, self.prompt.suffix_ids))
        row = torch.cat([before, spoken, after, self.table[answer[:-1]]])  # (N, D)
        hidden = self.llm(inputs_embeds=row[None]).last_hidden_state[0, -len(answer) :]  # (N, D)
        return self.model.compute_logits(hidden).log_softmax(dim=-1)

    @torch.no_grad()
    def write(self, spoken: Tensor) -> Tensor:
        """The most likely 16 tokens (N,), one after another."""
        answer = torch.zeros(0, dtype=torch.long)
        for _ in range(16):
            answer = F.pad(answer, (0, 1))  # room for the next token
            answer[-1] = self.log_probs(spoken, answer)[-1].argmax()
        return answer


def read_clips(parts: Parts, manifest: str, count: int) -> list[Clip]:
    """Step 1: encode each recording, and let the LLM continue its transcript."""
    clips = []
    for line in (SPEECH / manifest).read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        transcript = torch.tensor(transcript_ids(parts.tokenizer, row["text"]))
        states, continuation = parts.encode(SPEECH / row["audio"]), parts.write(parts.table[transcript])
        clips.append(Clip(states, transcript, continuation))
    return clips


def train(parts: Parts, clips: list[Clip], steps: int, batch: int = 4) -> None:
    """Step 2: cross-entropy on the continuation, given the speech. Gradients reach the adapter alone."""
    parts.adapter.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(parts.adapter.parameters(), lr=3e-4, weight_decay=0.05)
    for step in range(1, steps + 1):
        total, count = torch.zeros(()), 0
        for clip in random.Random(step).sample(clips, min(batch, len(clips))):
            log_probs = parts.log_probs(parts.listen(clip.states), clip.continuation)  # (N, V)
            total = total + F.nll_loss(log_probs, clip.continuation, reduction="sum")
            count += len(clip.continuation)
        optimiser.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parts.adapter.parameters(), 1.0)
        optimiser.step()
        print(f"  step {step}: {float(total) / count:.2f} nats per token", end="\r")
    parts.adapter.requires_grad_(False).eval()


@torch.no_grad()
def divergence(parts: Parts, clips: list[Clip], shift: int = 0) -> float:
    """Mean KL(text || speech) in nats per token; `shift` 1 gives each clip the recording of its neighbour."""
    total, count = 0.0, 0
    for clip, states in zip(clips, [c.states for c in clips[shift:] + clips[:shift]], strict=True):
        text = parts.log_probs(parts.table[clip.transcript], clip.continuation)
        speech = parts.log_probs(parts.listen(states), clip.continuation)
        total += float(F.kl_div(speech, text, reduction="sum", log_target=True))
        count += len(clip.continuation)
    return total / count


def report(name: str, parts: Parts, clips: list[Clip]) -> None:
    """Own against exchanged divergence, a verdict, and an answer to a spoken question."""
    own, exchanged = divergence(parts, clips), divergence(parts, clips, shift=1)
    verdict = "it listens" if own < 0.6 * exchanged else "it does not listen yet"
    print(f"{name}: divergence {own:.3f}, with exchanged recordings {exchanged:.3f}: {verdict}")
    answer = blsp.Listener(parts.model, parts.processor).answer(SPEECH / "questions" / "capital-of-canada.opus")
    print(f"  asked for the capital of Canada, it answers: {answer!r}")


def main() -> None:
    """Build, continue, train, measure, answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=24, help="recordings to learn from")
    parser.add_argument("--steps", type=int, default=40, help="training steps of 4 clips")
    options = parser.parse_args()
    runtime = find_runtime("cpu", "float32")
    frozen = map(find_weights, ("embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct"))
    fresh = Parts(*new_blsp(*frozen, runtime))
    clips = read_clips(fresh, "train.jsonl", options.clips)
    held_out = read_clips(fresh, "heldout.jsonl", max(2, options.clips // 3))
    print(*map(fresh.tokenizer.decode, clips[0][1:]), sep=" -> ")
    train(fresh, clips, options.steps)
    report("the paper's adapter after these steps", fresh, held_out)
    report("the shipped adapter after hours", Parts(*load_blsp("blsp-tiny", runtime)), held_out)


if __name__ == "__main__":
    main()
