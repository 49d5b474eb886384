"""The loopback servers do what they claim, with the real clients: huggingface_hub, datasets and wandb.

No test leaves 127.0.0.1 or touches the real home: what would, is sent to the loopback server as its proxy.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from servers.base import Fault
from servers.hub import HubServer
from servers.wandb_server import WandbServer

WRITE, READ, OTHER = "hf_writetoken", "hf_readtoken", "hf_othertoken"
KEY = "a" * 40
REPO = "alice/model"
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b'{"layers": 2}',
    "adapter/adapter_config.json": b'{"r": 16}',
    "adapter/adapter_model.safetensors": WEIGHTS,
}


@pytest.fixture(autouse=True)
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, for this process and its children."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in {"HOME": "", "HF_HOME": "hf", "NETRC": "netrc", "WANDB_DIR": ""}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_XET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # huggingface_hub has read the environment of this process already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    huggingface_hub.close_session()
    return tmp_path


@pytest.fixture
def hub():
    with HubServer(tokens={WRITE: ("alice", "write"), READ: ("alice", "read"), OTHER: ("bob", "write")}) as server:
        yield server


@pytest.fixture
def wandb_server():
    with WandbServer(keys={KEY: "alice"}) as server:
        yield server


def python(code: str, **env: str) -> str:
    """Runs a client as a user's process would run it; its standard output."""
    env = {**os.environ, **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=env["HOME"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def api(hub: HubServer, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def push(hub: HubServer, folder: Path, token: str = WRITE, files: dict[str, bytes] = FILES) -> str:
    """Writes the files and pushes them in one commit, from disk as a real push does."""
    operations = []
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        operations.append(CommitOperationAdd(path, folder / path))
    return api(hub, token).create_commit(REPO, operations, commit_message="Push").oid


def seen(hub: HubServer, method: str, part: str) -> int:
    return sum(method == seen_method and part in path for seen_method, path in hub.requests)


def test_whoami_knows_good_and_bad_tokens(hub):
    assert api(hub).whoami()["name"] == "alice"
    assert api(hub, READ).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as bad:
        api(hub, "hf_unknown").whoami()
    assert bad.value.response.status_code == 401
    assert bad.value.response.headers["X-Error-Message"] == "Invalid credentials in Authorization header"


def test_login_stores_the_token(hub, sandbox):
    python(f"import huggingface_hub; huggingface_hub.login('{WRITE}')", HF_ENDPOINT=hub.url)
    token = sandbox / "hf" / "token"
    assert token.read_text() == WRITE and token.stat().st_mode & 0o777 == 0o600


def test_create_repo(hub):
    url = api(hub).create_repo(REPO, private=True)
    assert (url.repo_id, url.repo_type, hub.repos["model", REPO].private) == (REPO, "model", True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api(hub).create_repo(REPO)
    assert api(hub).create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api(hub).create_repo("alice/data", repo_type="dataset").repo_type == "dataset"


def test_one_commit_arrives_whole_and_comes_back_equal(hub, tmp_path):
    api(hub).create_repo(REPO)
    oid = push(hub, tmp_path / "out")
    repo = hub.repos["model", REPO]
    assert [commit.title for commit in repo.commits] == ["initial commit", "Push"] and repo.commits[-1].oid == oid
    assert {path: data for path, data in repo.files.items() if path != ".gitattributes"} == FILES
    assert (seen(hub, "PUT", "/info/lfs/"), seen(hub, "POST", "/verify")) == (1, 1)

    info = api(hub).repo_info(REPO, files_metadata=True)
    lfs = {sibling.rfilename: sibling.lfs.size for sibling in info.siblings if sibling.lfs}
    assert info.sha == oid and lfs == {"adapter/adapter_model.safetensors": len(WEIGHTS)}
    assert set(api(hub).list_repo_files(REPO)) == {*FILES, ".gitattributes"}
    assert {entry.path for entry in api(hub).list_repo_tree(REPO, "adapter")} == set(list(FILES)[2:])
    assert [entry.path for entry in api(hub).get_paths_info(REPO, ["adapter", "nothing"])] == ["adapter"]
    for path, data in FILES.items():
        assert Path(hf_hub_download(REPO, path, endpoint=hub.url, cache_dir=tmp_path / "a")).read_bytes() == data
    copy = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "b"))
    assert all((copy / path).read_bytes() == data for path, data in FILES.items())


def test_what_is_there_already_is_not_sent_again(hub, tmp_path):
    api(hub).create_repo(REPO)
    assert push(hub, tmp_path) == push(hub, tmp_path)
    assert (seen(hub, "PUT", ""), seen(hub, "POST", "/commit/")) == (1, 1)
    changed = FILES | {"config.json": b'{"layers": 3}'}
    push(hub, tmp_path, files=changed)
    api(hub).create_commit(REPO, [CommitOperationDelete("adapter/")], commit_message="Delete")
    assert seen(hub, "PUT", "") == 1
    assert set(hub.repos["model", REPO].files) == {".gitattributes", "README.md", "config.json"}


def test_a_commit_is_all_or_nothing(hub, tmp_path):
    repo = hub.add_repo("model", REPO, {"a": b"1"})
    operations = [CommitOperationAdd("b", b"2"), CommitOperationDelete("missing")]
    with pytest.raises(EntryNotFoundError):
        api(hub).create_commit(REPO, operations, commit_message="Half")
    with pytest.raises(HfHubHTTPError, match="412"):
        late = [CommitOperationAdd("c", b"3")]
        api(hub).create_commit(REPO, late, commit_message="Late", parent_commit="0" * 40)
    assert len(repo.commits) == 1 and repo.files == {"a": b"1"}


def test_a_read_token_may_not_write(hub, tmp_path):
    hub.add_repo("model", REPO, FILES, private=True)
    assert api(hub, READ).repo_info(REPO).private
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api(hub, READ).create_repo("alice/new")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        push(hub, tmp_path, READ)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api(hub, OTHER).create_repo("alice/new")
    assert len(hub.repos) == 1 and len(hub.repos["model", REPO].commits) == 1


@pytest.mark.parametrize(("token", "status"), [(False, 401), (OTHER, 404)])
def test_missing_and_private_repos_look_alike(hub, token, status):
    hub.add_repo("model", REPO, FILES, private=True)
    for repo in (REPO, "alice/nothing"):
        with pytest.raises(RepositoryNotFoundError) as missing:
            api(hub, token).repo_info(repo)
        assert missing.value.response.status_code == status


def test_missing_files_and_revisions(hub, tmp_path):
    hub.add_repo("model", REPO, FILES)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing.json", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="v2", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(REPO, "nothing"))


def test_a_failed_upload_is_sent_again(hub, tmp_path):
    hub.add_repo("model", REPO)
    hub.faults += [Fault("PUT", "/info/lfs/", status=500), Fault("PUT", "/info/lfs/", status="drop")]
    push(hub, tmp_path)
    assert seen(hub, "PUT", "/info/lfs/") == 3 and dict(hub.repos["model", REPO].files) == FILES


def test_a_download_cut_short_goes_on_where_it_stopped(hub, tmp_path):
    weights = WEIGHTS * 12
    hub.add_repo("model", REPO, {"model.safetensors": weights})
    hub.faults.append(Fault("GET", "/resolve/", status="drop", after=11 << 20))
    file = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
    assert Path(file).read_bytes() == weights and seen(hub, "GET", "/resolve/") == 2


def test_ranges(hub):
    hub.add_repo("dataset", "alice/data", {"data.txt": b"0123456789"})
    url = f"{hub.url}/datasets/alice/data/resolve/main/data.txt"
    for wanted, status, data in [("2-4", 206, b"234"), ("7-", 206, b"789"), ("-2", 206, b"89"), ("10-", 416, None)]:
        answer = httpx.get(url, headers={"Range": f"bytes={wanted}"})
        assert answer.status_code == status and (data is None or answer.content == data)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_any_error_can_be_injected(hub, status):
    hub.faults.append(Fault("GET", "whoami", status, headers={"X-Error-Message": "as asked"}))
    with pytest.raises(HfHubHTTPError) as error:
        api(hub).whoami()
    assert error.value.response.status_code == status and error.value.response.headers["X-Error-Message"] == "as asked"
    assert api(hub).whoami()["name"] == "alice"


def test_slow_and_lost_answers(hub):
    repo = hub.add_repo("model", REPO)
    hub.faults += [Fault("GET", "whoami", delay=0.3), Fault("POST", "/commit/", "drop", after=0)]
    start = time.monotonic()
    api(hub).whoami()
    assert time.monotonic() - start >= 0.3
    with pytest.raises(httpx.RemoteProtocolError):
        api(hub).create_commit(REPO, [CommitOperationAdd("a", b"1")], commit_message="Lost")
    assert repo.files == {"a": b"1"}  # the answer was lost, the commit wasn't


def test_a_stopped_server_is_gone(hub):
    with HubServer(tokens={WRITE: ("alice", "write")}) as other:
        client = api(other)
        client.whoami()
    with pytest.raises(httpx.TransportError):
        client.whoami()


def test_load_dataset(hub):
    rows = [{"Question": f"question {i}", "Response": f"answer {i}"} for i in range(8)]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    card = "---\nconfigs:\n- config_name: en\n  data_files: {}\n- config_name: zh\n  data_files: {}\n---\n"
    json_files = {"en.jsonl": "\n".join(map(json.dumps, rows)).encode(), "zh.json": json.dumps(rows).encode()}
    parquet_files = {"data/en.parquet": parquet.getvalue(), "data/zh.parquet": parquet.getvalue()}
    for name, files in {"org/json": json_files, "org/parquet": parquet_files}.items():
        hub.add_repo("dataset", name, {"README.md": card.format(*files).encode(), **files})
    code = """
import datasets, json
datasets.disable_progress_bars()
for name in ("org/json", "org/parquet"):
    for subset in ("en", "zh"):
        print(json.dumps(datasets.load_dataset(name, subset, split="train[:5]").to_list()))
"""
    # datasets also asks http://datasets-server.127.0.0.1 for a parquet export: the proxy keeps that on loopback.
    loaded = python(code, HF_ENDPOINT=hub.url, HTTP_PROXY=hub.url).splitlines()
    assert [json.loads(line) for line in loaded] == [rows[:5]] * 4
    assert any("datasets-server" in path for _, path in hub.requests)


RUN = """
import wandb
assert wandb.login(verify=True)
with wandb.init(project="project", id="run1", name="first", config={"lr": 2e-4}, resume="allow") as run:
    for step in range(3):
        run.log({"loss": 1 / (step + 1)})
    run.summary["best"] = 0.25
"""


def test_a_wandb_run_arrives_complete(wandb_server):
    python(RUN, WANDB_BASE_URL=wandb_server.url, WANDB_API_KEY=KEY)
    run = wandb_server.runs["alice/project/run1"]
    assert run.finished and run.exitcode == 0 and run.display_name == "first" and run.config["lr"] == 2e-4
    assert [row["loss"] for row in run.history] == [1, 1 / 2, 1 / 3] and run.summary["best"] == 0.25
    assert {"config.yaml", "wandb-metadata.json"} <= set(run.files)


def test_a_wandb_run_survives_faults_and_goes_on(wandb_server):
    wandb_server.faults += [Fault("POST", "/file_stream", 500), Fault("POST", "/file_stream", "drop", after=0)]
    for _ in range(2):
        python(RUN, WANDB_BASE_URL=wandb_server.url, WANDB_API_KEY=KEY)
    run = wandb_server.runs["alice/project/run1"]
    assert len(wandb_server.runs) == 1 and run.finished
    assert [row["_step"] for row in run.history] == list(range(6))


def test_wandb_refuses_an_unknown_key(wandb_server, sandbox):
    code = """
import wandb
try:
    wandb.login(key="b" * 40, verify=True)
except wandb.errors.AuthenticationError as error:
    print(error)
"""
    assert "401" in python(code, WANDB_BASE_URL=wandb_server.url)
    assert not (sandbox / "netrc").exists() and not wandb_server.runs
