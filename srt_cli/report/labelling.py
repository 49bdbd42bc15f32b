"""A page on which a person says which answer of a pair is better, blind to which is which."""

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from srt_cli.pairs.pairing import fingerprint_of, pair_key, text_key
from srt_cli.records import Preference, Prompt
from srt_cli.report.shell import write_page

# What a person sees; texts are put in by the program, as text.
_BODY = """
<header><h1 id="headline">Which answer is better?</h1>
<p class="facts">Press <kbd>1</kbd> for the left answer, <kbd>2</kbd> for the right one, <kbd>0</kbd>
for neither, <kbd>u</kbd> to take the last one back. Answers stay in this browser; save them when you
are done.</p></header>
<div class="progress"><div id="bar"></div></div>
<p class="facts" id="progress" aria-live="polite"></p>
<article id="pair">
<p class="prompt" id="prompt"></p>
<div class="answers two">
<div class="answer"><h3>1 · left</h3><pre id="left"></pre></div>
<div class="answer"><h3>2 · right</h3><pre id="right"></pre></div>
</div>
</article>
<p class="tools buttons">
<button id="choose-1">1 · left is better</button>
<button id="choose-0">0 · neither</button>
<button id="choose-2">2 · right is better</button>
<button id="undo">undo</button>
<button id="save">save answers</button>
</p>
<footer id="after">Then: <code>srt build-prefs ... --audit-labels <span id="file"></span></code></footer>
<style>
.progress { height: 6px; border-radius: 3px; background: var(--line); margin: 0 0 .8em; }
#bar { height: 100%; width: 0; border-radius: 3px; background: var(--mine); }
.two { grid-template-columns: 1fr 1fr; }
.two pre { font-family: inherit; font-size: 1rem; }
@media (max-width: 640px) { .two { grid-template-columns: 1fr; } }
button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 16px; cursor: pointer; }
button:hover, button:focus-visible { border-color: var(--mine); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 6px; background: var(--card); }
#undo { margin-left: auto; }
.buttons { position: sticky; bottom: 0; background: var(--paper); padding: 12px 0; }
</style>
"""


def write_label_page(path: Path, pairs: Sequence[Preference], seed: int) -> None:
    """Write the page for these pairs, in their order; the seed draws the sides."""
    shown = [_shown(pair, seed) for pair in pairs]
    whole = json.dumps(shown, ensure_ascii=False, sort_keys=True)
    data = {
        # Another sample is another page: its answers are kept apart.
        "page": hashlib.blake2b(whole.encode(), digest_size=8).hexdigest(),
        "file": f"{path.stem}.labels.jsonl",
        "pairs": shown,
    }
    program = files("srt_cli.report").joinpath("labelling.js").read_text(encoding="utf-8")
    write_page(path, "srt: judge pairs", _BODY, f"const DATA = {_as_script(data)};\n{program}")


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


def _as_script(value: object) -> str:
    """JSON that neither ends the script it stands in nor begins a comment of HTML."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")
