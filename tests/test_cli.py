"""The command line as a user meets it: help at once, and for each mistake one message with the next step."""

import json
import subprocess
import sys

import pytest
from conftest import SAMPLE, SCRIPT
from servers.hub import HubServer

COMMANDS = ["login", "doctor", "load", "format", "train", "infer", "eval", "save", "push", "demo"]
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "bitsandbytes", "wandb"}


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=["", *COMMANDS])
def test_help_imports_nothing_heavy(command):
    code = f"""
import runpy, sys
sys.argv = [{str(SCRIPT)!r}, *{command!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("\\n", end.code, *sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: finetune_r1.py") and done.stdout.splitlines()[-1].split() == ["0"]


@pytest.fixture
def broken(tmp_path, tiny_r1):
    """Files and folders that a user could name by mistake."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "columns.jsonl").write_text('{"q": "Why?", "a": "So."}\n')
    (tmp_path / "cut.jsonl").write_text('{"Question": "Why?", "Complex_CoT": "Hm.", "Resp')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    (tmp_path / "no_model").mkdir()
    unfinished = tmp_path / "runs" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text('{"status": "failed"}')
    (unfinished / "config.json").write_text("{}")
    return {"tmp": tmp_path, "tiny": tiny_r1, "sample": SAMPLE}


TRAIN = ("train", "--model", "{tiny}", "--dataset", "{sample}")
MISTAKES = {
    "no GPU for the 8B": (["train", "--max-steps", "60"], 1, ["no CUDA GPU", "demo"]),
    "no GPU to load it": (["load"], 1, ["no CUDA GPU", "demo"]),
    "hub not reached": (["load", "--model", "someone/small-135M"], 1, ["not reached", "doctor"]),
    "no such model": (["load", "--model", "no/such/model"], 1, ["--model no/such/model"]),
    "folder without model": (["load", "--model", "{tmp}/no_model"], 1, ["--model", "config.json"]),
    "no such file": (["train", "--model", "{tiny}", "--dataset", "nope.jsonl"], 1, ["--dataset nope.jsonl"]),
    "empty file": (["train", "--model", "{tiny}", "--dataset", "{tmp}/empty.jsonl"], 1, ["--dataset", "no rows"]),
    "cut file": (["train", "--model", "{tiny}", "--dataset", "{tmp}/cut.jsonl"], 1, ["--dataset"]),
    "missing columns": (
        ["train", "--model", "{tiny}", "--dataset", "{tmp}/columns.jsonl"], 1, ["--question-col Question", "q, a"]
    ),
    "bad split": ([*TRAIN, "--split", "nope"], 1, ["--split nope"]),
    "folder with something in it": ([*TRAIN, "--run-dir", "{tmp}/full"], 1, ["--run-dir", "not empty"]),
    "folder that cannot be made": ([*TRAIN, "--run-dir", "{tmp}/empty.jsonl/run"], 1, ["path"]),
    "micro-batch and warm-up at once": (
        [*TRAIN, "--micro-batch", "3", "--warmup-steps", "99"], 1, ["--micro-batch 3", "--warmup-steps 99"]
    ),
    "no finished run": (["infer", "Why?"], 1, ["no finished run", "train"]),
    "no run there": (["save", "--run", "{tmp}/full"], 1, ["--run", "run.json"]),
    "run without adapter": (["save", "--run", "{tmp}/runs/unfinished"], 1, ["--run", "no adapter"]),
    "empty question": (["infer", " ", "--model", "{tiny}"], 1, ["question is empty"]),
    "no question": (["infer", "--model", "{tiny}"], 1, ["question is empty"]),
    "two sides and one side": (["infer", "Why?", "--compare", "--base"], 1, ["--compare", "--base"]),
    "questions and nowhere to": (["infer", "--file", "q.jsonl", "--model", "{tiny}"], 1, ["--output"]),
    "questions that are no JSON": (
        ["infer", "--file", "{tmp}/cut.jsonl", "-o", "a.jsonl", "--model", "{tiny}"], 1, ["JSON"]
    ),
    "questions without a question": (
        ["infer", "--file", "{tmp}/columns.jsonl", "-o", "a.jsonl", "--model", "{tiny}"], 1, ["--file", "Question"]
    ),
    "answers over something": (
        ["infer", "--file", "q.jsonl", "-o", "{tmp}/full/mine.txt"], 1, ["--output", "there already"]
    ),
    "rows over something": (["format", "-o", "{tmp}/columns.jsonl"], 1, ["--output", "there already"]),
    "wrong ending": (["format", "--output", "rows.xlsx"], 1, ["--output rows.xlsx"]),
    "no repository name": (["push", "--repo", "medical-cot"], 1, ["--repo medical-cot", "push --repo"]),
    "no repository": (["push"], 2, ["--repo"]),
    "rank of 0": (["train", "--lora-r", "0"], 2, ["--lora-r"]),
    "negative learning rate": (["train", "--learning-rate", "-1"], 2, ["--learning-rate"]),
    "steps in words": (["train", "--max-steps", "ten"], 2, ["--max-steps"]),
    "unknown language": (["train", "--lang", "fr"], 2, ["--lang", "en"]),
    "unknown option": (["train", "--lora-rank", "8"], 2, ["--lora-rank"]),
    "unknown command": (["tune"], 2, ["tune"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_a_message_and_the_next_step(cli, broken, arguments, code, said):
    before = sorted(broken["tmp"].rglob("*"))
    done = cli(*(argument.format(**broken) for argument in arguments))
    print(done.err)
    assert done.code == code
    assert all(text in done.err for text in said)
    assert ("next:" if code == 1 else "--help") in done.err
    assert "Traceback" not in done.err and done.out == ""
    assert sorted(broken["tmp"].rglob("*")) == before, "nothing was made and nothing was lost"


def test_the_8b_without_a_gpu_is_refused_before_the_imports_that_take_long(cli):
    done = cli("train", "--max-steps", "60", PYTHONPROFILEIMPORTTIME="1")
    lines = [line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")]
    imported = {line.partition(".")[0] for line in lines}
    assert done.code == 1 and "torch" in imported, "which tells whether there is a GPU"
    assert not imported & {"unsloth", "transformers", "trl", "peft", "datasets", "wandb", "bitsandbytes"}


@pytest.mark.parametrize("arguments", [["load", "--model", "no/such"], ["format", "--dataset", "no/such"]])
def test_what_the_hub_does_not_have_is_named(cli, arguments):
    with HubServer(tokens={}) as hub:
        done = cli(*arguments, HF_ENDPOINT=hub.url, HTTP_PROXY=hub.url)
    assert done.code == 1 and "no/such" in done.err and "next:" in done.err and "Traceback" not in done.err


def test_without_a_network_the_dataset_is_not_reached_and_the_message_says_so(cli):
    done = cli("format", HF_HUB_OFFLINE="1")
    assert done.code == 1 and "--dataset" in done.err and "next:" in done.err and "Traceback" not in done.err


def test_doctor_says_what_is_missing_and_what_train_would_do(cli):
    done = cli("doctor", "--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["gpus"] == [] and "no CUDA GPU" in report["verdict"]
    assert report["versions"]["unsloth"] != "missing" and report["hub"].startswith("not reached")
