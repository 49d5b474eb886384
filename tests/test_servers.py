"""The loopback Hub and W&B do what the other tests rely on; the clients are the real ones."""

import os
import random
import subprocess
import sys

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from servers.base import Fault
from servers.hub import HubServer
from servers.wandb_server import WandbServer

WRITE, READ, OTHER = "hf_writetoken", "hf_readtoken", "hf_othertoken"
KEY, REPO = "a" * 40, "alice/model"
FILES = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}"}


@pytest.fixture
def hub():
    tokens = {WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}
    with HubServer(tokens=tokens) as server:
        yield server


@pytest.fixture
def wandb_server():
    with WandbServer(keys={KEY: "alice"}) as server:
        yield server


@pytest.fixture
def python(tmp_path):
    """Runs a client in a process of its own, in an empty folder; gives its standard output."""

    def run(code: str, **environment: str) -> str:
        home = {"HF_HOME": str(tmp_path / "hf"), "WANDB_ERROR_REPORTING": "false"}
        environment = {**os.environ, **home, **environment}
        how = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", code], check=False, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def api(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def commit(hub: HubServer, files: dict[str, bytes | None], token: str = WRITE, **options) -> str:
    """One commit; what is None is deleted."""
    operations = [
        CommitOperationAdd(name, data) for name, data in files.items() if data is not None
    ]
    operations += [CommitOperationDelete(name) for name, data in files.items() if data is None]
    return api(hub, token).create_commit(REPO, operations, commit_message="Push", **options).oid


def seen(hub: HubServer, method: str, part: str) -> int:
    return sum(method == seen_method and part in path for seen_method, path in hub.requests)


# ------------------------------------------------------------------------------------------ the Hub


def test_hub_commit_is_all_or_nothing(hub):
    repo = hub.add_repo("model", REPO, {"a": b"1"})
    with pytest.raises(EntryNotFoundError):
        commit(hub, {"b": b"2", "missing": None})
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(hub, {"c": b"3"}, parent_commit="0" * 40)
    assert len(repo.commits) == 1 and repo.files == {"a": b"1"}


def test_hub_lets_only_the_owners_write_token_write(hub):
    repo = hub.add_repo("model", REPO, FILES, private=True)
    assert api(hub, READ).repo_info(REPO).private
    for token in (READ, OTHER):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            api(hub, token).create_repo("alice/new")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        commit(hub, {"a": b"1"}, READ)
    assert len(hub.repos) == 1 and len(repo.commits) == 1
    for name in (REPO, "alice/nothing"):  # what is private looks to others as if it were not there
        with pytest.raises(RepositoryNotFoundError):
            api(hub, OTHER).repo_info(name)


# ---------------------------------------------------------------------------------------------- Xet
# hf_xet reads its environment once a process, so each of these clients is a process of its own.

LARGE = random.Random(0).randbytes(3_000_000)
XET_FILES = {  # in chunks that are stored as they are, packed, and packed by bytes
    "config.json": b'{"layers": 2}',
    "random.bin": LARGE,
    "half-shared.bin": LARGE[:1_500_000] + LARGE[::-2],
    "text.bin": "".join(f"line {number} of a text\n" for number in range(120_000)).encode(),
    "floats.safetensors": b"".join(LARGE[i : i + 3] + b"\x3f" for i in range(0, 750_000, 3)),
}
PUSH = f"""
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
def push():
    files = [CommitOperationAdd(path.name, path) for path in Path("out").iterdir()]
    HfApi().create_commit("{REPO}", files, commit_message="Push")
"""
PULL = (
    f"from huggingface_hub import snapshot_download; snapshot_download('{REPO}', local_dir='copy')"
)


@pytest.fixture
def over_xet(hub, python, tmp_path):
    """Runs `code` after PUSH, with `files` to push."""

    def run(code: str, files: dict[str, bytes]) -> str:
        (tmp_path / "out").mkdir(exist_ok=True)
        for name, data in files.items():
            (tmp_path / "out" / name).write_bytes(data)
        return python(PUSH + code, HF_HUB_DISABLE_XET="0", HF_ENDPOINT=hub.url, HF_TOKEN=WRITE)

    return run


def test_xet_brings_files_there_and_back_and_sends_only_what_is_new(hub, over_xet, tmp_path):
    repo = hub.add_repo("model", REPO)
    over_xet(f"push()\n{PULL}", XET_FILES)
    assert repo.files == XET_FILES and len(repo.commits) == 2
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in XET_FILES} == XET_FILES
    assert (seen(hub, "PUT", "/xorb-uploads/"), seen(hub, "POST", "/info/lfs/")) == (1, 0)
    assert seen(hub, "GET", "/xet/xorbs/") and seen(hub, "GET", "/resolve/") == 1, (
        "config.json is small"
    )
    assert {chunk.scheme for xorb in hub.xet.xorbs.values() for chunk in xorb.chunks} == {0, 1, 2}
    before = sum(xorb.path.stat().st_size for xorb in hub.xet.xorbs.values())
    changed = LARGE[:1_000_000] + b"changed" + LARGE[1_000_000:]
    over_xet("push()", {"random.bin": changed})
    assert repo.files["random.bin"] == changed
    assert sum(xorb.path.stat().st_size for xorb in hub.xet.xorbs.values()) - before < 300_000


# ---------------------------------------------------------------------------------------------- W&B

RUN = """
import wandb
assert wandb.login(verify=True)
with wandb.init(project="project", id="run1", name="first", config={"lr": 2e-4}, resume="allow") as run:
    for step in range(3):
        run.log({"loss": 1 / (step + 1)})
"""


def test_wandb_run_arrives_complete_despite_faults_and_resumes(wandb_server, python):
    file_stream = ("POST", "/file_stream")
    wandb_server.faults += [Fault(*file_stream, 500), Fault(*file_stream, "drop", after=0)]
    for _ in range(2):
        python(RUN, WANDB_BASE_URL=wandb_server.url, WANDB_API_KEY=KEY)
    [run] = wandb_server.runs.values()
    assert (
        run.finished
        and run.exitcode == 0
        and run.display_name == "first"
        and run.config["lr"] == 2e-4
    )
    assert [row["_step"] for row in run.history] == list(range(6)) and run.history[5][
        "loss"
    ] == 1 / 3
    assert "config.yaml" in run.files
