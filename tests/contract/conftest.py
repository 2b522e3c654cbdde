"""Compiled programs of one method are of no use to the next: let go of them."""

from __future__ import annotations

import jax
import pytest

_last: list[str] = []


@pytest.fixture(autouse=True)
def _forget_programs(request: pytest.FixtureRequest) -> None:
    name = request.node.name.partition("-")[0]
    if _last and _last[-1] != name:
        jax.clear_caches()
    _last[:] = [name]
