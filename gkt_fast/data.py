"""The data sets that the command line and the examples know by name, and data sets whose samples tell their places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .network.batch import IndexedSample
from .training.indexed import Indexed

__all__ = ["Data", "Indexed", "IndexedSample", "digits", "load_data", "load_image"]


@dataclass(frozen=True)
class Data:
    """Training and test images of one classification task.

    Args:
        train: (image (C, H, W) float32, class index) pairs.
        test: the same.
        num_classes: number of classes.
        in_channels: channels of an image.
    """

    train: Dataset
    test: Dataset
    num_classes: int
    in_channels: int


def digits(train_images: int = 200) -> Data:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, 10 classes; a fixed, stratified split.

    Args:
        train_images: number of images to train on; the rest is the test set.

    Raises:
        ValueError: train_images leaves too few images on either side.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    if not 10 <= train_images <= len(bunch.target) - 10:
        raise ValueError(
            f"train_images is {train_images}; it must be between 10 and {len(bunch.target) - 10}"
        )
    images = _normalized_digits(torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1))
    targets = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(targets)), train_size=train_images, stratify=bunch.target, random_state=0
    )
    return Data(
        TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test]), 10, 1
    )


def load_data(
    name: str,
    image_size: int = 32,
    train_images: int | None = None,
    *,
    train_crop: int | None = None,
    augment: str = "none",
    random_erasing: float = 0.0,
) -> Data:
    """A data set by name.

    Args:
        name: "digits"; "imagefolder:PATH" with PATH/train/CLASS/* and PATH/val or PATH/test; or "cifar10:PATH", the
            folder that holds torchvision's `cifar-10-batches-py`.
        image_size: height and width that images of a folder are resized and cropped to.
        train_images: for digits, the number of images to train on.
        train_crop: height and width of training images, where they differ from those of the test images.
        augment: "none", "trivial" (torchvision's TrivialAugmentWide) or "rand" (its RandAugment), of training images.
        random_erasing: probability of torchvision's RandomErasing, of training images.

    Raises:
        ValueError: the name is unknown, an argument is for other data, or the folder doesn't hold what it must;
            later, when it is loaded, an image of a folder is damaged.
    """
    kind, _, path = name.partition(":")
    if kind == "digits":
        if train_crop is not None or augment != "none" or random_erasing:
            raise ValueError(
                "train_crop, augment and random_erasing are for images of a file, not for digits"
            )
        return digits() if train_images is None else digits(train_images)
    if kind in ("imagefolder", "cifar10") and path:
        if train_images is not None:
            raise ValueError(
                f"train_images is {train_images}; it is for digits, other data sets are used whole"
            )
        augmentation = Augmentation(train_crop, augment, random_erasing)
        if kind == "imagefolder":
            return _image_folder(Path(path), image_size, augmentation)
        return _cifar10(Path(path), augmentation)
    hint = f"; did you mean imagefolder:{name}?" if Path(name).is_dir() else ""
    raise ValueError(f"data is {name!r}; it must be digits, imagefolder:PATH or cifar10:PATH{hint}")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images beside cropping and flipping; see `load_data`."""

    train_crop: int | None = None
    augment: str = "none"
    random_erasing: float = 0.0

    def compose(self, crop: list[Any], normalize: list[Any]) -> Any:
        """The training images' transform: crop, flip, augment, convert and normalise, erase."""
        from torchvision import transforms

        kinds = {"none": [], "trivial": [transforms.TrivialAugmentWide], "rand": [transforms.RandAugment]}
        if self.augment not in kinds:
            raise ValueError(f"augment is {self.augment!r}; it must be one of {', '.join(kinds)}")
        colours = [kind() for kind in kinds[self.augment]]
        erase = [transforms.RandomErasing(self.random_erasing)] if self.random_erasing else []
        return transforms.Compose([*crop, transforms.RandomHorizontalFlip(), *colours, *normalize, *erase])


def load_image(path: str | Path, kind: str, image_size: int) -> Tensor:
    """One image file as a network that was trained on such data takes it: (1, C, H, W) float32.

    Args:
        path: an image that Pillow can read. Of a digit: light on dark, as those of the data set.
        kind: "digits", "imagefolder" or "cifar10", the first part of the name given to `load_data`.
        image_size: as given to `load_data`.

    Raises:
        OSError: there is no such file.
        ValueError: it is no image, or damaged, or there is no such kind.
    """
    from torchvision.transforms import functional

    from .image_folder import read_image

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image at {path}")
    image = read_image(path)
    if kind == "digits":
        pixels = functional.to_tensor(functional.resize(image.convert("L"), [8, 8], antialias=True))
        return _normalized_digits(16 * pixels)[None]
    if kind not in ("imagefolder", "cifar10"):
        raise ValueError(f"kind is {kind!r}; it must be digits, imagefolder or cifar10")
    from torchvision import transforms

    if kind == "cifar10":
        resize, normalize = [transforms.Resize((32, 32))], _cifar10_normalization()
    else:
        resize, normalize = _resize(image_size), _normalization()
    return transforms.Compose([*resize, *normalize])(image)[None]


def _normalized_digits(pixels: Tensor) -> Tensor:
    """Pixels of 0 to 16."""
    return (pixels - 4.88) / 6.02


def _normalization() -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def _cifar10_normalization() -> list[Any]:
    from torchvision import transforms

    return [
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ]


def _resize(image_size: int) -> list[Any]:
    """How test images of a folder come to their size."""
    from torchvision import transforms

    if image_size <= 64:
        return [transforms.Resize((image_size, image_size))]
    return [transforms.Resize(round(image_size / 0.875)), transforms.CenterCrop(image_size)]


def _image_folder(path: Path, image_size: int, augmentation: Augmentation) -> Data:
    from torchvision import transforms

    from .image_folder import class_folders, splits

    train, test = splits(path)
    normalize, resize = _normalization(), _resize(image_size)
    train_size = augmentation.train_crop or image_size
    if image_size <= 64:
        crop = [
            transforms.Resize((train_size, train_size)),
            transforms.RandomCrop(train_size, padding=train_size // 8),
        ]
    else:
        crop = [transforms.RandomResizedCrop(train_size)]
    train_transform = augmentation.compose(crop, normalize)
    test_transform = transforms.Compose([*resize, *normalize])
    train_set, test_set = class_folders(train, test, train_transform, test_transform)
    return Data(train_set, test_set, len(train_set.classes), 3)


def _cifar10(path: Path, augmentation: Augmentation) -> Data:
    from torchvision import datasets, transforms

    normalize = _cifar10_normalization()
    crop = [transforms.RandomCrop(augmentation.train_crop or 32, padding=4)]
    try:
        train = datasets.CIFAR10(path, train=True, transform=augmentation.compose(crop, normalize))
        test = datasets.CIFAR10(path, train=False, transform=transforms.Compose(normalize))
    except RuntimeError as error:
        raise ValueError(f"{path} doesn't hold CIFAR-10 (a folder cifar-10-batches-py): {error}") from error
    return Data(train, test, 10, 3)
