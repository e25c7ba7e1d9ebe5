"""An adapter moved to another LLM reads out what it read out before, in the tokens that both LLMs have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blsp import cli
from blsp.inference.listener import load
from blsp.model.checkpoint import CheckpointError
from blsp.model.grounded import GroundedAdapter, letter_groups
from blsp.model.move import common_tokens, move
from blsp.settings import MoveSettings

QUESTION = Path(__file__).parents[2] / "examples/speech/questions/capital-of-canada.opus"
SPEECH, OLD, NEW, CLASSES = 32, 16, 24, 60


def adapter(width: int) -> GroundedAdapter:
    options = {"classes": CLASSES, "hidden": 64, "layers": 1, "spelling": 8, "bottleneck": 4, "strides": (2, 2)}
    made = GroundedAdapter(SPEECH, width, **options).double().eval()
    made.spell([f" word{i}" for i in range(CLASSES)])
    return made


@torch.no_grad()
def test_where_the_new_embeddings_hold_the_old_ones_no_logit_changes() -> None:
    torch.manual_seed(0)
    old, new = adapter(OLD), adapter(NEW)
    for weight in old.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    # an isometry whose image has mean zero, as LayerNorm leaves it
    basis = torch.linalg.qr(torch.cat([torch.ones(NEW, 1), torch.randn(NEW, OLD)], dim=1).double()).Q[:, 1:]
    table = torch.randn(CLASSES, OLD).double()
    old.norm.weight.fill_(0.7)
    explained = new.move_from(old, torch.arange(CLASSES), (table, table @ basis.T), torch.ones(CLASSES).double())
    assert explained > 0.999

    states, lengths = torch.randn(2, 40, SPEECH).double(), torch.tensor([40, 25])
    before, _ = old.posteriors(states, lengths, table)
    after, _ = new.posteriors(states, lengths, table @ basis.T)
    assert float((after - before).abs().max()) < 0.05 * float(before.std())
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert torch.equal(new.spelling.groups, letter_groups([f" word{i}" for i in range(CLASSES)]))


def test_tokens_are_matched_by_their_strings() -> None:
    rows, ids = common_tokens([" the", " ", "cat", " cat", "cat"], ["x", " cat", " ", "cat", " the", "cat"])
    assert (rows, ids) == ([3, 2, 0], [1, 3, 4])


def test_the_command_moves_the_shipped_adapter(tmp_path: Path) -> None:
    code = cli.main(["move", "--llm", "embedded:smollm2-135m-instruct", "--out", str(tmp_path / "moved")])
    assert code == 0
    before, after = load("blsp-tiny", device="cpu"), load(tmp_path / "moved", device="cpu")
    heard = [listener.readout(listener.embed_audio([QUESTION]))[0] for listener in (before, after)]
    assert heard[0] == heard[1] != ""


def test_an_adapter_without_a_readout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="conv adapter reads nothing out"):
        move(MoveSettings(model="blsp-conv", llm="embedded:smollm2-135m-instruct", out=tmp_path / "moved"))
