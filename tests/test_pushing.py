"""Push, against a real Hub server on loopback with the unmodified client, by LFS and by Xet."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import Done, add_base, name_base
from servers.base import Fault

import finetune_r1
import prompts
from finetune_r1 import Run, UserError

WRITE, READ = "hf_writetoken", "hf_readtoken"
REPO = "alice/DeepSeek-R1-Medical-COT"
WAYS = ["lfs", "xet"]
API = f"/api/models/{REPO}"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished run with its merged weights, of a base that is on the Hub as org/base."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("pushed") / "run")
    finetune_r1.save(run=folder)
    name_base(folder, "org/base")
    adapter = {path.name: finetune_r1.file_hash(path) for path in (folder / "adapter").iterdir()}
    Run(folder).update(adapter=adapter)
    return folder


@pytest.fixture
def push(hub, run, monkeypatch, capfd):
    """The command as a user gives it, but in this process, whose client has read its environment."""
    from huggingface_hub import constants

    monkeypatch.setattr(finetune_r1, "READ_AGAIN_SECONDS", 0)

    def command(*arguments, way: str = "lfs", token: str | None = WRITE) -> Done:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        finetune_r1.export_hub_token.cache_clear()
        with pytest.raises(SystemExit) as end:
            finetune_r1.app(["push", "--repo", REPO, "--run", str(run), "--json", *arguments])
        done = Done(end.value.code or 0, *capfd.readouterr())
        assert "Traceback" not in done.err
        return done

    return command


def files(hub):
    """What the repository holds, None if there is none."""
    repo = hub.repos.get(("model", REPO))
    return dict(repo.files) if repo else None


def whole(run):
    """Every file that a push brings, and the one that the Hub makes."""
    names = {path.relative_to(run / "merged").as_posix() for path in (run / "merged").rglob("*")}
    return names - {"adapter"} | {".gitattributes"}


def evaluated(path, measure):
    """Writes what an evaluation would have left."""
    values = {measure: [0.5] * 12, "relevance": [0.5] * 12, "unread": [0.0] * 12}
    finetune_r1.write_json(
        path, prompts.build_report({"base": values, "tuned": values}, [], 12, seed=1)
    )


# ------------------------------------------------------------------------------- what is pushed


@pytest.mark.parametrize("way", WAYS)
def test_push_brings_the_merged_folder_in_one_commit(push, hub, run, way):
    report = json.loads(push(way=way).out)
    repo = hub.repos["model", REPO]
    assert set(repo.files) == whole(run) and report["verified"] == "all hashes"
    assert repo.private and len(repo.commits) == 2, "the first commit made the repository"
    for name in whole(run) - {".gitattributes", "README.md", "adapter/adapter_config.json"}:
        assert repo.files[name] == (run / "merged" / name).read_bytes(), name
    assert any("/xet/" in path for _, path in hub.requests) == (way == "xet")


def test_push_again_makes_no_commit_and_after_an_evaluation_sends_the_card_alone(push, hub, run):
    push()
    repo = hub.repos["model", REPO]
    hub.requests.clear()
    assert "all hashes" in push().out and len(repo.commits) == 2
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]
    evaluated(run / "eval.json", "loss")
    push()
    (run / "eval.json").unlink()
    before, after = (commit.tree for commit in repo.commits[1:])
    assert [name for name in after if after[name] != before.get(name)] == ["README.md"]
    assert b"On 12 held-out rows" in repo.files["README.md"]


def test_adapter_alone_loads_by_the_repositorys_name(push, hub, run):
    push("--adapter-only")
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", ".gitattributes"}
    assert set(files(hub)) == names
    _, front, text = files(hub)["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["library_name"], card["base_model"]) == ("peft", "org/base")
    serve = "vllm serve org/base --max-model-len 768 --reasoning-parser deepseek_r1"
    assert f"{serve} --enable-lora --lora-modules tuned={REPO}\n" in text
    assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    done = push()
    assert done.code == 1 and "adapter_config.json" in done.err, "or LoRA would be applied twice"
    assert push("--force").code == 0 and set(files(hub)) == whole(run)


@pytest.mark.slow
def test_what_was_pushed_loads_by_name_with_equal_logits(push, hub, run, tiny_r1, tmp_path):
    add_base(hub, tiny_r1)
    push(way="xet")
    chat = files(hub)["README.md"].decode().split("```python\n")[1].split("```")[0]
    code = f"""{chat}
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model):
    with torch.no_grad():
        return model(**batch).logits.float()

batch = AutoTokenizer.from_pretrained("{REPO}")("Why is it raised?", return_tensors="pt")
found = AutoModelForCausalLM.from_pretrained("{REPO}", dtype="auto")
merged = AutoModelForCausalLM.from_pretrained("{run}/merged", dtype="auto")
assert torch.equal(logits(found), logits(merged))
base = AutoModelForCausalLM.from_pretrained("{tiny_r1}", dtype="auto")
before = logits(base)
tuned = logits(PeftModel.from_pretrained(base, "{REPO}", subfolder="adapter"))
off = (logits(chat.model) - tuned).norm()
assert off < 0.1 * (before - tuned).norm(), "rounding alone"
"""
    here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **here, "HF_HUB_DISABLE_XET": "0"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_card_has_metadata_and_all_that_a_reader_asks(push, hub, run):
    push()
    _, front, text = files(hub)["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["pipeline_tag"] == "text-generation" and card["library_name"] == "transformers"
    assert card["base_model"] == "org/base" and {"medical", "finetune_r1"} <= set(card["tags"])
    serve = f"vllm serve {REPO} --max-model-len 768 --reasoning-parser deepseek_r1\n```"
    use = f'pipeline("text-generation", "{REPO}"'
    for part in (serve, use, "`adapter/`", "## Limits", "![training loss](loss.png)"):
        assert part in text, part


def test_what_nobody_asked_for_stays_here(push, hub, run, tmp_path):
    """A Modelfile, and what a link in a stranger's run leads to."""
    expected = whole(run)
    (tmp_path / "id_rsa").write_text("private")
    added = [run / "merged" / "Modelfile", run / "adapter" / "id_rsa"]
    for path in added:
        path.symlink_to(tmp_path / "id_rsa")
    try:
        assert push().code == 0 and set(files(hub)) == expected
    finally:
        for path in added:
            path.unlink()


@pytest.fixture
def ggufs(run):
    """What `save` would have left in the run; to `push` it is a file."""
    folder = run / "gguf"
    folder.mkdir()
    (folder / "run-q8_0.gguf").write_bytes(b"GGUF")
    yield folder
    shutil.rmtree(folder)


def test_gguf_comes_with_what_ollama_reads_from_the_hub_and_then_stays(push, hub, run, ggufs):
    push()
    assert not any(name.endswith(".gguf") for name in files(hub))
    assert json.loads(push("--gguf").out)["files"] <= 20, "above, hf splits a failing commit"
    ollama = {"run-q8_0.gguf", "Modelfile", "template", "params"}
    assert set(files(hub)) == whole(run) | ollama
    assert files(hub)["Modelfile"].startswith(b"FROM ./run-q8_0.gguf\n")
    assert json.loads(files(hub)["params"])["num_ctx"] == 768
    assert f"\nollama run hf.co/{REPO}\n" in files(hub)["README.md"].decode()
    assert push().code == 0, "it is not taken for somebody else's"
    assert set(files(hub)) == whole(run) | ollama


# --------------------------------------------------------------------------------- a dry run


def test_dry_run_without_a_token_shows_the_files_sends_nothing_and_writes_nothing(push, hub, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = push("--dry-run", token=None)
    report = json.loads(done.out)
    assert report["dry_run"] and report["files"] == len(whole(run)) - 1
    assert "model-00001-of-00004.safetensors" in done.err and "adapter/adapter_config" in done.err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = push(token=None)
    assert done.code == 1 and "login`" in done.err
    assert not any(REPO in path for _, path in hub.requests)


# ----------------------------------------------------------------------- what is refused before


def test_read_token_fails_before_anything_is_merged(push, hub, run, tmp_path, tiny_r1):
    copy = Run(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged")))
    copy.update(saved={})
    for repository_exists in (False, True):
        if repository_exists:
            hub.add_repo("model", REPO, {"notes.md": b"mine"})
        done = push("--run", str(copy), "--model", str(tiny_r1), token=READ)
        assert done.code == 1 and "use a token that may write" in done.err
        assert not (copy / "merged").exists()
    assert set(files(hub)) == {"notes.md"}


OTHERS = {
    "a shard of the same name": {"model-00001-of-00004.safetensors": b"other"},
    "the recipe's adapter at the root": {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"adapter",
    },
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_foreign_weights_are_replaced_only_by_force_and_then_all(push, hub, run, others):
    hub.add_repo("model", REPO, {"notes[1].md": b"mine", **others})
    before = files(hub)
    done = push()
    assert done.code == 1 and "--force" in done.err and list(others)[-1] in done.err
    assert files(hub) == before
    push("--force")
    assert set(files(hub)) == whole(run) - {".gitattributes"} | {"notes[1].md"}
    assert len(hub.repos["model", REPO].commits) == 2


def test_readme_that_is_edited_or_not_ours_stays_unless_forced(push, hub, run, tiny_r1):
    add_base(hub, tiny_r1)
    push()
    edited = files(hub)["README.md"].replace(b"license: llama3.1", b"license: cc-by-4.0")
    for theirs in (edited, b"---\nlicense: cc-by-4.0\n---\n# Mine\n"):
        repo = hub.add_repo("model", REPO, {**files(hub), "README.md": theirs})
        done = push()
        assert done.code == 0 and "not ours, or was edited" in done.err
        assert b"cc-by-4.0" in repo.files["README.md"] == theirs and set(repo.files) == whole(run)
    push("--force")
    assert b"license: llama3.1" in repo.files["README.md"]


def test_visibility_that_the_repository_lacks_is_refused(push, hub):
    hub.add_repo("model", REPO, {"notes.md": b"mine"})
    done = push("--private")
    assert done.code == 1 and "another visibility" in done.err and set(files(hub)) == {"notes.md"}
    del hub.repos["model", REPO]
    assert json.loads(push("--public").out)["visibility"] == "public"
    assert not hub.repos["model", REPO].private


def test_push_to_no_name_or_of_an_unknown_base_is_refused(hub):
    cases = [
        ("nonsense", "org/base", None, "nonsense is not OWNER/NAME"),
        (REPO, "/kaggle/input/8b/2", None, "has no name on the Hub"),
        (REPO, "/kaggle/input/8b/2", "8b", "8b is not OWNER/NAME"),
    ]
    for repo, model, base, said in cases:
        with pytest.raises(UserError, match=said):
            finetune_r1.check_push(repo, model, finetune_r1.PushConfig(base_model=base))
    assert not hub.requests


# ----------------------------------------------------------------------------- bases and disks


def test_base_in_a_folder_is_published_under_the_name_that_is_given(
    push, hub, run, tmp_path, tiny_r1
):
    """Not under what the folder's own card calls its base, which is its parent."""
    copy = shutil.copytree(run, tmp_path / "run")
    name_base(copy, str(tiny_r1))
    done = push("--run", str(copy))
    assert done.code == 1 and "--base-model OWNER/NAME" in done.err and not hub.repos
    push("--run", str(copy), "--base-model", "org/base")
    card = yaml.safe_load(files(hub)["README.md"].decode().split("---\n")[1])
    assert card["base_model"] == "org/base" and card["license"] == "llama3.1"
    settings = json.loads(files(hub)["adapter/adapter_config.json"])
    assert settings["base_model_name_or_path"] == "org/base"
    everything = b"".join(files(hub).values())
    assert str(tiny_r1).encode() not in everything and b"meta-llama" not in everything


def test_disk_without_room_merges_under_the_temporary_folder(
    push, hub, run, tmp_path, tiny_r1, monkeypatch
):
    """As on Kaggle; and the next push knows its weights, though they are gone."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    copy = Run(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged")))
    copy.update(saved={})
    free = shutil.disk_usage

    def usage(path):
        return free(path)._replace(free=1000) if copy.folder == path else free(path)

    monkeypatch.setattr(finetune_r1.shutil, "disk_usage", usage)
    monkeypatch.setattr(finetune_r1.tempfile, "tempdir", str(scratch))
    for _ in range(2):
        done = push("--run", str(copy), "--model", str(tiny_r1))
        assert done.code == 0 and f"merging in {scratch}" in done.err, done.err
        assert set(files(hub)) == whole(run) and len(hub.repos["model", REPO].commits) == 2
        assert not (copy / "merged").exists() and not list(scratch.iterdir())


# ------------------------------------------------------------------------------------- faults

COMMIT, OBJECTS, SHARDS = "/commit/", r"\.git/info/lfs/objects/", "/shards"
FAULTS = {
    "before the commit, by LFS": ("lfs", Fault("PUT", OBJECTS, 403, times=math.inf), False),
    "at the commit, by LFS": ("lfs", Fault("POST", COMMIT, 503, times=math.inf), False),
    "after the commit, by LFS": ("lfs", Fault("POST", COMMIT, "drop", after=3), True),
    "before the commit, by Xet": ("xet", Fault("POST", SHARDS, 403, times=math.inf), False),
    "at the commit, by Xet": ("xet", Fault("POST", COMMIT, 403, times=math.inf), False),
    "after the commit, by Xet": ("xet", Fault("POST", COMMIT, "drop", after=3), True),
}


@pytest.mark.parametrize(("way", "fault", "lands"), FAULTS.values(), ids=FAULTS)
def test_fault_leaves_a_whole_repository_or_none_and_says_which(push, hub, run, way, fault, lands):
    hub.faults.append(Fault(**vars(fault)))
    done = push(way=way)
    commits = hub.repos["model", REPO].commits
    if lands:
        assert done.code == 0 and set(files(hub)) == whole(run) and len(commits) == 2
        return
    assert done.code == 1 and "upload failed, nothing committed" in done.err
    assert set(files(hub)) == {".gitattributes"}
    hub.faults.clear()
    assert push(way=way).code == 0 and set(files(hub)) == whole(run) and len(commits) == 2


def test_somebody_elses_commit_of_this_minute_is_not_undone(push, hub, run, monkeypatch):
    repo = hub.add_repo("model", REPO, {"notes.md": b"old"})
    upload = finetune_r1.upload

    def commit_meanwhile(*arguments):
        new = hub.add_repo("model", "alice/other", {"notes.md": b"new"})
        repo.commits.append(new.commits[0])
        upload(*arguments)

    monkeypatch.setattr(finetune_r1, "upload", commit_meanwhile)
    done = push()
    assert done.code == 1 and "nothing committed" in done.err
    assert dict(repo.files) == {"notes.md": b"new"}


def test_push_that_cannot_be_read_back_is_not_told_to_have_failed(push, hub, run):
    hub.faults.append(Fault("GET", API + "/tree", 404, times=math.inf))
    done = push()
    assert done.code == 1
    assert "nothing committed" not in done.err and set(files(hub)) == whole(run)
