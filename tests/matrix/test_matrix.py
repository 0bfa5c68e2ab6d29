"""Every family on every kind of mesh computes what one device does. `make matrix`; tests/matrix/conftest.py writes docs/matrix.md of it."""

from collections.abc import Callable

import pytest
from parallel import columns


@pytest.mark.parametrize("column", columns.COLUMNS)
@pytest.mark.parametrize("family", columns.FAMILIES)
def test_a_mesh_computes_what_one_device_does(family: str, column: str, record_property: Callable[[str, object], None]) -> None:
    found = columns.deviations(family, column)
    loss = found.pop("loss")
    array = max(found, key=found.__getitem__)
    record_property("cell", [family, column, loss, found[array], array])
    assert loss <= 1e-5 and found[array] <= 1e-5, (loss, array, found[array])


@pytest.mark.parametrize("column", columns.COLUMNS)
@pytest.mark.parametrize(("adapter", "family"), columns.ADAPTED)
def test_a_mesh_trains_adapters_as_one_device_does(
    adapter: str, family: str, column: str, record_property: Callable[[str, object], None]
) -> None:
    found = columns.deviations(family, column, adapter)
    loss = found.pop("loss")
    array = max(found, key=found.__getitem__)
    record_property("adapter", [columns.named(adapter, family), column, loss, found[array], array])
    assert loss <= 1e-5 and found[array] <= 1e-5, (loss, array, found[array])


@pytest.mark.parametrize(("grid", "column"), columns.GRID_CELLS)
def test_a_mesh_trains_adapters_beside_codes_as_one_device_does(grid: str, column: str) -> None:
    found = columns.deviations("llama", column, grid)
    assert max(found.values()) <= 1e-5, found
