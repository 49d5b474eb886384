"""Log in and push, against real servers on loopback, with the unmodified clients."""

import json
import os
import stat
import subprocess
import sys

import pytest
from servers.hub import HubServer
from servers.wandb_server import WandbServer

WRITE, READ, KEY = "hf_writetoken", "hf_readtoken", "a" * 40
REPO = "alice/DeepSeek-R1-Medical-COT"


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens={WRITE: ("alice", "write"), READ: ("alice", "read")}) as server:
        yield server


@pytest.fixture(scope="module")
def wandb_server():
    with WandbServer(keys={KEY: "alice"}) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(demo, hub):
    """The demo's run, pushed once."""
    import conftest

    command = [sys.executable, conftest.SCRIPT, "push", "--repo", REPO, "--json"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    done = subprocess.run(command, cwd=demo[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_login_says_who_you_are_and_never_the_token(cli, hub, wandb_server):
    done = cli(
        "login", "--json", HF_ENDPOINT=hub.url, HF_TOKEN=WRITE, WANDB_BASE_URL=wandb_server.url, WANDB_API_KEY=KEY
    )
    assert done.code == 0, done.err
    who = json.loads(done.out)
    assert (who["hugging_face"]["name"], who["hugging_face"]["role"]) == ("alice", "write")
    assert who["wandb"]["name"] == "alice"
    assert WRITE not in done.out + done.err and KEY not in done.out + done.err


def test_login_finds_the_token_in_a_dotenv_file(cli, hub, tmp_path):
    (tmp_path / ".env").write_text(f"HF_TOKEN={READ}\n")
    done = cli("login", "--json", HF_ENDPOINT=hub.url)
    assert json.loads(done.out)["hugging_face"]["role"] == "read"


def test_login_refuses_a_bad_token_and_says_where_it_was(cli, hub):
    done = cli("login", HF_ENDPOINT=hub.url, HF_TOKEN="hf_nonsense")
    assert done.code == 1 and "HF_TOKEN" in done.err and "next:" in done.err
    assert "hf_nonsense" not in done.out + done.err and "Traceback" not in done.err


def test_login_without_token_or_terminal_says_what_to_set(cli, hub):
    done = cli("login", HF_ENDPOINT=hub.url)
    assert done.code == 1 and "set HF_TOKEN" in done.err


def test_a_token_stored_earlier_is_found_and_is_private(cli, hub, home):
    code = f"import huggingface_hub; huggingface_hub.login('{WRITE}')"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf2")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert stat.S_IMODE((home / "hf2" / "token").stat().st_mode) == 0o600
    done = cli("login", "--json", HF_ENDPOINT=hub.url, HF_HOME=str(home / "hf2"))
    assert json.loads(done.out)["hugging_face"]["token"] == "an earlier log-in"


def test_a_dry_run_shows_the_files_and_sends_nothing(demo, hub, cli):
    done = cli("push", "--repo", "alice/dry", "--dry-run", "--json", cwd=demo[0], HF_ENDPOINT=hub.url)
    report = json.loads(done.out)
    assert report["dry_run"] and report["bytes"] > 250e6 and "model.safetensors" in done.err
    assert ("model", "alice/dry") not in hub.repos


def test_push_makes_one_commit_of_merged_at_the_root_and_adapter_in_its_folder(pushed, demo, hub):
    repo = hub.repos["model", REPO]
    assert repo.private and pushed["verified"] and len(repo.commits) == 2  # the second is ours, the first made the repo
    local = {path.name for path in (demo[1] / "merged").iterdir()} | {"README.md", "loss.png"}
    local |= {f"adapter/{path.name}" for path in (demo[1] / "adapter").iterdir()}
    assert set(repo.files) == local | {".gitattributes"}


def test_what_was_pushed_loads_by_name_merged_and_adapter(pushed, hub, smollm2, home):
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{REPO}")
batch = tokenizer("Why does a raised anion gap matter?", return_tensors="pt")
with torch.no_grad():
    merged = AutoModelForCausalLM.from_pretrained("{REPO}", dtype="auto")(**batch).logits.float()
    base = AutoModelForCausalLM.from_pretrained("{smollm2}", dtype="auto")
    untuned = base(**batch).logits.float()
    tuned = PeftModel.from_pretrained(base, "{REPO}", subfolder="adapter")(**batch).logits.float()
print(float((merged - tuned).norm() / (tuned - untuned).norm()))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(home / "fresh")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25


def test_nothing_that_was_pushed_names_a_folder_of_this_machine(pushed, hub, home):
    repo = hub.repos["model", REPO]
    for name in ("README.md", "adapter/adapter_config.json", "config.json"):
        assert str(home) not in repo.files[name].decode(), name


def test_a_read_token_cannot_push_and_the_message_says_so(demo, hub, cli):
    done = cli("push", "--repo", "alice/other", cwd=demo[0], HF_ENDPOINT=hub.url, HF_TOKEN=READ)
    assert done.code == 1 and "next:" in done.err and "login" in done.err and "Traceback" not in done.err
    assert ("model", "alice/other") not in hub.repos


def test_without_a_token_nothing_is_merged_or_sent(demo, hub, cli):
    done = cli("push", "--repo", "alice/other", cwd=demo[0], HF_ENDPOINT=hub.url)
    assert done.code == 1 and "`login` first" in done.err
