"""The Hub's Xet storage service on loopback, for the unmodified hf_xet client.

Serves xorb uploads (by grants, as hf_xet 1.8 does, and direct, as older ones do), shards and reconstructions
(each v1 and v2) and the signed addresses that xorbs are fetched from. Xorbs stay on disk as they were sent. A
file whose shard arrives is put together once, and refused if its sha256 isn't the one that the shard claims.
Doesn't serve dedup across clients (every chunk query answers 404), nor check BLAKE3 hashes or CRC-64 sums.

The formats are described at huggingface.co/docs/xet.
"""

import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

import pyarrow

from .base import HttpError, Reply, Request, byte_range
from .repos import File, Repo

Scope = Literal["read", "write"]
ROW = 48  # bytes: a shard is a sequence of rows of this size
BOOKEND = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
MAX_CHUNK, CHUNKS = (
    128 << 10,
    256,
)  # the size of a chunk, and how many of them adopt() puts in a xorb
HASH = "[0-9a-f]{64}"


def hex_hash(raw: bytes) -> str:
    """A hash as the protocol writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


@dataclass(frozen=True)
class Chunk:
    """A chunk in a xorb: `start` to `stop` are its packed bytes, after its header."""

    start: int
    stop: int
    scheme: int
    size: int

    HEADER = 8

    def unpack(self, packed: bytes) -> bytes:
        if self.scheme == 0:
            return packed
        data: bytes = pyarrow.decompress(packed, self.size, codec="lz4", asbytes=True)
        return data if self.scheme == 1 else ungroup(data)


def ungroup(data: bytes) -> bytes:
    """Undoes the grouping of every fourth byte that makes floats compress better."""
    whole, start = bytearray(len(data)), 0
    for place in range(4):
        stop = start + len(range(place, len(data), 4))
        whole[place::4] = data[start:stop]
        start = stop
    return bytes(whole)


@dataclass(frozen=True)
class Xorb:
    """A file of packed chunks, up to 64 MiB."""

    path: Path
    chunks: list[Chunk]

    @classmethod
    def load(cls, path: Path) -> "Xorb":
        chunks: list[Chunk] = []
        with path.open("rb") as file:
            # A chunk's header begins with its version, 0; the xorb's footer with an X.
            while (header := file.read(Chunk.HEADER)) and header[0] == 0:
                packed, scheme, size = header[1:4], header[4], header[5:8]
                start, length = file.tell(), int.from_bytes(packed, "little")
                chunks.append(Chunk(start, start + length, scheme, int.from_bytes(size, "little")))
                file.seek(length, 1)
        return cls(path, chunks)

    def data(self, start: int, stop: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for chunk in self.chunks[start:stop]:
                file.seek(chunk.start)
                yield chunk.unpack(file.read(chunk.stop - chunk.start))


@dataclass(frozen=True)
class Term:
    """A run of a xorb's chunks, `start` to `stop`, that is a part of a file."""

    xorb: str
    size: int
    start: int
    stop: int

    @classmethod
    def parse(cls, row: bytes) -> "Term":
        xorb, size, start, stop = struct.unpack("<32s4x3I", row)
        return cls(hex_hash(xorb), size, start, stop)

    def entry(self) -> dict[str, Any]:
        return {
            "hash": self.xorb,
            "unpacked_length": self.size,
            "range": {"start": self.start, "end": self.stop},
        }


@dataclass(frozen=True)
class XetFile:
    hash: str
    sha256: str
    terms: list[Term]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)

    def part(self, start: int, stop: int) -> tuple[int, list[Term]]:
        """The terms that hold the bytes from start to stop, and where in the first of them these begin."""
        terms: list[Term] = []
        begin = offset = 0
        for term in self.terms:
            if begin < stop and begin + term.size > start:
                offset = offset if terms else start - begin
                terms.append(term)
            begin += term.size
        return offset, terms


@dataclass(frozen=True)
class Shard:
    """What a client uploaded: whole files, and the hashes of the new xorbs that they are made of."""

    files: list[XetFile]
    xorbs: list[str]

    @classmethod
    def parse(cls, data: bytes) -> "Shard":
        # From after the header.
        rows = iter([data[start : start + ROW] for start in range(ROW, len(data), ROW)])
        files = [parse_file(row, rows) for row in takewhile(is_entry, rows)]
        return cls(files, [parse_xorb(row, rows) for row in takewhile(is_entry, rows)])


def is_entry(row: bytes) -> bool:
    return not row.startswith(BOOKEND)


def parse_file(row: bytes, rows: Iterator[bytes]) -> XetFile:
    hash, flags, count = struct.unpack("<32s2I8x", row)
    terms = [Term.parse(row) for row in islice(rows, count)]
    if flags & HAS_VERIFICATION:
        skip(rows, count)
    if not flags & HAS_SHA256:
        raise HttpError(400, "a file without sha256")
    return XetFile(hex_hash(hash), hex_hash(next(rows)[:32]), terms)


def parse_xorb(row: bytes, rows: Iterator[bytes]) -> str:
    hash, chunks = struct.unpack("<32s4xI8x", row)
    skip(rows, chunks)  # their hashes and sizes
    return hex_hash(hash)


def skip(rows: Iterator[bytes], count: int) -> None:
    next(islice(rows, count, count), None)


def merged(terms: list[Term], xorb: str) -> list[list[int]]:
    """The xorb's runs of chunks that the terms need: hf_xet panics where two of them overlap."""
    runs: list[list[int]] = []
    for start, stop in sorted((term.start, term.stop) for term in terms if term.xorb == xorb):
        if runs and start <= runs[-1][1]:
            runs[-1][1] = max(stop, runs[-1][1])
        else:
            runs.append([start, stop])
    return runs


class XetStorage:
    """Keeps xorbs and files for a server at `url`; `save` writes chunks to a file named by its sha256."""

    def __init__(self, url: str, save: Callable[[Iterable[bytes], bool], File]) -> None:
        self.url, self.save = url, save
        self.tokens: dict[str, tuple[Repo, Scope]] = {}
        self.grants: dict[str, Path | None] = {}
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, XetFile] = {}

    def hand_out(self, repo: Repo, scope: Scope) -> str:
        token = f"xet_{secrets.token_hex(16)}"
        self.tokens[token] = repo, scope
        return token

    def repo(self, request: Request, scope: Scope) -> Repo:
        """The repo that the request's token was handed out for."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            raise HttpError(401, "unknown or missing Xet token")
        repo, granted = self.tokens[token]
        if scope == "write" and granted == "read":
            raise HttpError(403, "this Xet token may only read")
        return repo

    def xorb(self, hash: str) -> Xorb:
        if hash not in self.xorbs:
            raise HttpError(400, f"xorb {hash} was never uploaded")
        return self.xorbs[hash]

    def post_xorb(self, request: Request) -> Reply:
        self.repo(request, "write")
        hash = request.params["hash"]
        new = hash not in self.xorbs
        if new:
            self.xorbs[hash] = Xorb.load(self.save(request.chunks(), True).blob)
        return Reply({"was_inserted": new})

    def grant(self, request: Request) -> Reply:
        self.repo(request, "write")
        if request.params["hash"] in self.xorbs:
            return Reply({})
        id = secrets.token_hex(16)
        self.grants[id] = None
        url = f"{self.url}/xorb-uploads/{id}"
        return Reply({"id": id, "method": "PUT", "url": url, "headers": {}}, 201)

    def put_granted(self, request: Request) -> Reply:
        # No token here, as the real address is a storage service's, and signed.
        if request.params["id"] not in self.grants:
            raise HttpError(403, "no such grant")
        self.grants[request.params["id"]] = self.save(request.chunks(), True).blob
        return Reply()

    def commit_granted(self, request: Request) -> Reply:
        self.repo(request, "write")
        blob = self.grants.get(request.params["id"])
        if blob is None:
            raise HttpError(404, "nothing was uploaded for this grant")
        self.xorbs[request.params["hash"]] = Xorb.load(blob)
        return Reply({})

    def post_shard(self, request: Request) -> Reply:
        repo, shard = self.repo(request, "write"), Shard.parse(request.read())
        for hash in shard.xorbs:
            self.xorb(hash)
        for file in shard.files:
            chunks = (
                data
                for term in file.terms
                for data in self.xorb(term.xorb).data(term.start, term.stop)
            )
            if self.save(chunks, True).sha256 != file.sha256:
                raise HttpError(400, "the content's sha256 isn't the shard's")
            self.files[file.hash] = file
            repo.lfs.add(file.sha256)
        # v2 answers with a stream of events, of which the last one is enough.
        return Reply({"result": 1} if request.params["version"] == "1" else {"type": "result"})

    def adopt(self, file: File) -> str:
        """Makes a file of the server's own downloadable; its hashes are no BLAKE3, which is taken."""
        terms = []
        with file.blob.open("rb") as content:
            while chunks := list(islice(iter(lambda: content.read(MAX_CHUNK), b""), CHUNKS)):
                headers = [struct.pack("<2I", len(chunk) << 8, len(chunk) << 8) for chunk in chunks]
                xorb = self.save(
                    [part for pair in zip(headers, chunks, strict=True) for part in pair], True
                )
                self.xorbs[xorb.sha256] = Xorb.load(xorb.blob)
                terms.append(Term(xorb.sha256, sum(map(len, chunks)), 0, len(chunks)))
        self.files[file.sha256] = XetFile(file.sha256, file.sha256, terms)
        return file.sha256

    def hash_of(self, sha256: str) -> str | None:
        return next((file.hash for file in self.files.values() if file.sha256 == sha256), None)

    def reconstruction(self, request: Request) -> Reply:
        self.repo(request, "read")
        file = self.files.get(request.params["hash"])
        if file is None:
            raise HttpError(404, "no such file")
        start, stop = byte_range(request.headers.get("Range", "bytes=0-"), file.size)
        offset, terms = file.part(start, stop)
        key, source = (
            ("fetch_info", self.source_v1)
            if request.params["version"] == "1"
            else ("xorbs", self.source_v2)
        )
        sources = {
            xorb: [source(xorb, *run) for run in merged(terms, xorb)]
            for xorb in {term.xorb for term in terms}
        }
        return Reply(
            {
                "offset_into_first_range": offset,
                "terms": [term.entry() for term in terms],
                key: sources,
            }
        )

    def source_v1(self, hash: str, start: int, stop: int) -> dict[str, Any]:
        """Where to fetch a run of a xorb's chunks."""
        chunks = self.xorb(hash).chunks[start:stop]
        span = {"start": chunks[0].start - Chunk.HEADER, "end": chunks[-1].stop - 1}
        return {
            "url": f"{self.url}/xorbs/{hash}",
            "range": {"start": start, "end": stop},
            "url_range": span,
        }

    def source_v2(self, hash: str, start: int, stop: int) -> dict[str, Any]:
        source = self.source_v1(hash, start, stop)
        return {
            "url": source["url"],
            "ranges": [{"chunks": source["range"], "bytes": source["url_range"]}],
        }

    def get_xorb(self, request: Request) -> Reply:
        return request.file_reply(self.xorb(request.params["hash"]).path, {})

    def get_chunk(self, request: Request) -> Reply:
        self.repo(request, "read")
        raise HttpError(404, "no such chunk")

    routes = (
        ("GET", "/v1/chunks/default(-merkledb)?/.+", get_chunk),
        ("POST", f"/v1/xorbs/default/(?P<hash>{HASH})", post_xorb),
        ("POST", f"/v1/xorb-grants/default/(?P<hash>{HASH})", grant),
        ("PUT", "/xorb-uploads/(?P<id>[0-9a-f]+)", put_granted),
        (
            "POST",
            f"/v1/xorb-commits/default/(?P<hash>{HASH})/grant/(?P<id>[0-9a-f]+)",
            commit_granted,
        ),
        ("POST", "/v(?P<version>[12])/shards", post_shard),
        ("GET", f"/v(?P<version>[12])/reconstructions/(?P<hash>{HASH})", reconstruction),
        ("GET", f"/xorbs/(?P<hash>{HASH})", get_xorb),
    )
