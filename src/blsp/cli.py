"""Command line: `blsp COMMAND …` → one settings object → one function call.

In:  the command line. Out: an exit code: 0 done; 1 the job failed, with one line that says what to do; 2 the
     command line (or the YAML file of --config) is wrong; 130 interrupted.
Try: `blsp --help`, `blsp train --help`
Flow: **cli.py** (plugins) → settings/flags.py → the function of the command, which imports torch if it needs it.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

DONE, FAILED, WRONG_COMMAND_LINE, INTERRUPTED = 0, 1, 2, 130
EXTRAS = {  # a package that may be missing -> our extra that installs it
    "datasets": "data",
    "fastapi": "serve",
    "uvicorn": "serve",
    "multipart": "serve",
    "faster_whisper": "cascade",
    "gguf": "embedded",
    "torchao": "quant",
}


@dataclass(frozen=True)
class Command:
    """A command: its name, its module and function, one line about it. The class of its settings is `NameSettings`."""

    name: str
    module: str
    function: str
    summary: str
    shared: bool = False  # whether the processes of one launch share its work

    @property
    def settings(self) -> str:
        return f"{self.name.capitalize()}Settings"


_COMMANDS = (  # in the order of the flow
    Command("prepare", "blsp.data.prepare", "prepare", "a corpus → a manifest"),
    Command("continue", "blsp.continuation.writer", "write_continuations", "step 1: the LLM continues texts", True),
    Command("encode", "blsp.features.encode", "encode", "the frozen encoder's output, on disk", True),
    Command("align", "blsp.features.align", "align", "when each token of the transcripts is spoken"),
    Command("train", "blsp.training.loop", "train", "step 2: the adapter learns to listen", True),
    Command("evaluate", "blsp.evaluation.judge", "evaluate", "the same questions as text, cascade and speech", True),
    Command("generate", "blsp.inference.generate", "generate", "answer every row of a manifest", True),
    Command("transcribe", "blsp.inference.transcribe", "transcribe", "write down the words of recordings"),
    Command("chat", "blsp.inference.chat", "chat", "chat in the terminal, with text and speech"),
    Command("serve", "blsp.serving.server", "serve", "OpenAI-compatible server and a web page"),
    Command("move", "blsp.model.move", "move", "an adapter that reads out, to another LLM"),
    Command("export", "blsp.model.checkpoint", "export", "one self-contained Hugging Face folder"),
    Command("tour", "blsp.tour", "tour", "every step on real speech, in minutes"),
)
COMMANDS = {command.name: command for command in _COMMANDS}

HEADER = """\
usage: blsp COMMAND [OPTIONS]        blsp COMMAND --help explains a command

Teach a frozen text LLM to listen (BLSP: behaviour alignment of continuation writing, arXiv 2309.00916).
The LLM continues transcripts; an adapter is trained until the LLM answers speech in the same way.

  corpora → manifest → continuations (step 1) → speech features → alignment training (step 2) → checkpoint
  → inference → evaluation, serving
"""

FOOTER = """\
Start with `blsp tour`; then `blsp chat --model runs/tour/train/adapter`.
Every command but chat, move, export and tour also reads its flags from a YAML file: --config FILE.
BLSP_PLUGINS=FILE,… imports Python files that add adapters, losses or corpora.
BLSP_TRACEBACK=1 shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; for a wrong flag, tyro exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("blsp: interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe: `blsp … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return DONE if arguments else WRONG_COMMAND_LINE
    if arguments[0] == "--version":
        from blsp import __version__

        print(f"blsp {__version__}")
        return DONE
    name, *flags = arguments
    if name not in COMMANDS:
        return _wrong(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    try:
        settings = parse(name, flags)
    except (ValueError, ImportError) as error:  # SettingsError, PluginError
        return _wrong(str(error))
    if not COMMANDS[name].shared and os.environ.get("WORLD_SIZE", "1") != "1":
        able = ", ".join(command.name for command in COMMANDS.values() if command.shared)
        return _wrong(f"{name} runs in one process; those that share work under torchrun are {able}")
    return run(COMMANDS[name], settings)


def help_text() -> str:
    """The text of `blsp --help`, made without tyro, which would be slow."""
    commands = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    return f"{HEADER}\n{commands}\n\n{FOOTER}".rstrip()


def parse(name: str, flags: Sequence[str]) -> Any:
    """The settings of command `name`; for a wrong flag, tyro prints an explanation and exits with 2."""
    from blsp import settings
    from blsp.settings.flags import read_settings

    load_plugins()
    return read_settings(getattr(settings, COMMANDS[name].settings), flags, prog=f"blsp {name}")


def run(command: Command, settings: Any) -> int:
    """Call the command's function; an expected error is printed as one line, another one with its traceback."""
    import logging

    from blsp.settings import SettingsError

    # transformers imports torchao if it is installed; torchao warns about GPU libraries that cannot be loaded
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = getattr(import_module(command.module), command.function)(settings)
    except BrokenPipeError:
        raise
    except SettingsError as error:  # flags that fit neither each other nor the weights
        return _wrong(str(error))
    except Exception as error:
        return _failed(error)
    return DONE if code is None else code


def _failed(error: Exception) -> int:
    """Print one line for an error that a user can solve; also the traceback for others, or with BLSP_TRACEBACK."""
    # our own classes, and classes of errors whose messages are written for users
    ours = type(error).__module__.partition(".")[0] == "blsp"
    expected = ours or isinstance(error, OSError | ValueError | ImportError | NotImplementedError)
    if not expected or os.environ.get("BLSP_TRACEBACK"):
        traceback.print_exception(error)
    message = _one_line(str(error)) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        message += f"; install it with: pip install 'blsp[{EXTRAS[str(error.name).partition('.')[0]]}]'"
    if not expected:
        message = f"{type(error).__name__}: {message} (unexpected: please report it with the lines above)"
    print(f"blsp: error: {message}", file=sys.stderr)
    return FAILED


def _wrong(message: str) -> int:
    print(f"blsp: error: {_one_line(message)}", file=sys.stderr)
    return WRONG_COMMAND_LINE


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- plugins: your own Python files (docs/extending.md) ----------------------------------------------------
class PluginError(ImportError):
    """A plugin that cannot be imported; the message names it."""


def load_plugins() -> None:
    """Import all plugins once, before flags are read; raises PluginError for one that is missing or fails.

    Plugins are the modules and files that BLSP_PLUGINS names, separated by commas, and installed packages with an
    entry point in the group `blsp.plugins`. They add entries to `ADAPTERS`, `LOSSES` and `READERS`.
    """
    from importlib.metadata import entry_points  # not at the top: it would slow --help down by half

    installed = [entry.module for entry in entry_points(group="blsp.plugins")]
    named = [name.strip() for name in os.environ.get("BLSP_PLUGINS", "").split(",") if name.strip()]
    for name in installed + named:
        try:
            _import_file(Path(name)) if name.endswith(".py") else import_module(name)
        except Exception as error:
            raise PluginError(f"plugin {name} (of BLSP_PLUGINS): {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    """Run a file as the module of its name, once a process."""
    path = path.resolve()
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return
    if loaded is not None:
        raise ImportError(f"a module {path.stem!r} is loaded already; give the file another name")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


if __name__ == "__main__":
    sys.exit(main())
