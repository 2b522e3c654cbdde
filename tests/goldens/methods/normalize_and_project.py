"""The optimizer and the projected leaves as the recordings describe them."""

from __future__ import annotations

from typing import Any

import optax

from tests.goldens.golden import Golden

DESCRIBED = ("project", "per")


def arguments(golden: Golden) -> dict[str, Any]:
    kwargs = golden.kwargs
    inner = dict(kwargs.pop("inner"))
    assert kwargs.pop("per", "leaf") == "leaf"  # one norm a leaf: the default
    make = getattr(optax, inner.pop("optimizer"))
    projected = kwargs.pop("project")
    return {**kwargs, "inner": make(**inner), "mask": list(projected)}
