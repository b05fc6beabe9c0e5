"""RepGhost against its sheet: fusion variants that its keys do not tell, shortcuts, squeeze-excite, deploy files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.errors import InputError, UsageError
from repdeploy.facts import Facts, Setting
from repdeploy.recognise import arch_settings
from repdeploy.registry import families
from sample_models.repghost import Fusion, RepGhostModule, RepGhostNet, Row, repghostnet
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {
    "stages": (
        (Row(3, 4, 6, False, 1),),
        (Row(5, 8, 8, True, 2), Row(3, 6, 8, False, 1)),
        (Row(3, 10, 12, False, 2), Row(5, 12, 16, True, 1), Row(5, 12, 16, True, 1)),
    ),
    "stem": 6,
    "last": 20,
    "hidden": 12,
    "classes": 5,
}
"""Identity shortcuts in blocks.0.0, blocks.1.1 and blocks.2.2; a projection that strides and one that only widens."""
SIZES = [(33, 33), (67, 65), (34, 47)]
FUSIONS: tuple[Fusion, ...] = ("none", "bn", "identity", "bn+identity")


def repghost(seed: int = 0, **changes: Any) -> RepGhostNet:
    torch.manual_seed(seed)
    model = scatter(RepGhostNet(**{**SMALL, **changes}), seed)
    assert isinstance(model, RepGhostNet)
    return model


def fusion_is(value: str, scope: str = "") -> Setting:
    return Setting(scope, "fusion", value)


def stated(path: Path, arch: str | None = None) -> tuple[Setting, ...]:
    """What --arch and the name in the file settle."""
    return arch_settings(arch, load(path).architecture, families())[1]


def origins(path: Path, **options: Any) -> dict[str, tuple[str, str]]:
    """Value and origin of the facts that are this family's own."""
    return {
        fact.name: (fact.value, fact.origin)
        for fact in repdeploy.inspect(path, **options).facts
        if fact.name in ("fusion", "shortcut")
    }


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_readings_are_the_module(fusion: Fusion, shortcut: bool, tmp_path: Path) -> None:
    model = repghost(fusion=fusion, shortcut=shortcut)
    settings = fusion_is(fusion), Setting("", "shortcut", shortcut)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), *settings, sizes=SIZES)


@pytest.mark.parametrize(
    "variant",
    [
        {"channels": 1, "classes": 1},
        {"stem": 5, "stages": ((Row(5, 7, 5, True, 1), Row(7, 3, 9, False, 2)),), "last": 11, "hidden": 7},
        {"stem": 16, "stages": tuple((Row(3, 4, 16, False, 1),) for _ in range(11))},
    ],
)
def test_any_table_of_stages_is_read_from_the_keys(variant: dict[str, Any], tmp_path: Path) -> None:
    """Odd widths, 7x7 kernels, more than ten stages; the last 1x1 stands wherever the stages end."""
    model = repghost(**variant)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), sizes=SIZES, channels=variant.get("channels", 3))


@pytest.mark.parametrize("kernel", [1, 5])
def test_another_depthwise_kernel_keeps_the_taps_at_its_centre(kernel: int, tmp_path: Path) -> None:
    """The official converter knows 3x3 only."""
    model = repghost(fusion="bn+identity")
    for module in model.modules():
        if isinstance(module, RepGhostModule):
            channels = len(module.cheap_operation.state_dict()["1.weight"])
            conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
            module.cheap_operation = nn.Sequential(conv, *list(module.cheap_operation.children())[1:])
    assert_described(model, save(model, tmp_path / "ckpt.pth"), fusion_is("bn+identity"), sizes=SIZES)


def test_border_pixels_of_the_fused_taps_are_exact(tmp_path: Path) -> None:
    """An impulse in each corner: the depthwise branch sees it through its border, the fused taps only at their centre."""
    model = repghost(fusion="bn+identity").double()
    fused = described(save(model, tmp_path / "ckpt.pth"), fusion_is("bn+identity"))
    for row in (0, 32):
        for column in (0, 34):
            x = torch.zeros(1, 3, 33, 35, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                wanted = model.get_submodule("blocks.0.0.ghost1")(F.relu(model.bn1(model.conv_stem(x))))
                got = F.relu(fused.outputs_by_slot(x)["blocks.0.0.ghost1"])
            assert torch.allclose(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("missing", "there"), [("none", "identity"), ("bn", "bn+identity")])
def test_an_identity_leaves_no_keys(missing: Fusion, there: Fusion) -> None:
    without, with_it = repghost(fusion=missing).state_dict(), repghost(fusion=there).state_dict()
    assert list(without) == list(with_it)
    assert all(torch.equal(without[key], with_it[key]) for key in without)


@pytest.mark.parametrize("fusion", ["none", "identity"])
def test_without_a_norm_the_fusion_must_be_stated(fusion: Fusion, tmp_path: Path) -> None:
    path = save(repghost(fusion=fusion), tmp_path / "ckpt.pth")
    for ask in (lambda: repdeploy.convert(path, output=tmp_path / "b.repdeploy"), lambda: repdeploy.inspect(path)):
        with pytest.raises(InputError) as caught:
            ask()
        assert "blocks.0.0.ghost1" in str(caught.value)
        for option in ("--set fusion=identity", "--set fusion=none"):
            assert option in caught.value.hint
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(
    ("stored", "said"),
    [("none", "bn"), ("identity", "bn+identity"), ("bn", "none"), ("bn", "identity"), ("bn+identity", "none")],
)
@pytest.mark.parametrize("scope", ["", "blocks.1.0.ghost2"])
def test_a_fusion_that_contradicts_the_keys_is_refused(stored: Fusion, said: str, scope: str, tmp_path: Path) -> None:
    path = save(repghost(fusion=stored), tmp_path / "ckpt.pth")
    elsewhere = f"fusion={stored}"
    with pytest.raises(InputError, match=f"fusion={said.replace('+', '.')} contradicts its keys"):
        repdeploy.inspect(path, set=[elsewhere, f"{scope}.fusion={said}"] if scope else [f"fusion={said}"])


def test_the_default_is_assumed_and_said_to_be(tmp_path: Path) -> None:
    path = save(repghost(), tmp_path / "ckpt.pth")
    assert origins(path) == {"fusion": ("bn", "skeleton"), "shortcut": ("True", "skeleton")}
    assumed = repdeploy.convert(path, output=tmp_path / "b.repdeploy").manifest.verdict.assumed
    assert {("fusion", "bn"), ("shortcut", "True")} <= {(fact.name, fact.value) for fact in assumed}


def test_what_is_stated_is_not_assumed(tmp_path: Path) -> None:
    path = save(repghost(fusion="bn+identity", shortcut=False), tmp_path / "ckpt.pth")
    settings = ["fusion=bn+identity", "shortcut=false"]
    conversion = repdeploy.convert(path, output=tmp_path / "b.repdeploy", set=settings)
    assert not {"fusion", "shortcut"} & {fact.name for fact in conversion.manifest.verdict.assumed}
    assert origins(path, set=settings) == {"fusion": ("bn+identity", "set"), "shortcut": ("False", "set")}
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=path).passed


def test_a_fusion_may_differ_from_block_to_block(tmp_path: Path) -> None:
    model = repghost(fusion="none")
    module = model.get_submodule("blocks.1.0.ghost2")
    assert isinstance(module, RepGhostModule)
    module.identity = True
    path = save(model, tmp_path / "ckpt.pth")
    assert_described(model, path, fusion_is("none"), fusion_is("identity", "blocks.1.0.ghost2"), sizes=SIZES)


def test_the_shortcut_changes_the_output_and_is_honoured(tmp_path: Path) -> None:
    """The projections stay: only the three identity shortcuts go."""
    path = save(repghost(), tmp_path / "ckpt.pth")
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        added, left = (described(path, Setting("", "shortcut", value))(x) for value in (True, False))
        assert float((added - left).abs().max()) > 1e-6 * float(added.abs().max())
        assert torch.allclose(left, repghost(shortcut=False).double()(x), rtol=1e-11, atol=1e-13)


def test_a_shortcut_that_no_block_has_is_no_answer(tmp_path: Path) -> None:
    path = save(repghost(stem=4, stages=((Row(3, 4, 6, False, 2),),)), tmp_path / "ckpt.pth")
    assert "shortcut" not in origins(path)
    with pytest.raises(UsageError, match="shortcut=False changed nothing"):
        repdeploy.inspect(path, set=["shortcut=false"])


@pytest.mark.parametrize(
    ("name", "fusion", "shortcut"),
    [
        ("repghostnet_repid_0_5x", "identity", True),
        ("repghostnet_norep_0_5x", "none", True),
        ("repghostnet_wo_0_5x", "bn", False),
        ("repghostnet_0_5x", "bn", True),
        ("repghostnet_050", "bn", True),
    ],
)
class TestNames:
    """The variants that differ in nothing but their name; 0.5x and timm's 050 are the default."""

    @staticmethod
    def at_half_width(fusion: Fusion, shortcut: bool) -> dict[str, Tensor]:
        with torch.device("meta"):
            return repghostnet(0.5, 1000, fusion=fusion, shortcut=shortcut).state_dict()

    def test_arch_settles_what_the_keys_do_not_tell(self, name: str, fusion: Fusion, shortcut: bool) -> None:
        official, settings = arch_settings(name, None, families())
        facts = Facts(settings)
        found = recognised(self.at_half_width(fusion, shortcut), facts=facts, arch=official)
        assert found.architecture == name
        own = {fact.name: (fact.value, fact.origin) for fact in facts.record() if fact.name in ("fusion", "shortcut")}
        assert own == {"fusion": (fusion, "arch"), "shortcut": (str(shortcut), "arch")}

    @pytest.mark.parametrize("package", ["", "repghost."])
    def test_the_name_in_the_file_settles_it_too(self, name: str, package: str, fusion: Fusion, shortcut: bool) -> None:
        stored = package + name
        facts = Facts(arch_settings(None, stored, families())[1])
        found = recognised(self.at_half_width(fusion, shortcut), facts=facts, stored_name=stored)
        assert (found.architecture, found.notes) == (name, ())
        own = {fact.name: (fact.value, fact.origin) for fact in facts.record() if fact.name in ("fusion", "shortcut")}
        assert own == {"fusion": (fusion, "file"), "shortcut": (str(shortcut), "file")}

    @pytest.mark.parametrize("where", ["arch", "args.model"])
    def test_the_name_settles_it_at_other_widths(
        self, name: str, where: str, fusion: Fusion, shortcut: bool, tmp_path: Path
    ) -> None:
        """Containers as timm's trainer writes them; the constructor's width override is not in the name."""
        model = repghost(fusion=fusion, shortcut=shortcut)
        content: dict[str, Any] = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": {}, "version": 2, "metric": 1.0}
        if where == "arch":
            content["arch"] = f"repghost.{name}"
        content["args"] = argparse.Namespace(model=f"repghost.{name}", lr=0.6)
        torch.save(content, tmp_path / "last.pth.tar")
        assert origins(tmp_path / "last.pth.tar") == {"fusion": (fusion, "file"), "shortcut": (str(shortcut), "file")}
        assert_described(model, tmp_path / "last.pth.tar", *stated(tmp_path / "last.pth.tar"), sizes=[(33, 47)])


def test_arch_converts_what_is_refused_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter(repghostnet(0.5, 4, fusion="identity")).double()
    path = save(model, tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match="its keys do not tell"):
        repdeploy.inspect(path)
    conversion = repdeploy.convert(path, arch="repghostnet_repid_0_5x", output=tmp_path / "b.repdeploy", dtype="float64")
    assert conversion.manifest.architecture == "repghostnet_repid_0_5x"
    deploy = repghostnet(0.5, 4, deploy=True).double().eval()
    deploy.load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
    x = torch.randn(1, 3, 65, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert float((deploy(x) - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())


def test_arch_refuses_other_widths(tmp_path: Path) -> None:
    path = save(repghost(fusion="identity"), tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match="this is not repghostnet_repid_0_5x"):
        repdeploy.inspect(path, arch="repghostnet_repid_0_5x")


def test_arch_refuses_keys_of_another_variant() -> None:
    official, settings = arch_settings("repghostnet_norep_0_5x", None, families())
    with pytest.raises(InputError, match="fusion=none contradicts its keys"):
        recognised(TestNames.at_half_width("bn", True), facts=Facts(settings), arch=official)


def test_keys_beat_a_name_in_the_file(tmp_path: Path) -> None:
    """A file that calls itself norep but stores the norms is the default; without norms the default's name tells nothing."""
    torch.save({"arch": "repghost.repghostnet_norep_0_5x", "state_dict": repghost().state_dict()}, tmp_path / "bn.pth")
    assert origins(tmp_path / "bn.pth")["fusion"] == ("bn", "skeleton")
    bare = repghost(fusion="none").state_dict()
    torch.save({"arch": "repghost.repghostnet_0_5x", "state_dict": bare}, tmp_path / "none.pth")
    with pytest.raises(InputError, match="its keys do not tell"):
        repdeploy.inspect(tmp_path / "none.pth")


def test_set_beats_the_name_in_the_file(tmp_path: Path) -> None:
    model = repghost(fusion="identity")
    torch.save({"arch": "repghost.repghostnet_norep_0_5x", "state_dict": model.state_dict()}, tmp_path / "ckpt.pth")
    assert origins(tmp_path / "ckpt.pth", set=["fusion=identity"])["fusion"] == ("identity", "set")
    assert_described(model, tmp_path / "ckpt.pth", fusion_is("identity"), *stated(tmp_path / "ckpt.pth"), sizes=[(33, 47)])


def test_ema_weights_are_taken_on_request(tmp_path: Path) -> None:
    own, ema = repghost(1), repghost(2)
    torch.save(
        {
            "epoch": 7, "arch": "repghost.repghostnet_0_5x", "state_dict": own.state_dict(), "optimizer": {}, "version": 2,
            "args": argparse.Namespace(model="repghost.repghostnet_0_5x"), "amp_scaler": {},
            "state_dict_ema": ema.state_dict(), "metric": 66.9,
        },
        tmp_path / "last.pth.tar",
    )  # fmt: skip
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    for weights, model in (("model", own), ("ema", ema)):
        output = tmp_path / f"{weights}.repdeploy"
        repdeploy.convert(tmp_path / "last.pth.tar", output=output, weights=weights, dtype="float64")
        assert deployed(output, x, model) <= 1e-12


def deployed(bundle: Path, x: Tensor, model: nn.Module, **changes: Any) -> float:
    """How far the official deploy model with a bundle's weights is from the training-time one, relative."""
    deploy = RepGhostNet(**{**SMALL, **changes}, deploy=True).double().eval()
    deploy.load_state_dict(load_file(bundle / "weights.safetensors"), strict=True)
    with torch.no_grad():
        wanted = model.double()(x)
        return float((deploy(x) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_written_weights_load_into_the_official_deploy_model(fusion: Fusion, tmp_path: Path) -> None:
    """Every variant, norep as well, whose official conversion does not load there."""
    model = repghost(fusion=fusion)
    path = save(model, tmp_path / "ckpt.pth")
    repdeploy.convert(path, output=tmp_path / "b.repdeploy", dtype="float64", set=[f"fusion={fusion}"])
    assert deployed(tmp_path / "b.repdeploy", torch.randn(2, 3, 65, 47, dtype=torch.float64), model) <= 1e-12


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_deploy_file_has_nothing_to_fuse_and_no_fusion_to_state(shortcut: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter(RepGhostNet(**SMALL, shortcut=shortcut, deploy=True))
    path = save(model, tmp_path / "fused.pth")
    assert repdeploy.convert(path, output=tmp_path / "b.repdeploy").already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert "fusion" not in origins(path)
    assert_described(model, path, Setting("", "shortcut", shortcut), sizes=SIZES)


def test_a_half_fused_file_is_finished(tmp_path: Path) -> None:
    model = repghost(fusion="none")
    path = save(model, tmp_path / "ckpt.pth")
    repdeploy.convert(path, output=tmp_path / "b.repdeploy", dtype="float64", set=["fusion=none"])
    fused, state = load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), model.double().state_dict()
    half = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    half |= {key: value for key, value in fused.items() if key.startswith("blocks.1.")}
    torch.save(half, tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", fusion_is("none"), sizes=[(33, 47)])
    repdeploy.convert(tmp_path / "half.pth", output=tmp_path / "half.repdeploy", dtype="float64", set=["fusion=none"])
    assert sorted(load_file(tmp_path / "half.repdeploy" / "weights.safetensors")) == sorted(fused)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OFFICIAL = [
    ("repghostnet_0_5x", 0.5, "2.314", "2.307"),
    ("repghostnet_0_58x", 0.58, "2.546", "2.538"),
    ("repghostnet_0_8x", 0.8, "3.279", "3.267"),
    ("repghostnet_1_0x", 1.0, "4.074", "4.059"),
    ("repghostnet_1_11x", 1.11, "4.540", "4.524"),
    ("repghostnet_1_3x", 1.3, "5.479", "5.459"),
    ("repghostnet_1_5x", 1.5, "6.575", "6.553"),
    ("repghostnet_2_0x", 2.0, "9.796", "9.766"),
]


@pytest.mark.parametrize(("name", "width", "before", "after"), OFFICIAL)
def test_official_variants_are_named_and_counted_from_their_shapes(name: str, width: float, before: str, after: str) -> None:
    """Millions of parameters as in the sheet, before and after the official conversion."""
    with torch.device("meta"):
        training, merged = repghostnet(width, 1000).state_dict(), repghostnet(width, 1000, deploy=True).state_dict()
    found = recognised(training)
    assert found.architecture == name
    assert len(found.slots) == 32
    parameters = sum(value.numel() for key, value in training.items() if not key.endswith(STATISTICS))
    gone = sum(training[key].numel() for slot in found.slots for key in slot.consumed if not key.endswith(STATISTICS))
    there = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
    assert f"{parameters / 1e6:.3f}" == before
    assert f"{(parameters - gone + there) / 1e6:.3f}" == after
    if width == 0.5:
        assert (parameters, parameters - gone + there) == (2313968, 2306528)
    timm = f"repghostnet_{round(width * 100):03d}"
    assert recognised(merged).already_deployed
    assert recognised(merged, arch=timm, stored_name=timm).architecture == timm


def test_no_norm_is_left_where_the_official_deploy_model_keeps_48() -> None:
    """All follow a convolution, so the network that is run and exported has none; the official deploy layout keeps them."""
    with torch.device("meta"):
        official, training = repghostnet(0.5, 1000, deploy=True), repghostnet(0.5, 1000, fusion="none")
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in official.modules()) == 48
    found = recognised(training.state_dict(), facts=Facts([fusion_is("none")]))
    assert found.plan is not None
    assert not found.plan.norms
    norms = {key for slot in found.plan.slots.values() for part in slot.parts for key in part.consumed if "running_mean" in key}
    assert len(norms) == 80


def test_the_exported_network_has_no_norm(tmp_path: Path) -> None:
    model = repghost(fusion="identity")
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy", set=["fusion=identity"])
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    operations = [node.op_type for node in onnx.load(exported.bundle / exported.artifacts[0].file).graph.node]
    assert "BatchNormalization" not in operations
    modules, strided, projections, gates = 2 * 6, 2, 3, 3
    assert operations.count("Conv") == 1 + 2 * modules + strided + 2 * projections + 2 * gates + 2


@pytest.mark.parametrize("fusion", ["bn", "identity"])
def test_a_stated_eps_reaches_every_norm(fusion: Fusion, tmp_path: Path) -> None:
    model = repghost(fusion=fusion)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2
    path = save(model, tmp_path / "ckpt.pth")
    assert_described(model, path, Setting("", "eps", 1e-2), fusion_is(fusion), sizes=[(33, 47)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("blocks.1.0.ghost2.cheap_operation.1.running_var"), "cheap_operation.1.running_var is missing"),
        (lambda s: s.pop("blocks.1.0.ghost2.fusion_bn.0.running_mean"), "fusion_bn.0.running_mean is missing"),
        (lambda s: s.update({"blocks.1.0.ghost2.fusion_bn.0.running_mean": torch.ones(3)}), "contradict"),
        (lambda s: s["blocks.1.0.ghost1.fusion_bn.0.bias"].fill_(float("inf")), "fusion_bn.0.bias holds 8 Inf"),
        (lambda s: s["blocks.1.0.ghost1.cheap_operation.1.running_var"].fill_(-1.0), "block blocks.1.0.ghost1: .*variance"),
        (lambda s: s["blocks.1.0.ghost1.primary_conv.1.running_var"].fill_(-1.0), "blocks.1.0.ghost1.primary_conv"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(repghost().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize("norm", ["bn1", "blocks.1.0.bn_dw", "blocks.1.0.shortcut.1", "blocks.0.0.ghost1.primary_conv.1"])
def test_a_norm_that_is_gone_is_missed_where_no_bias_says_that_it_was_folded(norm: str, tmp_path: Path) -> None:
    state = {key: value for key, value in repghost().state_dict().items() if not key.startswith(f"{norm}.")}
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=norm):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")


def test_modules_of_an_unknown_network_are_fused_one_by_one(tmp_path: Path) -> None:
    """A backbone without its head; the 1x1 before each depthwise convolution stays as it is."""
    model = repghost(fusion="identity").double()
    state = {f"backbone.{key}": value for key, value in model.state_dict().items() if key.startswith("blocks.")}
    torch.save(state, tmp_path / "detector.pth")
    options: dict[str, Any] = {"output": tmp_path / "b.repdeploy", "dtype": "float64"}
    with pytest.raises(InputError, match="its keys do not tell"):
        repdeploy.convert(tmp_path / "detector.pth", **options)
    conversion = repdeploy.convert(tmp_path / "detector.pth", set=["fusion=identity"], **options)
    assert conversion.manifest.verdict.grade == "blocks only"
    assert len(conversion.manifest.blocks) == 12
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    name, x = "backbone.blocks.2.2.ghost2", torch.randn(2, 12, 9, 7, dtype=torch.float64)
    module = model.get_submodule("blocks.2.2.ghost2")
    assert isinstance(module, RepGhostModule)
    with torch.no_grad():
        weight, bias = fused[f"{name}.cheap_operation.weight"], fused[f"{name}.cheap_operation.bias"]
        got = F.conv2d(module.primary_conv(x), weight, bias, padding=1, groups=16)
        assert torch.allclose(got, module(x), rtol=0, atol=1e-12)


def test_it_trains_on_small_grey_images() -> None:
    torch.manual_seed(0)
    model = RepGhostNet(**{**SMALL, "channels": 1, "fusion": "bn+identity"}).train()
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
