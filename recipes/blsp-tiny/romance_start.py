"""The adapter that `train_romance.yaml` starts from: blsp-base's ears, the larger LLM's tokens.

In:  models/blsp-base (Whisper base, the read-out of another LLM) and the sentence lists under `texts/`.
Out: an adapter folder: the convolutions and attention layers of blsp-base, which hear; everything behind them new.
Where in the flow: before `blsp train`. The read-out vocabulary is what the larger LLM writes the lists with.

Try: `python recipes/blsp-tiny/romance_start.py --out runs/romance-start`
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from heldout import TEXTS, read_list

from blsp.distributed import find_runtime
from blsp.llm.prompt import transcript_ids
from blsp.model.adapter import adapter_state
from blsp.model.checkpoint import new_blsp, save_adapter
from blsp.model.configuration_blsp import BlspConfig
from blsp.model.loading import load_tokenizer
from blsp.weights.digest import find_weights
from blsp.weights.shipped import find_model

ENCODER, LLM = "embedded:whisper-base", "embedded:qwen2.5-coder-1.5b-instruct"
OPTIONS = {"strides": [2, 2], "layers": 3, "hidden": 384, "spelling": 192, "bottleneck": 192, "dropout": 0.05}
KEPT = ("stack.", "layers.")


def texts() -> list[str]:
    """Everything that may be spoken for training, in all four languages."""
    found = [row["text"] for row in read_list("fotaq_en")]
    for path in sorted(TEXTS.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [line.strip() for line in file]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the adapter folder to make")
    out = parser.parse_args().out
    llm = find_weights(LLM)
    tokenizer = load_tokenizer(llm)
    tokens = sorted({token for text in texts() for token in transcript_ids(tokenizer, text)})
    model, processor = new_blsp(
        find_weights(ENCODER), llm, find_runtime("cpu", "bfloat16"),
        adapter="grounded", adapter_options=OPTIONS, readout_vocabulary=tokens,
    )  # fmt: skip
    folder = find_model("blsp-base")
    old = adapter_state(folder, BlspConfig.from_pretrained(folder))
    kept = {name: tensor for name, tensor in old.items() if name.startswith(KEPT)}
    projector = model.model.multi_modal_projector
    projector.load_state_dict(projector.state_dict() | kept)
    save_adapter(model, processor, out)
    print(f"{out}: {len(tokens):,} tokens, {len(kept)} tensors of {folder}")


if __name__ == "__main__":
    main()
