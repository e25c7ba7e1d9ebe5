"""Adapters that a training starts from: the ears of a shipped adapter, everything behind them new.

In:  a shipped adapter; for `romance` also the sentence lists under `texts/`, whose tokens are read out.
Out: an adapter folder.
     romance: the convolutions and attention layers of blsp-base, for the larger LLM (train_romance.yaml).
     conv: the paper's adapter, whose first two convolutions are those of blsp-tiny (train_conv.yaml).
Where in the flow: before `blsp train`.

Try: `python recipes/blsp-tiny/starts.py romance --out runs/romance-start`
"""

from __future__ import annotations

import argparse
import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heldout import TEXTS, read_list

from blsp.distributed import find_runtime
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter import adapter_class, adapter_state
from blsp.model.checkpoint import new_blsp, save_adapter
from blsp.model.configuration_blsp import BlspConfig
from blsp.model.loading import load_tokenizer
from blsp.weights.digest import find_weights
from blsp.weights.shipped import find_model


@dataclass(frozen=True)
class Start:
    """A new adapter, and the layers of `origin` that it takes over, by the beginnings of their names."""

    encoder: str
    llm: str
    adapter: str
    origin: str
    kept: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


ROMANCE = {"strides": [2, 2], "layers": 3, "hidden": 384, "spelling": 192, "bottleneck": 192, "dropout": 0.05}
STARTS = {
    "romance": Start(
        "embedded:whisper-base", "embedded:qwen2.5-coder-1.5b-instruct", "grounded", "blsp-base",
        ("stack.", "layers."), ROMANCE,
    ),
    "conv": Start(
        "embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct", "conv", "blsp-tiny",
        ("stack.convs.0.", "stack.convs.1."),
    ),
}  # fmt: skip


def texts() -> list[str]:
    """Everything that may be spoken for training, in all four languages."""
    found = [row["text"] for row in read_list("fotaq_en")]
    for path in sorted(TEXTS.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [line.strip() for line in file]
    return found


def make(start: Start, out: Path) -> int:
    """Write the adapter folder; returns how many tensors were taken over."""
    llm = find_weights(start.llm)
    vocabulary = None
    if adapter_class(start.adapter).reads_out:
        tokenizer = load_tokenizer(llm)
        vocabulary = sorted({token for text in texts() for token in transcript_ids(tokenizer, text)})
    model, processor = new_blsp(
        find_weights(start.encoder), llm, find_runtime("cpu", "bfloat16"),
        adapter=start.adapter, adapter_options=start.options, readout_vocabulary=vocabulary,
    )  # fmt: skip
    folder = find_model(start.origin)
    old = adapter_state(folder, BlspConfig.from_pretrained(folder))
    kept = {name: tensor for name, tensor in old.items() if name.startswith(start.kept)}
    projector = model.model.multi_modal_projector
    projector.load_state_dict(projector.state_dict() | kept)
    save_adapter(model, processor, out)
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=STARTS)
    parser.add_argument("--out", type=Path, required=True, help="the adapter folder to make")
    options = parser.parse_args()
    count = make(STARTS[options.name], options.out)
    print(f"{options.out}: {count} tensors of {STARTS[options.name].origin}")


if __name__ == "__main__":
    main()
