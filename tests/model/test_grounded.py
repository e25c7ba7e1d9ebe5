"""Expected embeddings: close to those over all tokens, and independent of the other clips in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from blsp.model.grounded import NEGLIGIBLE, read_out

CLASSES, WIDTH = 2000, 16


def peaked(seed: int, frames: int = 12) -> tuple[Tensor, Tensor]:
    """Log-probabilities (1, S, K) as a trained read-out gives them, and a table (K-1, D)."""
    torch.manual_seed(seed)
    scores = 2 * torch.randn(1, frames, CLASSES + 1, dtype=torch.float64)
    best = torch.randint(0, CLASSES + 1, (1, frames, 1))
    scores.scatter_add_(2, best, torch.full(best.shape, 18.0, dtype=torch.float64))
    return scores.log_softmax(-1), torch.randn(CLASSES, WIDTH, dtype=torch.float64)


def test_what_is_unlikely_moves_no_vector() -> None:
    log_probs, table = peaked(0, frames=1)
    log_probs[..., 0] = -torch.inf  # nothing but tokens
    (vector,) = read_out(log_probs, torch.tensor([1]), table).vectors[0]
    whole = log_probs[0, 0, 1:].softmax(-1) @ table
    assert 0 < float((vector - whole).norm()) < 1e-3 * float(whole.norm())
    likely = log_probs[0, 0, 1:] >= log_probs.max() + torch.tensor(NEGLIGIBLE).log()
    assert 1 < int(likely.sum()) < CLASSES  # some tokens take part, not all


def test_an_expected_embedding_is_a_weighted_mean_of_token_embeddings() -> None:
    """Blank's share of a frame does not shorten the vector: the tokens' posteriors are made to sum to 1."""
    log_probs = torch.tensor([[[0.3, 0.42, 0.28]]], dtype=torch.float64).log()  # blank, two tokens
    table = torch.randn(2, WIDTH, dtype=torch.float64)
    (vector,) = read_out(log_probs, torch.tensor([1]), table).vectors[0]
    torch.testing.assert_close(vector, 0.6 * table[0] + 0.4 * table[1], rtol=0, atol=1e-12)


def test_a_clip_is_heard_alike_in_any_company() -> None:
    (first, table), (second, _) = peaked(1), peaked(2)
    lengths = torch.tensor([12])
    alone = read_out(first, lengths, table)
    together = read_out(torch.cat([first, second]), lengths.repeat(2), table)
    assert together.readout is not None and alone.readout == together.readout[:1]
    torch.testing.assert_close(together.vectors[:1], alone.vectors, rtol=0, atol=1e-12)


def test_a_run_of_one_token_is_one_vector() -> None:
    """Equal tokens are two only if a blank is between them; a run's vector is the mean over its frames."""
    path = torch.tensor([0, 2, 2, 0, 2, 1, 1])
    scores = torch.randn(1, 7, 3, dtype=torch.float64)
    scores[0, torch.arange(7), path] += 5  # the likeliest class of each frame
    table = torch.randn(2, WIDTH, dtype=torch.float64)
    output = read_out(scores.log_softmax(-1), torch.tensor([7]), table)
    assert output.readout == [[1, 1, 0]] and output.valid[0].tolist() == [True] * 3 + [False] * 4
    posteriors = scores[0, :, 1:].softmax(-1)  # without blank
    expected = [posteriors[frames].mean(dim=0) @ table for frames in ([1, 2], [4], [5, 6])]
    torch.testing.assert_close(output.vectors[0, :3], torch.stack(expected), rtol=0, atol=1e-12)
