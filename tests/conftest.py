"""Switches Triton's interpreter on for every tier but the GPU one, before anything can import triton."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads the variable when a kernel is decorated, its own library functions included: at import."""
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
