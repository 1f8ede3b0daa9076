"""What is counted of a run: fused attention as its parts, padded tokens not at all, totals as torch counts them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from daqconvert.macs import counting, observe
from helpers.cases import NETWORKS
from helpers.counted import events_of


def test_the_fused_attention_block_counts_as_its_parts():
    x, block = torch.randn(2, 3, 8), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    fused = events_of(block, x, x, x)
    with counting(block, (x,)) as counter:
        block(x, x, x)
    assert {e.op for e in fused} == {"_native_multi_head_attention"}
    assert "_native_multi_head_attention" not in {e.op for e in counter.events}
    for attention in (False, True):
        assert sum(e.macs for e in fused if e.attention is attention) == sum(
            e.macs for e in counter.events if e.attention is attention
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_batch_counts_its_tokens():
    """The encoder drops padded tokens by nested tensors, so they are not multiplied."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad(), counting(encoder, (x, padding)) as counter:
        encoder(x, src_key_padding_mask=padding)
    assert sum(e.macs for e in counter.events if not e.attention) == 6 * (4 * 64 + 2 * 128)
    assert sum(e.macs for e in counter.events if e.attention) == 2 * 8 * (4 * 4 + 2 * 2)


@pytest.mark.parametrize("name", ["resnet18", "vit", "mobilenet_v2"])
def test_totals_agree_with_torchs_own_flop_counter(name):
    make, size = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, 3, size, size)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x)
    events, shapes = events_of(model, x), observe(model, (x,), {})
    assert sum(e.macs for e in events if not e.attention) * 2 == flops.get_total_flops()
    assert shapes is not None
    assert [(e.macs, e.tensors, e.module, e.attention) for e in events] == [
        (e.macs, e.tensors, e.module, e.attention) for e in shapes
    ]
