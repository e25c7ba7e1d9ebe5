"""Settings of the commands that make an adapter: prepare, continue, encode, train.

In:  the command line (cli.py, configuration_file.py). Out: one frozen object for one function.
Try: `blsp train --help`
Flow: cli.py → **settings** → data/corpora.py, continuation/writer.py, features/encode.py, training/loop.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress

from blsp.settings.shared import Device, Dtype, Normalise, SettingsError, above_zero, can_sample

Corpus = Literal[
    "librispeech", "gigaspeech", "common-voice", "covost2", "must-c", "tedlium3", "fleurs",
    "fluent-speech-commands", "slurp", "snips", "folder", "kaldi", "lhotse", "hf", "no-speech",
]  # fmt: skip


@dataclass(frozen=True)
class PrepareSettings:
    r"""Turn a corpus on disk into a manifest: one JSON line per utterance, with its audio and its text.

    Nothing is downloaded, copied or re-encoded: long recordings stay whole and rows name `start` and
    `duration`. Non-speech tags and empty transcripts are dropped and counted in OUT.skipped.jsonl. A second
    run goes on where the first one stopped. `no-speech` makes clips of silence, noise and babble instead.

        $ blsp prepare librispeech --root /data/LibriSpeech --split train-clean-100 --out librispeech.jsonl
        $ blsp prepare folder --root my_recordings/ --out mine.jsonl      # a.wav beside a.txt
        $ blsp prepare covost2 --root /data/cv4/en --language en --target-language de --split dev \
              --out dev.jsonl
        $ blsp prepare no-speech --root librispeech.jsonl --limit 500 --out no_speech.jsonl
    """

    corpus: Positional[Corpus]
    """whose layout to read"""
    out: Path
    """the manifest to write"""
    root: str = ""
    """the corpus' folder (hf: a dataset's folder or id; no-speech: a manifest to mix babble from, or
    nothing)"""
    split: str = "train"
    """the part to read, named as the corpus names it; several: `train-clean-100,train-clean-360`"""
    language: str | None = None
    """the language spoken, ISO 639-1, where the corpus has several"""
    target_language: str | None = None
    """for speech translation: the language of the reference, ISO 639-1"""
    text_field: str | None = None
    """hf: the column with the transcript (without: text, sentence, transcription or transcript)"""
    reference_field: str | None = None
    """hf: the column with the translation, label or answer"""
    subset: str | None = None
    """hf: the dataset's configuration"""
    check_audio: bool = False
    """decode every recording; what cannot be decoded or is cut short goes to OUT.skipped.jsonl"""
    limit: int | None = None
    """stop after so many rows (no-speech: how many clips to make; 300 without)"""
    seed: int = 0
    """no-speech: which clips are made"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        if not self.root and self.corpus != "no-speech":
            raise SettingsError(f"--root: name the folder in which {self.corpus} lies")
        above_zero(self, "limit")


@dataclass(frozen=True)
class ContinueSettings:
    r"""Step 1: let the LLM continue every transcript, as it shall when it hears the speech.

    Writes the manifest's rows with `continuation`, `continuation_ids` and how they came about, and
    OUT.meta.json; with --top-k also the folder OUT.topk. Rows without words go to OUT.skipped.jsonl, with the
    reason. Equal prompts are generated once. Killed at any moment, the same command goes on and ends with the
    same bytes.

        $ blsp continue --manifest clips.jsonl --out continued.jsonl --llm embedded:smollm2-135m-instruct \
              --top-k 32
        $ blsp continue --manifest clips.jsonl --out continued.jsonl --llm my-model \
              --engine-url http://localhost:8000/v1
        $ torchrun --nproc-per-node 8 -m blsp continue --manifest 'shards/*.jsonl' \
              --out continued.jsonl --llm MODEL
    """

    manifest: str
    """the transcripts: a manifest or a glob of manifests"""
    out: Path
    """the continuations to write"""
    llm: str
    """the LLM that shall learn to listen: folder, hub id, embedded:NAME (with --engine-url: its tokenizer)"""
    behaviours: str = "continue"
    """what to ask: `continue` (paper), `repeat`, `answer`, `keywords`, `translate:LANGUAGE`;
    `continue,repeat` asks both of every row, `continue:0.8,repeat:0.2` one of them, drawn with these
    weights"""
    orders: str = "instruction-first"
    """where the speech stands: `instruction-first` (paper), `speech-first`, or a mixture, as above"""
    instruction: str | None = None
    """your own words instead of the behaviour's (one behaviour only; a row's own still wins)"""
    normalise: Normalise = "none"
    """take transcripts as given, or through Whisper's English normaliser (paper)"""
    max_new_tokens: int = 64
    """tokens a continuation may have (paper: 64)"""
    max_prompt_tokens: int = 192
    """drop and count rows whose prompt is this long or longer (paper: 192)"""
    temperature: float = 0.0
    """0 takes the likeliest token each time (paper)"""
    top_p: float = 1.0
    """when sampling: from the likeliest tokens that together have this probability"""
    seed: int = 0
    """draws behaviours, orders and samples; each row's draw depends on its id alone"""
    top_k: int = 0
    """also store so many teacher log-probabilities a token, for a `kl` that costs what `ce` costs"""
    top_k_temperature: float = 1.0
    """the temperature they are stored at; training refuses another"""
    score_only: bool = False
    """write no text: add --top-k to the rows that OUT has, with the local LLM"""
    batch_size: int = 64
    """prompts generated side by side"""
    engine_url: str | None = None
    """an OpenAI-compatible server that writes instead, e.g. http://localhost:8000/v1"""
    engine_model: str | None = None
    """what that server calls the LLM, where it is not called as in --llm"""
    engine_body: str = "{}"
    """JSON merged into each request, e.g. '{"return_token_ids": true}' for a vLLM server"""
    api_key_env: str = "OPENAI_API_KEY"
    """the environment variable that holds that server's key"""
    concurrency: int = 64
    """requests kept in flight at that server"""
    timeout: float = 120.0
    """seconds to wait for one of its answers; it is asked again, ever more slowly"""
    retries: int = 8
    """times to ask again before giving up"""
    limit: int | None = None
    """read only so many rows of the manifest"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the frozen weights' type; auto: bfloat16 where the device is good at it, else float32"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(
            self,
            "max_new_tokens",
            "max_prompt_tokens",
            "batch_size",
            "concurrency",
            "timeout",
            "top_k_temperature",
            "limit",
        )
        can_sample(self.temperature, self.top_p)
        if self.top_k < 0 or self.retries < 0:
            raise SettingsError("--top-k and --retries must be 0 or more")
        if self.engine_url and self.top_k:
            raise SettingsError(
                "--top-k needs the local LLM: write with --engine-url first, then add it with --score-only"
            )
        if self.score_only and not self.top_k:
            raise SettingsError("--score-only adds teacher log-probabilities: say how many with --top-k")


@dataclass(frozen=True)
class EncodeSettings:
    """Run the frozen speech encoder over a manifest once and keep what it puts out.

    Training then never pays for the encoder. The cache is keyed by audio content and encoder: manifests that
    share clips share the cache. Torn or stale entries are recognised and made again. It takes
    38 KB a second of speech for Whisper tiny.

        $ blsp encode --manifest continued.jsonl --audio-model embedded:whisper-tiny.en --cache features/
    """

    manifest: str
    """the clips: a manifest, a continuations file, or a glob of them"""
    audio_model: str
    """the Whisper whose encoder hears: a folder, a hub id or embedded:NAME"""
    cache: Path
    """the folder that keeps the features"""
    batch_seconds: float = 120.0
    """seconds of speech encoded side by side"""
    pad_to_30s: bool = False
    """pad every clip to 30 s, as Whisper was trained (paper); else: true lengths and a mask, in less time"""
    limit: int | None = None
    """read only so many rows"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the encoder's type; auto: bfloat16 where the device is good at it, else float32"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(self, "batch_seconds", "limit")


@dataclass(frozen=True)
class TrainSettings:
    r"""Step 2: train the adapter until the LLM, hearing, behaves as it did when reading.

    Encoder and LLM stay frozen. `ctc` grounds a `grounded` adapter on a plain manifest, without running the
    LLM; `ce` is the paper's loss on the continuations; `kl` matches the whole next-token distribution of the
    text route. With --config, a list `stages:` runs several one after another, each inheriting the top level,
    each starting from the one before. The same command resumes a killed run, to the bit; SIGTERM saves and
    leaves.

        $ blsp train --data continued.jsonl --out runs/paper --audio-model openai/whisper-small --llm MODEL \
              --adapter conv --loss ce --cache features/
        $ blsp train --config recipes/blsp-tiny/train.yaml
        $ torchrun --nproc-per-node 8 -m blsp train --config recipe.yaml
    """

    data: tuple[str, ...]
    """continuations (for ctc: manifests), files or globs"""
    out: Path
    """the run folder: settings, metrics, curves, checkpoints, adapter"""
    audio_model: str
    """the Whisper whose encoder hears: a folder, a hub id or embedded:NAME"""
    llm: str
    """the LLM that shall listen; it must be the one that wrote the continuations"""
    adapter: Literal["conv", "stack", "grounded"]
    """conv (paper), stack (frames stacked into an MLP), grounded (CTC onto the LLM's own tokens)"""
    loss: Literal["ctc", "ce", "kl"]
    """ctc (grounding), ce (paper), kl (teacher's distribution)"""
    data_weights: tuple[float, ...] = ()
    """one weight a data file: 0.5 uses half of it an epoch, 2 all of it twice"""
    adapter_options: tuple[str, ...] = ()
    """NAME=VALUE of the chosen adapter, see docs/training.md"""
    readout: Literal["data", "full"] = "data"
    """tokens a fresh grounded adapter can read out: those of the transcripts, or the LLM's whole
    vocabulary"""
    init_from: tuple[str, ...] = ()
    """start from this adapter's weights instead of fresh ones; from the mean of several"""
    cache: Path | None = None
    """features written by `blsp encode`; without it speech is encoded on the fly"""
    steps: int | None = None
    """optimiser steps; left out: as many as --epochs take"""
    epochs: float = 1.0
    """times through the data (paper: 1)"""
    batch_size: int = 768
    """samples an optimiser step learns from, over all processes (paper: 768)"""
    batch_tokens: int = 4096
    """positions (speech and text) that one pass through the LLM may hold: decides memory, not what is learnt"""
    lr: float = 5e-5
    """highest learning rate (paper: 5e-5; grounding likes 1e-3)"""
    weight_decay: float = 0.05
    """AdamW's weight decay (paper: 0.05)"""
    warmup_steps: int = 1000
    """steps to reach it (paper: 1000), a tenth of the run at most"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: down to zero along a cosine, or level"""
    clip: float = 1.0
    """longest gradient (paper: 1.0)"""
    temperature: float = 1.0
    """for kl: of teacher and student (BLSP-Emo: 2)"""
    teacher: Literal["auto", "online", "stored"] = "auto"
    """for kl: run the text route beside the speech route, or read the stored --top-k; auto: stored if
    there"""
    ctc_weight: float = 0.3
    """how much of the grounding loss a grounded adapter keeps under ce and kl"""
    negatives: int = 0
    """for ctc: read-out tokens drawn a batch to stand for all that its transcripts do not hold; 0: all of
    them"""
    augment: tuple[Literal["speed", "volume", "noise", "mask"], ...] = ()
    """vary the speech (without --cache), or hide short spans of its features: mask (with --cache)"""
    no_speech: float = 0.0
    """share of additional samples of silence and noise that teach the set answer"""
    max_seconds: float = 30.0
    """leave longer clips out, and count them"""
    held_out: int = 64
    """utterances kept back from training for the divergence probes, a tenth of all at most"""
    seed: int = 0
    """fixes fresh weights, data order and noise: the same seed gives the same curve"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    probe_every: int = 200
    """steps between divergence probes on training and held-out clips"""
    save_every: int = 200
    """steps between checkpoints"""
    save_minutes: float = 1.0
    """and no longer than so many minutes between them: what a killed run has to do again"""
    keep: int = 2
    """checkpoints kept"""
    average_last: int = 0
    """the final adapter is the mean of the weights after each of the last so many steps; 0: the last ones"""
    resume_inexact: bool = False
    """go on from a checkpoint of other versions, threads or processes: close, not equal to the bit"""
    activation_checkpointing: bool = False
    """compute activations twice to hold fewer of them"""
    shard_llm: bool = False
    """spread the LLM's layers over the processes (FSDP2): for one that is too large for each"""
    pad_to_30s: bool = False
    """pad every clip to 30 s before the encoder (paper)"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the frozen weights' type; the adapter trains in float32 at least"""
    config: Path | None = None
    """a YAML file with these same flags, `stages:` included"""
    stages: Annotated[tuple[TrainSettings, ...], Suppress] = ()
    """the resolved stages of a YAML file, in order"""

    def __post_init__(self) -> None:
        above_zero(self, "epochs", "batch_size", "batch_tokens", "lr", "clip", "temperature", "max_seconds")
        above_zero(self, "log_every", "probe_every", "save_every", "save_minutes", "keep", "steps")
        if not self.data:
            raise SettingsError("--data: name at least one file")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise SettingsError(
                f"--data-weights: {len(self.data_weights)} weights for {len(self.data)} data files"
            )
        if self.loss == "ctc" and self.adapter != "grounded":
            raise SettingsError(
                f"--loss ctc grounds the `grounded` adapter; {self.adapter!r} has no read-out to ground"
            )
        if self.cache and set(self.augment) - {"mask"}:
            raise SettingsError(
                "--augment speed, volume and noise change the speech before the encoder: leave out --cache, or them"
            )
        if not self.cache and "mask" in self.augment:
            raise SettingsError("--augment mask hides cached features: name the --cache, or leave it out")
