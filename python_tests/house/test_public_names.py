"""The public functions do what their docstrings say where nothing else looks: what they refuse, and in which words."""

from __future__ import annotations

import inspect

import pytest
import torch

import gkt_fast
from gkt_fast.models import cifar_resnet

PLAIN = ("METHODS", "__version__")


@pytest.mark.parametrize("name", sorted({*gkt_fast.__all__} - {*PLAIN}))
def test_every_parameter_is_described(name: str) -> None:
    value = getattr(gkt_fast, name)
    if inspect.isclass(value) and issubclass(value, BaseException):
        return
    document = inspect.getdoc(value)
    assert document
    try:
        parameters = inspect.signature(value).parameters
    except ValueError:
        return
    described = name in ("GroupKnowledgeLoss", "use_backend") or "Args:" in document
    named = [parameter for parameter in parameters if parameter not in ("args", "kwargs")]
    assert described or not named or all(f"`{parameter}`" in document for parameter in named)
    if "Args:" in document:
        missing = [parameter for parameter in named if f"\n    {parameter}: " not in document]
        if name == "group_knowledge_loss":  # its options stand in one line, `fields`
            missing = [
                parameter for parameter in missing if parameter not in document.partition("fields: ")[2]
            ]
        assert missing == []


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: gkt_fast.survival_scaling(cifar_resnet(14), 1.0).__enter__(),
            "drop_rate is 1.0; it must be in",
        ),
        (lambda: gkt_fast.NormalizedCrossEntropy(label_smoothing=2), "label_smoothing is 2; it must be in"),
        (lambda: gkt_fast.plot_subnets([], "x.png"), "results is empty"),
        (lambda: gkt_fast.best_subnet([]), "results"),
        (lambda: gkt_fast.recalibrate_batch_norm(cifar_resnet(14), []), "loader gave no sample"),
        (lambda: gkt_fast.evaluate(torch.nn.Linear(2, 2), []), "loader gave no row"),
        (lambda: gkt_fast.LinearWarmup(-1), "steps is -1"),
        (lambda: gkt_fast.make_elastic(cifar_resnet(14)), "calibration_loader is None"),
        (lambda: gkt_fast.use_backend("abacus").__enter__(), "backend is 'abacus'"),
    ],
)
def test_what_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
