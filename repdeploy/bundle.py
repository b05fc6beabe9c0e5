"""The bundle: a folder that needs neither the checkpoint nor the paper's code again (design section 5)."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repdeploy.digest import digest
from repdeploy.errors import InputError, UsageError, VerificationFailed
from repdeploy.records import Artifact, Manifest, manifest_from_json, to_json

if TYPE_CHECKING:
    from repdeploy.checkpoint.stored import StoredTensor

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
REFERENCES = "references.npz"
SOURCE = "source.onnx"
BENCH = "bench.json"
SUFFIX = ".repdeploy"
FAILED = ".failed"
"""In front of the suffix of what --keep-failed keeps; such a bundle is never taken unless it is named."""
PARTIAL = ".partial-"
MAX_REFERENCE_BYTES = 64 << 20
FED, ANSWERED = "fed:", "answered:"
"""In front of a graph's input and output names in its references."""
Arrays = dict[str, np.ndarray]


class Bundle:
    """An opened bundle. Raises InputError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._intact_files: set[tuple[str, str]] = set()  # hashed once, however often a command opens them
        try:
            self.manifest: Manifest = manifest_from_json((path / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as reason:
            raise UsageError(f"{path} is no bundle: it has no {MANIFEST}", hint="make one with repdeploy convert") from reason
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise InputError(f"{path / MANIFEST} is not understood: {reason}", hint="convert the checkpoint again") from reason

    def tensors(self) -> dict[str, StoredTensor]:
        from repdeploy.checkpoint.other_files import read_safetensors  # a bundle is opened where there is no torch, too

        return read_safetensors(self.intact(WEIGHTS, self.manifest.weights_sha256))

    def references(self) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """Per image shape (channels, height, width): inputs in float32 and their float64 outputs."""
        if self.manifest.references_sha256 is None:
            return {}
        self.intact(REFERENCES, self.manifest.references_sha256)
        return self.references_in(self.path)

    def graph_references(self) -> tuple[Arrays, Arrays]:
        """Of a bundle made from a graph: inputs and float64 outputs by name, (sets, ...) each; empty where there are none."""
        if self.manifest.references_sha256 is None:
            return {}, {}
        with np.load(self.intact(REFERENCES, self.manifest.references_sha256)) as arrays:
            inputs, outputs = (
                {name.removeprefix(side): arrays[name] for name in arrays if name.startswith(side)} for side in (FED, ANSWERED)
            )
        return inputs, outputs

    def graph_source(self) -> Path:
        """The graph that a bundle was made from. Raises InputError where it is missing or not that one."""
        assert self.manifest.graph is not None
        return self.intact(SOURCE, self.manifest.graph.sha256)

    def squeezed_graph(self) -> Path:
        """What the graph became. Raises InputError as `graph_source`."""
        onnx = self.own_artifact()
        return self.intact(onnx.file, onnx.sha256)

    def own_artifact(self) -> Artifact:
        """Of a bundle made from a graph: the squeezed graph as `convert` wrote it, which is made from itself."""
        return next(item for item in self.manifest.artifacts if item.kind == "onnx" and item.made_from == item.sha256)

    @staticmethod
    def references_in(folder: Path) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """The references of a folder that is not a bundle yet; none where there is no file."""
        if not (folder / REFERENCES).is_file():
            return {}
        with np.load(folder / REFERENCES) as arrays:
            pairs = [(arrays[name], arrays[name.replace("input", "output", 1)]) for name in arrays if name.startswith("input")]
        return {inputs.shape[1:]: (inputs, outputs) for inputs, outputs in pairs}

    def require_verified(self) -> None:
        """Raises VerificationFailed for a bundle that --keep-failed left."""
        if not self.manifest.verdict.passed:
            first = self.manifest.verdict.failures[0]
            raise VerificationFailed(
                f"{self.path} failed verification at gate '{first.gate}' when it was converted",
                hint="it was kept for a look; nothing is made from it",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other command writes into this bundle, and see what the last one wrote."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.manifest = Bundle(self.path).manifest
            yield
        finally:
            os.close(handle)

    def write_manifest(self, manifest: Manifest) -> None:
        write_text(self.path / MANIFEST, to_json(manifest))
        self.manifest = manifest

    def intact(self, name: str, sha256: str) -> Path:
        """A file of the bundle. Raises InputError where it is missing or not the one that the manifest vouches for."""
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{path} is missing", hint="convert the checkpoint again")
        if (name, sha256) not in self._intact_files and digest(path) != sha256:
            raise InputError(f"{path} is not the file the manifest vouches for", hint="convert the checkpoint again")
        self._intact_files.add((name, sha256))
        return path


def newest(folder: Path) -> Path:
    """The bundle in a folder whose manifest was written last. Raises UsageError when there is none."""
    found = [
        path for path in folder.glob(f"*{SUFFIX}") if (path / MANIFEST).is_file() and not path.name.endswith(FAILED + SUFFIX)
    ]
    if not found:
        raise UsageError(
            "there is no bundle in this folder", hint="make one with repdeploy convert CHECKPOINT, or give a bundle's path"
        )
    return max(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))


def save_references(path: Path, pairs: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]) -> None:
    """Write inputs and outputs per image shape, byte for byte the same for the same arrays; capped in size."""
    arrays: dict[str, np.ndarray] = {}
    for shape, (inputs, outputs) in pairs.items():
        per_image = (inputs.nbytes + outputs.nbytes) // len(inputs)
        kept = max(1, min(len(inputs), MAX_REFERENCE_BYTES // max(per_image, 1)))
        suffix = "" if not arrays else "_" + "x".join(map(str, shape))
        arrays[f"input{suffix}"], arrays[f"output{suffix}"] = inputs[:kept], outputs[:kept]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def save_graph_references(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    """Write inputs and outputs by name, as many sets of them as the cap allows."""
    sets = len(next(iter(inputs.values())))
    per_set = sum(array.nbytes for array in (*inputs.values(), *outputs.values())) // sets
    kept = max(1, min(sets, MAX_REFERENCE_BYTES // max(per_set, 1)))
    arrays = {FED + name: array[:kept] for name, array in inputs.items()}
    arrays |= {ANSWERED + name: array[:kept] for name, array in outputs.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def check_target(path: Path, force: bool) -> Manifest | None:
    """What stands where a bundle will be written: nothing (None) or a bundle. Raises UsageError for anything else."""
    if not path.exists():
        return None
    if path.is_dir() and (path / MANIFEST).is_file():
        try:
            return Bundle(path).manifest
        except InputError:
            if force:
                return None
            raise
    if path.is_dir() and not any(path.iterdir()):
        return None
    raise UsageError(f"{path} exists and is no bundle; it is left as it is", hint="give another output with -o")


@contextmanager
def new_bundle(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target that becomes the target when the block ends well, and vanishes otherwise.

    Raises UsageError where the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{PARTIAL}", dir=target.parent))
    except OSError as reason:
        raise UsageError(
            f"{target.parent} cannot be written: {reason.strerror}", hint="give another output with -o"
        ) from reason
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            retired = temporary.with_name(temporary.name + ".old")
            target.rename(retired)
            temporary.rename(target)
            shutil.rmtree(retired)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file; it takes the file's place when the block ends well, and vanishes otherwise.

    Raises UsageError where the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as reason:
        raise UsageError(f"{path} cannot be written: {reason.strerror}", hint="give another output with -o") from reason
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
