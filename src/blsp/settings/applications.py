"""Settings of the commands that use an adapter: evaluate, generate, transcribe, chat, serve, export, tour.

In:  the command line (cli.py, configuration_file.py). Out: one frozen object for one function.
Try: `blsp transcribe --help`
Flow: cli.py → **settings** → evaluation, inference, serving, model/checkpoint.py, tour.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from blsp.settings.shared import (
    Device,
    Dtype,
    Normalise,
    Order,
    SettingsError,
    TalkDtype,
    above_zero,
    can_sample,
)
from blsp.weights.shipped import DEFAULT_MODEL


@dataclass(frozen=True)
class EvaluateSettings:
    """Ask the same questions as text, through a cascade and as speech, and set the answers side by side.

    The text route is the LLM's own upper bound; the cascade recognises first and then asks the same LLM.
    Writes results.json, samples.jsonl (every question, all answers), report.md with pictures, and prints the
    table.

        $ blsp evaluate --suite tiny --out results/tiny
        $ blsp evaluate --model runs/x/adapter --task my_task.yaml --out results/x --routes text speech
    """

    out: Path
    """the results folder"""
    model: str = DEFAULT_MODEL
    """the adapter or merged model to judge"""
    suite: str | None = None
    """a named set of tasks, e.g. tiny"""
    task: tuple[str, ...] = ()
    """single tasks, by name or by YAML file"""
    routes: tuple[Literal["text", "cascade", "speech"], ...] = ("text", "cascade", "speech")
    """which ways to ask"""
    data: Path | None = None
    """the folder of the suite's manifests; left out: corpus/ in the cache folder (`make eval-data`)"""
    asr: str | None = None
    """the cascade's recogniser: a CTranslate2 folder, a size of faster-whisper's (large-v3), or what transformers loads
    (left out: its own Whisper)"""
    asr_compute: Literal["int8", "float32", "auto"] = "int8"
    """how faster-whisper computes; auto times both and takes the faster, so runs may differ"""
    normalise: Normalise = "none"
    """the text route's transcripts: as given, or through Whisper's normaliser (paper)"""
    peer: tuple[str, ...] = ()
    """OpenAI-compatible servers that take speech, as further columns: MODEL@URL (key: OPENAI_API_KEY)"""
    judge: str | None = None
    """an OpenAI-compatible server that rates open answers: MODEL@URL"""
    compare: tuple[Path, ...] = ()
    """results folders of other checkpoints: the report shows divergence against scores over all of them"""
    limit: int | None = None
    """ask only the first so many questions of each task"""
    batch_size: int = 128
    """questions answered side by side; fewer where memory ends"""
    seed: int = 0
    """draws the bootstrap samples"""
    bootstrap: int = 1000
    """samples behind each confidence interval"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the weights' type"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(self, "batch_size", "bootstrap", "limit")
        if not self.suite and not self.task:
            raise SettingsError("name what to evaluate: --suite tiny, or --task NAME")


@dataclass(frozen=True)
class GenerateSettings:
    """Answer every row of a manifest, spoken or written.

    Writes the rows with their `response`, in their order. A row's own `instruction` wins over the command's;
    a row without audio is asked as text. Killed, it goes on.

        $ blsp generate --manifest questions.jsonl --out answers.jsonl --instruction "Answer the question."
    """

    manifest: str
    """the rows to answer: a manifest or a glob"""
    out: Path
    """the rows plus `response`"""
    model: str = DEFAULT_MODEL
    """the adapter or merged model that listens"""
    instruction: str | None = None
    """what to do, e.g. "Please translate the following audio into German text."; left out: answer"""
    order: Order = "instruction-first"
    """where the speech stands: after the instruction (paper) or before it; best as it was trained"""
    max_new_tokens: int = 128
    """tokens an answer may have (paper, zero-shot: 128)"""
    temperature: float = 0.0
    """0 takes the likeliest token each time (paper)"""
    top_p: float = 1.0
    """when sampling: from the likeliest tokens that together have this probability"""
    seed: int = 0
    """draws samples"""
    batch_size: int = 32
    """rows answered side by side"""
    limit: int | None = None
    """read only so many rows"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the weights' type"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens", "batch_size", "limit")
        can_sample(self.temperature, self.top_p)


@dataclass(frozen=True)
class TranscribeSettings:
    """Write down what was said: one line of JSON, {"audio", "text"}, per file, in the order given.

    No recogniser is loaded. A grounded adapter reads out its own tokens, and of the likeliest sequences the
    LLM chooses the one that somebody would say; --readout leaves the LLM out. With the other adapters the
    LLM repeats what it hears.

        $ blsp transcribe meeting.wav question.mp3 --out transcripts.jsonl
    """

    files: Positional[tuple[str, ...]]
    """recordings: wav, flac, ogg, opus or mp3, any rate"""
    model: str = DEFAULT_MODEL
    """the adapter or merged model that listens"""
    readout: bool = False
    """the grounded adapter's own tokens, without the LLM"""
    repeat: bool = False
    """the LLM repeats what it hears, with a grounded adapter too"""
    out: Path | None = None
    """write here instead of to the screen"""
    max_new_tokens: int = 256
    """tokens a transcript may have"""
    batch_size: int = 16
    """recordings heard side by side"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the weights' type"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens", "batch_size")
        if not self.files:
            raise SettingsError("name at least one recording, as in `blsp transcribe question.wav`")
        if self.readout and self.repeat:
            raise SettingsError("--readout and --repeat: choose one, or neither for the better way")


@dataclass(frozen=True)
class ChatSettings:
    """Talk with it in the terminal: type a message, or the path of a recording, or both.

    Answers stream as they come. Earlier turns keep their key/values, so a long conversation does not slow
    down. /help says what else can be typed.

        $ blsp chat
        you> examples/speech/questions/capital-of-canada.opus
    """

    model: str = DEFAULT_MODEL
    """the adapter or merged model that listens"""
    system: str | None = None
    """a system message for the whole conversation"""
    max_new_tokens: int = 256
    """tokens an answer may have"""
    temperature: float = 0.0
    """0 takes the likeliest token each time"""
    top_p: float = 1.0
    """when sampling: from the likeliest tokens that together have this probability"""
    seed: int = 0
    """draws samples"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: TalkDtype = "fastest"
    """the frozen weights' type; fastest: bfloat16 where the device multiplies it, else float32"""

    def __post_init__(self) -> None:
        above_zero(self, "max_new_tokens")
        can_sample(self.temperature, self.top_p)


@dataclass(frozen=True)
class ServeSettings:
    """Serve it: an OpenAI-compatible API that takes speech, and a web page with a microphone.

    Needs blsp[serve]. Concurrent requests share batches. It listens on this machine only unless told
    otherwise, and then wants a key.

        $ blsp serve                                   # then open http://127.0.0.1:8000
        $ BLSP_API_KEY=… blsp serve --host 0.0.0.0 --port 80
    """

    model: str = DEFAULT_MODEL
    """the adapter or merged model that listens"""
    host: str = "127.0.0.1"
    """the address to listen on"""
    port: int = 8000
    """the port; 0 takes a free one and says which"""
    api_key: str | None = None
    """what clients must send as a bearer token; better given as $BLSP_API_KEY"""
    insecure: bool = False
    """listen beyond this machine without a key all the same"""
    allow_remote_audio: bool = False
    """fetch audio_url from the public internet (private addresses stay refused)"""
    cors_origin: tuple[str, ...] = ()
    """web origins that may call from a browser"""
    max_upload_mb: float = 25.0
    """largest request, before decoding"""
    max_audio_seconds: float = 600.0
    """longest recording, after decoding"""
    max_batch: int = 16
    """requests decoded side by side"""
    queue: int = 64
    """requests that may wait; the next is told to come back later (429)"""
    deadline: float = 120.0
    """seconds a request may take in all"""
    max_new_tokens: int = 512
    """most tokens a request may ask for"""
    prefix_cache: int = 32
    """conversations whose key/values are kept"""
    asr: str | None = None
    """the recogniser of the page's compare switch: what faster-whisper loads (left out: its own Whisper)"""
    log_content: bool = False
    """also log what was said and answered"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
    dtype: Dtype = "auto"
    """the weights' type"""
    config: Path | None = None
    """a YAML file with these same flags"""

    def __post_init__(self) -> None:
        above_zero(
            self, "max_upload_mb", "max_audio_seconds", "max_batch", "queue", "deadline", "max_new_tokens"
        )
        if self.prefix_cache < 0:
            raise SettingsError(f"--prefix-cache {self.prefix_cache}: must be 0 or more")

    @property
    def key(self) -> str | None:
        """What clients must send, from --api-key or $BLSP_API_KEY."""
        return self.api_key or os.environ.get("BLSP_API_KEY") or None


@dataclass(frozen=True)
class ExportSettings:
    """Write one self-contained Hugging Face folder, encoder and LLM included.

    For vLLM, or for a machine that has not got the parts.

    $ blsp export --model runs/x/adapter --out merged/
    """

    out: Path
    """the folder to write"""
    model: str = DEFAULT_MODEL
    """the adapter to merge with its frozen parts"""
    dtype: Dtype = "auto"
    """the type the weights are stored in; auto: as the parts have it"""


@dataclass(frozen=True)
class TourSettings:
    """Walk the whole way on real speech, on a laptop's CPU, in minutes.

    corpora → manifest → continuations → speech features → alignment training → checkpoint → inference →
    evaluation.

    Says at each stop what went in and what came out. A second run resumes instead of repeating.

        $ blsp tour
    """

    out: Path = Path("runs/tour")
    """where everything it makes is kept"""
    speech: Path = Path("examples/speech")
    """the recordings to learn from and to look at"""
    cold: bool = False
    """train a fresh adapter even where the shipped one could be adapted"""
    device: Device = "auto"
    """where to run: auto, cpu, cuda, cuda:1, mps"""
