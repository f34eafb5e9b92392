import pytest
import torch

from routing_replay.errors import ReplayError
from routing_replay.replay import Packed
from routing_replay.replay._recording import Recorder, in_rank_order
from routing_replay.trace import ModelRouting

ROUTING = ModelRouting(layer_ids=(1, 3), num_layers=4, num_experts=4, top_k=3)
SELECTION = torch.tensor([[0.1, 0.4, 0.4, 0.3]])


@pytest.mark.parametrize(
    ("topk_ids", "is_ranked"),
    [
        ([1, 2, 3], True),
        ([2, 1, 3], False),
        ([1, 3, 2], False),
        ([3, 2, 1], False),
        ([1, 2], True),
        ([2, 1], False),
        ([1, 0], True),
        ([2], True),
    ],
)
def test_rank_order_is_by_key_then_by_smaller_id(topk_ids: list[int], is_ranked: bool):
    ids = torch.tensor([topk_ids], dtype=torch.int16)
    assert in_rank_order(ids, SELECTION).tolist() == [is_ranked]


def test_rank_order_of_nan_is_unknown():
    selection = torch.tensor([[0.5, float("nan"), 0.2, 0.1], [0.5, 0.4, 0.3, 0.2]])
    assert in_rank_order(torch.tensor([[1, 0], [0, 1]]), selection).tolist() == [False, True]


def recorder_of(layout: Packed, **options: object):
    tokens = [list(range(length)) for length in layout.lengths]
    options = {"weights_version": 0, "last_row": False} | options
    return Recorder(ROUTING, layout, tokens, **options)


def test_recorder_places_layers_whatever_their_order():
    recorder = recorder_of(Packed(lengths=(2, 3)))
    keys = torch.rand(5, 4)
    ids = {idx: torch.rand(5, 4).argsort(dim=-1)[:, :3] for idx in ROUTING.layer_ids}
    for layer_idx in (3, 1):
        recorder.note(layer_idx, ids[layer_idx].to(torch.int16), keys)
    recorder.finish()
    want = torch.stack([ids[1], ids[3]], dim=1)
    first, second = recorder.traces()
    assert torch.equal(first.to_torch().ids, want[:1])
    assert torch.equal(second.to_torch().ids, want[2:4])


@pytest.mark.parametrize("unranked_row", range(5))
@pytest.mark.parametrize("layer_idx", ROUTING.layer_ids)
def test_a_trace_is_ordered_where_all_its_rows_are(unranked_row: int, layer_idx: int):
    recorder = recorder_of(Packed(lengths=(2, 3)))
    for idx in ROUTING.layer_ids:
        ids = torch.tensor([[1, 2, 3]] * 5)
        if idx == layer_idx:
            ids[unranked_row] = torch.tensor([2, 1, 3])
        recorder.note(idx, ids, SELECTION.expand(5, 4))
    recorder.finish()
    # Rows 1 and 4 are of last tokens, which the traces leave out.
    want = {0: [False, True], 2: [True, False], 3: [True, False]}
    assert [trace.ordered for trace in recorder.traces()] == want.get(unranked_row, [True, True])


def test_recorder_refuses_a_layer_too_many_or_too_few():
    recorder = recorder_of(Packed(lengths=(2,)))
    ids = torch.tensor([[1, 2, 3]] * 2)
    recorder.note(3, ids, SELECTION.expand(2, 4))
    with pytest.raises(ReplayError, match="layer 3 was called a second time"):
        recorder.note(3, ids, SELECTION.expand(2, 4))
    with pytest.raises(ReplayError, match=r"layers \[1\] were not called"):
        recorder.finish()
    with pytest.raises(ReplayError, match="nothing is recorded"):
        recorder.traces()
