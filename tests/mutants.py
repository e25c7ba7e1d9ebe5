"""Mutation check: one defect at a time in a copy of the source, and the test that notices it.

In:  the table MUTANTS: a file, the text to replace, the defect, and the tests that must notice.
Out: one line a mutant (killed by TEST, or SURVIVED) and, with --table, a Markdown table.
Try: python tests/mutants.py --only "conv: kernel"        (all of them: about half an hour on two cores)
Flow: beside the tests; tests/test_mutants.py checks that every text to replace is still there, exactly once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "benchmarks", "recipes", "examples", "models", "docs", "requirements", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A defect: `old` becomes `new` in `file` (under src/blsp); `tests` are the paths or node ids to run."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def text(self, root: Path = ROOT) -> str:
        """The file with the defect in it; raises ValueError unless `old` stands there exactly once."""
        source = (root / "src" / "blsp" / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {self.file}")
        return source.replace(self.old, self.new)


MUTANTS = (
    Mutant(
        "conv: kernel 3 instead of 5",
        "model/adapter_parts.py",
        "kernel_size=5, stride=stride, padding=2",
        "kernel_size=3, stride=stride, padding=1",
        "tests/laws/test_law_12_paper_adapter.py",
    ),
    Mutant(
        "conv: ReLU instead of GLU",
        "model/adapter_parts.py",
        "nn.functional.glu(conv(hidden), dim=1)",
        "nn.functional.relu(conv(hidden).chunk(2, dim=1)[0])",
        "tests/laws/test_law_12_paper_adapter.py",
    ),
    Mutant(
        "conv: no residual around the bottleneck",
        "model/adapter.py",
        "hidden = self.norm(hidden + self.up(nn.functional.gelu(self.down(hidden))))",
        "hidden = self.norm(self.up(nn.functional.gelu(self.down(hidden))))",
        "tests/laws/test_law_12_paper_adapter.py",
    ),
    Mutant(
        "conv: padding is not zeroed between convolutions",
        "model/adapter_parts.py",
        "hidden = hidden * valid_mask(lengths, hidden.shape[2])[:, None, :]",
        "hidden = hidden * 1",
        "tests/laws/test_law_03_batching.py",
    ),
    Mutant(
        "conv: first gain is 1",
        "model/adapter.py",
        'nn.init.constant_(self.norm.weight, embedding_std)\n\n    def start_around(self, mean: Tensor) -> None:\n        """Set the first bias: the mean',
        'nn.init.constant_(self.norm.weight, 1.0)\n\n    def start_around(self, mean: Tensor) -> None:\n        """Set the first bias: the mean',
        "tests/model/test_adapter.py tests/laws/test_law_12_paper_adapter.py",
    ),
    Mutant(
        "grounded: expected embeddings are not renormalised",
        "model/grounded.py",
        "posterior = tokens[:, rows].masked_fill(~likely[:, rows], -math.inf).softmax(dim=-1)",
        "posterior = tokens[:, rows].masked_fill(~likely[:, rows], -math.inf).exp()",
        "tests/model/test_grounded.py tests/laws/test_law_10_transcript_as_speech.py",
    ),
    Mutant(
        "grounded: runs are not merged",
        "model/grounded.py",
        "changed[:, 1:] = (best[:, 1:] != best[:, :-1]) | ~spoken[:, :-1]",
        "pass",
        "tests/model/test_grounded.py tests/laws/test_law_06_places.py",
    ),
    Mutant(
        "grounded: a clip of blanks has no vector",
        "model/grounded.py",
        "spoken = spoken | _least_blank(log_probs, inside) & ~speech[:, None]",
        "pass",
        "tests/laws/test_law_06_places.py tests/model/test_grounded.py",
    ),
    Mutant(
        "grounded: frames attend to the padding",
        "model/grounded.py",
        "attn_mask=mask[:, None, None, :]",
        "attn_mask=None",
        "tests/laws/test_law_03_batching.py",
    ),
    Mutant(
        "Whisper: no mask over the padding",
        "model/speech_encoder.py",
        "hidden = layer(hidden, attention_mask)",
        "hidden = layer(hidden, None)",
        "tests/laws/test_law_03_batching.py tests/model/test_speech_encoder.py",
    ),
    Mutant(
        "Whisper: padding is not zeroed after the first convolution",
        "model/speech_encoder.py",
        "nn.functional.gelu(tower.conv1(features * mel_mask)) * mel_mask",
        "nn.functional.gelu(tower.conv1(features * mel_mask))",
        "tests/laws/test_law_03_batching.py tests/model/test_speech_encoder.py",
    ),
    Mutant(
        "Whisper: no positions",
        "model/speech_encoder.py",
        "hidden = hidden + tower.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))",
        "pass",
        "tests/model/test_speech_encoder.py",
    ),
    Mutant(
        "prefix: positions start again after it",
        "llm/prefix.py",
        "((len(prefix) if prefix else 0) + offsets)",
        "(0 + offsets)",
        "tests/laws/test_law_08_reuse.py tests/laws/test_law_08_training.py",
    ),
    Mutant(
        "prefix: a cut keeps one token too many",
        "llm/prefix.py",
        "(keys[:, :, :length], values[:, :, :length]) for keys",
        "(keys[:, :, : length + 1], values[:, :, : length + 1]) for keys",
        "tests/inference/test_conversation.py",
    ),
    Mutant(
        "KL: the wrong direction",
        "llm/language_model.py",
        "return (teacher.exp() * (teacher - student)).sum(dim=-1)",
        "return (student.exp() * (student - teacher)).sum(dim=-1)",
        "tests/laws/test_law_09_divergence.py tests/training/test_losses.py",
    ),
    Mutant(
        "LLM: soft-capped logits are not capped",
        "llm/language_model.py",
        "logits = cap * torch.tanh(logits / cap)",
        "logits = logits",
        "tests/laws/test_law_01_text.py",
    ),
    Mutant(
        "kl: the tail bucket is left out",
        "training/losses.py",
        "return (tokens + bucket).sum()",
        "return tokens.sum()",
        "tests/laws/test_law_09_divergence.py tests/training/test_losses.py",
    ),
    Mutant(
        "kl: the student's temperature is 1",
        "training/losses.py",
        "for logits in (teacher_logits, student_logits))",
        "if logits is teacher_logits else at_least_float32(logits) for logits in (teacher_logits, student_logits))",
        "tests/laws/test_law_09_divergence.py tests/training/test_losses.py",
    ),
    Mutant(
        "ctc: a repeated token needs no blank",
        "training/losses.py",
        "skip[:, 3::2] = (labels[:, 3::2] != labels[:, 1:-2:2]) | (not repeats)",
        "skip[:, 3::2] = True",
        "tests/training/test_losses.py",
    ),
    Mutant(
        "step: T^2 left out of kl",
        "training/step.py",
        "scale = batch.objective.temperature**2",
        "scale = 1.0",
        "tests/training/test_step.py",
    ),
    Mutant(
        "step: ctc-weight ignored",
        "training/run.py",
        "terms[further] = weight",
        "terms[further] = 1.0",
        "tests/training/test_loop.py",
    ),
    Mutant(
        "step: labels off by one",
        "training/step.py",
        "torch.arange(row * width + length - len(example.response), row * width + length)",
        "torch.arange(row * width + length - len(example.response) - 1, row * width + length - 1)",
        "tests/laws/test_law_08_training.py tests/training/test_step.py",
    ),
    Mutant(
        "step: another row's clip is heard",
        "training/step.py",
        "return [vectors[:count] for vectors, count in zip(audio.vectors, counts, strict=True)]",
        "return [vectors[:count] for vectors, count in zip(audio.vectors.flip(0), counts[::-1], strict=True)]",
        "tests/laws/test_law_08_training.py tests/training/test_step.py",
    ),
    Mutant(
        "loop: gradients are not clipped",
        "training/loop.py",
        "torch.nn.utils.clip_grad_norm_(run.parameters, run.settings.clip)",
        "torch.nn.utils.clip_grad_norm_(run.parameters, float('inf'))",
        "tests/training/test_loop.py",
    ),
    Mutant(
        "loop: the seed of dropout is the same in every step",
        "training/loop.py",
        "hash((run.settings.seed, number, run.runtime.rank))",
        "hash((run.settings.seed, 0, run.runtime.rank))",
        "tests/training tests/laws/test_law_04_resume.py",
    ),
    Mutant(
        "optimiser: norms and biases decay",
        "training/optimiser.py",
        '{"params": vectors, "weight_decay": 0.0}',
        '{"params": vectors, "weight_decay": run.settings.weight_decay}',
        "tests/training/test_loop.py",
    ),
    Mutant(
        "optimiser: no warm-up",
        "training/optimiser.py",
        "return settings.lr * step / warmup",
        "return settings.lr",
        "tests/training/test_loop.py",
    ),
    Mutant(
        "optimiser: the average is the last weights",
        "training/optimiser.py",
        "state.average[name] += (weight.detach() - state.average[name]) / count",
        "state.average[name] = weight.detach().clone()",
        "tests/training/test_loop.py",
    ),
    Mutant(
        "optimiser: momenta are lost on resume",
        "training/optimiser.py",
        "state.optimiser.load_state_dict(stored.optimiser)",
        "pass",
        "tests/laws/test_law_04_resume.py",
    ),
    Mutant(
        "augmentation: mask hides nothing",
        "training/augmentation.py",
        "masked[start : start + generator.integers(1, MASK_FRAMES + 1)] = 0",
        "generator.integers(1, MASK_FRAMES + 1)",
        "tests/training/test_augmentation.py",
    ),
    Mutant(
        "augmentation: speed is ignored",
        "training/augmentation.py",
        "audio = soxr.resample(audio, SAMPLE_RATE * speed, SAMPLE_RATE)",
        "pass",
        "tests/training/test_augmentation.py",
    ),
    Mutant(
        "probes: exchanged clips are the own ones",
        "training/probes.py",
        "(examples[other] for other in others)",
        "examples",
        "tests/training/test_probes.py",
    ),
    Mutant(
        "training: every rank learns all rows",
        "training/batches.py",
        "numbers[run.runtime.rank :: run.runtime.world]",
        "numbers[:]",
        "tests/laws/test_law_05_invariance.py",
    ),
    Mutant(
        "training: frozen parts in training mode",
        "model/loading.py",
        "return module.eval().requires_grad_(False)",
        "return module.train().requires_grad_(False)",
        "tests/laws/test_law_02_gradients.py",
    ),
    Mutant(
        "examples: a cut continuation teaches an end",
        "training/examples.py",
        'if row.extra.get("finish") == "stop" else list(ids)',
        "",
        "tests/training/test_examples.py",
    ),
    Mutant(
        "continuation: prompts of exactly 192 tokens are kept",
        "continuation/requests.py",
        "if tokens >= policy.max_prompt_tokens:",
        "if tokens > policy.max_prompt_tokens:",
        "tests/continuation/test_requests.py",
    ),
    Mutant(
        "evaluation: 90 % intervals called 95 %",
        "evaluation/bootstrap.py",
        "CONFIDENCE = 0.95",
        "CONFIDENCE = 0.90",
        "tests/evaluation/test_scoring.py",
    ),
    Mutant(
        "evaluation: the gap's two draws are not paired",
        "evaluation/bootstrap.py",
        "pairs = zip(figure.resampled(rows), other.resampled(rows), strict=True)",
        "pairs = zip(figure.resampled(rows), other.resampled(rows[::-1]), strict=True)",
        "tests/evaluation/test_scoring.py",
    ),
    Mutant(
        "inference: 64 zero-shot tokens instead of 128",
        "inference/listener.py",
        "ZERO_SHOT_TOKENS = 128",
        "ZERO_SHOT_TOKENS = 64",
        "tests/inference/test_listener.py",
    ),
    Mutant(
        "data: opposite phase is mixed to silence",
        "data/audio.py",
        "return int(energies.argmax()) if mixed < MIX_SHARE * energies.max() else None",
        "return None",
        "tests/data/test_containers.py",
    ),
    Mutant(
        "data: a chained Ogg file ends with its first stream",
        "data/containers.py",
        "return begun > 1",
        "return False",
        "tests/data/test_containers.py",
    ),
    Mutant(
        "data: an mp3's length is libsndfile's guess",
        "data/containers.py",
        'info[7] & 3 != 3:\n        return "mp3"',
        "info[7] & 3 != 3:\n        return None",
        "tests/data/test_containers.py",
    ),
    Mutant(
        "data: a truncated wav is read",
        "data/containers.py",
        "return 0 if unknown or missing <= WAV_HEADER else missing",
        "return 0",
        "tests/data/test_audio.py tests/data/test_containers.py",
    ),
    Mutant(
        "data: the cut of a clip starts one sample late",
        "data/audio.py",
        "begin = round(start * SAMPLE_RATE)",
        "begin = round(start * SAMPLE_RATE) + 1",
        "tests/data/test_audio.py",
    ),
    Mutant(
        "step: T^2 also scales the answer to silence",
        "training/step.py",
        "total = total + _cross_entropy(batch, silent, hidden[where])",
        "total = total + batch.objective.temperature**2 * _cross_entropy(batch, silent, hidden[where])",
        "tests/training/test_step.py",
    ),
    Mutant(
        "dataset: copies of a recording are groups of their own",
        "training/dataset.py",
        'id.split("/augmented-")[0]',
        "id",
        "tests/laws/test_law_13_groups.py",
    ),
    Mutant(
        "dataset: equal texts are groups of their own",
        "training/dataset.py",
        'text_hash(f"text {words}") if words else recording',
        "recording",
        "tests/laws/test_law_13_groups.py",
    ),
    Mutant(
        "model: the loss is a mean in each accumulated pass",
        "model/modeling_blsp.py",
        "num_items_in_batch=num_items_in_batch",
        "num_items_in_batch=None",
        "tests/laws/test_law_14_trainer.py",
    ),
)


def killer(mutant: Mutant, folder: Path) -> str:
    """Run the mutant's tests in a copy of the tree; the first test that fails, or an empty string."""
    copy = folder / re.sub(r"\W+", "-", mutant.name)
    copy.mkdir()
    for name in COPIED:
        if name == "src":
            shutil.copytree(ROOT / name, copy / name)
        else:
            (copy / name).symlink_to(ROOT / name)
    (copy / "src" / "blsp" / mutant.file).write_text(mutant.text(), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1800)
    shutil.rmtree(copy)
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"exit code {done.returncode}"


def main() -> None:
    """Run the chosen mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    parser.add_argument("--table", type=Path, help="write a Markdown table to this file")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    rows, survivors = ["| mutant | killed by |", "|---|---|"], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        killers = pool.map(lambda mutant: killer(mutant, Path(folder)), chosen)
        for mutant, test in zip(chosen, killers, strict=True):
            survivors += not test
            print(f"{mutant.name}: {f'killed by {test}' if test else 'SURVIVED'}", flush=True)
            rows.append(f"| {mutant.name} | {f'`{test}`' if test else '**survived**'} |")
    if options.table:
        options.table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
