"""A small Weights & Biases server on loopback, for the unmodified client whose WANDB_BASE_URL is its `url`.

Serves wandb.login(verify=True) and online runs: init (also with resume), log, summary, files, finish.
Doesn't serve artifacts, media, sweeps, reports, the public API, or telemetry (404, which is shrugged off).

    from servers.wandb_server import WandbServer

    with WandbServer(keys={"a" * 40: "alice"}) as server:
        ...  # a subprocess with WANDB_BASE_URL=server.url, WANDB_API_KEY="a" * 40
        assert server.runs["alice/project/run-id"].history[-1]["loss"] < 1
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import HttpError, LoopbackServer, Reply, Request


@dataclass
class Run:
    entity: str
    project: str
    name: str  # the run's id
    display_name: str
    raw_config: dict[str, Any] = field(default_factory=dict)  # {"lr": {"value": 1}}, as it travels
    lines: dict[str, dict[int, str]] = field(
        default_factory=dict
    )  # streamed file → line number → line
    files: dict[str, bytes] = field(
        default_factory=dict
    )  # uploaded: config.yaml, wandb-metadata.json, ...
    finished: bool = False
    exitcode: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in self.raw_config.items()}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())
        ]

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.lines.get("wandb-summary.json", {}).get(0, "{}"))
        return summary

    def bucket(self) -> dict[str, Any]:
        """The run as GraphQL shows it; the line counts and tails let a resumed run go on where it stopped."""
        entity = {"id": self.entity, "name": self.entity}
        project = {"id": self.project, "name": self.project, "entity": entity}
        files = {
            "history": "wandb-history.jsonl",
            "events": "wandb-events.jsonl",
            "log": "output.log",
        }
        counts = {f"{kind}LineCount": len(self.lines.get(file, {})) for kind, file in files.items()}
        lasts = {kind: list(self.lines.get(file, {}).values())[-1:] for kind, file in files.items()}
        tails = {f"{kind}Tail": json.dumps(last) for kind, last in lasts.items()}
        texts = {"config": json.dumps(self.raw_config), "summaryMetrics": json.dumps(self.summary)}
        texts["wandbConfig"] = json.dumps(
            {"t": 1}
        )  # without it the client believes that the run never began
        names = {
            "id": self.name,
            "name": self.name,
            "displayName": self.display_name,
            "description": "",
        }
        about: dict[str, Any] = {"project": project, "sweepName": None, "tags": [], "notes": ""}
        return {**names, **about, **counts, **tails, **texts}


class WandbServer(LoopbackServer):
    """`keys` maps an API key to the user it belongs to, whose runs go under the entity of that name."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        super().__init__()
        self.keys = keys or {}
        self.runs: dict[str, Run] = {}  # by "entity/project/name"

    def user(self, request: Request) -> str:
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        key = (
            base64.b64decode(credentials).decode().removeprefix("api:") if scheme == "Basic" else ""
        )
        if key not in self.keys:
            raise HttpError(401, "user is not logged in")
        return self.keys[key]

    def graphql(self, request: Request) -> Reply:
        user, asked = self.user(request), request.json()
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        name = operation[1] if operation else ""
        if name not in self.operations:
            raise HttpError(501, f"the test server doesn't serve the GraphQL operation {name}")
        return Reply({"data": self.operations[name](self, user, asked.get("variables") or {})})

    def viewer(self, user: str, variables: dict[str, Any]) -> dict[str, Any]:
        names = {
            "id": user,
            "name": user,
            "entity": user,
            "username": user,
            "email": f"{user}@example.com",
        }
        state = {"admin": False, "flags": "{}", "deletedAt": None}
        return {"viewer": {**names, **state, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def upsert_run(self, user: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity, name = variables.get("entity") or user, variables["name"]
        project = variables.get("project") or "uncategorized"
        key = f"{entity}/{project}/{name}"
        with self.lock:
            inserted = key not in self.runs
            run = self.runs.setdefault(
                key, Run(entity, project, name, variables.get("displayName") or name)
            )
            run.raw_config = json.loads(variables.get("config") or "null") or run.raw_config
            run.display_name = variables.get("displayName") or run.display_name
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def resume_status(self, user: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity, project = variables.get("entity") or user, variables["project"]
        run = self.runs.get(f"{entity}/{project}/{variables['name']}")
        model = {"id": project, "name": project, "entity": {"id": entity, "name": entity}}
        return {"model": {**model, "bucket": run and run.bucket()}}

    def create_files(self, user: str, variables: dict[str, Any]) -> dict[str, Any]:
        folder = (
            f"{self.url}/upload/{variables['entity']}/{variables['project']}/{variables['run']}"
        )
        files = [{"name": file, "uploadUrl": f"{folder}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def run(self, request: Request) -> Run:
        if request.params["run"] not in self.runs:
            raise HttpError(404, f"run {request.params['run']} not found")
        return self.runs[request.params["run"]]

    def upload(self, request: Request) -> Reply:
        # The client sends no key here, as real uploads go to signed addresses of a storage service.
        self.run(request).files[request.params["file"]] = request.read()
        return Reply({})

    def file_stream(self, request: Request) -> Reply:
        self.user(request)
        run, asked = self.run(request), request.json()
        with self.lock:
            for file, part in (asked.get("files") or {}).items():
                # By line number, so that a part sent again after a lost answer doesn't count twice.
                run.lines.setdefault(file, {}).update(enumerate(part["content"], part["offset"]))
            run.finished = bool(asked.get("complete"))
            run.exitcode = asked.get("exitcode")
        return Reply({"limits": {}})

    operations: ClassVar[dict[str, Callable[[Any, str, dict[str, Any]], dict[str, Any]]]] = {
        "Viewer": viewer,
        "GetViewer": viewer,
        "ServerFeaturesQuery": lambda server, user, variables: {"serverInfo": {"features": []}},
        "OrganizationCoreWeaveOrganizationID": lambda server, user, variables: {
            "entity": {"organization": None}
        },
        "UpsertBucket": upsert_run,
        "RunResumeStatus": resume_status,
        "CreateRunFiles": create_files,
    }

    routes = (
        ("POST", "/graphql", graphql),
        ("POST", r"/files/(?P<run>[^/]+/[^/]+/[^/]+)/file_stream", file_stream),
        ("PUT", r"/upload/(?P<run>[^/]+/[^/]+/[^/]+)/(?P<file>.+)", upload),
        ("POST", "/sdk/otel/.*", lambda server, request: Reply({"error": "no telemetry"}, 404)),
    )
