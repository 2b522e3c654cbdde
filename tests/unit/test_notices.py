"""Every golden's origin is named in the notices, and no package index is named anywhere."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDENS = sorted((ROOT / "tests" / "goldens").glob("*.npz"))
NOTICES = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")

PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})\b")
"""``owner/name@commit``."""

SECTIONS_WITHOUT_CODE_TO_NAME = ("Code whose repository is not known", "No third-party code")


class Row(NamedTuple):
    """One table row of the notices."""

    section: str
    text: str

    @property
    def first(self) -> str:
        return self.text.split("|")[1].strip().strip("`")

    def names_golden(self, stem: str) -> bool:
        """Whether it names the method, alone or with this case among the cases in parentheses."""
        method, _, case = stem.partition("__")
        named = re.search(rf"`{re.escape(method)}`(?: \(([^)]*)\))?", self.text)
        return named is not None and (named[1] is None or case in named[1].split(", "))

    def names_commit(self, owner_name: str, commit: str) -> bool:
        """Whether it names a repository and, in full or cut short, a commit of it."""
        commits = re.findall(r"`([0-9a-f]{7,40})`", self.text)
        return f"`{owner_name}`" in self.text and any(commit.startswith(cut) for cut in commits)


def rows_of(notices: str) -> list[Row]:
    section, rows = "", []
    for line in notices.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("|") and "`" in line:
            rows.append(Row(section, line))
    return rows


def references(node: Any) -> Iterator[str]:
    """Every value that stands under the key ``reference``, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "reference" and isinstance(value, str):
                yield value
            else:
                yield from references(value)


def unnamed(stem: str, reference: str, rows: list[Row]) -> list[str]:
    """What the notices fail to say about one reference of one golden."""
    rows = [row for row in rows if row.names_golden(stem)]
    if not rows:
        return [f"{stem} stands in no row"]
    pinned = PINNED.findall(reference)
    if pinned:
        return [
            f"{stem} is not in a row that names {owner_name} at {commit}"
            for owner_name, commit in pinned
            if not any(row.names_commit(owner_name, commit) for row in rows)
        ]
    if any(row.first in reference or row.section in SECTIONS_WITHOUT_CODE_TO_NAME for row in rows):
        return []
    return [f"{stem} is not in a row for {reference!r}"]


def test_every_golden_has_its_reference_in_the_notices() -> None:
    rows, problems = rows_of(NOTICES), []
    assert GOLDENS
    for path in GOLDENS:
        with np.load(path, allow_pickle=False) as golden:
            found = list(references(json.loads(str(golden["meta"]))))
        problems += [] if found else [f"{path.stem} has no reference"]
        problems += [text for ref in found for text in unnamed(path.stem, ref, rows)]
    assert not problems


@pytest.mark.parametrize(
    ("stem", "reference", "missing"),
    [
        ("toy__a", "own/code@1234567890ab:f.py", False),
        ("toy__c", "own/code@1234567890ab:f.py", True),  # this case is not listed
        ("toy__a", "own/code@7654321:f.py", True),  # another commit
        ("toy__a", "other/code@1234567890ab:f.py", True),
        ("toy__p", "pack 1.0 (wheel):Class()", False),
        ("toy__a", "pack 1.0 (wheel):Class()", True),  # listed for the repository only
        ("plain__any", "derived anew", False),
        ("unheard__of", "derived anew", True),
    ],
)
def test_the_check_sees_what_is_missing(stem: str, reference: str, missing: bool) -> None:
    rows = rows_of(
        "## Repositories\n| `own/code` | `1234567` | `f.py` | `toy` (a, b) | MIT |\n"
        "## Published packages\n| `pack` | 1.0 | `own/pack` | `toy` (p) | MIT |\n"
        "## No third-party code\n| `plain` | none |\n"
    )
    assert bool(unnamed(stem, reference, rows)) is missing


def test_every_row_states_a_licence() -> None:
    for row in rows_of(NOTICES):
        if row.section in ("Repositories", "Published packages"):
            assert len(row.text.split("|")) == 7, row.text
            assert row.text.split("|")[5].strip(), f"no licence: {row.text}"


# Put together here, so that this file does not hold them.
INDEX_ADDRESSES = tuple(
    "".join(parts).encode()
    for parts in (
        ("pypi", ".org"),
        ("python", "hosted.org"),
        ("pypi", ".python"),
        ("index", "-url"),
        ("index", "_url"),
        ("find", "-links"),
        ("[tool.uv", ".index"),
        ("conda", ".anaconda.org"),
    )
)


def test_no_tracked_file_names_a_package_index() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    if ROOT / "pyproject.toml" not in tracked:
        pytest.skip("not a git checkout of optimkit")
    for path in tracked:
        content = path.read_bytes().lower() if path.is_file() else b""
        found = [address.decode() for address in INDEX_ADDRESSES if address in content]
        assert not found, f"{path.relative_to(ROOT)} names {found}"
