"""Tokens: where they are found, who they belong to, what is stored, and that none ever gets out.

The services are on loopback and the clients real; only Kaggle's own package has a stand-in, as it
exists in its notebooks alone. Every token here holds MARK, so that a leak is found.
"""

import base64
import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SAMPLE, SCRIPT, Done
from published import whoami_auth
from servers.base import Fault
from servers.hub import HubServer
from servers.kaggle import KaggleServer
from servers.wandb_server import WandbServer
from terminal import typed

import finetune_r1
from finetune_r1 import ModelConfig, UserError

MARK = f"leak{secrets.token_hex(6)}"  # new each time, so that nothing else here holds it
STAND_INS = Path(__file__).parent / "stand_ins"
ALWAYS = math.inf
NOTEBOOK = f"{MARK}notebook"
MINUTES = 300


def token(owner: str) -> str:
    return f"hf_{MARK}{owner}"


def key(owner: str) -> str:
    return f"{MARK}{owner}".ljust(40, "0")


READ = token("reader")

# ------------------------------------------------------------------------ where they are found


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty home and working folder for this process; `put(place, name, value)` fills them."""
    from huggingface_hub import constants

    stored = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    monkeypatch.chdir(tmp_path)
    for name in (*finetune_r1.HUB_TOKENS, *finetune_r1.WANDB_KEYS):
        # Set and removed, so that what the code exports is removed after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    caches = finetune_r1.load_dotenv, finetune_r1.export_hub_token
    for cached in caches:
        cached.cache_clear()
    with KaggleServer(NOTEBOOK) as kaggle:

        def put(place: str, name: str, value: str) -> None:
            if place == "environment":
                monkeypatch.setenv(name, value)
            elif place == ".env":
                with Path(".env").open("a") as file:
                    file.write(f"{name}={value}\n")
            elif place == "stored":
                stored.write_text(value)
            else:
                kaggle.secrets[name] = value
                monkeypatch.syspath_prepend(STAND_INS)
                monkeypatch.setenv("KAGGLE_URL_BASE", kaggle.url)
                monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", NOTEBOOK)

        yield put
    sys.modules.pop("kaggle_secrets", None)
    for cached in caches:
        cached.cache_clear()


SOURCES = """
                                                   ->
environment HF_TOKEN=hf_a | .env HF_TOKEN=hf_b     -> hf_a HF_TOKEN (environment or .env)
environment HF_TOKEN= | .env HF_TOKEN='hf_b' # me  -> hf_b HF_TOKEN (environment or .env)
kaggle HUGGINGFACE_TOKEN="hf_c" | stored file=hf_d -> hf_c HUGGINGFACE_TOKEN (Kaggle's secrets)
environment HF_TOKEN=' ' | stored file=hf_d        -> hf_d an earlier log-in
""".strip("\n")


@pytest.mark.parametrize("line", SOURCES.splitlines(), ids=str.strip)
def test_export_hub_token_takes_the_first_source_that_has_a_token(places, line):
    planted, _, expected = line.partition("->")
    for entry in filter(str.strip, planted.split("|")):
        place, _, assignment = entry.strip().partition(" ")
        places(place, *assignment.split("=", 1))
    found, _, source = expected.strip().partition(" ")
    secret = finetune_r1.export_hub_token()
    assert secret == ((found, source) if found else None)
    if found and source != "an earlier log-in":
        assert os.environ["HF_TOKEN"] == found, "for the libraries"


@pytest.mark.parametrize("around", [' "{}"\r\n', "“{}”", "Bearer {}"])
def test_make_secret_strips_what_is_copied_along(around):
    assert finetune_r1.make_secret(around.format("hf_abcd-ef"), "here") == ("hf_abcd-ef", "here")


def test_env_example_as_it_is_sets_nothing(places):
    Path(".env").write_text((SCRIPT.parent / ".env.example").read_text() + "WANDB_MODE=\n")
    before = dict(os.environ)
    finetune_r1.load_dotenv()
    assert {name for name in os.environ if name not in before} <= {
        *("WANDB_X_GRAPHQL_RETRY_MAX", "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS"),
        "WANDB_HTTP_TIMEOUT",
    }


# --------------------------------------------------------------------------------- whose it is

WRITES = ["repo.content.read", "repo.write"]


@pytest.mark.parametrize(
    ("auth", "role", "can_push"),
    [
        (whoami_auth("fineGrained", [("user", "a", WRITES[:1])]), "fineGrained", False),
        (whoami_auth("fineGrained", [("org", "lab", WRITES)]), "fineGrained", True),
        (whoami_auth("oauth"), "browser log-in", True),
    ],
)
def test_hub_account_says_name_source_role_and_whether_it_can_push(hub, auth, role, can_push):
    body = {"name": "alice", "auth": auth}
    hub.faults = [Fault("GET", "whoami", status=200, times=ALWAYS, body=body)]
    account = finetune_r1.hub_account(finetune_r1.Secret("hf_writetoken", "here"))
    assert account == {"name": "alice", "source": "here", "role": role, "can_push": can_push}


@pytest.fixture
def patient_hub(hub, monkeypatch):
    """The Hub, asked by the script's own client."""
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    huggingface_hub.set_client_factory(finetune_r1.hub_client)
    yield hub
    huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize("status", [429, 500])
def test_one_failed_answer_of_the_hub_is_asked_for_again(patient_hub, status):
    patient_hub.faults = [Fault("GET", "whoami", status), Fault("POST", "repos/create", status)]
    secret = finetune_r1.Secret("hf_writetoken", "here")
    assert finetune_r1.hub_account(secret)["name"] == "alice"
    import huggingface_hub

    huggingface_hub.create_repo("alice/model", token=secret.value)
    assert ("model", "alice/model") in patient_hub.repos


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (Fault("GET", "whoami", 401, ALWAYS), "public models"),
        (Fault("GET", "whoami", 429, ALWAYS), "wait a few minutes"),
        (Fault("GET", "whoami", "drop", ALWAYS), "Hub not reached"),
    ],
    ids=["refused", "busy", "dropped"],
)
def test_hub_account_without_a_valid_answer_has_advice(patient_hub, fault, hint):
    patient_hub.faults = [fault]
    with pytest.raises(finetune_r1.httpx.HTTPError) as caught:
        finetune_r1.hub_account(finetune_r1.Secret("hf_writetoken", "here"))
    assert hint in finetune_r1.advice(caught.value) and "hf_writetoken" not in str(caught.value)


def test_hub_client_sets_limits_where_the_library_sets_none(patient_hub, monkeypatch):
    import httpx
    import huggingface_hub

    limits = []
    send = httpx.Client.send

    def record(self, request, **options):
        limits.append((request.method, request.extensions["timeout"]["read"]))
        return send(self, request, **options)

    monkeypatch.setattr(httpx.Client, "send", record)
    huggingface_hub.set_client_factory(finetune_r1.hub_client)
    patient_hub.add_repo("model", "alice/model")
    add = huggingface_hub.CommitOperationAdd("a.txt", b"1")
    options = {"commit_message": "Push", "token": "hf_writetoken"}
    huggingface_hub.create_commit("alice/model", [add], **options)
    assert ("POST", 100) in limits and {None}.isdisjoint(limit for _, limit in limits)


def test_hub_client_that_cannot_be_built_is_a_user_error_and_socks_is_built(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nothing://u:password@127.0.0.1:1")
    with pytest.raises(UserError, match="cannot set up HTTP") as caught:
        finetune_r1.hub_client()
    assert "password" not in str(caught.value)
    pytest.importorskip("socksio")
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    finetune_r1.hub_client().close()


# ------------------------------------------------------------------------------ the next step


def http_error(status: int, name: str = "HfHubHTTPError") -> Exception:
    import httpx
    from huggingface_hub import errors

    request = httpx.Request("GET", "http://127.0.0.1")
    return getattr(errors, name)("failed", response=httpx.Response(status, request=request))


def test_advice_goes_by_class_and_status():
    import torch
    from huggingface_hub import errors

    def says(error: Exception) -> str:
        return finetune_r1.advice(error) or ""

    assert "request access" in says(http_error(403, "GatedRepoError"))
    assert "--model" in says(http_error(401, "RepositoryNotFoundError"))
    assert "public models" in says(http_error(401)) and "may write" in says(http_error(403))
    assert "wait" in says(http_error(429)) and "busy" in says(http_error(502))
    assert "HF_HUB_OFFLINE" in says(errors.OfflineModeIsEnabled("offline"))
    assert "--micro-batch" in says(torch.OutOfMemoryError("CUDA out of memory"))
    assert "can write" in says(PermissionError(13, "Permission denied"))
    assert "UTF-8" in says(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"))
    for full in (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed"),
    ):
        assert "disk is full" in says(full)
    for bug in (RuntimeError("bug: HTTP 500 in a text"), KeyError("OSError"), TypeError("no")):
        assert finetune_r1.advice(bug) is None


# ---------------------------------------------------------------------------- machine and GPU


@pytest.mark.parametrize(
    ("codes", "runs", "refused"),
    [
        (["sm_75", "sm_80", "sm_90"], [(7, 5), (8, 0), (8, 6), (9, 0)], [(6, 0), (7, 0), (10, 0)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(12, 0)]),
        (["sm_75", "compute_80"], [(7, 5), (8, 0), (12, 0)], [(6, 1)]),
    ],
)
def test_check_gpu_refuses_a_gpu_that_torch_has_no_code_for(monkeypatch, codes, runs, refused):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    for capability in runs + refused:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=capability: gpu)
        with pytest.raises(UserError) if capability in refused else contextlib.nullcontext():
            finetune_r1.check_gpu()


@pytest.fixture
def small_model(tmp_path):
    """A folder with as much of a model as `doctor` looks at."""
    folder = tmp_path / "small-10M"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return ModelConfig(model=str(folder))


@pytest.mark.parametrize(
    ("value", "token", "verdict"),
    [
        ("hf_readtoken", "alice", "ready to train, not to push"),
        ("hf_writetoken", "alice", "ready to train and push"),
        ("hf_unknown", "Invalid user token", "ready to train, not to push"),
    ],
)
def test_doctor_says_push_is_possible_only_with_a_token_that_may_write(
    places, hub, small_model, monkeypatch, value, token, verdict
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    places("environment", "HF_TOKEN", value)
    report = finetune_r1.doctor(small_model)
    assert token in str(report["token"]) and report["verdict"] == verdict


def test_doctor_names_what_to_fix(places, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    free = SimpleNamespace(free=5 * 2**30)
    monkeypatch.setattr(finetune_r1.shutil, "disk_usage", lambda path: free)
    report = finetune_r1.doctor(ModelConfig(model=str(tmp_path / "nothing-1M")))
    failed = {name for name, found in report.items() if "FAIL" in str(found)}
    assert failed == {"machine", "model", "token"} and report["verdict"] == "not ready"
    assert all(report[name][1].startswith("fix: ") for name in failed)


def test_doctor_ends_with_ready_or_an_exit_code(cli, small_model):
    """The Hub of the tests is not reached."""
    done = cli("doctor", "--model", small_model.model, WANDB_DISABLED="true")
    assert done.code == 0 and "token:            FAIL" in done.out and "fix: " in done.out
    assert done.out.endswith("ready to train, not to push\n")
    done = cli("doctor", WANDB_DISABLED="true")
    assert done.code == 1 and "model:            FAIL" in done.out
    assert done.out.endswith("not ready\n")


# ------------------------------------------------------------------------------ login, stored


def without_empty(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if value}


def python(cwd: Path, environment: dict[str, str], *arguments: object) -> Done:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=without_empty({**os.environ, **environment}),
        input="",
        capture_output=True,
        text=True,
        timeout=MINUTES,
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Machine:
    """An empty home and an empty working folder, and the services that its tools talk to."""

    def __init__(self, folder: Path, hub: HubServer, wandb: WandbServer, kaggle: KaggleServer):
        self.hub = hub
        self.wandb = wandb
        self.kaggle = kaggle
        self.home = folder / "home"
        self.work = folder / "work"
        self.hub_token = self.home / "hf" / "token"
        self.netrc = self.home / "netrc"
        self.dotenv = self.work / ".env"
        self.work.mkdir(parents=True)
        self.hub_token.parent.mkdir(parents=True)
        self.environment = {
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "NETRC": str(self.netrc),
            "HF_ENDPOINT": hub.url,
            "WANDB_BASE_URL": wandb.url,
            "HF_HUB_DISABLE_TELEMETRY": "",  # the script's own default counts
            "CI": "",  # where TRL sends none
        }

    def plant_everywhere(self, token: str) -> None:
        """A token and a key in .env, on Kaggle and stored."""
        self.dotenv.write_text(f"HF_TOKEN={token}\nWANDB_API_KEY={key('dotenv')}\n")
        self.kaggle.secrets = {"HUGGINGFACE_TOKEN": token, "wandb": key("kaggle")}
        self.environment["PYTHONPATH"] = str(STAND_INS)
        self.environment["KAGGLE_URL_BASE"] = self.kaggle.url
        self.environment["KAGGLE_USER_SECRETS_TOKEN"] = NOTEBOOK
        self.hub_token.write_text(token)
        host = self.wandb.url.removeprefix("http://")
        self.netrc.write_text(f"machine {host} login user password {key('stored')}\n")

    def login(self, **environment: str) -> Done:
        done = python(self.work, self.environment | environment, SCRIPT, "login", "--json")
        assert MARK not in done.out + done.err and "Traceback" not in done.err
        return done


@pytest.fixture
def machine(tmp_path):
    hub = HubServer(tokens={token("writer"): ("writer", "write")})
    wandb = WandbServer(keys={key("writer"): "writer"})
    with hub, wandb, KaggleServer(NOTEBOOK) as kaggle:
        yield Machine(tmp_path, hub, wandb, kaggle)


def test_login_stores_both_beside_what_was_there(machine):
    others = "machine example.org login me password other\n"
    machine.netrc.write_text(others)
    given = {"HF_TOKEN": f'"{token("writer")}"', "WANDB_API_KEY": f" {key('writer')}\n"}
    first = json.loads(machine.login(**given).out)
    assert first["hugging_face"]["source"] == "HF_TOKEN (environment or .env)"
    assert first["wandb"] == {"name": "writer", "source": "WANDB_API_KEY (environment or .env)"}
    assert others in machine.netrc.read_text() and machine.hub_token.read_text() == token("writer")
    files = [path for path in machine.home.parent.rglob("*") if path.is_file()]
    holders = {path.name for path in files if MARK.encode() in path.read_bytes()}
    assert holders == {"token", "stored_tokens", "netrc"}

    # The next time they are found there.
    second = json.loads(machine.login().out)
    assert second["hugging_face"]["source"] == "an earlier log-in"
    assert second["wandb"] == {"name": "writer", "source": "an earlier log-in"}


def test_login_on_a_terminal_asks_for_both_and_shows_neither(machine):
    answers = [("settings/tokens.*: ", token("writer")), ("authorize.*: ", key("writer"))]
    lines = [(asked, f"{answer}\n") for asked, answer in answers]
    code, shown = typed(machine.work, ["login"], *lines, **machine.environment)
    assert code == 0 and MARK not in shown and shown.count("source the prompt") == 2
    assert machine.hub_token.read_text() == token("writer")
    assert key("writer") in machine.netrc.read_text()


def test_login_keeps_nothing_that_is_missing_or_refused(machine):
    missing = machine.login(WANDB_MODE="disabled")
    assert missing.code == 1 and "set HF_TOKEN" in missing.err
    refused = machine.login(HF_TOKEN=token("stranger"))
    assert refused.code == 1 and "HF_TOKEN (environment" in refused.err
    assert "Invalid user token" in refused.err and not machine.hub_token.exists()
    writer = {"HF_TOKEN": token("writer"), "WANDB_API_KEY": key("writer")}
    dead = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    for fault in ({"WANDB_API_KEY": key("stranger")}, {"WANDB_API_KEY": key("")[:39]}, dead):
        done = machine.login(**{**writer, **fault})
        assert done.code == 1 and "W&B, WANDB_API_KEY (environment" in done.err
    assert not machine.netrc.exists()


# ------------------------------------------------------------------------- none ever gets out

ENCODED = base64.b64encode(f"api:{MARK}".encode())[:20]  # as W&B's client sends its key


def shows(data: bytes) -> bool:
    return MARK.encode() in data or ENCODED in data


class Recording:
    """A server that keeps all that it received, less the headers that a token belongs into."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.received = []

    def take_fault(self, request):
        headers = [
            pair for pair in request.headers.items() if "authorization" not in pair[0].lower()
        ]
        record = bytearray(repr((request.method, request.path, request.query, headers)).encode())
        self.received.append(record)
        chunks = request.chunks

        def recorded():
            for data in chunks():
                record.extend(data)
                yield data

        request.chunks = recorded
        return super().take_fault(request)


class RecordingHub(Recording, HubServer):
    pass


class RecordingWandb(Recording, WandbServer):
    pass


IN_ONE_PROCESS = f"""
import json, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import finetune_r1
for arguments in json.loads(sys.argv[1]):
    try:
        finetune_r1.app(arguments)
    except SystemExit as end:
        assert not end.code, arguments
"""


class Commands(Machine):
    """Every command, well and badly: what each said, and all processes' arguments meanwhile."""

    def __init__(self, model: Path, talkative: HubServer, *arguments):
        super().__init__(*arguments)
        self.talkative = talkative
        self.done: dict[str, Done] = {}
        self.processes: set[bytes] = set()
        self.ended = threading.Event()
        self.environment["OMP_NUM_THREADS"] = "1"  # two commands at a time, each on a core
        self.model = ["--model", model]
        self.rows = [*self.model, "--dataset", SAMPLE, "--split", "train[:12]"]
        self.rows += ["--max-seq-length", 512]
        self.train = ["train", *self.rows, "--eval-rows", 2, "--effective-batch", 2]
        self.train += ["--warmup-steps", 0, "--learning-rate", 0.02, "--max-new-tokens", 4]

    def do(self, name: str, *arguments: object, **environment: str) -> None:
        self.done[name] = python(self.work, self.environment | environment, SCRIPT, *arguments)

    def train_well(self) -> None:
        where = ["--max-steps", 2, "--run-dir", "runs/a"]
        self.do("train", *self.train, *where, HF_TOKEN=READ)

    def train_badly(self) -> None:
        # Ctrl-C in the first steps, and a proxy that is none.
        broken = {"HF_TOKEN": READ, "ALL_PROXY": "nothing://127.0.0.1:1"}
        arguments = [*self.train, "--max-steps", 9999, "--run-dir", "runs/b"]
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, arguments)],
            cwd=self.work,
            env=without_empty({**os.environ, **self.environment, **broken}),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        for line in process.stderr:
            said += line
            if "step 00001" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=MINUTES)
        self.done["train, Ctrl-C"] = Done(process.returncode, out, said + err)

        # A key that W&B refuses, and a user who allows telemetry.
        where = ["--max-steps", 1, "--run-dir", "runs/c"]
        stranger = {"WANDB_API_KEY": key("stranger"), "HF_ENDPOINT": self.talkative.url}
        self.do("train, refused key", *self.train, *where, **stranger, HF_HUB_DISABLE_TELEMETRY="0")

    def ask(self) -> None:
        """One after another in one process, as the imports take the longest."""
        run = ["--run", "runs/a", "--max-new-tokens", 4]
        lines = [
            ["infer", "Why?", *run],
            ["eval", *run, "--answers", 1],
            ["load", *self.model],
            ["format", *self.rows],
            ["doctor", *self.model],
            ["login"],
        ]
        typed = json.dumps([[str(word) for word in line] for line in lines])
        self.done["the rest"] = python(self.work, self.environment, "-c", IN_ONE_PROCESS, typed)

    def publish(self) -> None:
        writer = {"HF_TOKEN": token("writer"), "WANDB_MODE": "disabled"}
        stranger = {"HF_TOKEN": token("stranger"), "WANDB_MODE": "disabled"}
        push = ["push", "--run", "runs/a", "--repo", "writer/model", "--base-model", "org/base"]
        self.do("push, 401", *push, **stranger)
        self.hub.faults = [Fault("POST", "/commit/", status=500, times=ALWAYS)]
        self.do("push, 500", *push, **writer)
        self.hub.faults = []
        self.do("push", *push, **writer)
        self.do("load, 401", "load", "--model", "no/such-135M", **stranger)

    def watch(self) -> None:
        while not self.ended.wait(0.2):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    self.processes.add(process.read_bytes())


@pytest.fixture(scope="module")
def commands(tiny_r1, tmp_path_factory):
    """On a machine with a token in every place, two commands at a time."""
    hub = RecordingHub(tokens={READ: ("reader", "read"), token("writer"): ("writer", "write")})
    talkative = HubServer(tokens={READ: ("reader", "read")})
    wandb = RecordingWandb(keys={key(name): name for name in ("dotenv", "stored", "kaggle")})
    with hub, talkative, wandb, KaggleServer(NOTEBOOK) as kaggle, ThreadPoolExecutor(3) as pool:
        folder = tmp_path_factory.mktemp("leaks")
        commands = Commands(tiny_r1, talkative, folder, hub, wandb, kaggle)
        commands.plant_everywhere(READ)
        pool.submit(commands.watch)
        try:
            for at_once in (
                (commands.train_well, commands.train_badly),
                (commands.ask,),
                (commands.publish,),
            ):
                for chain in [pool.submit(chain) for chain in at_once]:
                    chain.result()
        finally:
            commands.ended.set()
        yield commands


def test_commands_do_their_work_with_tokens_all_around(commands):
    failing = {"push, 401": 1, "push, 500": 1, "load, 401": 1, "train, Ctrl-C": 130}
    for name, done in commands.done.items():
        code = failing.get(name, 0)
        assert done.code == code and "Traceback" not in done.err, f"{name}: {done.err}"
    assert "model-00004-of-00004.safetensors" in commands.hub.repos["model", "writer/model"].files
    assert "training without W&B" in commands.done["train, refused key"].err
    runs = commands.wandb.runs.values()
    assert [(run.entity, run.finished) for run in runs] == [("dotenv", True)] * 2
    assert sorted(run.exitcode for run in runs) == [0, 130]


def test_train_sends_telemetry_only_if_the_user_turns_it_on(commands):
    def sent(hub: HubServer) -> list[str]:
        return [path for _, path in hub.requests if "telemetry" in path]

    assert sent(commands.hub) == [] and sent(commands.talkative)


def test_no_command_shows_a_token(commands):
    for name, done in commands.done.items():
        assert not shows((done.out + done.err).encode()), name


def test_no_file_holds_a_token_but_those_it_was_put_into(commands):
    tokens = commands.hub_token
    own = {commands.dotenv, tokens, tokens.with_name("stored_tokens"), commands.netrc}
    files = {path for path in commands.work.parent.rglob("*") if path.is_file()} - own
    assert len([path for path in files if path.suffix == ".wandb"]) >= 2
    assert commands.work / "runs/a/run.json" in files
    assert [str(path) for path in files if shows(path.read_bytes())] == []


def test_no_service_receives_a_token_but_in_the_header_for_it(commands):
    received = [*commands.hub.received, *commands.wandb.received]
    received += [content for repo in commands.hub.repos.values() for content in repo.files.values()]
    received += [content for run in commands.wandb.runs.values() for content in run.files.values()]
    assert len(received) > 40
    assert [bytes(data)[:2000] for data in received if shows(data)] == []


def test_no_process_has_a_token_among_its_arguments(commands):
    names = b" ".join(commands.processes)
    assert b"wandb-core" in names and b"finetune_r1.py" in names and not shows(names)
