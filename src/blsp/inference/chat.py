"""`blsp chat`: a conversation with the model in the terminal.

In:  typed lines: text, paths or URLs of recordings, or both; /reset, /help, /quit.
Out: read-outs of the recordings, and answers, streamed as they are written.
Try: `blsp chat`, then `What is said here? examples/speech/questions/capital-of-canada.opus`
Flow: inference/ — lines → **parts of a turn → Conversation** → answers.

A word that ends in the suffix of an audio file is the path or the URL of one; a path with spaces needs quotes or
escapes.
"""

import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blsp.data.audio import AudioError, load_audio
from blsp.data.containers import AUDIO_SUFFIXES
from blsp.inference.conversation import ContextError, Conversation
from blsp.inference.listener import decoding_of, load, load_options
from blsp.llm.prompt import PromptError
from blsp.model.adapter_parts import AudioEmbeds
from blsp.settings import ChatSettings

# "quoted", 'quoted', or characters where \ escapes the next one; punctuation after it is not part of the word
WORD = re.compile(r"""(?<!\S)(?:"([^"]+)"|'([^']+)'|((?:\\.|[^\s\\])+?))(?=[?!,;:.]*(?:\s|$))""")
PROMPT = "you> "
HELP = """\
Type a message, or the path of a recording, or both in one line: What is said here? "my clip.wav"
/reset   begin a new conversation        Ctrl-C   stop the answer
/help    show this                       /quit    leave (or Ctrl-D)"""


@dataclass(frozen=True)
class Link:
    """The URL of a recording in a typed line."""

    url: str


def chat(settings: ChatSettings) -> None:
    """Run the chat until /quit or the end of the input."""
    listener = load(settings.model, **load_options(settings))
    print(HELP)
    converse(
        Conversation(listener, system=settings.system, decoding=decoding_of(settings, listener)), typed_lines(), show
    )


def typed_lines() -> Iterator[str]:
    """The typed lines, with the terminal's line editing if there is one."""
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() a history)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def show(text: str) -> None:
    """Print a piece at once, without a newline."""
    print(text, end="", flush=True)


def converse(conversation: Conversation, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answer line after line; after an error its message is shown, and the chat continues."""
    for line in lines:
        command = line.strip().lower()
        if command in ("/quit", "/exit", "/q"):
            return
        if command == "/reset":
            conversation.reset()
            write("A new conversation.\n")
        elif command in ("/help", "/?"):
            write(HELP + "\n")
        elif re.fullmatch(r"/\w+", command):
            write(f"There is no {command}; /help says what there is.\n")
        elif command:
            answer_line(conversation, line, write)


def answer_line(conversation: Conversation, line: str, write: Callable[[str], None]) -> None:
    """One turn: encode its recordings, show the adapter's read-out of them, stream the answer."""
    try:
        parts = [part if isinstance(part, str) else _embed_file(conversation, part, write) for part in parse(line)]
        for piece in conversation.ask(*parts):
            write(piece)
        write("\n")
    except (AudioError, ContextError, PromptError) as error:
        write(f"{error}\n")
    except KeyboardInterrupt:
        write(" …\n")


def _embed_file(conversation: Conversation, file: Path | Link, write: Callable[[str], None]) -> AudioEmbeds:
    """The vectors of a recording; the adapter's read-out is shown if there is one."""
    listener = conversation.listener
    clip = listener.embed_audio([load_audio(file.url if isinstance(file, Link) else file)])[0]
    if listener.reads_out and clip.speech:
        write(f"[heard: {listener.readout([clip])[0]}]\n")
    return clip


def parse(line: str) -> list[str | Path | Link]:
    """The text and the recordings of a line, in order."""
    parts: list[str | Path | Link] = []
    end = 0
    for word in WORD.finditer(line):
        if (file := _audio_file(word)) is not None:
            parts += [line[end : word.start()].strip(), file]
            end = word.end()
    parts.append(line[end:].strip())
    return [part for part in parts if part]


def _audio_file(word: re.Match[str]) -> Path | Link | None:
    """The path or the URL in a word, if it has the suffix of an audio file; otherwise None."""
    double, single, bare = word.groups()
    name = double or single or re.sub(r"\\(.)", r"\1", bare)
    if name.startswith("file://"):
        name = urllib.parse.unquote(name.removeprefix("file://"))
    if not name.lower().endswith(tuple(AUDIO_SUFFIXES)):
        return None
    return Link(name) if "://" in name else Path(os.path.expanduser(name))
