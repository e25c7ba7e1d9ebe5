"""Stored top-k of the teacher: the K most probable tokens at each step of each continuation, on disk.

In:  the folder beside a continuations file: `out.jsonl` -> `out.jsonl.topk/`.
Out: for a row number, the K most probable tokens of each step and their log-probabilities.
Try: `ids, logp = TopKStore(topk_folder("out.jsonl")).get(0)`
Flow: writer.py (`--top-k`, `--score-only`) → **topk.py** → training, whose `kl` loss then needs no teacher pass

    ids.u32     (steps, K) token ids, most probable first
    logp.f16    (steps, K) natural logarithms, at meta.json's temperature; the tail has 1 - sum(exp(logp))
    index.npy   (rows, 2) int64: first step and number of steps of each row of the continuations file
    meta.json   k, temperature, rows, steps, the LLM's digest; whether steps were generated or teacher-forced

Steps are the continuation's tokens and, if it stopped by itself, the end-of-sequence step. Rows with equal prompts
share their steps. A row without speech has none, as its answer is a fixed sentence.

Shapes: N steps of one row, K top-k.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from blsp.data.files import take_room, write_atomically, write_json


class TopKError(ValueError):
    """A top-k folder that cannot be used; the message names it and says what to do."""


def topk_folder(out: str | os.PathLike[str]) -> Path:
    """The folder that belongs to a continuations file."""
    return Path(f"{os.fspath(out)}.topk")


class TopKStore:
    """The steps of any row; the files are memory-mapped."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.k, self.temperature = int(self.meta["k"]), float(self.meta["temperature"])
            self._index = np.load(self.folder / "index.npy", mmap_mode="r")  # (rows, 2)
            shape = (int(self.meta["steps"]), self.k)
            self._ids = _open_matrix(self.folder / "ids.u32", np.dtype("<u4"), shape)
            self._logp = _open_matrix(self.folder / "logp.f16", np.dtype("<f2"), shape)
        except (OSError, KeyError, ValueError) as error:
            raise TopKError(
                f"{self.folder}: no usable top-k ({error}); write it with blsp continue --top-k, "
                "or add it with blsp continue --score-only"
            ) from error

    def __len__(self) -> int:
        return len(self._index)

    def get(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (n, K) uint32 and logp (n, K) float16 of row number `row` in the continuations file."""
        first, steps = (int(value) for value in self._index[row])
        return self._ids[first : first + steps], self._logp[first : first + steps]

    def require_temperature(self, temperature: float) -> None:
        """Raise TopKError unless the log-probabilities were taken at this temperature; it cannot be changed later."""
        if temperature != self.temperature:
            raise TopKError(
                f"{self.folder}: holds the teacher at temperature {self.temperature:g}, not {temperature:g}; "
                f"train at {self.temperature:g}, or remove the folder and run blsp continue --score-only "
                f"--top-k-temperature {temperature:g}"
            )


def write_top_k(
    target: Path,
    through: Path,
    firsts: Iterable[int | None],
    rows: int,
    read_steps: Callable[[int], tuple[np.ndarray, np.ndarray]],
    meta: dict[str, Any],
) -> None:
    """Write the folder at the path `through`, then rename it to `target`.

    firsts: for each row the number of the first row with an equal prompt, or None if the row has no steps.
    read_steps: ids (N, K) and logp (N, K) of such a first row. meta: `k` and other fields of meta.json.
    """
    with write_atomically(target, through=through) as folder:
        folder.mkdir()
        index = np.lib.format.open_memmap(folder / "index.npy", "w+", np.int64, (rows, 2))
        take_room(folder / "index.npy")
        total = 0
        with open(folder / "ids.u32", "wb") as ids_file, open(folder / "logp.f16", "wb") as logp_file:
            for row, first in enumerate(firsts):
                if first == row:
                    ids, logp = read_steps(row)
                    ids_file.write(ids.astype("<u4").tobytes())
                    logp_file.write(logp.astype("<f2").tobytes())
                    index[row] = (total, len(ids))
                    total += len(ids)
                elif first is not None:
                    index[row] = index[first]
        index.flush()
        write_json(folder / "meta.json", meta | {"rows": rows, "steps": total})


def _open_matrix(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    size, expected = path.stat().st_size, shape[0] * shape[1] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes, but meta.json announces {expected}")
    return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)
