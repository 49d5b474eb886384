"""A run folder: what is in it, its status and lock, damage, and `runs`."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from conftest import SCRIPT, small_config

import finetune_r1
import prompts
from finetune_r1 import Run, UserError, read_json, read_jsonl


@pytest.fixture(scope="module")
def config(tiny_r1):
    settings = {"eval_rows": 4, "max_steps": 7, "learning_rate": 2e-2, "logging_steps": 2}
    return small_config(tiny_r1, **settings, eval_steps=3, save_steps=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    finetune_r1.train_run(config, run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be damaged."""
    return Run(shutil.copytree(finished.folder, tmp_path / "run"))


def test_training_leaves_whole_files_record_metrics_and_samples(finished, config):
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {"run.json", "config.json", "metrics.jsonl", "loss.png", "samples.jsonl"}
    assert names >= {"held_out.jsonl", "trained.json", "adapter", "README.md"}
    assert not [path for path in finished.folder.rglob("*") if "partial" in path.name]
    assert not list((finished / "adapter").glob("model*")), "adapter and weights never mix"

    record = finished.record
    assert record["status"] == "finished" and finished.config == config
    rows = {"read": 24, "used": 20, "held_out": 4, "shortened": 0, "dropped": {}}
    assert rows.items() <= record["rows"].items()
    plan = record["plan"]
    assert plan["effective_batch"] == plan["micro_batch"] * plan["accumulation"] == 4
    assert record["versions"]["unsloth"] and record["seconds"]["train"] > 0
    assert record["losses"]["last"] < record["losses"]["first"] - 0.1, "it learned something"

    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(held_out)[:3] == [0, 3, 6] and held_out[6] < held_out[0]
    [pair] = read_jsonl(finished / "samples.jsonl")
    assert pair["question"] == prompts.BEFORE_AFTER["en"]
    for side in ("base", "tuned"):
        assert 0 < pair[side]["tokens"] <= 8 and pair[side]["finish_reason"] in ("stop", "length")


# ----------------------------------------------------------------------------------------- card


def damage_json(path, **entries):
    path.write_text(json.dumps(read_json(path) | entries))


MARKUP = """---
license: other
---
# Heading
- one
1. four
> quote
**bold** `code` [link](javascript:x) ![image](http://127.0.0.1/seen) \\* &lt; $$x$$
```python
{metadata} {repo} {}
~~~
<script>x</script> <!-- never closed
| a | b |
|---|---|"""


def test_card_shows_an_answer_as_text_whatever_is_in_it(run, tmp_path):
    """By a CommonMark parser with GitHub's tables and strikethrough, and the Hub's reader."""
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    [pair] = read_jsonl(run / "samples.jsonl")
    pair["base"]["answer"] = MARKUP
    pair["question"] = "Why?\n# <b>Because</b>"
    finetune_r1.write_jsonl(run / "samples.jsonl", [pair])
    (tmp_path / "rows").mkdir()
    damage_json(run / "config.json", dataset=str(tmp_path / "rows"))
    finetune_r1.write_card(run)
    text = (run / "README.md").read_text()
    card = ModelCard(text)
    assert str(tmp_path) not in text and card.data.datasets is None and card.data.language == "en"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    [sample] = [token.content for token in tokens if token.info == "text"]
    assert MARKUP.replace("```", "'''") in sample and "# <b>Because</b>" in sample
    blocks = [token.content for token in tokens if token.type == "html_block"]
    assert all("written by finetune_r1" in block for block in blocks)


# ----------------------------------------------------------------------------- checkpoints, lock


def test_checkpoints_keep_the_newest_with_all_that_resuming_takes(finished):
    assert [path.name for path in finished.checkpoints] == ["checkpoint-6", "checkpoint-7"]
    wanted = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    for path in finished.checkpoints:
        assert wanted <= {file.name for file in path.iterdir()}


@pytest.mark.parametrize("state", ["missing", "torn"])
def test_checkpoint_without_its_last_file_does_not_count(run, state):
    path = run / "checkpoints" / "checkpoint-7" / "trainer_state.json"
    text = path.read_text()
    path.unlink()
    if state != "missing":
        path.write_text(text[: len(text) // 2])
    assert [path.name for path in run.checkpoints] == ["checkpoint-6"] and run.last_step == 6


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted"), (None, "finished")],
)
def test_track_status_says_running_and_then_how_it_ended(config, tmp_path, error, status):
    run = Run(tmp_path / "run")
    with contextlib.suppress(ValueError, KeyboardInterrupt), run.track_status(config, resume=False):
        assert run.record["status"] == "running"
        if error:
            raise error
    assert run.record["status"] == status and run.record["ended"] >= run.record["started"]
    assert ("error" in run.record) == bool(error)


def test_run_dir_with_something_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with (
        pytest.raises(UserError, match="not empty"),
        Run(tmp_path).track_status(config, resume=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_lock_refuses_a_second_process_until_the_first_ends(tmp_path):
    code = (
        "import sys, finetune_r1 as f\n"
        "with f.Run(f.Path(sys.argv[1])).lock(): print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, cwd=SCRIPT.parent, stdin=pipe, stdout=pipe)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match="locked by another process"), Run(tmp_path).lock():
        pass
    holder.kill()
    holder.wait()
    with Run(tmp_path).lock():
        pass


def test_atomic_path_failing_half_way_keeps_the_old_file(tmp_path):
    finetune_r1.write_text(tmp_path / "card", "old")
    with pytest.raises(ValueError), finetune_r1.atomic_path(tmp_path / "card") as partial:
        partial.write_text("ne")
        raise ValueError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"card": "old"}


def test_lock_removes_what_a_killed_process_left(tmp_path):
    code = (
        "import os, sys, finetune_r1 as f\n"
        "with f.atomic_path(f.Path(sys.argv[1], 'merged')) as partial: partial.mkdir(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=SCRIPT.parent)
    assert len(list(tmp_path.iterdir())) == 1
    with Run(tmp_path).lock():
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# --------------------------------------------------------------------------------------- damage


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "another rank": (
        lambda run: damage_json(run / "adapter" / "adapter_config.json", r=64),
        "adapter_config.json is missing, or was changed",
    ),
    "a flipped bit": (
        lambda run: flip_bit(run / "adapter" / "adapter_model.safetensors"),
        "adapter_model.safetensors is missing, or was changed",
    ),
    "another version's settings": (
        lambda run: damage_json(run / "config.json", packing=True),
        "config.json does not fit: .*'packing'",
    ),
    "no adapter": (
        lambda run: shutil.rmtree(run / "adapter"),
        "has no adapter",
    ),
    "a torn run.json": (
        lambda run: (run / "run.json").write_text('{"status": "fin'),
        "run.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_commands_refuse_a_damaged_run_by_the_files_name(run, kind):
    damage, said = DAMAGE[kind]
    damage(run)
    with pytest.raises(UserError, match=said):
        finetune_r1.save(run=run.folder)
    with pytest.raises(UserError, match=said):
        finetune_r1.eval_(finetune_r1.EvalConfig(), run=run.folder)
    with pytest.raises(UserError, match=said):
        config = finetune_r1.SamplingConfig()
        finetune_r1.infer(config, question="Why?", run=run.folder)


# ----------------------------------------------------------------------------------------- runs


def test_runs_lists_within_80_columns_with_names_to_copy(finished, run_cli, tmp_path):
    for name in ("20260301-141205-r16-s60", "interrupted"):
        shutil.copytree(finished.folder, tmp_path / "runs" / name)
    evaluated = Run(tmp_path / "runs" / "20260301-141205-r16-s60")
    report = {"verdict": "better: held-out loss decreased", "rows": 8}
    finetune_r1.write_json(evaluated / "eval.json", report)
    interrupted = Run(tmp_path / "runs" / "interrupted")
    ended = "2026-03-01T00:00:00+0000"
    interrupted.update(status="interrupted", ended=ended, losses={"first": 3, "last": 2})
    settings = dataclasses.asdict(interrupted.config) | {"max_steps": 99}
    finetune_r1.write_json(interrupted / "config.json", settings)
    finetune_r1.write_json(tmp_path / "runs" / "failed" / "run.json", {"status": "failed"})
    done = run_cli(["runs"])
    heading, *lines = done.out.splitlines()
    assert heading.split() == ["run", "status", "model", "steps", "loss", "verdict"]
    assert max(map(len, lines)) <= 80 and done.code == 0
    shown = {line.split()[0]: line for line in lines}
    assert " 7/7 " in shown["20260301-141205-r16-s60"]
    assert "better" in shown["20260301-141205-r16-s60"]
    assert "7/99" in shown["interrupted"] and "3.00 → 2.00" in shown["interrupted"]
    listed = json.loads(run_cli(["runs", "--json"]).out)["runs"]
    assert [row["status"] for row in listed] == ["failed", "interrupted", "finished"]


def test_runs_without_any_says_how_to_make_one(run_cli):
    done = run_cli(["runs"])
    assert done.code == 1 and "`python finetune_r1.py demo`" in done.err
