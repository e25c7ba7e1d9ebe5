"""Spelling of tokens: groups of letters, and how shared groups help tokens that were never in the speech."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_blsp, tiny_tokenizer

from blsp.distributed import Runtime
from blsp.model.adapter import widen_readout
from blsp.model.checkpoint import load_blsp, save_adapter
from blsp.model.grounded import GROUPS, Spelling, letter_groups, token_strings


def groups_of(token: str) -> set[int]:
    return set(letter_groups([token])[0].tolist()) - {0}


def test_case_is_one_group_and_the_letters_are_shared() -> None:
    assert groups_of(" box") < groups_of(" Box")
    assert len(groups_of(" Box") - groups_of(" box")) == 1
    assert len(groups_of(" BOX") - groups_of(" Box")) == 1  # all capitals are another mark than one


def test_a_piece_shares_its_letters_with_the_words_that_hold_it() -> None:
    piece, word = groups_of("box"), groups_of(" mailbox")
    assert len(piece & word) == 9  # box, ox$, bo, ox, x$, b, o, x, $
    assert len(piece - word) == 3  # how it begins: +bo, +b, +


def test_long_tokens_keep_their_longest_groups() -> None:
    table = letter_groups([" internationalisation", " a"])
    assert (table[0] != 0).all() and table.shape == (2, GROUPS)
    assert 0 < int((table[1] != 0).sum()) < GROUPS


def test_token_strings_mark_where_a_word_begins() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("what is", add_special_tokens=False)
    strings = token_strings(tokenizer, ids)
    assert "".join(strings).split() == ["what", "is"]
    assert not strings[0].startswith(" ")
    assert any(each.startswith(" ") for each in strings[1:])


def test_all_tokens_and_some_tokens_have_the_same_logits() -> None:
    torch.manual_seed(0)
    spelling = Spelling(5, 8, 4).double()
    spelling.groups = letter_groups([" one", " two", " three", " four", "teen"])
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    whole = spelling(hidden)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(spelling(hidden, some), whole[..., some], rtol=0, atol=1e-12)
    with torch.no_grad():  # kept keys follow the weights
        torch.testing.assert_close(spelling(hidden), whole.detach(), rtol=0, atol=1e-12)
        spelling.letters.weight.mul_(2)
        torch.testing.assert_close(spelling(hidden), 2 * whole.detach(), rtol=0, atol=1e-12)


def test_a_token_that_was_never_heard_is_read_by_its_letters() -> None:
    """Learn " mailbox", " toolbar", … from vectors that add up letters; " toolbox" must come out unheard."""
    torch.manual_seed(0)
    words = [a + b for a in (" mail", " tool", " side", " fire") for b in ("box", "bar", "man", "line")]
    groups = letter_groups(words)
    sound = torch.randn(8192, 32)  # what a group of letters sounds like
    heard = torch.stack([sound[row[row != 0].long()].sum(0) for row in groups])
    unheard = words.index(" toolbox")
    spelling = Spelling(len(words), 32, 16)
    spelling.groups = groups
    optimiser = torch.optim.Adam(spelling.parameters(), lr=0.01)
    known = [i for i in range(len(words)) if i != unheard]
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(spelling(heard[known]), torch.tensor(known))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert spelling(heard).argmax(dim=-1)[unheard] == unheard


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_spelling_is_saved_with_the_adapter(tmp_path, dtype: torch.dtype) -> None:
    place = Runtime(torch.device("cpu"), torch.float32)
    model, processor = tiny_blsp(tmp_path, adapter="grounded", adapter_options={"spelling": 8}, runtime=place)
    save_adapter(model, processor, tmp_path / "saved", dtype=dtype)
    again, _ = load_blsp(tmp_path / "saved", place)
    before, after = (each.model.multi_modal_projector.spelling.groups for each in (model, again))
    assert before.any() and torch.equal(before, after)


def test_a_wider_read_out_is_spelled_anew(tmp_path) -> None:
    model, processor = tiny_blsp(
        tmp_path, adapter="grounded", adapter_options={"spelling": 8}, readout_vocabulary=list(range(10, 40))
    )
    first = model.model.multi_modal_projector.spelling.groups
    widen_readout(model.model.multi_modal_projector, model.config, [5, 50], processor.tokenizer)
    assert model.model.readout_vocabulary == [(token,) for token in [5, *range(10, 40), 50]]
    wider = model.model.multi_modal_projector.spelling.groups
    assert len(wider) == 32
    assert torch.equal(wider[1:-1], first)
