"""The command line: help at once, and for each mistake one message with the next step."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import SAMPLE, SCRIPT
from servers.hub import HubServer
from terminal import typed

import finetune_r1
from finetune_r1 import TrainConfig

COMMANDS = "demo doctor login load format train infer eval save push runs".split()
HEADINGS = "Arguments Options Model Data Sampling LoRA Training Run Tracking Output".split()
HEAVY = "torch transformers unsloth trl peft datasets bitsandbytes wandb gguf pandas".split()

# ------------------------------------------------------------------------------------------------ help


def test_help_imports_nothing_heavy_fits_80_columns_and_has_headings_and_examples():
    code = f"""
import sys
import finetune_r1
for name in ["", *{COMMANDS!r}]:
    try:
        finetune_r1.app([name, "--help"] if name else ["--help"], prog_name="finetune_r1.py")
    except SystemExit as end:
        print("end", end.code, *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    overview, *pages, rest = done.stdout.split("end 0\n")
    assert re.findall(r"^  (\w+)  +.*\.$", overview, re.MULTILINE) == COMMANDS and not rest
    for name, page in zip(COMMANDS, pages, strict=True):
        assert re.search(rf"  Examples:\n\n  \$ python \S*finetune_r1.py {name}\b", page)
    train = pages[COMMANDS.index("train")]
    assert re.findall(r"^(\w+):$", train, re.MULTILINE) == HEADINGS
    for option, heading in {
        "--lora-r ": "LoRA",
        "--split ": "Data",
        "--save-steps ": "Run",
    }.items():
        before = train.partition(f"\n  {option}")[0]
        assert re.findall(r"^(\w+):$", before, re.MULTILINE)[-1] == heading


def test_version_is_the_projects(cli):
    project = tomllib.loads((SCRIPT.parent / "pyproject.toml").read_text())["project"]
    assert cli("--version") == (0, f"{finetune_r1.VERSION}\n", "")
    assert project["version"] == finetune_r1.VERSION


def test_script_without_packages_says_how_to_install_them():
    done = subprocess.run([sys.executable, "-S", SCRIPT, "demo"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: packages are missing")
    assert "uv run" in done.stderr and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------- mistakes

TRAIN, FORMAT = "train --model tiny --dataset rows.jsonl", "format --model tiny --dataset"
# What is typed, and what the message and the hint name.
MISTAKES = {
    "train --max-steps 60": ["GPU", "demo"],
    "load --model someone/small-135M": ["Hub not reached"],
    "load --model nothing": ["--model", "config.json"],
    "train --model tiny --dataset nope.jsonl": ["nope.jsonl"],
    f"{FORMAT} latin.csv": ["latin.csv", "UTF-8"],
    f"{FORMAT} columns.jsonl": ["--question-col", "q, a"],
    f"{FORMAT} full/mine.txt": ["full/mine.txt", ".jsonl"],
    f"{TRAIN} --split train[:9] --eval-rows 9": ["9 held out"],
    f"{TRAIN} --run-dir full": ["full"],
    f"{TRAIN} --run-dir rows.jsonl/run": ["path"],
    "train 60": ["train --max-steps 60"],
    "train --resume runs/old": ["runs/old", "packing"],
    "infer Why?": ["finished run", "train"],
    "infer --model tiny": ["question"],
    "infer 'Why? </think>' --model tiny": ["</think>"],
    "infer Why? --compare --base": ["--compare", "--base"],
    "infer --file cut.jsonl -o a.jsonl --model tiny": ["--file cut.jsonl", "JSON object"],
    "save --run runs/unfinished": ["runs/unfinished", "adapter"],
    "push --repo user/model": ["finished run", "train"],
}
# What the parser refuses.
MISTYPED = {
    "train --lora-r 0": "--lora-r",
    "train --lora-rank 8": "--lora-rank",
    "infer --file nope.jsonl": "nope.jsonl",
}


@pytest.fixture
def folder(tmp_path, tiny_r1):
    """A good model and good rows, and what a user could name by mistake."""
    (tmp_path / "tiny").symlink_to(tiny_r1)
    (tmp_path / "rows.jsonl").symlink_to(SAMPLE)
    files = {
        "columns.jsonl": '{"q": "Why?", "a": "So."}\n',
        "cut.jsonl": '{"Question": "Why?", "Complex_CoT": "Hm.", "Resp',
        "full/mine.txt": "keep me",
        "runs/unfinished/run.json": '{"status": "failed"}',
        "runs/unfinished/config.json": "{}",
        "runs/old/run.json": '{"status": "failed"}',
        "runs/old/config.json": '{"packing": true}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    latin = "Question,Complex_CoT,Response\nFièvre?,Hm.,Oui.\n"
    (tmp_path / "latin.csv").write_text(latin, encoding="latin-1")
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize("line", MISTAKES)
def test_command_with_a_mistake_prints_message_and_hint_and_makes_nothing(
    run_cli, folder, monkeypatch, line
):
    """`pytest -rP -k mistake` shows all the messages."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    before = sorted(folder.rglob("*"))
    done = run_cli(shlex.split(line), cwd=folder)
    print(done.err)
    assert done.code == 1 and done.out == "" and "Traceback" not in done.err
    hint = done.err.partition("\nhint:  ")[2]
    assert hint and all(text in done.err for text in MISTAKES[line])
    assert not re.search(f"`({'|'.join(COMMANDS)})", hint), "can't be pasted"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", MISTYPED)
def test_option_that_is_mistyped_is_named_with_help(run_cli, line):
    done = run_cli(shlex.split(line))
    assert done.code == 2 and done.out == ""
    assert MISTYPED[line] in done.err and f"{line.split()[0]} --help" in done.err


def test_error_and_hint_have_colors_on_a_terminal_only(tmp_path, cli):
    code, shown = typed(tmp_path, ["runs"])
    assert code == 1 and "\033[31merror:\033[0m" in shown and "\033[36mhint:\033[0m" in shown
    assert cli("runs").err.startswith("error: no runs") and "\033" not in cli("runs").err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("login >&-", "no Hugging Face token"),
        ("login <&- >&- 2>&-", ""),
        ("doctor --json > /dev/full", "disk is full"),
    ],
)
def test_command_with_streams_that_are_closed_or_full_ends_with_an_error(tmp_path, line, said):
    done = subprocess.run(
        ["sh", "-c", f'"$0" "$1" {line}', sys.executable, SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_model_of_8b_without_a_gpu_is_refused_before_the_slow_imports(cli):
    done = cli("train", "--max-steps", "60", PYTHONPROFILEIMPORTTIME="1")
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.err, re.MULTILINE))
    assert done.code == 1 and "torch" in imported, "which tells whether there is a GPU"
    assert not imported & set(HEAVY) - {"torch"}


@pytest.mark.parametrize("line", ["load --model no/such", "format --dataset no/such"])
def test_name_that_the_hub_does_not_have_is_named(cli, line):
    with HubServer(tokens={}) as hub:
        done = cli(*line.split(), HF_ENDPOINT=hub.url)
    assert done.code == 1 and "no/such" in done.err
    assert "hint:" in done.err and "Traceback" not in done.err


# -------------------------------------------------------------------------------------------- at work


def test_commands_work_where_paths_have_spaces_quotes_and_any_letters(run_cli, tiny_r1, tmp_path):
    folder = tmp_path / "мои данные '我的' {x} [y]"
    folder.mkdir()
    (folder / "модель 模型").symlink_to(tiny_r1)
    (folder / "строки 行.jsonl").symlink_to(SAMPLE)
    rows = (
        "--model 'модель 模型' --dataset 'строки 行.jsonl' --split train[:10] --max-seq-length 768"
    )
    sizes = "--epochs 0.5 --effective-batch 2 --learning-rate 1e-2 --max-new-tokens 2 --no-wandb"
    for line in (
        f"format {rows} -o 'из них 行.jsonl' --json",
        f"train {rows} {sizes} --eval-rows 2 --run-dir 'runs/мой run'",
        "infer Why? --max-new-tokens 2 --quiet",
        "eval --answers 1 --max-new-tokens 2 --json",
        "save --modelfile --json",
    ):
        done = run_cli(shlex.split(line), folder)
        assert done.code == 0, done.err
        if line.startswith("train"):
            # Only what differs from the recipe is shown, and nothing of the libraries'.
            shown = done.err.partition("\nsettings")[2].partition("\n")[0].split()
            assert "epochs=0.5" in shown and not [word for word in shown if "lora_r=" in word]
            assert "Unsloth" not in done.err and "train loss" in done.out
        if "--quiet" in line:
            assert done.err == ""
        if "--json" in line:
            assert json.loads(done.out)
    config = json.loads((folder / "runs/мой run/config.json").read_text())
    assert (config["epochs"], config["max_steps"]) == (0.5, 2)
    assert (folder / "runs/мой run/merged/Modelfile").exists()


def test_load_says_what_it_loaded(run_cli, tiny_r1):
    loaded = json.loads(run_cli(["load", "--model", tiny_r1, "--json"]).out)
    assert loaded["model"] == str(tiny_r1) and loaded["device"].startswith("CPU")
    assert loaded["sample"] and loaded["peak_memory_gib"] > 0


def test_changed_settings_with_verbose_are_all(monkeypatch):
    assert finetune_r1.changed_settings(TrainConfig(lora_r=8)) == "lora_r=8"
    monkeypatch.setattr(finetune_r1.Console, "verbose", True)
    assert "lora_alpha=16" in finetune_r1.changed_settings(TrainConfig(lora_r=8))
