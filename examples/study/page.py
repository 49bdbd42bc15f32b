"""The study's tables from its answers: `python page.py FOLDER [DOCUMENT [CSV]]`.

Reads `eval.outputs.jsonl` (id, contestant, use, passed), `eval.json`, `agreement.json`, `drift.json`
and the manifests of `*-self.jsonl` and `*-prefs.jsonl`, and writes `study.html` beside them. In DOCUMENT
(docs/study.md), each table stands between `<!-- NAME -->` and `<!-- end -->`, and is written anew. CSV
is what pairs of known precision gave, as `srt build-prefs` quotes it.

A study made again with `SEED=N` that stands beside FOLDER as `FOLDER-seed-N` is compared with it.
"""

import csv
import html
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

DRAWS = 4000
NORMAL = 1.96
FIRST_SEED = "42"
"""Of `run.sh`, unless it is told another."""


class Comparison(NamedTuple):
    """An arm against its control, and what that shows."""

    question: str
    arm: str
    control: str


COMPARISONS = (
    Comparison("stage 1 against the base", "stage-1", "base"),
    Comparison("refinements alone, as many tokens read", "refinement-only", "base"),
    Comparison("what feedback adds to the refinements", "stage-1", "refinement-only"),
    Comparison("what contrast adds", "stage-1", "no-contrast"),
    Comparison("without weaknesses", "without-weaknesses", "stage-1"),
    Comparison("without suggestions", "without-suggestions", "stage-1"),
    Comparison("without score", "without-score", "stage-1"),
    Comparison("a second round on its own drafts", "round-2", "stage-1"),
    Comparison("comparisons beside it", "round-2-compare", "round-2"),
    Comparison("what feedback adds in two rounds", "round-2", "refinement-only-2"),
    Comparison("refined once", "refinement", "round-2"),
    Comparison("refined twice", "refinement-2", "round-2"),
    Comparison("refined three times", "refinement-3", "round-2"),
    Comparison("the best of four by its own score", "best-of-4", "round-2"),
    Comparison("refining against the best of four", "refinement", "best-of-4"),
    Comparison("stage 2 after one round", "stage-1-dpo", "stage-1"),
    Comparison("stage 2 after two rounds", "round-2-dpo", "round-2"),
    Comparison("the same pairs for three epochs", "round-2-dpo-3", "round-2"),
    Comparison("its control: stage 1 continued", "round-2-continued", "round-2"),
    Comparison("stage 2 against its control", "round-2-dpo", "round-2-continued"),
    Comparison("two rounds against the refinements alone", "round-2", "refinement-only"),
    Comparison("stage 2 against two rounds of refinements", "round-2-dpo", "refinement-only-2"),
    Comparison("refinement against draft, as in the paper", "refine", "round-2"),
    Comparison("best answer against the base's", "first-rejected", "round-2"),
    *(
        Comparison(f"pairs by a critic that is right {right} times of 100{few}", arm, "round-2")
        for right in (25, 50, 60, 75, 90, 100)
        for few, arm in (("", f"right-{right}"), (", of 60 prompts", f"right-{right}-few"))
    ),
)


class Way(NamedTuple):
    """A way to spend tokens on an answer of round 2."""

    shown: str
    arm: str
    journal: str
    rounds: int
    """Of critiques."""


WAYS = (
    Way("direct", "round-2", "refining.journal.jsonl", 0),
    Way("refined once", "refinement", "refining.journal.jsonl", 1),
    Way("refined twice", "refinement-2", "refining.journal.jsonl", 2),
    Way("refined three times", "refinement-3", "refining.journal.jsonl", 3),
    Way("best of four", "best-of-4", "best-of.journal.jsonl", 1),
)

Passes = dict[str, dict[str, bool]]
"""By arm, whether its answer to a prompt (by id) passes the check."""


def tallies_of(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the tallies of each run of a kind: `self`, or `prefs`."""
    ending = f"-{kind}.run.json"
    for manifest in sorted(folder.glob(f"*{ending}")):
        tallies = json.loads(manifest.read_text(encoding="utf-8"))["tallies"]
        yield manifest.name.removesuffix(ending), tallies


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_passes(folder: Path) -> Passes:
    """The direct answers of every contestant; a model is named by its folder, the reference `base`.

    `refining.outputs.jsonl`, if there is one, adds what round-2 refines its answers to, and
    `best-of.jsonl` the one that it scores highest among several.
    """
    passes: Passes = {}
    for row in rows_of(folder / "eval.outputs.jsonl"):
        if row["use"] == "response" and row["passed"] is not None:
            name = row["contestant"]
            arm = Path(name).name if name.startswith("models/") else "base"
            passes.setdefault(arm, {})[row["id"]] = row["passed"] == 1
    if (folder / "refining.outputs.jsonl").exists():
        for row in rows_of(folder / "refining.outputs.jsonl"):
            if row["contestant"].startswith("models/") and row["use"] != "response":
                passes.setdefault(row["use"], {})[row["id"]] = row["passed"] == 1
    if (folder / "best-of.jsonl").exists():
        judged = [row for row in rows_of(folder / "best-of.jsonl") if row["feedback"] is not None]
        for name in {row["id"] for row in judged}:
            best = max(
                (row for row in judged if row["id"] == name),
                key=lambda row: (
                    row["feedback"]["score_mean"] or row["feedback"]["score"],
                    -row["sample"],
                ),
            )
            passes.setdefault("best-of-4", {})[name] = best["response_passes"] == 1
    return passes


def wilson(passed: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = passed / of, NORMAL**2
    centre = (share + square / 2 / of) / (1 + square / of)
    half = NORMAL * sqrt(share * (1 - share) / of + square / 4 / of**2) / (1 + square / of)
    return centre - half, centre + half


def shown_share(passed: int, of: int) -> str:
    """A share with its interval."""
    low, high = wilson(passed, of)
    return f"{passed / of:.0%} [{low:.0%}, {high:.0%}]"


def paired(gains: Sequence[float]) -> tuple[float, float, float]:
    """The mean of what each prompt gains, and its 95 % interval by a bootstrap over prompts.

    Where all prompts gain alike, it reaches as far as Wilson's of n in n.
    """
    if len(set(gains)) == 1:
        reach = 1 - wilson(len(gains), len(gains))[0]
        return gains[0], max(-1.0, gains[0] - reach), min(1.0, gains[0] + reach)
    draw = random.Random(1)
    means = sorted(sum(draw.choices(gains, k=len(gains))) / len(gains) for _ in range(DRAWS))
    return sum(gains) / len(gains), means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def arms_table(passes: Passes) -> list[list[str]]:
    """A line an arm: how often it passes."""
    rows = [["arm", "passes [95 %]", "prompts"]]
    for arm, said in passes.items():
        rows.append([arm, shown_share(sum(said.values()), len(said)), str(len(said))])
    return rows


def gains_of(passes: Passes, arm: str, control: str) -> dict[str, float]:
    """What each prompt gains (1, 0 or -1) that both arms answered; in a fixed order."""
    ids = sorted(passes[arm].keys() & passes[control].keys())
    return {name: float(passes[arm][name] - passes[control][name]) for name in ids}


def difference(passes: Passes, arm: str, control: str) -> tuple[float, float, float]:
    """`paired` over the prompts that both arms answered."""
    return paired(list(gains_of(passes, arm, control).values()))


def shown_difference(mean: float, low: float, high: float) -> str:
    """A difference in points, with its interval."""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdict_of(means: Sequence[float], low: float, high: float) -> str:
    """What an interval says, where no seed says the opposite."""
    if low > 0 and min(means) > 0:
        return "better"
    return "worse" if high < 0 and max(means) < 0 else "cannot be told"


def comparisons_table(
    by_seed: dict[str, Passes], comparisons: Sequence[Comparison]
) -> list[list[str]]:
    """A line a comparison whose two arms were run, over the prompts that both answered.

    With several seeds, the last column but one is of each prompt's mean gain over them.
    """
    head = "difference in points, paired [95 %]"
    seeds = [f"seed {seed}" for seed in by_seed]
    rows = [["question", *((*seeds, f"all: {head}") if len(seeds) > 1 else (head,)), "verdict"]]
    for question, arm, control in comparisons:
        found = [
            gains_of(passes, arm, control) if {arm, control} <= passes.keys() else {}
            for passes in by_seed.values()
        ]
        ran = [gains for gains in found if gains]
        if not ran:
            continue
        shared = [name for name in ran[0] if all(name in gains for gains in ran)]
        each = [paired(list(gains.values())) if gains else None for gains in found]
        together = paired([sum(gains[name] for gains in ran) / len(ran) for name in shared])
        shown = [shown_difference(*one) if one else "" for one in each] if len(each) > 1 else []
        verdict = verdict_of([one[0] for one in each if one], *together[1:])
        rows.append([
            f"{question} ({arm} − {control})", *shown, shown_difference(*together), verdict,
        ])  # fmt: skip
    return rows


def critics_table(folder: Path) -> list[list[str]]:
    """A line a model that judged drafts of its own: what `self-critique --check` counted."""
    rows = [["critic", "balanced accuracy [95 %]", "good kept", "bad found"]]
    for name, tallies in tallies_of(folder, "self"):
        counts = tallies["confusion_drafts"]
        kept, good = (
            counts["good_called_good"],
            counts["good_called_good"] + counts["good_called_bad"],
        )
        found, bad = counts["bad_called_bad"], counts["bad_called_bad"] + counts["bad_called_good"]
        if good and bad:
            balanced = (kept / good + found / bad) / 2
            lows, highs = zip(wilson(kept, good), wilson(found, bad), strict=True)
            below = sqrt((kept / good - lows[0]) ** 2 + (found / bad - lows[1]) ** 2) / 2
            above = sqrt((highs[0] - kept / good) ** 2 + (highs[1] - found / bad) ** 2) / 2
            rows.append([
                name,
                f"{balanced:.0%} [{balanced - below:.0%}, {balanced + above:.0%}]",
                f"{kept} of {good}",
                f"{found} of {bad}",
            ])  # fmt: skip
    return rows


def lengths_table(folder: Path) -> list[list[str]]:
    """A line an arm: how long its answers are, and its win rate against the base at equal length."""
    rows = [["arm", "characters", "cut at the limit", "judged better", "at equal length"]]
    path = folder / "eval.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
        judged = row["judged"][0] if row["judged"] else {}
        equal = (judged.get("length_controlled") or {}).get("rate")
        rows.append([
            Path(row["name"]).name,
            f"{row['characters']['value']:.0f}",
            f"{row['cut']['value']:.0%}",
            f"{judged['win_rate']['value']:.0%}" if judged.get("win_rate") else "",
            f"{equal['value']:.0%}" if equal else "",
        ])  # fmt: skip
    return rows


def effort_table(folder: Path, passes: Passes) -> list[list[str]]:
    """A line a way to spend tokens on an answer: how often it passes, and how many were written for it.

    A critique holds its refinement, also for the best of four, which use its score alone.
    """
    rows = [["answer", "passes", "tokens written"]]
    ways = [way for way in WAYS if way.arm in passes and (folder / way.journal).exists()]
    looked = set[str].intersection(*(set(passes[way.arm]) for way in ways)) if ways else set[str]()
    for way in ways:
        passed = sum(passes[way.arm][name] for name in looked)
        tokens = tokens_written(folder / way.journal, way.rounds)
        rows.append([way.shown, f"{passed / len(looked):.0%} of {len(looked)}", f"{tokens:.0f}"])
    return rows


def tokens_written(journal: Path, rounds: int) -> float:
    """Mean tokens of a prompt's drafts and of the critiques of so many rounds, by one model.

    A critique of the same text as before is not asked for again.
    """
    wanted = {"response"} | {f"round {number} critique" for number in range(1, rounds + 1)}
    calls = [row for row in rows_of(journal) if "call" in row]
    critics = {row["model"] for row in calls if row["call"].endswith("critique")}
    tokens: dict[str, int] = {}
    for row in calls:
        name, _, kind = row["call"].partition(" ")
        if kind in wanted and row["model"] in critics:
            name = name.rpartition("/")[0]
            tokens[name] = tokens.get(name, 0) + row["usage"]["completion_tokens"]
    return sum(tokens.values()) / len(tokens)


def drift_table(folder: Path) -> list[list[str]]:
    """A line a stage: what it says of its own answers, what the check's critic says, and the alarm."""
    rows = [["stage", "own score", "outside score", "alarm", "why"]]
    path = folder / "drift.json"
    for stage in json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else ():
        scores = (stage["own_score"], stage["outside_score"])
        alarm = stage["echo"] or {"colour": "", "reason": ""}
        rows.append([
            Path(stage["name"]).name,
            *(f"{score['value']:.1f}" if score else "" for score in scores),
            alarm["colour"], alarm["reason"],
        ])  # fmt: skip
    return rows


def agreement_table(folder: Path) -> list[list[str]]:
    """A line a critic: how often it scores the better answer of a pair higher (paper, Table 5)."""
    rows = [["critic", "pairs", "right [95 %]", "ties", "right, ties left out"]]
    path = folder / "agreement.json"
    for each in json.loads(path.read_text(encoding="utf-8"))["pairs"] if path.exists() else ():
        right, decided = each["accuracy"], each["without_ties"]
        rows.append([
            Path(each["critic"]).name,
            str(each["pairs"]),
            f"{right['value']:.0%} [{right['low']:.0%}, {right['high']:.0%}]" if right else "",
            str(each["ties"]),
            f"{decided['value']:.0%}" if decided else "",
        ])  # fmt: skip
    return rows


def labels_table(folder: Path) -> list[list[str]]:
    """A line a file of pairs: how many of its labels are right, by the check."""
    rows = [["pairs of", "pairs", "right [95 %], of those of which one passes"]]
    for name, tallies in tallies_of(folder, "prefs"):
        if labels := tallies.get("labels"):
            right, decided = labels["right"], labels["decided"]
            told = f"{shown_share(right, decided)}, {right} of {decided}"
            rows.append([name, str(tallies["kept"]), told])
    return rows


def curve(folder: Path, passes: Passes) -> list[dict[str, float]]:
    """What pairs of known precision gave: a row for each file of pairs whose model was evaluated.

    The precision is the check's word on pairs of which one answer passes; the gain is in points.
    """
    found = []
    for name, tallies in tallies_of(folder, "prefs"):
        itself = f"{name}-dpo" in passes  # else a planted critic, on drafts of round 2
        arm, control = (f"{name}-dpo", name) if itself else (name, "round-2")
        # Where the base's answers are rejected, the critic of the pairs is not asked about these.
        others = name == "first-rejected" or not tallies.get("labels")
        if arm not in passes or control not in passes or others:
            continue
        mean, low, high = difference(passes, arm, control)
        found.append({
            "pairs": tallies["kept"],
            "precision": round(tallies["labels"]["precision"], 3),
            "gain": round(100 * mean, 1), "low": round(100 * low, 1), "high": round(100 * high, 1),
        })  # fmt: skip
    return sorted(found, key=lambda row: row["precision"])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_html(name: str, rows: Sequence[Sequence[str]]) -> str:
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return f"<h2>{html.escape(name)}</h2>\n<table>\n" + "\n".join(cells) + "\n</table>"


def write_into(document: Path, tables: dict[str, list[list[str]]]) -> None:
    """Write each table in its place; a document without that place is left as it is."""
    text = document.read_text(encoding="utf-8")
    for name, rows in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        table = as_markdown(rows)
        text = place.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    document.write_text(text, encoding="utf-8")


def main(folder: Path, document: Path | None = None, measured: Path | None = None) -> None:
    """Write the page, and the document's tables and the curve where they are named."""
    passes = read_passes(folder)
    name = folder.resolve().name
    by_seed = {FIRST_SEED: passes}
    for other in sorted(folder.resolve().parent.glob(f"{name}-seed-*/eval.outputs.jsonl")):
        by_seed[other.parent.name.rpartition("-")[2]] = read_passes(other.parent)
    tables = {
        f"{name}: arms": arms_table(passes),
        f"{name}: comparisons": comparisons_table(by_seed, COMPARISONS),
        f"{name}: critics": critics_table(folder),
        f"{name}: lengths": lengths_table(folder),
        f"{name}: labels": labels_table(folder),
        f"{name}: agreement": agreement_table(folder),
        f"{name}: drift": drift_table(folder),
        f"{name}: effort": effort_table(folder, passes),
    }
    figures = curve(folder, passes)
    if figures:
        head = list(figures[0])
        tables[f"{name}: curve"] = [head, *([f"{row[key]:g}" for key in head] for row in figures)]
    body = "\n".join(as_html(name, rows) for name, rows in tables.items() if len(rows) > 1)
    style = "body{font:16px system-ui;margin:2em}td,th{text-align:left;padding:.2em 1em .2em 0}"
    page = (
        f'<!doctype html><meta charset="utf-8"><title>Study</title><style>{style}</style>\n{body}\n'
    )
    (folder / "study.html").write_text(page, encoding="utf-8")
    if document is not None:
        write_into(document, tables)
    if measured is not None and figures:
        write_curve(measured, name, figures)


def write_curve(path: Path, study: str, figures: Sequence[dict[str, float]]) -> None:
    """Write what a study gave in place of what it gave before; what others gave stays."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [row for row in csv.DictReader(before) if row["study"] != study]
    with path.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, [*figures[0], "study"], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *(row | {"study": study} for row in figures)])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
