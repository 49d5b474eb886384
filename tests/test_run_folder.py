"""A run folder: what lies in it, how it tells its state, and what is not taken for a run."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import SAMPLE, SCRIPT

import finetune_r1
import prompts
from finetune_r1 import Run, TrainConfig, UserError, read_json, read_jsonl


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:24]", eval_rows=4, max_seq_length=768,
        max_steps=7, effective_batch=4, micro_batch=2, warmup_steps=1, learning_rate=2e-2, logging_steps=2,
        eval_steps=3, save_steps=2, max_new_tokens=8, wandb=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    finetune_r1.train_run(config, run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be spoilt."""
    return Run(shutil.copytree(finished.folder, tmp_path / "run"))


# ------------------------------------------------------------------------------------- what a training leaves


def test_all_that_a_training_makes_lies_in_it_and_nothing_half_written(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {
        "run.json",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "samples.jsonl",
        "adapter",
        "README.md",
    }
    assert not [path for path in finished.folder.rglob("*") if "partial" in path.name]
    assert not list((finished / "adapter").glob("model*")), "adapter and weights never mix"


def test_run_json_tells_how_it_ended_and_with_what(finished):
    record = finished.record
    assert record["status"] == "finished"
    assert record["rows"] == {
        "read": 24,
        "used": 20,
        "held_out": 4,
        "shortened": 0,
        "dropped": {},
        "notes": {},
    }
    plan = record["plan"]
    assert plan["effective_batch"] == plan["micro_batch"] * plan["accumulation"] == 4
    assert (
        record["versions"]["unsloth"] and record["prompt_hash"] and record["seconds"]["train"] > 0
    )
    assert record["losses"]["last"] < record["losses"]["first"] - 0.1, "it learned something"


def test_config_json_gives_the_settings_back(finished, config):
    assert finished.config == config


def test_metrics_have_each_logged_step_once_and_the_held_out_loss_before_during_and_after(finished):
    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(held_out) == [0, 3, 6, 7] and held_out[7] < held_out[0]


def test_samples_hold_the_question_before_and_after(finished):
    [pair] = read_jsonl(finished / "samples.jsonl")
    assert pair["question"] == prompts.BEFORE_AFTER["en"]
    assert pair["base"]["tokens"] == pair["tuned"]["tokens"] == 8
    assert pair["base"]["thought"] != pair["tuned"]["thought"]


def test_the_adapter_names_the_base_it_belongs_to(finished, config):
    assert (
        read_json(finished / "adapter" / "adapter_config.json")["base_model_name_or_path"]
        == config.model
    )


def test_the_card_names_no_folder_that_the_rows_came_from(run, tmp_path):
    (tmp_path / "rows").mkdir()
    finetune_r1.write_json(
        run / "config.json", read_json(run / "config.json") | {"dataset": str(tmp_path / "rows")}
    )
    finetune_r1.write_card(run)
    card = (run / "README.md").read_text()
    assert str(tmp_path) not in card and "datasets:" not in card


MARKUP = """---
license: other
---
# Heading
=======
- one
+ two
* three
1. four
12) five
> quote
**bold** __bold__ ~~struck~~ `code` [link](javascript:x) ![image](http://127.0.0.1/seen) \\* &lt; &#35; $$x$$
```python
{metadata} {repo} {} {{ .Prompt }} \"""
~~~
<script>x</script> <img src=x> <!-- never closed
| a | b |
|---|---|
- - -"""


def inline(tokens, kind):
    """The text of each block that stands in a `kind`, and the marks in it that are markup."""
    found = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "inline" and before.type == kind:
            parts = [
                "\n" if part.type.endswith("break") else part.content for part in token.children
            ]
            found.append(("".join(parts), {part.type for part in token.children}))
    return found


def test_the_card_shows_an_answer_as_text_whatever_is_in_it(run):
    """By a CommonMark parser with GitHub's tables and strikethrough, and the Hub's reader of metadata."""
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    [pair] = read_jsonl(run / "samples.jsonl")
    pair["base"]["answer"], pair["tuned"]["answer"] = MARKUP, "\r# Why\n\n    so\u2028- it is"
    pair["question"] = "Why?\n# <b>Because</b>"
    finetune_r1.write_jsonl(run / "samples.jsonl", [pair])
    names = {
        "model": "a\n# <b> 'name' \"of\" a {model}",
        "dataset": "a\n---\n'name' \"of\": [a ``` {dataset}",
    }
    spoil_json(run / "config.json", **names)
    spoil_json(run / "adapter" / "adapter_config.json", base_model_name_or_path=names["model"])
    finetune_r1.write_card(run)
    text, _, seal = (run / "README.md").read_text().rpartition(finetune_r1.CARD_SEAL)
    card = ModelCard(text)
    assert seal and card.data.language == "en"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    kinds = [token.type for token in tokens]
    assert (
        "html_block" not in kinds
        and kinds.count("fence") == 3
        and kinds.count("blockquote_open") == 2
    )
    (title, _), *headings = inline(tokens, "heading_open")
    assert title == "a # <b> 'name' \"of\" a {model}, fine-tuned on medical chains of thought"
    assert [heading for heading, _ in headings] == [
        "Before and after",
        "Use",
        "Limits",
        *OF_NUMBERS,
    ]
    paragraphs = dict(inline(tokens, "paragraph_open"))
    assert paragraphs[MARKUP] == {"text", "hardbreak"} and paragraphs["# Why"] == {"text"}
    assert paragraphs["so\n- it is"] == {"text", "hardbreak"}
    assert "Question. Why? # <b>Because</b>" in paragraphs


OF_NUMBERS = ["Training and evaluation"]
# ------------------------------------------------------------------------------------------------ checkpoints


def test_the_newest_checkpoints_are_kept_with_all_that_going_on_takes(finished):
    assert [path.name for path in finished.checkpoints] == ["checkpoint-6", "checkpoint-7"]
    assert finished.last_step == 7 and len(list((finished / "checkpoints").glob("*/"))) == 2
    wanted = {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    for path in finished.checkpoints:
        assert wanted <= {file.name for file in path.iterdir()}


@pytest.mark.parametrize("state", ["missing", "empty", "torn"])
def test_a_checkpoint_counts_only_when_its_last_file_is_whole(run, state):
    path = run / "checkpoints" / "checkpoint-7" / "trainer_state.json"
    text = path.read_text()
    path.unlink()
    if state != "missing":
        path.write_text(text[: len(text) // 2] if state == "torn" else "")
    assert [path.name for path in run.checkpoints] == ["checkpoint-6"] and run.last_step == 6


def test_checkpoints_come_by_time_too(config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_r1, "CHECKPOINT_SECONDS", 0)
    run = Run(tmp_path / "run")
    finetune_r1.train_run(
        dataclasses.replace(config, save_steps=None, keep_checkpoints=9, max_steps=3), run
    )
    assert [path.name for path in run.checkpoints] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]


# -------------------------------------------------------------------------------------------- status and lock


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted"), (None, "stopped")],
)
def test_the_record_says_that_it_is_running_and_how_it_ended(config, tmp_path, error, status):
    run = Run(tmp_path / "run")
    with contextlib.suppress(ValueError, KeyboardInterrupt), run.track_status(config, resume=False):
        assert run.record["status"] == "running"
        if error:
            raise error
    assert run.record["status"] == status and run.record["ended"] >= run.record["started"]
    assert ("error" in run.record) == bool(error)


def test_runs_are_ordered_by_their_end_wherever_the_machine_goes(config, tmp_path, monkeypatch):
    """Westwards the local time goes back, as it does in autumn."""
    monkeypatch.chdir(tmp_path)
    for name, zone in (("first", "Asia/Tokyo"), ("second", "America/New_York")):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            with Run(finetune_r1.RUNS / name).track_status(config, resume=False):
                pass
    time.tzset()
    assert [run.folder.name for run in Run.all("stopped")] == ["first", "second"]


def test_a_folder_with_something_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with (
        pytest.raises(UserError, match="not empty"),
        Run(tmp_path).track_status(config, resume=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_in_use_is_refused_until_the_other_process_has_ended(tmp_path):
    code = "import sys, finetune_r1 as f\nwith f.Run(f.Path(sys.argv[1])).lock(): print(1, flush=True); input()"
    command = [sys.executable, "-c", code, tmp_path]
    holder = subprocess.Popen(
        command, cwd=SCRIPT.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    with pytest.raises(Exception) as caught, Run(tmp_path).lock():
        pass
    assert "another process" in str(finetune_r1.advice(caught.value))
    holder.kill()
    holder.wait()
    with Run(tmp_path).lock():
        pass


# ---------------------------------------------------------------------------------------- whole or not at all


def test_what_fails_half_way_leaves_the_old_file_and_nothing_half_written(tmp_path):
    finetune_r1.write_text(tmp_path / "card", "old")
    with pytest.raises(ValueError), finetune_r1.atomic_path(tmp_path / "card") as partial:
        partial.write_text("ne")
        raise ValueError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"card": "old"}


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".a[1].json.partial-{dead.pid}").mkdir()
    (tmp_path / f".a[1].json.partial-{os.getppid()}").touch()
    finetune_r1.write_text(tmp_path / "a[1].json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a[1].json",
        f".a[1].json.partial-{os.getppid()}",
    }


# --------------------------------------------------------------------------------------------- spoilt folders


def spoil_json(path, **entries):
    path.write_text(json.dumps(read_json(path) | entries))


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path):
    path.unlink()
    path.symlink_to(SCRIPT)


SPOILT = {
    "an adapter of another base": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", base_model_name_or_path="other/base"),
        "adapter is of another run: base_model_name_or_path is other/base",
    ),
    "an adapter of another rank": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", r=64), "another run: r is 64"
    ),
    "an absurd scale": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", lora_alpha=10**6), "lora_alpha is 10"
    ),
    "a module to import": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", megatron_config={"a": 1}),
        "megatron_config is {'a': 1}",
    ),
    "other layers": (
        lambda run: spoil_json(run / "adapter" / "adapter_config.json", target_modules=["q_proj"]),
        "adapter_config.json was changed",
    ),
    "a flipped bit": (lambda run: flip_bit(run / "adapter" / "adapter_model.safetensors"), "was changed or"),
    "a pickle in the weights' place": (
        lambda run: (run / "adapter/adapter_model.safetensors").rename(run / "adapter/adapter_model.bin"),
        "no adapter is in it",
    ),
    "a link to another file": (lambda run: link(run / "adapter" / "tokenizer.json"), "tokenizer.json was"),
    "a run of another version": (
        lambda run: spoil_json(run / "config.json", packing=True),
        "config.json is not of this version: .*'packing'",
    ),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "no adapter is in it; its status is finished"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_run_that_was_spoilt_is_refused_by_name(run, spoilt):
    spoil, said = SPOILT[spoilt]
    spoil(run)
    with pytest.raises(UserError, match=said):
        finetune_r1.save(run=run.folder)
    with pytest.raises(UserError, match=said):
        finetune_r1.eval_(finetune_r1.EvalConfig(), run=run.folder)
    with pytest.raises(UserError, match=said):
        finetune_r1.infer(
            finetune_r1.SamplingConfig(), as_json=True, question="Why?", run=run.folder
        )
    with pytest.raises(UserError, match=said):
        finetune_r1.push_run(run, "user/name")


@pytest.mark.parametrize("damaged", ["run.json", "adapter/adapter_model.safetensors"])
def test_a_truncated_file_ends_in_advice_and_no_traceback(run, damaged):
    (run / damaged).write_bytes((run / damaged).read_bytes()[:-100])
    with pytest.raises(Exception) as caught:
        finetune_r1.eval_(finetune_r1.EvalConfig(), run=run.folder)
    assert "damaged" in f"{caught.value} {finetune_r1.advice(caught.value)}"


# --------------------------------------------------------------------------------------------------- `runs`


@pytest.fixture
def several(finished, tmp_path):
    """A finished run that was evaluated, an interrupted one with a checkpoint, and a failed start."""
    for name in ("20260301-141205-r16-s60", "interrupted"):
        shutil.copytree(finished.folder, tmp_path / "runs" / name)
    evaluated, interrupted = (
        Run(tmp_path / "runs" / name) for name in ("20260301-141205-r16-s60", "interrupted")
    )
    values = {"loss": [1.0] * 8, "relevance": [1.0] * 8}
    better = {"loss": [0.5] * 8, "relevance": [1.5] * 8}
    report = prompts.build_report(values, better, [], rows=8, seed=1)
    finetune_r1.write_json(evaluated / "eval.json", report)
    interrupted.update(
        status="interrupted", ended="2026-03-01T00:00:00+0000", losses={"first": 3, "last": 2}
    )
    settings = dataclasses.asdict(interrupted.config) | {"max_steps": 99}
    finetune_r1.write_json(interrupted / "config.json", settings)
    finetune_r1.write_json(tmp_path / "runs" / "failed" / "run.json", {"status": "failed"})
    return tmp_path / "runs"


def test_runs_are_listed_within_80_columns_with_names_to_copy(several, told):
    done = told(["runs"])
    heading, *lines = done.out.splitlines()
    assert heading.split() == ["run", "status", "model", "rows", "steps", "loss", "verdict", "size"]
    assert max(map(len, lines)) <= 80 and done.code == 0
    [line] = [line for line in lines if line.startswith("20260301-141205-r16-s60 ")]
    assert "finished" in line and " 20 " in line and " 7/7 " in line and " better " in line
    assert [
        line
        for line in lines
        if line.startswith("interrupted ") and "7/99" in line and "3.00→2.00" in line
    ]
    listed = json.loads(told(["runs", "--json"]).out)["runs"]
    assert [row["status"] for row in listed] == ["failed", "interrupted", "finished"]
    assert listed[2]["started"].startswith("20")


def test_two_runs_are_compared_in_what_differs(several, told):
    lines = told(["runs", "20260301-141205-r16-s60", "interrupted"]).out.splitlines()
    differs = {line.split()[0].rstrip(","): line.split()[1:] for line in lines[1:]}
    assert lines[0].split() == ["20260301-141205-r16-s60", "interrupted"]
    assert differs["max_steps"] == ["7", "99"] and differs["status"] == ["finished", "interrupted"]
    assert (
        differs["loss"] == ["after", "0.5"]
        and "learning_rate" not in differs
        and "rows" not in differs
    )


def test_what_no_command_needs_can_go_and_an_adapter_never(several, told):
    before = {path for path in several.rglob("*") if path.is_file()}
    offered = told(["runs", "--clean"])
    assert offered.code == 1 and "`python finetune_r1.py runs --clean --yes`" in offered.err
    assert {path for path in several.rglob("*") if path.is_file()} >= before, "nobody said yes"
    assert (
        "20260301-141205-r16-s60/checkpoints (finished)" in offered.err
        and "runs/failed (failed)" in offered.err
    )
    assert "interrupted" not in offered.err
    done = json.loads(told(["runs", "--clean", "--yes", "--json"]).out)
    assert done["removed"] == 2 and done["freed"].endswith("MB")
    assert Run(several / "interrupted").last_step == 7 and not (several / "failed").exists()
    assert not (several / "20260301-141205-r16-s60" / "checkpoints").exists()
    assert len(list(several.glob("*/adapter/adapter_model.safetensors"))) == 2


def test_the_checkpoints_of_a_run_without_its_adapter_stay(several, told):
    shutil.rmtree(several / "20260301-141205-r16-s60" / "adapter")
    told(["runs", "--clean", "--yes"])
    assert Run(several / "20260301-141205-r16-s60").last_step == 7


def test_a_run_that_is_at_work_is_not_cleaned(several, told):
    with Run(several / "failed").lock():
        done = told(["runs", "--clean", "--yes", "--json"])
    assert json.loads(done.out)["removed"] == 1 and "runs/failed is at work" in done.err
    assert (several / "failed" / "run.json").exists()
    assert not (several / "20260301-141205-r16-s60" / "checkpoints").exists(), "another one is"


def test_without_runs_the_next_step_is_told(told):
    done = told(["runs"])
    assert done.code == 1 and "`python finetune_r1.py demo`" in done.err
