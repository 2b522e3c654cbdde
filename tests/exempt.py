"""Exemptions that a record claims for itself, as strict expected failures."""

from __future__ import annotations

import pytest

from optimkit.protocols import Method


def marks_of(record: Method, rule: str, dtype: str = "") -> list[pytest.MarkDecorator]:
    """The mark for a rule that the record exempts itself from, with its reason; none otherwise."""
    reason = record.exempt.get(rule) or record.exempt.get(f"{rule}:{dtype}")
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
