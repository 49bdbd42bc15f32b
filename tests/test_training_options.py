"""No option of sft and dpo is dead: each changes the weights that come out, or whether they do."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_dpo import pair_rows
from test_sft import feedback_rows

from srt_cli.options import flag_of, knob_of
from srt_cli.stages.dpo import Dpo
from srt_cli.stages.sft import Sft

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)
LORA = ("--method", "lora")

# Option -> (what both runs have besides, what the second has as well).
SHARED = {
    "--recipe": ((), ("--recipe", "smol")),
    "--method": ((), LORA),
    "--learning-rate": ((), ("--learning-rate", 3e-3)),
    "--epochs": ((), ("--epochs", 3)),
    "--global-batch": ((), ("--global-batch", 8)),
    "--micro-batch": ((), ("--micro-batch", 1)),
    "--lr-schedule": ((), ("--lr-schedule", "linear")),
    "--warmup": ((), ("--warmup", 0.9)),
    "--weight-decay": ((), ("--weight-decay", 0.5)),
    "--max-grad-norm": ((), ("--max-grad-norm", 1e-3)),
    "--lora-r": (LORA, ("--lora-r", 2)),
    "--lora-alpha": (LORA, ("--lora-alpha", 1)),
    "--lora-dropout": (LORA, ("--lora-dropout", 0.5)),
    "--dora": (LORA, ("--dora",)),
    "--rslora": (LORA, ("--rslora",)),
    "--set": ((), ("--set", "adam_beta2=0.5")),
    "--chat-template": ((), ("--chat-template", "other.jinja")),
    "--seed": ((), ("--seed", 7)),
    "--limit": ((), ("--limit", 4)),
    "--eval-split": ((), ("--eval-split", 0.4)),
}
SFT = SHARED | {
    "--loss-on": ((), ("--loss-on", "response")),
    "--refinement-feedback": ((), ("--refinement-feedback",)),
    "--drop": ((), ("--drop", "score")),
    "--refinement-only": ((), ("--refinement-only",)),
    "--compare": ((), ("--compare",)),
    "--verdict-weight": ((), ("--verdict-weight", 6)),
    "--mix": ((), ("--mix", "chats.jsonl:0.5")),
    "--good-score": (("--refinement-feedback",), ("--good-score", 10)),
}
DPO = SHARED | {
    "--beta": ((), ("--beta", 0.9)),
    "--loss-type": ((), ("--loss-type", "ipo")),
    "--label-smoothing": (("--loss-type", "robust"), ("--label-smoothing", 0.3)),
    "--nll-weight": ((), ("--nll-weight", 1.0)),
    "--ld-alpha": ((), ("--ld-alpha", 0.5)),
}
# What these change is not the weights of such a small run; tests of their own show it.
ELSEWHERE = {
    "--data", "--prefs", "--model", "--max-length", "--truncation", "--eval-every",
    "--early-stopping", "--deterministic", "--merge", "--merge-base", "--adapter", "--packing",
    "--unfit", "--thoughts", "--precision", "--balance",
}  # fmt: skip
TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))

LINES = {
    "sft": ("sft", "--critic-check", 0, "--samples", 0),
    # DPO's weights hardly move at the rate of its recipe.
    "dpo": ("dpo", "--beta", 0.1, "--samples", 0),
}
BASE = ("--epochs", 2, "--global-batch", 4, "--micro-batch", 2)
_digests: dict[tuple[object, ...], str] = {}


def weights_of(srt, tmp_path: Path, tiny_model, stage, extra):
    """A digest of the weights that a line makes; the same line is run once."""
    if (stage, extra) not in _digests:
        write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())
        write_jsonl(tmp_path / "prefs.jsonl", pair_rows())
        write_jsonl(
            tmp_path / "chats.jsonl",
            [{"prompt": f"What is {n}?", "response": f"A number, {n}."} for n in range(8)],
        )
        (tmp_path / "other.jinja").write_text(TEMPLATE)
        # A rate that is given would hide the recipe's.
        rate = () if "--recipe" in extra or extra == ("recipe",) else ("--learning-rate", 1e-2)
        extra_flags = () if extra == ("recipe",) else extra
        out = tmp_path / f"model-{len(_digests)}"
        finished = srt(
            *LINES[stage], "--model", tiny_model, "--out", out, *BASE, *rate, *extra_flags
        )
        assert finished.code == 0, finished.stderr
        weights = (out / "model.safetensors").read_bytes()
        _digests[stage, extra] = hashlib.sha256(weights).hexdigest()
    return _digests[stage, extra]


@pytest.mark.parametrize(
    ("stage", "option"),
    [("sft", option) for option in SFT] + [("dpo", option) for option in DPO],
)
def test_an_option_changes_the_weights(srt, tmp_path, tiny_model, stage, option):
    both, second = {"sft": SFT, "dpo": DPO}[stage][option]
    first = ("recipe",) if option == "--recipe" else both
    without = weights_of(srt, tmp_path, tiny_model, stage, first)
    assert weights_of(srt, tmp_path, tiny_model, stage, (*both, *second)) != without


def test_the_same_line_makes_the_same_weights(srt, tmp_path, tiny_model):
    first = weights_of(srt, tmp_path, tiny_model, "sft", ())
    _digests.pop(("sft", ()))
    assert weights_of(srt, tmp_path, tiny_model, "sft", ()) == first


@pytest.mark.parametrize(("options_class", "tried"), [(Sft, SFT), (Dpo, DPO)])
def test_every_setting_is_tried_here_or_elsewhere(options_class, tried):
    flags = {flag_of(field): knob_of(field).kind for field in dataclasses.fields(options_class)}
    untried = set(flags) - set(tried)
    assert not {flag for flag in untried if flags[flag] == "setting"} - ELSEWHERE
    # A machine that runs a stranger's code is no place for tests.
    named = {flag for flag in untried if f'"{flag}"' in TESTS or f'"--no-{flag[2:]}"' in TESTS}
    assert not untried - named - {"--trust-remote-code"}
