"""Numbers, times and tables as people read them."""

from __future__ import annotations

import pytest

from pscluster.cli import formatting as fmt
from pscluster.errors import SettingsError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (-5, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (192, "3m12s"),
        (3600, "1h"),
        (3605, "1h"),
        (7500, "2h5m"),
        (360000, "4d4h"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.52, "0.5"), (118.4, "118"), (9999, "9999"), (12_400, "12.4k"), (3_100_000, "3.1M")]
)
def test_count(value: float, text: str) -> None:
    assert fmt.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (8 << 30, "8.0 GiB")])
def test_size(value: int, text: str) -> None:
    assert fmt.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (2.5, "2.5000"), (0.0, "0.0000"), (1e-7, "1e-07")])
def test_number(value: float | None, text: str) -> None:
    assert fmt.number(value) == text


def test_table_aligns_and_keeps_text_in_its_cell() -> None:
    table = fmt.table(("NAME", "STATE"), [("a", "RUNNING"), ("long-name", ""), ("x", "two\nlines\x1b[31m")])
    assert table.splitlines() == [
        "NAME        STATE",
        "a           RUNNING",
        "long-name   -",
        "x           two lines [31m",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172800)]
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert fmt.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 parsecs", "-3", "nan", "inf", "5mm", "m5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="duration"):
        fmt.parse_duration(text)


def test_since_is_an_age_or_a_time() -> None:
    assert fmt.parse_since("10m", 1000.0) == 400.0
    assert fmt.parse_since("1970-01-01T00:01:40+00:00", 0.0) == 100.0
