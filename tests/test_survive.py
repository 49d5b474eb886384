"""What is left of a training that was interrupted, and how it is resumed, here or elsewhere."""

import dataclasses
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLE, SCRIPT, small_config
from safetensors.torch import load_file
from servers.base import Fault

import finetune_r1
from finetune_r1 import Run, UserError, read_jsonl


@pytest.fixture(scope="module")
def config(tiny_r1):
    """Three steps are an epoch, and two micro-batches a step."""
    settings = {"eval_rows": 4, "eval_steps": 100, "effective_batch": 2, "micro_batch": 1}
    return small_config(tiny_r1, split="train[:10]", save_steps=2, load_in_4bit=False, **settings)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed")
    finetune_r1.train_run(config, run)
    return run


def losses(run):
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return {line["step"]: line["loss"] for line in lines}


def same(run, other):
    """Whether losses and weights are the same, bit for bit."""
    one, two = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, other))
    equal = one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    return equal and losses(run) == losses(other)


def resume(run):
    finetune_r1.train_run(run.config, run, resume=True)
    assert run.record["status"] == "finished"


@pytest.fixture
def in_step(monkeypatch):
    """Has a function called once, before the training step after `step`."""
    import trl

    training_step = trl.SFTTrainer.training_step
    called = []

    def at(step, function):
        def disturbed(trainer, *arguments):
            if trainer.state.global_step == step and not called:
                called.append(function())
            return training_step(trainer, *arguments)

        monkeypatch.setattr(trl.SFTTrainer, "training_step", disturbed)

    return at


@pytest.fixture
def killed(config, unsloth, tmp_path):
    """Makes a run that ends by kill -9 in the step after `step`, or in writing its checkpoint."""

    def make(step, settings=config, within_checkpoint=False):
        import transformers
        import trl

        folder = tmp_path / "killed"
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            return Run(folder)
        compute_loss = trl.SFTTrainer.compute_loss
        save_to_json = transformers.TrainerState.save_to_json

        def die_in_step(trainer, *arguments, **options):
            if trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return compute_loss(trainer, *arguments, **options)

        def die_in_writing(state, path):
            save_to_json(state, path)
            if state.global_step == step:
                os.truncate(path, 100)
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if within_checkpoint:
                transformers.TrainerState.save_to_json = die_in_writing
            else:
                trl.SFTTrainer.compute_loss = die_in_step
            finetune_r1.train_run(settings, Run(folder))
        finally:
            os._exit(1)

    return make


@pytest.fixture(scope="module")
def interrupted(config, unsloth, tmp_path_factory):
    """A run that SIGTERM has stopped after its third step."""
    import trl

    run = Run(tmp_path_factory.mktemp("runs") / "interrupted")
    training_step = trl.SFTTrainer.training_step

    def stop(trainer, *arguments):
        if trainer.state.global_step == 2 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(trainer, *arguments)

    stopped = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trl.SFTTrainer, "training_step", stop)
        finetune_r1.train_run(config, run)
    return run


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy, to resume."""
    return Run(shutil.copytree(interrupted.folder, tmp_path / "runs" / "stopped"))


# ------------------------------------------------------------------------------------------ kill -9


def test_killed_run_resumed_equals_the_undisturbed_one_bit_for_bit(killed, undisturbed):
    run = killed(5)
    assert run.record["status"] == "running" and run.last_step == 4
    resume(run)
    assert same(run, undisturbed) and run.record["resumed_at"] == [4]


def test_torn_checkpoint_is_removed_and_costs_no_whole_one(
    killed, undisturbed, config, monkeypatch
):
    settings = dataclasses.replace(config, keep_checkpoints=1)
    run = killed(4, settings, within_checkpoint=True)
    assert (run / "checkpoints" / "checkpoint-4").exists() and run.last_step == 2
    # The next one comes by time, before the step of the torn one.
    monkeypatch.setattr(finetune_r1, "CHECKPOINT_SECONDS", 0)
    resume(run)
    assert same(run, undisturbed) and run.record["resumed_at"] == [2]


def test_poisoned_checkpoint_runs_no_code(stopped, tmp_path):
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'poisoned'}",)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (stopped.checkpoints[-1] / name).write_bytes(pickle.dumps(Poison()))
    with pytest.raises(pickle.UnpicklingError):
        resume(stopped)
    assert not (tmp_path / "poisoned").exists()


# ---------------------------------------------------------------------------------- what is resumed


def test_resumed_run_ends_as_the_undisturbed_one_without_artifacts_of_the_earlier_adapter(
    stopped, undisturbed, run_cli
):
    (stopped / "merged").mkdir()
    (stopped / "evaluated by hand.txt").touch()
    stopped.update(saved={"folder": "merged", "hashes": {}, "adapter_effect_kept": 1.0})
    for name in ("eval.json", "eval.png", "eval-medqa-test-77e0.json"):
        (stopped / name).touch()
    done = run_cli(["train", "--resume"], stopped.folder.parent.parent)
    assert done.code == 0 and "resuming runs/stopped after step 3" in done.err, done.err
    assert same(stopped, undisturbed) and stopped.record["resumed_at"] == [3]
    left = {path.name for path in stopped.folder.glob("*")} & {"merged", "gguf"}
    assert not left and not stopped.record.get("saved")
    assert [path.name for path in stopped.folder.glob("eval*")] == ["evaluated by hand.txt"]


def test_finished_run_is_not_resumed_unless_its_adapter_is_lost(undisturbed, run_cli, tmp_path):
    run = Run(shutil.copytree(undisturbed.folder, tmp_path / "runs" / "a"))
    assert "nothing to resume under runs/" in run_cli(["train", "--resume"]).err
    refused = run_cli(["train", "--resume", "runs/a"])
    assert refused.code == 1 and "already finished" in refused.err
    shutil.rmtree(run / "adapter")
    said = run_cli(["infer", "Why?", "--run", "runs/a"]).err
    line = re.search(r"finetune_r1.py (train --resume runs/a)`", said)
    done = run_cli(line[1].split())
    assert done.code == 0 and same(run, undisturbed), done.err


def test_newest_run_with_a_checkpoint_is_the_default(stopped, run_cli):
    """One that failed before its first checkpoint is newer, and no choice."""
    empty = Run(shutil.copytree(stopped.folder, stopped.folder.parent / "failed"))
    shutil.rmtree(empty / "checkpoints")
    empty.update(status="failed", ended="2999-01-01T00:00:00+0000")
    resumed = run_cli(["train", "--resume", "--lora-r", 8], stopped.folder.parent.parent)
    assert "resuming runs/stopped after step 3" in resumed.err and "--lora-r was 16" in resumed.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_r": 8}, "--lora-r was 16"),
        ({"model": "some/other"}, "--model was"),
    ],
)
def test_resume_with_different_settings_is_refused_by_name(interrupted, config, changed, said):
    other = dataclasses.replace(config, **changed)
    with pytest.raises(UserError, match=said):
        finetune_r1.resumed_config(interrupted, other, set(changed))


def test_resume_may_change_how_often_it_saves_and_logs(interrupted, config):
    changed = {"save_steps": 3, "logging_steps": 2, "keep_checkpoints": 1, "micro_batch": 2}
    other = dataclasses.replace(config, **changed, lora_r=8)
    resumed = finetune_r1.resumed_config(interrupted, other, set(changed))
    assert resumed == dataclasses.replace(config, **changed)


def test_resume_with_other_rows_is_refused(stopped, config, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(SAMPLE.read_text().replace("the", "a"))
    other = dataclasses.replace(config, dataset=str(rows))
    with pytest.raises(UserError, match="rows differ"):
        finetune_r1.train_run(other, stopped, resume=True)


# --------------------------------------------------------------------------- signals and full disks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_ends_the_step_and_leaves_a_checkpoint(
    config, undisturbed, tmp_path, in_step, number, code
):
    run = Run(tmp_path / "run")
    in_step(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(finetune_r1.typer.Exit) as end, finetune_r1.friendly_errors():
        finetune_r1.train_run(config, run)
    assert end.value.exit_code == code and run.record["status"] == "interrupted"
    assert run.last_step == 3 and list(losses(run)) == [1, 2, 3]
    if number == signal.SIGINT:
        resume(run)
        assert same(run, undisturbed)


def test_second_signal_quits_at_once(config, tmp_path):
    events = finetune_r1.TrainingEvents(Run(tmp_path), config)
    events.on_signal(signal.SIGTERM, None)
    assert events.stop == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        events.on_signal(signal.SIGTERM, None)


def test_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    config, undisturbed, tmp_path, monkeypatch, in_step
):
    """From the fourth step on no file may grow beyond some bytes, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Run(tmp_path / "run")
    in_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    with pytest.raises(Exception) as caught:
        try:
            finetune_r1.train_run(config, run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk" in str(finetune_r1.advice(caught.value))
    assert run.record["status"] == "failed"
    assert [path.name for path in run.checkpoints] == ["checkpoint-2"]
    resume(run)
    assert same(run, undisturbed)


# ---------------------------------------------------------------------------------------- on the command line


@pytest.mark.slow
def test_stopped_training_on_the_command_line_is_resumed(tiny_r1, cli, tmp_path):
    options = ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:12]"]
    options += ["--no-load-in-4bit", "--effective-batch", 2, "--max-steps", 60, "--no-wandb"]
    options += ["--logging-steps", 1, "--max-new-tokens", 4, "--run-dir", "runs/a"]
    command = [sys.executable, SCRIPT, *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 00010"):
            break
    process.terminate()
    rest = process.stderr.read()
    assert process.wait() == 143 and "stopping after this step" in rest and "Traceback" not in rest
    assert "train --resume runs/a`" in rest
    run = Run(tmp_path / "runs" / "a")
    done = run.last_step
    resumed = cli("train", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert run.record["resumed_at"] == [done] and list(losses(run)) == list(range(1, 61))
    assert run.record["status"] == "finished" and run.adapter and (run / "README.md").exists()


# ------------------------------------------------------------------ a machine that is gone for good

REPO, TOKEN = "alice/kept", "hf_writetoken"


@pytest.fixture
def hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    finetune_r1.export_hub_token.cache_clear()
    yield hub
    finetune_r1.export_hub_token.cache_clear()


def uploaded_steps(hub):
    repo = hub.repos.get(("model", REPO))
    return set(re.findall(r"checkpoint-\d+", " ".join(repo.files if repo else ())))


def test_hub_checkpoint_is_resumed_on_another_machine_bit_for_bit(
    config, undisturbed, hub, run_cli, tiny_r1, tmp_path, in_step
):
    """Interrupted while the checkpoint before is still on its way."""
    model = shutil.copytree(tiny_r1, tmp_path / "gone" / "model")
    rows = Path(shutil.copy(SAMPLE, tmp_path / "gone" / "rows.jsonl"))
    settings = dataclasses.replace(
        config, hub_checkpoints=REPO, model=str(model), dataset=str(rows)
    )
    in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    hub.faults.append(Fault("*", "/preupload/", delay=2))
    with pytest.raises(KeyboardInterrupt):
        finetune_r1.train_run(settings, Run(tmp_path / "run"))
    for folder in ("run", "gone"):
        shutil.rmtree(tmp_path / folder)
    repo = hub.repos["model", REPO]
    assert repo.private and uploaded_steps(hub) == {"checkpoint-4"}, "the newest alone"
    assert not [name for name in repo.files if name.endswith((".bin", "README.md"))]
    assert not [name for name, content in repo.files.items() if TOKEN.encode() in content]

    # Model and dataset are elsewhere on this machine.
    lacks = run_cli(["train", "--resume", f"hub:{REPO}"])
    assert lacks.code == 1 and f"{model} not found" in lacks.err and "--model PATH" in lacks.err
    lacks = run_cli(["train", "--resume", "--model", tiny_r1])
    assert lacks.code == 1 and str(rows) in lacks.err
    done = run_cli(
        ["train", "--resume", "runs/alice--kept", "--model", tiny_r1, "--dataset", SAMPLE]
    )
    assert done.code == 0, done.err
    resumed = Run(tmp_path / "runs" / "alice--kept")
    assert "resuming runs/alice--kept after step 4" in done.err and same(resumed, undisturbed)
    assert resumed.config.model == str(tiny_r1) and uploaded_steps(hub) == {"checkpoint-6"}
    again = run_cli(["train", "--resume", f"hub:{REPO}"])
    assert again.code == 1 and "train --resume runs/alice--kept`" in again.err


TROUBLE = {
    "down": Fault("*", "", "drop", times=math.inf),
    "too many requests": Fault("POST", "", 429, times=math.inf, headers={"Retry-After": "1"}),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_hub_in_trouble_is_noted_and_has_the_newest_checkpoint_when_it_is_back(
    config, undisturbed, hub, tmp_path, in_step, kind
):
    """In trouble for the first steps, each with a checkpoint."""
    run = Run(tmp_path / "run")
    in_step(5, hub.faults.clear)
    hub.faults.append(dataclasses.replace(TROUBLE[kind]))
    settings = dataclasses.replace(config, save_steps=1, hub_checkpoints=REPO)
    finetune_r1.train_run(settings, run)
    assert run.record["status"] == "finished" and same(run, undisturbed)
    assert uploaded_steps(hub) == {"checkpoint-6"}


@pytest.mark.parametrize("trouble", ["public", "down to the end"])
def test_hub_checkpoints_that_fail_for_any_reason_never_end_the_training(
    config, undisturbed, hub, tmp_path, capsys, trouble
):
    if trouble == "public":
        hub.add_repo("model", REPO, {"config.json": b"{}"})
    else:
        hub.faults.append(Fault("POST", "", 503, times=math.inf))
    run = Run(tmp_path / "run")
    finetune_r1.train_run(dataclasses.replace(config, hub_checkpoints=REPO), run)
    assert run.record["status"] == "finished" and same(run, undisturbed)
    said = capsys.readouterr().err
    assert f"checkpoint not uploaded to {REPO}" in said
    assert not uploaded_steps(hub)
