"""What is left of a training, or of other long work, that was interrupted, and how it goes on."""

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

import filelock
import pytest
from conftest import SAMPLE, SCRIPT
from safetensors.torch import load_file
from servers.base import STALL, Fault

import finetune_r1
from finetune_r1 import EvalConfig, Run, SamplingConfig, TrainConfig, UserError, read_jsonl

SHORT = SamplingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def config(tiny_r1):
    """Three steps are an epoch, and two micro-batches a step."""
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:10]", eval_rows=4, eval_steps=100,
        max_seq_length=768, max_steps=6, warmup_steps=1, effective_batch=2, micro_batch=1, learning_rate=1e-2,
        logging_steps=1, save_steps=2, load_in_4bit=False, max_new_tokens=4, wandb=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed")
    finetune_r1.train_run(config, run)
    return run


def losses(run):
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return {line["step"]: line["loss"] for line in lines}


def adapter(run):
    return {
        name: weights.numpy()
        for name, weights in load_file(run / "adapter" / "adapter_model.safetensors").items()
    }


def same(run, other):
    """Whether losses and weights are the same, bit for bit."""
    one, two = adapter(run), adapter(other)
    return (
        losses(run) == losses(other)
        and one.keys() == two.keys()
        and all((one[n] == two[n]).all() for n in one)
    )


def resume(run):
    finetune_r1.train_run(run.config, run, resume=True)
    assert run.record["status"] == "finished"


@pytest.fixture
def killed(config, unsloth, tmp_path):
    """Makes a run that is ended by kill -9 in the step after `step`, or while its checkpoint is written."""

    def make(step, settings=config, within_checkpoint=False):
        import transformers
        import trl

        folder = tmp_path / "killed"
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            return Run(folder)
        try:
            # The threads of Xet's session, if an earlier test made one, did not come along.
            finetune_r1.hub_xet._GLOBAL_XET_HOLDER._session = None
            compute_loss, save_to_json = (
                trl.SFTTrainer.compute_loss,
                transformers.TrainerState.save_to_json,
            )

            def die_in_step(trainer, *arguments, **options):
                if trainer.state.global_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return compute_loss(trainer, *arguments, **options)

            def die_in_writing(state, path):
                save_to_json(state, path)
                if state.global_step == step:
                    os.truncate(path, 100)
                    os.kill(os.getpid(), signal.SIGKILL)

            if within_checkpoint:
                transformers.TrainerState.save_to_json = die_in_writing
            else:
                trl.SFTTrainer.compute_loss = die_in_step
            finetune_r1.train_run(settings, Run(folder))
        finally:
            os._exit(1)

    return make


@pytest.fixture(scope="module")
def timed_out(config, unsloth, tmp_path_factory):
    """A run that --max-time has stopped after its third step."""
    import trl

    training_step, run = (
        trl.SFTTrainer.training_step,
        Run(tmp_path_factory.mktemp("runs") / "timed-out"),
    )
    with pytest.MonkeyPatch.context() as patch:

        def slow(trainer, *arguments):
            if trainer.state.global_step == 2:
                patch.setattr(finetune_r1, "STARTED", finetune_r1.STARTED - 24 * 3600)
            return training_step(trainer, *arguments)

        patch.setattr(trl.SFTTrainer, "training_step", slow)
        finetune_r1.train_run(dataclasses.replace(config, max_time=12 * 3600), run)
    return run


@pytest.fixture
def stopped(timed_out, tmp_path):
    """A copy, to go on with."""
    return Run(shutil.copytree(timed_out.folder, tmp_path / "runs" / "stopped"))


# ---------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_that_goes_on_ends_as_the_undisturbed_one_bit_for_bit(
    killed, undisturbed, step
):
    run = killed(step)
    assert run.record["status"] == "running" and run.last_step == step - 1
    resume(run)
    assert same(run, undisturbed) and run.record["resumed_at"] == [step - 1]


def test_a_checkpoint_that_was_being_written_is_not_taken_and_costs_none_that_is_whole(
    killed, undisturbed, config, monkeypatch
):
    run = killed(
        4, dataclasses.replace(config, keep_checkpoints=1, save_steps=2), within_checkpoint=True
    )
    assert (run / "checkpoints" / "checkpoint-4").exists() and run.last_step == 2
    # The next checkpoint comes by time before the step of the torn one, and then the process ends again.
    monkeypatch.setattr(finetune_r1, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            finetune_r1.TrainingLog,
            "on_save",
            lambda *_, **__: finetune_r1.interrupt(signal.SIGTERM),
        )
        resume(run)
    assert run.last_step == 3
    resume(run)
    assert same(run, undisturbed) and run.record["resumed_at"] == [2, 3]


def test_a_run_whose_steps_were_all_done_only_answers_and_saves(undisturbed, tmp_path):
    run = Run(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    run.update(status="running")
    resume(run)
    assert same(run, undisturbed)


def test_a_poisoned_checkpoint_runs_nothing(stopped, tmp_path):
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'poisoned'}",)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (stopped.checkpoints[-1] / name).write_bytes(pickle.dumps(Poison()))
    with pytest.raises(pickle.UnpicklingError) as caught:
        resume(stopped)
    assert "remove it" in str(finetune_r1.advice(caught.value))
    assert not (tmp_path / "poisoned").exists()


# ------------------------------------------------------------------------------------------------- --max-time


def test_a_run_whose_time_is_over_has_an_adapter_that_can_be_asked_evaluated_and_saved(
    stopped, capsys
):
    assert stopped.record["status"] == "stopped" and stopped.last_step == 3
    assert list(losses(stopped)) == [1, 2, 3] and (stopped / "README.md").exists()
    answer = finetune_r1.infer(SHORT, as_json=True, question="Why?", run=stopped.folder)
    assert answer["tokens"] == 4
    assert finetune_r1.eval_(EvalConfig(max_new_tokens=4, answers=0), stopped.folder)["rows"] == 4
    assert finetune_r1.save(run=stopped.folder)["saved"] == str(stopped / "merged")


def test_it_goes_on_in_its_folder_to_the_undisturbed_runs_end_without_what_was_made_of_the_earlier_adapter(
    stopped, undisturbed, told
):
    (stopped / "merged").mkdir()
    (stopped / "evaluated by hand.txt").touch()
    stopped.update(saved={"folder": "merged", "hashes": {}, "adapter_effect_kept": 1.0})
    for name in ("eval.json", "eval.png", "eval-medqa-test-77e0.json"):
        (stopped / name).touch()
    again = told(["train", "--resume", "--max-time", "1s"], stopped.folder.parent.parent)
    assert again.code == 0, again.err
    assert (
        "--max-time: stopped after step 4; continue with `train --resume runs/stopped`" in again.err
    )
    assert stopped.record["status"] == "stopped" and stopped.record["resumed_at"] == [3]
    assert not (stopped / "merged").exists() and not list(stopped.folder.glob("eval*.*[gn]"))
    assert (stopped / "evaluated by hand.txt").exists(), "the user's own"
    assert not stopped.record.get("saved")
    done = told(["train", "--resume", "--max-time", "12h"], stopped.folder.parent.parent)
    assert done.code == 0, done.err
    assert same(stopped, undisturbed) and stopped.record["status"] == "finished"


# ---------------------------------------------------------------------------------------- what does not go on


def test_a_finished_run_is_not_trained_further(undisturbed, config, told, tmp_path):
    with pytest.raises(UserError, match="it is finished, with 6 steps"):
        finetune_r1.train(config, given=set(), run=undisturbed.folder, resume=True)
    shutil.copytree(undisturbed.folder, tmp_path / "runs" / "a")
    assert "no run under runs/ is unfinished" in told(["train", "--resume"]).err


def test_the_newest_run_that_has_begun_is_taken_and_named(stopped, told):
    """One that failed before its first checkpoint is newer, and no choice."""
    empty = Run(shutil.copytree(stopped.folder, stopped.folder.parent / "failed"))
    shutil.rmtree(empty / "checkpoints")
    empty.update(status="failed", ended="2999-01-01T00:00:00+0000")
    resumed = told(["train", "--resume", "--lora-r", 8], stopped.folder.parent.parent)
    assert "resuming runs/stopped after step 3" in resumed.err and "was 16, now 8" in resumed.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_r": 8}, "--lora-r was 16, now 8"),
        (
            {"learning_rate": 1e-3, "seed": 1},
            "--seed was 3407, now 1, --learning-rate was 0.01, now 0.001",
        ),
        ({"model": "some/other"}, "--model was"),
        ({"max_steps": 8}, "--max-steps was 6, now 8"),
    ],
)
def test_another_training_is_refused_with_the_difference_named(timed_out, config, changed, said):
    with pytest.raises(UserError, match=said):
        finetune_r1.resumed_config(timed_out, dataclasses.replace(config, **changed), set(changed))


def test_how_often_it_is_saved_logged_and_how_long_it_runs_may_change(timed_out, config):
    changed = {
        "save_steps": 3,
        "logging_steps": 2,
        "max_time": 60.0,
        "keep_checkpoints": 1,
        "micro_batch": 2,
    }
    goes_on = finetune_r1.resumed_config(
        timed_out, dataclasses.replace(config, **changed, lora_r=8), set(changed)
    )
    assert goes_on == dataclasses.replace(config, **changed)


def test_other_rows_or_another_prompt_are_refused(killed, config, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(SAMPLE.read_text())
    run = killed(3, dataclasses.replace(config, dataset=str(rows)))
    rows.write_text(SAMPLE.read_text().replace("the", "a"))
    with pytest.raises(UserError, match="dataset_fingerprint was"):
        resume(run)
    rows.write_text(SAMPLE.read_text())
    monkeypatch.setitem(finetune_r1.prompts.TEMPLATES, "en", "Q: {question}\n<think>\n")
    with pytest.raises(UserError, match="prompt_hash was"):
        resume(run)


# ------------------------------------------------------------------------------------- signals and full disks


# Ctrl-C, what Kaggle and Slurm send, and a terminal that is closed.
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    config, undisturbed, tmp_path, monkeypatch, number, code
):
    import trl

    training_step, run, sent = trl.SFTTrainer.training_step, Run(tmp_path / "run"), []

    def disturbed(trainer, *arguments):
        if trainer.state.global_step == 2 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return training_step(trainer, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(finetune_r1.typer.Exit) as end,
        finetune_r1.friendly_errors(),
    ):
        patch.setattr(trl.SFTTrainer, "training_step", disturbed)
        finetune_r1.train_run(config, run)
    assert end.value.exit_code == code and run.record["status"] == "interrupted"
    assert run.last_step == 3 and list(losses(run)) == [1, 2, 3]
    resume(run)
    assert same(run, undisturbed)


def test_a_second_signal_leaves_at_once():
    with pytest.raises(KeyboardInterrupt), finetune_r1.stop_after_step() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_lost_pipe_or_terminal_costs_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        for _ in range(3):
            assert finetune_r1.LastingStream(pipe).write("step 00001\n") == 11


def test_a_full_disk_stops_the_run_with_a_message_and_the_last_checkpoint_intact(
    config, undisturbed, tmp_path, monkeypatch
):
    """From the fourth step on no file may grow beyond some bytes, which is how a full disk looks here."""
    import resource

    import trl

    training_step, before = trl.SFTTrainer.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(trainer, *arguments):
        if trainer.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return training_step(trainer, *arguments)

    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr(trl.SFTTrainer, "training_step", fills)
        try:
            finetune_r1.train_run(config, run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "disk" in str(finetune_r1.advice(caught.value))
    assert run.record["status"] == "failed" and [path.name for path in run.checkpoints] == [
        "checkpoint-2"
    ]
    resume(run)
    assert same(run, undisturbed)


# -------------------------------------------------------------------------------------------- other long work


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"Question": f"What is {'very ' * n}bad?", "Response": str(n)} for n in range(20)]
    finetune_r1.write_jsonl(path, rows)
    return path


@pytest.fixture
def ask(questions, tmp_path):
    """Answers the file's questions; returns the answers."""

    def run(output, folder):
        options = {"run": folder, "file": questions, "output": tmp_path / output, "as_json": True}
        assert finetune_r1.infer(SHORT, **options) == {
            "answers": 20,
            "written": str(tmp_path / output),
        }
        return [{**line, "seconds": 0} for line in read_jsonl(tmp_path / output)]

    return run


@pytest.fixture
def render_prompts(monkeypatch):
    """Notes what is answered, and interrupts at the second batch."""
    found, generate = [], finetune_r1.LoadedModel.generate

    def interrupted(loaded, questions, *rest):
        found.append(len(questions))
        if len(found) == 2:
            raise KeyboardInterrupt
        return generate(loaded, questions, *rest)

    monkeypatch.setattr(finetune_r1.LoadedModel, "generate", interrupted)
    return found


def test_answers_to_a_file_go_on_where_they_were_interrupted_and_are_the_same(
    undisturbed, ask, tmp_path, request
):
    whole = ask("whole.jsonl", undisturbed.folder)
    asked = request.getfixturevalue("asked")
    with pytest.raises(KeyboardInterrupt):
        ask("parts.jsonl", undisturbed.folder)
    assert not (tmp_path / "parts.jsonl").exists()
    assert ask("parts.jsonl", undisturbed.folder) == whole and asked == [16, 4, 4]
    assert [line["reference"] for line in whole] == [str(n) for n in range(20)]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "parts.jsonl"}


def test_answers_of_an_adapter_that_was_trained_on_are_not_mixed_with_those_of_before(
    stopped, ask, asked
):
    with pytest.raises(KeyboardInterrupt):
        ask("parts.jsonl", stopped.folder)
    resume(stopped)
    asked.extend([0] * 10)
    ask("parts.jsonl", stopped.folder)
    assert asked[-2:] == [16, 4], "all anew"


def test_of_two_commands_that_would_write_one_file_the_later_is_refused_before_it_answers(
    undisturbed, ask, questions, tmp_path, monkeypatch
):
    """Their answers differ, as one may write longer ones."""
    generate, refused = finetune_r1.LoadedModel.generate, []
    longer = {
        "run": undisturbed.folder,
        "file": questions,
        "output": tmp_path / "one.jsonl",
        "as_json": True,
    }

    def meanwhile(loaded, questions, *rest):
        monkeypatch.setattr(finetune_r1.LoadedModel, "generate", generate)
        with pytest.raises(filelock.Timeout) as caught:
            finetune_r1.infer(SamplingConfig(max_new_tokens=8), **longer)
        refused.append(finetune_r1.advice(caught.value))
        return generate(loaded, questions, *rest)

    monkeypatch.setattr(finetune_r1.LoadedModel, "generate", meanwhile)
    ask("one.jsonl", undisturbed.folder)
    assert "another process is at work" in refused[0]


def test_answers_are_not_written_over_those_of_a_command_that_ended_while_the_model_was_loaded(
    undisturbed, ask, tmp_path, monkeypatch
):
    load = finetune_r1.LoadedModel.load_run

    def load_meanwhile(*arguments):
        (tmp_path / "one.jsonl").write_text("theirs")
        return load(*arguments)

    monkeypatch.setattr(finetune_r1.LoadedModel, "load_run", load_meanwhile)
    with pytest.raises(UserError, match="it is there already"):
        ask("one.jsonl", undisturbed.folder)
    assert {
        path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix == ".jsonl"
    } == {"one.jsonl": "theirs"}


def test_a_save_killed_before_or_after_its_weights_have_their_name_can_be_repeated(
    undisturbed, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def dies(*_, **__):
        raise Killed

    run = Run(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "update", dies)
        finetune_r1.merged_weights(run)
    merged = finetune_r1.merged_weights(run)
    merged.rename(run / "elsewhere")  # as if killed in between
    assert (finetune_r1.merged_weights(run) / "config.json").is_file()


def test_the_lost_adapter_of_a_finished_run_is_made_again_by_the_line_that_is_told(
    undisturbed, told, tmp_path
):
    run = Run(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    refused = told(["train", "--resume", "run"])
    assert refused.code == 1 and "it is finished" in refused.err
    shutil.rmtree(run / "adapter")
    line = re.search(
        r"finetune_r1.py (train --resume run)`", told(["infer", "Why?", "--run", "run"]).err
    )
    done = told(line[1].split())
    assert done.code == 0 and run.record["status"] == "finished" and same(run, undisturbed), (
        done.err
    )


# ---------------------------------------------------------------------------------------- on the command line


@pytest.mark.slow
def test_on_the_command_line_a_stopped_run_goes_on_and_ends_in_order_when_its_time_is_over(
    tiny_r1, cli, tmp_path
):
    options = ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:12]", "--no-load-in-4bit",
               "--effective-batch", 2, "--max-steps", 100000, "--logging-steps", 1, "--max-new-tokens", 4,
               "--run-dir", "runs/a"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, options)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 00010"):
            break
    process.terminate()
    rest = process.stderr.read()
    assert process.wait() == 143 and "stopping after this step" in rest and "Traceback" not in rest
    assert "continue with `train --resume runs/a`" in rest
    run = Run(tmp_path / "runs" / "a")
    done = run.last_step
    resumed = cli("train", "--resume", "--max-time", "15s", "--json")
    assert resumed.code == 0
    assert f"stopped after step {max(losses(run))}; continue with `train --resume" in resumed.err
    assert run.record["resumed_at"] == [done] < [max(losses(run))]
    assert run.record["status"] == "stopped" and run.adapter and (run / "README.md").exists()


# ------------------------------------------------------------------------- a machine that is gone for good

REPO, TOKEN = "alice/kept", "hf_writetoken"
SEND = finetune_r1.HubCheckpoints.send


@pytest.fixture
def hub(hub, monkeypatch):
    """A Hub on which a checkpoint is before the next step begins."""

    def wait(keeper):
        SEND(keeper)
        keeper.sending.get()

    monkeypatch.setattr(finetune_r1.HubCheckpoints, "send", wait)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    finetune_r1.use_hub_token.cache_clear()
    yield hub
    finetune_r1.use_hub_token.cache_clear()


def test_what_the_hub_keeps_is_resumed_on_another_machine_bit_for_bit(
    config, undisturbed, killed, hub, told, tiny_r1, tmp_path
):
    model = shutil.copytree(tiny_r1, tmp_path / "snapshots" / tiny_r1.name)
    run = killed(5, dataclasses.replace(config, hub_checkpoints=REPO, model=str(model)))
    shutil.rmtree(run.folder)
    shutil.rmtree(model)
    repo = hub.repos["model", REPO]
    kept = dict(repo.files)
    steps = {re.search(r"checkpoint-\d+", name)[0] for name in kept if "checkpoint-" in name}
    assert repo.private and steps == {"checkpoint-4"}, "the newest alone"
    assert not [name for name in kept if name.endswith((".bin", "README.md"))]
    private = "|".join(
        map(str, (TOKEN, tmp_path, tiny_r1.parent, SAMPLE.parent, Path.cwd()))
    ).encode()
    for name, content in kept.items():
        assert not re.search(private, content), name
    # Model and dataset were folder and file of the machine, and are elsewhere on this one.
    moved = (
        shutil.copytree(tiny_r1, tmp_path / "here" / tiny_r1.name),
        shutil.copy(SAMPLE, tmp_path / "here"),
    )
    named = ["--model", moved[0], "--dataset", moved[1]]
    lacks = told(["train", "--resume", f"hub:{REPO}"])
    assert lacks.code == 1 and "its model was tiny-r1 on another machine" in lacks.err
    assert "train --resume runs/alice--kept --model PATH`" in lacks.err
    lacks = told(["train", "--resume", *named[:2]])
    assert "its dataset was medical_sample.jsonl on another machine" in lacks.err
    done = told(["train", "--resume", "runs/alice--kept", *named])
    assert done.code == 0, done.err
    resumed = Run(tmp_path / "runs" / "alice--kept")
    assert "resuming runs/alice--kept after step 4" in done.err and same(resumed, undisturbed)
    assert not [name for name in repo.files if "checkpoint-" in name], "it is of no use any more"
    again = told(["train", "--resume", f"hub:{REPO}"])
    assert (
        again.code == 1 and "`python finetune_r1.py train --resume runs/alice--kept`" in again.err
    )


def test_a_run_that_is_stopped_waits_until_its_last_checkpoint_is_there(
    config, hub, tmp_path, monkeypatch
):
    """Though the one before is still on its way."""
    import trl

    def stopped(trainer, *arguments):
        if trainer.state.global_step == 1 and not signals:
            signals.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(trainer, *arguments)

    training_step, signals = trl.SFTTrainer.training_step, []
    monkeypatch.setattr(trl.SFTTrainer, "training_step", stopped)
    monkeypatch.setattr(finetune_r1.HubCheckpoints, "send", SEND)
    hub.faults.append(Fault("*", "/preupload/", delay=3))
    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        finetune_r1.train_run(dataclasses.replace(config, hub_checkpoints=REPO, save_steps=1), run)
    assert run.last_step == 2 and kept_steps(hub) == {"checkpoint-2"}


def test_the_last_checkpoint_is_kept_if_asked(config, hub, tmp_path, monkeypatch):
    """Though the Hub is slow and the training done."""
    monkeypatch.setattr(finetune_r1.HubCheckpoints, "send", SEND)
    hub.faults.append(Fault("*", "/preupload/", delay=3))
    settings = dataclasses.replace(config, max_steps=2, save_steps=2, hub_checkpoints=REPO)
    finetune_r1.train_run(
        dataclasses.replace(settings, keep_hub_checkpoints=True), Run(tmp_path / "run")
    )
    assert [name for name in hub.repos["model", REPO].files if "checkpoint-2/optimizer" in name]


TROUBLE = {
    "down": Fault("*", "", "drop", times=math.inf),
    "too many requests": Fault("POST", "", 429, times=math.inf, headers={"Retry-After": "1"}),
    "5xx at the commit": Fault("POST", "/commit/", 500, times=math.inf),
    "silent": Fault("*", "", delay=STALL, times=math.inf),
}


@pytest.mark.parametrize("fault", TROUBLE.values(), ids=TROUBLE)
def test_a_hub_in_trouble_is_told_once_and_has_the_newest_checkpoint_when_it_is_back(
    config, undisturbed, hub, tmp_path, monkeypatch, capsys, fault
):
    """In trouble for the first three steps, each with a checkpoint."""
    import huggingface_hub
    import trl

    def step(trainer, *arguments):
        if trainer.state.global_step == 3:
            assert kept_steps(hub) == set()
            hub.faults.clear()
        return training_step(trainer, *arguments)

    training_step, run = trl.SFTTrainer.training_step, Run(tmp_path / "run")
    monkeypatch.setattr(trl.SFTTrainer, "training_step", step)
    monkeypatch.setattr(finetune_r1, "SILENT_SECONDS", {"": 0.5})
    huggingface_hub.set_client_factory(finetune_r1.hub_client)
    hub.faults.append(dataclasses.replace(fault))
    settings = dataclasses.replace(
        config, save_steps=1, hub_checkpoints=REPO, keep_hub_checkpoints=True
    )
    finetune_r1.train_run(settings, run)
    assert run.record["status"] == "finished" and same(run, undisturbed)
    said = capsys.readouterr().err
    assert said.count("did not take a checkpoint") == 1 and "lacks" not in said
    assert kept_steps(hub) == {"checkpoint-6"} and not (run / ".hub").exists()


def kept_steps(hub):
    """The checkpoints that are on the Hub."""
    repo = hub.repos.get(("model", REPO))
    return set(re.findall(r"checkpoint-\d+", " ".join(repo.files if repo else ())))


@pytest.mark.parametrize(("times", "kept"), [(1, {"checkpoint-2"}), (math.inf, {"checkpoint-1"})])
def test_the_last_checkpoint_is_tried_again_and_told_if_it_did_not_arrive(
    config, hub, tmp_path, capsys, times, kept
):
    hub.faults.append(Fault("POST", "/commit/", 503, times=times, skip=1))
    settings = dataclasses.replace(config, max_steps=2, save_steps=1, hub_checkpoints=REPO)
    finetune_r1.train_run(
        dataclasses.replace(settings, keep_hub_checkpoints=True), Run(tmp_path / "run")
    )
    said = capsys.readouterr().err
    assert kept_steps(hub) == kept and said.count("did not take a checkpoint") == 1
    assert (f"{REPO} lacks the newest checkpoint" in said) == (times == math.inf)


def test_a_public_repository_is_left_alone(config, hub, tmp_path, capsys):
    hub.add_repo("model", REPO, {"config.json": b"{}"})
    finetune_r1.train_run(dataclasses.replace(config, hub_checkpoints=REPO), Run(tmp_path / "run"))
    assert "it is public" in capsys.readouterr().err and set(hub.repos["model", REPO].files) <= {
        "config.json", ".gitattributes"
    }  # fmt: skip
