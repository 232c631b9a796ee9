"""Data sets whose samples tell their places, for knowledge that is kept by sample (`knowledge="dataset"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from ..network.batch import INDEX_KEY, IndexedSample

__all__ = ["Indexed", "samples_of"]


class Indexed(Dataset):
    """The same data set, with each sample's place in it: for `DataLoader(Indexed(dataset), ...)`.

    Samples (inputs, target) become `IndexedSample(inputs, target, index)`; mappings get the entry "sample_index". A
    `Subset` of it keeps the places in the whole.

    Args:
        dataset: with a length, and samples that are pairs or mappings.

    Raises:
        TypeError: it is iterable only, so that its samples have no place; later, a sample is neither pair nor mapping.
    """

    def __init__(self, dataset: Dataset) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                f"dataset is {type(dataset).__name__}, whose samples have no place that is the same in every epoch; it "
                "must have a length and samples by index. Train on it with knowledge='batch'"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self._indexed(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples at once, as a DataLoader asks for them."""
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        return [self._indexed(sample, index) for sample, index in zip(samples, indices, strict=True)]

    def _indexed(self, sample: Any, index: int) -> Any:
        index = int(index) % len(self)  # as Python counts from the end, too
        if isinstance(sample, Mapping):
            return {**sample, INDEX_KEY: index}
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            return IndexedSample(*sample, index)
        raise TypeError(
            f"a sample of {type(self.dataset).__name__} is of the class {type(sample).__name__}; it must be a pair "
            "(inputs, target) or a mapping"
        )


def samples_of(loader: Any) -> int | None:
    """The number of samples that a loader's indices count; None: its data set is not `Indexed`.

    Raises:
        ValueError: several indexed data sets are strung together, so that two samples have the same index.
    """
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset) and any(isinstance(part, Indexed) for part in dataset.datasets):
        raise ValueError(
            "train_loader's data set is a ConcatDataset of Indexed data sets, in which indices come twice; it must be "
            "Indexed(ConcatDataset(...))"
        )
    return len(dataset) if isinstance(dataset, Indexed) else None
