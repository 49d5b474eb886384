"""Push, against a real Hub server on loopback with the unmodified client, by LFS and by Xet."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import Done, add_base, name_base
from servers.base import STALL, Fault, chance_fault

import finetune_r1

WRITE, READ = "hf_writetoken", "hf_readtoken"
REPO = "alice/DeepSeek-R1-Medical-COT"
WAYS = ["lfs", "xet"]


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished run with its merged weights."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("pushed") / "run")
    finetune_r1.save(run=folder)
    return folder


@pytest.fixture
def push(hub, run, monkeypatch, capfd):
    """The command as a user gives it, but in this process, whose client has read its environment already."""
    from huggingface_hub import constants

    monkeypatch.setattr(finetune_r1, "READ_AGAIN_SECONDS", 0)

    def command(*arguments, way: str = "lfs", token: str | None = WRITE) -> Done:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv(
            "HF_TOKEN", raising=False
        )
        finetune_r1.use_hub_token.cache_clear()
        with pytest.raises(SystemExit) as end:
            finetune_r1.app(["push", "--repo", REPO, "--run", str(run), "--json", *arguments])
        done = Done(end.value.code, *capfd.readouterr())
        assert "Traceback" not in done.err and ("next:" in done.err) == (done.code == 1)
        return done

    return command


def files(hub):
    """What the repository holds, None if there is none."""
    repo = hub.repos.get(("model", REPO))
    return dict(repo.files) if repo else None


def expected(run):
    """Every file that a push must bring; card and adapter's settings are made for the repository."""
    names = {path.name for path in (run / "merged").glob("[!.]*")} | {"README.md", "loss.png"}
    return (
        names
        | {f"adapter/{path.name}" for path in (run / "adapter").glob("[!.]*")}
        | {".gitattributes"}
    )


@pytest.fixture(autouse=True)
def notebook(run):
    """What Jupyter leaves behind in a folder that was looked into stops nothing and stays here."""
    for folder in ("adapter", "merged"):
        (run / folder / ".ipynb_checkpoints").mkdir(exist_ok=True)


@pytest.mark.parametrize("way", WAYS)
def test_one_commit_brings_merged_weights_to_the_root_and_the_adapter_to_its_folder(
    push, hub, run, way
):
    report = json.loads(push(way=way).out)
    repo = hub.repos["model", REPO]
    assert set(repo.files) == expected(run) and "same hash" in report["verified"]
    assert repo.private and len(repo.commits) == 2, "the first commit made the repository"
    assert repo.files["model.safetensors"] == (run / "merged" / "model.safetensors").read_bytes()
    assert any("/xet/" in path for _, path in hub.requests) == (way == "xet")


@pytest.mark.slow
def test_what_was_pushed_loads_by_name_with_equal_logits(push, hub, run, tiny_r1, tmp_path):
    push(way="xet")
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model):
    with torch.no_grad():
        return model(**batch).logits.float()

def base():
    return AutoModelForCausalLM.from_pretrained("{tiny_r1}", dtype="auto")

batch = AutoTokenizer.from_pretrained("{REPO}")("Why does a raised anion gap matter?", return_tensors="pt")
assert torch.equal(
    logits(AutoModelForCausalLM.from_pretrained("{REPO}", dtype="auto")),
    logits(AutoModelForCausalLM.from_pretrained("{run}/merged", dtype="auto")),
)
adapter = logits(PeftModel.from_pretrained(base(), "{REPO}", subfolder="adapter"))
assert torch.equal(adapter, logits(PeftModel.from_pretrained(base(), "{run}/adapter")))
assert not torch.equal(adapter, logits(base()))
"""
    here = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITE,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "0",
    }
    how = {"env": {**os.environ, **here}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_shows_the_files_and_sends_nothing(push, hub):
    done = push("--dry-run", token=None)
    report = json.loads(done.out)
    assert report["dry_run"] and report["visibility"] == "private, new" and report["repo"] == REPO
    assert "model.safetensors" in done.err and "adapter/adapter_config.json" in done.err
    assert f" {finetune_r1.file_size(report['bytes'])}, to {REPO} (private, new)" in done.err
    assert {method for method, _ in hub.requests} == {"GET"}


def test_without_a_hub_a_dry_run_tells_what_it_can(push, hub):
    hub.faults.append(Fault("*", "", status="drop", times=math.inf))
    done = push("--dry-run", token=None)
    assert (
        done.code == 0 and f"the Hub was not reached, so what is in {REPO} is unknown" in done.err
    )
    assert "model.safetensors" in done.err and json.loads(done.out)["bytes"] > 0


def test_a_push_again_sends_nothing_and_after_an_evaluation_the_card_alone(push, hub, run):
    def sent():
        return [path for method, path in hub.requests if method in ("PUT", "POST")]

    push()
    first = sent()
    push()
    repo = hub.repos["model", REPO]
    assert sent() == first and len(repo.commits) == 2
    finetune_r1.write_json(run / "eval.json", {"verdict": "better by far", "rows": 9, "answers": 0})
    push()
    (run / "eval.json").unlink()
    before, after = (commit.tree for commit in repo.commits[1:])
    assert [name for name in after if after[name] != before.get(name)] == ["README.md"]
    assert b"better by far" in repo.files["README.md"]


def test_the_adapter_alone_goes_to_the_same_folder(push, hub, run):
    push("--adapter-only")
    assert set(files(hub)) == {
        name for name in expected(run) if "/" in name or name.startswith(("README", "loss", "."))
    }
    card = files(hub)["README.md"].decode()
    assert f'PeftModel.from_pretrained(base, "{REPO}", subfolder="adapter")' in card
    assert "vllm serve" not in card and f'"text-generation", "{REPO}"' not in card
    push()
    assert set(files(hub)) == expected(run), "the merged weights of the same run join it"


OTHERS = {
    "other weights": {"model.safetensors": b"other weights"},
    "more shards": {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
    },
    "pickles": {"pytorch_model.bin": b"pickled"},
    "the recipe's adapter at the root": {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"adapter",
    },
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_other_weights_are_replaced_only_by_force_and_then_all_of_them(push, hub, run, others):
    hub.add_repo("model", REPO, {"notes.md": b"mine", **others})
    before = files(hub)
    done = push()
    assert (
        done.code == 1
        and "--force" in done.err
        and "--create-pr" in done.err
        and next(iter(others)) in done.err
    )
    assert files(hub) == before
    push("--force")
    assert set(files(hub)) == expected(run) - {".gitattributes"} | {"notes.md"}
    assert len(hub.repos["model", REPO].commits) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_pull_request_offers_the_weights_and_leaves_the_repository_as_it_was(push, hub, run, way):
    hub.add_repo("model", REPO, {"model.safetensors": b"other weights"})
    before = files(hub)
    report = json.loads(push("--create-pr", way=way).out)
    assert report["revision"] == "refs/pr/1" and files(hub) == before
    assert set(hub.repos["model", REPO].pull_requests[0].files) == expected(run) - {
        ".gitattributes"
    }


def test_a_pull_request_whose_answer_was_lost_is_told_to_be_looked_for(push, hub, run):
    hub.add_repo("model", REPO, {"model.safetensors": b"other weights"})
    hub.faults.append(Fault("POST", "/commit/", "drop", after=0))
    done = push("--create-pr")
    assert done.code == 1 and f"{hub.url}/{REPO}/discussions, it may be there; else" in done.err
    assert set(hub.repos["model", REPO].pull_requests[0].files) == expected(run) - {
        ".gitattributes"
    }


def test_a_pull_request_needs_a_repository(push, hub):
    done = push("--create-pr")
    assert done.code == 1 and "--create-pr" in done.err and not hub.repos


def test_a_public_repository_is_not_taken_for_a_private_one(push, hub):
    hub.add_repo("model", REPO, {"README.md": b"# Mine"})
    assert json.loads(push("--dry-run").out)["visibility"] == "public"
    done = push("--private")
    assert done.code == 1 and "--private" in done.err and set(files(hub)) == {"README.md"}


def test_a_new_repository_is_public_when_asked(push, hub):
    assert json.loads(push("--public").out)["visibility"] == "public, new"
    assert not hub.repos["model", REPO].private


def test_a_read_token_cannot_push_and_the_message_comes_before_any_work(push, hub):
    done = push(token=READ)
    assert done.code == 1 and "can read, not write" in done.err and "login" in done.err
    assert [path for _, path in hub.requests] == ["/api/whoami-v2"]


def test_without_a_token_nothing_is_merged_or_sent(push, hub):
    done = push(token=None)
    assert done.code == 1 and "finetune_r1.py login`" in done.err and not hub.requests


def test_a_folder_with_adapter_and_merged_weights_is_refused_with_the_reason(push, hub, run):
    """What the recipe saves and pushes."""
    names = [path.name for path in (run / "adapter").glob("adapter*")]
    for name in names:
        shutil.copy(run / "adapter" / name, run / "merged")
    try:
        done = push()
    finally:
        for name in names:
            (run / "merged" / name).unlink()
    assert done.code == 1 and "apply the adapter twice" in done.err and files(hub) is None


@pytest.mark.parametrize(
    "damage", ["a shard is cut", "a byte is changed", "a file is missing", "a file is added"]
)
def test_only_what_save_verified_is_pushed(push, hub, run, tmp_path, damage):
    weights, extra = run / "merged" / "model.safetensors", run / "merged" / "pytorch_model.bin"
    shutil.copy(weights, tmp_path)
    if damage == "a file is added":
        extra.touch()
    elif damage == "a byte is changed":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        weights.write_bytes(
            weights.read_bytes()[:1000]
        ) if damage == "a shard is cut" else weights.unlink()
    try:
        done = push()
    finally:
        extra.unlink(missing_ok=True)
        shutil.copy(tmp_path / weights.name, weights)
    assert done.code == 1 and "not what `save` verified" in done.err and files(hub) is None


@pytest.mark.parametrize("name", ["all.png", "adapter/id_rsa", "merged/Modelfile", "adapter/notes"])
def test_what_a_link_leads_to_and_what_the_training_did_not_write_stays_here(
    push, hub, run, tmp_path, name
):
    """As a run from a stranger may have it."""
    (tmp_path / "id_rsa").write_text("private")
    if name == "adapter/notes":
        (run / name).mkdir()
    else:
        (run / name).symlink_to(tmp_path / "id_rsa")
    try:
        done = push()
    finally:
        finetune_r1.remove(run / name)
    if name.startswith("adapter"):
        assert done.code == 0 and set(files(hub)) == expected(run)
    else:
        assert done.code == 1 and f"{name} is a link" in done.err and files(hub) is None


def test_the_card_has_metadata_that_the_hub_takes_and_all_that_a_reader_asks(push, hub, run):
    import yaml

    push()
    _, front, text = files(hub)["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["pipeline_tag"] == "text-generation" and card["library_name"] == "transformers"
    assert {"medical", "reasoning"} <= set(card["tags"]) and card["language"] == "en"
    use = [f'pipeline("text-generation", "{REPO}"', "`adapter/`", "Limits", "no medical device"]
    use.append(f"vllm serve {REPO} --max-model-len 768 --reasoning-parser deepseek_r1\n```")
    for part in [
        *use,
        "Before",
        "After",
        "![training loss](loss.png)",
        "learning_rate",
        '"dropped"',
    ]:
        assert part in text, part


API, GIT = f"/api/models/{REPO}", f"/{REPO}.git"
LANDED = {
    "a commit's answer is lost": ("lfs", Fault("POST", "/commit/", "drop", after=3)),
    "a commit is slow": ("lfs", Fault("POST", "/commit/", delay=0.5)),
    "an upload fails once": ("lfs", Fault("PUT", GIT, 500)),
    "an upload is cut once": ("lfs", Fault("PUT", GIT, "drop")),
    "too many requests, once": ("lfs", Fault("POST", "/objects/batch", 429)),
    "a xorb fails once": ("xet", Fault("PUT", "/xorb-uploads/", 503)),
    "a shard fails once": ("xet", Fault("POST", "/shards", 500)),
    "a shard's answer is lost": ("xet", Fault("POST", "/shards", "drop", after=3)),
    "a commit's answer is lost, by xet": ("xet", Fault("POST", "/commit/", "drop", after=3)),
    "the answer to the read-back is lost": ("lfs", Fault("GET", API, "drop", skip=1)),
    "the Hub has trouble at the read-back": ("lfs", Fault("GET", API, 503, skip=1)),
}


@pytest.mark.parametrize(("way", "fault"), LANDED.values(), ids=LANDED)
def test_a_passing_fault_ends_in_a_whole_repository(push, hub, run, way, fault):
    hub.faults.append(fault)
    assert push(way=way).code == 0
    assert set(files(hub)) == expected(run) and fault.times == 0


def test_a_push_is_told_to_be_complete_though_two_answers_to_it_were_lost(push, hub, run):
    hub.faults += [Fault("POST", "/commit/", "drop", after=0), Fault("GET", API, "drop", skip=1)]
    assert "same hash" in push().out and set(files(hub)) == expected(run)


def test_a_push_that_cannot_be_read_back_is_not_told_to_have_failed(push, hub, run):
    hub.faults.append(Fault("GET", API, "drop", times=math.inf, skip=1))
    done = push()
    assert done.code == 1 and "could not be read back" in done.err and "as it was" not in done.err
    assert set(files(hub)) == expected(run)


SILENT = {
    "commit": ("lfs", "/commit/"),
    "xet token": ("xet", "/xet-write-token/"),
    "xet shards": ("xet", "/shards"),
}


@pytest.mark.parametrize(("way", "path"), SILENT.values(), ids=SILENT)
def test_a_hub_that_falls_silent_is_left_with_what_to_do(push, hub, run, monkeypatch, way, path):
    """Seconds stand for the minute or two of a real push."""
    monkeypatch.setattr(finetune_r1, "SILENT_SECONDS", {"": 1})
    monkeypatch.setattr(finetune_r1, "STALLED_SECONDS", 1)
    hub.faults.append(Fault("*", path, delay=STALL, times=math.inf))
    started = time.monotonic()
    done = push(way=way)
    assert done.code == 1 and "is as it was" in done.err and "later: what has arrived" in done.err
    assert time.monotonic() - started < 15
    hub.faults.clear()
    assert push(way="lfs").code == 0 and set(files(hub)) == expected(run)


def test_a_block_may_take_longer_to_send_than_one_to_fetch(push, hub, run, monkeypatch):
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "500ms")
    hub.faults.append(Fault("PUT", "/xorb-uploads/", delay=1, times=math.inf))
    assert push(way="xet").code == 0 and set(files(hub)) == expected(run)
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(set(sent)), "nothing is sent again"


@pytest.mark.parametrize("seed", range(3))
def test_faults_by_chance_end_in_the_truth(push, hub, run, monkeypatch, seed):
    """The long form is `pushes` in bench/survive.py."""
    monkeypatch.setattr(finetune_r1, "SILENT_SECONDS", {"": 1})
    monkeypatch.setattr(finetune_r1, "STALLED_SECONDS", 2)
    chance = random.Random(seed)
    hub.faults += [chance_fault(chance, within=12) for _ in range(2)]
    done = push(way="xet")
    whole = set(files(hub) or ()) == expected(run)
    assert (done.code == 0) == whole or "could not be read back" in done.err
    hub.faults.clear()
    assert push(way="lfs").code == 0 and set(files(hub)) == expected(run)


REFUSED = {
    "whoami 401": ("lfs", "GET", "whoami", 401, "refused the token"),
    "whoami 429": ("lfs", "GET", "whoami", 429, "wait"),
    "whoami 500": ("lfs", "GET", "whoami", 500, "later"),
    "no look at the repository": ("lfs", "GET", API, 503, "later"),
    "create 403": ("lfs", "POST", "/repos/create", 403, "write access"),
    "create 409": ("lfs", "POST", "/repos/create", 409, "finetune_r1.py push` again"),
    "create 500": ("lfs", "POST", "/repos/create", 500, "later"),
    "preupload 403": ("lfs", "POST", "/preupload/", 403, "write access"),
    "batch 403": ("lfs", "POST", "/objects/batch", 403, "write access"),
    "upload 403": ("lfs", "PUT", GIT, 403, "write access"),
    "verify 404": ("lfs", "POST", "/verify", 404, ""),
    "commit 401": ("lfs", "POST", "/commit/", 401, "login"),
    "commit 403": ("lfs", "POST", "/commit/", 403, "write access"),
    "commit 409": ("lfs", "POST", "/commit/", 409, "changed meanwhile"),
    "commit 412": ("lfs", "POST", "/commit/", 412, "changed meanwhile"),
    "commit 429": ("lfs", "POST", "/commit/", 429, "wait"),
    "commit 503": ("lfs", "POST", "/commit/", 503, "later"),
    "commit cut": ("lfs", "POST", "/commit/", "drop", "later"),
    "xet token 401": ("xet", "GET", "/xet-write-token/", 401, "login"),
    "xet token 403": ("xet", "GET", "/xet-write-token/", 403, "write access"),
    "xet token 429": ("xet", "GET", "/xet-write-token/", 429, "wait"),
    "xet grant 403": ("xet", "POST", "/xorb-grants/", 403, "write access"),
    "xet shards 500": ("xet", "POST", "/shards", 500, "later"),
    "xet shards cut": ("xet", "POST", "/shards", "drop", "later"),
    "commit 412 by xet": ("xet", "POST", "/commit/", 412, "changed meanwhile"),
}


@pytest.mark.parametrize(("way", "method", "path", "status", "said"), REFUSED.values(), ids=REFUSED)
def test_a_lasting_fault_leaves_the_repository_as_it_was_and_a_push_again_completes_it(
    push, hub, run, way, method, path, status, said
):
    hub.faults.append(Fault(method, path, status, times=math.inf))
    done = push(way=way)
    assert done.code == 1 and said in done.err
    assert files(hub) is None or set(files(hub)) == {".gitattributes"}, (
        "a new repository may be left, but empty"
    )
    hub.faults.clear()
    assert push(way=way).code == 0 and set(files(hub)) == expected(run)


def test_weights_that_were_not_replaced_are_told(push, hub, run):
    """The files are there already, and the commit that would remove the others fails."""
    push()
    repo = hub.repos["model", REPO]
    stray = hub.add_repo("model", "alice/stray", {"pytorch_model.bin": b"pickled"}).commits[0].tree
    repo.commits[-1].tree.update(stray)
    hub.faults.append(Fault("POST", "/commit/", 503, times=math.inf))
    assert push("--force").code == 1
    hub.faults.clear()
    assert push("--force").code == 0 and "pytorch_model.bin" not in repo.files


def test_somebody_elses_commit_of_this_minute_is_not_undone(push, hub, run, monkeypatch):
    hub.add_repo("model", REPO, {"README.md": b"# Mine"})
    whole_upload = finetune_r1.Repository.upload

    def upload_late(self, *arguments):
        hub.repos["model", REPO].commits.append(
            hub.add_repo("model", "alice/other", {"README.md": b"# New"}).commits[0]
        )
        return whole_upload(self, *arguments)

    repo = hub.repos["model", REPO]
    monkeypatch.setattr(finetune_r1.Repository, "upload", upload_late)
    done = push()
    assert (
        done.code == 1
        and "changed meanwhile" in done.err
        and dict(repo.files) == {"README.md": b"# New"}
    )


@pytest.mark.parametrize("way", WAYS)
def test_after_a_cut_only_what_is_missing_is_sent(push, hub, run, way):
    hub.faults.append(Fault("POST", "/commit/", 503, times=math.inf))
    push(way=way)
    hub.faults.clear()
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert sent and push(way=way).code == 0
    assert [path for method, path in hub.requests if method == "PUT"] == sent


def test_the_card_names_one_base_model_where_the_bases_own_card_names_several(tiny_deepseek):
    assert finetune_r1.public_name(str(tiny_deepseek)) == "meta-llama/Llama-3.1-8B"


# ------------------------------------------------------------- a disk without room for the merged weights


@pytest.fixture
def small(push, hub, run, tiny_r1, small_disk, monkeypatch):
    """Pushes a run whose base is on the Hub, from a disk that holds one file of it and one of the result."""
    add_base(hub, tiny_r1)
    copy = small_disk.folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, "org/base")
    finetune_r1.Run(copy).update(saved={})
    monkeypatch.setattr(finetune_r1, "SHARD", 170_000)
    finetune_r1.download_model("org/base", weights=False)
    before = set(copy.iterdir())
    largest = finetune_r1.weights_size("org/base")[2]
    small_disk.hold(largest + finetune_r1.SHARD + 10_000)

    def command(*arguments, **options):
        done = push("--run", str(copy), *arguments, **options)
        assert set(copy.iterdir()) - before <= {copy / "README.md", copy / ".lock"}
        assert not list(small_disk.folder.glob("hub/*/snapshots/*/*.safetensors"))
        assert small_disk.most <= small_disk.size
        return done

    return command


def sent(hub):
    """The files of weights that arrived."""
    return [path for method, path in hub.requests if method == "PUT" and path.startswith(GIT)]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_small_disk_sends_file_by_file_is_the_same_byte_for_byte(
    push, small, small_disk, hub, way
):
    done = small(way=way)
    assert (
        done.code == 0
        and "file by file" in done.err
        and "same hash" in json.loads(done.out)["verified"]
    )
    repo = hub.repos["model", REPO]
    assert repo.private and len(repo.commits) == 2
    assert len([name for name in repo.files if name.startswith("model-")]) == 3
    by_file = files(hub)
    assert json.loads(done.out)["bytes"] == sum(map(len, by_file.values())) - len(
        by_file[".gitattributes"]
    )

    del hub.repos["model", REPO]
    small_disk.hold(10**12)
    assert push("--run", str(small_disk.folder / "run"), way=way).code == 0
    assert (small_disk.folder / "run" / "merged").exists() and files(hub) == by_file


def test_a_push_from_a_small_disk_that_ends_between_two_files_is_completed_by_the_next(small, hub):
    hub.faults.append(Fault("PUT", GIT, 403, times=math.inf, skip=2))
    done = small()
    assert (
        done.code == 1
        and f"{REPO} is as it was" in done.err
        and set(files(hub)) == {".gitattributes"}
    )
    assert "write access" in done.err
    first = sent(hub)[:2]
    hub.faults.clear()
    hub.requests.clear()
    assert small().code == 0 and not set(first) & set(sent(hub)), (
        "what has arrived is not sent again"
    )
    assert "model.safetensors.index.json" in files(hub)
    hub.requests.clear()
    assert small().code == 0 and not sent(hub) and len(hub.repos["model", REPO].commits) == 2


def test_from_a_small_disk_nothing_goes_to_a_repository_with_other_weights_without_force(
    small, hub
):
    hub.add_repo("model", REPO, {"model.safetensors": b"other weights"})
    done = small()
    assert done.code == 1 and "holds other weights: model.safetensors" in done.err and not sent(hub)
    assert json.loads(small("--create-pr").out)["revision"] == "refs/pr/1" and len(files(hub)) == 1
    assert small("--force").code == 0 and "model.safetensors" not in files(hub)


def test_from_a_small_disk_a_merge_that_fails_its_check_is_not_committed(small, hub, monkeypatch):
    walk = finetune_r1.Merge.walk

    def lost(merge, tokenizer):
        merge.scale = 0
        return walk(merge, tokenizer)

    monkeypatch.setattr(finetune_r1.Merge, "walk", lost)
    done = small()
    assert (
        done.code == 1
        and "do not act as base" in done.err
        and set(files(hub)) == {".gitattributes"}
    )


@pytest.fixture
def ggufs(run):
    """What `save` would have left in the run; to `push` they are files."""
    folder = run / "gguf"
    folder.mkdir()
    for name in ("run-q8_0.gguf", "run-f16-lora.gguf"):
        (folder / name).write_bytes(b"GGUF" + name.encode())
    yield folder
    shutil.rmtree(folder)


def test_gguf_files_come_along_when_asked_for_and_then_stay(push, hub, run, ggufs):
    push()
    assert not any("gguf" in name for name in files(hub) if name != ".gitattributes")
    (ggufs / "Modelfile").write_text("FROM ./run-q8_0.gguf\n")
    push("--gguf")
    assert set(files(hub)) == expected(run) | {
        "run-q8_0.gguf",
        "Modelfile",
        "adapter/run-f16-lora.gguf",
    }
    name = REPO.partition("/")[2].lower()
    for line in (
        "llama-server -m run-q8_0.gguf --jinja -c 768",
        f"ollama create {name} -f Modelfile",
    ):
        assert f"\n{line}\n" in files(hub)["README.md"].decode()
    assert push().code == 0, "they are not taken for somebody else's"
    (ggufs / "run-q8_0.gguf").write_bytes(b"GGUF, made anew")
    push("--force")
    assert files(hub)["run-q8_0.gguf"] == b"GGUF, made anew", (
        "nor left behind when they are made anew"
    )


def test_of_an_adapter_alone_its_gguf_alone_comes_along(push, hub, ggufs):
    push("--adapter-only", "--gguf")
    assert [name for name in files(hub) if name.endswith(".gguf")] == ["adapter/run-f16-lora.gguf"]


def test_somebody_elses_gguf_is_other_weights(push, hub, ggufs):
    hub.add_repo("model", REPO, {"theirs.gguf": b"GGUF"})
    done = push("--gguf")
    assert done.code == 1 and "holds other weights: theirs.gguf" in done.err


def test_a_gguf_that_was_not_made_is_asked_for(push, hub):
    done = push("--gguf")
    assert (
        done.code == 1
        and "--gguf: there is none" in done.err
        and "save --as gguf --run" in done.err
    )
    assert "save --as gguf-adapter" in push("--gguf", "--adapter-only").err
