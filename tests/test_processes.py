"""Several processes under torchrun, as on several GPUs or machines: here on one CPU, by gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SAMPLE, SCRIPT

import finetune_r1
from finetune_r1 import Run, read_rows

TORCHRUN = Path(sys.executable).with_name("torchrun")


@pytest.fixture
def torchrun(tmp_path):
    """Starts the script under torchrun in an empty folder."""
    started = []

    def start(*arguments, options=("--nproc-per-node", "2"), script=SCRIPT):
        command = [TORCHRUN, *options, "--", script, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def options(tiny_r1):
    return ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:20]", "--max-seq-length", 768,
            "--effective-batch", 4, "--logging-steps", 1, "--max-new-tokens", 4, "--learning-rate", "1e-2",
            "--warmup-steps", 1, "--no-load-in-4bit", "--no-wandb", "--eval-rows", 4, "--save-steps", 2]  # fmt: skip


def losses(folder, name="loss"):
    return {line["step"]: line[name] for line in read_rows(folder / "metrics.jsonl") if name in line}


def test_two_processes_train_as_one_does_and_only_the_first_talks_and_writes(torchrun, options, told, tmp_path):
    two = torchrun(*options, "--max-steps", 6, "--run-dir", "two", "--json")
    one = told([*options, "--max-steps", 6, "--run-dir", "one", "--json"])
    out, err = two.communicate(timeout=300)
    assert one.code == two.returncode == 0, err
    assert json.loads(out)["run"] == "two", "one JSON object, of one process"
    assert err.count("step 00003/00006") == err.count("plan  ") == 1 and "processes=2" in err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.002)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(tmp_path / "one", "eval_loss"), abs=0.002)
    plan = Run(tmp_path / "two").record["plan"]
    assert plan["effective_batch"] == 4 == plan["processes"] * plan["micro_batch"] * plan["accumulation"]


OUT_OF_MEMORY = """
import os, sys
import finetune_r1
finetune_r1.import_unsloth()
import torch, trl

compute_loss, calls = trl.SFTTrainer.compute_loss, []

def fails_once(trainer, *arguments, **options):
    if os.environ["RANK"] == "1" and trainer.model.training and trainer.state.global_step == 2 and not calls:
        calls.append(1)
        raise torch.OutOfMemoryError("injected")
    return compute_loss(trainer, *arguments, **options)

trl.SFTTrainer.compute_loss = fails_once
finetune_r1.app()
"""


def test_all_go_on_with_fewer_rows_at_once_when_one_runs_out_of_memory(torchrun, options, tmp_path, monkeypatch):
    """The fault is raised in the second process, where a GPU raises it; the first must not wait for it for ever."""
    script = tmp_path / "finetune_r1_on_a_small_gpu.py"
    script.write_text(OUT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    disturbed = torchrun(*options, "--max-steps", 4, "--run-dir", "disturbed", script=script)
    _, err = disturbed.communicate(timeout=300)
    assert disturbed.returncode == 0, err
    assert err.count("out of memory after step 2: goes on with 1 rows at once, 2 times a step") == 1
    record = Run(tmp_path / "disturbed").record
    assert (record["status"], record["out_of_memory_at"]) == ("finished", 2)
    plain = torchrun(*options, "--max-steps", 4, "--run-dir", "plain")
    plain.communicate(timeout=300)
    assert losses(tmp_path / "disturbed") == pytest.approx(losses(tmp_path / "plain"), abs=0.002)


def test_a_run_of_two_goes_on_inside_its_second_epoch_with_the_rows_that_are_next(torchrun, options, tmp_path):
    """Four steps are an epoch. Stopped after the sixth, the seventh takes the second epoch's third four rows."""
    undisturbed = torchrun(*options, "--max-steps", 8, "--run-dir", "undisturbed")
    undisturbed.communicate(timeout=300)
    stopped = torchrun(*options, "--max-steps", 8, "--run-dir", "it")
    for line in stopped.stderr:
        if line.startswith("step 00006"):
            break
    stopped.terminate()
    stopped.communicate(timeout=100)
    assert 6 <= Run(tmp_path / "it").last_step < 8
    resumed = torchrun("train", "--resume", "it")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert losses(tmp_path / "it") == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_begun_on_two_is_stopped_by_a_signal_and_goes_on_on_one(torchrun, options, cli, tmp_path):
    """And the other way round."""
    cli(*options, "--max-steps", 10, "--run-dir", "undisturbed")
    process = torchrun(*options, "--max-steps", 10, "--run-dir", "it")
    for line in process.stderr:
        if line.startswith("step 00003"):
            break
    process.terminate()
    rest = process.communicate(timeout=60)[1]
    assert "stops after this step" in rest and "`train --resume it` goes on" in rest
    assert Run(tmp_path / "it").record["status"] == "interrupted"
    done = cli("train", "--resume", "it")
    assert done.code == 0, done.err
    assert losses(tmp_path / "it") == pytest.approx(losses(tmp_path / "undisturbed"), abs=0.005)
    on = ["train", "--resume", "undisturbed", "--max-steps", 13, "--run-dir"]
    _, err = torchrun(*on, "on-two").communicate(timeout=300)
    assert cli(*on, "on-one").code == 0 and 13 in losses(tmp_path / "on-two"), err
    assert losses(tmp_path / "on-two") == pytest.approx(losses(tmp_path / "on-one"), abs=0.005)


@pytest.mark.slow
def test_eval_and_answers_to_a_file_are_spread_and_the_same(torchrun, options, cli, tmp_path):
    cli(*options, "--max-steps", 2, "--run-dir", "it")
    finetune_r1.write_jsonl(tmp_path / "q.jsonl", [{"Question": f"What is {n}?"} for n in range(20)])
    asked = ["eval", "--run", "it", "--answers", 3, "--max-new-tokens", 4, "--json"]
    out, err = torchrun(*asked).communicate(timeout=300)
    assert json.loads(out) == json.loads(cli(*asked).out), err
    for run, output in ((torchrun, "two.jsonl"), (cli, "one.jsonl")):
        done = run("infer", "--run", "it", "--file", "q.jsonl", "-o", output, "--max-new-tokens", 4)
        if run is torchrun:
            done.communicate(timeout=300)
    answers = [[{**line, "seconds": 0} for line in read_rows(tmp_path / f"{name}.jsonl")] for name in ("one", "two")]
    assert answers[0] == answers[1] and len(answers[0]) == 20


@pytest.mark.slow
def test_what_cannot_be_divided_or_spread_is_said_once(torchrun, options):
    _, err = torchrun(*options, "--max-steps", 6, options=["--nproc-per-node", "3"]).communicate(timeout=300)
    assert err.count("--effective-batch 4 cannot be divided among 3 processes, 3 and 6 can") == 1
    _, err = torchrun("save").communicate(timeout=300)
    assert err.count("torchrun is for `train`, `eval` and `infer --file`") == 1


@pytest.mark.slow
def test_every_process_fails_when_one_does_with_the_first_error_alone(torchrun, options, tmp_path):
    process = torchrun(*options, "--max-steps", 5000, "--run-dir", "it")
    for line in process.stderr:
        if line.startswith("step 00004"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode and time.monotonic() - killed < 60
    assert err.count("finetune_r1.py FAILED") == 1 and err.count('finetune_r1.py", line') <= 12
    assert Run(tmp_path / "it").checkpoints


@pytest.mark.slow
def test_two_machines_train_as_one_process_does_and_the_run_goes_on_on_one(torchrun, options, cli, tmp_path):
    """Two agents of torchrun, as on two machines that share a disk; in the end one of them is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machines(*arguments):
        where = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", str(port),
                 "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip
        return [torchrun(*arguments, options=where) for _ in range(2)]

    both = machines(*options, "--max-steps", 6, "--run-dir", "both")
    cli(*options, "--max-steps", 6, "--run-dir", "one")
    told = [machine.communicate(timeout=300) for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], told
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), abs=0.002)

    both = machines(*options, "--max-steps", 5000, "--run-dir", "it")
    while not Run(tmp_path / "it").checkpoints:
        time.sleep(0.2)
    subprocess.run(["pkill", "-9", "-P", str(both[1].pid)], check=False)
    both[1].kill()
    _, err = both[0].communicate(timeout=120)
    print(err[-3000:])
    assert both[0].returncode != 0
    done = finetune_r1.step_of(Run(tmp_path / "it").checkpoints[-1])
    assert cli("train", "--resume", "it", "--max-steps", done + 2).code == 0
    assert max(losses(tmp_path / "it")) == done + 2
