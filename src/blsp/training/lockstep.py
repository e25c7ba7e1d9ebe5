"""A sharded LLM is gathered layer by layer by all processes together, so all must run it equally often.

In:  a rank's micro-batches of a step. Out: the same, and empty ones until every rank has as many; `idle`, the pass
     of a rank that has nothing to ask in one of them.
Try: ``for batch in slots(batches, run): …``
Flow: training/loop.py with --shard-llm -> **lockstep.py**. Prefixes are not kept then and the teacher is a stored one:
      each slot is one forward and one backward, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from blsp.model.distributed import Place
from blsp.training.examples import Example
from blsp.training.prompted_llm import PromptedLLM


def slots(batches: list[list[Example]], place: Place) -> Iterator[list[Example]]:
    """`batches`, then empty ones, as many as the rank with the most has."""
    most = torch.tensor(len(batches), device=place.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    yield from batches
    yield from ([] for _ in range(int(most) - len(batches)))


def idle(llm: PromptedLLM) -> None:
    """Forward and backward over one position that nobody learns from."""
    weight = llm.model.get_input_embeddings().weight
    nothing = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    llm.states((), nothing).sum().backward()
