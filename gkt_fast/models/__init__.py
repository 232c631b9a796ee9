"""Networks that come with the package, and how the blocks of any network are found."""

from .cifar_resnet import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "cifar_resnet"]
