"""The command line: fast and complete help, checked settings, exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blsp
from blsp import cli, settings
from blsp.settings import SettingsError, TrainSettings

TRAIN = [
    "--data",
    "c.jsonl",
    "--out",
    "runs/x",
    "--audio-model",
    "a",
    "--llm",
    "l",
    "--adapter",
    "conv",
    "--loss",
    "ce",
]
MINIMAL = {
    "prepare": ["folder", "--root", "r", "--out", "o.jsonl"],
    "continue": ["--manifest", "m.jsonl", "--out", "o.jsonl", "--llm", "l"],
    "encode": ["--manifest", "m.jsonl", "--audio-model", "a", "--cache", "c"],
    "align": ["--manifest", "m.jsonl", "--cache", "c"],
    "train": TRAIN,
    "evaluate": ["--suite", "tiny", "--out", "results/x"],
    "generate": ["--manifest", "m.jsonl", "--out", "o.jsonl"],
    "transcribe": ["a.wav", "b.wav"],
    "chat": [],
    "serve": [],
    "move": ["--llm", "embedded:x", "--out", "moved"],
    "export": ["--out", "merged"],
    "tour": [],
}


def exit_code(arguments: list[str]) -> int:
    """What the process would exit with, in this process."""
    try:
        return cli.main(arguments)
    except SystemExit as done:
        assert isinstance(done.code, int)
        return done.code


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`does(command, function)` puts `function` in the place of what the command would call."""

    def replace(name: str, function: Any) -> None:
        command = cli.COMMANDS[name]
        monkeypatch.setitem(sys.modules, command.module, types.SimpleNamespace(**{command.function: function}))

    return replace


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_commands_help_teaches_without_torch(name: str) -> None:
    program = f"""
import sys, blsp.cli
try:
    blsp.cli.main([{name!r}, "--help"])
except SystemExit as done:
    sys.exit(done.code or 10 * ("torch" in sys.modules))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0
    assert f"$ blsp {name}" in answer.stdout, "an example to copy"
    kind = getattr(settings, cli.COMMANDS[name].settings)
    for field in dataclasses.fields(kind):
        if field.name != "stages" and "Positional" not in str(field.type):
            assert f"--{field.name.replace('_', '-')}" in answer.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_calls_one_function_with_its_settings(name: str, does: Any) -> None:
    seen: list[Any] = []
    does(name, seen.append)
    assert cli.main([name, *MINIMAL[name]]) == 0
    assert type(seen[0]).__name__ == cli.COMMANDS[name].settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].device = "other"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_commands_function_is_where_the_door_says(name: str) -> None:
    command = cli.COMMANDS[name]
    folder = Path(blsp.__file__).parent.joinpath(*command.module.split(".")[1:])
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    assert re.search(rf"^def {command.function}\(|\b{command.function}\b", file.read_text(), re.M)


def test_defaults_are_the_papers() -> None:
    train = cli.parse("train", TRAIN)
    assert (train.lr, train.weight_decay, train.warmup_steps, train.clip) == (5e-5, 0.05, 1000, 1.0)
    assert (train.batch_size, train.epochs) == (768, 1)
    assert cli.parse("continue", MINIMAL["continue"]).max_new_tokens == 64
    assert cli.parse("generate", MINIMAL["generate"]).max_new_tokens == 128


PAPERS_TRAINING = ["--data", "d", "--out", "o", "--audio-model", "a", "--llm", "l", "--paper"]


def test_the_papers_settings_are_one_flag() -> None:
    train = cli.parse("train", PAPERS_TRAINING)
    assert (train.adapter, train.loss, train.schedule, train.batch_size) == ("conv", "ce", "linear", 768)
    assert train.pad_to_30s and "embedding_std=1" in train.adapter_options and train.dtype == "bfloat16"
    assert cli.parse("continue", [*MINIMAL["continue"], "--paper"]).normalise == "whisper"
    assert cli.parse("encode", [*MINIMAL["encode"], "--paper"]).pad_to_30s


def test_flags_and_files_win_over_the_papers_settings(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("paper: true\nlr: 1e-3\nbatch-size: 16\n")
    train = cli.parse("train", [*PAPERS_TRAINING[:-1], "--config", str(file), "--batch-size", "8"])
    assert (train.lr, train.batch_size, train.schedule, train.paper) == (1e-3, 8, "linear", True)


@pytest.mark.parametrize("name", ["continue", "encode", "train", "evaluate", "generate", "move", "export"])
def test_data_and_models_have_no_default(name: str) -> None:
    assert exit_code([name]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["train", *TRAIN, "--leraning-rate", "1"],
        ["train", *TRAIN, "--lr", "fast"],
        ["train", *TRAIN, "--lr", "-1"],
        ["train", *TRAIN, "--adapter", "mlp"],
        ["train", *TRAIN, "--loss", "ctc"],
        ["train", "--config", "/nowhere.yaml"],
        ["transcribe"],
        ["transcribe", "a.wav", "--readout", "--repeat"],
        ["evaluate", "--out", "x"],
        ["continue", *MINIMAL["continue"], "--engine-url", "http://x", "--top-k", "8"],
        ["continue", *MINIMAL["continue"], "--score-only"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    answer = capsys.readouterr()
    assert answer.err or not arguments


@pytest.mark.parametrize("error", [FileNotFoundError("no such file: x.wav"), ValueError("two\nlines")])
def test_an_expected_error_is_one_line_and_exits_with_1(
    error: Exception, does: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise error

    does("chat", fail)
    assert cli.main(["chat"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["blsp: error: " + str(error).replace("\n", " ")]


def test_flags_that_do_not_fit_each_other_exit_with_2(
    does: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--data", "x.jsonl", "--out", str(tmp_path), "--audio-model", "A", "--llm", "L"]
    assert cli.main(["train", *flags, "--adapter", "conv", "--loss", "ctc"]) == 2
    assert "--loss ctc: needs an adapter that reads out (grounded)" in capsys.readouterr().err

    def refuse(_: Any) -> None:
        raise SettingsError("bad")

    does("chat", refuse)
    assert cli.main(["chat"]) == 2


def test_an_unexpected_error_shows_where_it_arose(does: Any, capsys: pytest.CaptureFixture[str]) -> None:
    does("chat", lambda _: {}["missing"])
    assert cli.main(["chat"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("blsp: error: KeyError")


def test_a_missing_extra_is_named(does: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    does("serve", fail)
    assert cli.main(["serve"]) == 1
    assert "pip install 'blsp[serve]'" in capsys.readouterr().err


def test_the_traceback_can_be_asked_for(
    does: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLSP_TRACEBACK", "1")
    does("chat", lambda _: int("three"))
    assert cli.main(["chat"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_and_own_exit_codes(does: Any) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    does("chat", interrupt)
    assert cli.main(["chat"]) == 130
    does("chat", lambda _: 1)
    assert cli.main(["chat"]) == 1


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = f"{sys.executable} -m blsp train --help | head -1"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert answer.stdout.startswith("usage: blsp train") and "Traceback" not in answer.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"blsp {blsp.__version__}\n"


RECIPE = """
data: [plain.jsonl, more.jsonl]
out: runs/recipe
audio-model: embedded:whisper-tiny.en
llm: embedded:smollm2-135m-instruct
adapter: grounded
lr: 1e-3
batch-size: 64
init-from: seed-adapter
cache: null
activation_checkpointing: true
stages:
  - {name: grounding, loss: ctc, steps: 100}
  - name: alignment
    loss: kl
    lr: 1e-4
    data: continued.jsonl
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_stages_inherit_the_top_level_and_follow_one_another(recipe: Path) -> None:
    whole: TrainSettings = cli.parse("train", ["--config", str(recipe)])
    grounding, alignment = whole.stages
    assert (whole.out, grounding.out) == (Path("runs/recipe"), Path("runs/recipe/stages/grounding"))
    assert (grounding.loss, grounding.lr, grounding.steps) == ("ctc", 1e-3, 100)
    assert (alignment.loss, alignment.lr, alignment.steps) == ("kl", 1e-4, None)
    assert (grounding.data, alignment.data) == (("plain.jsonl", "more.jsonl"), ("continued.jsonl",))
    assert (grounding.init_from, alignment.init_from) == (("seed-adapter",), ("runs/recipe/stages/grounding/adapter",))
    assert alignment.activation_checkpointing and alignment.cache is None
    assert not grounding.stages and not alignment.stages


def test_the_command_line_wins_over_the_file_in_every_stage(recipe: Path) -> None:
    whole = cli.parse(
        "train", [f"--config={recipe}", "--steps", "3", "--out", "elsewhere", "--no-activation-checkpointing"]
    )
    assert [stage.steps for stage in whole.stages] == [3, 3]
    assert whole.stages[1].out == Path("elsewhere/stages/alignment")
    assert whole.stages[1].init_from == ("elsewhere/stages/grounding/adapter",)
    assert not whole.stages[0].activation_checkpointing


@pytest.mark.parametrize(
    ("named", "start"),
    [
        ("grounding", ("elsewhere/stages/grounding/adapter",)),
        ("other/adapter", ("other/adapter",)),
        ("[alignment, other]", ("elsewhere/stages/alignment/adapter", "other")),
    ],
)
def test_a_stage_may_start_from_earlier_ones_or_from_adapters(recipe: Path, named: str, start: tuple[str, ...]) -> None:
    recipe.write_text(f"{RECIPE}  - {{name: again, loss: ctc, init-from: {named}}}\n")
    flags = ["--config", str(recipe), "--out", "elsewhere", "--init-from", "typed"]
    assert [stage.init_from for stage in cli.parse("train", flags).stages] == [
        ("typed",), ("elsewhere/stages/grounding/adapter",), start,
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["generate --manifest m --out o", "chat", "continue --manifest m --out o --llm l"])
@pytest.mark.parametrize("flag", ["--top-p 0", "--temperature -1", "--temperature nan"])
def test_what_nothing_can_be_drawn_with_is_refused(command: str, flag: str, capsys) -> None:
    name, *flags = f"{command} {flag}".split()
    with pytest.raises(SystemExit, match="2"):
        cli.parse(name, flags)
    assert flag.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "generate --manifest m --out o --limit 0",
        "continue --manifest m --out o --llm l --limit -1",
        "encode --manifest m --audio-model a --cache c --limit 0",
        "serve --prefix-cache -1",
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(line: str, capsys) -> None:
    name, *flags = line.split()
    with pytest.raises(SystemExit, match="2"):
        cli.parse(name, flags)
    assert flags[-2] in capsys.readouterr().err


def test_a_flag_that_takes_several_values_may_be_repeated(tmp_path: Path) -> None:
    flags = ["--out", "o", "--task", "a", "--limit", "3", "--task", "b", "c", "--peer=m@http://x", "--seed", "-1"]
    settings = cli.parse("evaluate", flags)
    assert settings.task == ("a", "b", "c") and settings.peer == ("m@http://x",)
    assert (settings.limit, settings.seed, settings.out) == (3, -1, Path("o"))
    file = tmp_path / "evaluate.yaml"
    file.write_text("task: [x, y]\nroutes: [text]\nout: elsewhere\n")
    settings = cli.parse("evaluate", ["--config", str(file), "--task", "a", "--task", "b"])
    assert settings.task == ("a", "b") and settings.routes == ("text",)  # the file is still overruled


def test_a_file_is_the_same_flags_written_down(tmp_path: Path) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text("corpus: folder\nroot: r\nout: o.jsonl\ncheck-audio: true\n")
    read = cli.parse("prepare", ["--config", str(file)])
    typed = cli.parse("prepare", [*MINIMAL["prepare"], "--check-audio", "--config", str(file)][1:])
    assert read == dataclasses.replace(typed, config=file) and read.corpus == "folder" and read.check_audio


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("leraning-rate: 1", "unknown setting 'leraning_rate'"),
        ("batchsize: 1", "did you mean 'batch_size'"),
        ("lr: true", "lr: True is not float"),
        ("pad-to-30s: 3", "pad_to_30s: 3 is not true or false"),
        ("lr: [1, 2]", "takes one value"),
        ("data: {a: b}", "is not tuple"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("\x00", "cannot be read"),
        ("1: 2", "must hold a mapping"),
        ("config: x", "unknown setting 'config'"),
        ("stages: 3", "must be a list of mappings"),
        ("stages: []", "must be a list of mappings"),
        ("stages: [{loss: ce}]", "each needs a name"),
        ("stages: [{name: ../x, loss: ce}]", "each needs a name"),
        ("stages: [{name: a}, {name: a}]", "each needs a name"),
        ("stages: [{name: a, out: b}]", "belong to the top level"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_it(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert cli.main(["train", "--config", str(file), *TRAIN]) == 2
    err = capsys.readouterr().err
    assert complaint in err and str(file) in err and len(err.splitlines()) == 1


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
keys = st.sampled_from([field.name for field in dataclasses.fields(TrainSettings)]) | st.text(max_size=8)


@given(st.dictionaries(keys, values, max_size=4))
def test_no_file_makes_a_traceback(mapping: dict[str, Any]) -> None:
    import contextlib
    import io
    import tempfile

    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, contextlib.redirect_stderr(io.StringIO()):
        yaml.safe_dump(mapping, file, allow_unicode=True)
        file.flush()
        try:
            parsed = cli.parse("train", ["--config", file.name, *TRAIN])
        except SettingsError:
            return
        except SystemExit as done:
            assert done.code == 2
            return
        assert isinstance(parsed, TrainSettings)


def test_the_shipped_adapter_is_the_one_default_name() -> None:
    from blsp.distributed import find_runtime
    from blsp.model.checkpoint import load_blsp
    from blsp.weights.shipped import SHIPPED, find_model

    assert cli.parse("chat", []).model == "blsp-tiny"
    assert find_model("owner/adapter") == "owner/adapter"  # the hub is asked when it is loaded
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_model("runs/x/adapter")
    with pytest.raises(FileNotFoundError, match="the hub cannot be asked"):  # the tests are offline
        load_blsp("owner/adapter", find_runtime("cpu", "float32"))
    for name in SHIPPED:
        try:
            assert Path(find_model(name), "config.json").is_file()
        except FileNotFoundError as error:
            assert name in str(error) and "--model" in str(error)


def test_public_names_are_lazy_and_named_when_missing() -> None:
    assert blsp.Utterance.__module__ == "blsp.data.manifest"
    assert set(blsp.__all__) == set(dir(blsp))
    with pytest.raises(AttributeError, match="listen_up"):
        _ = blsp.listen_up


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_group_of_flags_names_fields(name: str) -> None:
    kind = getattr(settings, cli.COMMANDS[name].settings)
    named = [field for group in getattr(kind, "GROUPS", {}).values() for field in group.split()]
    assert len(named) == len(set(named))
    assert set(named) <= {field.name for field in dataclasses.fields(kind)}


def test_help_shows_flags_in_groups_under_their_own_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for group in ("data options", "model options", "optimisation options", "compute and memory options"):
        assert group in shown
    assert re.search(r"--lr FLOAT", shown) and "optimisation.lr" not in shown


def test_a_choice_is_read_from_the_dict_that_owns_it(tmp_path: Path) -> None:
    """A plugin's entry is a choice at once, at the command line and in a file."""
    plugin = tmp_path / "my_corpus.py"
    plugin.write_text("from blsp.data.prepare import READERS\n\nREADERS['mine'] = lambda wanted: iter(())\n")
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text("corpus: mine\nroot: r\nout: o.jsonl\n")
    program = (
        "from blsp import cli\n"
        "assert cli.parse('prepare', ['mine', '--root', 'r', '--out', 'o']).corpus == 'mine'\n"
        f"assert cli.parse('prepare', ['--config', {str(recipe)!r}]).corpus == 'mine'\n"
    )
    for plugins, code in ((str(plugin), 0), ("", 2)):
        environment = os.environ | {"BLSP_PLUGINS": plugins}
        answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert answer.returncode == code, answer.stderr
    assert cli.main(["prepare", "--config", str(recipe)]) == 2


def test_a_plugin_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BLSP_PLUGINS", "nowhere/my_adapter.py")
    assert cli.main(["chat"]) == 2
    assert "plugin nowhere/my_adapter.py" in capsys.readouterr().err
