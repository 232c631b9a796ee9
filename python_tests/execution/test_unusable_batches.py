"""What can't be trained on is refused in words of the user's settings, alike in every mode."""

from __future__ import annotations

import logging
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn

from gkt_fast import GKT, GKTConfig, group_knowledge_loss
from gkt_fast.models import cifar_resnet
from gkt_fast.ops import group_knowledge_loss_reference

MODES = ("auto", "sequential", "shared", "lean", "stacked")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def network(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[Block() for _ in range(3)]), nn.Linear(8, classes))


X, Y = torch.randn(6, 4), torch.randint(5, (6,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [torch.zeros(6, dtype=torch.long), torch.rand(6, 1)])
def test_one_class_is_refused(mode, targets):
    gkt = GKT(network(1), GKTConfig(execution=mode))
    with pytest.raises(ValueError, match=r"logits have 1 class, shape \(6, 1\).*need at least 2"):
        gkt(X, targets)
    assert gkt.next_step == 0


def test_one_class_is_refused_in_plain_training_and_dense_prediction():
    with pytest.raises(ValueError, match="logits have 1 class"):
        GKT(network(1), GKTConfig(groups=0))(X, torch.zeros(6, dtype=torch.long))
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Convolution(), Convolution()), nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match=r"logits have 1 class, shape \(2, 1, 5, 5\)"):
        GKT(dense)(torch.randn(2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.conv(x).tanh()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_refused(mode):
    model = network()
    with pytest.raises(ValueError, match=r"the batch has no rows; leave it out.*drop_last"):
        GKT(model, GKTConfig(execution=mode))(X[:0], Y[:0])
    assert model(X[:0]).shape == (0, 5) and GKT(model)(X[:0]).shape == (0, 5)


@pytest.mark.parametrize("mode", MODES)
def test_negative_probabilities_are_refused(mode):
    with pytest.raises(ValueError, match=r"targets has the value -\d.*which are not negative"):
        GKT(network(), GKTConfig(execution=mode))(X, torch.randn(6, 5))


class Tokens(nn.Module):
    """A small language model: (B, T) tokens, (B, T, V) logits."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Embedding(11, 8), nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.blocks(self.stem(tokens)))


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_tokens_are_refused_with_what_to_do(mode):
    tokens = torch.randint(11, (3, 7))
    with pytest.raises(ValueError, match=r"logits of tokens \(3, 7, 11\), classes last.*transpose\(1, -1\)"):
        GKT(Tokens(), GKTConfig(execution=mode))(tokens, tokens)

    class Transposed(Tokens):
        def forward(self, tokens):
            return super().forward(tokens).transpose(1, -1)

    GKT(Transposed(), GKTConfig(execution=mode))(tokens, tokens).loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_targets_of_one_column_are_refused_with_what_to_do(mode):
    with pytest.raises(ValueError, match=r"shape \(6, 1\).*shape \(6,\).*targets.squeeze\(1\)"):
        GKT(network(), GKTConfig(execution=mode))(X, Y[:, None])


class Masked(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.net, self.value = network(), value

    def forward(self, x):
        return self.net(x).masked_fill(torch.tensor([False, False, True, False, True]), self.value)


@pytest.mark.parametrize("mode", MODES)
def test_classes_masked_by_huge_numbers_are_refused_with_normalised_logits(mode):
    config = GKTConfig(execution=mode, normalize_logits=True)
    for value in (torch.finfo(torch.float32).min, -1e30):
        with pytest.raises(ValueError, match=r"logits reach .*normalize_logits.*overflows.*at most -1e4"):
            GKT(Masked(value), config)(X, Y % 2)
        result = GKT(Masked(value), config.replace(normalize_logits=False))(X, Y % 2)
        result.loss.backward()
        assert result.loss.isfinite()
    moderate = GKT(Masked(-1e4), config)
    moderate(X, Y % 2).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in moderate.parameters())


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("op", [group_knowledge_loss, group_knowledge_loss_reference])
def test_the_op_and_its_reference_agree_on_logits_that_are_no_numbers(op, value):
    logits = torch.randn(4, 6, 5).masked_fill(torch.tensor([False, False, True, False, True]), value)
    assert op(logits, Y % 2, groups=3, normalize_logits=True)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_can_be_normalised_depends_on_the_precision_of_the_sums(dtype):
    logits = torch.randn(4, 6, 5, dtype=dtype)
    logits[..., 2] = torch.finfo(dtype).min if dtype == torch.float16 else -1e30
    if dtype == torch.bfloat16:  # summed in float32
        with pytest.raises(ValueError, match="logits reach"):
            group_knowledge_loss(logits, Y % 2, groups=3, normalize_logits=True)
    else:
        assert group_knowledge_loss(logits, Y % 2, groups=3, normalize_logits=True)[0].isfinite()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrt", ["inputs", "parameters"])
@pytest.mark.parametrize("build", [network, lambda: cifar_resnet(8, num_classes=5, width=4)])
def test_double_backward_is_refused(mode, wrt, build):
    model = build()
    x = (torch.randn(6, 3, 8, 8) if build is not network else X).clone().requires_grad_()
    sources = [x] if wrt == "inputs" else [*model.parameters()]
    loss = GKT(model, GKTConfig(execution=mode))(x, Y).loss
    first = torch.autograd.grad(loss, sources, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    assert penalty.requires_grad
    words = r"the loss of a GKT step can't be differentiated twice.*gkt\.model\(inputs\)"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(penalty, [*model.parameters()], allow_unused=True)


@pytest.mark.parametrize("mode", MODES)
def test_create_graph_gives_the_same_first_gradients(mode):
    found = []
    for create_graph in (False, True):
        model = network()
        loss = GKT(model, GKTConfig(execution=mode))(X, Y).loss
        found.append(torch.autograd.grad(2 * loss, [*model.parameters()], create_graph=create_graph))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_penalty_on_a_forward_of_the_model_itself_works_beside_gkt():
    model = network()
    x = X.clone().requires_grad_()
    gkt = GKT(model)
    (gradient,) = torch.autograd.grad(gkt.model(x).logsumexp(1).sum(), x, create_graph=True)
    (gkt(x.detach(), Y).loss + gradient.square().sum()).backward()
    assert model[0].weight.grad.abs().sum() > 0


Named = namedtuple("Named", "logits aux_logits")


@dataclass
class Fields:
    logits: torch.Tensor
    balance: torch.Tensor


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 8), nn.Sequential(*[Block() for _ in range(3)])
        self.head, self.aux, self.make = nn.Linear(8, 5), nn.Linear(8, 5), make

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.make(self.head(x), self.aux(x), x)


OUTPUTS = {
    "'aux_logits'": lambda logits, aux, x: Named(logits, aux),
    "'balance'": lambda logits, aux, x: Fields(logits, aux.square().mean()),
    "'loss', 'deep'": lambda logits, aux, x: {
        "logits": logits,
        "loss": aux.sum(),
        "deep": (aux, x),
        "size": 3,
    },
    "'aux'": lambda logits, aux, x: OrderedDict(out=logits, aux=aux),
}


@pytest.mark.parametrize("mode", ["shared", "lean", "sequential", "plain"])
@pytest.mark.parametrize("names", OUTPUTS)
def test_outputs_that_go_untrained_are_named_once(mode, names, caplog):
    config = GKTConfig(groups=0) if mode == "plain" else GKTConfig(execution=mode)
    gkt = GKT(Net(OUTPUTS[names]), config)
    with caplog.at_level(logging.WARNING, "gkt_fast"):
        for _ in range(2):
            gkt(X, Y).loss.backward()
    (record,) = (record for record in caplog.records if "beside its logits" in record.message)
    assert record.message.startswith(f"the model returns {names} beside its logits")


@pytest.mark.parametrize(
    "make",
    [
        lambda logits, aux, x: {"logits": logits, "hidden_states": (x,), "count": 3, "none": None},
        lambda logits, aux, x: {"logits": logits, "probabilities": logits.detach().softmax(1)},
        lambda logits, aux, x: Named(logits, None),
    ],
)
def test_activations_on_the_way_to_the_logits_give_no_warning(make, caplog):
    with caplog.at_level(logging.WARNING, "gkt_fast"):
        GKT(Net(make), GKTConfig(execution="shared"))(X, Y).loss.backward()
    assert "beside its logits" not in caplog.text


def test_what_a_model_returned_is_described():
    with pytest.raises(TypeError, match=r"model returned tuple; it must .*It holds Tensor, Tensor"):
        GKT(Net(lambda logits, aux, x: (logits, aux)))(X, Y)
    with pytest.raises(TypeError, match=r"model returned dict; it must .*has the keys 'scores'"):
        GKT(Net(lambda logits, aux, x: {"scores": logits}))(X, Y)
