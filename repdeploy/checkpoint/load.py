"""One door for every container: sniff it, read its tree, choose the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repdeploy.checkpoint.other_files import read_hdf5, read_safetensors
from repdeploy.checkpoint.stored import StoredTensor
from repdeploy.checkpoint.torch_file import read_stream, read_zip
from repdeploy.checkpoint.wrappers import architecture_hint, choose
from repdeploy.errors import InputError, UnreadableCheckpoint, UnsafeCheckpoint, UsageError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one network as they lie in a file.

    `where`: the keys that led to them; `prefix`: what was stripped from every key; `others`: tables of tensors that
    were not taken; `architecture`: the name stored beside them; `attributes`: per module of a pickled network, its
    class and geometry; `inert`: classes in the file that were read as data.
    """

    path: Path
    container: str
    weights: str
    where: str
    prefix: str
    tensors: Mapping[str, StoredTensor]
    others: tuple[tuple[str, int], ...] = ()
    has_ema: bool = False
    architecture: str | None = None
    attributes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()


def load(path: Path, weights: str = "model") -> Checkpoint:
    """Open a training checkpoint without running anything in it. `weights` is "model" or "ema".

    Raises UsageError when there is no such file, UnreadableCheckpoint, UnsafeCheckpoint or InputError for its contents.
    """
    container = sniff(path)
    inert: frozenset[str] = frozenset()
    tree: Any
    if container == "torch zip":
        tree, inert = read_zip(path)
    elif container == "torch stream":
        tree, inert = read_stream(path)
    elif container == "safetensors":
        tree = read_safetensors(path)
    else:
        tree = read_hdf5(path)
    chosen, others = choose(tree, weights)
    odd = next((key for key in chosen.tensors if key != printable(key)), None)
    if odd is not None:
        raise UnreadableCheckpoint(
            f"a tensor's name has characters that cannot be printed: {printable(odd)[:80]}",
            hint="rename it and save the file again",
        )
    stored = sum(tensor.bytes for tensor in chosen.tensors.values())
    if stored > 8 * path.stat().st_size + (64 << 20):
        raise UnsafeCheckpoint(
            f"the tensors of {path.name} expand to {stored >> 20:,} MiB, the file has {path.stat().st_size >> 20:,}: "
            "they repeat a few numbers, as no trained weights do",
            hint="save contiguous tensors: {key: tensor.contiguous()}",
        )
    return Checkpoint(
        path=path,
        container=container,
        weights="ema" if chosen.is_ema else "model",
        where=printable(chosen.where),
        prefix=chosen.stripped,
        tensors=chosen.tensors,
        others=tuple((printable(item.where), len(item.tensors)) for item in others),
        has_ema=chosen.is_ema or any(item.is_ema for item in others),
        architecture=printable(architecture_hint(tree) or _sibling_architecture(path) or "")[:200] or None,
        attributes=chosen.attributes,
        inert=frozenset(map(printable, inert)),
    )


def sniff(path: Path) -> str:
    """The container, from its first bytes: names of files prove nothing."""
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint="give the checkpoint file in it")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file", hint="copy its contents into a file first")
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError as reason:
        raise UsageError(f"there is no file {path}", hint="check the path") from reason
    except OSError as reason:
        raise UsageError(f"{path} cannot be read: {reason.strerror}", hint="check the path and its permissions") from reason
    if head[:4] == b"PK\x03\x04":
        return "torch zip"
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return "hdf5"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if head[:1] == b"\x80":
        return "torch stream"
    known = "a torch.save file (.pth, .pt, .pth.tar), .safetensors or .hdf5"
    if not head:
        raise UnreadableCheckpoint(f"{path.name} is empty; expected {known}", hint="copy or download it again")
    if path.suffix == ".onnx":
        raise InputError(
            f"{path.name} is an ONNX graph; expected {known}",
            hint="repdeploy convert squeezes graphs; with --dry-run --explain it only says what it would do",
        )
    what = "a text file" if _is_text(head) else "no container known here"
    raise UnreadableCheckpoint(
        f"{path.name} is {what}; expected {known}", hint="if it was downloaded, look inside: it may be an error page"
    )


def printable(text: str) -> str:
    """Text from a file with everything spelled out that a terminal would act on or could not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)


def _sibling_architecture(path: Path) -> str | None:
    """The name in a config.json beside the file (Hugging Face layout)."""
    config = path.parent / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > 1 << 20:
            return None
        content = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None
    name = content.get("architecture") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
