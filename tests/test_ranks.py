"""Several processes under torchrun, as on several GPUs or machines: here on one CPU, by gloo."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import SAMPLE, SCRIPT

import finetune_r1
from finetune_r1 import Run, SharedOut, read_rows, with_spare

TORCHRUN = Path(sys.executable).with_name("torchrun")


@pytest.fixture
def torchrun(tmp_path):
    """Starts the script under torchrun in an empty folder."""
    started = []

    def start(*arguments, options=("--nproc-per-node", "2")):
        command = [TORCHRUN, *options, "--", SCRIPT, *map(str, arguments)]
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
    return ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:21]", "--max-seq-length", 768,
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


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("rows", [1, 5, 7, 12])
def test_an_epoch_s_rows_are_shared_out_once_each_to_as_many_batches_a_process(monkeypatch, rows, processes):
    monkeypatch.setattr(finetune_r1, "WORLD", processes)
    batches = torch.utils.data.BatchSampler(range(rows), batch_size=2, drop_last=False)
    shared = list(SharedOut(batches, lengths=range(rows + 1)))
    assert sorted(row for batch in shared for row in batch if row != rows) == list(range(rows))
    assert len(shared) == len(SharedOut(batches, lengths=[])) and len(shared) % processes == 0
    assert all(batch == [rows] or (rows not in batch and 1 <= len(batch) <= 2) for batch in shared)
    step = sorted(itertools.chain(*shared[:processes]))
    assert step == [*range(min(rows, 2 * processes)), *[rows] * max(0, processes - rows)], "the same rows a step"


def test_processes_get_like_numbers_of_tokens(monkeypatch):
    monkeypatch.setattr(finetune_r1, "WORLD", 2)
    lengths = [900, 100, 800, 200, 0]
    batches = torch.utils.data.BatchSampler(range(4), batch_size=2, drop_last=False)
    assert [sum(lengths[row] for row in batch) for batch in SharedOut(batches, lengths)] == [1000, 1000]


@pytest.mark.parametrize("columns", [{}, {"labels": [[-100, 2], [3, 4]]}])
def test_the_spare_row_carries_no_loss_and_the_others_keep_theirs(columns):
    rows = with_spare(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]} | columns))
    assert rows["labels"][:] == [*columns.get("labels", rows["input_ids"][:2]), [-100, -100]]
    assert rows["input_ids"][:2] == [[1, 2], [3, 4]] and len(rows) == 3


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
