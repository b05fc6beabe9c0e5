"""repdeploy: fuse, prove, export and benchmark structural re-parameterization networks.

    import repdeploy
    conversion = repdeploy.convert("ckpt.pth", family="repvgg")      # the command line's verbs, flag names as keywords

Importing the package loads no tensor library; calling a verb does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repdeploy.pipeline import bench, convert, doctor, export, families, inspect, report, verify

__all__ = ["bench", "convert", "doctor", "export", "families", "inspect", "report", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from repdeploy import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'repdeploy' has no attribute {name!r}")
