"""An adapter moved to another LLM reads out the same as before, in the tokens that both LLMs have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blsp import cli
from blsp.distributed import find_runtime
from blsp.inference.listener import load
from blsp.model.adapter import set_vocabulary
from blsp.model.adapter_parts import BLANK
from blsp.model.checkpoint import CheckpointError, load_blsp, save_adapter
from blsp.model.grounded import GroundedAdapter, read_out, token_strings
from blsp.model.loading import load_tokenizer
from blsp.model.move import move, spelled_anew
from blsp.settings import MoveSettings
from blsp.weights.digest import find_weights
from tests.support.tiny_models import tiny_blsp

QUESTION = Path(__file__).parents[2] / "examples/speech/questions/capital-of-canada.opus"
SPEECH, OLD, NEW, CLASSES = 32, 16, 24, 60


def adapter(width: int, classes: int, table_width: int | None = None) -> GroundedAdapter:
    sizes = {"hidden": 64, "layers": 1, "spelling": 8, "bottleneck": 4}
    made = GroundedAdapter(SPEECH, width, classes=classes, table_width=table_width, strides=(2, 2), **sizes)
    made = made.double().eval()
    made.spell([f" word{i}" for i in range(classes)])
    return made


@torch.no_grad()
def test_a_moved_adapter_hears_the_same_and_says_it_in_the_new_embeddings() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([1, 4, 5, 30])
    old, new = adapter(OLD, CLASSES), adapter(NEW, len(rows), table_width=OLD)
    for weight in old.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    new.spell([f" word{row}" for row in rows.tolist()])
    table, fresh = torch.randn(CLASSES, OLD).double(), torch.randn(len(rows), NEW).double()
    new.move_from(old, rows, table[rows])

    states, lengths = torch.randn(2, 40, SPEECH).double(), torch.tensor([40, 25])
    hidden, _ = old.hidden_states(states, lengths)
    kept = [BLANK, *(rows + 1).tolist()]
    before = old.logits(hidden, table)[..., kept].log_softmax(dim=-1)
    after, frames = new.posteriors(states, lengths, fresh)
    torch.testing.assert_close(after, before)
    heard = new(states, lengths, fresh)
    torch.testing.assert_close(heard.vectors, read_out(before, frames, fresh).vectors)

    again = adapter(NEW, 2, table_width=OLD)  # moved once more, it keeps the first LLM's table
    again.move_from(new, torch.tensor([0, 3]), fresh[[0, 3]])
    assert again.table is not None and torch.equal(again.table, table[rows[[0, 3]]])


def test_a_token_added_after_the_move_is_read_out_by_its_spelling() -> None:
    moved = adapter(NEW, 2, table_width=OLD)
    assert moved.table is not None
    moved.table.fill_(1.0)
    moved.widen([0, 2], [" word0", " new", " word1"])
    assert moved.table.tolist() == [[1.0] * OLD, [0.0] * OLD, [1.0] * OLD]
    logits = moved.logits(torch.randn(1, 3, OLD).double(), torch.randn(3, NEW).double())
    assert bool(logits.isfinite().all())


def test_a_token_becomes_the_same_string_in_the_new_tokens() -> None:
    tokenizer = load_tokenizer(find_weights("embedded:smollm2-135m-instruct"))
    new = token_strings(tokenizer, range(len(tokenizer)))
    rows, tokens = spelled_anew([" the", " ", "cat", " cat", "cat", "<|im_end|>", " Zyxwood", "\ufffd"], new, tokenizer)
    assert rows == [0, 2, 3, 6]
    assert [tokenizer.decode(row) for row in tokens] == [" the", "cat", " cat", " Zyxwood"]
    assert [len(row) for row in tokens[:3]] == [1, 1, 1] and len(tokens[3]) > 1


@torch.no_grad()
def test_a_row_of_several_tokens_is_read_out_written_and_loaded(tmp_path: Path) -> None:
    model, processor = tiny_blsp(tmp_path, adapter="grounded", readout_vocabulary=[10, 11, 12])
    adapter = model.model.multi_modal_projector
    set_vocabulary(adapter, model.config, [(10,), (20, 21, 22), (12, 13)])
    save_adapter(model, processor, tmp_path / "adapter")
    loaded, _ = load_blsp(tmp_path / "adapter", find_runtime("cpu"))
    assert loaded.model.readout_vocabulary == [(10,), (20, 21, 22), (12, 13)]
    assert loaded.model.readout_row() == {10: 0}

    table, embedding = loaded.model.readout_table(), loaded.get_input_embeddings()
    assert table is not None
    torch.testing.assert_close(table[1], embedding(torch.tensor([20, 21, 22])).mean(dim=0))
    torch.testing.assert_close(table[0], embedding(torch.tensor(10)))

    adapter = loaded.model.multi_modal_projector
    adapter.blank.bias.fill_(-100.0)
    adapter.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # every frame is the second row
    (clip,) = loaded.listen([torch.randn(24, loaded.config.audio_config.d_model)], beam=2)
    assert clip.token_ids == [20, 21, 22] and clip.hypotheses[0].tokens == (20, 21, 22)
    assert len(clip.vectors) == 1


def test_the_command_moves_the_shipped_adapter(tmp_path: Path) -> None:
    code = cli.main(["move", "--llm", "embedded:smollm2-135m-instruct", "--out", str(tmp_path / "moved")])
    assert code == 0
    before, after = load("blsp-tiny", device="cpu"), load(tmp_path / "moved", device="cpu")
    heard = [listener.readout(listener.embed_audio([QUESTION]))[0] for listener in (before, after)]
    assert heard[0] == heard[1] != ""


def test_an_adapter_without_a_readout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="conv adapter does not read out"):
        move(MoveSettings(model="blsp-conv", llm="embedded:smollm2-135m-instruct", out=tmp_path / "moved"))
