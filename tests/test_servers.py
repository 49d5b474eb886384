"""The loopback servers do what they claim, with the real clients: huggingface_hub, datasets and wandb.

No test leaves 127.0.0.1 or touches the real home: what would, is sent to the loopback server as its proxy.
"""

import hashlib
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import huggingface_hub
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
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


def test_files_are_served_from_where_they_lie(hub, tmp_path):
    lying = {name: tmp_path / f"here-{number}" for number, name in enumerate(FILES)}
    for name, path in lying.items():
        path.write_bytes(FILES[name])
    tree = hub.add_repo("model", REPO, {**lying, "b": b"bytes"}).commits[0].tree
    assert all(tree[name].blob.is_symlink() for name in FILES) and not tree["b"].blob.is_symlink()
    folder = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache"))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES and (folder / "b").read_bytes() == b"bytes"


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


def test_a_pull_request_leaves_main_as_it_was(hub, tmp_path):
    repo = hub.add_repo("model", REPO, {"a": b"1"})
    add = [CommitOperationAdd("b", b"2"), CommitOperationAdd("c.bin", b"3")]
    opened = api(hub).create_commit(REPO, add, commit_message="Please", create_pr=True)
    assert (opened.pr_num, opened.pr_revision, opened.pr_url) == (1, "refs/pr/1", f"{hub.url}/{REPO}/discussions/1")
    api(hub).create_commit(REPO, [CommitOperationDelete("a")], commit_message="More", revision="refs/pr/1")
    assert repo.files == {"a": b"1"} and repo.pull_requests[0].files == {"b": b"2", "c.bin": b"3"}
    assert (repo.pull_requests[0].title, repo.pull_requests[0].author) == ("Please", "alice")

    assert set(api(hub).list_repo_files(REPO, revision="refs/pr/1")) == {"b", "c.bin"}
    assert api(hub).repo_info(REPO, revision="refs/pr/1").sha == repo.pull_requests[0].commits[-1].oid
    assert [path.path for path in api(hub).get_paths_info(REPO, ["a", "b"], revision="refs/pr/1")] == ["b"]
    refs = api(hub).list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.ref for ref in refs.branches + refs.pull_requests] == ["refs/heads/main", "refs/pr/1"]
    copy = Path(snapshot_download(REPO, revision="refs/pr/1", endpoint=hub.url, cache_dir=tmp_path))
    assert (copy / "c.bin").read_bytes() == b"3"


def test_a_refused_pull_request_is_not_opened(hub):
    repo = hub.add_repo("model", REPO, {"a": b"1"})
    with pytest.raises(EntryNotFoundError):
        api(hub).create_commit(REPO, [CommitOperationDelete("b")], commit_message="No", create_pr=True)
    with pytest.raises(RevisionNotFoundError):
        api(hub).create_commit(REPO, [CommitOperationAdd("b", b"2")], commit_message="No", revision="refs/pr/1")
    assert not repo.pull_requests and len(repo.commits) == 1


def test_a_large_lfs_upload_goes_in_parts(tmp_path):
    with HubServer(tokens={WRITE: ("alice", "write")}, part_size=300_000) as hub:
        hub.add_repo("model", REPO)
        hub.faults.append(Fault("PUT", "/2$", status=500))
        push(hub, tmp_path)
        assert (seen(hub, "PUT", ""), seen(hub, "POST", "/complete")) == (5, 1)
        assert dict(hub.repos["model", REPO].files) == FILES


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("license: [mit", "can't be parsed"),
        ("license: 1", '"license" must be a string'),
        ("tags: medical", '"tags" must be a list of strings'),
        ("- mit", "must be a mapping"),
    ],
)
def test_a_card_with_bad_yaml_is_refused(hub, yaml, error):
    repo = hub.add_repo("model", REPO)
    card = CommitOperationAdd("README.md", f"---\n{yaml}\n---\n# A model\n".encode())
    with pytest.raises(ValueError, match=error):
        api(hub).create_commit(REPO, [card], commit_message="Card")
    hub.faults.append(Fault("POST", "/validate-yaml", 200, body={"errors": []}))
    with pytest.raises(BadRequestError, match=error):
        api(hub).create_commit(REPO, [card], commit_message="Card")
    assert len(repo.commits) == 1


@pytest.mark.parametrize("yaml", ["license: mit\ntags:\n- medical", "license: other\nlicense_name: x", "", "tags: []"])
def test_a_card_with_good_yaml_is_taken(hub, yaml):
    repo = hub.add_repo("model", REPO)
    for card in (f"---\n{yaml}\n---\n# A model\n".encode(), b"# No YAML\n"):
        api(hub).create_commit(REPO, [CommitOperationAdd("README.md", card)], commit_message="Card")
        assert repo.files["README.md"] == card


# Xet: hf_xet reads its environment once a process, so each of these clients is a process of its own.

RANDOM = random.Random(0).randbytes(3_000_000)
FLOATS = numpy.random.default_rng(0).normal(size=250_000).astype("float32").tobytes()
XET_FILES = {
    "config.json": b'{"layers": 2}',
    "random.bin": RANDOM,
    "half-shared.bin": RANDOM[:1_500_000] + RANDOM[::-2],
    "text.bin": "".join(f"line {number} of a text\n" for number in range(120_000)).encode(),
    "zeros.bin": bytes(3_000_000),
    "floats.safetensors": FLOATS + b"odd",
}
PUSH = f"""
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
files = [path for path in Path("out").rglob("*") if path.is_file()]
operations = [CommitOperationAdd(str(path.relative_to("out")), path) for path in files]
HfApi().create_commit("{REPO}", operations, commit_message="Push")
"""
PUSH_FOLDER = f"from huggingface_hub import upload_folder; upload_folder(repo_id='{REPO}', folder_path='out')"
PULL = f"from huggingface_hub import snapshot_download; print(snapshot_download('{REPO}', local_dir='copy'))"


def over_xet(hub: HubServer, code: str, **env: str) -> str:
    short = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return python(code, **{"HF_HUB_DISABLE_XET": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, **short, **env})


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)


def xorb_bytes(hub: HubServer) -> int:
    return sum(xorb.path.stat().st_size for xorb in hub.xet.xorbs.values())


@pytest.mark.parametrize("code", [PUSH, PUSH_FOLDER], ids=["create_commit", "upload_folder"])
def test_xet_brings_files_there_and_back(hub, sandbox, code):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", XET_FILES)
    over_xet(hub, code)
    assert repo.files == XET_FILES and len(repo.commits) == 2
    assert (seen(hub, "PUT", "/xorb-uploads/"), seen(hub, "POST", "/info/lfs/")) == (1, 0)
    assert {chunk.scheme for xorb in hub.xet.xorbs.values() for chunk in xorb.chunks} == {0, 1, 2}

    over_xet(hub, PULL)
    assert all((sandbox / "copy" / path).read_bytes() == data for path, data in XET_FILES.items())
    assert seen(hub, "GET", "/xet/xorbs/") and seen(hub, "GET", "/resolve/") == 1  # config.json, which isn't large


def test_xet_serves_the_older_protocol_and_parts_of_files(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", XET_FILES)
    versions = {f"HF_XET_CLIENT_{name}_API_VERSION": "1" for name in ("SHARD", "RECONSTRUCTION")}
    parts = {f"HF_XET_RECONSTRUCTION_{name}_RECONSTRUCTION_FETCH_SIZE": "300kb" for name in ("MIN", "MAX")}
    over_xet(hub, PUSH + PULL, HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD="1", **versions, **parts)
    assert repo.files == XET_FILES
    assert all((sandbox / "copy" / path).read_bytes() == data for path, data in XET_FILES.items())
    assert seen(hub, "POST", "/v1/xorbs/") == seen(hub, "POST", "/v1/shards") == 1
    assert seen(hub, "GET", "/v1/reconstructions/") > 30


def test_xet_sends_only_what_is_new(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": RANDOM})
    over_xet(hub, PUSH)
    before = xorb_bytes(hub)
    over_xet(hub, PUSH)
    assert (len(repo.commits), len(hub.xet.xorbs), xorb_bytes(hub)) == (2, 1, before)
    changed = RANDOM[:1_000_000] + b"changed" + RANDOM[1_000_000:]
    write(sandbox / "out", {"a.bin": changed})
    over_xet(hub, PUSH)
    assert repo.files == {"a.bin": changed} and xorb_bytes(hub) - before < 300_000
    write(sandbox / "out", {"half-shared.bin": XET_FILES["half-shared.bin"]})
    over_xet(hub, PUSH)
    assert repo.files["half-shared.bin"] == XET_FILES["half-shared.bin"] and xorb_bytes(hub) - before < 2_000_000


def test_another_machine_asks_before_it_sends_a_xorb(hub, sandbox):
    hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": RANDOM})
    for home in ("here", "there"):
        over_xet(hub, PUSH, HF_HOME=str(sandbox / home))
    assert (seen(hub, "POST", "/xorb-grants/"), seen(hub, "PUT", "/xorb-uploads/")) == (2, 1)


def test_files_move_between_xet_and_plain_clients(hub, sandbox):
    hub.add_repo("model", REPO, {"seed.bin": RANDOM})
    write(sandbox / "out", {"a.bin": FLOATS})
    over_xet(hub, PUSH)
    copy = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=sandbox / "plain"))
    assert (copy / "a.bin").read_bytes() == FLOATS and (copy / "seed.bin").read_bytes() == RANDOM
    push(hub, sandbox / "lfs", files={"lfs.bin": WEIGHTS})
    over_xet(hub, PULL)
    for path, data in {"a.bin": FLOATS, "seed.bin": RANDOM, "lfs.bin": WEIGHTS}.items():
        assert (sandbox / "copy" / path).read_bytes() == data
    assert seen(hub, "GET", "/xet/v2/reconstructions/") == 2  # what came by LFS goes as it came


def test_a_pull_request_over_xet(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": FLOATS})
    folder = PUSH_FOLDER.replace(")", ", create_pr=True, commit_message='Please')")
    over_xet(hub, PUSH.replace('"Push"', '"Please", create_pr=True') + folder)
    assert [request.files for request in repo.pull_requests] == [{"a.bin": FLOATS}] * 2
    assert len(repo.commits) == 1 and len(hub.xet.xorbs) == 1


def test_xet_wants_the_token_that_it_handed_out(hub):
    hub.add_repo("model", REPO)
    route = f"{hub.url}/api/models/{REPO}/xet-{{}}-token/main"
    assert httpx.get(route.format("write"), headers={"Authorization": f"Bearer {READ}"}).status_code == 403
    handed = httpx.get(route.format("read"), headers={"Authorization": f"Bearer {READ}"}).json()
    for token, status in [("xet_unknown", 401), (WRITE, 401), (handed["accessToken"], 403)]:
        for part in ("v1/shards", "v2/shards", f"v1/xorbs/default/{'0' * 64}", f"v1/xorb-grants/default/{'0' * 64}"):
            sent = httpx.post(f"{handed['casUrl']}/{part}", headers={"Authorization": f"Bearer {token}"}, content=b"")
            assert sent.status_code == status


def test_a_shard_that_lies_is_refused(hub):
    repo = hub.add_repo("model", REPO)
    token = httpx.get(f"{hub.url}/api/models/{REPO}/xet-write-token/main", headers={"Authorization": f"Bearer {WRITE}"})
    client = httpx.Client(base_url=hub.xet.url, headers={"Authorization": f"Bearer {token.json()['accessToken']}"})
    client.post(f"/v1/xorbs/default/{'01' * 32}", content=struct.pack("<2I", 5 << 8, 5 << 8) + b"hello")

    def shard(xorb: bytes, content: bytes) -> bytes:
        file = struct.pack("<32s2I8x", b"\x02" * 32, 1 << 30, 1) + struct.pack("<32s4x3I", xorb, 5, 0, 1)
        words = struct.unpack(">4Q", hashlib.sha256(content).digest())
        return bytes(48) + file + struct.pack("<4Q16x", *words) + (b"\xff" * 32 + bytes(16)) * 2

    good, missing = b"\x01" * 32, b"\x03" * 32
    for xorb, content, status in [(good, b"other", 400), (missing, b"hello", 400), (good, b"hello", 200)]:
        assert not repo.lfs
        assert client.post("/v2/shards", content=shard(xorb, content)).status_code == status
    assert repo.lfs == {hashlib.sha256(b"hello").hexdigest()}


def test_xet_tries_again_after_passing_faults(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": FLOATS})
    uploads = ["-write-token/", "/xorb-grants/", "/xorb-uploads/", "/xorb-commits/", "/shards"]
    parts = [*uploads, "-read-token/", "/reconstructions/", "/xet/xorbs/"]
    hub.faults += [Fault("*", part, status) for part in parts for status in (500, "drop")]
    hub.faults += [Fault("*", part, delay=0.1) for part in parts]
    over_xet(hub, PUSH + PULL)
    assert repo.files == {"a.bin": FLOATS} and (sandbox / "copy" / "a.bin").read_bytes() == FLOATS
    assert not any(fault.times for fault in hub.faults)


TRY = """
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
for _ in range({attempts}):
    try:
        {call}
        print("done")
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""
COMMIT = f"HfApi().create_commit('{REPO}', [CommitOperationAdd('a.bin', 'out/a.bin')], commit_message='x')"
DOWNLOAD = f"hf_hub_download('{REPO}', 'a.bin', force_download=True)"


def attempts(hub: HubServer, call: str, faults: list[Fault]) -> list[str]:
    """What happened at each of the faults, one of which each call meets, and then without."""
    hub.faults += faults
    return over_xet(hub, TRY.format(attempts=len(faults) + 1, call=call)).splitlines()


def test_xet_gives_up_an_upload_that_is_refused(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": FLOATS})
    routes = [("GET", "-write-token/"), ("POST", "/xorb-grants/"), ("POST", "/xorb-commits/"), ("POST", "/shards")]
    faults = [Fault(*route, status) for route in routes for status in (401, 403, 409)]
    *refused, last = attempts(hub, COMMIT, faults)
    for fault, error in zip(faults, refused, strict=True):
        assert error.startswith(
            f"ConnectionError Network error: Request error: HTTP status client error ({fault.status}"
        )
    assert last == "done" and repo.files == {"a.bin": FLOATS} and len(repo.commits) == 2


def test_xet_gives_up_an_upload_after_six_tries(hub, sandbox):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": FLOATS})
    routes = ["-write-token/", "/xorb-grants/", "/xorb-commits/", "/shards"]
    faults = [Fault("*", route, status, times=6) for route in routes for status in (429, 503, "drop")]
    *refused, last = attempts(hub, COMMIT, faults)
    texts = ["Rate limited: Request error", "Server error: Request error", "Network error: Request middleware error"]
    for text, error in zip(texts * 4, refused, strict=True):
        assert error.startswith(f"ConnectionError {text}")
    assert last == "done" and repo.files == {"a.bin": FLOATS} and len(repo.commits) == 2


def test_xet_gives_up_a_download(hub):
    hub.add_repo("model", REPO, {"a.bin": FLOATS})
    refused = [Fault("GET", route, status) for route in ("/reconstructions/", "/xet/xorbs/") for status in (401, 409)]
    failed = [Fault("GET", route, 503, times=6) for route in ("/reconstructions/", "/xet/xorbs/")]
    *errors, last = attempts(hub, DOWNLOAD, refused + failed)
    assert last == "done" and len(errors) == 6
    assert all(
        error.startswith("RuntimeError Task error: File reconstruction error: CAS Client Err") for error in errors
    )


@pytest.mark.parametrize("status", [401, 404, 500, "drop"])
def test_xet_sends_a_xorb_itself_where_its_grant_fails(hub, sandbox, status):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": FLOATS})
    hub.faults.append(Fault("PUT", "/xorb-uploads/", status, times=math.inf))
    over_xet(hub, PUSH)
    assert repo.files == {"a.bin": FLOATS} and seen(hub, "POST", "/v1/xorbs/") == 1


@pytest.mark.parametrize("code", [PUSH, PUSH_FOLDER], ids=["create_commit", "upload_folder"])
def test_a_repeated_push_over_xet_sends_what_is_missing(hub, sandbox, code):
    repo = hub.add_repo("model", REPO)
    write(sandbox / "out", {"a.bin": numpy.random.default_rng(0).bytes(100_000_000)})  # two xorbs
    hub.faults += [Fault("PUT", "/xorb-uploads/"), Fault("*", "/xorb-uploads/|/v1/xorbs/", "drop", times=math.inf)]
    with pytest.raises(AssertionError, match="ConnectionError: Network error"):
        over_xet(hub, code, HF_XET_FIXED_UPLOAD_CONCURRENCY="1")
    assert (len(hub.xet.xorbs), len(repo.commits)) == (1, 1)
    hub.faults.clear()
    hub.requests.clear()
    over_xet(hub, code)
    assert seen(hub, "PUT", "/xorb-uploads/") == 1 and len(hub.xet.xorbs) == 2
    assert repo.files["a.bin"] == (sandbox / "out" / "a.bin").read_bytes() and len(repo.commits) == 2


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
