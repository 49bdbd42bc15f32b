"""A page on which a person says which answer of a pair is better, blind to which is which."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from srt_cli.pairs.pairing import fingerprint_of, pair_key, text_key
from srt_cli.records import Preference, Prompt
from srt_cli.report.html import write_page


def write_label_page(path: Path, pairs: Sequence[Preference], seed: int) -> None:
    """Write the page for these pairs, in their order; the seed draws the sides."""
    shown = [_shown(pair, seed) for pair in pairs]
    whole = json.dumps(shown, ensure_ascii=False, sort_keys=True)
    data = {
        # Another sample is another page: its answers are kept apart.
        "page": hashlib.blake2b(whole.encode(), digest_size=8).hexdigest(),
        "file": f"{path.stem}.labels.jsonl",
        "rows": shown,
    }
    write_page(path, "label.html", {"title": "srt: judge pairs", "data": data})


def _shown(pair: Preference, seed: int) -> dict[str, object]:
    """What the page knows of a pair: two texts with their digests, in no telling order."""
    answers = [
        {"text": turns[0].content, "key": text_key(turns[0].content)}
        for turns in (pair.chosen, pair.rejected)
    ]
    salt = (seed % 2**64).to_bytes(8)
    coin = hashlib.blake2b(fingerprint_of(pair), digest_size=1, salt=salt).digest()[0] % 2
    left, right = reversed(answers) if coin else answers
    prompt = Prompt(id=pair.id, prompt=pair.prompt).text
    return {"pair": pair_key(pair), "prompt": prompt, "left": left, "right": right}
