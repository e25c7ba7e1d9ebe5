"""Settings of the commands that make an adapter: prepare, continue, encode, align, train.

In:  the command line, or a YAML file (cli.py). Out: one frozen object for one function.
Try: `blsp train --help`
Flow: cli.py → **pipeline.py** → data/prepare.py, continuation/writer.py, features/{encode,align}.py, training/loop.py

`GROUPS` names the groups that `--help` shows, with their fields in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional

from blsp.settings.shared import (
    DEFAULT_MODEL,
    AudioModel,
    Choices,
    ConfigFile,
    Device,
    Dtype,
    Limit,
    Llm,
    Normalise,
    NoThinking,
    Paper,
    SettingsError,
    Temperature,
    TemplateArg,
    TopP,
    above_zero,
    can_sample,
    read_template_args,
)

Corpus = Annotated[str, Choices("blsp.data.prepare", "READERS")]
Adapter = Annotated[str, Choices("blsp.model.adapter", "ADAPTERS")]
Loss = Annotated[str, Choices("blsp.training.step", "LOSSES")]


@dataclass(frozen=True)
class PrepareSettings:
    r"""Turn a corpus on disk into a manifest: one JSON line per utterance, with its audio and its text.

    Nothing is downloaded, copied or encoded again: recordings stay whole, or in their tar and Parquet files. What
    cannot be used is counted in OUT.skipped.jsonl. A second run continues. `no-speech` makes clips instead.

        $ blsp prepare librispeech --root /data/LibriSpeech --split train-clean-100 --out librispeech.jsonl
        $ blsp prepare folder --root my_recordings/ --out mine.jsonl      # a.wav beside a.txt
        $ blsp prepare csv --root clips.csv --audio-column path --text-column sentence --out clips.jsonl
        $ blsp prepare covost2 --root cv4/en --language en --target-language de --split dev --out dev.jsonl
        $ blsp prepare no-speech --root librispeech.jsonl --limit 500 --out no_speech.jsonl
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "out root split limit check_audio seed",
        "corpus": "language target_language audio_column text_column reference_column subset",
    }

    corpus: Positional[Corpus]
    """the corpus, whose layout on disk is known"""
    out: Path
    """the manifest to write"""
    root: str = ""
    """its folder or table (shards: or `x-{00..99}.tar`; hf: or a dataset's id; no-speech: a manifest for babble)"""
    split: str = "train"
    """the part to read, named as the corpus names it; several: `train-clean-100,train-clean-360`"""
    language: str | None = None
    """the language spoken, ISO 639-1, where the corpus has several"""
    target_language: str | None = None
    """for speech translation: the language of the reference, ISO 639-1"""
    audio_column: str | None = None
    """tables, hf: the column with the audio (without: audio, audio_filepath, path, file_name, ...)"""
    text_column: str | None = None
    """tables, shards, hf: the column with the transcript (without: text, sentence, transcription, ...)"""
    reference_column: str | None = None
    """tables, hf: the column with the translation, label or answer"""
    subset: str | None = None
    """hf: the configuration of the dataset"""
    check_audio: bool = False
    """decode every recording; those that are damaged, cut short or silent go to OUT.skipped.jsonl"""
    limit: Limit = None
    """stop after this many rows (no-speech: the number of clips to make; without: 300)"""
    seed: int = 0
    """no-speech: decides which clips are made"""
    config: ConfigFile = None

    def __post_init__(self) -> None:
        if not self.root and self.corpus != "no-speech":
            raise SettingsError(f"--root: name the folder in which {self.corpus} lies")
        above_zero(self, "limit")


@dataclass(frozen=True)
class ContinueSettings:
    r"""Step 1: the LLM continues every transcript, as it should later continue the speech.

    Writes the rows of the manifest with `continuation`, `continuation_ids` and how they were made, and
    OUT.meta.json; with --top-k also the folder OUT.topk. Rows without words go to OUT.skipped.jsonl, with the
    reason. Equal prompts are generated once. After a kill the same command continues and ends with the same
    bytes.

        $ blsp continue --manifest clips.jsonl --out continued.jsonl --llm embedded:smollm2-135m-instruct \
              --top-k 32
        $ blsp continue --manifest clips.jsonl --out continued.jsonl --llm my-model \
              --engine-url http://localhost:8000/v1
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "manifest out limit normalise max_prompt_tokens",
        "model": "llm",
        "prompt": "behaviours orders instruction template_arg no_thinking",
        "generation": "max_new_tokens temperature top_p seed",
        "teacher": "top_k top_k_temperature score_only",
        "servers": "engine_url engine_model engine_body api_key_env concurrency",
        "failures": "timeout retries retry_minutes max_failures",
        "compute": "batch_size device dtype",
    }

    manifest: str
    """the transcripts: a manifest or a glob of manifests"""
    out: Path
    """the continuations to write"""
    llm: str
    """the LLM that will learn to listen: folder, hub id, embedded:NAME (with --engine-url: its tokenizer)"""
    behaviours: str = "continue"
    """what to ask: `continue` (paper), `repeat`, `answer`, `keywords`, `translate:LANGUAGE`;
    `continue,repeat` asks both of every row, `continue:0.8,repeat:0.2` one of them, drawn with these
    weights"""
    orders: str = "instruction-first"
    """the position of the speech: `instruction-first` (paper), `speech-first`, or a mixture, as above"""
    instruction: str | None = None
    """your own words instead of the behaviour's (one behaviour only; the instruction of a row comes first)"""
    template_arg: TemplateArg = ()
    no_thinking: NoThinking = False
    normalise: Normalise = "none"
    """take transcripts as given, or through Whisper's English normaliser (paper)"""
    max_new_tokens: int = 64
    """the most tokens of a continuation (paper: 64)"""
    max_prompt_tokens: int = 192
    """leave out and count rows whose prompt has this many tokens or more (paper: 192)"""
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = 0
    """draws behaviours, orders and samples; the draw of a row depends on its id alone"""
    top_k: int = 0
    """also store this many log-probabilities of the teacher per token, for a `kl` as cheap as `ce`"""
    top_k_temperature: float = 1.0
    """the temperature they are stored at; training refuses another"""
    score_only: bool = False
    """write no text: add --top-k to the rows of OUT, with the local LLM"""
    batch_size: int = 64
    """prompts generated together"""
    engine_url: tuple[str, ...] = ()
    """OpenAI-compatible servers that generate instead, e.g. http://localhost:8000/v1; several share the prompts"""
    engine_model: str | None = None
    """those servers' name for the LLM, where it differs from --llm"""
    engine_body: str = "{}"
    """JSON added to each request, e.g. '{"return_token_ids": true}' for a vLLM server"""
    api_key_env: str = "OPENAI_API_KEY"
    """the environment variable that holds the servers' key"""
    concurrency: int = 64
    """requests that are open at each server at a time; eight vLLMs behind one address want 2,048"""
    timeout: float = 120.0
    """seconds to wait for an answer, before the request is repeated"""
    retries: int = 8
    """repetitions of a request that fails while the server is there, with growing pauses; then its row is left out"""
    retry_minutes: float = 30.0
    """minutes without any answer, as while a server restarts, before the job stops"""
    max_failures: float = 0.01
    """stop when more than this share of the prompts, and more than ten, cannot be answered"""
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    paper: Paper = False
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens", "max_prompt_tokens", "batch_size", "concurrency", "timeout")
        above_zero(self, "top_k_temperature", "limit")
        can_sample(self.temperature, self.top_p)
        read_template_args(self.template_arg, self.no_thinking)
        if min(self.top_k, self.retries, self.retry_minutes, self.max_failures) < 0:
            raise SettingsError("--top-k, --retries, --retry-minutes and --max-failures must be 0 or more")
        if self.engine_url and self.top_k:
            raise SettingsError("--top-k needs the local LLM: write with --engine-url, then add it with --score-only")
        if self.score_only and not self.top_k:
            raise SettingsError("--score-only adds log-probabilities of the teacher: give their number with --top-k")


@dataclass(frozen=True)
class EncodeSettings:
    """Run the frozen speech encoder over a manifest once and keep its output.

    Training then never runs the encoder. The cache is keyed by audio content and encoder, so manifests that
    share clips share the cache. Damaged or outdated entries are found and made again. It takes 38 KB per
    second of speech for Whisper tiny.

        $ blsp encode --manifest continued.jsonl --audio-model embedded:whisper-tiny.en --cache features/
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "manifest cache limit",
        "model": "audio_model pad_to_30s",
        "compute": "batch_seconds device dtype",
    }

    manifest: str
    """the clips: a manifest, a continuations file, or a glob of them"""
    audio_model: str
    """the Whisper model whose encoder is used: a folder, a hub id or embedded:NAME"""
    cache: Path
    """the folder for the features"""
    batch_seconds: float = 120.0
    """seconds of speech encoded together"""
    pad_to_30s: bool = False
    """pad every clip to 30 s, as in Whisper's training (paper); else true lengths and a mask, in less time"""
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    """the type of the encoder; auto: bfloat16 where the device is fast at it, else float32"""
    paper: Paper = False
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "batch_seconds", "limit")


@dataclass(frozen=True)
class AlignSettings:
    """Find out when each token of a transcript is spoken, for `blsp train --loss embed`.

    An adapter that reads out spells the true transcript (the best path of its CTC posteriors). The times are kept
    beside the features. A second run does what is missing.

        $ blsp align --manifest train.jsonl --cache features/
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "manifest cache limit",
        "model": "model audio_model llm",
        "compute": "device dtype",
    }

    manifest: str
    """the clips with their transcripts: a manifest, a continuations file, or a glob of them"""
    cache: Path
    """the folder of the features; clips that it lacks are encoded"""
    model: str = DEFAULT_MODEL
    """an adapter that reads out, for the encoder and the LLM that the run will have"""
    audio_model: AudioModel = None
    llm: Llm = None
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "limit")


@dataclass(frozen=True)
class TrainSettings:
    r"""Step 2: train the adapter until the LLM answers speech as it answers the transcript.

    Encoder and LLM stay frozen. Two losses need a plain manifest alone, and not the LLM: `embed` brings a fresh
    `conv` or `stack` adapter to the LLM's embeddings, `ctc` trains the read-out of `grounded`. `ce` is the
    paper's loss on the continuations; `kl` matches the whole next-token distribution of the text route. With
    --config, a list `stages:` runs several stages one after another; each inherits the top level and starts
    from the adapter of the one before. The same command resumes a killed run, to the bit; SIGTERM saves and
    exits.

        $ blsp train --data continued.jsonl --out runs/paper --audio-model openai/whisper-small --llm MODEL \
              --adapter conv --loss ce --cache features/
        $ blsp train --config recipes/blsp-tiny/train.yaml
        $ torchrun --nproc-per-node 8 -m blsp train --config recipe.yaml
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "data out data_weights cache augment no_speech max_seconds held_out",
        "model": "audio_model llm adapter adapter_options readout init_from pad_to_30s template_arg no_thinking",
        "loss": "loss temperature teacher ctc_weight embed_weight filler negatives",
        "optimisation": "steps epochs batch_size lr weight_decay warmup_steps schedule clip average_last seed",
        "logging and checkpoint": "log_every probe_every save_every save_minutes keep resume_inexact",
        "compute and memory": "batch_tokens activation_checkpointing shard_llm device dtype",
    }

    data: tuple[str, ...]
    """continuations (for ctc and embed: manifests), files or globs"""
    out: Path
    """the run folder: settings, metrics, curves, checkpoints, adapter"""
    audio_model: str
    """the Whisper model whose encoder is used: a folder, a hub id or embedded:NAME"""
    llm: str
    """the LLM that will learn to listen; it must be the one that wrote the continuations"""
    adapter: Adapter
    """the part that is trained; conv is the paper's, and docs/training.md describes each"""
    loss: Loss
    """ce (paper), kl (the teacher's distribution), ctc (grounding), embed (spoken tokens; run `blsp align` first)"""
    data_weights: tuple[float, ...] = ()
    """one weight per data file: 0.5 uses half of it per epoch, 2 all of it twice"""
    adapter_options: tuple[str, ...] = ()
    """NAME=VALUE of the chosen adapter, see docs/training.md"""
    readout: Literal["data", "full"] = "data"
    """what a fresh adapter can read out, if it reads out: tokens of the transcripts, or the LLM's whole vocabulary"""
    init_from: tuple[str, ...] = ()
    """start from the weights of this adapter instead of fresh ones; from the mean of several"""
    template_arg: TemplateArg = ()
    """NAME=VALUE of a variable of the LLM's chat template; without it those of `blsp continue`, which the header of
    --data holds"""
    no_thinking: NoThinking = False
    cache: Path | None = None
    """features written by `blsp encode`; without it speech is encoded during training"""
    steps: int | None = None
    """optimiser steps; without: as many as --epochs take"""
    epochs: float = 1.0
    """passes over the data (paper: 1)"""
    batch_size: int = 768
    """samples per optimiser step, over all processes (paper: 768)"""
    batch_tokens: int = 4096
    """positions (speech and text) in one pass through the LLM: decides memory, not the result"""
    lr: float = 5e-5
    """highest learning rate (paper: 5e-5; grounding works better with 1e-3)"""
    weight_decay: float = 0.05
    """weight decay of AdamW (paper: 0.05)"""
    warmup_steps: int = 1000
    """steps until the highest learning rate (paper: 1000), a tenth of the run at most"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """after the warm-up: down to zero along a cosine or a line (paper: linear), or constant"""
    clip: float = 1.0
    """largest norm of the gradient (paper: 1.0)"""
    temperature: float = 1.0
    """for kl: of teacher and student (BLSP-Emo: 2)"""
    teacher: Literal["auto", "online", "stored"] = "auto"
    """for kl: run the text route beside the speech route, or read the stored --top-k; auto: the latter if it exists"""
    ctc_weight: float = 0.3
    """weight of the ctc loss beside ce and kl, for an adapter that reads out"""
    embed_weight: float = 0.0
    """weight of the embed loss beside ce and kl, for an adapter that does not read out"""
    filler: str = " "
    """for embed: the token, as text, whose embedding stands at places where no token is spoken"""
    negatives: int = 0
    """for ctc and embed: tokens drawn per batch, in place of all that its transcripts do not hold; 0: all"""
    augment: tuple[Literal["speed", "volume", "noise", "mask"], ...] = ()
    """vary the speech (without --cache), or hide short spans of its features: mask (with --cache)"""
    no_speech: float = 0.0
    """share of extra samples of silence and noise, whose target is the fixed no-speech sentence"""
    max_seconds: float = 30.0
    """leave out longer clips, and count them"""
    held_out: int = 64
    """groups of utterances kept out of training for the probes, a tenth of all at most; one group: the
    copies of a recording, and all that has the same text"""
    seed: int = 0
    """decides fresh weights, data order and noise: the same seed gives the same curve"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    probe_every: int = 200
    """steps between divergence probes on training and held-out clips"""
    save_every: int = 200
    """steps between checkpoints"""
    save_minutes: float = 1.0
    """most minutes between checkpoints: the work that a killed run has to repeat"""
    keep: int = 2
    """checkpoints kept"""
    average_last: int = 0
    """the final adapter is the mean of the weights after each of this many last steps; 0: the last weights"""
    resume_inexact: bool = False
    """resume a checkpoint of other versions, threads or processes: close, but not equal to the bit"""
    activation_checkpointing: bool = False
    """compute activations twice to store fewer of them"""
    shard_llm: bool = False
    """split the layers of the LLM over the processes (FSDP2), where it is too large for one"""
    pad_to_30s: bool = False
    """pad every clip to 30 s before the encoder (paper)"""
    device: Device = "auto"
    dtype: Dtype = "auto"
    """the type of the frozen weights; the adapter trains in float32 at least"""
    paper: Paper = False
    config: ConfigFile = None
    """a YAML file with these same flags, `stages:` included"""
    stages: tuple[TrainSettings, ...] = ()
    """the resolved stages of a YAML file, in order; not a flag"""

    def __post_init__(self) -> None:
        above_zero(self, "epochs", "batch_size", "batch_tokens", "lr", "clip", "temperature", "max_seconds")
        above_zero(self, "log_every", "probe_every", "save_every", "save_minutes", "keep", "steps")
        read_template_args(self.template_arg, self.no_thinking)
        if not self.data:
            raise SettingsError("--data: name at least one file")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise SettingsError(f"--data-weights: {len(self.data_weights)} weights for {len(self.data)} data files")
        if self.cache and set(self.augment) - {"mask"}:
            raise SettingsError(
                "--augment speed, volume and noise change the speech before the encoder: leave out --cache, or them"
            )
        if not self.cache and "mask" in self.augment:
            raise SettingsError("--augment mask hides cached features: name the --cache, or leave it out")
