"""What rows and lists are called on a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from repdeploy.measurements import BenchRow


def row_label(row: BenchRow, among: Sequence[BenchRow]) -> str:
    """Runtime and batch size; device, image and threads where there are several."""
    device = f" ({row.device})" if len({other.device for other in among}) > 1 else ""
    label = f"{row.runtime}{device}, batch {row.batch}"
    if not row.timings:
        return label
    first, others = row.timings[0], [other.timings[0] for other in among if other.timings]
    if len({timing.input_shape[1:] for timing in others}) > 1:
        label += f", {'x'.join(map(str, first.input_shape[1:]))}"
    if len({timing.threads for timing in others}) > 1:
        label += f", {first.threads} threads"
    return label


def distinct(values: Iterable[object]) -> str:
    """Every value once, in order."""
    return ", ".join(dict.fromkeys(map(str, values)))


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by what is said about them: (name, reason) -> reason: names."""
    groups: dict[str, list[str]] = {}
    for name, reason in pairs:
        groups.setdefault(reason, []).append(name)
    return groups


def some(names: Sequence[str], most: int = 4) -> str:
    """A long list's beginning, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
