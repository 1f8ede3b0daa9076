"""Known networks against hand-written truth: order, first, last, signs, multiply-accumulates."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.graph import find_sites
from helpers.cases import timm_network, torchvision_network


def found(name, **kwargs):
    library, _, model = name.partition(":")
    make = timm_network if library == "timm" else torchvision_network
    with torch.device("meta"):
        return {site.name: site for site in find_sites(make(model, **kwargs)).sites}


def undecided(sites):
    return {name for name, site in sites.items() if not site.nonnegative}


def test_resnet18():
    sites = found("timm:resnet18")
    assert len(sites) == 21
    assert [s.name for s in sites.values()][:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    assert [n for n, s in sites.items() if s.first] == ["conv1"]
    assert [n for n, s in sites.items() if s.last] == ["fc"]
    assert undecided(sites) == {"conv1"}  # everything else sees a ReLU, max-pooled, averaged or not


def test_mobilenet_v2_is_linear_between_its_blocks():
    sites = found("torchvision:mobilenet_v2")
    expanding = {f"features.{i}.conv.0.0" for i in range(2, 18)}  # what they see is a projection, added or not
    assert undecided(sites) == {"features.0.0", "features.18.0"} | expanding
    assert [n for n, s in sites.items() if s.first] == ["features.0.0"]
    assert [n for n, s in sites.items() if s.last] == ["classifier.1"]


def test_densenet_and_squeezenet_concatenate_what_is_not_negative():
    assert undecided(found("torchvision:densenet121")) == {"features.conv0"}
    sites = found("torchvision:squeezenet1_1")
    assert undecided(sites) == {"features.0"}  # the fire modules' ReLUs meet in a cat
    assert [n for n, s in sites.items() if s.last] == ["classifier.1"]


def test_googlenet_pools_and_concatenates():
    sites = found("torchvision:googlenet", aux_logits=False, init_weights=False)
    assert undecided(sites) == {"conv1.conv"}


def test_regnet_gates_with_a_sigmoid_and_activates_inside_its_norm_layers():
    assert undecided(found("timm:regnety_002")) == {"stem.conv"}


def test_silu_and_gelu_prove_nothing():
    sites = found("timm:efficientnet_b0")
    assert undecided(sites) == set(sites)
    sites = found("timm:vit_tiny_patch16_224", depth=2)
    weights_of_values = {f"blocks.{i}.attn.attention_values" for i in range(2)}  # what a softmax gives
    assert undecided(sites) == set(sites) - weights_of_values
    assert [n for n, s in sites.items() if s.first] == ["patch_embed.proj"]
    assert [n for n, s in sites.items() if s.last] == ["head"]


def test_a_segmentation_network_has_two_heads():
    sites = found("torchvision:fcn_resnet50", weights_backbone=None, aux_loss=True)
    assert {n for n, s in sites.items() if s.last} == {"classifier.4", "aux_classifier.4"}
    assert undecided(sites) == {"backbone.conv1"}


MACS = {
    # published: 1.814 G (He et al.; torchvision's table says 1.81) and 0.301 G (Sandler et al.)
    "timm:resnet18": 1_814_073_344,
    "torchvision:resnet18": 1_814_073_344,
    "torchvision:mobilenet_v2": 300_774_272,
    # 196 patches of 768 values to 192; 12 blocks of 197 tokens: qkv, projection, two layers of the MLP; head
    "timm:vit_tiny_patch16_224": 196 * 768 * 192 + 12 * 197 * 192 * (3 * 192 + 192 + 2 * 768) + 192 * 1000,
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates(name):
    make = timm_network if name.startswith("timm") else torchvision_network
    with torch.device("meta"):
        model = make(name.partition(":")[2])
    example = None if name.startswith("timm") else torch.zeros(2, 3, 224, 224)  # per element, whatever the batch
    sites = find_sites(model, example).sites
    assert sum(site.macs for site in sites if not site.is_product) == MACS[name]
    attention = 12 * 2 * 197 * 197 * 192 if "vit" in name else 0  # scores and values: every token with every token
    assert sum(site.macs for site in sites if site.is_product) == attention


def test_multiply_accumulates_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 6, 3, groups=2, stride=2)  # 4x4 outputs, 6 channels, 2 * 9 products
            self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)  # every one of 6 * 4 * 4 inputs meets 3 * 4 weights
            self.fc = nn.Linear(8, 5)  # on the last dimension of 3 * 8 * 8 values

        def forward(self, x):
            return self.fc(self.up(input=self.grouped(x)))

    sites = {s.name: s.macs for s in find_sites(Net(), torch.zeros(3, 4, 9, 9)).sites}
    assert sites == {"grouped": 16 * 6 * 18, "up": 6 * 16 * 12, "fc": 3 * 8 * 8 * 5}


def test_a_forward_that_asks_for_values_is_counted_on_the_example_itself():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) < 10 else x

    assert [s.macs for s in find_sites(Asks(), torch.zeros(5, 4)).sites] == [16]


def test_sites_that_nothing_calls_say_so():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spare, self.training_only = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.training_only(self.a(x)) if self.training else self.a(x)

    sites = {s.name: s for s in find_sites(Spare(), torch.zeros(1, 4)).sites}
    assert sites["spare"].notes == sites["training_only"].notes == ("not called in evaluation",)
    assert sites["a"].notes == ()


def test_layers_hidden_in_a_node_are_met_where_the_node_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16)

        def forward(self, x):
            return self.head(self.decoder(x, self.stem(x)))

    sites = {s.name: s for s in find_sites(Net()).sites}
    order = [*sites]
    assert (order[0], order[-1]) == ("stem", "head")
    assert {n for n, s in sites.items() if s.first} == {"stem", *(f"decoder.self_attn.{x}_proj" for x in "qkv")}
    assert {n for n, s in sites.items() if s.last} == {"head"}
    assert not sites["decoder.linear1"].reason and not sites["decoder.linear1"].notes
    assert not any(s.nonnegative for s in sites.values() if not s.is_product)


def test_mobilevit_hides_most_of_its_layers():
    sites = found("timm:mobilevit_xxs")
    assert sum(site.is_product for site in sites.values()) == 2 * 9  # two products in each of 9 attention blocks
    sites = {name: site for name, site in sites.items() if not site.is_product}
    assert len(sites) == 72 and not any(site.reason or site.notes for site in sites.values())
    assert [n for n, s in sites.items() if s.first] == ["stem.conv"]
    assert [n for n, s in sites.items() if s.last] == ["head.fc"]
    assert all(site.macs for site in sites.values())


class Parts(nn.Module):
    """Multiplies by the parts of one parameter, which `part` takes from it, with a layer between them."""

    def __init__(self, part, shape=(24, 8)):
        super().__init__()
        self.w, self.mid, self.part = nn.Parameter(torch.randn(*shape)), nn.Linear(8, 8), part

    def forward(self, x):
        first, second, third = self.part(self.w)
        return F.linear(self.mid(F.linear(F.linear(x, first), second).relu()), third)


class Layer(nn.Module):
    """The weight of one layer, in three calls of one input."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        first, second, third = self.qkv.weight.chunk(3)
        q, k, v = F.linear(x, first), F.linear(x, second), F.linear(x, third)
        return self.out(torch.softmax(q * k, -1) * v)


class Inner(nn.Module):
    """Two parts, in a module that its parent may call twice."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        first, second = self.w.chunk(2)
        return F.linear(F.linear(x, first).relu(), second)


class Twice(nn.Module):
    """Calls a module with two parts before and behind a layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.mid = Inner(), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(self.mid(self.inner(x)))


PARTS = {
    "split": lambda: Parts(lambda w: w.split(8)),
    "chunk": lambda: Parts(lambda w: w.chunk(3)),
    "slices": lambda: Parts(lambda w: (w[:8], w[8:16], w[16:])),
    "index": lambda: Parts(lambda w: (w[0], w[1], w[2]), (3, 8, 8)),
    "unbind": lambda: Parts(lambda w: w.unbind(0), (3, 8, 8)),
    "transposed": lambda: Parts(lambda w: (w[0].t(), w[1].t(), w[2].t()), (3, 8, 8)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_weight_stand_where_they_are_called(name):
    found = find_sites(PARTS[name]())
    assert [site.name for site in found.sites] == ["w", "w#2", "mid", "w#3"]
    assert [site.first for site in found.sites] == [True, False, False, False]
    assert [site.last for site in found.sites] == [False, False, False, True]
    assert [site.nonnegative for site in found.sites] == [False, False, True, False]


def test_parts_of_a_layers_weight_and_parts_in_a_module_that_is_called_twice():
    layer, twice = find_sites(Layer()), find_sites(Twice())
    names = ["qkv.weight", "qkv.weight#2", "qkv.weight#3"]
    assert [site.name for site in layer.sites if not site.reason] == [*names, "out"]
    assert [site.name for site in layer.sites if site.first] == names
    assert [site.name for site in layer.sites if site.last] == ["out"]
    assert [(site.name, site.first, site.last) for site in twice.sites] == [
        ("inner.w", True, False), ("inner.w#2", False, True), ("mid", False, False),
    ]  # fmt: skip
    assert [site.name for site in twice.sites if site.nonnegative] == ["inner.w#2"]


@pytest.mark.parametrize("make", [*PARTS.values(), Layer, Twice], ids=[*PARTS, "layer", "twice"])
def test_every_parameter_of_parts_gets_a_gradient(make):
    """As plain DistributedDataParallel wants it: it waits for every parameter that asks for a gradient."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(16, 8)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        expected, found = model(x), qmodel(x)
        assert (found - expected).norm() < 0.05 * expected.norm()  # 8 bits, several layers
        assert torch.equal(dq.freeze(qmodel)(x), found)
    qmodel.train()(x).square().sum().backward()
    assert not [key for key, p in qmodel.named_parameters() if p.requires_grad and p.grad is None]
