"""Exemptions that a record claims for itself, as strict expected failures."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from optimkit.protocols import Method


def marks_of(
    record: Method, rule: str, dtype: str = "", *, usual: Collection[str] | None = None
) -> list[pytest.MarkDecorator]:
    """The marks of one case.

    An expected failure, with its reason, for a rule that the record exempts itself from; and
    ``slow`` for a dtype outside ``usual``, which only ``make test-full`` runs.
    """
    reason = record.exempt.get(rule) or record.exempt.get(f"{rule}:{dtype}")
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return marks if usual is None or dtype in usual else [*marks, pytest.mark.slow]
