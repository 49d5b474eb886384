"""Training: settings, the plan that fits a step into memory, where the loss is, and what stops it.

The model is tiny, laid out like R1 and in 4-bit, and goes through the same code that trains the 8B.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import accelerate
import pytest
from conftest import SAMPLE, add_base, small_config
from safetensors.torch import load_file

import finetune_r1
from finetune_r1 import GIB, Run, TrainConfig, UserError, read_json, read_jsonl


@pytest.fixture(scope="module")
def config(tiny_r1):
    return small_config(tiny_r1, save_steps=2)


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """An undisturbed run of these settings."""
    run = Run(tmp_path_factory.mktemp("runs") / "plain")
    finetune_r1.train_run(config, run)
    return run


def losses(run, name="loss"):
    lines = read_jsonl(run / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


# ----------------------------------------------------------------------------------------- settings


def test_train_config_defaults_are_the_recipes():
    recipe = {
        **{"model": "unsloth/DeepSeek-R1-Distill-Llama-8B", "max_seq_length": 2048},
        **{"dataset": "FreedomIntelligence/medical-o1-reasoning-SFT", "split": "train[0:500]"},
        **{"load_in_4bit": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0},
        **{"target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"},
        **{"use_rslora": False, "effective_batch": 8, "warmup_steps": 5, "max_steps": 60},
        **{"learning_rate": 2e-4, "logging_steps": 10, "optim": "adamw_8bit", "seed": 3407},
        **{"weight_decay": 0.01, "lr_scheduler_type": "linear", "max_new_tokens": 1200},
    }
    assert recipe.items() <= dataclasses.asdict(TrainConfig()).items()


@pytest.fixture
def settled(run_cli, tmp_path, monkeypatch):
    """The settings that a command line comes to."""

    def settle(line):
        found = []

        def stop(config, *_):
            found.append(config)
            raise UserError("stopped here", hint="")

        monkeypatch.setattr(finetune_r1, "train_run", stop)
        done = run_cli(["train", *line.split()])
        assert found, done.err
        return found[0]

    (tmp_path / "mine.yaml").write_text("max-steps: 7\nlearning_rate: 1e-3\n")
    (tmp_path / "lists.yaml").write_text("target_modules: [q_proj, v_proj]\n")
    own = dataclasses.replace(TrainConfig(), lora_r=4)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(own)))
    return settle


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--recipe thorough --max-steps 9 --lora-r 8",
            {"epochs": None, "max_steps": 9, "lora_r": 8, "effective_batch": 16},
        ),
        (
            "--config mine.yaml --recipe thorough --lora-alpha 5",
            {"epochs": None, "max_steps": 7, "learning_rate": 1e-3, "lora_r": 32, "lora_alpha": 5},
        ),
        ("--config lists.yaml", {"target_modules": "q_proj,v_proj"}),
        ("--config config.json", dataclasses.asdict(dataclasses.replace(TrainConfig(), lora_r=4))),
    ],
)
def test_settings_flags_win_over_the_file_and_the_file_over_the_recipe(settled, line, expected):
    assert expected.items() <= dataclasses.asdict(settled(line)).items()


@pytest.mark.parametrize(
    ("text", "said"),
    [("lora-rank: 4", "lora_rank"), ("- lora_r", "no file of settings"), ("lora_r: a", "--lora-r")],
)
def test_settings_file_with_a_mistake_is_refused_by_name(run_cli, tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    done = run_cli(["train", "--config", str(tmp_path / "mine.yaml")])
    assert done.code == 2 and said in done.err


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({"epochs": 2, "warmup_ratio": 0.05}, 12, 1),
        ({"max_steps": 3}, 3, 1),
        ({"max_steps": 40, "warmup_ratio": 0.25, "warmup_steps": 1}, 40, 10),
    ],
)
def test_training_arguments_have_steps_of_epochs_and_warmup(config, settings, steps, warmup):
    settings = {"max_steps": 60, "warmup_steps": 5, **settings}
    config, rows = finetune_r1.prepare_training(dataclasses.replace(config, **settings))
    plan = {"micro_batch": 2, "accumulation": 2, "checkpointed_layers": 0}
    arguments = finetune_r1.training_arguments(config, plan, Run(Path("none")))
    assert len(rows.used) == 24 and arguments.max_steps == steps
    assert arguments.get_warmup_steps(steps) == warmup


# ----------------------------------------------------------------------------------------- the plan

# Layers, heads, key-value heads, hidden size, intermediate size, tokens.
R1_SHAPE = (32, 32, 8, 4096, 14336, 128256)
SMOLLM2_SHAPE = (30, 9, 3, 576, 1536, 49152)


@pytest.fixture
def planned(unsloth, monkeypatch):
    """Plans for a model of this shape, of which `resident` GiB stay in memory."""
    import transformers

    def plan(shape, resident, limit, lengths, config, on_gpu=True, old=False):
        layers, heads, kv_heads, hidden, intermediate, tokens = shape
        settings = transformers.LlamaConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            hidden_size=hidden,
            intermediate_size=intermediate,
            vocab_size=tokens,
        )
        with accelerate.init_empty_weights():
            model = transformers.LlamaForCausalLM(settings)
        monkeypatch.setattr(finetune_r1.torch.cuda, "is_available", lambda: on_gpu)
        monkeypatch.setattr(finetune_r1, "memory_limit", lambda config: limit * GIB)
        monkeypatch.setattr(finetune_r1, "is_old_gpu", lambda: old)
        parameters = sum(finetune_r1.adapter_sizes(model, config).values())
        weights = resident * GIB - 10 * parameters - finetune_r1.WORKSPACE
        return finetune_r1.make_plan(model, weights, lengths, config)

    return plan


# Mean 762, as the dataset's rows.
REAL_LENGTHS = [512, 540, 600, 660, 700, 750, 777, 800, 850, 900, 950, 1101] * 40
# Micro-batch, layers kept, and GiB allocated at most: an H200, the 8B's shape, 4-bit, real rows.
MEASURED = [
    (8, 0, 7.14),
    (8, 32, 29.55),
    (4, 16, 12.53),
    (2, 32, 13.39),
    (1, 0, 6.34),
]


@pytest.mark.parametrize(("size", "kept", "measured"), MEASURED)
def test_plan_peak_on_a_gpu_is_within_15_percent_of_what_was_measured(
    planned, size, kept, measured
):
    """In so much more memory it keeps as many layers, in so much less it does not."""
    config = TrainConfig(micro_batch=size)
    more = planned(R1_SHAPE, 6.2, 1.15 * measured, REAL_LENGTHS, config)
    less = planned(R1_SHAPE, 6.2, 0.85 * measured, REAL_LENGTHS, config)
    assert more["checkpointed_layers"] <= 32 - kept
    assert more["estimated_peak_gib"] <= 1.15 * measured
    too_large = less["estimated_peak_gib"] > 0.85 * measured
    assert less["checkpointed_layers"] > 32 - kept or too_large


# Rows at once by their lengths, checkpointing, and GiB resident at most: two cores of an AMD EPYC.
ON_A_CPU = [
    ([605, 623], "none", 2.82),
    ([931], "none", 2.33),
    ([776, 786, 795, 798], "none", 5.05),
    ([776, 786, 795, 798], "unsloth", 2.67),
]


@pytest.mark.parametrize(("lengths", "checkpointing", "measured"), ON_A_CPU)
def test_plan_peak_on_a_cpu_is_within_15_percent_of_what_was_measured(
    planned, lengths, checkpointing, measured
):
    rows = len(lengths)
    config = TrainConfig(
        effective_batch=rows, micro_batch=rows, gradient_checkpointing=checkpointing
    )
    plan = planned(SMOLLM2_SHAPE, 1.03, 20, lengths, config, on_gpu=False)
    assert plan["estimated_peak_gib"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("limit", "size", "kept"),
    [
        (130, 8, {32}),
        (23.5, 8, range(18, 26)),
        (14.5, 8, range(7, 13)),
        (6.35, 1, {0}),
        (3, 1, {0}),  # nothing fits: the smallest peak
    ],
)
def test_plan_takes_the_largest_micro_batch_and_keeps_the_layers_that_fit(
    planned, limit, size, kept
):
    plan = planned(R1_SHAPE, 6.2, limit, REAL_LENGTHS, TrainConfig())
    assert plan["micro_batch"] == size and 32 - plan["checkpointed_layers"] in kept
    assert plan["micro_batch"] * plan["accumulation"] == 8
    assert plan["estimated_peak_gib"] <= max(limit, 6.4)


@pytest.mark.parametrize(
    ("settings", "micro_batch", "checkpointed"),
    [
        ({"micro_batch": 2, "gradient_checkpointing": "unsloth"}, 2, 32),
        ({"gradient_checkpointing": "none"}, 8, 0),
    ],
)
def test_plan_respects_what_the_user_set(planned, settings, micro_batch, checkpointed):
    plan = planned(R1_SHAPE, 6.2, 140, REAL_LENGTHS, TrainConfig(**settings))
    assert plan["micro_batch"] == micro_batch and plan["accumulation"] == 8 // micro_batch
    assert plan["checkpointed_layers"] == checkpointed


def test_plan_below_compute_capability_8_leaves_room(planned):
    """On an imitated T4 8.2 GiB of activations were reserved where 7.1 were planned."""
    limit = 0.92 * 14.5
    peak = planned(R1_SHAPE, 6.2, limit, REAL_LENGTHS, TrainConfig(), old=True)
    assert 6.2 + (peak["estimated_peak_gib"] - 6.2) * 8.2 / 7.1 <= 13.8


def test_make_plan_on_a_cpu_recomputes_all_layers_or_none(tiny_r1, monkeypatch):
    model = finetune_r1.load_meta_model(tiny_r1)
    config = TrainConfig(model=str(tiny_r1), micro_batch=1)

    def checkpointed(limit):
        monkeypatch.setattr(finetune_r1, "memory_limit", lambda config: limit)
        return finetune_r1.make_plan(model, 1e8, [700] * 20, config)["checkpointed_layers"]

    short, enough = 1e8, 1e11  # bytes; between them is the least that keeps all activations
    while enough - short > 1:
        middle = (short + enough) / 2
        short, enough = (short, middle) if checkpointed(middle) == 0 else (middle, enough)
    assert checkpointed(short) == model.config.num_hidden_layers == 2


# ---------------------------------------------------------------------------- what is refused early


def test_target_modules_are_checked_and_all_linear_is_every_layer_but_the_head(config, tiny_r1):
    model = finetune_r1.load_meta_model(tiny_r1)

    def names(text):
        settings = dataclasses.replace(config, target_modules=text)
        return list(finetune_r1.adapter_sizes(model, settings))

    assert set(names("all-linear")) == set(TrainConfig().target_modules.split(","))
    assert names("q_proj, v_proj") == ["q_proj", "v_proj"]
    for unknown in ("nope_proj", "embed_tokens", "lm_head"):
        with pytest.raises(UserError, match=f"no layer {unknown}"):
            names(f"q_proj,{unknown}")


def test_dry_run_without_weights_shows_rows_plan_and_disk_and_refuses_unknown_target_modules(
    run_cli, tiny_r1, tmp_path
):
    (tmp_path / "outline").mkdir()
    for path in tiny_r1.glob("*.json"):
        (tmp_path / "outline" / path.name).symlink_to(path)
    options = ["train", "--dry-run", "--model", "outline", "--dataset", SAMPLE, "--split", "train"]
    options += ["--epochs", 2, "--eval-rows", 6, "--lora-r", 8, "--effective-batch", 4, "--json"]
    done = run_cli(options)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["rows"] == "96 read, 90 to train on, 6 held out"
    plan = report["plan"]
    assert (plan["steps"], plan["micro_batch"], plan["accumulation"]) == (45, 4, 1)
    assert plan["estimated_peak_gib"] > 0 and "0 MB to download" in report["disk"]
    assert "lora_r=8" in done.err and "learning_rate" not in done.err
    assert "16-bit base" not in done.err
    settings = read_json(tiny_r1 / "config.json")
    (tmp_path / "outline" / "config.json").unlink()
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "outline" / "config.json").write_text(json.dumps(settings))
    assert "`save` and `push` will need the 16-bit base" in run_cli(options).err
    refused = run_cli([*options, "--target-modules", "q_proj,nope_proj"])
    assert refused.code == 1 and "nope_proj" in refused.err
    assert not (tmp_path / "runs").exists()


def test_disk_without_room_for_checkpoints_is_refused_before_training(
    config, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(10, 9, 100_000)
    monkeypatch.setattr(finetune_r1.shutil, "disk_usage", lambda folder: usage)
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match="needed"):
        finetune_r1.train_run(config, run)
    assert not run.checkpoints and run.record["status"] == "failed"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_best": True}, "--keep-best needs held-out rows"),
        ({"micro_batch": 3}, "--micro-batch must divide"),
        ({"hub_checkpoints": "no-owner"}, "needs OWNER/NAME"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        finetune_r1.check_config(TrainConfig(**settings))


# ---------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("loss_on", "checkpointing"), [("all", "unsloth"), ("response", "none")])
def test_training_takes_the_loss_and_recomputes_activations_where_asked(
    config, unsloth, tmp_path, monkeypatch, loss_on, checkpointing
):
    """On EOS too, and never on padding; from the batches that the Trainer computes losses of."""
    import trl

    compute_loss = trl.SFTTrainer.compute_loss
    batches = []

    def noted(trainer, model, inputs, *rest, **options):
        if model.training:
            names = ("input_ids", "labels", "attention_mask")
            batches.append([inputs[name].clone() for name in names])
        return compute_loss(trainer, model, inputs, *rest, **options)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", noted)
    config = dataclasses.replace(
        config, loss_on=loss_on, gradient_checkpointing=checkpointing, max_steps=1, micro_batch=4
    )
    loaded, _ = finetune_r1.train_run(config, Run(tmp_path / "run"))
    records = finetune_r1.read_records(config)
    known = finetune_r1.prepare_rows(records, loaded.tokenizer, config).used
    by_tokens = {tuple(row["input_ids"]): row for row in known}
    [batch] = batches
    rows = list(zip(*batch, strict=True))
    assert len(rows) == 4
    for ids, labels, mask in rows:
        row = by_tokens[tuple(ids[mask.bool()].tolist())]
        learned = (labels != -100).nonzero().flatten().tolist()
        start = 0 if loss_on == "all" else row["prompt_tokens"]
        assert learned == list(range(start, row["tokens"]))
        assert labels.tolist().count(loaded.tokenizer.eos_token_id) == 1
    trained = [name for name, weights in loaded.model.named_parameters() if weights.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    modules = loaded.model.modules()
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in modules)
    assert recomputes == (checkpointing == "unsloth")


def test_train_ends_in_labelled_lines_and_what_to_run_next(config, run_cli, tmp_path):
    shutil.copy(SAMPLE, tmp_path / "rows.jsonl")
    options = ["train", "--model", config.model, "--dataset", "rows.jsonl", "--split", "train[:9]"]
    options += ["--max-steps", 2, "--effective-batch", 2, "--logging-steps", 1, "--no-wandb"]
    options += ["--max-new-tokens", 4, "--eval-rows", 2, "--run-dir"]
    done = run_cli([*options, "run"])
    assert done.code == 0, done.err
    labels = [line.partition(":")[0] for line in done.out.splitlines() if line[0] != " "]
    names = ["run", "rows", "train loss", "time", "peak memory (GiB)", "adapter", "next"]
    assert labels == names
    commands = [line.split("finetune_r1.py")[1].split() for line in done.out.splitlines()[-3:]]
    assert commands == [[name, "--run", "run"] for name in ("infer", "eval")] + [
        ["push", "--repo", "OWNER/NAME", "--run", "run"]
    ]
    assert "step 00002/00002  loss" in done.err and "00002  eval_loss" in done.err
    run = Run(tmp_path / "run")
    assert run.config.dataset == str(tmp_path / "rows.jsonl")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = finetune_r1.read_json(run / "adapter" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == config.model


@pytest.fixture
def train_on_hub(run_cli, hub, tiny_r1, monkeypatch):
    """Trains the Hub's org/base with these options more."""
    add_base(hub, tiny_r1)
    monkeypatch.setenv("HF_TOKEN", "hf_writetoken")
    finetune_r1.export_hub_token.cache_clear()
    options = ["train", "--model", "org/base", "--dataset", SAMPLE, "--split", "train[:9]"]
    options += ["--max-steps", 2, "--effective-batch", 2, "--no-wandb", "--max-new-tokens", 4]
    options += ["--max-seq-length", 768, "--no-load-in-4bit"]
    yield lambda *more: run_cli([*options, *more])
    finetune_r1.export_hub_token.cache_clear()


def test_train_push_evaluates_and_leaves_the_model_on_the_hub(
    train_on_hub, hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("JOB_ID", "job-1")  # as in Hugging Face Jobs
    done = train_on_hub("--eval-rows", 2, "--push", "alice/model", "--run-dir", "run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pushed"] == "alice/model"
    files = hub.repos["model", "alice/model"].files
    assert {"README.md", "config.json", "adapter/adapter_model.safetensors"} <= set(files)
    assert (tmp_path / "run" / "eval.json").exists()
    record = read_json(tmp_path / "run" / "run.json")
    assert record["JOB_ID"] == "job-1" and "ACCELERATOR" not in record


@pytest.mark.parametrize("repo", ["no-owner", "alice/full"])
def test_train_push_that_would_be_refused_is_refused_before_the_training(
    train_on_hub, hub, tmp_path, repo
):
    hub.add_repo("model", "alice/full", {"model.safetensors": b"another's" * 99})
    done = train_on_hub("--push", repo)
    assert done.code == 1 and repo in done.err and "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------- what goes wrong


def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(
    config, plain, tmp_path, monkeypatch, capsys
):
    """The fault is raised where a GPU raises it, in the fourth step; a CPU has none of its own."""
    import torch
    import trl

    compute_loss = trl.SFTTrainer.compute_loss
    calls = []

    def fails_once(trainer, *arguments, **options):
        if trainer.model.training:
            calls.append(trainer.state.global_step)
            if calls == [0, 0, 1, 1, 2, 2, 3, 3]:
                raise torch.OutOfMemoryError("injected")
        return compute_loss(trainer, *arguments, **options)

    disturbed = Run(tmp_path / "disturbed")
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", fails_once)
    finetune_r1.train_run(config, disturbed)
    record = disturbed.record
    assert record["status"] == "finished"
    assert (record["plan"]["micro_batch"], record["plan"]["accumulation"]) == (1, 4)
    assert "retrying with micro-batch 1, same effective batch" in capsys.readouterr().err
    assert list(losses(disturbed)) == [1, 2, 3, 4, 5, 6]
    assert losses(disturbed) == pytest.approx(losses(plain), abs=0.005)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_loss_that_is_nan_or_zero_stops_the_run_and_keeps_the_last_checkpoint(
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
    with pytest.raises(UserError, match=rf"step 00005.* loss {value:.4f}: zero or non-finite"):
        finetune_r1.train_run(config, run)
    assert run.record["status"] == "failed" and run.last_step == 4


def test_nan_weights_are_never_a_checkpoint(config, unsloth, tmp_path, monkeypatch):
    import torch

    def breaks(optimizer, closure=None):
        for group in optimizer.param_groups:
            for weights in group["params"]:
                weights.data.fill_(float("inf"))

    config = dataclasses.replace(config, optim="adamw_torch", max_steps=1)
    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match="step 00001.* non-finite loss or weights"):
        finetune_r1.train_run(config, run)
    assert not run.checkpoints and not (run / "adapter").exists()


# ------------------------------------------------------------------------------ the best checkpoint


def test_keep_best_saves_the_weights_with_the_lowest_eval_loss_also_when_resumed(
    config, unsloth, tmp_path
):
    """Such a learning rate makes the second step a bad one."""
    settings = {"eval_rows": 3, "eval_steps": 1, "save_steps": 1, "keep_checkpoints": 1}
    settings.update(learning_rate=30.0, max_steps=2, lr_scheduler_type="constant")
    rough = dataclasses.replace(config, **settings, keep_best=True)
    run = Run(tmp_path / "run")
    finetune_r1.train_run(rough, run)
    eval_losses = losses(run, "eval_loss")
    assert min((1, 2), key=eval_losses.get) == 1
    assert [path.name for path in run.checkpoints] == ["checkpoint-1", "checkpoint-2"]
    wanted = load_file(run / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")

    def is_saved(run):
        saved = load_file(run / "adapter" / "adapter_model.safetensors")
        return all(saved[name].equal(weights) for name, weights in wanted.items())

    assert is_saved(run)
    # Killed after its last step, and moved, it still knows which step was best.
    moved = Run(Path(shutil.move(run.folder, tmp_path / "moved")))
    shutil.rmtree(moved / "adapter")
    finetune_r1.train_run(rough, moved, resume=True)
    assert is_saved(moved)
