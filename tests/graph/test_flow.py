"""Known networks against hand-written truth: order, first, last, signs, multiply-accumulates."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


PROVEN = {
    "relu": lambda x: x.relu(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "abs": abs,
    "clamp": lambda x: x.clamp(0, 6),
    "clamp-above": lambda x: F.relu(x).clamp(max=3),
    "max-pool": lambda x: F.max_pool2d(F.relu(x), 2),
    "avg-pool": lambda x: F.adaptive_avg_pool2d(F.relu(x), 1),
    "cat": lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], dim=1)[:, :4],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x.abs()], dim=1)[:, :4],
    "views": lambda x: F.relu(x).flatten(2).transpose(1, 2).permute(0, 2, 1).reshape(1, 4, 8, 8).contiguous(),
    "dropout": lambda x: F.dropout(F.relu(x), training=False),
    "gate": lambda x: F.relu(x) * torch.sigmoid(x),
    "scaled": lambda x: F.relu(x) * 0.5 + 1,
    "chunk": lambda x: F.relu(torch.cat([x, x], 1)).chunk(2, dim=1)[1],
    "pad": lambda x: F.pad(F.relu(x), (1, 1)),
    "interpolate": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"),
}
NOT_PROVEN = {
    "input": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky": lambda x: F.leaky_relu(x),
    "tanh": torch.tanh,
    "minus": lambda x: F.relu(x) - F.relu(-x),
    "rsub": lambda x: 1 - F.relu(x),
    "negative-factor": lambda x: F.relu(x) * -0.5,
    "negative-shift": lambda x: F.relu(x) + -1,
    "alpha": lambda x: torch.add(F.relu(x), F.relu(-x), alpha=-1),
    "alpha-method": lambda x: F.relu(x).add(F.relu(-x), alpha=-2),
    "other": lambda x: torch.add(F.relu(x), other=x),
    "cat-one-side": lambda x: torch.cat([F.relu(x), x], dim=1)[:, 4:],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x], dim=1)[:, 4:],
    "clamp-below": lambda x: x.clamp(min=-1),
    "clamp-max": lambda x: x.clamp(max=1),
    "clamp-to-negative": lambda x: F.relu(x).clamp(-2, -1),
    "hardtanh": F.hardtanh,
    "bicubic": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"),
    "negative-pad": lambda x: F.pad(F.relu(x), (1, 1), value=-1.0),
    "add-nothing": lambda x: torch.add(x, 0),
    "layer-norm": lambda x: F.layer_norm(F.relu(x), (8,)),
    "in-place": lambda x: (h := F.relu(x), h.sub_(1), h)[-1],
    "in-place-view": lambda x: (h := F.relu(x), h.view(-1).neg_(), h)[-1],
}


class Before(nn.Module):
    """A function, and the convolution whose input it makes."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.conv(self.function(x))


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name):
    model = Before(PROVEN[name])
    assert find_sites(model).sites[0].nonnegative
    assert PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() >= 0  # and it is true


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name):
    model = Before(NOT_PROVEN[name])
    assert not find_sites(model).sites[0].nonnegative
    assert NOT_PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() < 0  # rightly so


def test_a_class_or_function_of_the_user_with_a_known_name_proves_nothing():
    class ReLU(nn.Module):
        def forward(self, x):
            return x - x.mean() if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), ReLU(), nn.Linear(4, 2))
    assert not any(site.nonnegative for site in find_sites(model).sites)


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
