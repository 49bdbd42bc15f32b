"""Training rows on disk: made once by the main process, mapped into memory by every process."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from datasets import Dataset, Features, Value, load_from_disk
from datasets import Sequence as ListOf

from srt_cli.training.arguments import CHECKPOINTS

TOKEN_ID: Final = "int32"


def keep_rows(columns: Mapping[str, list[list[int]]], out: Path) -> Dataset:
    """Columns of token ids as a data set on disk, beside the checkpoints and gone with them.

    Rows of the same content are found again, and with them what TRL keeps beside them: a resumed
    dpo need not compute the reference's log-probs anew.
    """
    features = Features({name: ListOf(Value(TOKEN_ID)) for name in columns})
    made = Dataset.from_dict(dict(columns), features=features)
    folder = out / CHECKPOINTS / f"rows-{made._fingerprint}"
    if not folder.is_dir():
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        made.save_to_disk(half)
        os.replace(half, folder)
    kept = load_from_disk(str(folder))
    assert isinstance(kept, Dataset)
    return kept
