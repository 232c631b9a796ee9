"""Images in a folder for each class. What is wrong with the folders is said before training begins."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder, default_loader

__all__ = ["class_folders", "read_image", "splits"]

logger = logging.getLogger("gkt_fast")


def splits(path: Path) -> tuple[Path, Path]:
    """The folders of the training and the test images: `path/train`, and `path/val` or else `path/test`.

    Raises:
        ValueError: one of them is missing.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path.absolute()}")
    test = next((path / split for split in ("val", "test") if (path / split).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        raise ValueError(
            f"{path} must hold a folder train, and a folder val or test, with one folder per class each; "
            f"it holds {_listing(held)}"
        )
    return path / "train", test


def class_folders(
    train: Path, test: Path, train_transform: Callable[[Any], Any], test_transform: Callable[[Any], Any]
) -> tuple[ImageFolder, ImageFolder]:
    """The training and the test images. A warning counts the files that are of no known image type.

    Raises:
        ValueError: a folder has no class or only one, a class has no image, or the classes differ.
    """
    for folder in (train, test):
        _check_classes(folder)
    only_train, only_test = (
        sorted(set(_classes(one)) - set(_classes(other))) for one, other in ((train, test), (test, train))
    )
    if only_train or only_test:
        found = [
            f"{_listing(names)} only in {folder}"
            for names, folder in ((only_train, train), (only_test, test))
            if names
        ]
        raise ValueError(f"{train} and {test} hold different classes: {'; '.join(found)}")
    return _ClassFolders(train, train_transform, loader=read_image), _ClassFolders(
        test, test_transform, loader=read_image
    )


def read_image(path: str | Path) -> Any:
    """An image in RGB. torchvision's loader doesn't say which file its errors are about.

    Raises:
        ValueError: the file is no image, is cut off or damaged.
    """
    from PIL.Image import DecompressionBombError, UnidentifiedImageError

    try:
        return default_loader(str(path))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} can't be read as an image: replace it or remove it") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        DecompressionBombError,
    ) as error:  # Pillow's, for files of different kinds of damage
        raise ValueError(f"{path} can't be read as an image: replace it or remove it ({error})") from error


class _ClassFolders(ImageFolder):
    """torchvision's, without hidden folders such as `.ipynb_checkpoints`."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = _classes(Path(directory))
        return classes, {name: index for index, name in enumerate(classes)}


def _classes(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )


def _check_classes(folder: Path) -> None:
    classes = _classes(folder)
    if not classes:
        raise ValueError(
            f"{folder} holds no folders; it must hold one for each class, with its images inside"
        )
    if len(classes) == 1:
        raise ValueError(f"{folder} holds one class, {classes[0]}; there must be two or more, a folder each")
    empty, left_out = [], []
    for name in classes:
        files = list(_files(folder / name))
        others = [path for path in files if not path.lower().endswith(IMG_EXTENSIONS)]
        left_out += others
        if len(others) == len(files):
            empty.append(name)
    if empty:
        instead = f", but files such as {left_out[0]}" if left_out else ""
        raise ValueError(
            f"{folder} has no images of {_listing(empty)}{instead}; put images there, or remove the folder. Images end "
            f"in {', '.join(IMG_EXTENSIONS)}"
        )
    if left_out:
        logger.warning(
            "%d of the files in %s are left out, such as %s: images end in %s",
            len(left_out),
            folder,
            left_out[0],
            ", ".join(IMG_EXTENSIONS),
        )


def _files(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith("."))


def _listing(names: list[str], most: int = 5) -> str:
    """The names, or the first ones of many."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
