"""Several processes under torchrun, as on several GPUs or machines: here on CPUs, by gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SAMPLE, SCRIPT

import finetune_r1
from finetune_r1 import Run, read_jsonl

TORCHRUN = Path(sys.executable).with_name("torchrun")
TWO = ["--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script in a folder of the file's own, under torchrun or, without `spread`, alone."""
    folder, started = tmp_path_factory.mktemp("processes"), []

    def start(*arguments, spread=TWO, script=SCRIPT):
        command = [TORCHRUN, *spread, "--"] if spread else [sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            [*command, script, *map(str, arguments)], cwd=folder, env=environment, **pipes
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
    return ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:20]", "--effective-batch", 4,
            "--max-seq-length", 768, "--logging-steps", 1, "--max-new-tokens", 4, "--eval-rows", 4,
            "--learning-rate", "1e-2", "--warmup-steps", 1, "--no-load-in-4bit", "--no-wandb",
            "--save-steps", 2]  # fmt: skip


@pytest.fixture(scope="module")
def two(start, options):
    """A run of two processes, undisturbed."""
    process = start(*options, "--max-steps", 8, "--run-dir", "two", "--json")
    out, err = process.communicate(timeout=300)
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


def test_two_processes_train_as_one_does_and_only_the_first_talks_and_writes(
    two, options, told, start
):
    folder, out, err = two
    one = told([*options, "--max-steps", 8, "--run-dir", "one"], start.folder)
    assert one.code == 0, one.err
    assert json.loads(out)["run"] == "two", "one JSON object, of one process"
    assert (
        err.count("step 00003/00008") == err.count("plan  ") == 1
        and "on each of 2 processes" in err
    )
    for name in ("loss", "eval_loss"):
        assert losses(folder, name) == pytest.approx(losses(start.folder / "one", name), abs=0.002)
    plan = Run(folder).record["plan"]
    assert (
        plan["effective_batch"]
        == 4
        == plan["processes"] * plan["micro_batch"] * plan["accumulation"]
    )


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


@pytest.mark.slow
def test_all_go_on_with_fewer_rows_at_once_when_one_runs_out_of_memory_and_stop_together_at_a_signal(
    start, two, options, tmp_path
):
    """Memory ends in the second process alone; the first must not wait for it for ever."""
    script = tmp_path / "finetune_r1_on_a_small_gpu.py"
    script.write_text(OUT_OF_MEMORY)
    process = start(*options, "--max-steps", 8, "--run-dir", "disturbed", script=script)
    said = wait_for(process, "step 00004")
    process.terminate()
    said += process.communicate(timeout=100)[1]
    assert said.count("out of memory after step 2: continuing with 1 rows per forward pass") == 1
    assert "stopping after this step" in said and "continue with `train --resume disturbed`" in said
    run = Run(start.folder / "disturbed")
    assert (run.record["status"], run.record["out_of_memory_at"]) == (
        "interrupted",
        2,
    ) and run.last_step >= 4
    expected = {step: loss for step, loss in losses(two[0]).items() if step <= run.last_step}
    assert losses(run.folder) == pytest.approx(expected, abs=0.002)


@pytest.mark.slow
def test_a_run_of_two_goes_on_inside_its_second_epoch_with_the_rows_that_are_next(start, two):
    """The seventh step takes the second epoch's third four rows."""
    it = Run(shutil.copytree(two[0], start.folder / "it"))
    shutil.rmtree(it.checkpoints[-1])
    it.update(status="interrupted")
    assert it.last_step == 6
    resumed = start("train", "--resume", "it")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert it.record["resumed_at"] == [6] and losses(it.folder) == losses(two[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [(TWO, None), (None, TWO)], ids=["two, then one", "one, then two"]
)
def test_a_run_goes_on_with_another_number_of_processes(start, two, options, first, then):
    folder = "on-one" if first else "on-two"
    process = start(*options, "--max-steps", 8, "--run-dir", folder, spread=first)
    wait_for(process, "step 00003")
    process.terminate()
    process.communicate(timeout=60)
    assert Run(start.folder / folder).record["status"] == "interrupted"
    resumed = start("train", "--resume", folder, spread=then)
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert losses(start.folder / folder) == pytest.approx(losses(two[0]), abs=0.005)


@pytest.mark.slow
def test_eval_and_answers_to_a_file_are_spread_and_the_same(start, two, told):
    finetune_r1.write_jsonl(
        start.folder / "q.jsonl", [{"Question": f"What is {n}?"} for n in range(20)]
    )
    asked = ["eval", "--run", "two", "--answers", 3, "--max-new-tokens", 4, "--json"]
    out, err = start(*asked).communicate(timeout=300)
    assert json.loads(out) == json.loads(told(asked, start.folder).out), err
    asked = ["infer", "--run", "two", "--file", "q.jsonl", "--max-new-tokens", 4, "-o"]
    start(*asked, "a2.jsonl").communicate(timeout=300)
    told([*asked, "a1.jsonl"], start.folder)
    one, both = (
        [{**line, "seconds": 0} for line in read_jsonl(start.folder / f"a{n}.jsonl")]
        for n in (1, 2)
    )
    assert one == both and len(one) == 20


@pytest.mark.parametrize(("batch", "can"), [(4, "3 and 6 can"), (2, "3 can")])
def test_a_batch_that_cannot_be_divided_is_told_the_next_ones(monkeypatch, batch, can):
    monkeypatch.setattr(finetune_r1, "WORLD", 3)
    with pytest.raises(finetune_r1.UserError, match=f"divided among 3 processes, {can}$"):
        finetune_r1.check_config(finetune_r1.TrainConfig(effective_batch=batch))


@pytest.mark.slow
def test_what_cannot_be_divided_or_spread_is_said_once(start, options):
    _, err = start(*options, "--max-steps", 6, spread=["--nproc-per-node", "3"]).communicate(
        timeout=300
    )
    assert err.count("--effective-batch 4 cannot be divided among 3 processes, 3 and 6 can") == 1
    _, err = start("save").communicate(timeout=300)
    assert err.count("torchrun is for `train`, `eval` and `infer --file`") == 1


@pytest.mark.slow
def test_every_process_fails_when_one_does_with_the_first_error_alone(start, options):
    process = start(*options, "--max-steps", 5000, "--run-dir", "fails")
    wait_for(process, "step 00004")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode and time.monotonic() - killed < 60
    assert err.count("finetune_r1.py FAILED") == 1 and err.count('finetune_r1.py", line') <= 12
    assert Run(start.folder / "fails").checkpoints


@pytest.mark.slow
def test_two_machines_train_as_one_does_and_the_run_goes_on_on_one(start, two, options):
    """Two agents of torchrun, as on two machines that share a disk; in the end one of them is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machines(*arguments):
        spread = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", str(port),
                  "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip
        return [start(*arguments, spread=spread) for _ in range(2)]

    both = machines(*options, "--max-steps", 8, "--run-dir", "machines")
    ended = [machine.communicate(timeout=300) for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], ended
    assert losses(start.folder / "machines") == pytest.approx(losses(two[0]), abs=0.002)

    both, run = (
        machines(*options, "--max-steps", 5000, "--run-dir", "long"),
        Run(start.folder / "long"),
    )
    while not run.checkpoints:
        time.sleep(0.2)
    subprocess.run(["pkill", "-9", "-P", str(both[1].pid)], check=False)
    both[1].kill()
    _, err = both[0].communicate(timeout=120)
    assert both[0].returncode != 0, err
    done = run.last_step
    _, err = start("train", "--resume", "long", "--max-time", "1s", spread=None).communicate(
        timeout=300
    )
    assert run.record["status"] == "stopped" and run.record["resumed_at"] == [done], err
    assert max(losses(run.folder)) == run.last_step == done + 1
