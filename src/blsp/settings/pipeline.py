"""Settings of the commands that make the data of an adapter: prepare, continue, encode, align.

In:  the command line, or a YAML file (cli.py). Out: one frozen object for one function.
Try: `blsp prepare --help`
Flow: cli.py → **pipeline.py** → data/prepare.py, continuation/writer.py, features/{encode,align}.py

`GROUPS` names the groups that `--help` shows, with their fields in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional

from blsp.settings.shared import (
    DEFAULT_MODEL,
    Attention,
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
    ShardLlm,
    Temperature,
    TemplateArg,
    TopP,
    above_zero,
    can_sample,
    read_template_args,
)

Corpus = Annotated[str, Choices("blsp.data.prepare", "READERS")]


@dataclass(frozen=True)
class PrepareSettings:
    r"""Turn a corpus on disk into a manifest: one JSON line per utterance, with its audio and its text.

    Nothing is downloaded, copied or encoded again: recordings stay in their files, also in tar and Parquet files. Rows
    that cannot be used are listed in OUT.skipped.jsonl. A second run continues. `no-speech` generates clips instead.

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
    """the corpus, or the format of your data"""
    out: Path
    """the manifest to write"""
    root: str = ""
    """its folder or table (shards: or `x-{00..99}.tar`; hf: or a dataset's id; no-speech: a manifest for babble)"""
    split: str = "train"
    """the split to read, with the corpus' own name; several: `train-clean-100,train-clean-360`"""
    language: str | None = None
    """the spoken language, ISO 639-1, if the corpus has several"""
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
    """decode all recordings; damaged, incomplete or silent ones go to OUT.skipped.jsonl"""
    limit: Limit = None
    """stop after this many rows (no-speech: the number of clips to make; without: 300)"""
    seed: int = 0
    """no-speech: random seed of the clips"""
    config: ConfigFile = None

    def __post_init__(self) -> None:
        if not self.root and self.corpus != "no-speech":
            raise SettingsError(f"--root: name the folder in which {self.corpus} lies")
        above_zero(self, "limit")


@dataclass(frozen=True)
class ContinueSettings:
    r"""Step 1: the LLM continues each transcript, as it should later continue the speech.

    Writes the rows of the manifest with `continuation`, `continuation_ids` and how they were made, and OUT.meta.json;
    with --top-k also the folder OUT.topk. Rows without words go to OUT.skipped.jsonl, with the reason. Equal prompts
    are generated once. After a kill the same command continues, and the result has the same bytes.

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
        "compute": "batch_size shard_llm attn_implementation device dtype",
    }

    manifest: str
    """the transcripts: a manifest or a glob of manifests"""
    out: Path
    """the continuations to write"""
    llm: str
    """the LLM that will learn to listen: folder, hub id, embedded:NAME (with --engine-url: its tokenizer)"""
    behaviours: str = "continue"
    """the instructions: `continue` (paper), `repeat`, `answer`, `keywords`, `translate:LANGUAGE`;
    `continue,repeat` uses both for each row, `continue:0.8,repeat:0.2` one of them, drawn with these weights"""
    orders: str = "instruction-first"
    """the position of the speech: `instruction-first` (paper), `speech-first`, or a mixture, as above"""
    instruction: str | None = None
    """your own words instead of the behaviour's (one behaviour only; the instruction of a row comes first)"""
    template_arg: TemplateArg = ()
    no_thinking: NoThinking = False
    normalise: Normalise = "none"
    """use transcripts as given, or normalised with Whisper's normaliser (paper)"""
    max_new_tokens: int = 64
    """the most tokens of a continuation (paper: 64)"""
    max_prompt_tokens: int = 192
    """skip rows whose prompt has this many tokens or more (paper: 192)"""
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = 0
    """random seed of behaviours, orders and samples; the draw of a row depends only on its id"""
    top_k: int = 0
    """also store this many log-probabilities of the teacher per token; `kl` is then as fast as `ce`"""
    top_k_temperature: float = 1.0
    """their temperature; training must use the same one"""
    score_only: bool = False
    """generate no text: add --top-k to the rows of OUT, with the local LLM"""
    batch_size: int = 64
    """prompts generated together"""
    engine_url: tuple[str, ...] = ()
    """OpenAI-compatible servers that run the LLM, such as http://localhost:8000/v1; several share the prompts"""
    engine_model: str | None = None
    """the servers' name of the LLM, if it differs from --llm"""
    engine_body: str = "{}"
    """JSON added to each request, such as '{"return_token_ids": true}' for a vLLM server"""
    api_key_env: str = "OPENAI_API_KEY"
    """the environment variable with the servers' key"""
    concurrency: int = 64
    """open requests at each server; eight vLLMs behind one address need 2,048"""
    timeout: float = 120.0
    """seconds to wait for an answer, before the request is sent again"""
    retries: int = 8
    """how often a failed request is sent again, with growing pauses, before its row is skipped"""
    retry_minutes: float = 30.0
    """minutes without any answer (a server may restart), before the job stops"""
    max_failures: float = 0.01
    """stop if more than this share of the prompts, and more than ten, cannot be answered"""
    limit: Limit = None
    shard_llm: ShardLlm = False
    attn_implementation: Attention = None
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
    """Run the frozen speech encoder over a manifest once and store its output.

    Training then does not run the encoder. The cache is keyed by audio content and encoder, so manifests with the same
    clips share the cache. Damaged or outdated entries are found and made again. It needs 38 KB per second of speech
    with Whisper tiny.

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
    """pad each clip to 30 s, as in Whisper's training (paper); otherwise true lengths with a mask, which is faster"""
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    """the number format of the encoder; auto: bfloat16 if the device is fast with it, otherwise float32"""
    paper: Paper = False
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "batch_seconds", "limit")


@dataclass(frozen=True)
class AlignSettings:
    """Find when each token of a transcript is spoken, for `blsp train --loss embed`.

    The times come from an adapter that reads out: the best path of its CTC posteriors that spells the transcript. They
    are stored beside the features. A second run adds missing ones.

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
    """the folder of the features; missing clips are encoded"""
    model: str = DEFAULT_MODEL
    """an adapter that reads out, with the same encoder and LLM as in the training run"""
    audio_model: AudioModel = None
    llm: Llm = None
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "limit")
