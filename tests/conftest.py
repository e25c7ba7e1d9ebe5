"""What every test can count on: one thread, fixed seeds, no network, and tiny random models as folders.

    def test_something(tiny_llm, tiny_whisper):
        folder = tiny_llm("qwen3")          # llama, qwen2, qwen3, gemma2, gemma3; made once a session
        ears = tiny_whisper

The models themselves are described in tiny_models.py; in memory and in float64: `tiny_models.tiny_blsp`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

os.environ |= {  # before torch is imported, and for the processes that tests start
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from support.tiny_models import save_language_model, save_whisper, tiny_blsp
from tqdm import tqdm

from blsp.model.modeling_blsp import BlspForConditionalGeneration
from blsp.model.processing_blsp import BlspProcessor

# tqdm's lock is shared with forked processes: if a test killed one while it drew a bar, the lock would stay taken
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
hypothesis_settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
hypothesis_settings.load_profile("tests")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Each test starts from the same random state, whichever ran before it."""
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's tiny models lie: read them, do not write into them."""
    return tmp_path_factory.mktemp("tiny-models")


@pytest.fixture(scope="session")
def tiny_llm(tiny_models_folder: Path) -> Callable[[str], str]:
    """`tiny_llm(family)` is the folder of a random LLM of that family, with a ChatML tokenizer."""

    def folder_of(family: str = "llama") -> str:
        folder = tiny_models_folder / family
        return str(folder) if folder.exists() else save_language_model(folder, family)

    return folder_of


@pytest.fixture(scope="session")
def tiny_whisper(tiny_models_folder: Path) -> str:
    """The folder of a random Whisper, decoder and all."""
    folder = tiny_models_folder / "whisper"
    return str(folder) if folder.exists() else save_whisper(folder)


Pair = tuple[BlspForConditionalGeneration, BlspProcessor]


@pytest.fixture(scope="session")
def pair_of(tiny_models_folder: Path) -> Callable[..., Pair]:
    """`pair_of(adapter, family)` is a model and its processor, shared by all tests: do not change them."""
    made: dict[tuple[str, str], Pair] = {}

    def of(adapter: str = "conv", family: str = "llama") -> Pair:
        if (adapter, family) not in made:
            made[adapter, family] = tiny_blsp(tiny_models_folder, family=family, adapter=adapter)
        return made[adapter, family]

    return of
