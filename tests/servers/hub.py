"""A small Hugging Face Hub on loopback, for the unmodified client, with Xet or with HF_HUB_DISABLE_XET=1.

Serves models and datasets: whoami, create_repo, auth_check, repo_info, list_repo_tree, paths-info, commits
(regular, Xet and LFS files, deletions), README.md's YAML, downloads with Range,
and with them snapshot_download and datasets.load_dataset. Large files go over Xet (xet.py) or LFS as the client
asks for; what add_repo puts in a repo is there over both; what came by LFS, and files that add_repo was given by
their paths, go by plain HTTP.
Doesn't serve branches other than main, tags, refs, discussions, uploads in parts, merges, copies from another
repo, gated repos, paged listings, redirects to a CDN or `expand`. Those answer 501 or are left out. Of a
card's YAML, only license and tags are looked at.

    from servers.base import Fault
    from servers.hub import HubServer

    with HubServer(tokens={"hf_abc": ("alice", "write")}) as hub:
        hub.add_repo("dataset", "org/name", {"train.jsonl": b"..."})
        hub.faults.append(Fault("PUT", "/info/lfs/", status=500))
        ...  # HfApi(endpoint=hub.url, token="hf_abc")
        assert hub.repos["model", "alice/m"].files["config.json"] == b"{}"
"""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

from .base import HttpError, LoopbackServer, Reply, Request
from .repos import Commit, File, Repo, card_errors, listing
from .xet import Scope, XetStorage

LFS_SUFFIXES = {
    ".bin",
    ".gguf",
    ".gz",
    ".model",
    ".onnx",
    ".parquet",
    ".pt",
    ".safetensors",
    ".zip",
}
GITATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)
).encode()

API = r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?P<datasets>datasets/)?(?P<repo>[^/]+/[^/]+)"
REV = r"/(?P<rev>[^/]+)"
LFS_OBJECT = r"\.git/info/lfs/objects/(?P<oid>[0-9a-f]{64})"
XET = "/xet"


def on_xet(
    handler: Callable[[XetStorage, Request], Reply],
) -> Callable[["HubServer", Request], Reply]:
    return lambda hub, request: handler(hub.xet, request)


class HubServer(LoopbackServer):
    """`tokens` maps a token to (user, role); every user may write to its own namespace and to `orgs`."""

    def __init__(
        self,
        tokens: dict[str, tuple[str, str]] | None = None,
        orgs: Iterable[str] = (),
        lfs_above: int = 10_000_000,
    ) -> None:
        super().__init__()
        self.tokens, self.orgs, self.lfs_above = tokens or {}, list(orgs), lfs_above
        self.repos: dict[tuple[str, str], Repo] = {}
        self._folder = TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.xet = XetStorage(self.url + XET, self.save)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._folder.cleanup()

    def add_repo(
        self,
        type: str,
        id: str,
        files: Mapping[str, bytes | Path] | None = None,
        private: bool = False,
    ) -> Repo:
        """Creates a repo with one commit, for a test to start from; a Path is served from where it lies."""
        tree = {
            path: self.seed(path, data)
            for path, data in (files or {}).items()
            if isinstance(data, bytes)
        }
        paths = {path: file for path, file in (files or {}).items() if isinstance(file, Path)}
        with ThreadPoolExecutor() as threads:
            tree |= zip(paths, threads.map(self.link, paths, paths.values()), strict=True)
        repo = Repo(type, id, private, [Commit("initial commit", "", tree, None)])
        repo.lfs = {file.sha256 for file in tree.values() if file.lfs}
        self.repos[type, id] = repo
        return repo

    def seed(self, path: str, data: bytes) -> File:
        file = self.save([data], self.is_lfs(path, len(data), data))
        return replace(file, xet_hash=self.xet.adopt(file)) if file.lfs and data else file

    def link(self, path: str, source: Path) -> File:
        """A file of any size, neither copied nor read into memory."""
        with source.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            content.seek(0)
            sample = content.read(512)
        blob, size = Path(self._folder.name, digest), source.stat().st_size
        with suppress(FileExistsError):
            blob.symlink_to(source.resolve())
        return File(blob, size, self.is_lfs(path, size, sample))

    def save(self, chunks: Iterable[bytes], lfs: bool) -> File:
        digest = hashlib.sha256()
        with NamedTemporaryFile(dir=self._folder.name, delete=False) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            size = file.tell()
        return File(Path(file.name).replace(Path(self._folder.name, digest.hexdigest())), size, lfs)

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        return (
            size > self.lfs_above
            or PurePosixPath(path).suffix in LFS_SUFFIXES
            or b"\0" in sample[:512]
        )

    def user(self, request: Request) -> tuple[str, str] | None:
        """The token's (user, role); None without a token."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def check_write(self, user: tuple[str, str] | None, namespace: str) -> None:
        if user is None:
            raise HttpError(401, "Invalid username or password.")
        if user[1] == "read" or namespace not in (user[0], *self.orgs):
            raise HttpError(
                403, f'This token has no right to write under the namespace "{namespace}"'
            )

    def repo(self, request: Request, write: bool = False) -> Repo:
        """The repo of the request's path, if the token may see it; the real Hub hides the rest as missing."""
        user, params = self.user(request), request.params
        type = params.get("type") or ("dataset" if params["datasets"] else "model")
        repo, namespace = self.repos.get((type, params["repo"])), params["repo"].split("/")[0]
        if repo is None or (
            repo.private and (user is None or namespace not in (user[0], *self.orgs))
        ):
            raise HttpError(
                404 if user else 401, "Repository not found", X_Error_Code="RepoNotFound"
            )
        if write:
            self.check_write(user, namespace)
        return repo

    def whoami(self, request: Request) -> Reply:
        user = self.user(request)
        if user is None:
            raise HttpError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user[1]}
        orgs = [{"type": "org", "name": org} for org in self.orgs]
        return Reply(
            {"type": "user", "name": user[0], "orgs": orgs, "auth": {"accessToken": token}}
        )

    def validate_yaml(self, request: Request) -> Reply:
        errors = [{"message": error} for error in card_errors(request.json()["content"])]
        return Reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self, request: Request) -> Reply:
        asked, user = request.json(), self.user(request)
        namespace = asked.get("organization") or (user[0] if user else "")
        self.check_write(user, namespace)
        type, id = asked.get("type", "model"), f"{namespace}/{asked['name']}"
        if type not in ("model", "dataset"):
            raise HttpError(501, f"the test server doesn't serve repos of type {type}")
        with self.lock:
            exists = (type, id) in self.repos
            if not exists:
                self.add_repo(
                    type,
                    id,
                    {".gitattributes": GITATTRIBUTES},
                    asked.get("visibility") == "private",
                )
        url = {"url": f"{self.url}/{self.repos[type, id].path}"}
        error = {"error": f"You already created this {type} repo"} if exists else {}
        return Reply({**url, **error}, 409 if exists else 200)

    def repo_info(self, request: Request) -> Reply:
        repo = self.repo(request)
        commit = repo.at(request.params.get("rev") or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
        if "blobs" in request.query:
            for sibling in siblings:
                file = commit.tree[sibling["rfilename"]]
                lfs = {"lfs": {**file.entry("")["lfs"], "sha256": file.sha256}} if file.lfs else {}
                sibling.update(size=file.size, blobId=file.oid, **lfs)
        info = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
        }
        dates = {"lastModified": commit.date, "createdAt": repo.commits[0].date}
        return Reply(
            {**info, **dates, "gated": False, "disabled": False, "tags": [], "siblings": siblings}
        )

    def tree(self, request: Request) -> Reply:
        rows = listing(self.repo(request).at(request.params["rev"]))
        folder = request.params["path"]
        inside = [row for path, row in rows.items() if not folder or path.startswith(folder + "/")]
        if folder and not inside:
            raise HttpError(404, f"{folder} does not exist", X_Error_Code="EntryNotFound")
        if request.query.get("recursive") != ["true"]:
            inside = [
                row for row in inside if str(PurePosixPath(row["path"]).parent) == (folder or ".")
            ]
        return Reply(inside)

    def paths_info(self, request: Request) -> Reply:
        rows = listing(self.repo(request).at(request.params["rev"]))
        return Reply([rows[path] for path in request.form().get("paths", []) if path in rows])

    def auth_check(self, request: Request) -> Reply:
        self.repo(request, write=bool(request.params["write"]))
        return Reply({})

    def preupload(self, request: Request) -> Reply:
        tree, answer = self.repo(request, write=True).at(request.params["rev"]).tree, []
        for asked in request.json()["files"]:
            lfs = self.is_lfs(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
            file = tree.get(asked["path"])
            row = {
                "path": asked["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
            }
            answer.append({**row, "oid": file.etag} if file else row)
        return Reply({"files": answer})

    def lfs_batch(self, request: Request) -> Reply:
        repo, objects = self.repo(request, write=True), request.json()["objects"]
        folder = self.url + request.path.removesuffix("/batch")
        for asked in objects:
            if asked["oid"] not in repo.lfs:
                upload = {"href": f"{folder}/{asked['oid']}"}
                asked["actions"] = {"upload": upload, "verify": {"href": f"{folder}/verify"}}
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request) -> Reply:
        # The client sends no token here, as the real upload goes to signed addresses of a storage service.
        params = request.params
        repo = self.repos["dataset" if params["datasets"] else "model", params["repo"]]
        if self.save(request.chunks(), lfs=True).sha256 != params["oid"]:
            raise HttpError(400, "the content's sha256 isn't the oid")
        repo.lfs.add(params["oid"])
        return Reply(headers={"ETag": f'"{params["oid"]}"'})

    def lfs_verify(self, request: Request) -> Reply:
        repo, asked = self.repo(request, write=True), request.json()
        if asked["oid"] not in repo.lfs or self.lfs_file(asked).size != asked["size"]:
            raise HttpError(404, "LFS object not found, or of another size")
        return Reply({})

    def lfs_file(self, asked: dict[str, Any]) -> File:
        blob = Path(self._folder.name, asked["oid"])
        return File(blob, blob.stat().st_size, lfs=True, xet_hash=self.xet.hash_of(asked["oid"]))

    def xet_token(self, request: Request) -> Reply:
        scope: Scope = "write" if request.params["scope"] == "write" else "read"
        token = self.xet.hand_out(self.repo(request, scope == "write"), scope)
        expires = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.xet.url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expires),
        }
        return Reply(
            {"casUrl": self.xet.url, "accessToken": token, "exp": expires}, headers=headers
        )

    def commit(self, request: Request) -> Reply:
        repo = self.repo(request, write=True)
        header, *lines = [json.loads(line) for line in request.read().splitlines()]
        title, description = header["value"]["summary"], header["value"].get("description", "")
        with self.lock:
            head = repo.at(request.params["rev"])
            if header["value"].get("parentCommit", head.oid) != head.oid:
                raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(head.tree)
            for line in lines:
                self.apply(repo, tree, line["key"], line["value"])
            commit = Commit(title, description, tree, head.oid)
            repo.commits.append(commit)
        url = f"{self.url}/{repo.path}/commit/{commit.oid}"
        return Reply({"commitUrl": url, "commitOid": commit.oid})

    def apply(self, repo: Repo, tree: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """One operation of a commit, on a copy of the tree: a refused one leaves the repo as it was."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := card_errors(content.decode())):
                raise HttpError(400, "Invalid metadata in README.md: " + ", ".join(errors))
            tree[path] = self.save([content], lfs=False)
        elif key == "lfsFile" and value["oid"] in repo.lfs:
            tree[path] = self.lfs_file(value)
        elif key == "lfsFile":
            raise HttpError(400, f"LFS object of {path} was never uploaded")
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [
                name
                for name in tree
                if (name == path if key == "deletedFile" else name.startswith(folder))
            ]
            if not gone:
                raise HttpError(
                    404, "A file with this name doesn't exist", X_Error_Code="EntryNotFound"
                )
            for name in gone:
                del tree[name]
        else:
            raise HttpError(501, f"the test server doesn't serve {key} in a commit")

    def resolve(self, request: Request) -> Reply:
        repo, path = self.repo(request), request.params["path"]
        commit = repo.at(request.params["rev"])
        file = commit.tree.get(path)
        if file is None:
            raise HttpError(
                404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid
            )
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.xet_hash:
            token = f"{self.url}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": token}
        return request.file_reply(file.blob, headers)

    routes = (
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/repos/create", create_repo),
        ("GET", API + f"(/revision{REV})?", repo_info),
        ("GET", API + "/auth-check(?P<write>/write)?", auth_check),
        ("GET", API + f"/tree{REV}(/(?P<path>.+))?", tree),
        ("POST", API + f"/paths-info{REV}", paths_info),
        ("POST", API + f"/preupload{REV}", preupload),
        ("POST", API + f"/commit{REV}", commit),
        ("GET", API + f"/xet-(?P<scope>read|write)-token{REV}", xet_token),
        ("POST", GIT + r"\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", GIT + r"\.git/info/lfs/objects/verify", lfs_verify),
        ("PUT", GIT + LFS_OBJECT, lfs_put),
        ("GET", GIT + f"/resolve{REV}/(?P<path>.+)", resolve),
        *((method, XET + path, on_xet(handler)) for method, path, handler in XetStorage.routes),
    )
