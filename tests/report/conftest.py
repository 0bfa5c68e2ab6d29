"""Coarse pictures: what is drawn does not depend on the resolution, the time it takes does."""

import pytest

from jaxllm.report import canvas


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 40)
