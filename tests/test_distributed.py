"""Ranks: the same sums as one process, with only a launcher's environment variables."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from blsp.distributed import Runtime, find_runtime, reduce_gradients, shard_rows, sum_across
from blsp.evaluation import judge
from blsp.inference import generate as generating
from blsp.settings import EvaluateSettings, GenerateSettings

CPU = torch.device("cpu")


def run_ranks(program: str, world: int = 2) -> list[str]:
    """Run `program` as the ranks of a launch and return what each printed.

    The ranks are forks of this process, which has imported torch already; torchrun itself is tried below.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        outputs = [Path(folder) / f"rank{rank}" for rank in range(world)]
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_be_rank, args=(program, r, world, port, outputs[r])) for r in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        printed = [output.read_text() for output in outputs]
        assert [process.exitcode for process in ranks] == [0] * world, "\n".join(printed)
        return [text.strip() for text in printed]


def _be_rank(program: str, rank: int, world: int, port: str, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with output.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=out)
            raise


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16", None])
def test_fastest_is_bfloat16_where_the_processor_multiplies_it(
    has: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False} | ({has: True} if has else {}))
    assert find_runtime("cpu", "fastest").dtype == (torch.bfloat16 if has else torch.float32)
    assert find_runtime("cpu", "auto").dtype == torch.float32


def test_one_process_is_rank_0_of_1() -> None:
    assert find_runtime("cpu") == Runtime(CPU, torch.float32, 0, 1)
    assert find_runtime("cpu", "float64").dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "named"), [(("tpu-ish",), "tpu-ish"), (("cpu", "int3"), "int3"), (("cuda:77",), "cuda:77")]
)
def test_what_is_not_there_is_named(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        find_runtime(*arguments)


def test_a_world_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        find_runtime("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        find_runtime("cpu")


def test_every_row_is_one_ranks() -> None:
    for n in (0, 1, 2, 7, 12):
        shares = [shard_rows(n, Runtime(CPU, torch.float32, rank, 3)) for rank in range(3)]
        assert sorted(row for share in shares for row in share) == list(range(n))


def test_alone_nothing_is_summed() -> None:
    runtime = Runtime(CPU, torch.float32)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    reduce_gradients([parameter], runtime)
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert sum_across(torch.tensor([3.0]), runtime).item() == 3.0


SUMS = """
import torch
from blsp.distributed import *
runtime = find_runtime("cpu")
assert find_runtime("cpu") == runtime
torch.manual_seed(0)
adapter = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
adapter[2].bias.requires_grad_(False)
unused = torch.nn.Parameter(torch.zeros(3))
speech, target = torch.randn(8, 6).double(), torch.randn(8, 2).double()
rows = list(shard_rows(8, runtime))
loss = ((adapter(speech[rows]) - target[rows]) ** 2).sum() / 8
loss.backward()
if runtime.rank == 1:
    adapter[0].bias.grad = None   # a rank may lack a gradient that another has
mine = [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]
reduce_gradients([*adapter.parameters(), unused], runtime)
assert unused.grad is None and adapter[2].bias.grad is None
total = sum_across(loss, runtime)
assert total is not loss
shared = [p.grad.clone() for p in adapter.parameters() if p.requires_grad]
adapter.zero_grad()
if runtime.rank == 0:
    assert torch.equal(shared[1], mine[1])
whole = ((adapter(speech) - target) ** 2).sum() / 8
whole.backward()
for i, p in enumerate(p for p in adapter.parameters() if p.requires_grad):
    if i != 1:
        torch.testing.assert_close(shared[i], p.grad, atol=1e-12, rtol=0)
torch.testing.assert_close(total, whole, atol=1e-12, rtol=0)
barrier(runtime)
print(" ".join(g.numpy().tobytes().hex() for g in shared))
leave(runtime)
"""


def test_two_processes_have_the_gradients_of_one() -> None:
    first, second = run_ranks(SUMS)
    assert first == second, "every rank must hold the same sum, to the bit"


def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(
        "import torch\nfrom blsp.distributed import *\nruntime = find_runtime('cpu')\n"
        "print(int(sum_across(torch.tensor([runtime.rank + 1]), runtime)), flush=True)\nleave(runtime)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3") == 2  # the ranks may write into one line


SHARED = """
from pathlib import Path
from blsp import cli
home = Path({home!r})
flags = ["--model", str(home / "adapter"), "--batch-size", "2", "--dtype", "float32", "--device", "cpu"]
rows = ["--manifest", str(home / "in.jsonl"), "--out", str(home / "{out}.jsonl"), "--max-new-tokens", "4"]
assert cli.main(["generate", *rows, *flags]) == 0
task = ["--task", str(home / "task.yaml"), "--out", str(home / "{out}"), "--routes", "text", "speech"]
assert cli.main(["evaluate", *task, "--bootstrap", "20", *flags]) == 0
"""


def test_generate_and_evaluate_share_rows(tmp_path: Path, tiny_models_folder: Path) -> None:
    """Two ranks write the bytes of one, each row once; no rank works on rows of the other."""
    from support.tiny_models import speech_like, tiny_blsp

    from blsp.data.audio import write_wav
    from blsp.data.manifest import write_manifest
    from blsp.model.checkpoint import save_adapter

    save_adapter(*tiny_blsp(tiny_models_folder, adapter="grounded", runtime=find_runtime("cpu")), tmp_path / "adapter")
    rows = [{"id": f"{i}", "audio": f"{i}.wav", "text": f"word {i}"} for i in range(19)]
    for i in range(len(rows)):
        write_wav(tmp_path / f"{i}.wav", speech_like(0.4 + 0.1 * (i % 7), i))
    (tmp_path / "3.wav").write_bytes(b"RIFF no wave")
    write_manifest(tmp_path / "in.jsonl", rows)
    (tmp_path / "task.yaml").write_text("name: mine\nkind: asr\nmanifest: in.jsonl\nlanguage: en\n")
    for out, world in (("one", 1), ("two", 2)):
        printed = run_ranks(SHARED.format(home=str(tmp_path), out=out), world)
        assert all("rows answered" not in text for text in printed[1:])
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 18
    for name in ("{}.jsonl", "{}.jsonl.skipped.jsonl", "{}/samples.jsonl"):
        assert (tmp_path / name.format("two")).read_bytes() == (tmp_path / name.format("one")).read_bytes()


@pytest.mark.parametrize("module", [judge, generating])
def test_generate_and_evaluate_wait_as_long_as_they_are_told(module: Any, monkeypatch, tmp_path: Path) -> None:
    def found(*_: Any, minutes: float) -> None:
        raise RuntimeError(f"{minutes} minutes")

    (tmp_path / "rows.jsonl").write_text('{"id": "a", "audio": "a.wav"}\n')
    monkeypatch.setattr(module, "find_runtime", found)
    with pytest.raises(RuntimeError, match="7 minutes"):
        if module is judge:
            judge.evaluate(EvaluateSettings(out=tmp_path / "out", suite="tiny", collective_minutes=7))
        else:
            manifest = str(tmp_path / "rows.jsonl")
            generating.generate(GenerateSettings(manifest=manifest, out=tmp_path / "out", collective_minutes=7))


def test_a_command_that_shares_no_work_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from blsp import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["transcribe", "a.wav"]) == cli.WRONG_COMMAND_LINE
    assert "torchrun" in capsys.readouterr().err
