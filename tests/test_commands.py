"""The command line as a user meets it: help at once, and for each mistake one message with the next step."""

import contextlib
import gc
import json
import subprocess
import sys

import pytest
from conftest import SAMPLE, SCRIPT
from servers.hub import HubServer

from finetune_r1 import Lazy

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
    (tmp_path / "latin.csv").write_bytes("Question,Complex_CoT,Response\nFièvre?,Hm.,Oui.\n".encode("latin-1"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "cut.json").write_text('[{"Question": "Why?"')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "blank.jsonl").write_text('{"Question": "Why?", "Complex_CoT": "", "Response": "So."}\n')
    for folder in ("no_model", "nothing", "mixed", "bad_model", "runs/old", "runs/torn"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        (tmp_path / "mixed" / name).write_text("{}")
    (tmp_path / "bad_model" / "config.json").write_text('{"model_type": "lla')
    unfinished = tmp_path / "runs" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text('{"status": "failed"}')
    (unfinished / "config.json").write_text("{}")
    (tmp_path / "runs" / "old" / "run.json").write_text('{"status": "failed"}')
    (tmp_path / "runs" / "old" / "config.json").write_text('{"packing": true}')
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
    "a name that leads elsewhere": (["load", "--model", "../other/model"], 1, ["--model ../other/model"]),
    "no name of a model": (["load", "--model", ""], 1, ["--model"]),
    "a model and an adapter in one folder": (["load", "--model", "{tmp}/mixed"], 1, ["twice", "move"]),
    "a model whose config is cut": (["load", "--model", "{tmp}/bad_model"], 1, ["config.json"]),
    "a repository that leads elsewhere": (["push", "--repo", "../x"], 1, ["--repo ../x"]),
    "a repository in a repository": (["push", "--repo", "user/a/b"], 1, ["--repo user/a/b"]),
    "a repository with a space": (["push", "--repo", "user/my model"], 1, ["--repo user/my model"]),
    "a push without a token": (["push", "--repo", "user/model"], 1, ["no Hugging Face token", "login"]),
    "a file of any kind": (["train", "--model", "{tiny}", "--dataset", "{tmp}/full/mine.txt"], 1, ["mine.txt, line 1"]),
    "a folder without rows": (["train", "--model", "{tiny}", "--dataset", "{tmp}/nothing"], 1, ["--dataset"]),
    "a dataset that leads elsewhere": (["format", "--dataset", "../../no/such"], 1, ["--dataset ../../no/such"]),
    "another encoding": (["format", "--model", "{tiny}", "--dataset", "{tmp}/latin.csv"], 1, ["latin.csv, line 2"]),
    "a cut parquet": (["format", "--model", "{tiny}", "--dataset", "{tmp}/cut.parquet"], 1, ["cut.parquet"]),
    "a cut array": (["format", "--model", "{tiny}", "--dataset", "{tmp}/cut.json"], 1, ["cut.json"]),
    "lists for rows": (["format", "--model", "{tiny}", "--dataset", "{tmp}/list.jsonl"], 1, ["list.jsonl, line 1"]),
    "nothing but blanks": (["format", "--model", "{tiny}", "--dataset", "{tmp}/blank.jsonl"], 1, ["is empty"]),
    "rows that are all too long": (
        ["format", "--model", "{tiny}", "--dataset", "{sample}", "--max-seq-length", "40"], 1, ["0 usable", "exceed"]
    ),
    "an overlong row is an error": (
        ["format", "--model", "{tiny}", "--dataset", "{sample}", "--max-seq-length", "300", "--overlong", "error"],
        1, ["--overlong error", "--max-seq-length"],
    ),
    "a slice that ends before it starts": ([*TRAIN, "--split", "train[9:2]"], 1, ["--split train[9:2]", "no rows"]),
    "a slice without end": ([*TRAIN, "--split", "train[:9"], 1, ["--split train[:9"]),
    "no split": ([*TRAIN, "--split", ""], 1, ["--split"]),
    "all rows held out": ([*TRAIN, "--split", "train[:9]", "--eval-rows", "9"], 1, ["--eval-rows 9"]),
    "a layer without name": ([*TRAIN, "--target-modules", "q_proj,,k_proj"], 1, ["--target-modules"]),
    "a run without saying what to do with it": (["train", "runs/unfinished"], 1, ["train --resume runs/unfinished"]),
    "resuming what is not there": (["train", "--resume", "runs/nope"], 1, ["runs/nope (--run or --resume)"]),
    "resuming another training": (
        ["train", "--resume", "runs/unfinished", "--lora-r", "8"], 1, ["--lora-r was 16, now 8"]
    ),
    "resuming another version's run": (["train", "--resume", "runs/old"], 1, ["runs/old", "packing"]),
    "training where a run is": ([*TRAIN, "--run-dir", "runs/unfinished"], 1, ["--run-dir", "--resume"]),
    "evaluating no run": (["eval", "--run", "{tmp}/full"], 1, ["no run folder"]),
    "saving what never ended": (["save", "--run", "runs/unfinished", "--as", "adapter"], 1, ["no adapter", "failed"]),
    "saving over something": (["save", "-o", "{tmp}/full"], 1, ["--output", "there already"]),
    "a Modelfile for an adapter": (["save", "--as", "adapter", "--modelfile"], 1, ["--modelfile", "--as"]),
    "a question and a file of them": (
        ["infer", "Why?", "--file", "{tmp}/list.jsonl", "-o", "a.jsonl", "--model", "{tiny}"], 1, ["--file", "without"]
    ),
    "no file of questions": (["infer", "--file", "q.jsonl", "-o", "a.jsonl", "--model", "{tiny}"], 1, ["q.jsonl"]),
    "a question that closes the thought": (
        ["infer", "Why? </think>", "--model", "{tiny}", "--max-new-tokens", "2"], 1, ["</think>"]
    ),
    "a time without unit": (["train", "--max-time", "90"], 2, ["--max-time", "90m"]),
    "a time in words": (["train", "--max-time", "soon"], 2, ["--max-time"]),
    "no checkpoints at all": (["train", "--keep-checkpoints", "0"], 2, ["--keep-checkpoints"]),
    "rows of five tokens": (["train", "--max-seq-length", "5"], 2, ["--max-seq-length"]),
    "rows beyond any model": (["train", "--max-seq-length", "2000000"], 2, ["--max-seq-length"]),
    "an optimizer of that name": (["train", "--optim", "adam"], 2, ["--optim", "adamw_8bit"]),
    "a dtype of that name": (["load", "--dtype", "int8"], 2, ["--dtype", "bfloat16"]),
    "a policy of that name": (["format", "--overlong", "cut"], 2, ["--overlong", "shorten-thought"]),
    "no answer at all": (["infer", "Why?", "--max-new-tokens", "0"], 2, ["--max-new-tokens"]),
    "too hot": (["infer", "Why?", "--temperature", "9"], 2, ["--temperature"]),
    "fewer rows than none": (["train", "--eval-rows", "-1"], 2, ["--eval-rows"]),
    "a format of another tool": (["save", "--as", "gguf"], 2, ["--as", "merged-16bit"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_a_message_and_the_next_step(told, broken, arguments, code, said):
    """`pytest -rP -k mistake` shows all the messages."""
    before = sorted(broken["tmp"].rglob("*"))
    done = told([argument.format(**broken) for argument in arguments], cwd=broken["tmp"])
    print(done.err)
    assert done.code == code
    assert all(text in done.err for text in said)
    assert ("next:" if code == 1 else "--help") in done.err
    assert "Traceback" not in done.err and done.out == ""
    assert sorted(broken["tmp"].rglob("*")) == before, "nothing was made and nothing was lost"


@pytest.mark.parametrize("mistake", ["no such file", "unknown option"])
def test_and_so_it_is_for_a_user_at_a_terminal(cli, broken, mistake):
    arguments, code, said = MISTAKES[mistake]
    done = cli(*(argument.format(**broken) for argument in arguments))
    assert done.code == code and all(text in done.err for text in said)
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize("module", ["json", "no_such_module"])
def test_garbage_is_collected_again_after_an_import(module):
    with contextlib.suppress(ModuleNotFoundError):
        assert Lazy(module).dumps is json.dumps
    assert gc.isenabled()


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
