"""Small networks of torchvision, timm and transformers, built at given depths. Nothing here needs gkt_fast.

Run as a script, in a folder written by test_extraction.py, it loads extracted subnets where gkt_fast can't be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import ResNet as TimmResNet
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torchvision.models import ConvNeXt, MobileNetV2, ResNet, VisionTransformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.fcn import FCN, FCNHead
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

__all__ = ["NETS", "logits"]


def _resnet(depths: Sequence[int]) -> nn.Module:
    return ResNet(Bottleneck, list(depths), num_classes=5, width_per_group=2)


def _mobilenet(depths: Sequence[int]) -> nn.Module:
    setting = [[1, 8, depths[0], 1], [2, 8, depths[1], 2], [2, 16, depths[2], 2]]
    return MobileNetV2(5, inverted_residual_setting=setting, width_mult=1.0, dropout=0.0)


def _vit(depths: Sequence[int]) -> nn.Module:
    return VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=depths[0],
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        num_classes=5,
    )


def _convnext(depths: Sequence[int]) -> nn.Module:
    return ConvNeXt(
        [CNBlockConfig(8, 12, depths[0]), CNBlockConfig(12, None, depths[1])], layer_scale=1.0, num_classes=5
    )


def _fcn(depths: Sequence[int]) -> nn.Module:
    resnet = ResNet(
        Bottleneck, list(depths), width_per_group=2, replace_stride_with_dilation=[False, True, True]
    )
    return FCN(IntermediateLayerGetter(resnet, {"layer4": "out"}), FCNHead(2048, 5))


def _timm_resnet(depths: Sequence[int]) -> nn.Module:
    return TimmResNet(TimmBasicBlock, depths, num_classes=5, channels=(8, 8, 12, 12), stem_width=8)


def _timm_vit(depths: Sequence[int]) -> nn.Module:
    return TimmVisionTransformer(16, 8, num_classes=5, embed_dim=8, depth=depths[0], num_heads=2)


def _timm_convnext(depths: Sequence[int]) -> nn.Module:
    return TimmConvNeXt(num_classes=5, depths=depths, dims=(8, 8, 12, 12), output_stride=8, ls_init_value=1.0)


def _hf_vit(depths: Sequence[int]) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=depths[0],
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
            num_labels=5,
            initializer_range=0.3,
        )
    )


def _hf_resnet(depths: Sequence[int]) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=list(depths), layer_type="basic", num_labels=5
        )
    )


def _hf_swin(depths: Sequence[int]) -> nn.Module:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=list(depths), num_heads=[2, 2], window_size=2, num_labels=5,
        initializer_range=0.3,
    )  # fmt: skip
    return SwinForImageClassification(config)


Net = tuple[Callable[[Sequence[int]], nn.Module], tuple[int, ...], tuple[int, ...], "list[str] | None"]

NETS: dict[str, Net] = {
    "torchvision ResNet": (_resnet, (2, 3, 2, 2), (1, 2, 1, 2), None),
    "torchvision MobileNetV2": (
        _mobilenet,
        (2, 3, 2),
        (2, 1, 1),
        None,
    ),
    "torchvision ViT": (_vit, (3,), (1,), None),
    "torchvision ConvNeXt": (_convnext, (3, 2), (2, 1), None),
    "torchvision FCN": (_fcn, (2, 2, 2, 2), (1, 1, 2, 1), None),
    "timm ResNet": (_timm_resnet, (2, 2, 2, 2), (1, 1, 2, 1), None),
    "timm ViT": (_timm_vit, (3,), (2,), None),
    "timm ConvNeXt": (_timm_convnext, (1, 2, 2, 2), (1, 1, 2, 1), None),
    "transformers ViT": (_hf_vit, (3,), (2,), ["vit.layers"]),
    "transformers ResNet": (_hf_resnet, (2, 3), (1, 2), None),
    "transformers Swin": (_hf_swin, (2, 2), (1, 2), ["swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"]),
}  # fmt: skip
"""Name -> how to build it at some depths, full depths, a subnet's depths, module paths of the stages (None: found)."""


def logits(output: object) -> Tensor:
    """The logits in what these networks return."""
    if isinstance(output, dict) and "out" in output:
        return output["out"]
    return getattr(output, "logits", output)


class _Blocked:
    """An import hook that refuses gkt_fast."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "gkt_fast":
            raise ImportError(f"{name} is blocked")


def load_everything(folder: Path) -> None:
    """Loads each extracted subnet as a whole module, and its state into a network built at its depths."""
    sys.meta_path.insert(0, _Blocked())
    for path in sorted(folder.glob("*.pt")):
        saved = torch.load(path, weights_only=False)
        build, _, depths, _ = NETS[path.stem]
        rebuilt = build(depths).eval()
        rebuilt.load_state_dict(saved["state_dict"], strict=True)
        for module in (saved["module"], rebuilt):
            with torch.no_grad():
                torch.testing.assert_close(logits(module(saved["x"])), saved["y"], rtol=0, atol=0)
        print(path.stem)
    assert "gkt_fast" not in sys.modules, "gkt_fast was imported"


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_everything(Path(sys.argv[1]))
