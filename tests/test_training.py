"""Training: the plan that fits a step into memory, where the loss is taken, what stops it, and tracking.

The model is tiny, laid out like R1 and in 4-bit, and goes through the same code that trains the 8B.
"""

import dataclasses
import json
import shutil

import pytest
from conftest import SAMPLE
from servers.wandb_server import WandbServer

import finetune_r1
from finetune_r1 import GIB, LoadedModel, Memory, Run, TrainConfig, UserError, read_jsonl


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:24]", max_seq_length=768, max_steps=6,
        effective_batch=4, micro_batch=2, warmup_steps=1, learning_rate=1e-2, logging_steps=1, save_steps=2,
        max_new_tokens=4, wandb=False,
    )  # fmt: skip


def losses(run):
    return {
        line["step"]: line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line
    }


def test_the_defaults_are_the_recipes():
    recipe = {
        "max_seq_length": 2048, "load_in_4bit": True, "split": "train[0:500]", "lora_r": 16, "lora_alpha": 16,
        "lora_dropout": 0, "use_rslora": False, "effective_batch": 8, "warmup_steps": 5, "max_steps": 60,
        "learning_rate": 2e-4, "logging_steps": 10, "optim": "adamw_8bit", "weight_decay": 0.01,
        "lr_scheduler_type": "linear", "seed": 3407, "max_new_tokens": 1200,
        "model": "unsloth/DeepSeek-R1-Distill-Llama-8B",
        "dataset": "FreedomIntelligence/medical-o1-reasoning-SFT",
        "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    }  # fmt: skip
    assert recipe.items() <= dataclasses.asdict(TrainConfig()).items()


# ------------------------------------------------------------------------------------- recipes and settings


@pytest.fixture
def settled(told, tmp_path, monkeypatch):
    """The settings that a command line comes to; beside it lie two files of settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("max-steps: 7\nlearning_rate: 1e-3\n")
    run_of_an_hour = dataclasses.replace(TrainConfig(), lora_r=4, max_time=3600.0)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(run_of_an_hour)))
    found = []

    def settle(line):
        monkeypatch.setattr(finetune_r1, "train_run", lambda config, *_: found.append(config))
        monkeypatch.setattr(Run, "record", {})
        assert told(["train", *line.split()]).code == 0
        return found[-1]

    return settle


def test_the_thorough_recipe_is_one_word_and_flags_outdo_it(settled):
    thorough = settled("--recipe thorough")
    assert (thorough.split, thorough.epochs, thorough.lora_r) == ("train", 1.0, 32)
    assert thorough.keep_best and thorough.loss_on == "response" and thorough.learning_rate == 2e-4
    mine = settled("--recipe thorough --max-steps 9 --lora-r 8")
    assert (mine.epochs, mine.max_steps, mine.lora_r, mine.effective_batch) == (None, 9, 8, 16)


def test_a_file_of_settings_outdoes_the_recipe_and_flags_outdo_the_file(settled):
    for line in ("--recipe thorough --config mine.yaml", "--config mine.yaml --recipe thorough"):
        mine = settled(f"{line} --learning-rate 5e-4")
        assert (mine.epochs, mine.max_steps, mine.learning_rate, mine.lora_r) == (None, 7, 5e-4, 32)


def test_a_files_warmup_stays_as_it_is_where_the_recipes_gives_way_to_a_few_steps(
    settled, tmp_path
):
    assert settled("--max-steps 6").warmup_steps == 3
    (tmp_path / "long.yaml").write_text("warmup_steps: 50")
    assert settled("--config long.yaml").warmup_steps == 50


def test_a_runs_own_settings_are_such_a_file(settled):
    assert settled("--config config.json") == dataclasses.replace(
        TrainConfig(), lora_r=4, max_time=3600.0
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora-rank: 4", "lora_rank"),
        ("- lora_r", "no file of settings"),
        ("lora_r: many", "--lora-r"),
    ],
)
def test_what_is_no_setting_is_named(told, tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    done = told(["train", "--config", str(tmp_path / "mine.yaml")])
    assert done.code == 2 and said in done.err


def test_warmup_can_be_a_share_of_the_steps():
    config = TrainConfig(epochs=2, effective_batch=10, warmup_ratio=0.05)
    assert finetune_r1.with_steps(config, rows=1000).warmup_steps == 10


# --------------------------------------------------------------------------------------------------- the plan

R1 = Memory(
    limit=140 * GIB, resident=6.2 * GIB, layers=32, token_in_layer=2 * (3 * 14336 + 3.3 * 4096)
)
REAL_LENGTHS = [
    512,
    540,
    600,
    660,
    700,
    750,
    777,
    800,
    850,
    900,
    950,
    1101,
]  # mean 762, as the dataset's rows
# Rows at once, layers kept, and GiB allocated at most: an H200, the 8B's shape, 4-bit, rows of the dataset.
MEASURED = [
    (8, 0, 7.14),
    (8, 16, 18.07),
    (8, 32, 29.55),
    (4, 16, 12.53),
    (4, 32, 18.74),
    (2, 32, 13.39),
    (1, 0, 6.34),
]


@pytest.mark.parametrize(("size", "kept", "measured"), MEASURED)
def test_the_peak_that_a_plan_expects_is_within_15_percent_of_what_was_measured(
    size, kept, measured
):
    """In so much more memory it keeps as many layers or more, in so much less it does not keep as many."""

    def plan(limit):
        config = TrainConfig(micro_batch=size, max_steps=6)
        return finetune_r1.make_plan(REAL_LENGTHS, config, R1._replace(limit=limit * GIB))

    more, less = plan(1.15 * measured), plan(0.85 * measured)
    assert more["kept_layers"] >= kept and more["expected_peak_gib"] <= 1.15 * measured
    assert less["kept_layers"] < kept or less["expected_peak_gib"] > 0.85 * measured


SMOLLM2 = Memory(
    20 * GIB, 1.03 * GIB, 30, 4 * (3 * 1536 + 3.3 * 576), some=False, token_in_loss=12 * 49152
)
# Rows at once by their lengths, layers kept or not, and GiB resident at most: two cores of an AMD EPYC.
ON_A_CPU = [
    ([605, 623], "none", 2.82), ([966, 1021], "none", 3.72), ([931], "none", 2.33),
    ([776, 786, 795, 798], "none", 5.05), ([776, 786, 795, 798], "unsloth", 2.67),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "checkpointing", "measured"), ON_A_CPU)
def test_and_so_it_is_on_a_cpu(lengths, checkpointing, measured):
    rows = len(lengths)
    config = TrainConfig(
        effective_batch=rows, micro_batch=rows, gradient_checkpointing=checkpointing
    )
    plan = finetune_r1.make_plan(lengths, config, SMOLLM2)
    assert plan["expected_peak_gib"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("limit", "size", "kept"),
    [
        (130, 8, {32}),
        (23.5, 8, range(18, 26)),
        (14.5, 8, range(7, 13)),
        (7.5, 8, {0}),
        (6.35, 1, {0}),
    ],
)
def test_the_plan_takes_all_rows_at_once_and_keeps_what_memory_allows(limit, size, kept):
    plan = finetune_r1.make_plan(REAL_LENGTHS, TrainConfig(), R1._replace(limit=limit * GIB))
    assert plan["micro_batch"] == size and plan["kept_layers"] in kept
    assert plan["micro_batch"] * plan["accumulation"] == 8
    assert plan["expected_peak_gib"] <= round(limit, 1)


def test_what_the_user_names_is_not_planned_anew():
    config = TrainConfig(micro_batch=2, gradient_checkpointing="unsloth")
    plan = finetune_r1.make_plan(REAL_LENGTHS, config, R1)
    assert (plan["micro_batch"], plan["accumulation"], plan["kept_layers"]) == (2, 4, 0)
    assert (
        finetune_r1.make_plan(REAL_LENGTHS, TrainConfig(gradient_checkpointing="none"), R1)[
            "kept_layers"
        ]
        == 32
    )


def test_an_old_gpu_keeps_keys_and_values_of_all_heads_too(config, monkeypatch):
    loaded = LoadedModel.load(config)
    new = finetune_r1.measure_memory(loaded.model, GIB, config)
    monkeypatch.setattr(finetune_r1, "is_old_gpu", lambda: True)
    old, shape = finetune_r1.measure_memory(loaded.model, GIB, config), loaded.model.config
    more = 2 * (shape.num_attention_heads - shape.num_key_value_heads) * shape.head_dim
    assert old.token_in_layer - new.token_in_layer == pytest.approx(4 * more)


def test_too_little_room_for_checkpoints_is_said_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        finetune_r1.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 100_000)
    )
    with pytest.raises(UserError, match="are needed"):
        finetune_r1.train_run(config, run := Run(tmp_path / "run"))
    assert not run.checkpoints and run.record["status"] == "failed"


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        (["--max-steps", 60], 5),
        (["--max-steps", 3], 1),
        (["--max-steps", 1], 0),
        (["--max-steps", 3, "--warmup-steps", 3], 3),
        (
            ["--max-steps", 3, "--warmup-steps", 5],
            "error: --warmup-steps 5 is more than --max-steps 3",
        ),
    ],
)
def test_warmup_is_at_most_half_of_the_steps_unless_it_was_given(
    told, monkeypatch, options, warmup
):
    def train_run(config, *_):
        finetune_r1.check_config(config)
        raise UserError(config.warmup_steps, "")

    monkeypatch.setattr(finetune_r1, "train_run", train_run)
    assert (warmup if isinstance(warmup, str) else f"error: {warmup}\n") in told(
        ["train", *options]
    ).err


# -------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("loss_on", "checkpointing"), [("all", "unsloth"), ("response", "none")])
def test_loss_is_taken_where_it_is_asked_and_activations_are_recomputed_where_they_are_asked(
    config, unsloth, tmp_path, monkeypatch, loss_on, checkpointing
):
    """On EOS too, and never on padding; from the batches that the Trainer computes losses of."""
    import trl

    compute_loss, batches = trl.SFTTrainer.compute_loss, []

    def noted(trainer, model, inputs, *rest, **options):
        if model.training:
            batches.append(
                {name: inputs[name].clone() for name in ("input_ids", "labels", "attention_mask")}
            )
        return compute_loss(trainer, model, inputs, *rest, **options)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", noted)
    config = dataclasses.replace(
        config, loss_on=loss_on, gradient_checkpointing=checkpointing, max_steps=1, micro_batch=4
    )
    loaded, _ = finetune_r1.train_run(config, Run(tmp_path / "run"))
    known = finetune_r1.prepare_rows(
        finetune_r1.read_records(config), loaded.tokenizer, config
    ).used
    by_tokens = {tuple(row["input_ids"]): row for row in known}
    [batch] = batches
    assert len(batch["labels"]) == 4
    for ids, labels, mask in zip(
        *(batch[name] for name in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        row = by_tokens[tuple(ids[mask.bool()].tolist())]
        learned = (labels != -100).nonzero().flatten().tolist()
        assert learned == list(
            range(0 if loss_on == "all" else row["prompt_tokens"], row["tokens"])
        )
        assert labels.tolist().count(loaded.tokenizer.eos_token_id) == 1
    trained = [name for name, weights in loaded.model.named_parameters() if weights.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained), (
        "the adapter alone"
    )
    recomputes = any(
        getattr(module, "gradient_checkpointing", False) for module in loaded.model.modules()
    )
    assert recomputes == (checkpointing == "unsloth")


def test_unknown_target_modules_are_named(config, tmp_path):
    with pytest.raises(UserError, match="nope_proj"):
        finetune_r1.train_run(
            dataclasses.replace(config, target_modules="q_proj,nope_proj"), Run(tmp_path / "run")
        )


# -------------------------------------------------------------------------------------------- what goes wrong


def test_out_of_memory_halves_the_rows_at_once_and_changes_no_loss(
    config, unsloth, tmp_path, monkeypatch, capsys
):
    """The fault is raised where a GPU raises it, in the fourth step; a CPU has none of its own."""
    import torch
    import trl

    calls, compute_loss = [], trl.SFTTrainer.compute_loss

    def fails_once(trainer, *arguments, **options):
        if trainer.model.training:
            calls.append(trainer.state.global_step)
            if calls == [0, 0, 1, 1, 2, 2, 3, 3]:
                raise torch.OutOfMemoryError("injected")
        return compute_loss(trainer, *arguments, **options)

    plain, disturbed = Run(tmp_path / "plain"), Run(tmp_path / "disturbed")
    finetune_r1.train_run(config, plain)
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", fails_once)
    finetune_r1.train_run(config, disturbed)
    record = disturbed.record
    assert record["status"] == "finished" and record["out_of_memory_at"] == 3
    assert (record["plan"]["micro_batch"], record["plan"]["accumulation"]) == (1, 4)
    assert (
        "out of memory after step 3: continuing with 1 rows per forward pass"
        in capsys.readouterr().err
    )
    steps = [line["step"] for line in read_jsonl(disturbed / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses(disturbed) == pytest.approx(losses(plain), abs=0.005)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_loss_that_is_no_number_or_nothing_stops_the_run_and_names_step_and_rows(
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
    assert run.record["status"] == "failed" and run.last_step == 4, "the last checkpoint is kept"


def test_weights_that_are_no_numbers_are_never_a_checkpoint(config, unsloth, tmp_path, monkeypatch):
    import torch

    def breaks(optimizer, closure=None):
        for group in optimizer.param_groups:
            for weights in group["params"]:
                weights.data.fill_(float("inf"))

    run, config = (
        Run(tmp_path / "run"),
        dataclasses.replace(config, optim="adamw_torch", max_steps=1),
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    with pytest.raises(UserError, match="step 1 left NaN weights"):
        finetune_r1.train_run(config, run)
    assert not run.checkpoints and not (run / "adapter").exists()


# --------------------------------------------------------------------------------------------------- tracking


def test_w_and_b_gets_the_run_when_asked_to_keep_it_offline(config, tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # an earlier test's settings, which were read from its environment
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, run = dataclasses.replace(config, wandb=True), Run(tmp_path)
    with run.track_status(config, resume=False), finetune_r1.track_in_wandb(config, run) as tracked:
        assert (
            tracked
            and wandb.run.project == config.wandb_project
            and wandb.run.config["lora_r"] == 16
        )
        assert wandb.run.id == run.record["wandb_id"], (
            "so that a run that goes on is one run there too"
        )
    assert wandb.run is None and list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_w_and_b_gets_the_history_of_a_run_trained_by_the_command_line(tiny_r1, cli, tmp_path):
    options = ["--dataset", SAMPLE, "--split", "train[:12]", "--eval-rows", 2, "--max-steps", 3,
               "--logging-steps", 1, "--max-new-tokens", 4, "--json"]  # fmt: skip
    account = {"WANDB_API_KEY": "k" * 40}
    with WandbServer(keys={"k" * 40: "alice"}) as server:
        done = cli("train", "--model", tiny_r1, *options, WANDB_BASE_URL=server.url, **account)
    assert done.code == 0, done.err
    [sent] = server.runs.values()
    assert sent.project == TrainConfig().wandb_project and sent.finished and sent.exitcode == 0
    history = {
        line["train/global_step"]: line["train/loss"]
        for line in sent.history
        if "train/loss" in line
    }
    assert history == losses(Run(tmp_path / json.loads(done.out)["run"])) and list(history) == [
        1,
        2,
        3,
    ]
    assert sent.config["lora_r"] == 16 and sent.config["warmup_steps"] == 1, (
        "half of the steps, not 5"
    )
    assert "k" * 40 not in done.out + done.err
    report = json.loads(done.out)
    what_next = [line.split()[2:5] for line in report["next"]]
    assert what_next == [[name, "--run", report["run"]] for name in ("infer", "eval", "push")]


def test_w_and_b_is_left_alone_without_a_key(config, tmp_path):
    with finetune_r1.track_in_wandb(
        dataclasses.replace(config, wandb=True), Run(tmp_path)
    ) as tracked:
        assert not tracked
    assert not list(tmp_path.iterdir())


def test_steps_that_fp16_skipped_are_counted(config, tmp_path, monkeypatch, capsys):
    """Only a GPU trains in fp16; what the Trainer then asks of Accelerate is asked here too."""
    from accelerate.optimizer import AcceleratedOptimizer

    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda optimizer: True))
    finetune_r1.train_run(dataclasses.replace(config, max_steps=2), Run(tmp_path / "run"))
    assert "2 of the steps changed nothing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- the best is kept


def test_the_weights_with_the_lowest_held_out_loss_are_kept_also_when_resumed(
    config, unsloth, tmp_path
):
    """Such a learning rate makes the second step a bad one."""
    from safetensors.torch import load_file

    rough = dataclasses.replace(
        config, eval_rows=3, eval_steps=1, save_steps=1, keep_checkpoints=9, keep_best=True,
        learning_rate=30.0, max_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    finetune_r1.train_run(rough, Run(tmp_path / "run"))
    held_out = {}
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        if "eval_loss" in line and line["step"]:
            held_out[line["step"]] = line["eval_loss"]
    best = min(held_out, key=held_out.get)
    assert best == 1

    def kept(run):
        return load_file(run / "adapter" / "adapter_model.safetensors")

    checkpoints = tmp_path / "run" / "checkpoints"
    wanted = load_file(checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    found = kept(tmp_path / "run")
    assert all(found[name].equal(weight) for name, weight in wanted.items())

    # Killed after its last step, it still knows which step was best.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    finetune_r1.train_run(rough, Run(tmp_path / "again"), resume=True)
    found = kept(tmp_path / "again")
    assert all(found[name].equal(weight) for name, weight in wanted.items())


def test_the_best_checkpoint_outlives_newer_ones(config, tmp_path):
    rough = dataclasses.replace(
        config, eval_rows=3, eval_steps=1, save_steps=1, keep_checkpoints=1, keep_best=True,
        learning_rate=30.0, max_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    finetune_r1.train_run(rough, Run(tmp_path / "run"))
    assert Run(tmp_path / "run").best_checkpoint != Run(tmp_path / "run").checkpoints[-1]


def test_without_held_out_rows_there_is_no_best(config, tmp_path):
    with pytest.raises(UserError, match="--keep-best compares held-out losses"):
        finetune_r1.train_run(dataclasses.replace(config, keep_best=True), Run(tmp_path / "run"))
