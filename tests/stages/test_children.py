"""Child processes that measure: how they end, and the machine meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from repdeploy.benchmark import children, conditions
from repdeploy.benchmark.children import asked
from repdeploy.errors import BackendFailed, BackendMissing, InputError, RepDeployError, UsageError


@pytest.fixture(autouse=True)
def broken_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "WORKER", "tests.standins.broken_worker")


@pytest.mark.parametrize(
    ("ends", "kind", "said"),
    [
        ("SIGSEGV", BackendFailed, "it crashed with SIGSEGV"),
        ("SIGKILL", BackendFailed, "killed by the system"),
        ("raised", BackendFailed, "ZeroDivisionError: a bug"),
        ("status 2", UsageError, "what happened"),
        ("status 3", InputError, "what happened"),
        ("status 5", BackendMissing, "what happened"),
        ("status 6", BackendFailed, "what happened"),
    ],
)
def test_what_a_child_said_before_it_died_is_kept(ends: str, kind: type[RepDeployError], said: str) -> None:
    answers: list[object] = []
    with pytest.raises(RepDeployError) as caught:
        answers.extend(answer.record for answer in asked({"device": "cpu", "ends": ends}))
    assert answers == [{"number": 1}]
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert (caught.value.hint == "what to do") == ends.startswith("status")


def test_a_child_that_is_given_up_is_gone() -> None:
    stream = asked({"device": "cpu", "ends": "status 0"})
    child = next(stream).watch._child
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_load_of_others_is_told_apart_from_our_own() -> None:
    spin = "import time\nend = time.perf_counter() + 1.0\nwhile time.perf_counter() < end: pass"
    ours = subprocess.Popen([sys.executable, "-c", spin])
    watch = conditions.Watch("cpu")
    with watch.on(ours.pid):
        others = subprocess.Popen([sys.executable, "-c", spin])
        others.wait()
        disturbed = watch.seen().load
    ours.wait()
    assert disturbed is not None
    assert disturbed > 0.5 / (os.cpu_count() or 1)


def test_the_conditions_name_machine_and_versions() -> None:
    found = conditions.environment(3)
    assert found["threads"] == "3"
    assert int(found["cores"]) == conditions.cores() >= 1
    assert {"processor", "system", "python", "torch", "onnxruntime"} <= set(found)
