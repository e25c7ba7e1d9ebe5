"""`blsp move`: an adapter that reads out, moved to another LLM without training.

In:  an adapter folder, and the other LLM.
Out: an adapter folder for that LLM. It can be used at once, and training can start from it (`--init-from`).
Try: `blsp move --model blsp-tiny --llm embedded:qwen2.5-coder-1.5b-instruct --out moved`
Flow: checkpoint.py, grounded.py (the arithmetic) → **move.py** → checkpoint.py

What the adapter has learnt about sounds does not depend on the LLM. It still recognises tokens with the embeddings of
the LLM that it was trained with, so these are stored in the new folder. The new LLM gets its own embeddings of the same
tokens. Tokens are compared by their strings: the tokens that both LLMs have are the new read-out vocabulary.
"""

from collections.abc import Sequence

import torch

from blsp.distributed import find_runtime
from blsp.llm.language_model import embed
from blsp.model.checkpoint import load_blsp, new_blsp, save_adapter
from blsp.model.configuration_blsp import CheckpointError
from blsp.model.grounded import token_strings
from blsp.model.loading import load_tokenizer
from blsp.settings import MoveSettings
from blsp.weights.digest import find_weights


def move(settings: MoveSettings) -> None:
    """Write the adapter folder `settings.out`: the adapter `settings.model`, for the LLM `settings.llm`."""
    runtime = find_runtime(settings.device)
    old, old_processor = load_blsp(settings.model, runtime, settings.audio_model)
    adapter, config = old.model.multi_modal_projector, old.config
    if config.lora:
        raise CheckpointError(
            f"{settings.model}: has LoRA on {' and '.join(config.lora['parts'])}, which stays with it"
        )
    if not hasattr(adapter, "move_from"):
        raise CheckpointError(f"{settings.model}: a {config.adapter} adapter does not read out, so it cannot be moved")
    vocabulary = getattr(adapter, "vocabulary", None)  # None: the LLM's whole vocabulary
    old_ids = range(config.text_config.vocab_size) if vocabulary is None else vocabulary.tolist()

    llm = find_weights(settings.llm)
    tokenizer = load_tokenizer(llm)
    new_ids = range(len(tokenizer))
    rows, ids = common_tokens(token_strings(old_processor.tokenizer, old_ids), token_strings(tokenizer, new_ids))
    table = embed(old.model.language_model, [old_ids[row] for row in rows]).float().cpu()
    new, processor = new_blsp(
        find_weights(config.audio_model_id),
        llm,
        runtime,
        adapter=config.adapter,
        adapter_options={"table_width": table.shape[1], **config.adapter_options},
        readout_vocabulary=ids,
        full_window=config.full_window,
    )
    new.model.multi_modal_projector.move_from(adapter.float().cpu(), torch.tensor(rows), table)
    new.config.rescore = True  # this LLM was not trained with the errors of the greedy path
    save_adapter(new, processor, settings.out)
    print(f"{settings.out}: reads out {len(ids):,} tokens, of {len(old_ids):,} before")


def common_tokens(old: Sequence[str], new: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens in both lists: their rows in the old list and their rows in the new list, in the new order.

    Of several rows with the same string the first counts; tokens of only white space are left out.
    """
    first = {string: row for row, string in reversed(list(enumerate(old))) if string.strip()}
    pairs = {first.pop(string): row for row, string in enumerate(new) if string in first}
    return list(pairs), list(pairs.values())
