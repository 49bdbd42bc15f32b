"""The hub: prompts from its data sets, finished models onto it; and the folder of what is kept here."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from srt_cli.errors import SrtError

CACHE_VARIABLE: Final = "SRT_CACHE"
# What a run needs and a reader of the model does not, and what holds rows of the training data.
KEPT_HERE: Final = (
    "checkpoints/*", "tensorboard/*", "*.journal.jsonl", "*.dropped.jsonl", "samples.jsonl",
    "training.html", "*.lock", "*.tmp",
)  # fmt: skip


def cache_folder() -> Path:
    """Where converted weights are kept: `SRT_CACHE`, else the user's cache folder."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "srt"


def open_hub_rows(name: str, split: str) -> Iterable[Mapping[str, object]]:
    """The rows of a data set's split, which stay on disk and can be gone through again and again.

    Raises `SrtError` in one sentence when it cannot be read.
    """
    from datasets import load_dataset

    try:
        rows: Iterable[Mapping[str, object]] = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SrtError(
            f"hf:{name}:{split}: cannot be read ({reason}). Check the name, the split and the "
            "connection, or pass a JSONL file."
        ) from error
    return rows


def push_model(directory: Path, name: str, *, public: bool) -> str:
    """Upload a model directory as `name`, private unless `public`; returns its address.

    The token is found where the hub's own client keeps it (`HF_TOKEN`, `hf auth login`), and goes
    nowhere else. Raises `SrtError` in one sentence when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub = HfApi()
    try:
        found = hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=found.repo_id,
            folder_path=directory,
            ignore_patterns=list(KEPT_HERE),
            commit_message="A model trained by srt",
        )
    except LocalTokenNotFoundError:
        reason = "there is no token. Set HF_TOKEN, or run hf auth login"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answers {status}" + (
            ". Does the token (HF_TOKEN) allow writing there?" if status in (401, 403) else ""
        )
    except HFValidationError as error:
        reason = str(error).split("\n")[0]
    except Exception as error:  # the errors of its transport have no name that stays
        said = str(error).split("\n")[0] or type(error).__name__
        reason = f"the hub cannot be reached ({said})"
    else:
        return str(found)
    raise SrtError(
        f"{directory} is trained and saved, but not uploaded to {name}: {reason.rstrip('.')}. "
        "The same line tries again."
    )
