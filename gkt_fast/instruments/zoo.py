"""Networks of torchvision, timm and transformers whose blocks are found without configuration.

Each entry builds the network as its library gives it (for the costs in docs/guide/models.md), and a network of the same
classes that is small enough to be compared with the plain loop in float64, without dropout and stochastic depth
(python_tests/network/test_model_coverage.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

__all__ = ["CLASSES", "ZOO", "ZooModel"]

CLASSES = 5
"""Of the small networks."""


@dataclass(frozen=True)
class ZooModel:
    """A network.

    Args:
        library: torchvision, timm or transformers.
        name: as the library calls it.
        build: the network with random weights.
        build_small: a small one of the same classes, with `CLASSES` outputs.
        found: the small network's stages: one letter per block, x: can be dropped, .: can't.
        pixels: height and width of the images of `build`'s network.
        small_pixels: height and width of the images of the small one.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    build_small: Callable[[], nn.Module]
    found: str
    pixels: int = 224
    small_pixels: int = 16

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"


def _torchvision(name: str, build_small: Callable[[], nn.Module], found: str, **options: Any) -> ZooModel:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return ZooModel("torchvision", name, build, build_small, found, **options)


def _timm(name: str, small: dict[str, Any] | Callable[[], nn.Module], found: str, **options: Any) -> ZooModel:
    """`small`: what the small network changes, or how it is built."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    def build_small() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **small) if isinstance(small, dict) else small()

    return ZooModel("timm", name, build, build_small, found, **options)


def _transformers(name: str, small: dict[str, Any], found: str, **options: Any) -> ZooModel:
    """`name`: of the model; its configuration is called <Family>Config. `small`: what the small one's changes."""

    def build(**changes: Any) -> nn.Module:
        import transformers

        config = getattr(transformers, name.removesuffix("ForImageClassification") + "Config")
        return getattr(transformers, name)(config(**changes))

    return ZooModel("transformers", name, build, lambda: build(num_labels=CLASSES, **small), found, **options)


def _small_resnet(block: str, layers: list[int], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import resnet

        class NarrowResNet(resnet.ResNet):
            """Stages of a sixteenth of the width."""

            def _make_layer(self, block: type, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
                return super()._make_layer(block, planes // 16, *args, **kwargs)

        model = NarrowResNet(getattr(resnet, block), layers, **options)
        model.fc = nn.Linear(model.inplanes, CLASSES)
        return model

    return build


def _small_torchvision_regnet(se_ratio: float | None) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    blocks = BlockParams([1, 3, 2], [8, 16, 24], [4, 8, 8], [1.0] * 3, [2] * 3, se_ratio)
    return RegNet(blocks, num_classes=CLASSES, stem_width=8)


def _small_mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    settings = [[1, 16, 1, 1], [2, 24, 2, 2], [2, 32, 3, 2]]
    return MobileNetV2(CLASSES, width_mult=0.25, inverted_residual_setting=settings, dropout=0.0)


def _small_mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    settings = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(8, 3, 16, 16, False, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 5, 24, 16, True, "HS", 1, 1, 1.0),
        InvertedResidualConfig(16, 5, 24, 16, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(settings, last_channel=16, num_classes=CLASSES, dropout=0.0)


def _small_efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    settings = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 2),
        MBConvConfig(2, 3, 2, 8, 16, 3, 1.0, 1.0),
        MBConvConfig(2, 5, 2, 16, 24, 2, 1.0, 1.0),
    ]
    return EfficientNet(
        settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=16
    )


def _small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 12, 3), CNBlockConfig(12, None, 2)]
    return ConvNeXt(settings, stochastic_depth_prob=0.0, num_classes=CLASSES)


def _small_vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=CLASSES
    )


def _small_torchvision_swin(block: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import SwinTransformer, swin_transformer

        merging = {"SwinTransformerBlock": "PatchMerging", "SwinTransformerBlockV2": "PatchMergingV2"}[block]
        return SwinTransformer(
            patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2],
            stochastic_depth_prob=0.0, num_classes=CLASSES, block=getattr(swin_transformer, block),
            downsample_layer=getattr(swin_transformer, merging),
        )  # fmt: skip

    return build


def _small_timm_efficientnet(kind: str, blocks: list[list[str]], **options: Any) -> Callable[[], nn.Module]:
    """`kind`: EfficientNet or MobileNetV3; `blocks`: one list of block strings per stage, in timm's notation."""

    def build() -> nn.Module:
        from timm.models import efficientnet, mobilenetv3
        from timm.models._efficientnet_builder import decode_arch_def

        make = {"EfficientNet": efficientnet.EfficientNet, "MobileNetV3": mobilenetv3.MobileNetV3}[kind]
        return make(decode_arch_def(blocks), num_classes=CLASSES, stem_size=8, num_features=16, **options)

    return build


def _small_timm_regnet(se_ratio: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.regnet import RegNet, RegNetCfg

        config = RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=8, se_ratio=se_ratio, stem_width=8)
        return RegNet(config, num_classes=CLASSES)

    return build


def _small_group_norm_resnet() -> nn.Module:
    from timm.layers import GroupNormAct, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    norm = partial(GroupNormAct, num_groups=2)
    options = {"norm_layer": norm, "conv_layer": create_conv2d, "stem_type": "deep", "avg_down": True}
    return ResNetV2(num_classes=CLASSES, **_NARROW_V2, **options)


def _small_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(CLASSES, img_size=16, patch_size=8, num_blocks=3, embed_dim=8)


def _small_poolformer() -> nn.Module:
    from timm.models.metaformer import GroupNorm1, MetaFormer

    return MetaFormer(
        num_classes=CLASSES, mlp_act=nn.GELU, mlp_bias=True, norm_layers=GroupNorm1, downsample_norm=None,
        layer_scale_init_values=1e-5, res_scale_init_values=None, use_mlp_head=False, **_NARROW_STAGES,
    )  # fmt: skip


_NARROW = {"channels": (8, 8, 16, 16), "stem_width": 4, "layers": (2, 3, 1, 1)}
_NARROW_V2 = {"channels": (16, 16, 32, 32), "stem_chs": 8, "layers": (2, 2, 1, 1)}
_NARROW_STAGES = {"depths": (2, 1, 3, 1), "dims": (8, 8, 16, 16)}
_SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 2}
_SMALL_SWIN = {
    "img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2),
    "drop_path_rate": 0.0,
}  # fmt: skip
_SMALL_TRANSFORMERS_VIT = {
    "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_MOBILENET_V3 = _small_timm_efficientnet(
    "MobileNetV3",
    [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e2_c16"], ["ir_r3_k5_s2_e2_c24_se0.25_nhs"], ["cn_r1_k1_s1_c32"]],
)
_EFFICIENTNET = _small_timm_efficientnet(
    "EfficientNet",
    [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r3_k3_s2_e2_c16_se0.25"], ["ir_r2_k5_s2_e2_c24_se0.25"]],
)
_EFFICIENTNET_V2 = _small_timm_efficientnet(
    "EfficientNet", [["cn_r2_k3_s1_e1_c8_skip"], ["er_r3_k3_s2_e2_c16"], ["ir_r2_k3_s2_e2_c24_se0.25"]]
)

ZOO = [
    _torchvision("resnet18", _small_resnet("BasicBlock", [2, 2, 1, 1]), ".x .x"),
    _torchvision("resnet50", _small_resnet("Bottleneck", [2, 3, 1, 1], width_per_group=64), ".x .xx"),
    _torchvision(
        "resnext50_32x4d", _small_resnet("Bottleneck", [2, 3, 1, 1], groups=2, width_per_group=32), ".x .xx"
    ),
    _torchvision(
        "wide_resnet50_2",
        _small_resnet("Bottleneck", [2, 2, 1, 1], width_per_group=128),
        ".x .x",
        small_pixels=32,
    ),
    _torchvision("regnet_x_400mf", lambda: _small_torchvision_regnet(None), ".xx .x", small_pixels=32),
    _torchvision("regnet_y_400mf", lambda: _small_torchvision_regnet(0.25), ".xx .x", small_pixels=32),
    _torchvision("mobilenet_v2", _small_mobilenet_v2, "x .x .xx", small_pixels=32),
    _torchvision("mobilenet_v3_small", _small_mobilenet_v3, ".xx", small_pixels=32),
    _torchvision("mobilenet_v3_large", _small_mobilenet_v3, ".xx", small_pixels=32),
    _torchvision("efficientnet_b0", _small_efficientnet, "xx .xx .x"),
    _torchvision("efficientnet_v2_s", _small_efficientnet, "xx .xx .x"),
    _torchvision("convnext_tiny", _small_convnext, "xxx xx"),
    _torchvision("vit_b_16", _small_vision_transformer, "xxxx"),
    _torchvision("swin_t", _small_torchvision_swin("SwinTransformerBlock"), "xx xx"),
    _torchvision("swin_v2_t", _small_torchvision_swin("SwinTransformerBlockV2"), "xx xx"),
    _timm("resnet18", _NARROW, ".x .xx"),
    _timm("resnet26d", _NARROW, ".x .xx"),
    _timm("resnet50d", _NARROW, ".x .xx"),
    _timm("seresnet50", _NARROW, ".x .xx"),
    _timm("ecaresnet50d", _NARROW, ".x .xx"),
    _timm("resnetv2_50", _NARROW_V2, ".x .x"),
    _timm("resnetv2_50d_gn", _small_group_norm_resnet, ".x .x"),
    _timm("regnetx_004", _small_timm_regnet(0.0), ".xx"),
    _timm("regnety_004", _small_timm_regnet(0.25), ".xx"),
    _timm("mobilenetv3_small_100", _MOBILENET_V3, "x .x .xx", small_pixels=32),
    _timm("mobilenetv3_large_100", _MOBILENET_V3, "x .x .xx", small_pixels=32),
    _timm("efficientnet_b0", _EFFICIENTNET, "x .xx .x", small_pixels=32),
    _timm("tf_efficientnetv2_s", _EFFICIENTNET_V2, "xx .xx .x", small_pixels=32),
    _timm("convnext_atto", _NARROW_STAGES, "xx x xxx x", small_pixels=32),
    _timm("convnextv2_atto", _NARROW_STAGES, "xx x xxx x", small_pixels=32),
    _timm("vit_tiny_patch16_224", _SMALL_VIT, "xxxx"),
    _timm("deit_tiny_patch16_224", _SMALL_VIT, "xxxx"),
    _timm("deit3_small_patch16_224", _SMALL_VIT, "xxxx"),
    _timm("swin_tiny_patch4_window7_224", _SMALL_SWIN, "xx xx"),
    _timm("swinv2_tiny_window8_256", _SMALL_SWIN, "xx xx", pixels=256),
    _timm("mixer_s32_224", _small_mixer, "xxx"),
    _timm("poolformer_s12", _small_poolformer, "xx x xxx x", small_pixels=32),
    _transformers("ViTForImageClassification", _SMALL_TRANSFORMERS_VIT, "xxxx"),
    _transformers(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "layer_type": "basic"},
        "xx .xx",
    ),
    _transformers("DeiTForImageClassification", _SMALL_TRANSFORMERS_VIT, "xxxx"),
    _transformers("BeitForImageClassification", _SMALL_TRANSFORMERS_VIT | {"drop_path_rate": 0.0}, "xxxx"),
    _transformers(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
        "xx xx",
        small_pixels=32,
    ),
    _transformers(
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "groups_width": 4},
        ".x .xx",
        small_pixels=32,
    ),
]
