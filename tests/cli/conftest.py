"""The command line as a user runs it: a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.networks import repvgg, save


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass(frozen=True, slots=True)
class CommandLine:
    folder: Path

    def __call__(self, *arguments: object, **environment: str) -> Answer:
        run = subprocess.run(
            [sys.executable, "-m", "repdeploy", *map(str, arguments)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        return Answer(run.returncode, run.stdout, run.stderr)


class InProcess:
    """The same command line without the seconds of a new process: for many small questions."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(folder)
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Answer:
        from repdeploy_cli.app import run

        self._capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        said = self._capsys.readouterr()
        return Answer(status, said.out, said.err)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess(tmp_path, monkeypatch, capsys)


@pytest.fixture
def repdeploy(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A small RepVGG's training checkpoint, in the folder where the commands run."""
    return save(repvgg(groups=2), tmp_path / "ckpt.pth")
