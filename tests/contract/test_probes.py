"""The suite can fail: it rejects transformations that are broken on purpose."""

from __future__ import annotations

import pytest

from tests.contract.checks import run_check
from tests.contract.probes import PROBES


@pytest.mark.parametrize("name", PROBES)
def test_broken_probe_is_rejected(name: str) -> None:
    record, rule, dtype = PROBES[name]
    with pytest.raises((AssertionError, TypeError), match=r"."):
        run_check(record, rule, dtype)


def test_adamw_of_optax_keeps_the_rule_in_float32() -> None:
    record, rule, _ = PROBES["bare_adamw"]
    run_check(record, rule, "float32")


def test_the_nan_of_optax_adamw_comes_from_a_zero_gradient() -> None:
    record, rule, dtype = PROBES["bare_adamw"]
    with pytest.raises(AssertionError, match="gradient size zero: not finite"):
        run_check(record, rule, dtype)


@pytest.mark.parametrize(
    ("probe", "rule", "message"),
    [
        ("changes_dtype", "dtype", "is float32"),
        ("recompiles", "compile", "compiled again"),
        ("broadcasts", "bad_input", "nothing was raised"),
        ("gives_nan", "finite", "not finite"),
    ],
)
def test_rejection_names_the_fault(probe: str, rule: str, message: str) -> None:
    record, _, dtype = PROBES[probe]
    with pytest.raises(AssertionError, match=message):
        run_check(record, rule, dtype)


@pytest.mark.parametrize("probe", ["changes_dtype", "gives_nan"])
def test_probe_is_rejected_for_its_fault_only(probe: str) -> None:
    record, _, _ = PROBES[probe]
    run_check(record, "compile", "float32")
