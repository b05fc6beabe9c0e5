"""Checkpoints, read safely: what lies in the file is data, never code."""

from repdeploy.checkpoint.load import Checkpoint, load
from repdeploy.checkpoint.stored import StoredTensor

__all__ = ["Checkpoint", "StoredTensor", "load"]
