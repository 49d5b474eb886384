"""The measure can fail: what was not learned is not called better. Minutes long, so not in the daily suite."""

import json
import random
import subprocess
import sys

import pytest
from conftest import SAMPLE, SCRIPT

import finetune_r1
from finetune_r1 import DEMO, Run, TrainConfig, prepare_rows, read_dataset, read_rows


@pytest.mark.slow
def test_a_model_tuned_on_shuffled_answers_is_not_called_better(smollm2, tmp_path):
    rows = list(read_rows(SAMPLE))
    answers = [row["Response"] for row in rows]
    random.Random(1).shuffle(answers)
    shuffled = tmp_path / "shuffled.jsonl"
    finetune_r1.write_jsonl(shuffled, [{**row, "Response": a} for row, a in zip(rows, answers, strict=True)])
    config = TrainConfig(model=str(smollm2), **{**DEMO, "dataset": str(shuffled), "max_new_tokens": 1})
    loaded, _ = finetune_r1.train_run(config, Run(tmp_path / "run"))
    as_they_were = TrainConfig(model=str(smollm2), **DEMO)  # the same questions are held out, by the same seed
    held_out = prepare_rows(read_dataset(as_they_were), loaded.tokenizer, as_they_were).held_out
    report = loaded.evaluate(held_out, 0, config)
    assert report["loss"]["high"] < 0, "the style alone lowers the loss"
    assert report["verdict"].startswith(("worse", "can't tell"))


@pytest.mark.parametrize("decoding", [[], pytest.param(["--new-tokens", "8"], marks=pytest.mark.slow)])
def test_the_benchmark_runs_on_a_cpu_with_a_tiny_model(decoding):
    command = [sys.executable, SCRIPT.parent / "tests" / "bench" / "speed.py", "--small", "--variants", "recipe"]
    done = subprocess.run([*command, *decoding], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    [run] = [json.loads(line) for line in lines if line.startswith("{")]
    assert run["variant"] == "recipe" and run["s_per_step"] > 0
    assert last.split()[0] == "recipe" and last.split()[-3:] == ["1.00x", "1.00x", "0.0000"]
    assert done.stdout.count(" at once, up to 8 tokens: plain ") == (2 if decoding else 0)
