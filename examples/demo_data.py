# SPDX-License-Identifier: Apache-2.0
"""The demo's text: sentences with a mean human sentiment rating in -4..4, from four domains.

They come with the MIT-licensed package vaderSentiment 0.5 (C.J. Hutto, ICWSM 2014). Its source archive is fetched
once, checked by sha256, kept in the checkout's cache, and read in memory: nothing is unpacked, nothing is installed.
"""

from __future__ import annotations

import hashlib
import html
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PACKAGE, ARCHIVE = "vaderSentiment==0.5", "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
DOMAINS = tuple(FILES)
BY_DOCUMENT = ("amazon", "nyt")  # ids "<document>_<line>": one document never stands on both sides of a split


class DemoError(Exception):
    """The demo cannot run; the message says why."""


class Line(NamedTuple):
    id: str
    text: str
    rating: float


class Split(NamedTuple):
    train: list[Line]
    held: list[Line]


def fetch(cache: Path = CACHE) -> Path:
    """The archive's path. Downloads it if the cache has none; a wrong hash is an error either way."""
    path = cache / ARCHIVE
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            pin = Path(tmp) / "requirements.txt"
            pin.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            done = subprocess.run([*command, "-r", pin, "-d", tmp], capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
                raise DemoError(
                    f"cannot fetch {PACKAGE} (2.4 MB). Without a network, put {ARCHIVE} into {cache} and run again.\n"
                    f"  pip: {errors[-1].strip()}"
                )
            (Path(tmp) / ARCHIVE).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise DemoError(
            f"{path} is not the expected file: sha256 expected {SHA256}, got {found}. Delete it, run again."
        )
    return path


def read(archive: Path) -> dict[str, list[Line]]:
    """All lines of each domain in file order, each text once (case and spaces do not count)."""
    with zipfile.ZipFile(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
        return {domain: parse(inner.extractfile(f"hutto_ICWSM_2014/{name}").read()) for domain, name in FILES.items()}


def parse(raw: bytes) -> list[Line]:
    lines: dict[str, Line] = {}
    for row in raw.decode("utf-8-sig").split("\r\n"):
        if row:
            id, rating, text = row.split("\t")
            text = " ".join(html.unescape(html.unescape(text)).split())  # some lines are escaped twice
            lines.setdefault(text.lower(), Line(id, text, float(rating)))
    return list(lines.values())


def split(domain: str, lines: list[Line], train: int, held: int, seed: int) -> Split:
    """`held` lines to measure on and at most `train` others to learn from, drawn by seed.

    The held-out lines do not depend on `train`, so runs of different length are measured on the same text.
    """
    group = (lambda line: line.id.split("_")[0]) if domain in BY_DOCUMENT else (lambda line: line.id)
    rng = random.Random(f"{domain} {seed}")
    groups = sorted({group(line) for line in lines})
    rng.shuffle(groups)
    rank = {name: i for i, name in enumerate(groups)}
    order = sorted(lines, key=lambda line: rank[group(line)])  # stable: the lines of one document stay together
    cut = rank[group(order[held - 1])]  # the document that the last held-out line comes from
    rest = [line for line in order if rank[group(line)] > cut]
    rng.shuffle(rest)
    return Split(rest[:train], order[:held])
