"""Which step is better: its latency, free of drift, against its AP50 on the device."""

from collections.abc import Iterable, Mapping
from typing import Any


def is_ranked(row: Mapping[str, Any]) -> bool:
    return row["latency_ranked_ms"] is not None and row["device_ap50"] is not None


def on_front(row: Mapping[str, Any], rivals: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether no rival is as good in AP50 and latency and better in one; None where one was not measured."""
    if not is_ranked(row):
        return None
    latency_ms, ap50 = row["latency_ranked_ms"], row["device_ap50"]
    return not any(
        other["latency_ranked_ms"] <= latency_ms
        and other["device_ap50"] >= ap50
        and (other["latency_ranked_ms"], other["device_ap50"]) != (latency_ms, ap50)
        for other in rivals
        if is_ranked(other)
    )


def fastest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of ranked rows; equally fast ones differ in AP50, then in parameters."""
    return min(rows, key=lambda row: (row["latency_ranked_ms"], -row["device_ap50"], row["params"]))


def most_accurate(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of ranked rows; equally accurate ones differ in latency, then in parameters."""
    return min(rows, key=lambda row: (-row["device_ap50"], row["latency_ranked_ms"], row["params"]))
