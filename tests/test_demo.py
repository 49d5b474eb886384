"""The whole job, run once as a user runs it, and then asked, evaluated, saved and looked at."""

import json

import pytest
import yaml
from conftest import SCRIPT
from servers.hub import HubServer

from finetune_r1 import DEMO_MODEL, read_json, read_jsonl, write_jsonl
from prompts import BEFORE_AFTER

FILES = set(
    "README.md config.json eval.json eval.html eval.png loss.png metrics.jsonl run.json".split()
)
FOLDERS = {"adapter", "merged"}


def test_demo_prints_one_json_object_on_stdout_and_goes_through_the_job_on_stderr(demo):
    summary = json.loads(demo[2].out)
    assert summary["run"] == "runs/demo" and summary["next"].startswith(f"python {SCRIPT} infer")
    lines = demo[2].err.splitlines()
    starts = ("settings", "rows ", "plan ", "step 00001/", "evaluating on 12", "| held-out loss")
    for start in (*starts, "merging "):
        assert [line for line in lines if line.startswith(start)], f"no line starts with {start!r}"
    assert BEFORE_AFTER["en"] in demo[2].err


def test_demo_lowers_the_held_out_loss_and_closes_thoughts(demo):
    report = read_json(demo[1] / "eval.json")
    assert report["rows"] == 12 and report["verdict"].startswith("better")
    assert report["loss"]["high"] < 0 < report["relevance"]["low"]
    assert report["closed"]["tuned"] >= report["closed"]["base"]


def test_demo_leaves_files_where_the_design_says(demo):
    names = {path.name for path in demo[1].iterdir()}
    assert names >= FILES | FOLDERS and not [name for name in names if "partial" in name]
    assert read_json(demo[1] / "run.json")["status"] == "finished"
    assert not list((demo[1] / "merged").glob("adapter_*"))
    own = read_json(demo[1] / "merged" / "generation_config.json")
    assert own["do_sample"] is False, "as its base"


def test_demo_card_has_the_hubs_metadata_and_names_no_folder_of_this_machine(demo):
    text = (demo[1] / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["language"] == "en"
    assert f"# {DEMO_MODEL.partition('/')[2]}, fine-tuned on" in text
    assert "not a medical device" in text
    assert str(demo[0]) not in text and "/cache/" not in text


def test_infer_asks_the_newest_run_thought_on_stderr_answer_on_stdout(demo, run_cli):
    question = "A child has a barking cough at night. What is it?"
    done = run_cli(["infer", question, "--max-new-tokens", 160], cwd=demo[0])
    assert done.code == 0, done.err
    assert "thought closed" in done.err and done.out.strip()
    assert "<|im_end|>" not in done.out + done.err and "</think>" not in done.err


def test_infer_compare_and_file_answer_from_both_sides(demo, run_cli):
    questions = demo[0] / "questions.jsonl"
    write_jsonl(questions, [{"Question": f"What is {word}?"} for word in ("croup", "gout")])
    options = ("--compare", "--file", questions, "--output", "answers.jsonl", "--max-new-tokens", 5)
    done = run_cli(["infer", *options, "--json"], cwd=demo[0])
    assert done.code == 0 and json.loads(done.out)["answers"] == 2
    answers = read_jsonl(demo[0] / "answers.jsonl")
    assert [a["question"] for a in answers] == ["What is croup?", "What is gout?"]
    assert all(a["base"]["tokens"] == a["tuned"]["tokens"] == 5 for a in answers)
    assert not any(a["tuned"]["finish_reason"] == "stop" for a in answers)


@pytest.mark.slow
def test_eval_finds_the_same_held_out_loss_again(demo, run_cli):
    before = read_json(demo[1] / "eval.json")["loss"]  # by the model that training left in memory
    done = run_cli(["eval", "--answers", 0, "--json"], cwd=demo[0])
    assert done.code == 0, done.err
    assert json.loads(done.out)["loss"] == pytest.approx(before, abs=5e-3)


@pytest.mark.slow
def test_push_of_the_demo_over_xet_names_no_folder_of_this_machine(demo, cli, home):
    """270 MB over Xet."""
    with HubServer(tokens={"hf_writetoken": ("alice", "write")}) as hub:
        here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writetoken", "HF_HUB_DISABLE_XET": "0"}
        done = cli("push", "--repo", "alice/medical-cot", "--json", cwd=demo[0], **here)
        assert done.code == 0, done.err
        files = dict(hub.repos["model", "alice/medical-cot"].files)
    assert (
        any("/xet/" in path for _, path in hub.requests) and json.loads(done.out)["bytes"] > 250e6
    )
    assert files["model.safetensors"] == (demo[1] / "merged" / "model.safetensors").read_bytes()
    for name in ("README.md", "adapter/adapter_config.json", "config.json"):
        assert str(home) not in files[name].decode(), name
