"""No run costs a user a file of their own, and what a run is told to read or write it may be a link,
a pipe or a compressed file."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import read_jsonl, write_jsonl

from srt_cli.errors import SrtError
from srt_cli.runs.jsonl import OrderedWriter, write_atomically
from srt_cli.runs.run import Run, open_run
from srt_cli.stages.build_prefs import BuildPrefs

PROGRAM = """\
def respond(prompt):
    return "A short answer."


def critique(prompt, response):
    return {"weaknesses": "thin", "suggestions": "more", "score": 6}, response + " Better."
"""
LINE = ("collect-feedback", "--model", "python:p.py:respond", "--critic", "python:p.py:critique")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"task {n}"} for n in range(3)]
    )
    return tmp_path


def test_changes_by_hand_are_noticed_before_the_same_line_replaces_them(srt, folder):
    assert srt(*LINE).code == 0
    out = folder / "feedback.jsonl"
    written = out.read_bytes()
    edited = written.replace(b"thin", b"very thin")
    out.write_bytes(edited)
    refused = srt(*LINE)
    assert refused.code == 1
    assert refused.stderr.endswith(
        "error: feedback.jsonl: was changed after srt wrote it. Rename it to keep the changes, or "
        "replace it with --overwrite.\n"
    )
    assert out.read_bytes() == edited
    out.rename(folder / "mine.jsonl")
    assert srt(*LINE).code == 0
    assert out.read_bytes() == written
    out.write_bytes(edited)
    assert srt(*LINE, "--overwrite").code == 0
    assert out.read_bytes() == written


JUDGE = """

def judge(prompt, a, b):
    return 1.0
"""
PREFS = ("build-prefs", "--data", "f.jsonl", "--report", "prefs.html", "--export", "kto")
EVAL = ("eval", "--model", "python:p.py:respond", "--reference", "python:p.py:worse",
        "--judge", "python:p.py:judge", "--markdown", "eval.md")  # fmt: skip


@pytest.fixture
def every_file(srt, folder):
    """A folder in which build-prefs and eval have written every kind of file that they write."""
    (folder / "p.py").write_text(PROGRAM + JUDGE + "\n\ndef worse(prompt):\n    return 'Short.'\n")
    row = json.loads(FEEDBACK)
    write_jsonl(folder / "f.jsonl", [row, row | {"id": "2", "prompt": "q", "status": "failed"}])
    for line in (PREFS, EVAL):
        finished = srt(*line)
        assert finished.code == 0, finished.stderr
    return folder


def test_changes_by_hand_to_any_file_are_noticed_before_it_is_replaced(srt, every_file):
    files = {
        PREFS: ("prefs.dropped.jsonl", "prefs.kto.jsonl", "prefs.html"),
        EVAL: ("judgments.jsonl", "eval.outputs.jsonl", "report.html", "eval.md"),
    }
    for line, names in files.items():
        for name in names:
            path = every_file / name
            written = path.read_bytes()
            path.write_bytes(written + b"\n")
            refused = srt(*line)
            assert refused.code == 1, name
            assert refused.stderr.endswith(
                f"error: {name}: was changed after srt wrote it. Rename it to keep the changes, or "
                "replace it with --overwrite.\n"
            )
            assert path.read_bytes() == written + b"\n"
            path.write_bytes(written)
        path.rename(every_file / "mine")
        assert srt(*line).code == 0
        assert path.read_bytes() == written
        path.write_bytes(written + b"\n")
        assert srt(*line, "--overwrite").code == 0
        assert path.read_bytes() == written


def test_a_file_of_that_name_which_no_run_wrote_is_not_replaced(srt, folder):
    (folder / "prefs.html").write_text("mine")
    write_jsonl(folder / "f.jsonl", [json.loads(FEEDBACK)])
    refused = srt(*PREFS)
    assert refused.code == 1
    assert refused.stderr.endswith(
        "error: prefs.html: exists, and no run of prefs.jsonl wrote it. Rename it to keep it, or "
        "replace it with --overwrite.\n"
    )
    assert (folder / "prefs.html").read_text() == "mine"
    assert srt(*PREFS, "--overwrite").code == 0
    assert srt(*PREFS).code == 0


@pytest.mark.parametrize("when", ["before the output is in place", "after it"])
def test_changes_between_a_kill_and_the_next_run_are_noticed(srt, folder, monkeypatch, when):
    """Whatever of its files a killed run has replaced, all of them are known to be its own."""
    assert srt(*LINE).code == 0
    write_jsonl(folder / "prompts.jsonl", [{"id": "new", "prompt": "another"}])
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("feedback.jsonl"):
            if when == "after it":
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        patched.setattr(Run, "__exit__", lambda run, *error: run._keeping.close())
        with pytest.raises(Killed):
            srt(*LINE)
    manifest = json.loads((folder / "feedback.run.json").read_text())
    assert manifest["status"] == "started"
    out = folder / "feedback.jsonl"
    written = out.read_bytes()
    out.write_bytes(written.replace(b"thin", b"fat"))
    refused = srt(*LINE)
    assert "feedback.jsonl: was changed after srt wrote it." in refused.stderr
    out.write_bytes(written)
    assert srt(*LINE).code == 0
    assert [row["id"] for row in read_jsonl(out)] == ["new"]


def test_of_two_runs_on_one_output_the_later_is_refused_also_when_the_first_has_just_ended(folder):
    options = BuildPrefs(data=(folder / "f.jsonl",), out=folder / "prefs.jsonl")
    with open_run("build-prefs", options, inputs={}):
        late = open_run("build-prefs", options, inputs={})
        with pytest.raises(SrtError, match="another srt run is writing here"):
            late.__enter__()
        write_atomically(options.out, b"{}\n")
    with pytest.raises(SrtError, match="another srt run has just written here"):
        late.__enter__()
    with open_run("build-prefs", options, inputs={}):
        write_atomically(options.out, b"{}\n")


class Killed(BaseException):
    """Stands for kill -9."""


def test_a_gz_that_version_0_1_0_wrote_uncompressed_is_still_read(srt, folder):
    write_jsonl(folder / "old.jsonl.gz", [json.loads(FEEDBACK)])
    finished = srt("build-prefs", "--data", "old.jsonl.gz")
    assert finished.code == 0, finished.stderr
    assert len(read_jsonl(folder / "prefs.jsonl")) == 1
    (folder / "broken.jsonl.gz").write_bytes(b"\x1f\x8bno")
    broken = srt("build-prefs", "--data", "broken.jsonl.gz", "--out", "other.jsonl")
    assert "broken.jsonl.gz: not a readable gzip file" in broken.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            (*LINE, "--out", "prompts.jsonl", "--overwrite"),
            "--out prompts.jsonl: would replace prompts.jsonl, the input of --prompts.",
        ),
        (
            ("build-prefs", "--data", "in.jsonl", "--data", "link.jsonl", "--out", "out.jsonl"),
            "--out out.jsonl: would replace link.jsonl, the input of --data.",
        ),
        (
            ("build-prefs", "--data", "p.dropped.jsonl", "--out", "p.jsonl"),
            "--out p.jsonl: would replace p.dropped.jsonl, the input of --data.",
        ),
        (
            ("sft", "--data", "models/own.jsonl", "--model", "m", "--out", "models", "--overwrite"),
            "--out models: would replace models/own.jsonl, the input of --data.",
        ),
    ],
)
def test_an_input_is_never_the_output(srt, folder, line, message):
    (folder / "models").mkdir()
    rows = [json.loads(line) for line in FEEDBACK.splitlines()]
    for name in ("in.jsonl", "p.dropped.jsonl", "models/own.jsonl"):
        write_jsonl(folder / name, rows)
    (folder / "link.jsonl").symlink_to("out.jsonl")
    write_jsonl(folder / "out.jsonl", rows)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = srt(*line)
    assert (refused.code, message in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


FEEDBACK = (
    '{"id": "1", "prompt": "p", "response": "rough", "feedback": {"weaknesses": "w", '
    '"suggestions": "s", "score": 3}, "refinement": "better", "refinement_score": 9, '
    '"refinement_feedback": null, '
    '"status": "ok", "reason": null, "raw": {}, "policy": "given", "critic": "c", "sample": 0, '
    '"round": 1, "usage": {}}'
)


def test_a_file_of_the_user_beside_the_output_stays(srt, folder):
    victim = folder / "victim"
    victim.write_text("precious")
    for name in ("feedback.jsonl", "feedback.run.json"):
        (folder / f"{name}.tmp").write_text("mine")
        (folder / f".{name}.srt.tmp").symlink_to(victim)
    assert srt(*LINE).code == 0
    assert victim.read_text() == "precious"
    assert (folder / "feedback.jsonl.tmp").read_text() == "mine"
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3
    assert not list(folder.glob(".*.tmp"))


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / ".x.json.srt.tmp"
    left.write_text("half")
    write_atomically(tmp_path / "x.json", b"whole")
    assert (tmp_path / "x.json").read_bytes() == b"whole"
    assert not left.exists()


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    first = OrderedWriter(tmp_path / "x.jsonl")
    with pytest.raises(SrtError, match=r"x\.jsonl: another srt run is writing it"):
        OrderedWriter(tmp_path / "x.jsonl")
    first.append(b"1\n")
    first.commit()
    assert (tmp_path / "x.jsonl").read_bytes() == b"1\n"


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rows_that_wait_for_one_before_them_do_not_fill_the_memory(tmp_path):
    writer = OrderedWriter(tmp_path / "x.jsonl")
    before = resident_bytes()
    for number in [*range(1, 6000), 6001]:
        writer.add_plain(number, [{"text": f"{number} {'x' * 10_000}"}])
    # 60 MB wait for the first row.
    assert resident_bytes() - before < 40 << 20
    writer.add_plain(0, [{"text": "0 x"}])
    writer.commit()
    writer.discard()
    lines = (tmp_path / "x.jsonl").read_bytes().splitlines()
    assert [int(line.split()[0][9:]) for line in lines] == [*range(6000), 6001]
    assert {path.name for path in tmp_path.iterdir()} == {"p.py", "prompts.jsonl", "x.jsonl"}


def test_a_file_that_another_run_has_just_written_is_not_taken_for_the_users(tmp_path):
    from srt_cli.runs.run import open_run
    from srt_cli.stages.collect_feedback import CollectFeedback

    options = CollectFeedback(out=tmp_path / "feedback.jsonl")
    with open_run("collect-feedback", options, inputs={}) as first:
        first.reached("half", whole=False)
    late = open_run("collect-feedback", options, inputs={})
    with open_run("collect-feedback", options, inputs={}) as second:
        write_atomically(options.out, b"{}\n")
        assert second.manifest.written
    with pytest.raises(SrtError, match="another srt run has just written here"):
        late.claim(options.out)


def test_a_link_as_output_is_written_through(srt, folder):
    (folder / "big").mkdir()
    (folder / "feedback.jsonl").symlink_to(folder / "big" / "there.jsonl")
    assert srt(*LINE).code == 0
    assert (folder / "feedback.jsonl").is_symlink()
    assert len(read_jsonl(folder / "big" / "there.jsonl")) == 3
    assert "nothing to do" in srt(*LINE).stdout


def test_an_output_that_ends_in_gz_is_gzip_and_the_same_every_time(srt, folder):
    assert srt(*LINE, "--out", "f.jsonl.gz").code == 0
    written = (folder / "f.jsonl.gz").read_bytes()
    assert len(gzip.decompress(written).splitlines()) == 3
    (folder / "f.jsonl.gz").unlink()
    assert srt(*LINE, "--out", "f.jsonl.gz").code == 0
    assert (folder / "f.jsonl.gz").read_bytes() == written
    read = srt("build-prefs", "--data", "f.jsonl.gz")
    assert "no pair is left (3 tie)" in read.stderr


def feed(path, content):
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    return writer


def test_a_pipe_is_an_input(srt, folder):
    os.mkfifo(folder / "pipe")
    writer = feed(folder / "pipe", (folder / "prompts.jsonl").read_bytes())
    assert srt(*LINE, "--prompts", "pipe").code == 0
    writer.join()
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3
    writer = feed(folder / "pipe", FEEDBACK.encode())
    assert srt("build-prefs", "--data", "pipe").code == 0
    writer.join()
    assert len(read_jsonl(folder / "prefs.jsonl")) == 1


def test_process_substitution_is_an_input(folder):
    line = " ".join(LINE)
    command = f"{sys.executable} -m srt_cli {line} --prompts <(cat prompts.jsonl)"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3


def test_a_linked_model_directory_is_emptied_and_stays_a_link(tmp_path):
    from srt_cli.runs.run import clear_directory

    (tmp_path / "big").mkdir()
    (tmp_path / "big/run.json").write_text("{}")
    (tmp_path / "big/checkpoints").mkdir()
    (tmp_path / "model").symlink_to("big")
    clear_directory(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert list((tmp_path / "big").iterdir()) == []


@pytest.mark.parametrize(
    "reply",
    [
        {"text": "t"},
        {"text": "t", "finish_reason": "stop", "usage": {"tokens": 3}},
        {"text": "t", "finish_reason": "stop", "usage": {}, "logprobs": [{"letter": "x"}]},
    ],
)
def test_a_reply_in_the_journal_that_nobody_can_read_is_owed_again(srt, folder, reply):
    assert srt(*LINE).code == 0
    written = (folder / "feedback.jsonl").read_bytes()
    journal = folder / "feedback.journal.jsonl"
    rows = read_jsonl(journal)
    write_jsonl(journal, [{"key": rows[0]["key"], "call": "c", "model": "m"} | reply, *rows[1:]])
    (folder / "feedback.jsonl").unlink()
    finished = srt(*LINE)
    assert finished.code == 0, finished.stderr
    assert (folder / "feedback.jsonl").read_bytes() == written


@pytest.mark.parametrize("name", ["closed/out.jsonl", "p.py/out.jsonl", "x" * 300 + ".jsonl"])
def test_a_path_that_cannot_be_written_is_named_with_a_way_out(srt, folder, name):
    (folder / "closed").mkdir(mode=0o500)
    finished = srt(*LINE, "--out", name)
    if os.getuid() == 0 and name.startswith("closed"):
        pytest.skip("root writes everywhere")
    assert finished.code == 1
    *_, last = finished.stderr.splitlines()
    assert last.startswith(f"error: {name.partition('/')[0]}")
    assert re.search(r"(Check the path|Choose a shorter name|choose another path)\.$", last)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("overwrite = true", "srt.toml: overwrite replaces outputs, which"),
        (
            'out = "../elsewhere.jsonl"',
            "srt.toml: out = '../elsewhere.jsonl' leads out of its folder",
        ),
        (
            'out = "/etc/feedback.jsonl"',
            "srt.toml: out = '/etc/feedback.jsonl' leads out of its folder",
        ),
        (
            'out = "away/feedback.jsonl"',
            "srt.toml: out = 'away/feedback.jsonl' leads out of its folder",
        ),
        ('report = "../page.html"', "srt.toml: report = '../page.html' leads out of its folder"),
    ],
)
def test_a_found_srt_toml_replaces_nothing_and_stays_in_its_folder(srt, folder, preset, message):
    (folder / "away").symlink_to("/tmp")
    (folder / "srt.toml").write_text(preset + "\n")
    finished = srt(*LINE)
    assert (finished.code, message in finished.stderr) == (1, True), finished.stderr
    assert (
        "may not do. Pass it as a flag, or name the file with --config srt.toml." in finished.stderr
    )
    (folder / "srt.toml").write_text('out = "inside/feedback.jsonl"\noverwrite = false\n')
    assert srt(*LINE).code == 0
    assert len(read_jsonl(folder / "inside/feedback.jsonl")) == 3


@pytest.mark.parametrize(
    ("command", "preset", "said"),
    [
        ("collect-feedback", 'system = "/etc/passwd"', "leads out of its folder"),
        ("collect-feedback", 'system = "link"', "leads out of its folder"),
        ("collect-feedback", 'chat-template = "~/passwd"', "leads out of its folder"),
        ("collect-feedback", 'critic-extra-body = "/etc/passwd"', "leads out of its folder"),
        ("collect-feedback", 'prompts = "/etc/pass*"', "leads out of its folder"),
        ("collect-feedback", 'prompts = "hf:/etc:train"', "leads out of its folder"),
        ("collect-feedback", 'critic = "file:/etc/passwd"', "leads out of its folder"),
        ("collect-feedback", 'critic = "file:/etc/pass*"', "leads out of its folder"),
        ("collect-feedback", 'critic = "file:hf:/etc"', "leads out of its folder"),
        ("collect-feedback", 'critic = "file:a=b"', "leads out of its folder"),
        ("sft", 'data = ["feedback.jsonl", "link:2"]', "leads out of its folder"),
        ("sft", 'mix = ["/etc/passwd:2"]', "leads out of its folder"),
        ("eval", 'objective = ["m=/etc/passwd"]', "leads out of its folder"),
        ("eval", 'model = ["name=/etc/passwd"]', "leads out of its folder"),
        ("sft", 'push-to-hub = "me/mine"', "uploads a model"),
        ("sft", "hub-public = true", "shows a model to everybody"),
        ("sft", 'report-to = ["wandb"]', "sends figures to a service"),
        ("sft", 'set = ["push_to_hub=true"]', "may upload, load or run something"),
        ("sft", 'set = ["seed=1", "deepspeed=1"]', "may upload, load or run something"),
        ("sft", 'set = ["optim=adamw_torch x=1"]', "may upload, load or run something"),
        ("sft", 'accelerate-config = "p.py"', "chooses with which machines to compute"),
    ],
)
def test_a_found_srt_toml_reads_nothing_of_yours_and_uploads_nothing(
    srt, folder, monkeypatch, command, preset, said
):
    monkeypatch.setenv("HOME", "/etc")
    for name in ("link", "a=b"):
        (folder / name).symlink_to("/etc/passwd")
    (folder / "srt.toml").write_text(f"[{command}]\n{preset}\n")
    refused = srt(command)
    assert refused.code == 1
    assert refused.stderr.startswith("error: srt.toml: ")
    assert f"{said}, which a file that was merely found may not do." in refused.stderr


def test_a_found_srt_toml_may_name_weights_anywhere_and_texts_of_any_form(srt, folder, tiny_model):
    (folder / "srt.toml").write_text(
        f'system = "/no_think"\nmodel = "{tiny_model}"\nreport-to = "tensorboard"\n'
        'extra-body = \'{"stop": ["/etc/*"]}\'\n'
    )
    finished = srt("collect-feedback", "--critic", "python:p.py:critique", "--dry-run")
    assert finished.code == 0, finished.stderr


def test_a_found_srt_toml_sets_numbers_and_switches_of_trl(srt, folder):
    (folder / "srt.toml").write_text(
        '[sft]\nset = ["adam_beta2=0.95", "use_cpu=true", "a=-1e-8"]\n'
    )
    assert "data: no such file" in srt("sft", "--data", "data", "--model", "m").stderr


@pytest.mark.parametrize("value", ['[["wandb"]]', "{a = 1}"])
def test_a_found_value_of_another_type_is_said(srt, folder, value):
    (folder / "srt.toml").write_text(f"[sft]\nreport-to = {value}\n")
    refused = srt("sft")
    assert refused.code == 2
    assert refused.stderr.startswith("error: srt.toml: --report-to ")


def test_the_addresses_in_a_found_srt_toml_are_said(srt, folder):
    (folder / "srt.toml").write_text('critic = "http://127.0.0.1:9/v1#m"\n')
    said = srt("collect-feedback", "--dry-run").stderr
    assert "srt.toml: critic is http://127.0.0.1:9/v1#m\n" in said


def by_manifest(path, inputs=None, **settings):
    """A manifest as somebody may hand it over with their files."""
    path.parent.mkdir(exist_ok=True)
    manifest = {"command": "sft", "settings": settings, "runtime": {}, "inputs": inputs or {}}
    path.write_text(json.dumps(manifest))


def test_what_a_manifest_names_and_nobody_typed_is_said(srt, folder):
    write_jsonl(folder / "feedback.jsonl", [json.loads(FEEDBACK)])
    by_manifest(
        folder / "feedback.run.json", model="their/policy", critic="http://127.0.0.1:9/v1#m"
    )
    by_manifest(folder / "tuned/run.json", model="their/base")
    said = srt("eval", "--model", "tuned", "--prompts", "none.jsonl").stderr
    assert "reference: their/base, by the manifests of tuned\n" in said
    assert (
        "judge: http://127.0.0.1:9/v1#m, the critic of feedback.jsonl; --judge takes another\n"
        in said
    )
    (folder / "c.py").write_text("def check(prompt, response):\n    return True\n")
    line = ("eval", "--model", "tuned", "--prompts", "none.jsonl")
    assert "judge:" not in srt(*line, "--check", "python:c.py:check").stderr
    by_manifest(folder / "feedback.run.json", model="their/policy", critic="file:written.jsonl")
    assert "Nobody to judge. Pass --judge SPEC" in srt(*line).stderr
    typed = (
        "eval",
        "--model",
        "tuned",
        "--reference",
        "gpt-4",
        "--judge",
        "gpt-4",
        "--prompts",
        "no",
    )
    assert not re.search("^(reference|judge): ", srt(*typed).stderr, re.MULTILINE)
    assert "model: their/policy, by the manifest of feedback.jsonl\n" in srt("sft").stderr
    (folder / "prefs.jsonl").write_text("{}\n")
    by_manifest(folder / "prefs.run.json", inputs={"data": {"path": "feedback.jsonl"}})
    assert "model: their/policy, by the manifests of prefs.jsonl\n" in srt("dpo").stderr
    assert "model: " not in srt("sft", "--model", "no/such").stderr.partition("error")[0]
