"""Settings of the commands that use an adapter: evaluate, generate, transcribe, chat, move, export, tour.

In:  the command line, or a YAML file (cli.py). Out: one frozen object for one function.
Try: `blsp transcribe --help`
Flow: cli.py → **applications.py** → evaluation, inference, model/checkpoint.py, tour.py

`GROUPS` names the groups that `--help` shows, with their fields in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from tyro.conf import Positional

from blsp.settings.shared import (
    DEFAULT_MODEL,
    Attention,
    AudioModel,
    CollectiveMinutes,
    ConfigFile,
    Device,
    Dtype,
    Limit,
    Llm,
    LlmWeights,
    Normalise,
    Order,
    Precision,
    Rescore,
    SettingsError,
    ShardLlm,
    Temperature,
    TopP,
    TranscriptFormat,
    VoiceActivity,
    above_zero,
    can_sample,
)

Model = Annotated[str, "the adapter, or the merged model, to use"]


@dataclass(frozen=True)
class EvaluateSettings:
    """Ask the same questions as text, through a cascade and as speech, and compare the answers.

    The text route is the upper bound of the LLM itself; the cascade recognises the speech first and then asks
    the same LLM. Writes results.json, samples.jsonl (every question, all answers) and report.md with pictures,
    and prints the table.

        $ blsp evaluate --suite tiny --out results/tiny
        $ blsp evaluate --model runs/x/adapter --task my_task.yaml --out results/x --routes text speech
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "task": "suite task data limit routes normalise",
        "model": "model audio_model llm rescore asr asr_compute peer judge",
        "report": "out compare seed bootstrap",
        "compute": "batch_size shard_llm attn_implementation collective_minutes device dtype",
    }

    out: Path
    """the results folder"""
    model: Model = DEFAULT_MODEL
    audio_model: AudioModel = None
    llm: Llm = None
    rescore: Rescore = "auto"
    suite: str | None = None
    """a named set of tasks, such as tiny"""
    task: tuple[str, ...] = ()
    """single tasks, by name or by YAML file"""
    routes: tuple[Literal["text", "cascade", "speech"], ...] = ("text", "cascade", "speech")
    """the routes on which questions are asked"""
    data: Path | None = None
    """the folder of the manifests of a suite by name; without: corpus/ in the cache folder (`make eval-data`). The
    manifests of a YAML file lie beside it"""
    asr: str | None = None
    """the recogniser of the cascade: a CTranslate2 folder, a size of faster-whisper (large-v3), or a model that
    transformers loads (without: the adapter's own Whisper)"""
    asr_compute: Literal["int8", "float32", "auto"] = "int8"
    """the number format of faster-whisper; auto measures both and takes the faster one, so runs may differ"""
    normalise: Normalise = "none"
    """the transcripts of the text route: as given, or normalised with Whisper's normaliser (paper)"""
    peer: tuple[str, ...] = ()
    """OpenAI-compatible servers that take speech, as further columns: MODEL@URL (key: OPENAI_API_KEY)"""
    judge: str | None = None
    """an OpenAI-compatible server that rates open answers: MODEL@URL"""
    compare: tuple[Path, ...] = ()
    """results folders of other checkpoints: the report shows divergence against scores over all of them"""
    limit: Limit = None
    """ask only this many questions of each task"""
    batch_size: int = 128
    """questions answered together; give a smaller number if there is little memory"""
    seed: int = 0
    """random seed of the bootstrap samples"""
    bootstrap: int = 1000
    """bootstrap samples for each confidence interval"""
    shard_llm: ShardLlm = False
    attn_implementation: Attention = None
    collective_minutes: CollectiveMinutes = 30.0
    device: Device = "auto"
    dtype: Dtype = "auto"
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "batch_size", "bootstrap", "limit", "collective_minutes")
        if not self.suite and not self.task:
            raise SettingsError("name what to evaluate: --suite tiny, or --task NAME")


@dataclass(frozen=True)
class GenerateSettings:
    """Answer each row of a manifest, spoken or written.

    Writes the rows with their `response`, in order. A row's own `instruction` replaces the command's; a row without
    audio is asked as text. After a kill the same command continues.

        $ blsp generate --manifest questions.jsonl --out answers.jsonl --instruction "Answer the question."
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "manifest out limit",
        "model": "model audio_model llm rescore",
        "prompt": "instruction order",
        "generation": "max_new_tokens temperature top_p seed",
        "compute": "batch_size shard_llm attn_implementation collective_minutes device dtype weights",
    }

    manifest: str
    """the rows to answer: a manifest or a glob"""
    out: Path
    """the file to write: the rows with `response`"""
    model: Model = DEFAULT_MODEL
    audio_model: AudioModel = None
    llm: Llm = None
    rescore: Rescore = "auto"
    instruction: str | None = None
    """such as "Translate the following text into German. Write only the translation:"; without: the LLM answers"""
    order: Order = "instruction-first"
    """the position of the speech: after the instruction (paper) or before it; use the same order as in training"""
    max_new_tokens: int = 128
    """the most tokens of an answer (paper, zero-shot: 128)"""
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = 0
    """draws samples"""
    batch_size: int = 32
    """rows answered together"""
    collective_minutes: CollectiveMinutes = 30.0
    limit: Limit = None
    shard_llm: ShardLlm = False
    attn_implementation: Attention = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    weights: LlmWeights = None
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens", "batch_size", "limit", "collective_minutes")
        can_sample(self.temperature, self.top_p)


@dataclass(frozen=True)
class TranscribeSettings:
    """Write down the words of recordings, as text, as JSON with times, or as subtitles.

    No recogniser is loaded. An adapter that reads out gives the likeliest sequences of tokens, and the LLM chooses one
    of them; with --readout the LLM is not used. With other adapters the LLM repeats the speech.

        $ blsp transcribe meeting.wav question.mp3 --out transcripts.jsonl
        $ blsp transcribe meeting.wav --out meeting.srt
        $ blsp transcribe *.m4a --format vtt --out subtitles/
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "out format timestamps aligner vad",
        "model": "model audio_model llm readout repeat",
        "generation": "max_new_tokens",
        "compute": "batch_size device dtype weights",
    }

    files: Positional[tuple[str, ...]]
    """recordings: wav, flac, ogg, opus, mp3, m4a, webm and others, any sample rate"""
    model: Model = DEFAULT_MODEL
    audio_model: AudioModel = None
    llm: Llm = None
    readout: bool = False
    """write the tokens that the adapter reads out, without the LLM"""
    repeat: bool = False
    """let the LLM repeat the speech, even if the adapter reads out"""
    out: Path | None = None
    """write to this file instead of the screen; several recordings as txt, json, srt or vtt: to this folder"""
    format: TranscriptFormat | None = None
    """jsonl: one line of JSON for each recording; json, srt and vtt: with times (default: the suffix of --out, or
    jsonl)"""
    timestamps: bool = False
    """times of the words, also in jsonl and txt"""
    aligner: str | None = None
    """an adapter that reads out (blsp-tiny), to find the times of words for an adapter that does not"""
    vad: VoiceActivity = "auto"
    """search for speech first, with Silero's detector (pip install 'blsp[cascade]'); auto: in recordings of more than
    30 s, if it is installed"""
    max_new_tokens: int = 256
    """the most tokens of a transcript"""
    batch_size: int = 16
    """recordings encoded together"""
    device: Device = "auto"
    dtype: Dtype = "auto"
    weights: LlmWeights = None
    config: ConfigFile = None

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens", "batch_size")
        if not self.files:
            raise SettingsError("name at least one recording, as in `blsp transcribe question.wav`")
        if self.readout and self.repeat:
            raise SettingsError("--readout and --repeat: choose one, or neither for the better way")
        if self.written_as == "jsonl" and self.out is not None and self.out.is_dir():
            raise SettingsError(f"--out {self.out}: is a folder; name a file in it, or give --format")
        if self.written_as in ("json", "srt", "vtt") and self.out is None and len(self.files) > 1:
            raise SettingsError(f"--format {self.written_as} of several recordings needs --out FOLDER")
        if self.folder is not None:
            self._names_differ()

    @property
    def written_as(self) -> TranscriptFormat:
        """The given format, or the suffix of --out."""
        endings: dict[str, TranscriptFormat] = {f".{kind}": kind for kind in get_args(TranscriptFormat)}
        return self.format or endings.get(self.out.suffix.lower() if self.out else "", "jsonl")

    @property
    def folder(self) -> Path | None:
        """The folder with a file for each recording; None if the output is one file, or the screen."""
        if self.written_as == "jsonl" or self.out is None:
            return None
        return self.out if len(self.files) > 1 or self.out.is_dir() or not self.out.suffix else None

    def _names_differ(self) -> None:
        sources: dict[str, str] = {}
        for file in self.files:
            other = sources.setdefault(Path(file).stem, file)
            if other != file:
                name = f"{Path(file).stem}.{self.written_as}"
                raise SettingsError(f"{other} and {file}: both would be written to {name}; rename one, or run twice")


@dataclass(frozen=True)
class ChatSettings:
    """Chat in the terminal: type a message, or the path of a recording, or both.

    Answers are printed as they are generated. The key/values of earlier turns are kept, so a long conversation
    does not slow down. /help lists what else can be typed.

        $ blsp chat
        you> examples/speech/questions/capital-of-canada.opus
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "model": "model audio_model llm rescore system",
        "generation": "max_new_tokens temperature top_p seed",
        "compute": "device dtype weights",
    }

    model: Model = DEFAULT_MODEL
    audio_model: AudioModel = None
    llm: Llm = None
    rescore: Rescore = "auto"
    system: str | None = None
    """a system message for the whole conversation"""
    max_new_tokens: int = 256
    """the most tokens of an answer"""
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = 0
    """draws samples"""
    device: Device = "auto"
    dtype: Literal["fastest"] | Precision = "fastest"
    """the number format of the frozen weights; fastest: bfloat16 if the device computes in it, otherwise float32"""
    weights: LlmWeights = None

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens")
        can_sample(self.temperature, self.top_p)


@dataclass(frozen=True)
class ExportSettings:
    """Write one self-contained Hugging Face folder: encoder, LLM and the code that runs them.

    transformers loads it without this package (trust_remote_code=True) and without the frozen models. It is the form
    for the hub (docs/hub.md), and for vllm serve (adapters conv and stack, with this package installed beside vLLM;
    docs/serving.md).

    $ blsp export --model runs/x/adapter --out merged/
    """

    out: Path
    """the folder to write"""
    model: Model = DEFAULT_MODEL
    """the adapter to merge with its frozen models"""
    audio_model: AudioModel = None
    llm: Llm = None
    dtype: Dtype = "auto"
    """the number format of the stored weights; auto: as in the frozen models"""
    results: Path | None = None
    """results.json of `blsp evaluate`, for the metadata of the card; without it, as the adapter's card says"""


@dataclass(frozen=True)
class MoveSettings:
    """Move an adapter that reads out to another LLM, without training.

    It reads out what it read out before, in the tokens of the new LLM.

    $ blsp move --model blsp-tiny --llm embedded:qwen2.5-coder-1.5b-instruct --out moved/
    $ blsp chat --model moved
    """

    llm: str
    """the other LLM: a folder, a hub id or an embedded: name"""
    out: Path
    """the adapter folder to write"""
    model: Model = DEFAULT_MODEL
    """the adapter to move"""
    audio_model: AudioModel = None
    device: Device = "auto"


@dataclass(frozen=True)
class TourSettings:
    """Run all steps on real speech, on the CPU of a laptop, in minutes.

    corpora → manifest → continuations → speech features → alignment training → checkpoint → inference →
    evaluation.

    Prints the input and the output of each step. A second run resumes.

        $ blsp tour
    """

    out: Path = Path("runs/tour")
    """the folder for all files of the tour"""
    speech: Path = Path("examples/speech")
    """the recordings for training and for the examples"""
    cold: bool = False
    """train a new adapter instead of adapting the shipped one"""
    device: Device = "auto"
