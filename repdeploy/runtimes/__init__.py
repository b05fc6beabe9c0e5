"""Runtimes behind one small interface. Being absent is normal: a runtime says what is missing and how to get it.

Entry-point group `repdeploy.runtimes`.
"""

from repdeploy.plugins import Group
from repdeploy.runtimes.interface import Job, Missing, Profiling, Runtime, Session

RUNTIMES: Group[Runtime] = Group(
    "repdeploy.runtimes", "runtime", "repdeploy.runtimes.Runtime", lambda item: isinstance(item, Runtime)
)

__all__ = ["RUNTIMES", "Job", "Missing", "Profiling", "Runtime", "Session"]
