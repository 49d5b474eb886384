"""A training that is done ends, whatever W&B does meanwhile, and what W&B lacks can be sent to it later."""

import math
import os
import re
import shlex
import subprocess
import sys
import time

import psutil
import pytest
from conftest import SAMPLE
from servers.base import STALL, Fault
from servers.wandb_server import WandbServer

import finetune_r1
from finetune_r1 import Run, TrainConfig

KEY, STEPS = "a" * 40, 8
TROUBLE = {
    "silent": Fault("*", "", times=math.inf, delay=STALL),
    "refuses": Fault("*", "", times=math.inf, status=401),
}


@pytest.fixture
def tracked(tiny_r1, tmp_path, monkeypatch):
    """Trains in a process of its own and calls `trouble` in its first steps; exit code, and what was said.

    W&B has two seconds to end.
    """
    config = TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:12]", max_seq_length=512, max_steps=STEPS,
        warmup_steps=0, effective_batch=2, logging_steps=1, load_in_4bit=False, max_new_tokens=4,
    )  # fmt: skip

    def run(server, trouble):
        for name, value in {"BASE_URL": server.url, "API_KEY": KEY, "MODE": "online"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        said = tmp_path / "said"
        child = os.fork()
        if not child:
            code = 1
            try:
                with said.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    sys.stdout = sys.stderr = file
                    finetune_r1.WANDB_SECONDS = 2
                    finetune_r1.train_run(config, Run(tmp_path / "run"))
                    print("left for the exit:", finetune_r1.wandb.sdk.wandb_setup._singleton)
                code = 0
            finally:
                os._exit(code)
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), said.read_text()
            time.sleep(0.01)
        trouble()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()

    return run


@pytest.mark.parametrize(
    "kind", ["gone", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TROUBLE)]
)
def test_a_training_ends_whatever_w_and_b_does_and_what_it_lacks_can_be_sent_later(
    tracked, tmp_path, monkeypatch, kind
):
    fault = TROUBLE.get(kind)
    with WandbServer(keys={KEY: "alice"}) as server:
        code, said = tracked(
            server, (lambda: server.faults.append(fault)) if fault else server.close
        )
        run = Run(tmp_path / "run")
        assert code == 0 and run.record["status"] == "finished" and run.adapter, said
        assert not [arrived for arrived in server.runs.values() if arrived.finished]
    line = re.search(r"W&B lacks .*`(wandb sync .*)`", said)
    assert line, said
    with WandbServer(keys={KEY: "alice"}) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        sync = [sys.executable, "-m", *shlex.split(line[1])]
        done = subprocess.run(sync, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [arrived] = server.runs.values()
        steps = {row.get("train/global_step") for row in arrived.history}
        assert arrived.finished and steps >= set(range(1, STEPS + 1))


def test_a_training_outlives_w_and_bs_own_process(tracked, tmp_path):
    def kill():
        """W&B's process of the training, not that of this one."""
        for training in psutil.Process().children():
            for process in training.children(recursive=True):
                if "wandb-core" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)

    killed: list[int] = []
    with WandbServer(keys={KEY: "alice"}) as server:
        code, said = tracked(server, kill)
    run = Run(tmp_path / "run")
    assert killed and code == 0 and run.record["status"] == "finished" and run.adapter, said
    assert said.count("W&B lacks some of the run") == 1
    assert "left for the exit: None" in said, "or its client shows a traceback there"
