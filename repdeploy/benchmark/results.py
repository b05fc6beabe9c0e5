"""bench.json: rows merged by what they measured, and one benchmark beside an earlier one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from repdeploy.bundle import BENCH, Bundle, write_text
from repdeploy.errors import InputError, UsageError
from repdeploy.measurements import BENCH_SCHEMA, Bench, BenchRow, Comparison, Timing, bench_from_json
from repdeploy.records import plain, to_json
from repdeploy.statistics import apart

SAME_MACHINE = ("machine", "processor", "cores", "gpu")
"""What two benchmarks must share to be compared."""


def read(path: Path) -> Bench:
    """A benchmark from a file, or from its bundle. Raises UsageError where there is none, InputError where it is none."""
    file = path / BENCH if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"there is no benchmark at {file}", hint="bench writes bench.json into its bundle")
    try:
        return bench_from_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as reason:
        raise InputError(
            f"{file} is no benchmark: {str(reason)[:300]}", hint=f"expected what bench writes ({BENCH_SCHEMA}); measure again"
        ) from reason


def stored(bundle: Bundle) -> Bench | None:
    """What a bundle's bench.json holds; None where there is none, or where it is of an older version. Raises InputError."""
    path = bundle.path / BENCH
    return None if not path.is_file() or _is_older(path) else read(path)


def _is_older(path: Path) -> bool:
    """Whether an earlier version wrote it: such rows are measured again, not converted."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
        name, version = schema.split("/")
        own_name, own_version = BENCH_SCHEMA.split("/")
        return name == own_name and int(version) < int(own_version)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def merge(bundle: Bundle, fresh: Bench) -> None:
    """Write bench.json into a bundle: rows and density tables of the same key replace older ones.

    What was measured of another network, on another machine or with other versions is not kept beside it.
    """
    with bundle.locked():
        old = stored(bundle)
        if old is not None and _origin(old) != _origin(fresh):
            old = None
        kept = [row for row in old.rows if not any(_replaces(new, row) for new in fresh.rows)] if old is not None else []
        before = {key(row): row for row in old.rows} if old is not None else {}
        fresh = replace(fresh, rows=tuple(_with_inside(row, before.get(key(row))) for row in fresh.rows))
        rows = (*kept, *(row for row in fresh.rows if not any(_replaces(measured, row) for measured in kept)))
        roofs = {(item.device, item.threads): item for item in (*(old.rooflines if old else ()), *fresh.rooflines)}
        tables = {(item.runtime, item.device, item.threads): item for item in (*(old.density if old else ()), *fresh.density)}
        merged = replace(
            fresh, rows=rows, rooflines=tuple(roofs.values()), density=tuple(tables.values()),
        )  # fmt: skip
        write_text(bundle.path / BENCH, to_json(merged))


def _with_inside(new: BenchRow, old: BenchRow | None) -> BenchRow:
    """A row of latencies alone keeps what was seen inside the same networks before."""
    if old is None or new.memory or new.profiles or not new.timings:
        return new
    return replace(new, memory=old.memory, profiles=old.profiles, findings=new.findings or old.findings)


def fingerprint(bundle: Bundle) -> str:
    """What tells a bundle's network from another one: its weights, and the facts that describe it."""
    manifest = bundle.manifest
    told = json.dumps([manifest.weights_sha256, plain(manifest.facts)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def require_same_network(bundle: Bundle, measured: str) -> None:
    """Raises UsageError where a bundle holds another network than the one that was measured."""
    if fingerprint(Bundle(bundle.path)) != measured:
        raise UsageError(
            f"{bundle.path} was converted again while it was measured: the measurement is of another network and was not kept",
            hint="measure it again",
        )


def _origin(bench: Bench) -> tuple[object, ...]:
    """Network, machine and versions; threads are each row's own."""
    told = {name: value for name, value in bench.environment.items() if name != "threads"}
    return bench.subject_sha256, told


def _replaces(new: BenchRow, old: BenchRow) -> bool:
    """Whether a row takes the place of an older one: it has the same key, or the older one only said what was missing."""
    if old.timings and new.timings:
        return key(new) == key(old)
    return not old.timings and (new.runtime, new.device, new.batch) == (old.runtime, old.device, old.batch)


def key(row: BenchRow) -> tuple[object, ...]:
    """What a row measured: two rows of one key are the same measurement."""
    first = row.timings[0] if row.timings else None
    return row.runtime, row.device, row.batch, first.input_shape[1:] if first else (), first.threads if first else 0


def resumable(
    old: Bench | None, image: Sequence[int], device: str, threads: int, now: Mapping[str, str], network: str
) -> Bench | None:
    """What need not be measured again: of the same network, device, image, threads, machine and versions. None where they
    differ."""
    if old is None or _origin(old) != _origin(replace(old, environment=now, subject_sha256=network)):
        return None
    wanted = device, tuple(image), threads
    rows = tuple(row for row in old.rows if row.timings and (row.device, *key(row)[3:]) == wanted)
    mine = device, threads
    return replace(
        old,
        rows=rows,
        density=tuple(item for item in old.density if (item.device, item.threads) == mine),
        rooflines=tuple(item for item in old.rooflines if (item.device, item.threads) == mine),
    )


def require_same_machine(old: Bench, now: Mapping[str, str]) -> None:
    """Raises InputError where a benchmark is from another machine."""
    for name in SAME_MACHINE:
        before, here = old.environment.get(name, ""), now.get(name, "")
        if before != here:
            raise InputError(
                f"the baseline is from another machine: {name} {before or 'none'}, here {here or 'none'}",
                hint="measure the baseline on this machine",
            )


def compared(old: Bench, new: Bench) -> tuple[Comparison, ...]:
    """Every row of the new benchmark beside the same row of the old one, for the network that is shipped.

    Raises InputError where the machines differ or nothing can be compared.
    """
    require_same_machine(old, new.environment)
    earlier = {(key(row), timing.network): timing for row in old.rows for timing in row.timings}
    doubtful = {key(row) for row in old.rows if not row.is_stable}
    shipped = ((row, row.timings[-1]) for row in new.rows if row.timings)
    found = tuple(
        Comparison(
            row.runtime,
            row.device,
            row.batch,
            timing.network,
            apart(timing.seconds, old_timing.seconds),
            row.is_stable and key(row) not in doubtful,
        )
        for row, timing in shipped
        if (old_timing := _same(earlier.get((key(row), timing.network)), timing)) is not None
    )
    if not found:
        raise InputError(
            "the baseline has no row of the same runtime, device, batch size, image and threads",
            hint="give the same --batch, --input-shape and --threads as the baseline",
        )
    return found


def _same(before: Timing | None, now: Timing) -> Timing | None:
    if before is None or (before.precision, before.layout) != (now.precision, now.layout):
        return None
    return before
