"""Every method of the catalog keeps the rules, in every dtype."""

from __future__ import annotations

import pytest

from optimkit import catalog
from optimkit.protocols import RULES, Method
from tests.contract.checks import CHECKS, run_check
from tests.contract.trees import DTYPES
from tests.exempt import marks_of

METHODS = {
    name: record
    for name, record in catalog.records().items()
    if record.kind in ("recipe", "piece", "wrapper")
}


USUAL_DTYPES = {
    "state": ("float32",),
    "finite": ("float16", "float32"),
    "dtype": ("bfloat16",),
    "compile": ("float32",),
    "compose": ("float32",),
    "trees": ("float32",),
    "bad_input": ("float32",),
    "restart": ("float32",),
}
"""Where each rule says most; recordings run in float64. ``make test-full`` runs all dtypes."""


CASES = [
    pytest.param(
        record,
        rule,
        dtype,
        id=f"{name}-{rule}-{dtype}",
        marks=marks_of(record, rule, dtype, usual=USUAL_DTYPES[rule]),
    )
    for name, record in METHODS.items()
    for rule in CHECKS
    for dtype in DTYPES
]


@pytest.mark.parametrize(("record", "rule", "dtype"), CASES)
def test_rule(record: Method, rule: str, dtype: str) -> None:
    run_check(record, rule, dtype)


def test_no_check_is_missing() -> None:
    from tests.goldens.test_goldens import FIDELITY_CASES
    from tests.parallel.cases import SHARDING_CASES

    run = {(case.values[0].name, case.values[1]) for case in CASES}
    run |= {(name, "fidelity") for name in FIDELITY_CASES}
    run |= {(name, "sharding") for name in SHARDING_CASES}
    assert run == {(name, rule) for name in METHODS for rule in RULES}
    assert len(CASES) == len(METHODS) * len(CHECKS) * len(DTYPES)


def test_exemptions_name_rules_and_give_reasons() -> None:
    for name, record in METHODS.items():
        for exempted, reason in record.exempt.items():
            rule, _, dtype = exempted.partition(":")
            assert rule in RULES, f"{name}: unknown rule {rule!r}"
            assert dtype in ("", *DTYPES), f"{name}: unknown dtype {dtype!r}"
            assert len(reason) > 20, f"{name}: give the reason of the exemption from {rule!r}"
