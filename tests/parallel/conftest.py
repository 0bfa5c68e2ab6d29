"""Everything here is about meshes: no program comes out of the compilation cache."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _anew(compiled_anew):
    return
