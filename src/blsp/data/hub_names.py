"""Names of models and datasets: a folder here, or a repository on the Hugging Face hub.

In:  a name as the user gave it: `models/nope`, `my.csv`, `google/fleurs`.
Out: whether it is a path that does not exist; why the hub cannot be asked for it.
Try: `is_missing_path("models/nope")`, `hub_trouble("datasets", "google/fleurs")`
Flow: **hub_names.py** → weights/embedded.py and data/corpora/hub.py, before they call the hub's packages (these
      try for more than half a minute, even if a name is just misspelt)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

OUR_FOLDERS = ("models", "runs", "results", "checkpoints", "recipes")  # no hub account has these names
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".tar", ".gz", ".zip", ".safetensors", ".bin")
HUB_SECONDS = 5.0  # to wait for the hub's answer


def is_missing_path(name: str) -> bool:
    """Whether `name` can only be a path, and the path does not exist.

    Hub ids are `name` or `owner/name`. A path has more parts, begins with `/`, `.` or `~`, ends with a file suffix, or
    is inside a folder that exists or is one of `OUR_FOLDERS`.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))
    is_path = is_path or not name or path.suffix.lower() in FILE_SUFFIXES
    if len(path.parts) == 2:
        is_path = is_path or path.parent.is_dir() or path.parts[0] in OUR_FOLDERS
    return is_path and not path.exists()


def hub_trouble(kind: Literal["models", "datasets"], name: str) -> str | None:
    """Why the hub cannot be asked for the repository `name`; None if it answers, whatever the answer is.

    It is asked once, without retries. If the user has set HF_HUB_OFFLINE, the hub's package gives that as the reason.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        get_session().head(f"{constants.ENDPOINT}/api/{kind}/{name}", timeout=HUB_SECONDS)
    except Exception as error:  # of the HTTP library that the hub's package uses, or about an invalid hub id
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
