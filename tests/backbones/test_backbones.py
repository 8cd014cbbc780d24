from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from small import count_modules
from torch import Tensor, nn

from advbench.backbones import external
from advbench.backbones.activations import ACTIVATIONS
from advbench.backbones.base import Classifier
from advbench.backbones.preact_resnet import PreactBlock
from advbench.backbones.resnet import ZeroPadding
from advbench.errors import UserError
from advbench.surgery import check_sites, count_calls

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
SITES = tuple(ACTIVATIONS.values())
RGB = [3, 32, 32]


@dataclass(frozen=True)
class Case:
    """A backbone, and what is known of it at 3x32x32 and ten classes."""

    name: str
    parameters: int
    features: int
    sites: int
    smallest: int
    act: type[nn.Module] = nn.ReLU

    def __str__(self) -> str:
        return self.name


# Parameters as the papers and the usual implementations have them. LeNet's depend on the size.
CASES = [
    Case("convnet", 94_122, 64, 4, smallest=4),
    Case("lenet", 77_700, 90, 4, smallest=16),
    Case("resnet20", 269_722, 64, 19, smallest=4),
    Case("resnet18", 11_173_962, 512, 17, smallest=8),
    Case("resnet34", 21_282_122, 512, 33, smallest=8),
    Case("resnet50", 23_520_842, 2048, 49, smallest=8),
    Case("preact_resnet18", 11_172_170, 512, 17, smallest=8),
    Case("wrn_28_10", 36_479_194, 640, 25, smallest=4),
    Case("wrn_34_10", 46_160_474, 640, 31, smallest=4),
    Case("mobilenet_v2", 2_236_682, 1280, 35, smallest=8, act=nn.ReLU6),
]
EXTERNAL = [
    Case("torchvision", 11_181_642, 512, 17, smallest=1),
    Case("timm", 11_181_642, 512, 17, smallest=1),
]


def factory(config: str) -> tuple[Any, dict[str, Any]]:
    """The target of a config, and the config's other fields."""
    fields: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config}.yaml"))
    module, _, function = fields.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), function), fields


def build(config: str, input_shape: list[int] = RGB, **overrides: Any) -> Classifier:
    """What the config describes, for ten classes."""
    target, fields = factory(config)
    data = {
        "num_classes": 10,
        "input_shape": input_shape,
        "mean": [0.5] * input_shape[0],
        "std": [0.25] * input_shape[0],
    }
    return target(**{**fields, **data, **overrides}).build()


def images(shape: list[int], n: int = 2) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


DEEPER = ("resnet34", "wrn_34_10")
"""More of the blocks of another case: their sizes and sites are enough."""


@pytest.fixture(
    scope="module", params=[c for c in (*CASES, *EXTERNAL) if c.name not in DEEPER], ids=str
)
def built(request) -> tuple[Case, Classifier]:
    torch.manual_seed(0)
    model = build(request.param.name)
    # Running statistics that fit: with those of a new net the deepest features all but vanish.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(RGB, 4))
    return request.param, model


# --- the configs -------------------------------------------------------------------------------


ELSEWHERE = {"robustbench"}
"""Tried in test_zoo.py: its models need another package."""


def test_the_table_covers_every_config():
    names = [case.name for case in (*CASES, *EXTERNAL)]
    assert len(names) == 12
    assert {*names, *ELSEWHERE} == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("case", [*CASES, *EXTERNAL], ids=str)
def test_a_config_has_a_header_and_the_fields_of_its_target(case):
    lines = (CONFIGS / f"{case.name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# advbench train ") and f"backbone={case.name}" in lines[0].split()
    assert lines[1].startswith("# ") and all(len(line) <= 100 for line in lines)

    target, fields = factory(case.name)
    hints = get_type_hints(target)
    parameters = [field.name for field in dataclasses.fields(target)]
    assert sorted(fields) == sorted(parameters)
    assert all(fields[key] is None for key in ("num_classes", "input_shape", "mean", "std"))
    schema = dataclasses.make_dataclass(
        "Schema", [(name, hints[name]) for name in parameters], kw_only=True
    )
    given = {**fields, "num_classes": 10, "input_shape": RGB}
    assert OmegaConf.merge(OmegaConf.structured(schema), given).num_classes == 10


# --- every backbone ----------------------------------------------------------------------------


def test_shapes_and_the_two_halves(built):
    case, model = built
    model.eval()
    x = images(RGB)
    with torch.no_grad():
        z = model.features(x)
        logits = model(x)
        assert torch.equal(logits, model.head(z))
    assert (model.num_features, model.num_classes) == (case.features, 10)
    assert model.input_shape == (3, 32, 32)
    assert z.shape == (2, case.features)
    assert logits.shape == (2, 10) and logits.isfinite().all()


def test_each_activation_call_is_a_module_of_its_own(built):
    case, model = built
    calls = count_calls(model, SITES, images(RGB, 1))
    assert len(calls) == case.sites and set(calls.values()) == {1}
    assert count_modules(model, case.act) == case.sites
    check_sites(model, SITES, images(RGB, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_and_sites(case):
    with torch.device("meta"):
        model = build(case.name)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    assert count_modules(model, case.act) == case.sites


def test_normalisation_is_no_state(built):
    _, model = built
    assert not [key for key in model.state_dict() if key in ("mean", "std")]
    assert {"mean", "std"} <= dict(model.named_buffers()).keys()
    assert model.mean.shape == model.std.shape == (1, 3, 1, 1)


def test_state_dict_round_trip(built):
    case, model = built
    other = build(case.name)
    other.load_state_dict(model.state_dict(), strict=True)
    x = images(RGB)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_row_does_not_see_the_others(built):
    _, model = built
    model.eval()
    x = images(RGB, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-3, atol=1e-4)


def test_gradients_reach_each_pixel_and_each_parameter(built):
    _, model = built
    model.train()
    x = images(RGB).requires_grad_()
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad.abs().amax(dim=1) > 0).float().mean() > 0.9
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad(set_to_none=True)


def test_channels_last_stays_channels_last(built):
    _, model = built
    layouts = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_hook(note) for conv in convs]
    x = images(RGB, 1).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.eval().to(memory_format=torch.channels_last)(x)
    model.to(memory_format=torch.contiguous_format)
    for handle in handles:
        handle.remove()
    assert layouts and all(layouts)


# --- sizes and options, where no weights are needed --------------------------------------------


@pytest.mark.parametrize("shape", [[1, 8, 8], [1, 28, 28], [3, 40, 24]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_sizes(case, shape):
    if min(shape[1:]) < case.smallest:
        with pytest.raises(UserError, match=f"{case.smallest}x{case.smallest} pixels"):
            build(case.name, shape)
        return
    with torch.device("meta"):
        model = build(case.name, shape, num_classes=7)
        assert model.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    assert model.features(torch.zeros(2, *shape, device="meta")).shape == (2, case.features)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_smallest_size_works_in_training_and_one_less_is_refused(case):
    size = case.smallest
    with torch.device("meta"):
        assert build(case.name, [1, size, size])(torch.zeros(2, 1, size, size)).shape == (2, 10)
    with pytest.raises(UserError, match=f"{case.name} needs images of at least {size}x{size}"):
        build(case.name, [1, size + 9, size - 1])


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "lenet"], ids=str)
def test_the_last_map_is_as_small_as_the_message_says(case):
    with torch.device("meta"):
        model = build(case.name)
    inputs = []
    model.trunk.get_submodule("pool").register_forward_pre_hook(lambda _, args: inputs.extend(args))
    model(torch.zeros(1, *RGB, device="meta"))
    size = 32 // case.smallest
    assert [tuple(z.shape) for z in inputs] == [(1, case.features, size, size)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_activation_takes_every_site(case, activation):
    with torch.device("meta"):
        model = build(case.name, activation=activation)
    assert count_modules(model, ACTIVATIONS[activation]) == case.sites
    assert count_modules(model, SITES) == case.sites
    assert not any(getattr(module, "inplace", False) for module in model.modules())


def test_activations_are_modules_without_state():
    x = torch.linspace(-9, 9, 19)
    expected = {"relu": x.clamp(min=0), "relu6": x.clamp(0, 6), "silu": x * x.sigmoid()}
    assert expected.keys() == ACTIVATIONS.keys()
    for name, kind in ACTIVATIONS.items():
        torch.testing.assert_close(kind()(x), expected[name])
        assert not kind().state_dict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unknown_activation_is_refused(case):
    with pytest.raises(UserError, match="unknown activation 'rleu'; did you mean 'relu'"):
        build(case.name, activation="rleu")


def test_the_mnist_lenet_has_the_papers_shape():
    model = build("lenet", [1, 28, 28])
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert sizes == [(10, 1, 5, 5), (20, 10, 5, 5), (120, 320), (90, 120), (10, 90)]
    kinds = [type(module).__name__ for module in model.trunk.children()]
    assert kinds[:6] == ["Conv2d", "MaxPool2d", "ReLU"] * 2


def test_a_wide_resnet_has_a_depth_of_six_n_plus_four():
    for depth in (3, 4, 27, 32):
        with pytest.raises(UserError, match=rf"6 n \+ 4.*not {depth}$"):
            build("wrn_28_10", depth=depth)
    with torch.device("meta"):
        small = build("wrn_28_10", depth=16, width=4)
    assert sum(p.numel() for p in small.parameters()) == 2_748_890


# --- against the definition --------------------------------------------------------------------


def torchvision_cifar(name: str) -> nn.Module:
    """torchvision's model with the strides of the CIFAR form."""
    if name == "mobilenet_v2":
        model: Any = torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0)
        for block in (model.features[0][0], model.features[2].conv[1][0]):
            block.stride = (1, 1)
    else:
        model = torchvision.models.get_model(name, num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
def test_equals_torchvision_with_the_same_weights(name):
    torch.manual_seed(0)
    ours = build(name, mean=None, std=None)
    reference = torchvision_cifar(name)
    assert len(ours.state_dict()) == len(reference.state_dict())
    values = reference.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)), strict=True)
    x = images(RGB, 4)
    with torch.no_grad():
        # In training mode: a new net's running statistics let the deepest features all but vanish.
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_preact_block_is_the_papers(width, stride):
    torch.manual_seed(0)
    block = PreactBlock(4, width, stride, nn.SiLU)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 6, 6)

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    z = F.silu(norm(x, block.norm1))
    y = F.conv2d(z, block.conv1.weight, stride=stride, padding=1)
    y = F.conv2d(F.silu(norm(y, block.norm2)), block.conv2.weight, padding=1)
    if width == 4 and stride == 1:
        assert block.shortcut is None
        shortcut = x
    else:
        assert isinstance(block.shortcut, nn.Conv2d)
        shortcut = F.conv2d(z, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), shortcut + y)


def test_option_a_keeps_pixels_and_adds_zero_channels():
    x = torch.rand(2, 3, 5, 6)
    y = ZeroPadding(extra=4, stride=2)(x)
    assert y.shape == (2, 7, 3, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 5:].any()


def test_weights_start_as_he_et_al_say():
    torch.manual_seed(0)
    for module in build("resnet18").modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_images_are_normalised_inside():
    model = build("convnet", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).eval()
    plain = build("convnet", mean=None, std=None).eval()
    plain.load_state_dict(model.state_dict())
    x = images(RGB)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(x), plain((x - mean) / std))
    assert not torch.allclose(model(x), plain(x))


# --- torchvision and timm ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sites", "size"),
    [
        ("alexnet", 7, 64),
        ("densenet121", 121, 32),
        ("googlenet", 57, 32),
        ("inception_v3", 94, 80),
        ("mobilenet_v3_small", 14, 32),
        ("resnet50", 49, 32),
        ("shufflenet_v2_x0_5", 37, 32),
        ("swin_t", 0, 32),
    ],
)
def test_torchvision_families(name, sites, size):
    shape = [3, size, size]
    model = build("torchvision", shape, name=name).eval()
    x = images(shape)
    calls = count_calls(model, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish), x)
    # MobileNetV3 also has the hard swish, which is split like the others.
    assert sum(1 for n in calls if isinstance(model.get_submodule(n), SITES)) == sites
    assert all(n == 1 for n in calls.values())
    check_sites(model, SITES, x)
    assert torch.equal(model(x), model.head(model.features(x)))
    logits = model.train()(x)
    assert isinstance(logits, Tensor) and logits.shape == (2, 10)


def test_the_cut_and_split_model_computes_what_torchvision_does():
    torch.manual_seed(0)
    ours = build("torchvision", name="resnet18", num_classes=1000, mean=None, std=None).eval()
    torch.manual_seed(0)
    reference = torchvision.models.resnet18().eval()
    x = images(RGB)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(ours(x), reference((x - mean) / std))


def test_weights_bring_their_normalisation_and_a_new_head(monkeypatch):
    weights = torchvision.models.ResNet18_Weights
    trained = torchvision.models.resnet18().state_dict()
    asked = []

    def state(self: Any, **_: Any) -> dict[str, Tensor]:
        asked.append(self)
        return trained

    monkeypatch.setattr(weights, "get_state_dict", state)
    model = build("torchvision", weights="DEFAULT", mean=[0.1] * 3, std=[0.9] * 3)
    assert asked == [weights.IMAGENET1K_V1]
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert torch.equal(model.state_dict()["trunk.conv1.weight"], trained["conv1.weight"])
    assert isinstance(model.head, nn.Linear) and model.head.out_features == 10

    same = build("torchvision", weights="IMAGENET1K_V1", num_classes=1000)
    assert torch.equal(same.state_dict()["head.weight"], trained["fc.weight"])


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_the_datas_normalisation_without_weights_and_the_models_without_data(name):
    assert build(name).mean.flatten().tolist() == [0.5] * 3
    own = build(name, mean=None, std=None)
    assert own.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_gray_images_become_three_equal_channels(name):
    model = build(name, [1, 28, 28], mean=[0.3], std=[0.4]).eval()
    assert model.input_shape == (1, 28, 28)
    assert model.mean.shape == model.std.shape == (1, 3, 1, 1)
    x = images([1, 28, 28])
    normalised = ((x - 0.3) / 0.4).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model.features(x), model.trunk(normalised))


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("torchvision", {"name": "resnet19"}, "no classifier 'resnet19'; did you mean 'resnet18'"),
        ("torchvision", {"weights": "DEFUALT"}, "no weights 'DEFUALT'; did you mean 'DEFAULT'"),
        ("torchvision", {"name": "squeezenet1_0"}, "does not end in one linear layer"),
        ("torchvision", {"name": "vit_b_32"}, "fails on images of 3x32x32: Wrong image height"),
        ("torchvision", {"input_shape": [4, 32, 32]}, "1 or 3 channels, these have 4"),
        ("timm", {"name": "resnet19"}, "no model 'resnet19'; did you mean 'resnet1"),
        ("timm", {"name": "zzzzzzzz"}, r"no model 'zzzzzzzz'; see timm\.list_models"),
        ("timm", {"name": "mixer_s32_224", "pretrained": True}, "no weights for 'mixer_s32_224'"),
        ("timm", {"name": "deit_tiny_distilled_patch16_224"}, "does not end in one linear layer"),
        ("timm", {"name": "hrnet_w18_small"}, "can't be split into one module per activation"),
    ],
)
def test_what_does_not_fit_is_refused(backbone, options, message):
    with pytest.raises(UserError, match=message):
        build(backbone, **options)


@pytest.mark.parametrize(
    ("name", "kind", "sites"),
    [("vit_tiny_patch16_224", nn.GELU, 12), ("res2net50_26w_4s", nn.ReLU, 81)],
)
def test_timm_families(name, kind, sites):
    model = build("timm", name=name).eval()
    calls = count_calls(model, kind, images(RGB))
    assert len(calls) == sites and set(calls.values()) == {1}
    x = images(RGB)
    assert torch.equal(model(x), model.head(model.features(x)))


def test_a_missing_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'advbench\[zoo\]'"):
        external.timm(name="resnet18", num_classes=10, input_shape=RGB).build()
