"""Pickles of gkt_fast 0.1, which kept its modules elsewhere, still load; so does what its configurations say.

`pickles/gkt_0_1.pickle.xz` was written by 0.1: a `GKT` with fused blocks after one step (a budget,
`independent_noise`, batch_norm="sequential"), its subnets, results and a schedule, and beside the pickle what the next
step gave there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import lzma
import pickle
import pickletools
import warnings
from pathlib import Path

import pytest
import torch

import gkt_fast
from gkt_fast import GKT, GKTConfig, Subnet
from gkt_fast.batch_norm.fusion import FusedBlock
from gkt_fast.cli import train

SAVED = pickle.loads(lzma.decompress((Path(__file__).parent / "pickles" / "gkt_0_1.pickle.xz").read_bytes()))
OLD_MODULES = {
    "gkt_fast.evaluation", "gkt_fast.execution.interception", "gkt_fast.fusion", "gkt_fast.plan",
    "gkt_fast.schedules", "gkt_fast.subnet", "gkt_fast.subnet_table",
}  # fmt: skip


def loaded() -> dict:
    return pickle.loads(SAVED["pickle"])


def assert_next_step_as_in_0_1(gkt: GKT) -> None:
    images = torch.tensor(SAVED["images"], dtype=torch.float64)
    out = gkt(images, torch.tensor(SAVED["targets"]), step=SAVED["step"])
    out.loss.backward()
    assert [str(subnet) for subnet in out.subnets] == SAVED["names"]
    assert out.loss.item() == pytest.approx(SAVED["loss"], rel=1e-10)
    gradient = torch.cat([parameter.grad.flatten() for parameter in gkt.parameters()])
    expected = torch.tensor(SAVED["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_the_pickle_names_every_module_that_moved():
    names = {arg for _, arg, _ in pickletools.genops(SAVED["pickle"]) if isinstance(arg, str)}
    assert names >= OLD_MODULES


def test_a_pickled_gkt_goes_on():
    gkt = loaded()["gkt"]
    assert gkt.next_step == 1 and gkt.get_extra_state().tolist() == SAVED["extra_state"]
    assert sum(isinstance(module, FusedBlock) for module in gkt.modules()) == 6
    assert gkt.sampling_config().budget is None
    assert pickle.loads(pickle.dumps(gkt)).config == gkt.config == copy.deepcopy(gkt).config
    assert_next_step_as_in_0_1(gkt)


def test_a_state_of_0_1_loads():
    old = loaded()["gkt"]
    gkt = GKT(old.model, old.config)
    gkt.set_extra_state(torch.tensor(SAVED["extra_state"]))
    assert gkt.get_extra_state().tolist() == SAVED["extra_state"]
    assert_next_step_as_in_0_1(gkt)


def test_other_pickled_things_are_todays_classes():
    saved = loaded()
    assert all(type(subnet) is Subnet for subnet in saved["subnets"])
    assert type(saved["result"]) is gkt_fast.SubnetResult and saved["result"].subnet == saved["subnets"][0]
    assert type(saved["evaluation"]) is gkt_fast.Evaluation
    assert type(saved["schedule"]) is gkt_fast.LinearWarmup


def test_nothing_is_pickled_under_an_old_name():
    names = {arg for _, arg, _ in pickletools.genops(pickle.dumps(loaded())) if isinstance(arg, str)}
    assert not names & OLD_MODULES and "gkt_fast.subnets.subnet" in names


def test_the_old_name_of_the_batch_norm_policy(tmp_path):
    """It works and says what to write instead, in every way to build a configuration; a pickle's is silent."""
    path = tmp_path / "config.yaml"
    path.write_text("batch_norm: sequential\n")
    old = GKTConfig().to_dict() | {"batch_norm": "sequential"}
    for build in (
        lambda: GKTConfig(batch_norm="sequential"),
        lambda: GKTConfig().replace(batch_norm="sequential"),
        lambda: GKTConfig.from_dict(old),
        lambda: GKTConfig.from_yaml(path),
    ):
        with pytest.warns(
            DeprecationWarning, match="batch_norm='sequential' is called batch_norm='all_streams'"
        ):
            config = build()
        assert (
            config == GKTConfig(batch_norm="all_streams") and config.to_dict()["batch_norm"] == "all_streams"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded()["gkt"].config.batch_norm == "all_streams"


def test_the_warning_points_at_the_callers_line():
    with pytest.warns(DeprecationWarning) as caught:
        GKTConfig(batch_norm="sequential")
    assert caught[0].filename == __file__


def test_a_pickled_configuration_without_a_newer_field_has_its_default():
    config = GKTConfig(groups=2)
    state = {name: value for name, value in vars(config).items() if name != "label_smoothing"}
    other = object.__new__(GKTConfig)
    other.__setstate__(state)
    assert other == config and dataclasses.asdict(other)["label_smoothing"] == 0.0


def test_the_command_line_takes_the_old_name_of_the_policy():
    """From flags, or from an `args.yaml` of 0.1, whose values become flags."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    with pytest.warns(DeprecationWarning, match="all_streams"):
        assert parser.parse_args(["--batch-norm=sequential"]).batch_norm == "all_streams"
