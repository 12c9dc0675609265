"""A pytest plugin: one line of JSON a test, as it ends, in the file that LARGEST_ERROR_LOG names.

The error of a test is the largest `|actual - expected| / |expected|` (whole tensors, 2-norm) of its
calls of `torch.testing.assert_close`, failed ones included. It is None for a test that never calls
it, such as one that compares bits.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch


def relative_error(actual: Any, expected: Any) -> float:
    """`|actual - expected| / |expected|` of two tensors of one shape; equal infinities and NaN in
    both do not count."""
    wide = [torch.as_tensor(value).detach().double().cpu() for value in (actual, expected)]
    if wide[0].shape != wide[1].shape:
        return float("inf")
    same = (wide[0] == wide[1]) | (wide[0].isnan() & wide[1].isnan())
    off = float((wide[0] - wide[1])[~same].norm())
    size = float(wide[1][wide[1].isfinite()].norm())
    return off / size if size else off


@pytest.fixture(autouse=True)
def _largest_error(
    record_property: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> Any:
    compare, errors = torch.testing.assert_close, []

    def watched(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
        if isinstance(expected, torch.Tensor | float):
            errors.append(relative_error(actual, expected))
        compare(actual, expected, *args, **options)

    monkeypatch.setattr(torch.testing, "assert_close", watched)
    yield
    if errors:
        record_property("error", max(errors))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Workers of xdist hand their reports to the one process that writes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    properties = dict(report.user_properties)
    line = {
        "test": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "seconds": report.duration,
        "error": properties.get("error"),
        "message": str(report.longrepr).strip().splitlines()[-1:] if report.failed else [],
    }
    with open(os.environ["LARGEST_ERROR_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
