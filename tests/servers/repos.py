"""What a Hub's repos are made of: files on disk named by their sha256, commits as path → file, listings."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .base import HttpError


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A file in a commit: its content lies in the server's temporary folder, under its sha256."""

    blob: Path
    size: int
    lfs: bool
    xet_hash: str | None = None

    @property
    def sha256(self) -> str:
        return self.blob.name

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        return git_oid(self.pointer if self.lfs else self.blob.read_bytes())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        about = (
            {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
            if self.lfs
            else {}
        )
        lfs = {"lfs": about} if self.lfs else {}
        xet = {"xetHash": self.xet_hash} if self.xet_hash else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid, **lfs, **xet}


class Contents(Mapping[str, bytes]):
    """path → bytes, read from disk when asked for: 300 MB stay out of memory until a test wants them."""

    def __init__(self, tree: dict[str, File]) -> None:
        self.tree = tree

    def __getitem__(self, path: str) -> bytes:
        return self.tree[path].blob.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)


@dataclass
class Commit:
    title: str
    description: str
    tree: dict[str, File]
    parent: str | None
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def oid(self) -> str:
        return hashlib.sha1(
            repr((self.parent, self.title, sorted(self.tree.items()), self.date)).encode()
        ).hexdigest()

    @property
    def files(self) -> Contents:
        return Contents(self.tree)


@dataclass
class Repo:
    type: str
    id: str
    private: bool
    commits: list[Commit]
    lfs: set[str] = field(default_factory=set)  # sha256 of what was uploaded, committed or not

    @property
    def files(self) -> Contents:
        return self.commits[-1].files

    @property
    def path(self) -> str:
        return f"datasets/{self.id}" if self.type == "dataset" else self.id

    def at(self, revision: str) -> Commit:
        for commit in self.commits:
            if commit.oid == revision:
                return commit
        if revision != "main":
            raise HttpError(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return self.commits[-1]


def listing(commit: Commit) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit as the tree and paths-info endpoints describe it."""
    folders = {str(parent) for path in commit.tree for parent in PurePosixPath(path).parents} - {
        "."
    }
    rows = {
        path: {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
        for path in folders
    }
    rows |= {path: file.entry(path) for path, file in commit.tree.items()}
    return dict(sorted(rows.items()))


def card_errors(readme: str) -> list[str]:
    """What is wrong with a README.md's YAML."""
    front = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", readme, re.DOTALL | re.MULTILINE)
    try:
        card = (yaml.safe_load(front[1]) if front else None) or {}
    except yaml.YAMLError as error:
        return ["YAML metadata can't be parsed: " + " ".join(str(error).split())]
    if not isinstance(card, dict):
        return ["YAML metadata must be a mapping"]
    license, tags = card.get("license") or "", card.get("tags") or []
    errors = (
        [] if isinstance(license, str) or are_strings(license) else ['"license" must be a string']
    )
    return errors if are_strings(tags) else [*errors, '"tags" must be a list of strings']


def are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
