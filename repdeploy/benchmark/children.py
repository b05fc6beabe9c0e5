"""Child processes that measure, and what they answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repdeploy.benchmark.conditions import Watch
from repdeploy.errors import BackendFailed, BackendMissing, InputError, RepDeployError, UsageError, words

WORKER = "repdeploy.benchmark.worker"
KINDS: Mapping[int, type[RepDeployError]] = {
    kind.exit_status: kind for kind in (UsageError, InputError, BackendMissing, BackendFailed)
}
"""A child's errors by its exit status."""


@dataclass(slots=True)
class Answered:
    """One answer, and the machine while it was measured."""

    record: Any
    watch: Watch


def asked(request: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Iterator[Answered]:
    """The answers of a child to one task, as they come. `variables`: environment that it needs from its start.

    Raises what the child raised, in its own words, or BackendFailed with how it died.
    """
    watch, failure, hint = Watch(str(request["device"])), "", ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:  # no pipe: nobody would empty it
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            env={**os.environ, **(variables or {})},
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that died at once says why by its exit status
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            with watch.on(child.pid):
                for line in child.stdout:
                    answer = _answer(line)
                    if answer is None:
                        continue
                    if "answer" in answer:
                        yield Answered(answer["answer"], watch)
                    else:
                        failure, hint = answer["error"], answer["hint"]
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        if child.returncode != 0:
            said.seek(0)
            kind = KINDS.get(child.returncode, BackendFailed) if failure else BackendFailed
            raise kind(failure or _last_words(child.returncode, said.read()), hint=hint)


def _answer(line: str) -> dict[str, Any] | None:
    """None for what is no answer: something that printed before the worker could turn it away, or half a line of the dead."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and ("answer" in found or "error" in found) else None


def _last_words(status: int, said: str) -> str:
    if status == -signal.SIGKILL:
        return "it was killed by the system (signal 9), which happens where memory runs out"
    if status < 0:
        return f"it crashed with {signal.Signals(-status).name}"
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return words(lines[-1], 200) if lines else f"exit status {status}"
