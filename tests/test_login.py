"""Tokens: where they are found, how soon they are checked, what is kept of them, and that none ever gets out.

The services are on loopback, the clients real; only Kaggle's own package has a stand-in, as it exists in its
notebooks alone. Every token here holds MARK, so whatever shows one is found out.
"""

import base64
import contextlib
import json
import math
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SAMPLE, SCRIPT, Done
from published import whoami_auth
from servers.base import Fault
from servers.hub import HubServer
from servers.kaggle import KaggleServer
from servers.wandb_server import WandbServer
from terminal import typed

MARK = f"leak{secrets.token_hex(6)}"  # new each time, so that nothing else on this machine holds it
STAND_INS = Path(__file__).parent / "stand_ins"
SOURCES = {  # in the order in which they count
    "environment": ("HF_TOKEN in the environment", "WANDB_API_KEY in the environment"),
    "dotenv": ("HF_TOKEN in .env", "WANDB_API_KEY in .env"),
    "kaggle": ("HUGGINGFACE_TOKEN in Kaggle's secrets", "wandb in Kaggle's secrets"),
    "stored": ("an earlier log-in", "an earlier log-in"),
}
ALWAYS, NOWHERE = math.inf, "http://127.0.0.1:9"


def token(owner: str) -> str:
    return f"hf_{MARK}{owner}"


def key(owner: str) -> str:
    return f"{MARK}{owner}".ljust(40, "0")


READ, NOTEBOOK = token("reader"), f"{MARK}notebook"


def python(cwd: Path, environment: dict[str, str], *arguments: object, limit: int = 60) -> Done:
    command, everything = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    how = {"cwd": cwd, "env": everything, "input": "", "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=limit, **how)
    return Done(done.returncode, done.stdout, done.stderr)


class Machine:
    """An empty home and an empty working folder, and the services that its tools talk to."""

    def __init__(self, folder: Path, hub: HubServer, wandb: WandbServer, kaggle: KaggleServer):
        self.hub, self.wandb, self.kaggle = hub, wandb, kaggle
        self.home, self.work = folder / "home", folder / "work"
        self.hub_token, self.netrc = self.home / "hf" / "token", self.home / "netrc"
        self.dotenv = self.work / ".env"
        self.work.mkdir(parents=True)
        self.hub_token.parent.mkdir(parents=True)
        self.environment = {
            "HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "NETRC": str(self.netrc),
            "PYTHONPATH": "", "HF_ENDPOINT": hub.url, "WANDB_BASE_URL": wandb.url, "WANDB_MODE": "disabled",
        }  # fmt: skip

    def on_kaggle(self, **state: str) -> None:
        """Its package can be imported, and its service answers."""
        self.environment |= {"PYTHONPATH": str(STAND_INS), "KAGGLE_URL_BASE": self.kaggle.url}
        self.environment |= {"KAGGLE_USER_SECRETS_TOKEN": NOTEBOOK, **state}

    def plant(self, source: str, token: str, key: str = "") -> None:
        """Puts a token, and with `key` one for W&B, where it is looked for."""
        if source == "environment":
            self.environment |= {"HF_TOKEN": token, "WANDB_API_KEY": key}
        elif source == "dotenv":
            self.dotenv.write_text(f"HF_TOKEN={token}\nWANDB_API_KEY={key}\n")
        elif source == "kaggle":
            self.kaggle.secrets = {"HUGGINGFACE_TOKEN": token, **({"wandb": key} if key else {})}
            self.on_kaggle()
        else:
            self.hub_token.write_text(token)
            host = self.wandb.url.removeprefix("http://")
            self.netrc.write_text(f"machine {host} login user password {key}\n")

    def run(self, *arguments: object, **environment: str) -> Done:
        done = python(self.work, self.environment | environment, SCRIPT, *arguments)
        print(done.err)
        assert MARK not in done.out + done.err and "Traceback" not in done.err
        return done

    def login(self, **environment: str) -> dict[str, dict[str, object]]:
        done = self.run("login", "--json", **environment)
        assert done.code == 0
        return json.loads(done.out)

    def refused(self, *arguments: str, **environment: str) -> str:
        """What is said where the command ends with an error: the message and the next step."""
        done = self.run(*(arguments or ["login"]), **environment)
        assert (done.code, done.out) == (1, "") and "error:" in done.err and "next:" in done.err
        return done.err

    def typed(self, *answers: tuple[str, str]) -> tuple[int, str]:
        """`login` on a terminal, each answer typed when it is asked for: exit code, and all that was seen."""
        prompts = [(asked + ".*: ", answer) for asked, answer in answers]
        code, shown = typed(self.work, ["login"], *prompts, **self.environment)
        assert MARK not in shown
        return code, shown


@pytest.fixture
def machine(tmp_path):
    owners = [*SOURCES, "typed"]
    hub = HubServer(
        tokens={READ: ("reader", "read"), **{token(name): (name, "write") for name in owners}}
    )
    wandb = WandbServer(keys={key(name): name for name in owners})
    with hub, wandb, KaggleServer(NOTEBOOK) as kaggle:
        yield Machine(tmp_path, hub, wandb, kaggle)


# --------------------------------------------------------------------------------------- where they are found


@pytest.mark.parametrize("source", SOURCES)
def test_the_first_source_that_has_a_token_counts(machine, source):
    for later in list(SOURCES)[list(SOURCES).index(source) :]:
        machine.plant(later, token(later), key(later))
    who = machine.login(WANDB_MODE="online")
    assert (who["hugging_face"]["name"], who["wandb"]["name"]) == (source, source)
    assert (who["hugging_face"]["token"], who["wandb"]["key"]) == SOURCES[source]


@pytest.mark.parametrize("name", ["HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"])
def test_other_names_of_the_variable_are_known(machine, name):
    machine.environment[name] = token("environment")
    assert machine.login()["hugging_face"]["token"] == f"{name} in the environment"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_other_labels_than_the_recipes_are_known_on_kaggle(machine, name):
    machine.on_kaggle()
    machine.kaggle.secrets = {name: token("kaggle")}
    assert machine.login()["hugging_face"]["token"] == f"{name} in Kaggle's secrets"


def test_the_libraries_get_the_token_that_was_found(machine):
    machine.plant("kaggle", token("kaggle"))
    machine.hub.add_repo("model", "kaggle/private-135M", {"notes.txt": b""}, private=True)
    said = machine.refused("load", "--model", "kaggle/private-135M")
    assert "config.json" in said, "the repository was seen, and lacks this file"


def test_a_token_is_asked_for_on_a_terminal_and_is_not_shown_there(machine):
    code, shown = machine.typed(("settings/tokens", f"{token('typed')}\n"))
    assert code == 0 and "name: typed" in shown and "token: the prompt" in shown
    assert machine.hub_token.read_text() == token("typed")


def test_a_key_is_asked_for_on_a_terminal_and_is_not_shown_there(machine):
    machine.plant("environment", token("environment"))
    machine.environment["WANDB_MODE"] = "online"
    code, shown = machine.typed(("choice", "2\n"), ("hit enter", f"{key('typed')}\n"))
    assert code == 0 and "name: typed" in shown and "key: the prompt" in shown
    assert key("typed") in machine.netrc.read_text()


def test_without_a_token_and_a_terminal_the_message_says_what_to_set(machine):
    assert "set HF_TOKEN" in machine.refused()


def test_w_and_b_is_optional(machine):
    machine.plant("environment", token("environment"))
    assert "nobody" in machine.login(WANDB_MODE="online")["wandb"]["name"]


READS, WRITES = ["repo.content.read"], ["repo.content.read", "repo.write", "discussion.write"]


@pytest.mark.parametrize(
    ("auth", "role", "can_push"),
    [
        (whoami_auth("read"), "read", False),
        (whoami_auth("write"), "write", True),
        (whoami_auth("fineGrained", [("user", "alice", READS)]), "fineGrained", False),
        (
            whoami_auth("fineGrained", [("user", "alice", READS), ("org", "lab", WRITES)]),
            "fineGrained",
            True,
        ),
        (whoami_auth("oauth"), "browser log-in", True),
    ],
    ids=["read", "write", "fine, reads", "fine, writes", "browser"],
)
def test_login_says_whether_the_token_may_push(machine, auth, role, can_push):
    machine.plant("environment", token("environment"))
    account = {"name": "alice", "auth": auth}
    machine.hub.faults = [Fault("GET", "whoami", status=200, times=ALWAYS, body=account)]
    who = machine.login()["hugging_face"]
    assert (who["name"], who["role"], who["can_push"]) == ("alice", role, can_push)


@pytest.mark.parametrize(
    ("scope", "repo", "allowed"),
    [
        (("user", "alice", WRITES), "alice/m", True),
        (("user", None, WRITES), "alice/m", True),
        (("user", "alice", WRITES), "lab/m", False),
        (("org", "lab", WRITES), "lab/m", True),
        (("model", "alice/m", WRITES), "alice/m", True),
        (("model", "alice/other", WRITES), "alice/m", False),
        (("user", "alice", READS), "alice/m", False),
    ],
)
def test_a_fine_grained_token_may_push_where_its_scope_says_and_nowhere_else(
    machine, scope, repo, allowed
):
    """There is no run to push: with the right token that is what is said next."""
    machine.plant("environment", token("environment"))
    account = {"name": "alice", "auth": whoami_auth("fineGrained", [scope])}
    machine.hub.faults = [Fault("GET", "whoami", status=200, times=ALWAYS, body=account)]
    said = machine.refused("push", "--repo", repo)
    assert (f"can read, not write to {repo}" in said) == (not allowed)
    assert ("no finished run" in said) == allowed


def test_train_goes_on_with_a_token_and_without_a_network(machine):
    """Whether the token may push there is no telling offline; what stops it is the missing model."""
    machine.plant("stored", token("stored"))
    rows = ["--dataset", str(SAMPLE), "--split", "train[:2]"]
    said = machine.refused("train", "--model", str(machine.work), *rows, HF_HUB_OFFLINE="1")
    assert "has no config.json" in said


# ----------------------------------------------------------------------------------------------------- Kaggle


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"KAGGLE_USER_SECRETS_TOKEN": ""}, "CredentialError"),
        ({}, "BackendError"),
        ({"KAGGLE_URL_BASE": NOWHERE}, "ConnectionError"),
    ],
    ids=["without its variable", "not attached", "no network"],
)
def test_a_kaggle_that_gives_nothing_gets_a_note_and_the_stored_token_serves(machine, state, error):
    machine.plant("stored", token("stored"), key("stored"))
    machine.on_kaggle(**state)
    done = machine.run("login", "--json", WANDB_MODE="online")
    who = json.loads(done.out)
    assert (who["hugging_face"]["name"], who["wandb"]["name"]) == ("stored", "stored")
    notes = [line for line in done.err.splitlines() if line.startswith("note:")]
    assert len(notes) == 2 and all(error in note and "Add-ons > Secrets" in note for note in notes)


# ------------------------------------------------------------------------------------------------------ traps


def test_an_empty_variable_counts_as_absent(machine):
    machine.plant("dotenv", token("dotenv"), key("dotenv"))
    who = machine.login(HF_TOKEN="", WANDB_API_KEY=" ", WANDB_MODE="", HUGGINGFACE_TOKEN="")
    assert (who["hugging_face"]["token"], who["wandb"]["key"]) == SOURCES["dotenv"]


@pytest.mark.parametrize("source", ["dotenv", "kaggle"])
def test_an_empty_entry_counts_as_absent(machine, source):
    machine.plant("stored", token("stored"))
    machine.plant(source, "' '" if source == "dotenv" else "")
    assert machine.login()["hugging_face"]["token"] == "an earlier log-in"


def test_what_env_example_leaves_empty_stays_absent(machine):
    machine.dotenv.write_text((SCRIPT.parent / ".env.example").read_text() + "WANDB_MODE=\n")
    machine.plant("stored", token("stored"), key("stored"))
    del machine.environment["WANDB_MODE"]
    who = machine.login()
    assert (who["hugging_face"]["token"], who["wandb"]["key"]) == SOURCES["stored"]


@pytest.mark.parametrize("source", ["environment", "kaggle"])
def test_white_space_around_a_token_is_not_part_of_it(machine, source):
    machine.plant(source, f" {token(source)}\r\n", f"\t{key(source)} ")
    who = machine.login(WANDB_MODE="online")
    assert (who["hugging_face"]["name"], who["wandb"]["name"]) == (source, source)


@pytest.mark.parametrize(
    "letter", [" ", "\n", "é", "\N{ZERO WIDTH SPACE}"], ids=["space", "line", "é", "unseen"]
)
def test_a_token_with_a_letter_that_none_has_is_refused_by_its_source(machine, letter):
    machine.plant("environment", token(letter + "x"))
    assert SOURCES["environment"][0] in machine.refused()


@pytest.mark.parametrize("source", ["dotenv", "kaggle", "stored"])
def test_so_it_is_wherever_the_token_came_from(machine, source):
    machine.plant(source, token("é"))
    assert SOURCES[source][0] in machine.refused()


def test_so_it_is_when_it_was_typed(machine):
    code, shown = machine.typed(("settings/tokens", f"{token('é')}\n"))
    assert code == 1 and "the prompt" in shown and "next:" in shown


def test_so_is_a_key(machine):
    machine.plant("environment", token("environment"), key("é"))
    assert (
        SOURCES["environment"][1] in machine.refused(WANDB_MODE="online")
        and not machine.netrc.exists()
    )


@pytest.mark.parametrize("source", ["environment", "dotenv", "stored"])
def test_a_token_that_the_hub_does_not_know_is_refused_by_its_source_and_not_kept(machine, source):
    machine.plant(source, token("stranger"))
    said = machine.refused()
    assert "refused" in said and SOURCES[source][0] in said
    assert source == "stored" or not machine.hub_token.exists()


@pytest.mark.parametrize("key", [key("stranger"), key("")[:39]], ids=["unknown", "short"])
def test_a_key_that_w_and_b_does_not_take_is_refused_by_its_source_and_not_kept(machine, key):
    machine.plant("environment", token("environment"), key)
    said = machine.refused(WANDB_MODE="online")
    assert (
        "W&B" in said and SOURCES["environment"][1] in said and ("40+" in said) == (len(key) < 40)
    )
    assert not machine.netrc.exists()


def test_a_stored_key_that_w_and_b_does_not_take_is_refused_too_and_left_alone(machine):
    machine.plant("stored", token("stored"), key("stranger"))
    before = machine.netrc.read_text()
    assert SOURCES["stored"][1] in machine.refused(WANDB_MODE="online")
    assert machine.netrc.read_text() == before


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_w_and_b_is_not_asked_in_its_other_modes(machine, mode):
    machine.plant("environment", token("environment"), key("environment"))
    assert mode in machine.login(WANDB_MODE=mode)["wandb"]["name"]
    assert not machine.wandb.requests and not machine.netrc.exists()


def test_a_line_of_dotenv_that_is_none_is_passed_over(machine):
    entry = f"export HF_TOKEN={token('dotenv')} # mine"
    lines = ["\ufeff# by Windows", "no entry", "= =", entry, "WANDB_MODE='open"]
    machine.dotenv.write_text("\r\n".join(lines), encoding="utf-8")
    assert machine.login()["hugging_face"]["name"] == "dotenv"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "zero byte"])
def test_a_dotenv_that_is_no_plain_text_gets_a_message(machine, encoding):
    text = f"# clé\nHF_TOKEN={token('dotenv')}"
    machine.dotenv.write_bytes(
        f"{text}\0\n".encode() if encoding == "zero byte" else text.encode(encoding)
    )
    assert ".env" in machine.refused()


# --------------------------------------------------------------------------------------- within a few seconds


def soon(run):
    """What `run` returns, if it does within 15 seconds; a try more, for a machine that is busy."""
    for _ in range(2):
        started = time.perf_counter()
        answer = run()
        if time.perf_counter() - started < 15:
            return answer
    raise AssertionError("more than 15 seconds, twice")


def says_later(said: str) -> bool:
    """Whether the next step is to try again in a while."""
    return bool(re.search("later|again", said.rpartition("next:")[2]))


TROUBLE = {
    "closed": None,
    "slow": Fault("*", "", times=ALWAYS, delay=30),
    **{str(status): Fault("*", "", times=ALWAYS, status=status) for status in (429, 500)},
}


@pytest.mark.parametrize("fault", TROUBLE.values(), ids=TROUBLE)
def test_a_hub_in_trouble_is_left_within_seconds_and_the_token_is_not_blamed(machine, fault):
    machine.plant("environment", token("environment"))
    machine.hub.faults = [fault] if fault else []
    said = soon(lambda: machine.refused(HF_ENDPOINT=machine.hub.url if fault else NOWHERE))
    assert says_later(said) and "token" not in said.replace("HF_TOKEN", "")


@pytest.mark.parametrize("kind", ["closed", "slow", "500"])
def test_a_w_and_b_in_trouble_is_left_within_seconds_and_the_key_is_not_blamed(machine, kind):
    fault = TROUBLE[kind]
    machine.plant("environment", token("environment"), key("environment"))
    machine.wandb.faults = [fault] if fault else []
    here = {"WANDB_MODE": "online", "WANDB_BASE_URL": machine.wandb.url if fault else NOWHERE}
    said = soon(lambda: machine.refused(**here))
    assert "W&B" in said and says_later(said) and "rejected the key" not in said
    assert not machine.netrc.exists()


def test_a_hub_that_gets_slow_after_its_first_answer_is_left_within_seconds(machine):
    machine.plant("environment", token("environment"))

    def login() -> Done:
        machine.hub.faults = [
            Fault("GET", "whoami"),
            Fault("GET", "whoami", times=ALWAYS, delay=30),
        ]
        return machine.run("login")

    done = soon(login)
    assert done.code == 0 or "next:" in done.err


def test_a_page_instead_of_an_answer_is_not_taken_for_one(machine):
    """As from the log-in page of a hotel's network."""
    machine.plant("environment", token("environment"))
    machine.hub.faults = [
        Fault("GET", "whoami", status=200, times=ALWAYS, body=b"<html>Welcome!</html>")
    ]
    said = machine.refused()
    assert says_later(said) and "JSON object a line" not in said


def test_a_w_and_b_that_fails_after_some_answers_gets_a_message(machine):
    machine.plant("environment", token("environment"), key("environment"))
    served, failed = (
        Fault("POST", "graphql", times=3),
        Fault("POST", "graphql", times=ALWAYS, status=500),
    )
    machine.wandb.faults = [served, failed]
    assert says_later(machine.refused(WANDB_MODE="online"))


# --------------------------------------------------------------------------------------------- what is stored


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def test_what_login_stores_is_for_its_owner_alone_and_serves_the_next_time(machine):
    machine.plant("environment", token("environment"), key("environment"))
    machine.login(WANDB_MODE="online")
    stored = [machine.hub_token, machine.hub_token.with_name("stored_tokens"), machine.netrc]
    assert [(MARK in path.read_text(), mode(path)) for path in stored] == [(True, "0o600")] * 3
    files = [path for path in machine.home.parent.rglob("*") if path.is_file()]
    holders = [path for path in files if MARK.encode() in path.read_bytes()]
    assert sorted(holders) == sorted(stored), "and nowhere else"
    who = machine.login(WANDB_MODE="online", HF_TOKEN="", WANDB_API_KEY="")
    assert (who["hugging_face"]["token"], who["wandb"]["key"]) == SOURCES["stored"]
    assert (who["hugging_face"]["name"], who["wandb"]["name"]) == ("environment", "environment")


@pytest.mark.parametrize("before", [0o600, 0o644], ids=oct)
def test_what_was_stored_before_stays_and_is_for_its_owner_alone(machine, before):
    others = {
        machine.netrc: "machine example.org login me password other\n",
        machine.hub_token.with_name("stored_tokens"): "[other]\nhf_token = other\n\n",
    }
    for path, text in others.items():
        path.write_text(text)
        path.chmod(before)
    machine.plant("environment", token("environment"), key("environment"))
    machine.login(WANDB_MODE="online")
    for path, text in others.items():
        assert text in path.read_text() and MARK in path.read_text() and mode(path) == "0o600", (
            path.name
        )


# ----------------------------------------------------------------------------------------- none ever gets out

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
    """Every command, well and badly, each with what it said; and the arguments of all processes meanwhile."""

    run_a, to, online = ["--run", "runs/a"], ["--repo", "writer/model"], {"WANDB_MODE": "online"}

    def __init__(self, model: Path, *arguments):
        super().__init__(*arguments)
        self.done: dict[str, Done] = {}
        self.processes: set[bytes] = set()
        self.ended = threading.Event()
        self.environment["OMP_NUM_THREADS"] = "1"  # two commands at a time, each on a core
        self.model = ["--model", model]
        self.rows = [
            *self.model,
            "--dataset",
            SAMPLE,
            "--split",
            "train[:12]",
            "--max-seq-length",
            512,
        ]
        recipe = {
            "--eval-rows": 2,
            "--effective-batch": 2,
            "--warmup-steps": 0,
            "--learning-rate": 0.02,
            "--max-new-tokens": 4,
        }
        self.train = ["train", *self.rows, *(word for pair in recipe.items() for word in pair)]

    def do(self, name: str, *arguments: object, **environment: str) -> None:
        self.done[name] = python(
            self.work, self.environment | environment, SCRIPT, *arguments, limit=180
        )

    def do_all(self, name: str, *commands: list[object], **environment: str) -> None:
        """One after another in one process, as the imports take the longest."""
        typed = json.dumps([[str(word) for word in command] for command in commands])
        arguments = ["-c", IN_ONE_PROCESS, typed]
        self.done[name] = python(self.work, self.environment | environment, *arguments, limit=180)

    def interrupt(self, name: str, *arguments: object, after: str, **environment: str) -> None:
        """As Ctrl-C does, once the command has said `after`."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, arguments)], cwd=self.work, start_new_session=True, text=True,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        said = ""
        while after not in said and (line := process.stderr.readline()):
            said += line
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        self.done[name] = Done(process.returncode, out, said + err)

    def train_well(self) -> None:
        self.do(
            "train",
            *self.train,
            "--max-steps",
            2,
            "--run-dir",
            "runs/a",
            HF_TOKEN=READ,
            **self.online,
        )

    def train_badly(self) -> None:
        endless = [*self.train, "--max-steps", 9999, "--run-dir", "runs/b"]
        self.interrupt("train, Ctrl-C", *endless, after="step 00001", **self.online)
        stranger = {"WANDB_API_KEY": key("stranger"), **self.online}
        self.do("train, refused key", *self.train, "--run-dir", "runs/c", **stranger)

    def ask(self) -> None:
        infer = ["infer", "Why?", *self.run_a, "--max-new-tokens", 4]
        evaluate = ["eval", *self.run_a, "--answers", 1, "--max-new-tokens", 4]
        others = [["load", *self.model], ["format", *self.rows], ["doctor", *self.model], ["login"]]
        self.do_all("the rest", infer, evaluate, *others, **self.online)

    def publish(self) -> None:
        self.do("save", "save", *self.run_a)
        writer, stranger = ({"HF_TOKEN": token(name)} for name in ("writer", "stranger"))
        push = ["push", *self.run_a]
        self.do("push, 401", *push, *self.to, **stranger)
        self.hub.faults = [Fault("POST", "/commit/", status=500, times=ALWAYS)]
        self.do("push, 500", *push, *self.to, **writer)
        self.hub.faults = []
        self.do("push", *push, *self.to, **writer)
        self.do("load, 401", "load", "--model", "no/such-135M", **stranger)
        self.do("login, 401", "login", **stranger)
        self.do("login, short key", "login", WANDB_API_KEY=key("")[:39], **self.online)

    def watch(self) -> None:
        while not self.ended.wait(0.2):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    self.processes.add(process.read_bytes())


@pytest.fixture(scope="module")
def commands(tiny_r1, tmp_path_factory):
    """On a machine with a token in every place, two commands at a time."""
    hub = RecordingHub(tokens={READ: ("reader", "read"), token("writer"): ("writer", "write")})
    wandb = RecordingWandb(keys={key(name): name for name in SOURCES})
    with hub, wandb, KaggleServer(NOTEBOOK) as kaggle, ThreadPoolExecutor(3) as pool:
        commands = Commands(tiny_r1, tmp_path_factory.mktemp("leaks"), hub, wandb, kaggle)
        for source in ("stored", "kaggle", "dotenv"):
            commands.plant(source, READ, key(source))
        pool.submit(commands.watch)
        try:
            for at_once in (
                (commands.train_well, commands.train_badly),
                (commands.ask, commands.publish),
            ):
                for chain in [pool.submit(chain) for chain in at_once]:
                    chain.result()
        finally:
            commands.ended.set()
        yield commands


def test_every_command_did_its_work_with_tokens_all_around(commands):
    for name, done in commands.done.items():
        code = (
            130 if "Ctrl-C" in name else 0 if name in ("train", "the rest", "save", "push") else 1
        )
        assert done.code == code and "Traceback" not in done.err, f"{name}: {done.err}"
    assert "model.safetensors" in commands.hub.repos["model", "writer/model"].files
    runs = commands.wandb.runs.values()
    assert [run.entity for run in runs] == ["dotenv", "dotenv"]
    assert all("output.log" in run.files for run in runs)


def test_train_says_before_it_begins_that_the_token_cannot_push(commands):
    said = commands.done["train"].err
    assert 0 <= said.find("can read, not write") < said.find("step 00001")


def test_train_names_the_source_of_a_key_that_w_and_b_refuses(commands):
    said = commands.done["train, refused key"].err
    assert "WANDB_API_KEY in the environment" in said and "no message" not in said


def test_no_command_shows_a_token(commands):
    for name, done in commands.done.items():
        assert not shows((done.out + done.err).encode()), name


def test_no_file_holds_a_token_but_those_it_was_put_into(commands):
    own = {
        commands.dotenv,
        commands.hub_token,
        commands.hub_token.with_name("stored_tokens"),
        commands.netrc,
    }
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
