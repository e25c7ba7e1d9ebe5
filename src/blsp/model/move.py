"""`blsp move`: an adapter that reads out, moved to another LLM without training.

In:  an adapter folder, and the other LLM.
Out: an adapter folder for that LLM. It can be used at once, and training can start from it (`--init-from`).
Try: `blsp move --model blsp-tiny --llm embedded:qwen2.5-coder-1.5b-instruct --out moved`
Flow: checkpoint.py, grounded.py (the arithmetic) → **move.py** → checkpoint.py

What the adapter has learnt about sounds does not depend on the LLM. It still recognises tokens with the embeddings of
the LLM that it was trained with, so these are stored in the new folder. The new LLM gets what was read out in its own
tokens, which are found by their strings: " octopus" is one token of SmolLM2 and two tokens of Qwen2.5.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from blsp.distributed import find_runtime
from blsp.model.adapter import set_vocabulary
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
    old_rows = old.model.readout_vocabulary or [(token,) for token in range(config.text_config.vocab_size)]
    strings = ["".join(token_strings(old_processor.tokenizer, row)) for row in old_rows]

    llm = find_weights(settings.llm)
    tokenizer = load_tokenizer(llm)
    rows, tokens = spelled_anew(strings, token_strings(tokenizer, range(len(tokenizer))), tokenizer)
    table = old.model.readout_table()
    assert table is not None
    table = table[rows].float().cpu()
    new, processor = new_blsp(
        find_weights(config.audio_model_id),
        llm,
        runtime,
        adapter=config.adapter,
        adapter_options={"table_width": table.shape[1], **config.adapter_options},
        readout_vocabulary=[row[0] for row in tokens],
        full_window=config.full_window,
    )
    new_adapter = new.model.multi_modal_projector
    set_vocabulary(new_adapter, new.config, tokens)
    new_adapter.move_from(adapter.float().cpu(), torch.tensor(rows), table)
    new.config.rescore = True  # this LLM was not trained with the errors of the greedy path
    save_adapter(new, processor, settings.out)
    several = sum(len(row) > 1 for row in tokens)
    print(f"{settings.out}: reads out {len(rows):,} of {len(old_rows):,} tokens; {several:,} are several of this LLM")


def spelled_anew(
    old: Sequence[str], new: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The rows of `old` (token strings) that the LLM of `new` can write, and its tokens for each of them.

    A string that is a token of `new` is that token; another is tokenised. Of several rows with one string the first
    counts. White space and special tokens are not read out, nor is a part of a letter.
    """
    unread = {"", *tokenizer.all_special_tokens}
    first = {
        string: row
        for row, string in reversed(list(enumerate(old)))
        if string.strip() not in unread and "\N{REPLACEMENT CHARACTER}" not in string
    }
    single = {string: token for token, string in reversed(list(enumerate(new)))}
    tokens = {
        row: (single[string],) if string in single else tuple(tokenizer(string, add_special_tokens=False).input_ids)
        for string, row in first.items()
    }
    rows = sorted(tokens)
    return rows, [tokens[row] for row in rows]
