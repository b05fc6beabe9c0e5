"""RepMLP against its sheet: share sets, tiles of every shape, injected files, the block of 2021, containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.errors import IllegalInput, InputError, RepDeployError, UsageError
from repdeploy.facts import Setting, parse_settings
from repdeploy.rebuild import fact_kinds
from repdeploy.registry import families
from repdeploy.runtimes.onnx_runtime import OnnxSession
from sample_models.backbones import settled
from sample_models.repmlp import RepMLPBlock, RepMLPBlock2021, RepMLPNet
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_checkpoint import CfgNode
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {
    "channels": (6, 12), "units": (1, 2), "tiles": ((4, 4), (2, 2)), "share_sets": (3, 4), "classes": 5, "reduce": 2,
    "ffn_ratio": 2,
}  # fmt: skip
SIZES = ((32, 48), (16, 17), (67, 34))
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def repmlp(seed: int = 0, size: tuple[int, int] = (32, 32), **changes: Any) -> RepMLPNet:
    """`size`: of images that its tiles divide."""
    torch.manual_seed(seed)
    model = settled(scatter(RepMLPNet(**{**SMALL, **changes}), seed), changes.get("in_channels", 3), size)
    assert isinstance(model, RepMLPNet)
    return model


def partition(model_tiles: tuple[tuple[int, int], ...]) -> str:
    """As --set takes it."""
    return "partition=" + ",".join(f"{height}x{width}" for height, width in model_tiles)


def settings(*texts: str) -> tuple[Setting, ...]:
    return tuple(parse_settings(texts, fact_kinds(families())))


def converted(path: Path, **options: Any) -> dict[str, Tensor]:
    """The deploy weights, in float64."""
    bundle = path.with_suffix(".repdeploy")
    repdeploy.convert(path, family="repmlp", output=bundle, dtype="float64", force=True, **options)
    return load_file(bundle / "weights.safetensors")


def assert_same(got: Tensor, wanted: Tensor, bound: float = 1e-12) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= bound * float(wanted.abs().max())


def compared(changes: Mapping[str, Any], weights: Mapping[str, Tensor], model: nn.Module, size: tuple[int, int]) -> None:
    """The official deploy model with these weights is the training-time one, in float64."""
    deploy = RepMLPNet(**{**SMALL, **changes}, deploy=True).double().eval()
    deploy.load_state_dict(dict(weights), strict=True)
    x = torch.randn(
        3, changes.get("in_channels", 3), *size, generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64
    )
    with torch.no_grad():
        wanted = model.double().eval()(x)
        assert_same(deploy(x), wanted)
        assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * float(wanted.abs().max())


VARIANTS: list[tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = [  # and sizes of images
    ({}, SIZES),
    ({"share_sets": (1, 12)}, SIZES),
    ({"share_sets": (6, 1)}, SIZES),
    ({"kernels": ()}, SIZES),
    ({"kernels": (1,)}, ((32, 16),)),
    ({"kernels": (3,)}, ((32, 16),)),
    ({"kernels": (1, 3, 5)}, SIZES),
    ({"kernels": (5, 9), "tiles": ((2, 2), (1, 1))}, ((9, 24),)),
    ({"tiles": ((4, 2), (2, 3))}, ((32, 24), (17, 48))),
    ({"tiles": ((8, 1), (1, 3))}, ((32, 24), (65, 48))),
    ({"tiles": ((16, 15), (8, 7)), "kernels": (1, 3)}, ((65, 63),)),
    ({"tiles": ((2, 8), (4, 1)), "kernels": (3, 5)}, ((32, 32), (34, 64))),
    ({"patch": 2, "in_channels": 1, "classes": 1}, ((8, 16), (17, 9))),
    ({"patch": 3, "tiles": ((4, 4), (2, 2))}, ((12, 26),)),
    ({"channels": (8,), "units": (3,), "tiles": ((5, 3),), "share_sets": (2,)}, ((20, 25), (43, 12))),
    (
        {"channels": (4, 6, 8, 12, 12), "units": (1, 1, 1, 2, 1), "tiles": ((4, 8), (2, 4), (2, 2), (1, 2), (1, 1)),
         "share_sets": (2, 3, 8, 4, 6)},
        ((64, 64), (65, 129)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sizes"), VARIANTS, ids=str)
def test_both_readings_are_the_module(changes: dict[str, Any], sizes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    model = repmlp(size=sizes[0], **changes)
    stated = settings(partition({**SMALL, **changes}["tiles"]))
    assert_described(model, save(model, tmp_path / "a.pth"), *stated, sizes=sizes, channels=changes.get("in_channels", 3))


@pytest.mark.parametrize(("changes", "sizes"), VARIANTS, ids=str)
def test_the_written_weights_load_into_the_official_deploy_model(
    changes: dict[str, Any], sizes: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    """fc3 with a bias, its norm and the convolutions gone; every other norm is still there."""
    model = repmlp(size=sizes[0], **changes)
    weights = converted(save(model, tmp_path / "a.pth"), set=[partition({**SMALL, **changes}["tiles"])])
    for size in sizes:
        compared(changes, weights, model, size)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (6, 2), (1, 7)])
@pytest.mark.parametrize("kernels", [(1, 3), (3, 9)])
def test_no_tap_crosses_the_border_of_a_tile(height: int, width: int, kernels: tuple[int, ...], tmp_path: Path) -> None:
    """An impulse at every place of four tiles, one after the other; 9x9 is wider than all of them."""
    torch.manual_seed(0)
    block, fused = (RepMLPBlock(4, (height, width), 2, kernels, 2, deploy).double().eval() for deploy in (False, True))
    scatter(block, 1)
    fused.load_state_dict(converted(save(block, tmp_path / "block.pth"), set=[f"partition={height}x{width}"]), strict=True)
    rows, columns = 2 * height, 2 * width
    x = torch.zeros(rows * columns, 4, rows, columns, dtype=torch.float64)
    for place in range(rows * columns):
        x[place, place % 4, place // columns, place % columns] = 1
    with torch.no_grad():
        assert_same(fused(x), block(x))


@pytest.mark.parametrize("sets", [1, 2, 8])
def test_one_block_alone_is_fused(sets: int, tmp_path: Path) -> None:
    """Its tiles are square where nothing is stated."""
    torch.manual_seed(0)
    block, fused = (RepMLPBlock(8, (3, 3), sets, (1, 3, 5), 4, deploy).double().eval() for deploy in (False, True))
    scatter(block)
    path = save(block, tmp_path / "block.pth")
    weights = converted(path)
    assert set(weights) == {"gp.fc1.weight", "gp.fc1.bias", "gp.fc2.weight", "gp.fc2.bias", "fc3.weight", "fc3.bias"}
    assert tuple(weights["fc3.weight"].shape) == (sets * 9, 9, 1, 1)
    fused.load_state_dict(weights, strict=True)
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    with torch.no_grad():
        assert_same(fused(x), block(x))


def test_a_block_alone_whose_tiles_are_no_square_asks_for_them(tmp_path: Path) -> None:
    path = save(scatter(RepMLPBlock(4, (3, 5), 2, (1, 3), 2, False)), tmp_path / "block.pth")
    with pytest.raises(InputError, match="15") as failure:
        repdeploy.convert(path, family="repmlp", output=tmp_path / "b.repdeploy")
    assert failure.value.exit_status == 3
    assert "--set partition=" in f"{failure.value} {failure.value.hint}"
    assert not (tmp_path / "b.repdeploy").exists()


OBLONG: dict[str, Any] = {"tiles": ((8, 3), (4, 3))}


def test_the_size_of_the_images_may_leave_one_split_of_every_tile(tmp_path: Path) -> None:
    """48 places on an 8x6 map are one tile, and so are 12 on the 4x3 map behind it."""
    changes: dict[str, Any] = {"tiles": ((8, 6), (4, 3))}
    model = repmlp(size=(32, 24), **changes)
    path = save(model, tmp_path / "a.pth")
    weights = converted(path, input_shape=(1, 3, 32, 24))
    compared(changes, weights, model, (32, 24))


@pytest.mark.parametrize("shape", [None, (1, 3, 64, 48)])
def test_a_split_that_nothing_tells_is_asked_for(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    path = save(repmlp(size=(32, 24), **OBLONG), tmp_path / "a.pth")
    with pytest.raises(InputError) as failure:
        repdeploy.convert(path, family="repmlp", output=tmp_path / "b.repdeploy", input_shape=shape)
    assert failure.value.exit_status == 3
    assert "--set partition=" in f"{failure.value} {failure.value.hint}"
    assert not (tmp_path / "b.repdeploy").exists()


def test_a_square_number_of_places_is_a_square_tile_unless_stated(tmp_path: Path) -> None:
    """4x4 by convention; 2x8 fits the same shapes and gives other weights."""
    changes: dict[str, Any] = {"tiles": ((2, 8), (2, 2))}
    model = repmlp(size=(32, 64), **changes)
    path = save(model, tmp_path / "a.pth")
    square = converted(path)
    stated = converted(path, set=["partition=2x8,2x2"])
    compared(changes, stated, model, (32, 64))
    assert not torch.allclose(square["stages.0.0.repmlp_block.fc3.weight"], stated["stages.0.0.repmlp_block.fc3.weight"])
    assert all(torch.equal(square[key], stated[key]) for key in square if "stages.0.0.repmlp_block.fc3" not in key)
    facts = [(fact.value, fact.origin) for fact in repdeploy.inspect(path, set=["partition=2x8,2x2"]).facts]
    assert ("2x8,2x2", "set") in facts


@pytest.mark.parametrize("size", [(68, 64), (64, 72), (36, 32), (15, 16), (3, 64)])
def test_sizes_that_the_tiles_do_not_divide_are_refused_up_front(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(IllegalInput, match="tile") as failure:
        repdeploy.convert(
            save(repmlp(), tmp_path / "a.pth"), output=tmp_path / "b", set=["partition=4x4,2x2"], input_shape=(1, 3, *size)
        )
    assert failure.value.exit_status == 3
    assert not (tmp_path / "b").exists()


def test_the_floors_of_the_embeddings_hide_a_few_pixels(tmp_path: Path) -> None:
    model = repmlp()
    weights = converted(save(model, tmp_path / "a.pth"), input_shape=(1, 3, 66, 67))
    compared({}, weights, model, (66, 67))


@pytest.mark.parametrize("stated", ["4x4", "4x4,2x2,1x1", "4x4,2x3", "5x3,2x2"])
def test_a_partition_that_contradicts_the_shapes_is_refused(stated: str, tmp_path: Path) -> None:
    with pytest.raises(RepDeployError, match="partition"):
        repdeploy.convert(save(repmlp(), tmp_path / "a.pth"), output=tmp_path / "b", set=[f"partition={stated}"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("stated", ["4", "0x4,2x2", "4x4;2x2", "axb", "-4x-4,2x2", "4x4x4"])
def test_a_partition_is_read_strictly(stated: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="partition"):
        repdeploy.convert(save(repmlp(), tmp_path / "a.pth"), output=tmp_path / "b", set=[f"partition={stated}"])


def test_an_injected_file_has_nothing_to_fuse(tmp_path: Path) -> None:
    """Injecting twice must not happen; the official code raises."""
    torch.manual_seed(0)
    model = scatter(RepMLPNet(**SMALL, deploy=True))
    path = save(model, tmp_path / "injected.pth")
    answer = repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    assert answer.already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert_described(model, path, *settings("partition=4x4,2x2"), sizes=SIZES)


def test_a_half_injected_file_is_finished(tmp_path: Path) -> None:
    model = repmlp()
    fused = converted(save(model, tmp_path / "a.pth"))
    half = {key: value for key, value in model.double().state_dict().items() if not key.startswith("stages.1.1.repmlp_block")}
    half |= {key: value for key, value in fused.items() if key.startswith("stages.1.1.repmlp_block")}
    torch.save(half, tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", sizes=((32, 48),))
    finished = converted(tmp_path / "half.pth")
    assert sorted(finished) == sorted(fused)
    compared({}, finished, model, (32, 48))


def test_units_of_one_stage_may_have_other_kernels(tmp_path: Path) -> None:
    """Nothing but the keys tells which branches a unit has."""
    model = repmlp()
    for unit, kernels in ((0, (3, 7)), (1, ())):
        block = model.get_submodule(f"stages.1.{unit}.repmlp_block")
        assert isinstance(block, RepMLPBlock)
        for kernel in block.kernels:
            delattr(block, f"repconv{kernel}")
        block.add_convolutions(4, 4, kernels)
    scatter(model, 3)
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=((32, 48),))
    compared({}, converted(tmp_path / "a.pth"), model, (32, 48))


def test_the_trainers_file_holds_two_networks_and_a_configuration(tmp_path: Path) -> None:
    """`config` is a pickled yacs.config.CfgNode, which is never imported; `ema` has other weights under the same keys."""
    own, ema = repmlp(1), repmlp(2)
    path = tmp_path / "best_ckpt.pth"
    config = CfgNode({"MODEL": CfgNode({"ARCH": "RepMLPNet-T224"}), "DATA": CfgNode({"IMG_SIZE": 224})})
    torch.save(
        {
            "model": own.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"a": 1},
            "max_accuracy": 76.4, "epoch": 299, "config": config, "amp": {"loss_scale": 1.0}, "ema": ema.state_dict(),
        },
        path,
    )  # fmt: skip
    found = repdeploy.inspect(path)
    assert (found.source.where, found.source.has_ema) == ("model", True)
    for weights, model in (("model", own), ("ema", ema)):
        compared({}, converted(path, weights=weights), model, (32, 48))


@pytest.mark.parametrize("where", ["", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_under_the_keys_of_the_official_loaders(where: str, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in repmlp().state_dict().items()}
    torch.save({where: state} if where else state, tmp_path / "ckpt.pth")
    found = repdeploy.inspect(tmp_path / "ckpt.pth")
    assert (found.source.where, found.family, len([row for row in found.blocks if row.name.endswith("repmlp_block")])) == (
        where, "repmlp", 3,
    )  # fmt: skip


def test_a_stated_eps_reaches_every_norm(tmp_path: Path) -> None:
    model = repmlp()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-2
    path = save(model, tmp_path / "a.pth")
    assert_described(model, path, *settings("eps=1e-2"), sizes=SIZES)
    state = converted(path, set=["eps=1e-2"])
    deploy = RepMLPNet(**SMALL, deploy=True).double().eval()
    deploy.load_state_dict(state, strict=True)
    for norm in deploy.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-2
    x = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    with torch.no_grad():
        assert_same(deploy(x), model.double()(x))


def test_sets_of_almost_no_variance_are_no_failure(tmp_path: Path) -> None:
    """A scale of 1 / sqrt(eps) beside ordinary ones, in fc3's norm and in a convolution's."""
    model = repmlp()
    for part in ("fc3_bn", "repconv3.bn"):
        norm = model.get_submodule(f"stages.1.0.repmlp_block.{part}")
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_var is not None
        norm.running_var[1] = 1e-14
    path = save(model, tmp_path / "a.pth")
    assert repdeploy.convert(path, output=tmp_path / "b.repdeploy").manifest.verdict.passed
    compared({}, converted(path), model, (32, 16))


SQUARES_224, SQUARES_256 = ((56, 28, 14, 7), (64, 32, 16, 8))
OFFICIAL = [
    ("RepMLPNet-T224", (64, 128, 256, 512), (2, 2, 6, 2), SQUARES_224, (1, 4, 16, 128), "38.29", "38.33"),
    ("RepMLPNet-T256", (64, 128, 256, 512), (2, 2, 6, 2), SQUARES_256, (1, 4, 16, 128), None, None),
    ("RepMLPNet-B224", (96, 192, 384, 768), (2, 2, 12, 2), SQUARES_224, (1, 4, 32, 128), "68.24", "68.33"),
    ("RepMLPNet-B256", (96, 192, 384, 768), (2, 2, 12, 2), SQUARES_256, (1, 4, 32, 128), None, None),
    ("RepMLPNet-D256", (80, 160, 320, 640), (2, 2, 18, 2), SQUARES_256, (1, 4, 16, 128), "86.89", "86.99"),
    ("RepMLPNet-L256", (96, 192, 384, 768), (2, 2, 18, 2), SQUARES_256, (1, 4, 32, 256), "117.6", "117.8"),
]


@pytest.mark.parametrize(("name", "channels", "units", "sides", "sets", "before", "after"), OFFICIAL)
def test_official_variants_are_named_and_counted_from_their_shapes(
    name: str, channels: Any, units: Any, sides: Any, sets: Any, before: str | None, after: str | None
) -> None:
    """Millions of parameters as in the sheet; also from the injected shapes. No weight is read."""
    with torch.device("meta"):
        training, injected = (
            RepMLPNet(channels, units, [(side, side) for side in sides], sets, 1000, deploy=deploy).state_dict()
            for deploy in (False, True)
        )
    found = recognised(training, arch=name, stored_name=name)
    assert (found.architecture, found.notes) == (name, ())
    blocks = [slot for slot in found.slots if slot.name.endswith("repmlp_block")]
    assert len(blocks) == sum(units)
    parameters = sum(value.numel() for key, value in training.items() if not key.endswith(STATISTICS))
    gone = sum(training[key].numel() for slot in blocks for key in slot.consumed if not key.endswith(STATISTICS))
    there = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in blocks)
    digits = 1 if before == "117.6" else 2
    assert before is None or f"{parameters / 1e6:.{digits}f}" == before
    assert after is None or f"{(parameters - gone + there) / 1e6:.{digits}f}" == after
    assert parameters - gone + there == sum(value.numel() for key, value in injected.items() if not key.endswith(STATISTICS))
    assert recognised(injected, arch=name).already_deployed


@pytest.mark.parametrize(("changes", "size"), [({}, (32, 48)), ({"tiles": ((4, 6), (2, 3)), "kernels": (1, 3, 5)}, (35, 24))])
def test_the_exported_graph_is_valid_and_the_same_network(changes: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """Any batch; the number of tiles is the one of the exported size."""
    model, tiles = repmlp(size=size, **changes), {**SMALL, **changes}["tiles"]
    path = save(model, tmp_path / "a.pth")
    repdeploy.convert(path, output=tmp_path / "b.repdeploy", input_shape=(1, 3, *size), set=[partition(tiles)])
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    file = exported.bundle / exported.artifacts[0].file
    onnx.checker.check_model(onnx.load(file), full_check=True)
    for batch in (1, 5):
        x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            wanted = model.double()(x.double())
        assert_same(torch.from_numpy(OnnxSession(file).run(x.numpy())), wanted.float(), 1e-5)
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=path).passed


def test_only_the_norms_whose_weights_are_shared_stay_in_the_graph(tmp_path: Path) -> None:
    """One set per channel takes in prebn1; fewer do not. Embeddings, 1x1 and the head take in all others."""
    path = save(repmlp(share_sets=(6, 4)), tmp_path / "a.pth")
    repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    nodes = onnx.load(exported.bundle / exported.artifacts[0].file).graph.node
    names = [name for name, _ in exported.norms]
    assert {f"stages.1.{unit}.prebn1" for unit in (0, 1)} <= set(names) <= {
        *(f"stages.1.{unit}.prebn1" for unit in (0, 1)), "stages.0.0.prebn1",
    }  # fmt: skip
    assert [node.op_type for node in nodes].count("BatchNormalization") <= len(names)


@pytest.mark.parametrize("norm", ["conv_embedding.bn", "stages.0.0.ffn_block.ffn_fc1.bn", "stages.0.0.prebn2", "head_norm"])
def test_a_norm_that_is_gone_is_missed(norm: str, tmp_path: Path) -> None:
    state = {key: value for key, value in repmlp().state_dict().items() if not key.startswith(f"{norm}.")}
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=norm.removesuffix(".bn")):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


BLOCK = "stages.1.0.repmlp_block"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{BLOCK}.fc3_bn.running_mean"), f"{BLOCK}"),
        (lambda s: s.pop(f"{BLOCK}.repconv3.conv.weight"), f"{BLOCK}.repconv3.conv.weight is missing"),
        (lambda s: s.pop(f"{BLOCK}.repconv1.bn.running_var"), f"{BLOCK}.repconv1.bn.running_var is missing"),
        (lambda s: s.update({f"{BLOCK}.repconv3.conv.weight": torch.ones(3, 1, 3, 3)}), BLOCK),
        (lambda s: s.update({f"{BLOCK}.repconv3.conv.weight": torch.ones(4, 1, 4, 4)}), BLOCK),
        (lambda s: s.update({f"{BLOCK}.fc3.weight": torch.ones(16, 5, 1, 1)}), f"{BLOCK}|stage by stage 16, 5"),
        (lambda s: s.update({f"{BLOCK}.fc3_bn.weight": torch.ones(16)}), BLOCK),
        (lambda s: s[f"{BLOCK}.fc3.weight"].fill_(torch.nan), f"{BLOCK}.fc3.weight holds 64 NaN"),
        (lambda s: s[f"{BLOCK}.repconv1.conv.weight"].fill_(torch.inf), f"{BLOCK}.repconv1.conv.weight"),
        (lambda s: s[f"{BLOCK}.fc3_bn.running_var"].fill_(-1.0), f"{BLOCK}.*variance"),
        (lambda s: s["stages.0.0.prebn1.running_var"].fill_(-1.0), "stages.0.0.*variance"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    state = dict(repmlp().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", family="repmlp", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


def test_a_network_that_lacks_a_plain_layer_is_fused_block_by_block(tmp_path: Path) -> None:
    """A note says why the network is not known."""
    state = dict(repmlp().state_dict())
    del state[f"{BLOCK}.gp.fc2.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    manifest = repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy").manifest
    assert manifest.verdict.grade == "blocks only"
    assert len([note for note in manifest.notes if f"{BLOCK}.gp.fc2" in note]) == 1


def test_blocks_of_an_unknown_network_are_fused_one_by_one(tmp_path: Path) -> None:
    """As the backbone of a detector, without the classifier's head."""
    model = repmlp().double()
    state = {f"backbone.{key}": value for key, value in model.state_dict().items() if not key.startswith("head")}
    torch.save(state, tmp_path / "backbone.pth")
    conversion = repdeploy.convert(tmp_path / "backbone.pth", output=tmp_path / "b.repdeploy", dtype="float64")
    assert conversion.manifest.verdict.grade == "blocks only"
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    wanted = converted(save(model, tmp_path / "a.pth"))
    for key in (key for key in wanted if ".fc3." in key):
        assert_same(fused[f"backbone.{key}"], wanted[key])
    assert not any("fc3_bn" in key or "repconv" in key for key in fused)


VARIANTS_2021: list[dict[str, Any]] = [
    {},
    {"groups": 2},
    {"groups": 4, "kernels": (1, 3, 5)},
    {"kernels": ()},
    {"kernels": (7,), "reduction": 4},
    {"size": (6, 6), "tile": (6, 6)},
    {"size": (5, 3), "tile": (5, 3), "groups": 2},
    {"size": (4, 12), "tile": (4, 3), "kernels": (3,)},
]


@pytest.mark.parametrize("changes", VARIANTS_2021, ids=str)
def test_the_block_of_2021_is_fused(changes: dict[str, Any], tmp_path: Path) -> None:
    """The norm behind the pooling goes into fc1, fc3's and the convolutions into fc3, as in its converter."""
    options: dict[str, Any] = {"channels": 4, "size": (6, 9), "tile": (3, 3), **changes}
    torch.manual_seed(0)
    block = scatter(RepMLPBlock2021(**options))
    fused = RepMLPBlock2021(**options, deploy=True).double().eval()
    path = save(block, tmp_path / "block.pth")
    tile = ["partition={}x{}".format(*options["tile"])]
    weights = converted(path, set=tile if options.get("kernels") != () else [])
    fused.load_state_dict(weights, strict=True)
    x = torch.randn(3, 4, *options["size"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        assert_same(fused(x), block.double()(x))


def test_blocks_of_2021_inside_an_unknown_network(tmp_path: Path) -> None:
    """A convolution and its norm between them are left alone."""
    torch.manual_seed(0)
    net, merged = nn.Sequential(), nn.Sequential()
    for deploy, model in ((False, net), (True, merged)):
        model.add_module("first", RepMLPBlock2021(4, (6, 6), (3, 3), deploy=deploy))
        model.add_module("conv", nn.Conv2d(4, 6, 3, padding=1, bias=False))
        model.add_module("bn", nn.BatchNorm2d(6))
        model.add_module("second", RepMLPBlock2021(6, (6, 6), (2, 2), (3,), groups=3, deploy=deploy))
    scatter(net)
    weights = converted(save(net, tmp_path / "a.pth"))
    merged.double().eval().load_state_dict(weights, strict=True)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_same(merged(x), net.double()(x))


def test_a_wrong_split_gives_other_numbers(tmp_path: Path) -> None:
    """Nothing in the file tells; outputs that the user has recorded do."""
    changes: dict[str, Any] = {"tiles": ((2, 8), (2, 2))}
    model = repmlp(size=(32, 64), **changes)
    path = save(model, tmp_path / "a.pth")
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        np.savez(tmp_path / "expect.npz", input=x.numpy(), output=model(x).numpy())
    right = repdeploy.convert(path, output=tmp_path / "b.repdeploy", set=["partition=2x8,2x2"], expect=tmp_path / "expect.npz")
    assert (right.manifest.verdict.passed, right.manifest.verdict.grade) == (True, "anchored")
    with pytest.raises(RepDeployError):
        repdeploy.convert(path, output=tmp_path / "c.repdeploy", expect=tmp_path / "expect.npz")


def test_it_trains_on_small_grey_images() -> None:
    torch.manual_seed(0)
    model = RepMLPNet(**{**SMALL, "in_channels": 1}).train()
    F.cross_entropy(model(torch.randn(4, 1, 32, 32)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_sample_mixes_tiles_and_channels() -> None:
    """Several tiles and several channels per set in its first stage."""
    from sample_models.samples import SAMPLES

    tensors = load(SAMPLES["repmlp"].checkpoint("repmlp")).tensors
    sets, channels = tensors["stages.0.0.repmlp_block.fc3_bn.weight"].shape[0], tensors["stages.0.0.prebn1.weight"].shape[0]
    assert 1 < sets < channels
    assert described(SAMPLES["repmlp"].checkpoint("repmlp"), image=(1, 16, 16)) is not None


def tiled(*tiles: tuple[int, int]) -> RepMLPNet:
    """Two stages of one unit; the patch is 2x2."""
    torch.manual_seed(0)
    model = scatter(RepMLPNet((4, 8), (1, 1), tiles, (2, 4), 3, patch=2))
    assert isinstance(model, RepMLPNet)
    return model


@pytest.mark.parametrize("last", [(1, 1), (3, 3), (5, 5), (8, 8)])
def test_square_tiles_need_no_image(last: tuple[int, int], tmp_path: Path) -> None:
    """Whatever sizes are tried on the way to a legal one."""
    path = save(tiled((2, 2), last), tmp_path / "square.pth")
    made = repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    assert [(fact.value, fact.origin) for fact in made.manifest.facts if fact.name == "partition"] == [
        (f"2x2,{last[0]}x{last[1]}", "skeleton")
    ]


def test_an_image_does_not_overrule_square_tiles(tmp_path: Path) -> None:
    """On a map of 2x8, 2x8 tiles would fit and mean another function."""
    path = save(tiled((4, 4), (4, 4)), tmp_path / "square.pth")
    with pytest.raises(IllegalInput, match="tiles of 4x4, which do not divide its 6x8 map"):
        repdeploy.convert(path, output=tmp_path / "b.repdeploy", input_shape=(1, 3, 24, 32))
    stated = repdeploy.convert(path, output=tmp_path / "b.repdeploy", input_shape=(1, 3, 24, 32), set=["partition=4x4,2x8"])
    assert stated.manifest.verdict.passed


def test_a_bias_beside_the_norm_is_both_forms_at_once(tmp_path: Path) -> None:
    state = dict(tiled((4, 4), (2, 2)).state_dict())
    state["stages.0.0.repmlp_block.fc3.bias"] = torch.ones(32)
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(InputError, match="only one of the two forms can be right"):
        repdeploy.convert(tmp_path / "both.pth", output=tmp_path / "b.repdeploy")


@pytest.mark.parametrize("shape", [(16, 32, 1, 1), (0, 16, 1, 1), (32, 0, 1, 1), (), (33, 16, 1, 1), (32, 16)])
def test_a_damaged_fully_connected_layer_is_refused_by_name(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = dict(tiled((4, 4), (2, 2)).state_dict())
    state["stages.0.0.repmlp_block.fc3.weight"] = torch.ones(shape)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=r"stages\.0\.0\.repmlp_block"):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")


def test_operations_are_counted_for_every_tile(tmp_path: Path) -> None:
    """Each set of weights serves its channels at every tile of the map."""
    path = save(tiled((4, 4), (2, 2)), tmp_path / "net.pth")
    counted = {}
    for side in (16, 32):
        made = repdeploy.convert(path, output=tmp_path / f"{side}.repdeploy", input_shape=(1, 3, side, side), prune_dead=True)
        assert made.manifest.pruning is not None
        counted[side] = made.manifest.pruning.flops_before
    fixed = 2 * (4 * 1 * 2 + 8 * 2 * 2 + 8 * 3)  # the gates and the head see one place each
    assert counted[32] - fixed == 4 * (counted[16] - fixed)
