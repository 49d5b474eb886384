"""Several processes under torchrun, as on several GPUs or machines: here on CPUs, by gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import SAMPLE, SCRIPT

import finetune_r1
from finetune_r1 import Run, read_jsonl

TORCHRUN = Path(sys.executable).with_name("torchrun")
TWO = ["--nproc-per-node", "2"]
DEADLINE = 300  # seconds, for what must not hang


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script in a folder of its own, under torchrun or, without `spread`, alone."""
    folder = tmp_path_factory.mktemp("processes")
    started = []

    def start(*arguments, spread=TWO):
        command = [TORCHRUN, *spread, "--"] if spread else [sys.executable]
        process = subprocess.Popen(
            [*command, SCRIPT, *map(str, arguments)],
            cwd=folder,
            # torch would load an optimizer to no "cpu:0".
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    start.folder = folder
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def options(tiny_r1):
    """Four steps are an epoch."""
    return [
        *("train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:20]"),
        *("--eval-rows", 4, "--effective-batch", 4, "--max-seq-length", 768, "--logging-steps", 1),
        *("--max-new-tokens", 4, "--learning-rate", "1e-2", "--warmup-steps", 1, "--save-steps", 2),
        *("--no-load-in-4bit", "--no-wandb"),
    ]


@pytest.fixture(scope="module")
def two(start, options):
    """A run of two processes, undisturbed, and what it printed."""
    process = start(*options, "--max-steps", 8, "--run-dir", "two", "--json")
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return start.folder / "two", out, err


def losses(folder, name="loss"):
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if name in line]
    assert len({line["step"] for line in lines}) == len(lines), "each step once"
    return {line["step"]: line[name] for line in lines}


def wait_for(process, beginning):
    """Reads on until a line begins so; returns what was read."""
    read = []
    for line in process.stderr:
        read.append(line)
        if line.startswith(beginning):
            return "".join(read)
    pytest.fail("".join(read))


def test_two_processes_train_as_one_and_only_the_first_prints_and_writes(
    two, options, run_cli, start
):
    folder, out, err = two
    one = run_cli([*options, "--max-steps", 8, "--run-dir", "one"], start.folder)
    assert one.code == 0, one.err
    assert json.loads(out)["run"] == "two", "one JSON object, of one process"
    assert err.count("step 00003/00008") == err.count("plan  ") == 1 and "processes 2" in err
    for name in ("loss", "eval_loss"):
        alone = losses(start.folder / "one", name)
        assert losses(folder, name) == pytest.approx(alone, abs=0.002)
    plan = Run(folder).record["plan"]
    assert plan["processes"] * plan["micro_batch"] * plan["accumulation"] == 4


def test_signal_to_one_of_two_processes_stops_both_with_a_checkpoint_that_is_resumed(
    start, two, options
):
    """It resumes inside the second epoch, with the rows that are next."""
    process = start(*options, "--max-steps", 8, "--run-dir", "stopped")
    said = wait_for(process, "step 00005")
    worker = [
        child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()
    ]
    worker[-1].send_signal(signal.SIGTERM)
    said += process.communicate(timeout=DEADLINE)[1]
    run = Run(start.folder / "stopped")
    assert run.record["status"] == "interrupted" and run.last_step >= 5, said
    assert "train --resume stopped`" in said
    resumed = start("train", "--resume", "stopped")
    _, err = resumed.communicate(timeout=DEADLINE)
    assert resumed.returncode == 0, err
    assert len(run.record["resumed_at"]) == 1 and losses(run.folder) == losses(two[0])


def test_batch_that_three_processes_cannot_divide_is_refused(monkeypatch):
    monkeypatch.setattr(finetune_r1, "WORLD", 3)
    with pytest.raises(finetune_r1.UserError, match="--effective-batch 4 must be a multiple of 3"):
        finetune_r1.check_config(finetune_r1.TrainConfig(effective_batch=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [(TWO, None), (None, TWO)], ids=["two, then one", "one, then two"]
)
def test_run_is_resumed_with_another_number_of_processes(start, two, options, first, then):
    folder = "on-one" if first else "on-two"
    process = start(*options, "--max-steps", 8, "--run-dir", folder, spread=first)
    wait_for(process, "step 00003")
    process.terminate()
    process.communicate(timeout=DEADLINE)
    assert Run(start.folder / folder).record["status"] == "interrupted"
    resumed = start("train", "--resume", folder, spread=then)
    _, err = resumed.communicate(timeout=DEADLINE)
    assert resumed.returncode == 0, err
    assert losses(start.folder / folder) == pytest.approx(losses(two[0]), abs=0.005)


@pytest.mark.slow
def test_all_processes_end_when_one_is_killed(start, options):
    process = start(*options, "--max-steps", 5000, "--run-dir", "fails")
    wait_for(process, "step 00004")
    psutil.Process(process.pid).children()[-1].kill()
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert err.count("finetune_r1.py FAILED") == 1 and err.count('finetune_r1.py", line') <= 12
    assert Run(start.folder / "fails").checkpoints


@pytest.mark.slow
def test_two_machines_train_as_one_and_the_run_is_resumed_on_one(start, two, options):
    """Two agents of torchrun, as on two machines that share a disk; then one of them is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machines(*arguments):
        spread = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-backend", "c10d"]
        spread += ["--rdzv-id", str(port), "--rdzv-endpoint", f"127.0.0.1:{port}"]
        return [start(*arguments, spread=spread) for _ in range(2)]

    both = machines(*options, "--max-steps", 8, "--run-dir", "machines")
    ended = [machine.communicate(timeout=DEADLINE) for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], ended
    assert losses(start.folder / "machines") == pytest.approx(losses(two[0]), abs=0.002)

    both = machines(*options, "--max-steps", 200, "--run-dir", "long")
    run = Run(start.folder / "long")
    deadline = time.monotonic() + DEADLINE
    while not run.checkpoints:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for child in psutil.Process(both[1].pid).children(recursive=True):
        child.kill()
    both[1].kill()
    _, err = both[0].communicate(timeout=DEADLINE)
    assert both[0].returncode != 0, err
    done = run.last_step
    _, err = start("train", "--resume", "long", spread=None).communicate(timeout=DEADLINE)
    assert run.record["status"] == "finished" and run.record["resumed_at"] == [done], err
    assert list(losses(run.folder)) == list(range(1, 201))
