"""What is left of a training that was interrupted, and how it goes on."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import SAMPLE, SCRIPT
from safetensors.torch import load_file

import finetune_r1
from finetune_r1 import Run, TrainConfig, UserError, read_rows


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:12]", max_seq_length=768, max_steps=6, warmup_steps=1,
        effective_batch=2, learning_rate=1e-2, logging_steps=1, save_steps=2, load_in_4bit=False, max_new_tokens=4,
        wandb=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed")
    finetune_r1.train_run(config, run)
    return run


def losses(run):
    return {line["step"]: line["loss"] for line in read_rows(run / "metrics.jsonl") if "loss" in line}


def adapter(run):
    return {name: weights.numpy() for name, weights in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.fixture
def killed(config, tmp_path, monkeypatch):
    """Makes a run that stops without a word in the step after `step`."""

    class Killed(BaseException):
        pass

    def make(step, settings=config, folder=tmp_path / "killed"):
        import trl

        compute_loss = trl.SFTTrainer.compute_loss

        def dies(trainer, *arguments, **options):
            if trainer.state.global_step == step:
                raise Killed
            return compute_loss(trainer, *arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(trl.SFTTrainer, "compute_loss", dies)
            finetune_r1.train_run(settings, Run(folder))
        return Run(folder)

    return make


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_that_goes_on_ends_with_the_undisturbed_runs_losses_and_weights_bit_for_bit(
    killed, undisturbed, config, step
):
    run = killed(step)
    assert run.record["status"] == "failed"
    finetune_r1.train_run(run.config, run, run)
    assert losses(run) == losses(undisturbed) and equal(adapter(run), adapter(undisturbed))
    assert run.record["status"] == "finished" and run.record.get("resumed_at", []) == ([step - step % 2] * (step > 1))


def test_only_the_newest_checkpoints_are_kept_and_each_is_whole(undisturbed):
    assert [path.name for path in undisturbed.checkpoints] == ["checkpoint-4", "checkpoint-6"]
    assert not (undisturbed / "checkpoints" / ".unfinished").exists()
    for path in undisturbed.checkpoints:
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
            file.name for file in path.iterdir()
        }


def test_what_was_being_written_at_the_end_is_not_taken_for_a_checkpoint(killed, undisturbed):
    run = killed(3)
    (run / "checkpoints" / ".unfinished" / "checkpoint-3").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3, "los')
    finetune_r1.train_run(run.config, run, run)
    assert losses(run) == losses(undisturbed) and run.record["resumed_at"] == [2]


def test_a_finished_run_is_never_changed_more_steps_make_a_new_one(undisturbed, config, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    longer = finetune_r1.resumed_config(undisturbed, dataclasses.replace(config, max_steps=8), {"max_steps"})
    assert "the learning rate, on its way to 0 at step 6, goes on as in 8" in capsys.readouterr().err
    finetune_r1.train_run(longer, run := Run(tmp_path / "longer"), undisturbed)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses(run).items() >= losses(undisturbed).items()
    assert run.record["extends"] == str(undisturbed) and not equal(adapter(run), adapter(undisturbed))
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")} == before


def test_a_run_whose_steps_were_all_done_only_answers_and_saves(undisturbed, config, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(undisturbed.folder, run.folder)
    shutil.rmtree(run / "adapter")
    run.update(status="running")
    finetune_r1.train_run(config, run, run)
    assert equal(adapter(run), adapter(undisturbed)) and losses(run) == losses(undisturbed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_r": 8}, "--lora-r was 16, now 8"),
        ({"learning_rate": 1e-3, "seed": 1}, "--learning-rate was 0.01, now 0.001, --seed was 3407, now 1"),
        ({"model": "some/other"}, "--model was"),
        ({"max_steps": 5}, "has 6 steps done"),
        ({"max_steps": 6}, "has 6 steps done"),
    ],
)
def test_another_training_is_refused_with_the_difference_named(undisturbed, config, changed, said):
    with pytest.raises(UserError, match=said):
        finetune_r1.resumed_config(undisturbed, dataclasses.replace(config, **changed), set(changed))


def test_other_rows_or_another_prompt_are_refused(killed, config, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(SAMPLE.read_text())
    run = killed(3, dataclasses.replace(config, dataset=str(rows)))
    rows.write_text(SAMPLE.read_text().replace("the", "a"))
    with pytest.raises(UserError, match="dataset_fingerprint was"):
        finetune_r1.train_run(run.config, run, run)
    rows.write_text(SAMPLE.read_text())
    monkeypatch.setitem(finetune_r1.prompts.TEMPLATES, "en", "Q: {question}\n<think>\n")
    with pytest.raises(UserError, match="prompt_hash was"):
        finetune_r1.train_run(run.config, run, run)


def test_a_loss_that_is_no_number_stops_the_run_names_step_and_rows_and_keeps_the_last_checkpoint(
    config, unsloth, tmp_path, monkeypatch
):
    import torch
    import trl

    training_step = trl.SFTTrainer.training_step

    def breaks(trainer, *arguments):
        loss = training_step(trainer, *arguments)
        return torch.full_like(loss, float("nan")) if trainer.state.global_step == 4 else loss

    monkeypatch.setattr(trl.SFTTrainer, "training_step", breaks)
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match=r"step 5 had a loss of nan; its last rows ask: \w+"):
        finetune_r1.train_run(config, run)
    assert run.record["status"] == "failed" and finetune_r1.step_of(run.checkpoints[-1]) == 4


def test_weights_that_are_no_numbers_are_never_a_checkpoint(config, unsloth, tmp_path, monkeypatch):
    import torch

    def breaks(optimizer, closure=None):
        for group in optimizer.param_groups:
            for weights in group["params"]:
                weights.data.fill_(float("inf"))

    run, config = Run(tmp_path / "run"), dataclasses.replace(config, optim="adamw_torch", max_steps=1)
    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    with pytest.raises(UserError, match="step 1 left weights that are no numbers"):
        finetune_r1.train_run(config, run)
    assert not run.checkpoints and not (run / "adapter").exists()


def test_a_poisoned_checkpoint_runs_nothing(killed, tmp_path):
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'poisoned'}",)

    run = killed(3)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (run.checkpoints[-1] / name).write_bytes(pickle.dumps(Poison()))
    with pytest.raises(pickle.UnpicklingError) as caught:
        finetune_r1.train_run(run.config, run, run)
    assert "remove it" in finetune_r1.advice(caught.value)
    assert not (tmp_path / "poisoned").exists()


def test_a_run_in_use_is_refused(undisturbed, tmp_path):
    """By another process, as this one's own lock is its own."""
    code = "import sys, finetune_r1 as f\nwith f.Run(f.Path(sys.argv[1])).locked(): print(1, flush=True); input()"
    command = [sys.executable, "-c", code, tmp_path]
    holder = subprocess.Popen(command, cwd=SCRIPT.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match="in use by another process"), Run(tmp_path).locked():
        pass
    holder.kill()
    holder.wait()
    with Run(tmp_path).locked():
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(config, undisturbed, tmp_path, monkeypatch, number, code):
    import trl

    training_step, run = trl.SFTTrainer.training_step, Run(tmp_path / "run")

    def disturbed(trainer, *arguments):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), number)
        return training_step(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(finetune_r1.Interrupted) as caught:
        patch.setattr(trl.SFTTrainer, "training_step", disturbed)
        finetune_r1.train_run(config, run)
    assert caught.value.code == code and run.record["status"] == "interrupted"
    assert finetune_r1.step_of(run.checkpoints[-1]) == 3 and list(losses(run)) == [1, 2, 3]
    finetune_r1.train_run(config, run, run)
    assert losses(run) == losses(undisturbed) and equal(adapter(run), adapter(undisturbed))


def test_a_second_signal_leaves_at_once(unsloth):
    with pytest.raises(finetune_r1.Interrupted), finetune_r1.step_ends_first() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)


def test_on_the_command_line_a_stopped_run_goes_on_and_ends_in_order_when_its_time_is_over(tiny_r1, cli, tmp_path):
    options = ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:12]", "--no-load-in-4bit",
               "--effective-batch", 2, "--max-steps", 100000, "--max-new-tokens", 4, "--run-dir", "runs/a"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, options)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("step 00010"):
            break
    process.terminate()
    rest = process.stderr.read()
    assert process.wait() == 143 and "stops after this step" in rest and "Traceback" not in rest
    assert "`train --resume runs/a` goes on" in rest
    run = Run(tmp_path / "runs" / "a")
    done = finetune_r1.step_of(run.checkpoints[-1])
    resumed = cli("train", "--resume", "--max-time", "15s", "--json")
    assert resumed.code == 0 and f"--max-time: stopped after step {max(losses(run))} of 100000" in resumed.err
    assert json.loads(resumed.out)["run"] == "runs/a" and run.record["resumed_at"] == [done] < [max(losses(run))]
    assert run.record["status"] == "finished" and run.adapter and (run / "README.md").exists()
