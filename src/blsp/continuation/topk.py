"""The teacher's top-k log-probabilities of every step of every continuation, on disk.

In:  the folder beside a continuations file: `out.jsonl` -> `out.jsonl.topk/`.
Out: for a row number, the K most probable tokens of each step and their log-probabilities.
Try: `ids, logp = TopKStore(topk_folder("out.jsonl")).get(0)`
Flow: continuation/ — written by step 1 (`--top-k`, `--score-only`); with it the `kl` loss runs no teacher.

    ids.u32     (steps, K) token ids, most probable first
    logp.f16    (steps, K) natural logarithms, at meta.json's temperature; the tail has 1 - sum(exp(logp))
    index.npy   (rows, 2) int64: first step and number of steps of each row of the continuations file
    meta.json   k, temperature, rows, steps, the LLM's digest; whether steps were generated or teacher-forced

Steps are the continuation's tokens and, where it stopped by itself, the end-of-sequence step. Rows with equal
prompts share their steps. A no-speech row has none: its sentence is a rule, not what the LLM would say.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class TopKError(ValueError):
    """A top-k folder that cannot be used; the message names it and the way out."""


def topk_folder(out: str | os.PathLike[str]) -> Path:
    """The folder that belongs to a continuations file."""
    return Path(f"{os.fspath(out)}.topk")


class TopKStore:
    """Random access to the steps of each row; nothing is read before it is asked for."""

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
        """Refuse a temperature that the log-probabilities were not taken at: they cannot be re-tempered."""
        if temperature != self.temperature:
            raise TopKError(
                f"{self.folder}: holds the teacher at temperature {self.temperature:g}, not {temperature:g}; "
                f"train at {self.temperature:g}, or remove the folder and run blsp continue --score-only "
                f"--top-k-temperature {temperature:g}"
            )


class TopKWriter:
    """Writes a folder under a temporary name; `finish` renames it, so a half-written one is never seen."""

    def __init__(self, target: Path, rows: int, k: int) -> None:
        self.target, self._k, self.steps = target, k, 0
        self._folder = target.with_name(f".{target.name}.partial")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._index = np.lib.format.open_memmap(self._folder / "index.npy", "w+", np.int64, (rows, 2))
        self._ids = open(self._folder / "ids.u32", "wb")  # noqa: SIM115 (lives as long as the writer)
        self._logp = open(self._folder / "logp.f16", "wb")  # noqa: SIM115

    def add(self, ids: np.ndarray, logp: np.ndarray) -> int:
        """Append steps, (n, K) each; returns the number of the first."""
        first = self.steps
        self._ids.write(ids.astype("<u4").tobytes())
        self._logp.write(logp.astype("<f2").tobytes())
        self.steps += len(ids)
        return first

    def point(self, row: int, first: int, steps: int) -> None:
        """Row number `row` has `steps` steps from `first` on."""
        self._index[row] = (first, steps)

    def repeat(self, row: int, earlier: int) -> None:
        """Row number `row` shares the steps of row number `earlier`."""
        self._index[row] = self._index[earlier]

    def finish(self, meta: dict[str, Any]) -> None:
        self._close()
        full = meta | {"k": self._k, "rows": len(self._index), "steps": self.steps}
        (self._folder / "meta.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
        self._index.flush()
        shutil.rmtree(self.target, ignore_errors=True)
        self._folder.rename(self.target)

    def _close(self) -> None:
        self._ids.close()
        self._logp.close()

    def __enter__(self) -> TopKWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _open_matrix(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    size, wanted = path.stat().st_size, shape[0] * shape[1] * dtype.itemsize
    if size != wanted:
        raise ValueError(f"{path.name} has {size} bytes where {wanted} are announced")
    return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)
