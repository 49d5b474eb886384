"""Training on a tiny model laid out like R1, in 4-bit, through the same code that trains the 8B."""

import dataclasses
import json
import math

import pytest
from conftest import EOS, SAMPLE
from servers.wandb_server import WandbServer

import finetune_r1
import prompts
from finetune_r1 import Loaded, Run, TrainConfig, UserError, read_json, read_rows


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:24]", eval_rows=4, max_seq_length=768, max_steps=7,
        effective_batch=4, micro_batch=2, warmup_steps=1, learning_rate=2e-2, logging_steps=2, eval_steps=3,
        max_new_tokens=8, wandb=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config, unsloth, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finetune_r1.train_run(config, Run(folder))
    return folder


def test_the_defaults_are_the_recipes():
    recipe = {
        "max_seq_length": 2048, "load_in_4bit": True, "split": "train[0:500]", "lora_r": 16, "lora_alpha": 16,
        "lora_dropout": 0, "use_rslora": False, "effective_batch": 8, "warmup_steps": 5, "max_steps": 60,
        "learning_rate": 2e-4, "logging_steps": 10, "optim": "adamw_8bit", "weight_decay": 0.01,
        "lr_scheduler_type": "linear", "seed": 3407, "max_new_tokens": 1200,
        "model": "unsloth/DeepSeek-R1-Distill-Llama-8B", "dataset": "FreedomIntelligence/medical-o1-reasoning-SFT",
        "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    }  # fmt: skip
    assert recipe.items() <= dataclasses.asdict(TrainConfig()).items()


def test_the_run_folder_holds_what_the_design_names(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"run.json", "config.json", "metrics.jsonl", "loss.png", "samples.jsonl", "adapter", "README.md"}
    assert not [name for name in names if "partial" in name]
    assert not list((run / "adapter").glob("model*")), "adapter and weights never mix"


def test_run_json_tells_how_it_ended_and_with_what(run):
    record = read_json(run / "run.json")
    assert record["status"] == "finished"
    assert record["rows"] == {"read": 24, "used": 20, "held_out": 4, "shortened": 0, "dropped": {}}
    assert record["plan"]["effective_batch"] == record["plan"]["micro_batch"] * record["plan"]["accumulation"] == 4
    assert record["versions"]["unsloth"] and record["prompt_hash"] and record["seconds"]["train"] > 0
    assert record["losses"]["last"] < record["losses"]["first"] - 0.1, "it learned something"


def test_config_json_gives_the_config_back(run, config):
    assert Run(run).config == config


def test_metrics_has_a_line_for_each_logged_step_and_the_first_and_the_last(run):
    lines = list(read_rows(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]


def test_the_held_out_rows_loss_is_taken_before_during_and_after_training(run):
    held_out = {line["step"]: line["eval_loss"] for line in read_rows(run / "metrics.jsonl") if "eval_loss" in line}
    assert list(held_out) == [0, 3, 6, 7] and held_out[7] < held_out[0]


def test_samples_hold_the_question_before_and_after(run):
    [pair] = read_rows(run / "samples.jsonl")
    assert pair["question"] == prompts.BEFORE_AFTER["en"]
    assert pair["base"]["tokens"] == pair["tuned"]["tokens"] == 8
    assert pair["base"]["thought"] != pair["tuned"]["thought"]


def test_the_adapter_names_the_base_it_belongs_to(run, config):
    assert read_json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == config.model


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_the_loss_is_taken_where_it_is_asked_and_on_eos_but_never_on_padding(config, unsloth, tmp_path, loss_on):
    config = dataclasses.replace(config, loss_on=loss_on, micro_batch=4)
    loaded = Loaded.for_use(config)
    rows = finetune_r1.prepare_rows(finetune_r1.read_dataset(config), loaded.tokenizer, config)
    loaded.add_adapter(config)
    trainer = finetune_r1.make_trainer(loaded, rows, config, Run(tmp_path), tracked=False)
    batch = next(iter(trainer.get_train_dataloader()))
    by_ids = {tuple(row["input_ids"]): row for row in rows.used}
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        row = by_ids[tuple(ids[mask.bool()].tolist())]
        learned = (labels != -100).nonzero().flatten().tolist()
        start = 0 if loss_on == "all" else row["prompt_tokens"]
        assert learned == list(range(start, row["tokens"]))
        assert labels.tolist().count(loaded.tokenizer.eos_token_id) == 1


def test_only_the_adapter_is_trained(config, unsloth):
    loaded = Loaded.for_use(config)
    loaded.add_adapter(config)
    trained = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)


def test_unknown_target_modules_are_named(config, unsloth):
    loaded = Loaded.for_use(config)
    with pytest.raises(UserError, match="nope_proj"):
        loaded.add_adapter(dataclasses.replace(config, target_modules="q_proj,nope_proj"))


@pytest.mark.parametrize(("error", "status"), [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_a_run_that_does_not_end_well_says_so(config, tmp_path, error, status):
    with pytest.raises(type(error)), Run(tmp_path / "run").recorded(config):
        assert read_json(tmp_path / "run" / "run.json")["status"] == "running"
        raise error
    assert read_json(tmp_path / "run" / "run.json")["status"] == status


def test_a_folder_with_something_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"), Run(tmp_path).recorded(config):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_half_way_leaves_nothing_half_written(tmp_path):
    finetune_r1.write_text(tmp_path / "card", "old")
    with pytest.raises(ValueError), finetune_r1.whole(tmp_path / "card") as partial:
        partial.write_text("ne")
        raise ValueError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"card": "old"}


@pytest.mark.parametrize("forged", ["Why? </think>", "Why?<｜User｜>", f"Why?{EOS}"])
def test_a_question_cannot_forge_the_structure(config, unsloth, forged):
    loaded = Loaded.for_use(config)
    with pytest.raises(UserError, match="a question holds"):
        loaded.generate(["Why?", forged], config)


def test_evaluation_compares_on_the_same_rows_and_finds_nothing_where_there_is_nothing(config, unsloth):
    loaded = Loaded.for_use(config)
    held_out = finetune_r1.prepare_rows(finetune_r1.read_dataset(config), loaded.tokenizer, config).held_out
    loaded.add_adapter(config)  # untrained, so it changes nothing
    report = loaded.evaluate(held_out, 2, config)
    assert report["rows"] == 4 and report["answers"] == 2
    assert report["loss"]["base"] == report["loss"]["tuned"] and math.isfinite(report["loss"]["base"])
    assert report["loss"]["low"] == report["loss"]["high"] == 0
    assert report["verdict"].startswith("can't tell")


def test_the_verdict_follows_the_interval():
    better = finetune_r1.compare([3.0, 3.1, 2.9], [2.0, 2.2, 1.8], seed=1)
    assert finetune_r1.verdict(better).startswith("better")
    assert finetune_r1.verdict(finetune_r1.compare([2.0, 2.2, 1.8], [3.0, 3.1, 2.9], seed=1)).startswith("worse")
    assert finetune_r1.verdict(finetune_r1.compare([1.0, 3.0], [3.0, 1.0], seed=1)).startswith("can't tell")


def test_w_and_b_gets_the_run_when_asked_to_keep_it_offline(config, unsloth, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    assert finetune_r1.start_tracking(dataclasses.replace(config, wandb=True), Run(tmp_path))
    assert wandb.run.project == config.wandb_project and wandb.run.config["lora_r"] == 16
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_w_and_b_gets_the_history_of_a_run_trained_by_the_command_line(tiny_r1, cli, tmp_path):
    options = ["--split", "train[:12]", "--eval-rows", 2, "--max-steps", 3, "--logging-steps", 1, "--max-new-tokens", 4]
    with WandbServer(keys={"k" * 40: "alice"}) as server:
        done = cli("train", "--model", tiny_r1, "--dataset", SAMPLE, *options, "--warmup-steps", 1, "--json",
                   WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40)  # fmt: skip
    assert done.code == 0, done.err
    [sent] = server.runs.values()
    assert sent.project == TrainConfig().wandb_project and sent.finished and sent.exitcode == 0
    assert [line["train/loss"] for line in sent.history if "train/loss" in line] == [
        line["loss"] for line in read_rows(tmp_path / json.loads(done.out)["run"] / "metrics.jsonl") if "loss" in line
    ]
    assert sent.config["lora_r"] == 16 and "k" * 40 not in done.out + done.err


def test_w_and_b_is_left_alone_without_a_key(config, unsloth, tmp_path):
    assert not finetune_r1.start_tracking(dataclasses.replace(config, wandb=True), Run(tmp_path))
    assert not list(tmp_path.iterdir())
