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
    lines = [line for line in read_rows(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return {line["step"]: line["loss"] for line in lines}


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


def test_checkpoints_come_by_time_too(config, unsloth, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_r1, "CHECKPOINT_SECONDS", 0)
    run = Run(tmp_path / "run")
    finetune_r1.train_run(dataclasses.replace(config, save_steps=None, keep_checkpoints=9, max_steps=3), run)
    assert [path.name for path in run.checkpoints] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


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


def test_samples_on_the_way_change_nothing(config, undisturbed, tmp_path, capsys):
    run = Run(tmp_path / "run")
    finetune_r1.train_run(dataclasses.replace(config, sample_every=2), run)
    samples = {line["step"]: line["sample"] for line in read_rows(run / "metrics.jsonl") if "sample" in line}
    assert list(samples) == [2, 4, 6] and all(sample["tokens"] == 4 for sample in samples.values())
    assert "step 00004/00006  thought never closed" in capsys.readouterr().err
    assert losses(run) == losses(undisturbed) and equal(adapter(run), adapter(undisturbed))
    [pair] = read_rows(run / "samples.jsonl")
    assert samples[6]["thought"] == pair["tuned"]["thought"] != samples[2]["thought"]


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_loss_that_is_no_number_or_nothing_stops_the_run_names_step_and_rows_and_keeps_the_last_checkpoint(
    config, unsloth, tmp_path, monkeypatch, value
):
    import torch
    import trl

    training_step = trl.SFTTrainer.training_step

    def breaks(trainer, *arguments):
        loss = training_step(trainer, *arguments)
        return torch.full_like(loss, value) if trainer.state.global_step == 4 else loss

    monkeypatch.setattr(trl.SFTTrainer, "training_step", breaks)
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"step 5 had a loss of {value}; its rows ask: \w+"):
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


@pytest.mark.slow
def test_on_the_command_line_a_stopped_run_goes_on_and_ends_in_order_when_its_time_is_over(tiny_r1, cli, tmp_path):
    options = ["train", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train[:12]", "--no-load-in-4bit",
               "--effective-batch", 2, "--max-steps", 100000, "--logging-steps", 1, "--max-new-tokens", 4,
               "--run-dir", "runs/a"]  # fmt: skip
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


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"Question": f"What is {'very ' * n}bad?", "Response": str(n)} for n in range(20)]
    finetune_r1.write_jsonl(path, rows)
    return path


def test_answers_to_a_file_go_on_where_they_were_interrupted_and_are_the_same(
    undisturbed, questions, tmp_path, monkeypatch
):
    def ask(output):
        options = {"run": undisturbed.folder, "file": questions, "output": tmp_path / output, "as_json": True}
        return finetune_r1.infer(finetune_r1.GenerationConfig(max_new_tokens=4), **options)

    def answers(output):
        return [{**line, "seconds": 0} for line in read_rows(tmp_path / output)]

    assert ask("whole.jsonl") == {"answers": 20, "written": str(tmp_path / "whole.jsonl")}
    asked, answer_batch = [], finetune_r1.Loaded.answer_batch

    def interrupted(loaded, questions, *rest):
        asked.extend(questions)
        if len(asked) == 20:  # the second of two batches
            raise KeyboardInterrupt
        return answer_batch(loaded, questions, *rest)

    monkeypatch.setattr(finetune_r1.Loaded, "answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask("parts.jsonl")
    [kept] = tmp_path.glob(".parts.jsonl.*.partial")
    with kept.open("a") as file:
        file.write('{"row": 3, "question": "half')
    assert not (tmp_path / "parts.jsonl").exists()
    ask("parts.jsonl")
    assert len(asked) == 20 + 4 and answers("parts.jsonl") == answers("whole.jsonl")
    assert [line["reference"] for line in answers("parts.jsonl")] == [str(n) for n in range(20)]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "parts.jsonl"}


def test_a_save_killed_before_or_after_its_weights_have_their_name_can_be_repeated(copied, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "update", dies)
        copied.weights("merged-16bit")
    merged, _ = copied.weights("merged-16bit")
    merged.rename(copied / "elsewhere")  # as if killed in between
    assert (copied.weights("merged-16bit")[0] / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".a[1].json.partial-{dead.pid}").mkdir()
    (tmp_path / f".a[1].json.partial-{os.getppid()}").touch()
    finetune_r1.write_text(tmp_path / "a[1].json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", f".a[1].json.partial-{os.getppid()}"}


def test_a_full_disk_stops_the_run_with_a_message_and_the_last_checkpoint_intact(
    config, undisturbed, tmp_path, monkeypatch
):
    """No file may grow beyond some bytes from the fourth step on, which is how a full disk looks from here."""
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
    assert "disk" in finetune_r1.advice(caught.value)
    assert run.record["status"] == "failed" and [path.name for path in run.checkpoints] == ["checkpoint-2"]
    finetune_r1.train_run(config, run, run)
    assert losses(run) == losses(undisturbed) and equal(adapter(run), adapter(undisturbed))


def test_too_little_room_for_checkpoints_is_said_before_training(config, unsloth, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_r1.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 100_000))
    with pytest.raises(UserError, match="are needed"):
        finetune_r1.train_run(config, run := Run(tmp_path / "run"))
    assert not run.checkpoints and run.record["status"] == "failed"


@pytest.fixture
def copied(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def spoil_json(path, **entries):
    path.write_text(json.dumps(finetune_r1.read_json(path) | entries))


SPOILT = {
    "an adapter of another base": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", base_model_name_or_path="other/base"),
        "is of another run: rank 16, of other/base",
    ),
    "an adapter of another rank": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", r=64), "rank 64"
    ),
    "a run of another version": (
        lambda run: spoil_json(run / "config.json", packing=True), "config.json is not of this version: .*'packing'"
    ),
    "a damaged run.json": (lambda run: (run / "run.json").write_text('{"status": "fin'), "run.json is damaged"),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "no adapter is in it; its status is finished"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_run_that_was_spoilt_is_refused_by_name(copied, spoilt):
    spoil, said = SPOILT[spoilt]
    spoil(copied)
    for use in (finetune_r1.save, finetune_r1.eval_):
        with pytest.raises(UserError, match=said):
            arguments = [finetune_r1.GenerationConfig()] if use is finetune_r1.eval_ else []
            use(*arguments, run=copied.folder)


def test_a_truncated_adapter_is_refused(copied):
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Exception) as caught:
        finetune_r1.Loaded.of_run(copied)
    assert "damaged" in finetune_r1.advice(caught.value)


def test_weights_in_a_pickle_are_never_unpickled(tiny_r1, tmp_path):
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'poisoned'}",)

    shutil.copytree(tiny_r1, tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors*"):
        weights.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Poison()}))
    with pytest.raises(Exception) as caught:
        finetune_r1.Loaded.for_use(TrainConfig(model=str(tmp_path / "model"), load_in_4bit=False))
    assert "safetensors" in str(caught.value) and finetune_r1.advice(caught.value)
    assert not (tmp_path / "poisoned").exists()


def test_code_that_comes_with_a_model_is_not_run(tiny_r1, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_r1, folder)
    spoil_json(
        folder / "config.json", model_type="poison", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'poisoned')!r}, 'w')")
    with pytest.raises(Exception) as caught:
        finetune_r1.Loaded.for_use(TrainConfig(model=str(folder), load_in_4bit=False))
    assert "is not run" in finetune_r1.advice(caught.value)
    assert not (tmp_path / "poisoned").exists()


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys):
    wild = "\033[2J\033]0;title\a\r\x9b5m\u202egnp.exe\033[2m\n\ttab ✓ 咳嗽 \u05d0"
    for told in (finetune_r1.say, lambda text: finetune_r1.say(f"error: {text}")):
        told(wild)
        shown = capsys.readouterr().err
        assert not [c for c in shown.replace("\033[2m", "") if (c < " " and c not in "\n\t") or c in "\x9b\u202e"]
        assert shown.endswith("\n\ttab ✓ 咳嗽 \u05d0\n") and r"\x1b[2J" in shown


def test_nothing_is_lost_by_signals_at_random_moments(tiny_r1):
    """A short form of what tests/bench/survive.py does for half an hour."""
    script = SCRIPT.parent / "tests" / "bench" / "survive.py"
    command = [sys.executable, script, "kills", "soak", "--times", "3", "--only", "infer --file", "--model", tiny_r1]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed after") == 3 and done.stdout.count("lost: 0") == 2
