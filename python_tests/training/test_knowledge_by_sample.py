"""`knowledge="dataset"` in `GKTTrainer`: indices, exact resume, accumulation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from gkt_fast import CheckpointError, GKTConfig, GKTTrainer, GroupKnowledgeMemory
from gkt_fast.cli.recipe import BatchTransforms, build_loaders
from gkt_fast.data import Data, Indexed, IndexedSample
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint

CONFIG = GKTConfig(chain="steps", knowledge="dataset", execution="shared")
CLASSES = 5


def images(samples: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 3, 8, 8, generator=generator), targets)


def make(config: GKTConfig = CONFIG, **options) -> GKTTrainer:
    torch.manual_seed(0)
    model = cifar_resnet(14, CLASSES, width=4)
    return GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), config, **options)


def loader(dataset=None, batch_size: int = 8, **options) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(Indexed(images()) if dataset is None else dataset, batch_size, shuffle=True, **options)


def same(a: GroupKnowledgeMemory, b: GroupKnowledgeMemory) -> bool:
    return all(
        torch.equal(a.known(group), b.known(group))
        and torch.equal(a.knowledge(group)[a.known(group)], b.knowledge(group)[b.known(group)])
        for group in range(1, a.groups)
    )


def test_fit_makes_the_memory_and_samples_are_read_at_their_indices():
    """A batch at a time by hand, with indices, comes to what `fit` does."""
    fitted, by_hand = make(), make(memory=GroupKnowledgeMemory(24, CLASSES, 3))
    fitted.fit(loader(), epochs=3, progress=False)
    assert (fitted.gkt.memory.samples, fitted.gkt.memory.dtype) == (24, torch.float16)
    batches = loader()
    for _ in range(3):
        for batch in batches:
            by_hand.step(batch.inputs, batch.targets, indices=batch.indices)
    assert same(fitted.gkt.memory, by_hand.gkt.memory)
    assert fitted.gkt.memory.known(1).any() and fitted.gkt.memory.known(2).any()
    for a, b in zip(fitted.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "knowledge of 24 samples: 2 groups, classes: 5, torch.float16" in fitted.gkt.explain()


def test_metrics_of_chains_over_steps_are_means_of_each_groups_own_steps():
    trainer, batches = make(), loader(batch_size=6)  # 4 batches: groups 1, 2, 3, 1
    terms: dict[int, list[float]] = {}

    class Reader:
        def on_step_end(self, trainer, output):
            group = (trainer.gkt.next_step - 1) % 3 + 1
            terms.setdefault(group, []).append(float(output.kd))

    reader = Reader()
    for name in ("on_fit_start", "on_fit_end", "on_epoch_start", "on_epoch_end", "on_checkpoint"):
        setattr(reader, name, lambda *_: None)
    (metrics,) = trainer.fit(batches, epochs=1, progress=False, callbacks=[reader])
    for group, values in terms.items():
        assert metrics[f"kd_group{group}"] == pytest.approx(sum(values) / len(values))
    assert [len(terms[group]) for group in (1, 2, 3)] == [2, 1, 1]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("execution", ["shared", "lean"])
def test_resume_equals_an_uninterrupted_run(tmp_path, mapped, execution):
    config = CONFIG.replace(execution=execution)

    def memory(name: str) -> GroupKnowledgeMemory | None:
        return GroupKnowledgeMemory(24, None, 3, torch.float32, tmp_path / name) if mapped else None

    whole, first = make(config, memory=memory("whole")), make(config, memory=memory("part"))
    whole.fit(loader(), epochs=3, output_dir=tmp_path / "a", progress=False)
    first.fit(loader(), epochs=2, output_dir=tmp_path / "b", progress=False)
    then = make(config, memory=memory("part"))  # in the same file, whose content comes from the checkpoint
    then.fit(loader(), epochs=3, output_dir=tmp_path / "b", progress=False)
    assert same(whole.gkt.memory, then.gkt.memory)
    for a, b in zip(whole.model.parameters(), then.model.parameters(), strict=True):
        assert torch.equal(a, b)
    saved = load_checkpoint(tmp_path / "b" / "last.pt")["memory"]
    assert torch.equal(saved["known"][0], then.gkt.memory.known(1))
    if mapped:
        assert (tmp_path / "part").stat().st_size == then.gkt.memory.nbytes


def test_a_checkpoint_brings_its_memory_before_fit_knows_the_data(tmp_path):
    trainer = make()
    trainer.fit(loader(), epochs=1, output_dir=tmp_path, progress=False)
    other = make()
    other.load_checkpoint(tmp_path / "last.pt")
    assert same(other.gkt.memory, trainer.gkt.memory)


def test_checkpoints_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    make().fit(loader(), epochs=1, output_dir=tmp_path, progress=False)
    shorter = Indexed(images(16))
    with pytest.raises(
        CheckpointError, match=r"memory of group knowledge with samples=24; here it has samples=16"
    ):
        make().fit(loader(shorter), epochs=2, output_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="with a memory of group knowledge; this trainer is without"):
        make(CONFIG.replace(knowledge="batch")).load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="was written with chain=steps, not step"):
        make(CONFIG.replace(chain="step")).load_checkpoint(tmp_path / "last.pt")
    narrow = make(memory=GroupKnowledgeMemory(24, None, 3, torch.float32))
    with pytest.raises(CheckpointError, match=r"dtype=torch.float16; here it has dtype=torch.float32"):
        narrow.load_checkpoint(tmp_path / "last.pt")
    plain = tmp_path / "plain"
    make(GKTConfig()).fit(loader(images()), epochs=1, output_dir=plain, progress=False)
    with pytest.raises(CheckpointError, match="without a memory of group knowledge; this trainer is with"):
        make(CONFIG.replace(chain="step")).load_checkpoint(plain / "last.pt")


def test_with_accumulation_every_batch_writes_what_it_ran():
    trainer = make(accumulate=2)
    trainer.fit(loader(batch_size=8), epochs=1, progress=False)  # 3 batches: steps 0, 0, 1
    memory = trainer.gkt.memory
    assert trainer.gkt.next_step == 2
    assert memory.known(1).sum() == 16 and memory.known(2).sum() == 8
    assert not (memory.known(1) & memory.known(2)).any()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_in_float32_and_keeps_what_a_skipped_step_said(amp):
    trainer = make(amp=amp)
    if amp == "fp16":
        trainer.scaler.scale(torch.ones(()))
        trainer.scaler.update(2.0**40)  # gradients overflow: the optimizer skips the step
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.fit(loader(batch_size=24), epochs=1, progress=False)
    moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert moved == (amp == "bf16")
    assert trainer.gkt.memory.known(1).all() and trainer.gkt.memory.knowledge(1).isfinite().all()


def test_workers_subsets_and_places_from_the_end():
    dataset = Indexed(images())
    trainer = make(CONFIG.replace(chain="step"))
    subset = Subset(dataset, [3, 4, 5, 9, 10, 11, 20, -1])
    trainer.fit(loader(subset, batch_size=4, num_workers=2), epochs=1, progress=False)
    memory = trainer.gkt.memory
    assert memory.samples == 24
    assert set(memory.known(1).nonzero().flatten().tolist()) == {3, 4, 5, 9, 10, 11, 20, 23}


def test_indexed_samples_of_pairs_and_mappings():
    class Mappings(TensorDataset):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return {"x": image, "labels": target}

    pairs, mappings = Indexed(images()), Indexed(Mappings(*images().tensors))
    assert isinstance(pairs[2], IndexedSample) and pairs[2].indices == 2 and len(pairs) == 24
    assert [sample.indices for sample in pairs.__getitems__([5, 1])] == [5, 1]
    assert mappings[-1]["sample_index"] == 23
    trainer = make()
    trainer.fit(loader(mappings), epochs=1, val_loader=loader(pairs), progress=False)
    with pytest.raises(TypeError, match="a sample of list is of the class int; it must be a pair"):
        Indexed([1, 2])[0]


def test_loaders_without_indices_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images())

    for given in (loader(images()), DataLoader(Stream(), 8), [next(iter(loader(images())))]):
        with pytest.raises(
            ValueError, match=r"train_loader's samples have no indices.*gkt_fast.data.Indexed"
        ):
            make().fit(given, epochs=1, progress=False)
    with pytest.raises(TypeError, match="dataset is Stream, whose samples have no place"):
        Indexed(Stream())
    twice = ConcatDataset([Indexed(images()), Indexed(images())])
    with pytest.raises(ValueError, match=r"indices come twice; it must be Indexed\(ConcatDataset"):
        make(memory=GroupKnowledgeMemory(24, None, 3)).fit(loader(twice), epochs=1, progress=False)
    with pytest.raises(
        ValueError, match="data set has 24 samples, and the memory of group knowledge was made for 30"
    ):
        make(memory=GroupKnowledgeMemory(30, None, 3)).fit(loader(), epochs=1, progress=False)
    with pytest.raises(
        ValueError, match="indices is None and knowledge is 'dataset'"
    ):  # a memory, but no indices
        make(memory=GroupKnowledgeMemory(24, None, 3)).fit(loader(images()), epochs=1, progress=False)


def test_the_command_line_indexes_its_data_and_refuses_to_mix_images():
    data = Data(images(), images(), CLASSES, 3)
    flags = {
        "workers": 0,
        "device": "cpu",
        "batch_size": 8,
        "seed": 0,
        "mixup": 0,
        "cutmix": 0,
        "multi_scale": None,
    }
    train, _, _ = build_loaders(SimpleNamespace(**flags), data, CONFIG)
    assert isinstance(next(iter(train)), IndexedSample)
    scaled, _, _ = build_loaders(SimpleNamespace(**flags | {"multi_scale": (6,)}), data, CONFIG)
    batch = next(iter(scaled))
    assert batch.inputs.shape[-1] == 6 and batch.indices.shape == (8,)
    train, _, _ = build_loaders(SimpleNamespace(**flags), data, GKTConfig())
    assert len(next(iter(train))) == 2
    for name in ("mixup", "cutmix"):
        with pytest.raises(ValueError, match="with --knowledge dataset they must be 0"):
            build_loaders(SimpleNamespace(**flags | {name: 0.2}), data, CONFIG)


def test_mixed_batches_are_refused():
    mix = BatchTransforms(0.4, 0.0, CLASSES)
    dataset = Indexed(images())
    trainer = make(memory=GroupKnowledgeMemory(24, None, 3))
    with pytest.raises(ValueError, match="targets hold shares of classes between 0 and 1, as mixup"):
        trainer.fit(loader(dataset, collate_fn=mix), epochs=1, progress=False)


def test_a_folder_of_another_run_is_not_taken_for_the_memory(tmp_path: Path):
    (tmp_path / "memory").write_text("precious")
    trainer = make(memory=GroupKnowledgeMemory(24, None, 3, path=tmp_path / "memory"))
    with pytest.raises(ValueError, match="there is a file of 8 bytes, and the memory needs 480"):
        trainer.fit(loader(), epochs=1, progress=False)
    assert (tmp_path / "memory").read_text() == "precious"
