"""Reading checkpoints: every container and wrapper, and everything that must be refused without running or exhausting."""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repdeploy.checkpoint import Checkpoint, load
from repdeploy.errors import InputError, RepDeployError, UnreadableCheckpoint, UnsafeCheckpoint, UsageError

STATE = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "conv.bias": torch.tensor([1.5, -2.0])}


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs pickles it: a dict subclass with state of its own."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.__dict__["_frozen"] = True


class Net(nn.Module):
    """A module that the reader must understand without this class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2, stride=3, bias=True)
        self.norm = nn.BatchNorm2d(2, eps=0.25)
        self.register_buffer("scratch", torch.ones(1), persistent=False)


def same(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert list(checkpoint.tensors) == list(state)
    for key, wanted in state.items():
        got = checkpoint.tensors[key]
        assert (got.shape, got.dtype) == (tuple(wanted.shape), wanted.dtype), key
        assert torch.equal(got.read(), wanted), key


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_files_of_both_forms(legacy: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in STATE.items()} | {"count": torch.tensor(7), "empty": torch.zeros(0, 3)}
    same(load(saved(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_share_their_storage(legacy: bool, tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    state = {"rows": base[2:4], "turned": base.t(), "steps": base[::2, 1::3], "expanded": base[:1].expand(4, 10)}
    same(load(saved(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)), state)


def test_safetensors_and_hdf5(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    checkpoint = load(tmp_path / "a.safetensors")
    assert checkpoint.container == "safetensors"
    same(checkpoint, {key: STATE[key] for key in checkpoint.tensors})
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in STATE.items():
            file.create_dataset(key.replace("/", "+"), data=value.numpy())
        file.create_dataset("block+1.weight", data=np.ones((2, 2), np.float64))
        file.create_dataset("norm.num_batches_tracked", data=np.int64(3))
        file.create_dataset("deps", data=np.array([8, 16]))
    found = load(tmp_path / "a.hdf5").tensors
    assert sorted(found) == ["block/1.weight", "conv.bias", "conv.weight", "norm.num_batches_tracked"]
    assert found["block/1.weight"].read().dtype == torch.float64
    assert int(found["norm.num_batches_tracked"].read()) == 3


WRAPPERS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda s: s, ""),
    (lambda s: OrderedDict(s), ""),
    (lambda s: {"state_dict": s, "epoch": 3, "best_acc1": np.float64(1.5), "arch": "x"}, "state_dict"),
    (lambda s: {"model": s, "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(9, 9))], lr=1).state_dict()}, "model"),
    (lambda s: {"module": s}, "module"),
    (lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}}, "model/state_dict"),
    (lambda s: {"network": {f"_orig_mod.module.{k}": v for k, v in s.items()}}, "network"),
    (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, ""),
    (lambda s: {"weird": {"deep": s}, "optimizer": {"state": {0: {"exp_avg": torch.ones(50)}}}}, "weird/deep"),
    (lambda s: {"model": s, "config": CfgNode({"MODEL": CfgNode({"ARCH": "RepVGG-A0"})})}, "model"),
    (lambda s: {"state_dict": s, "args": argparse.Namespace(model="repvgg_a0", lr=0.1)}, "state_dict"),
    (lambda s: {"state_dict": s, "criterion": {"weight": torch.ones(4)}}, "state_dict"),
    (lambda s: {"epoch": torch.tensor(3), "state_dict": s}, "state_dict"),
    (lambda s: [s, 3], "0"),
]


@pytest.mark.parametrize("index", range(len(WRAPPERS)))
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_at_any_nesting(index: int, legacy: bool, tmp_path: Path) -> None:
    wrap, where = WRAPPERS[index]
    checkpoint = load(saved(wrap(STATE), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy))
    assert checkpoint.where == where
    same(checkpoint, STATE)


def test_a_prefix_inside_a_name_stays(tmp_path: Path) -> None:
    state = {"module.a.module.weight": torch.ones(1), "module.module_b.weight": torch.ones(1)}
    assert list(load(saved(state, tmp_path / "a.pth")).tensors) == ["a.module.weight", "module_b.weight"]
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(load(saved(mixed, tmp_path / "b.pth")).tensors) == ["module.a", "b"]


@pytest.mark.parametrize("name", ["ema", "state_dict_ema", "model_ema", "ema_state_dict"])
def test_ema_is_taken_only_when_asked_for(name: str, tmp_path: Path) -> None:
    averaged = {key: value + 100 for key, value in STATE.items()}
    path = saved({"model": STATE, name: averaged}, tmp_path / "a.pth")
    checkpoint = load(path)
    same(checkpoint, STATE)
    assert checkpoint.has_ema
    assert checkpoint.weights == "model"
    same(load(path, "ema"), averaged)
    with pytest.raises(InputError, match="no EMA weights"):
        load(saved({"model": STATE}, tmp_path / "b.pth"), "ema")


def test_a_file_of_nothing_but_ema_weights_says_so(tmp_path: Path) -> None:
    assert load(saved({"ema": STATE}, tmp_path / "a.pth")).weights == "ema"


def test_stored_names_are_hints(tmp_path: Path) -> None:
    assert load(saved({"arch": "RepVGG-A0", "state_dict": STATE}, tmp_path / "a.pth")).architecture == "RepVGG-A0"
    config = CfgNode({"MODEL": CfgNode({"ARCH": "RepVGG-B1"})})
    assert load(saved({"model": STATE, "config": config}, tmp_path / "b.pth")).architecture == "RepVGG-B1"
    namespace = argparse.Namespace(model="repvgg_a1")
    assert load(saved({"state_dict": STATE, "args": namespace}, tmp_path / "c.pth")).architecture == "repvgg_a1"
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "repvgg_a2"}')
    assert load(folder / "model.safetensors").architecture == "repvgg_a2"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_pickled_module_is_read_as_a_tree(legacy: bool, tmp_path: Path) -> None:
    model = Net()
    path = saved({"model": model, "epoch": 1}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint = load(path)
    same(checkpoint, dict(model.state_dict()))
    assert checkpoint.attributes["norm"]["eps"] == 0.25
    assert checkpoint.attributes["conv"]["stride"] == (3, 3)
    assert any(name.endswith("Net") for name in checkpoint.inert)


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    """A module that would leave a trace when it is imported, and a class that would when it is built."""
    (tmp_path / "trap.py").write_text(
        "open('imported', 'w')\nclass Trap:\n    def __init__(self): self.x = 1\n"
        "    def __setstate__(self, state): open('built', 'w')\n"
    )
    make = "import trap, torch; torch.save({'state_dict': {'w': torch.ones(2)}, 'extra': trap.Trap()}, 'a.pth')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    (tmp_path / "imported").unlink()
    read = "from pathlib import Path; from repdeploy.checkpoint import load; print(list(load(Path('a.pth')).tensors))"
    answer = subprocess.run([sys.executable, "-c", read], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "['w']"
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "built").exists()


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Runs(os.system, "touch owned"),
        Runs(eval, "1+1"),
        Runs(exec, "x=1"),
        Runs(subprocess.run, ["touch", "owned"]),
        Runs(os.unlink, "a"),
        Runs(open, "owned", "w"),
    ],
    ids=lambda attack: attack.call[0].__name__,
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(attack: Runs, legacy: bool, tmp_path: Path) -> None:
    path = saved({"state_dict": STATE, "x": attack}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpoint, match="Nothing was executed"):
        load(path)
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]


def zip_of(path: Path, program: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def limited(path: Path, seconds: int = 20, megabytes: int = 6000) -> str:
    """Load a file in a child with bounded time and memory; returns the error's class name, or "loaded"."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    code = (
        "import sys\nfrom pathlib import Path\n"
        "from repdeploy.checkpoint import load\nfrom repdeploy.errors import RepDeployError\n"
        "try:\n    c = load(Path(sys.argv[1]))\n    [t.read() for t in c.tensors.values()]\n    print('loaded')\n"
        "except RepDeployError as e:\n    print(type(e).__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limits, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "bomb.pth", b"\x80\x02}.", **{"data/0": bytes(400 << 20)})
    assert path.stat().st_size < 1 << 20
    assert limited(path) == "UnsafeCheckpoint"


def test_tensors_that_repeat_one_number_do_not_expand(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(1).expand(200_000, 200_000)}, tmp_path / "a.pth")
    assert limited(path) == "UnsafeCheckpoint"


def test_nested_keys_do_not_take_exponential_time(tmp_path: Path) -> None:
    """A tuple of two tuples of two tuples ...: hashing it as a dict key would take 2^60 steps."""
    program = b"\x80\x02}(" + b")" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"K\x01u."
    assert limited(zip_of(tmp_path / "a.pth", program)) == "InputError"


def test_a_tree_without_a_bottom_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"}" + b"s" * 5000 + b"."
    assert limited(zip_of(tmp_path / "a.pth", program)) == "InputError"


def nested_pairs(levels: int) -> bytes:
    """Opcodes that leave a tuple of two tuples of two tuples ... on the stack."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def call(module: bytes, name: bytes, *arguments: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n(" + b"".join(arguments) + b"tR"


NAME = b"c" + b"m" * 100_000 + b"\nn\n"
ENTRIES = b"".join(b"M" + struct.pack("<H", i) + b"K\x01" for i in range(60_000))
COPIES = b"".join(call(b"collections", b"OrderedDict", b"h\x01") for _ in range(20_000))
LISTS = b"".join(b"](h\x00h\x00eq\x00" for _ in range(40))
BOMBS = {
    "hash of an ordered dict": b"\x80\x02"
    + call(b"collections", b"OrderedDict", b"](" + nested_pairs(60) + b"K\x01\x86e")
    + b".",
    "copies of a dict": b"\x80\x02}(" + ENTRIES + b"uq\x01" + COPIES + b".",
    "a long name": b"\x80\x02" + NAME + b")R.",
    "a name that is no text": b"\x80\x04" + b"]q\x00" + LISTS + b"X\x01\x00\x00\x00n\x93.",
    "a string of impossible length": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc",
    "steps": b"\x80\x02" + b"N0" * 11_000_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_programs_do_not_take_the_machine(name: str, tmp_path: Path) -> None:
    assert limited(zip_of(tmp_path / "a.pth", BOMBS[name]), seconds=60) in (
        "UnsafeCheckpoint",
        "UnreadableCheckpoint",
        "InputError",
    )


class Deep(nn.Module):
    """An attribute that multiplies when it is written out."""

    def __init__(self) -> None:
        super().__init__()
        value: Any = [1]
        for _ in range(29):
            value = [value, value]
        self.stride = value
        self.w = nn.Parameter(torch.ones(3))


def test_attributes_are_not_written_out(tmp_path: Path) -> None:
    assert limited(saved(Deep(), tmp_path / "a.pth")) == "loaded"


def test_shared_modules_do_not_multiply(tmp_path: Path) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(1))
    for _ in range(60):
        outer = nn.Module()
        outer.a = outer.b = module
        module = outer
    assert limited(saved(module, tmp_path / "a.pth"), seconds=60) == "UnsafeCheckpoint"


def test_hdf5_does_not_reach_into_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 40)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("w", (10,), dtype="f4", external=[(str(tmp_path / "secret"), 0, 40)])
    with pytest.raises(UnsafeCheckpoint, match="another file"):
        load(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_dataset("x", data=np.ones(4, np.float32))
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        layout = h5py.VirtualLayout((4,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "x", shape=(4,))
        file.create_virtual_dataset("w", layout)
    with pytest.raises(UnsafeCheckpoint, match="another file"):
        load(tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file.create_dataset("w", data=np.ones(4, np.float32))
        file.create_dataset("empty", data=h5py.Empty("f4"))
        file.create_dataset("text", data="hello")
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "x")
    assert list(load(tmp_path / "c.hdf5").tensors) == ["w"]


def test_narrow_types_are_read_as_what_they_are(tmp_path: Path) -> None:
    state = {"a": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn), "b": torch.tensor([7, 9], dtype=torch.uint16)}
    checkpoint = load(saved(state, tmp_path / "a.pth"))
    for key, wanted in state.items():
        assert checkpoint.tensors[key].read().dtype == wanted.dtype
        assert checkpoint.tensors[key].read().float().tolist() == wanted.float().tolist()


def test_a_type_that_is_not_understood_matters_only_where_it_is_needed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    same(load(saved({"model": STATE, "calibration": quantized}, tmp_path / "a.pth")), STATE)


@pytest.mark.parametrize("extra", ["pathlib", "namespace", "partial", "own package"])
def test_what_training_scripts_store_beside_the_weights(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content: Any
    if extra == "pathlib":
        content = argparse.Namespace(output=Path("runs/1"), when=datetime.date(2026, 1, 1), device=torch.device("cpu"))
    elif extra == "namespace":
        content = types.SimpleNamespace(lr=np.float32(0.1), seed=np.arange(3), dtype=torch.float16)
    elif extra == "partial":
        content = functools.partial(nn.GELU, approximate="tanh")
    else:
        module = types.ModuleType("code.models")
        module.Net = type("Net", (), {"__module__": "code.models"})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "code.models", module)
        content = module.Net()
    same(load(saved({"state_dict": STATE, "extra": content}, tmp_path / "a.pth")), STATE)


def test_an_averaged_model_is_the_model(tmp_path: Path) -> None:
    model = Net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    same(load(saved(averaged.state_dict(), tmp_path / "a.pth")), dict(model.state_dict()))


def test_text_from_the_file_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    assert load(saved({"arch": "a\x1b[2J\nb", "model": STATE}, tmp_path / "a.pth")).architecture == "a\\x1b[2J\\nb"
    with pytest.raises(UnreadableCheckpoint, match="cannot be printed"):
        load(saved({"w\x1b[2J": torch.ones(2)}, tmp_path / "b.pth"))


def test_a_cycle_is_no_endless_loop(tmp_path: Path) -> None:
    content: dict[str, Any] = {"state_dict": STATE}
    content["self"] = content
    same(load(saved(content, tmp_path / "a.pth")), STATE)


def test_every_truncation_is_an_error_of_ours(tmp_path: Path) -> None:
    """Cut a zip form, a stream form, a safetensors and an HDF5 file at many places: two lines, never a traceback."""
    whole = {
        "zip.pth": saved(STATE, tmp_path / "zip.pth"),
        "stream.pth": saved(STATE, tmp_path / "stream.pth", _use_new_zipfile_serialization=False),
        "a.safetensors": tmp_path / "a.safetensors",
        "a.hdf5": tmp_path / "a.hdf5",
    }
    save_file(STATE, whole["a.safetensors"])
    with h5py.File(whole["a.hdf5"], "w") as file:
        for key, value in STATE.items():
            file.create_dataset(key, data=value.numpy())
    for name, path in whole.items():
        content = path.read_bytes()
        for size in sorted({0, 1, 2, 7, 8, 9, 15, 64, *range(100, len(content), max(1, len(content) // 25))}):
            cut = tmp_path / f"cut-{name}"
            cut.write_bytes(content[:size])
            outcome = opened(cut)
            if outcome is None:  # only a file that lost nothing but padding may still be whole
                assert size > 0.8 * len(content), (name, size, len(content))
            else:
                assert outcome.exit_status == 3
                assert "\n" not in str(outcome)


def opened(path: Path) -> RepDeployError | None:
    """Read every tensor of a file; the error of ours it ends with, None where it is whole."""
    try:
        for tensor in load(path).tensors.values():
            tensor.read()
    except RepDeployError as reason:
        return reason
    return None


def test_flipped_bytes_are_an_error_of_ours(tmp_path: Path) -> None:
    content = saved({"state_dict": STATE, "args": argparse.Namespace(a=1)}, tmp_path / "a.pth").read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3, 20])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(bytes(damaged))
        opened(path)  # any other exception fails this test


def test_a_storage_that_lies_about_its_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
    entries[f"{root}data/0"] = b"\x00" * 4
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UnreadableCheckpoint, match="shorter than it claims"):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"epoch 1 loss 0.3\n", UnreadableCheckpoint, "text file"),
        (b"", UnreadableCheckpoint, "empty"),
        (b"\x00\x01\x02\x03" * 20, UnreadableCheckpoint, "no container"),
        (pickle.dumps({"a": 1}), UnreadableCheckpoint, "plain pickle"),
        (struct.pack("<Q", 40) + b'{"a": nonsense' + b" " * 40, UnreadableCheckpoint, "safetensors"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, error: type[RepDeployError], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(error, match=message):
        load(tmp_path / "a.pth")


def test_other_archives_and_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        load(tmp_path / "missing.pth")
    with pytest.raises(UsageError, match="folder"):
        load(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photo.jpg", b"x")
    with pytest.raises(UnreadableCheckpoint, match=r"without data\.pkl"):
        load(tmp_path / "a.zip")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x04test" * 4)
    with pytest.raises(InputError, match="ONNX"):
        load(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="no table of named tensors"):
        load(saved({"epoch": 3}, tmp_path / "b.pth"))
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file.create_dataset("kernel0", data=np.ones(3))
    with pytest.raises(UnreadableCheckpoint, match="by number"):
        load(tmp_path / "c.hdf5")
