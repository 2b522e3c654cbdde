"""Every method of the catalog on eight simulated devices."""

from __future__ import annotations

import pytest

from optimkit.protocols import Method
from tests.contract.probes import MESH_PROBE
from tests.exempt import marks_of
from tests.parallel import cases
from tests.parallel.devices import EIGHT_DEVICES

pytestmark = EIGHT_DEVICES

RECORDS = [
    pytest.param(record, id=name, marks=marks_of(record, "sharding"))
    for name, record in cases.SHARDING_CASES.items()
]


@pytest.mark.parametrize("record", RECORDS)
def test_sharded_equals_single_device(record: Method) -> None:
    subject = cases.Subject(record)
    cases.check_sharding(subject, cases.usual_placements(record), eager=("turn 0",))
    cases.check_manual(subject)


@pytest.mark.slow
@pytest.mark.parametrize("record", RECORDS)
def test_every_placement(record: Method) -> None:
    cases.check_sharding(cases.Subject(record))


def test_a_transformation_that_flattens_is_rejected() -> None:
    with pytest.raises(Exception, match="reshape"):
        cases.check_sharding(cases.Subject(MESH_PROBE))
