"""W&B: its own variables count, it never ends a training, what it lacks can be sent later."""

import math
import os
import re
import shlex
import subprocess
import sys
import time

import psutil
import pytest
import typer
from conftest import SAMPLE, SCRIPT
from servers.base import STALL, Fault
from servers.wandb_server import WandbServer

import finetune_r1
from finetune_r1 import Run, TrainConfig

KEY, MINUTES = "a" * 40, 300


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A W&B that this process is to use, with a key; its process ends with the test."""
    with WandbServer(keys={KEY: "alice"}) as server:
        for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_SERVICE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.chdir(tmp_path)
        finetune_r1.load_dotenv.cache_clear()
        finetune_r1.wandb.teardown()  # of an earlier test, with its server
        yield server
        finetune_r1.wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
        finetune_r1.load_dotenv.cache_clear()


@pytest.fixture
def run(tmp_path):
    """A run folder with nothing but its record."""
    run = Run(tmp_path / "20260301-120000-r16-s60")
    run.folder.mkdir()
    finetune_r1.write_json(run / "run.json", {"status": "running"})
    return run


def track(run, config=None):
    """Tracks a step; whether it was tracked."""
    finetune_r1.track_in_wandb(config or TrainConfig(), run)
    if not finetune_r1.wandb.run:
        return False
    finetune_r1.wandb.log({"loss": 1.0})
    finetune_r1.wandb.finish()  # as at exit
    return True


def test_track_in_wandb_by_default_names_project_and_run_and_resumes_it(server, run):
    assert track(run) and track(run)
    [arrived] = server.runs.values()
    assert arrived.project == finetune_r1.WANDB_PROJECT and arrived.name == run.record["wandb_id"]
    assert arrived.display_name == run.folder.name and arrived.config["lora_r"] == 16
    assert len(arrived.history) == 2 and arrived.finished and arrived.exitcode == 0
    assert not (run.folder.parent / "netrc").exists(), "training stores no key"


def test_track_in_wandb_leaves_wandbs_own_variables_their_meaning(server, run, monkeypatch):
    values = {"NAME": "mine", "RUN_ID": "id7", "ENTITY": "team", "DIR": str(run.folder)}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert track(run, TrainConfig(wandb_project="p")) and run.record["wandb_id"] == "id7"
    [(name, arrived)] = server.runs.items()
    assert name == "team/p/id7" and arrived.display_name == "mine" and (run / "wandb").is_dir()


def test_wandb_project_goes_by_flag_then_variable_then_settings_file_then_default(
    monkeypatch, tmp_path
):
    train = typer.main.get_command(finetune_r1.app).commands["train"]

    def project(*arguments):
        return train.make_context("train", list(arguments)).params["wandb_project"]

    settings = tmp_path / "settings.yaml"
    settings.write_text("wandb_project: file\n")
    assert project() == finetune_r1.WANDB_PROJECT
    assert project("--config", str(settings)) == "file"
    monkeypatch.setenv("WANDB_PROJECT", "variable")
    assert project("--config", str(settings)) == "variable"
    assert project("--config", str(settings), "--wandb-project", "flag") == "flag"


@pytest.mark.parametrize(
    "variable", ["WANDB_DISABLED=true", "WANDB_MODE=disabled", "WANDB_API_KEY="]
)
def test_track_in_wandb_switched_off_or_without_a_key_is_silent(
    server, run, monkeypatch, capsys, variable
):
    monkeypatch.setenv("WANDB_MODE", "")  # so that what is set meanwhile goes with the test
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv(*variable.split("="))
    assert not track(run) and not track(run, TrainConfig(wandb=False)) and not server.requests
    assert "note" not in capsys.readouterr().err


def test_track_in_wandb_offline_keeps_the_run_here(server, run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert track(run) and not server.requests
    assert list(run.folder.parent.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WANDB_API_KEY", "b" * 40),
        ("WANDB_MODE", "sometimes"),
        ("WANDB_BASE_URL", "http://127.0.0.1:9"),
    ],
    ids=["unknown key", "unknown mode", "dead"],
)
def test_track_in_wandb_that_does_not_start_is_noted_and_training_goes_on(
    server, run, monkeypatch, capsys, variable, value
):
    monkeypatch.setenv(variable, value)
    assert not track(run)
    assert "training without W&B" in capsys.readouterr().err


def test_track_in_wandb_says_how_to_send_what_a_silent_server_lacks(server, run, capsys):
    finetune_r1.track_in_wandb(TrainConfig(), run)
    line = re.search(r"`(wandb sync .*)` sends", capsys.readouterr().err)
    finetune_r1.wandb.log({"loss": 1.0})
    server.faults.append(Fault("*", "", times=math.inf, delay=STALL))
    finetune_r1.wandb.finish()
    with WandbServer(keys={KEY: "alice"}) as other:
        sync = [sys.executable, "-m", *shlex.split(line[1])]
        environment = {**os.environ, "WANDB_BASE_URL": other.url}
        done = subprocess.run(sync, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [arrived] = other.runs.values()
        assert arrived.finished and arrived.history[0]["loss"] == 1.0


def test_training_outlives_a_silent_wandb_and_the_end_of_its_process(server, tiny_r1, tmp_path):
    settings = ["--max-steps", 8, "--warmup-steps", 0, "--effective-batch", 2]
    settings += ["--logging-steps", 1, "--no-load-in-4bit", "--max-new-tokens", 4]
    rows = ["--dataset", SAMPLE, "--split", "train[:12]", "--max-seq-length", 512]
    line = [SCRIPT, "train", "--model", tiny_r1, *rows, *settings, "--run-dir", tmp_path / "run"]
    said = tmp_path / "said"
    with said.open("w") as file:
        training = psutil.Popen(
            [sys.executable, *map(str, line)], stdout=file, stderr=file, cwd=tmp_path
        )
    deadline = time.monotonic() + MINUTES
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert training.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    server.faults.append(Fault("*", "", times=math.inf, delay=STALL))
    killed = []
    for process in training.children(recursive=True):
        if "wandb-core" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)
    assert killed and training.wait(timeout=MINUTES) == 0, said.read_text()
    run = Run(tmp_path / "run")
    assert run.record["status"] == "finished" and run.adapter
