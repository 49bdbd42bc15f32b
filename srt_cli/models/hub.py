"""Prompts from a data set of the hub, or a folder that `datasets` can read."""

from collections.abc import Iterator, Mapping

from srt_cli.errors import SrtError


def read_hub_rows(name: str, split: str) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a data set's split; raises `SrtError` in one sentence when it cannot."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SrtError(
            f"hf:{name}:{split}: cannot be read ({reason}). Check the name, the split and the "
            "connection, or pass a JSONL file."
        ) from error
    for row in rows:
        yield dict(row)
