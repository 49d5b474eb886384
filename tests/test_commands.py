"""The command line as a user meets it: help at once, and for each mistake one message with the next step."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
from conftest import SAMPLE, SCRIPT
from servers.hub import HubServer
from terminal import typed

import finetune_r1
from finetune_r1 import VERSION, Lazy, TrainConfig

COMMANDS = [
    "demo",
    "doctor",
    "login",
    "load",
    "format",
    "train",
    "infer",
    "eval",
    "runs",
    "save",
    "push",
]
HEADINGS = ["Options", "Model", "Data", "Answers", "LoRA", "Training", "Run", "Tracking"]
HEAVY = {
    "torch",
    "transformers",
    "unsloth",
    "trl",
    "peft",
    "datasets",
    "bitsandbytes",
    "wandb",
    "gguf",
}


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=["", *COMMANDS])
def test_help_imports_nothing_heavy_and_is_readable_at_80_columns(command):
    code = f"""
import runpy, sys
sys.argv = [{str(SCRIPT)!r}, *{command!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("\\n", end.code, *sorted({HEAVY!r} & set(sys.modules)))
"""
    narrow = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], env=narrow, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Usage: finetune_r1.py") and lines[-1].split() == ["0"]
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_the_list_of_commands_begins_with_the_demo_and_tells_of_each_in_one_whole_line(cli):
    lines = cli("--help", COLUMNS="80").out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)


@pytest.mark.parametrize("command", [[], ["train"]], ids=["", "train"])
def test_help_has_a_short_name(cli, command):
    done = cli(*command, "-h")
    assert done == cli(*command, "--help") and done.code == 0 and "--help" in done.out


def test_the_version_is_told(cli):
    project = tomllib.loads((SCRIPT.parent / "pyproject.toml").read_text())["project"]
    assert cli("--version") == (0, f"{project['version']}\n", "") and project["version"] == VERSION


def test_doctor_takes_what_it_judges_by(cli):
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", cli("doctor", "--help").out, re.MULTILINE)
    settings = {"--model", "--max-seq-length", "--load-in-4bit", "--dtype", "--gpu-memory-gib"}
    assert set(options) == settings | {"--json", "--quiet", "--verbose", "--help"}


def test_without_the_packages_the_next_step_is_told():
    done = subprocess.run([sys.executable, "-S", SCRIPT, "demo"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    error, next_step = done.stderr.splitlines()
    assert error.startswith("error: the packages") and next_step.startswith(
        "next:  `uv run finetune_r1.py`"
    )


def test_the_settings_stand_under_headings_in_the_order_of_their_use(cli):
    lines = cli("train", "--help", COLUMNS="80").out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [*(f"{name}:" for name in HEADINGS), "Examples:"]
    place = {name: lines.index(f"{name}:") for name in HEADINGS}
    for option, heading in {"--lora-r ": "LoRA", "--split ": "Data", "--save-steps ": "Run"}.items():
        at = next(number for number, line in enumerate(lines) if line.startswith(f"  {option}"))
        assert max((name for name in HEADINGS if place[name] < at), key=place.get) == heading


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_examples_of_it(cli, command):
    examples = cli(command, "--help", COLUMNS="80").out.partition("Examples:\n")[2].splitlines()
    assert re.match(rf"  python \S*finetune_r1.py {command}\b", examples[0])


@pytest.fixture
def folder(tmp_path, tiny_r1):
    """Where the command is given: a good model and good rows, and what a user could name by mistake."""
    (tmp_path / "tiny").symlink_to(tiny_r1)
    (tmp_path / "rows.jsonl").symlink_to(SAMPLE)
    files = {
        "empty.jsonl": "",
        "columns.jsonl": '{"q": "Why?", "a": "So."}\n',
        "cut.jsonl": '{"Question": "Why?", "Complex_CoT": "Hm.", "Resp',
        "cut.json": '[{"Question": "Why?"',
        "cut.parquet": "PAR1 and no more",
        "list.jsonl": "[1, 2]\n",
        "blank.jsonl": '{"Question": "Why?", "Complex_CoT": "", "Response": "So."}\n',
        "full/mine.txt": "keep me",
        "mixed/config.json": "{}",
        "mixed/adapter_config.json": "{}",
        "mixed/model.safetensors": "{}",
        "bad_model/config.json": '{"model_type": "lla',
        "bad_model/model.safetensors": "{}",
        "no_weights/config.json": "{}",
        "runs/unfinished/run.json": '{"status": "failed"}',
        "runs/unfinished/config.json": "{}",
        "unfinished/notes.txt": "no run, but named like one",
        "runs/unfinishd.txt": "no run either",
        "runs/my run/run.json": '{"status": "failed"}',
        "runs/old/run.json": '{"status": "failed"}',
        "runs/old/config.json": '{"packing": true}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.csv").write_bytes(
        "Question,Complex_CoT,Response\nFièvre?,Hm.,Oui.\n".encode("latin-1")
    )
    for name in ("no_model", "nothing"):
        (tmp_path / name).mkdir()
    return tmp_path


# What is typed, and what the message and the next step name.
TRAIN, FORMAT = "train --model tiny --dataset rows.jsonl", "format --model tiny --dataset"
MISTAKES = {
    # the model
    "no GPU for the 8B": ("train --max-steps 60", ["no CUDA GPU", "demo"]),
    "no GPU to load it": ("load", ["no CUDA GPU", "demo"]),
    "hub not reached": ("load --model someone/small-135M", ["not reached", "doctor"]),
    "no such model": ("load --model no/such/model", ["--model no/such/model"]),
    "a name that leads elsewhere": ("load --model ../other/model", ["--model ../other/model"]),
    "no name of a model": ("load --model ''", ["--model"]),
    "folder without model": ("load --model no_model", ["--model", "config.json"]),
    "a model and an adapter in one folder": ("load --model mixed", ["twice", "move"]),
    "a model whose config is cut": ("load --model bad_model", ["config.json"]),
    "a model without weights": ("load --model no_weights", ["--model no_weights", "safetensors"]),
    # the rows
    "no such file": ("train --model tiny --dataset nope.jsonl", ["--dataset nope.jsonl"]),
    "empty file": (f"{FORMAT} empty.jsonl", ["--dataset empty.jsonl", "is empty"]),
    "cut file": (f"{FORMAT} cut.jsonl", ["--dataset cut.jsonl"]),
    "a cut array": (f"{FORMAT} cut.json", ["--dataset cut.json"]),
    "a cut parquet": (f"{FORMAT} cut.parquet", ["--dataset cut.parquet"]),
    "another encoding": (f"{FORMAT} latin.csv", ["--dataset latin.csv", "UTF-8"]),
    "lists for rows": (f"{FORMAT} list.jsonl", ["--dataset list.jsonl", "columns"]),
    "missing columns": (f"{FORMAT} columns.jsonl", ["--question-col", "Question", "q, a"]),
    "a file of any kind": (f"{FORMAT} full/mine.txt", ["--dataset full/mine.txt", ".jsonl"]),
    "a folder without rows": (f"{FORMAT} nothing", ["--dataset nothing"]),
    "a dataset that leads elsewhere": ("format --dataset ../../no/such", ["--dataset ../../no/such"]),
    "nothing but blanks": (f"{FORMAT} blank.jsonl", ["is empty"]),
    "rows that are all too long": (f"{FORMAT} rows.jsonl --max-seq-length 40", ["0 usable", "exceed"]),
    "an overlong row is an error": (
        f"{FORMAT} rows.jsonl --max-seq-length 300 --overlong error", ["--overlong error", "--max-seq-length"]
    ),
    "bad split": (f"{TRAIN} --split nope", ["--split nope"]),
    "a slice that ends before it starts": (f"{TRAIN} --split train[9:2]", ["--split train[9:2]", "no rows"]),
    "a slice without end": (f"{TRAIN} --split train[:9", ["--split train[:9"]),
    "no split": (f"{TRAIN} --split ''", ["--split"]),
    "all rows held out": (f"{TRAIN} --split train[:9] --eval-rows 9", ["--eval-rows 9"]),
    "rows over something": ("format -o columns.jsonl", ["--output", "there already"]),
    "wrong ending": ("format --output rows.xlsx", ["--output rows.xlsx"]),
    # a training
    "micro-batch and warm-up at once": (
        f"{TRAIN} --micro-batch 3 --warmup-steps 99", ["--micro-batch 3", "--warmup-steps 99"]
    ),
    "a layer without name": (f"{TRAIN} --target-modules q_proj,,k_proj", ["--target-modules"]),
    "folder with something in it": (f"{TRAIN} --run-dir full", ["--run-dir", "not empty"]),
    "folder that cannot be made": (f"{TRAIN} --run-dir empty.jsonl/run", ["path"]),
    "training where a run is": (f"{TRAIN} --run-dir runs/unfinished", ["--run-dir", "--resume"]),
    "training where a run with a space is": (
        f"{TRAIN} --run-dir 'runs/my run'", ["`python finetune_r1.py train --resume 'runs/my run'`"]
    ),
    "a number without its flag": ("train 60", ["RUN 60 needs --resume", "train --max-steps 60`"]),
    "steps and epochs": ("train --max-steps 9 --epochs 1", ["--epochs", "--max-steps"]),
    "three runs to compare": ("runs a b c", ["two to compare", "runs A B"]),
    "a run without saying what to do with it": ("train 'runs/my run'", ["train --resume 'runs/my run'`"]),
    "resuming what is not there": ("train --resume runs/nope", [": runs/nope", "--resume", "no run folder"]),
    "resuming another training": ("train --resume runs/unfinished --lora-r 8", ["--lora-r was 16, now 8"]),
    "resuming another version's run": ("train --resume runs/old", ["runs/old", "packing"]),
    # questions
    "no finished run": ("infer Why?", ["no finished run", "train"]),
    "empty question": ("infer ' ' --model tiny", ["question is empty"]),
    "no question": ("infer --model tiny", ["question is empty"]),
    "a question that closes the thought": ("infer 'Why? </think>' --model tiny", ["</think>"]),
    "two sides and one side": ("infer Why? --compare --base", ["--compare", "--base"]),
    "questions and nowhere to": ("infer --file q.jsonl --model tiny", ["--output"]),
    "a question and a file of them": ("infer Why? --file q.jsonl -o a.jsonl", ["--file", "--output"]),
    "no file of questions": ("infer --file q.jsonl -o a.jsonl --model tiny", ["q.jsonl"]),
    "questions that are no JSON": ("infer --file cut.jsonl -o a.jsonl --model tiny", ["--file", "JSON"]),
    "questions without a question": (
        "infer --file columns.jsonl -o a.jsonl --model tiny", ["--file columns.jsonl", "Question"]
    ),
    "answers over something": ("infer --file q.jsonl -o full/mine.txt", ["--output", "there already"]),
    # a run's adapter
    "a run's name mistyped": ("infer Why? --run unfinishd", ["unfinishd", "such as unfinished\n"]),
    "a run's path mistyped": ("save --run runs/unfinishd", [": runs/unfinishd", "such as unfinished\n"]),
    "a name mistyped for train": ("train --resume unfinishd", ["unfinishd", "such as unfinished\n"]),
    "a name like no other": ("save --run xyz", ["xyz", "next:  name the folder of a training\n"]),
    "a run by its name": ("save --run unfinished --as adapter", ["--run runs/unfinished", "no adapter"]),
    "a run by its name to go on with": ("train --resume old", ["runs/old", "packing"]),
    "no run there": ("save --run full", ["full", "--run", "no run folder"]),
    "evaluating no run": ("eval --run full", ["full", "--run", "no run folder"]),
    "run without adapter": ("save --run runs/unfinished --as adapter", ["--run", "no adapter", "failed"]),
    "saving over something": ("save -o full", ["--output", "there already"]),
    "a Modelfile for an adapter": ("save --as adapter --modelfile", ["--modelfile", "--as"]),
    "numbers of no GGUF": ("save --outtype f16", ["--outtype f16", "--as gguf"]),
    "no repository name": ("push --repo medical-cot", ["--repo medical-cot", "push --repo"]),
    "a repository that leads elsewhere": ("push --repo ../x", ["--repo ../x"]),
    "a repository in a repository": ("push --repo user/a/b", ["--repo user/a/b"]),
    "a repository with a space": ("push --repo 'user/my model'", ["--repo user/my model"]),
    "a push without a token": (
        "push --repo user/model", ["no Hugging Face token", "`python finetune_r1.py login`"]
    ),
}  # fmt: skip
# What the parser refuses by itself; it points to --help.
MISTYPED = {
    "no repository": ("push", ["--repo"]),
    "rank of 0": ("train --lora-r 0", ["--lora-r"]),
    "negative learning rate": ("train --learning-rate -1", ["--learning-rate"]),
    "steps in words": ("train --max-steps ten", ["--max-steps"]),
    "unknown language": ("train --lang fr", ["--lang", "en"]),
    "unknown option": ("train --lora-rank 8", ["--lora-rank"]),
    "unknown command": ("tune", ["tune"]),
    "no checkpoints at all": ("train --keep-checkpoints 0", ["--keep-checkpoints"]),
    "rows of five tokens": ("train --max-seq-length 5", ["--max-seq-length"]),
    "rows beyond any model": ("train --max-seq-length 2000000", ["--max-seq-length"]),
    "an optimizer of that name": ("train --optim adam", ["--optim", "adamw_8bit"]),
    "a dtype of that name": ("load --dtype int8", ["--dtype", "bfloat16"]),
    "a policy of that name": ("format --overlong cut", ["--overlong", "shorten-thought"]),
    "no answer at all": ("infer Why? --max-new-tokens 0", ["--max-new-tokens"]),
    "too hot": ("infer Why? --temperature 9", ["--temperature"]),
    "fewer rows than none": ("train --eval-rows -1", ["--eval-rows"]),
    "a format of another tool": ("save --as exl2", ["--as", "merged-16bit"]),
    "numbers of another tool": ("save --as gguf --outtype q4_k_m", ["--outtype", "q8_0"]),
}


@pytest.mark.parametrize(("line", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_a_message_and_the_next_step(run_cli, folder, monkeypatch, line, said):
    """`pytest -rP -k mistake` shows all the messages."""
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n"))
    )  # a pipe with nothing in it
    before = sorted(folder.rglob("*"))
    done = run_cli(shlex.split(line), cwd=folder)
    print(done.err)
    assert done.code == 1 and "next:" in done.err
    assert all(text in done.err for text in said)
    assert "Traceback" not in done.err and done.out == ""
    assert not re.search(f"`({'|'.join(COMMANDS)})", done.err.rpartition("next:")[2]), (
        "can't be pasted"
    )
    assert sorted(folder.rglob("*")) == before, "nothing was made and nothing was lost"


def test_a_pipe_that_is_closed_holds_no_question(run_cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = run_cli(["infer", "--model", "tiny"])
    assert done.code == 1 and "question is empty" in done.err


@pytest.mark.parametrize(("line", "said"), MISTYPED.values(), ids=MISTYPED)
def test_what_is_mistyped_is_named_and_help_is_offered(run_cli, line, said):
    done = run_cli(shlex.split(line))
    assert done.code == 2 and "--help" in done.err and done.out == ""
    assert all(text in done.err for text in said)


@pytest.mark.parametrize("line", ["train --model tiny --dataset nope.jsonl", "train --lora-rank 8"])
def test_and_so_it_is_for_a_user_at_a_terminal(cli, folder, line):
    done = cli(*shlex.split(line))
    assert done.code == (2 if "rank" in line else 1) and line.split()[-2] in done.err
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize("program", ["python", "uv run"])
def test_the_next_step_is_typed_as_the_program_was_started(cli, program):
    done = cli("train", "runs/a", **({"UV": "/bin/uv"} if "uv" in program else {}))
    assert f"next:  `{program} {SCRIPT} train --resume runs/a`" in done.err


def test_through_a_link_from_another_folder_too(tmp_path):
    """The line can be pasted, whatever the link is called."""
    (tmp_path / "мой скрипт.py").symlink_to(SCRIPT)
    command = [sys.executable, "мой скрипт.py", "train", "runs/a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "next:  `python 'мой скрипт.py' train --resume runs/a`" in done.stderr


def test_every_command_works_where_paths_have_spaces_quotes_and_letters_of_any_script(
    run_cli, tiny_r1, tmp_path
):
    folder = tmp_path / "мои данные '我的' {x} [y]"
    folder.mkdir()
    (folder / "модель 模型").symlink_to(tiny_r1)
    (folder / "строки 行.jsonl").symlink_to(SAMPLE)
    rows = ["--model", "модель 模型", "--dataset", "строки 行.jsonl", "--split", "train[:8]"]
    sizes = [
        "--max-seq-length",
        768,
        "--max-steps",
        1,
        "--effective-batch",
        2,
        "--learning-rate",
        1e-2,
    ]
    short = ["--max-new-tokens", 2]
    for line in (
        ["format", *rows, "-o", "из них 行.jsonl"],
        [
            "train",
            *rows,
            *sizes,
            *short,
            "--no-wandb",
            "--eval-rows",
            2,
            "--run-dir",
            "runs/мой run",
        ],
        ["infer", "Why?", *short],
        ["eval", "--answers", 1, *short],
        ["save", "--modelfile"],
        ["infer", "Why?", "--model", "runs/мой run/merged", *short],
    ):
        done = run_cli([*line, "--json"], folder)
        assert done.code == 0, done.err
        told_next = json.loads(done.out).get("next", [])
        for following in [told_next] if isinstance(told_next, str) else told_next:
            assert {"из них 行.jsonl", "runs/мой run"} & set(shlex.split(following)), following
    assert (folder / "runs" / "мой run" / "merged" / "Modelfile").exists()


@pytest.mark.slow
def test_without_a_home_and_a_folder_for_temporary_files(cli, tiny_r1, tmp_path):
    gone = {
        name: str(tmp_path / "gone" / name)
        for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")
    }
    rows = [
        "--model",
        tiny_r1,
        "--dataset",
        SAMPLE,
        "--split",
        "train[:8]",
        "--max-seq-length",
        768,
    ]
    done = cli("train", *rows, "--max-steps", 1, "--max-new-tokens", 2, "--no-wandb", **gone)
    assert done.code == 0, done.err
    assert cli("save", **gone).code == 0


@pytest.mark.slow
def test_of_two_trainings_that_begin_in_the_same_second_one_is_refused(tiny_r1, tmp_path):
    """Both would be in runs/ under the same name, which is the time."""
    (tmp_path / "runs.py").write_text(
        f"import runpy, sys, time\ntime.strftime = lambda *_: 'now'\nsys.argv[0] = {str(SCRIPT)!r}\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    rows = [
        "--model",
        tiny_r1,
        "--dataset",
        SAMPLE,
        "--split",
        "train[:8]",
        "--max-seq-length",
        "768",
    ]
    command = [sys.executable, "runs.py", "train", *rows, "--max-steps", "1", "--no-wandb"]
    two = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in two]
    assert sorted(process.returncode for process in two) == [0, 1]
    refused = errors[[process.returncode for process in two].index(1)]
    assert "a run is in it" in refused or "another process" in refused
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("module", ["json", "no_such_module"])
def test_garbage_is_collected_again_after_an_import(module):
    with contextlib.suppress(ModuleNotFoundError):
        assert Lazy(module).dumps is json.dumps
    assert gc.isenabled()


def test_the_8b_without_a_gpu_is_refused_before_the_imports_that_take_long(cli):
    done = cli("train", "--max-steps", "60", PYTHONPROFILEIMPORTTIME="1")
    lines = [
        line.rpartition("|")[2].strip()
        for line in done.err.splitlines()
        if line.startswith("import time:")
    ]
    imported = {line.partition(".")[0] for line in lines}
    assert done.code == 1 and "torch" in imported, "which tells whether there is a GPU"
    assert not imported & {
        "unsloth",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "wandb",
        "bitsandbytes",
    }


@pytest.mark.parametrize(
    "arguments", [["load", "--model", "no/such"], ["format", "--dataset", "no/such"]]
)
def test_what_the_hub_does_not_have_is_named(cli, arguments):
    with HubServer(tokens={}) as hub:
        done = cli(*arguments, HF_ENDPOINT=hub.url, HTTP_PROXY=hub.url)
    assert (
        done.code == 1
        and "no/such" in done.err
        and "next:" in done.err
        and "Traceback" not in done.err
    )


def test_without_a_network_the_dataset_is_not_reached_and_the_message_says_so(cli):
    done = cli("format", HF_HUB_OFFLINE="1")
    assert (
        done.code == 1
        and "--dataset" in done.err
        and "next:" in done.err
        and "Traceback" not in done.err
    )


def test_load_says_what_it_loaded(run_cli, tiny_r1):
    loaded = json.loads(run_cli(["load", "--model", tiny_r1, "--json"]).out)
    assert (
        loaded["model"] == str(tiny_r1) and loaded["device"].startswith("CPU") and loaded["sample"]
    )
    assert loaded["peak_memory_gib"] > 0 and loaded["dtype"] in ("bfloat16", "float32")


# --------------------------------------------------------------------------------- before anything is trained


def test_epochs_are_turned_into_steps_and_noted(run_cli, tiny_r1, tmp_path):
    options = (
        f"--model {tiny_r1} --split train[:10] --epochs 0.5 --effective-batch 2 --max-new-tokens 2"
    )
    done = run_cli(["train", "--dataset", SAMPLE, "--no-wandb", "--run-dir", "run", *options.split()])
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["epochs"], config["max_steps"], config["warmup_steps"]) == (0.5, 3, 1)
    assert "step 00003/00003" in done.err
    # Only what differs from the recipe is shown, and nothing of the libraries'.
    shown = done.err.partition("settings")[2].partition("rows ")[0].split()
    assert "epochs=0.5" in shown and not [word for word in shown if word.startswith("lora_r=")]
    assert "Unsloth" not in done.err


def test_quiet_leaves_the_result_and_verbose_shows_every_setting(run_cli, tiny_run):
    question = ["infer", "Why?", "--run", tiny_run, "--max-new-tokens", 2]
    assert run_cli([*question, "--quiet"]).err == ""
    assert run_cli([*question, "--quiet", "--model", "nope"]).err.startswith("error: --model nope")
    shown = run_cli(["train", "--resume", tiny_run, "--verbose"])
    assert shown.code == 1 and "already finished" in shown.err
    assert finetune_r1.changed_settings(TrainConfig(lora_r=8)).count("=") == len(
        dataclasses.fields(TrainConfig)
    )


# ------------------------------------------------------------------------------------------- on a terminal


def test_error_and_next_step_stand_out_on_a_terminal_alone(tmp_path, cli):
    code, shown = typed(tmp_path, ["runs"])
    assert code == 1 and "\033[31merror: \033[0m" in shown and "\033[36mnext:  \033[0m" in shown
    assert cli("runs").err.startswith("error: there is no run") and "\033" not in cli("runs").err


@pytest.mark.parametrize(("terminal", "end"), [(True, "\r"), (False, "\n")])
def test_what_takes_long_says_how_far_it_is_and_how_long_it_will_take(monkeypatch, terminal, end):
    shown, now = io.StringIO(), iter(range(0, 1000, 40))
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(finetune_r1, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert list(finetune_r1.progress("abc", "losses: row")) == ["a", "b", "c"]
    lines = shown.getvalue().replace("\033[K", "").split(end)
    assert lines == ["losses: row 1/3, 02:40 left", "losses: row 2/3, 01:00 left", ""]
