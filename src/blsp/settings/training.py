"""Settings of `blsp train`.

In:  the command line, or a YAML file (cli.py). Out: one frozen object for training/loop.py.
Try: `blsp train --help`
Flow: cli.py → **training.py** → training/loop.py

`GROUPS` names the groups that `--help` shows, with their fields in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from blsp.settings.shared import (
    Attention,
    Choices,
    CollectiveMinutes,
    ConfigFile,
    Device,
    Dtype,
    NoThinking,
    Paper,
    SettingsError,
    ShardLlm,
    TemplateArg,
    above_zero,
    read_template_args,
)

Adapter = Annotated[str, Choices("blsp.model.adapter", "ADAPTERS")]
Loss = Annotated[str, Choices("blsp.training.step", "LOSSES")]


@dataclass(frozen=True)
class TrainSettings:
    r"""Step 2: train the adapter until the LLM answers speech as it answers the transcript.

    Encoder and LLM are frozen. Three losses need only a plain manifest and do not run the LLM: `embed-ctc` and `embed`
    bring a new `conv` or `stack` adapter to the LLM's embeddings, `ctc` trains the read-out of `grounded`. `ce` is the
    paper's loss on the continuations; `kl` matches the whole next-token distribution of the text route. With --config,
    a list `stages:` runs several stages one after another; each has the flags of the top level and starts from the
    adapter of the previous stage. After a kill, the same command continues with the same bits; SIGTERM saves and exits.

        $ blsp train --data continued.jsonl --out runs/paper --audio-model openai/whisper-small --llm MODEL \
              --adapter conv --loss ce --cache features/
        $ blsp train --config recipes/blsp-tiny/train.yaml
        $ torchrun --nproc-per-node 8 -m blsp train --config recipe.yaml
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "data out data_weights val_data cache augment no_speech max_seconds held_out",
        "model": "audio_model llm adapter adapter_options readout init_from pad_to_30s template_arg no_thinking",
        "change of frozen parts": "lora lora_rank",
        "loss": "loss temperature teacher ctc_weight embed_weight filler negatives",
        "optimisation": "steps epochs batch_size lr weight_decay warmup_steps schedule clip average_last seed",
        "logging and checkpoint": "log_to profile log_every probe_every save_every save_minutes keep resume_inexact",
        "compute and memory": "dry_run batch_tokens activation_checkpointing shard_llm attn_implementation "
        "deterministic collective_minutes readers device dtype",
    }

    data: tuple[str, ...]
    """continuations (for ctc, embed and embed-ctc: manifests), files or globs"""
    out: Path
    """the run folder: settings, metrics, curves, checkpoints, adapter"""
    audio_model: str
    """the Whisper model whose encoder is used: a folder, a hub id or embedded:NAME"""
    llm: str
    """the LLM that will learn to listen; it must be the one that wrote the continuations"""
    adapter: Adapter
    """the trained part; conv is the paper's; docs/training.md describes all"""
    loss: Loss
    """ce (paper), kl (the teacher's distribution), ctc (grounding), embed-ctc (the embeddings of
    spoken tokens), embed (the same at known times; run `blsp align` first)"""
    data_weights: tuple[float, ...] = ()
    """one weight per data file: 0.5 uses half of it per epoch, 2 all of it twice"""
    val_data: tuple[str, ...] = ()
    """NAME=FILE with data that is not used for training; the probes also measure it, as NAME_kl etc."""
    adapter_options: tuple[str, ...] = ()
    """NAME=VALUE, options of the adapter, see docs/training.md"""
    readout: Literal["data", "full"] = "data"
    """the read-out vocabulary of a new adapter that reads out: tokens of the transcripts, or of the whole LLM"""
    lora: tuple[Literal["llm", "encoder"], ...] = ()
    """also train LoRA on these parts (PEFT), which then change: text is no longer answered as before"""
    lora_rank: int = 8
    """rank of LoRA; its alpha is twice that"""
    init_from: tuple[str, ...] = ()
    """start from the weights of this adapter instead of new ones; of several, from their mean"""
    template_arg: TemplateArg = ()
    """NAME=VALUE of a variable of the LLM's chat template; without: those of `blsp continue`, from the header of
    --data"""
    no_thinking: NoThinking = False
    cache: Path | None = None
    """features written by `blsp encode`; without it speech is encoded during training"""
    steps: int | None = None
    """optimiser steps; without: --epochs decides"""
    epochs: float = 1.0
    """passes over the data (paper: 1)"""
    batch_size: int = 768
    """samples per optimiser step, over all processes (paper: 768)"""
    batch_tokens: int = 4096
    """positions (speech and text) in one pass through the LLM: decides the memory, not the result"""
    lr: float = 5e-5
    """highest learning rate (paper: 5e-5; grounding works better with 1e-3)"""
    weight_decay: float = 0.05
    """weight decay of AdamW (paper: 0.05)"""
    warmup_steps: int = 1000
    """steps until the highest learning rate (paper: 1000), at most a tenth of the run"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """after the warm-up: a cosine or a line down to zero (paper: linear), or constant"""
    clip: float = 1.0
    """largest norm of the gradient (paper: 1.0)"""
    temperature: float = 1.0
    """for kl: of teacher and student (BLSP-Emo: 2)"""
    teacher: Literal["auto", "online", "stored"] = "auto"
    """for kl: run the text route in each step, or read the stored --top-k; auto: stored if it exists"""
    ctc_weight: float = 0.3
    """weight of the ctc loss beside ce and kl, for an adapter that reads out"""
    embed_weight: float = 0.0
    """weight of the embed-ctc loss beside ce and kl, for an adapter that does not read out"""
    filler: str = " "
    """for embed and embed-ctc: the text of the token whose embedding is the target at places without a spoken token"""
    negatives: int = 0
    """for ctc, embed, embed-ctc: tokens drawn per batch from those that are not in its transcripts; 0: all of them"""
    augment: tuple[Literal["speed", "volume", "noise", "mask"], ...] = ()
    """change the speech (without --cache), or set short spans of its features to zero: mask (with --cache)"""
    no_speech: float = 0.0
    """share of additional samples of silence and noise, whose target is the fixed no-speech sentence"""
    max_seconds: float = 30.0
    """skip longer clips"""
    held_out: int = 64
    """groups of utterances held out for the probes, at most a tenth of all; copies of a recording, and utterances with
    the same text, are in one group"""
    seed: int = 0
    """random seed of new weights, data order and noise: the same seed gives the same curve"""
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """also send the figures of metrics.jsonl there; install the tracker with pip; its own variables name the project"""
    dry_run: bool = False
    """only check: read the data, load the models, run three steps, write nothing; print memory and time"""
    profile: int = 0
    """write a trace of this many steps to OUT/trace.json"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    probe_every: int = 200
    """steps between divergence probes on training and held-out clips"""
    save_every: int = 200
    """steps between checkpoints"""
    save_minutes: float = 1.0
    """the most minutes between checkpoints, which a killed run has to repeat"""
    keep: int = 2
    """number of checkpoints to keep"""
    average_last: int = 0
    """the final adapter is the mean of the weights after each of the last N steps; 0: the last weights"""
    resume_inexact: bool = False
    """resume a checkpoint of other versions or threads; the results are close, but not equal to the bit"""
    activation_checkpointing: bool = False
    """compute activations twice to store fewer of them"""
    shard_llm: ShardLlm = False
    attn_implementation: Attention = None
    deterministic: bool = True
    """the same bits each time (law 4); on CUDA, some operations are faster without"""
    collective_minutes: CollectiveMinutes = 30.0
    readers: int = 8
    """threads that read the next rows: more of them where storage is slow to answer"""
    pad_to_30s: bool = False
    """pad each clip to 30 s before the encoder (paper)"""
    device: Device = "auto"
    dtype: Dtype = "auto"
    """the number format of the frozen weights; the adapter is trained in float32 at least"""
    paper: Paper = False
    config: ConfigFile = None
    """a YAML file with these same flags, `stages:` included"""
    stages: tuple[TrainSettings, ...] = ()
    """the resolved stages of a YAML file, in order; not a flag"""

    def __post_init__(self) -> None:
        above_zero(self, "epochs", "batch_size", "batch_tokens", "lr", "clip", "temperature", "max_seconds")
        above_zero(
            self,
            "log_every",
            "probe_every",
            "save_every",
            "save_minutes",
            "keep",
            "steps",
            "collective_minutes",
            "lora_rank",
            "readers",
        )
        read_template_args(self.template_arg, self.no_thinking)
        if not self.data:
            raise SettingsError("--data: name at least one file")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise SettingsError(f"--data-weights: {len(self.data_weights)} weights for {len(self.data)} data files")
        if self.cache and "encoder" in self.lora:
            raise SettingsError(
                "--lora encoder changes the encoder, and cached features are of the one without it: leave out --cache"
            )
        if self.shard_llm and "llm" in self.lora:
            raise SettingsError(
                "--lora llm: not with --shard-llm, which splits frozen layers only; leave one of them out"
            )
        if self.cache and set(self.augment) - {"mask"}:
            raise SettingsError(
                "--augment speed, volume and noise change the speech before the encoder: leave out --cache, or them"
            )
        if not self.cache and "mask" in self.augment:
            raise SettingsError("--augment mask hides cached features: name the --cache, or leave it out")
