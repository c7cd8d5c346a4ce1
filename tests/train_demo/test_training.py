"""The demo's training loss is that of transformers' own forward pass, document by document."""

from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

SCRIPTS = Path(__file__).parents[2] / "examples" / "train_demo"


@pytest.fixture(scope="module")
def rows():
    """Two packed rows: ids, learnt, positions."""
    import torch

    from packing import pack_rows

    packed = pack_rows((5, 20, 512, str(SCRIPTS / "checkpoint"), 0.8))
    return torch.from_numpy(packed).long()[:, :2]


def test_documents_are_whole_and_learn_their_answers_only(rows):
    from packing import CONV_TAPS, PAD

    ids, learnt, positions = rows
    for row in range(len(ids)):
        starts = (positions[row] == 0).nonzero().flatten().tolist()
        assert len(starts) > 2
        for start, end in pairwise(starts):
            document, answers = ids[row, start:end], learnt[row, start:end]
            assert (document[-CONV_TAPS:] == PAD).all()
            assert (document[:-CONV_TAPS] != PAD).all()
            assert not answers[0]
            assert answers[-CONV_TAPS - 1] or answers[-CONV_TAPS - 2]  # an end token, with or without a line's end
            assert positions[row, start:end].tolist() == list(range(end - start))


@pytest.fixture(params=["demo", "wide"])
def model(request: pytest.FixtureRequest):
    """The demo's checkpoint, and two layers of the second shape with random weights."""
    import torch
    from shapes import model_config
    from transformers import Qwen3_5MoeForCausalLM

    if request.param == "demo":
        return Qwen3_5MoeForCausalLM.from_pretrained(SCRIPTS / "checkpoint", dtype=torch.float32)
    torch.manual_seed(0)
    config = model_config(2048, request.param)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    return Qwen3_5MoeForCausalLM(config)


def test_loss_and_gradients_are_those_of_transformers(rows, model):
    import torch
    from packed_loss import packed_loss

    from packing import PAD

    model.config.router_aux_loss_coef = 0.0
    ids, learnt, positions = (array[:1, : 512 if len(model.model.layers) == 8 else 192] for array in rows)
    losses = []
    for row in range(len(ids)):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        for start, end in pairwise(starts):
            document, wanted = ids[row, start:end], learnt[row, start:end].bool()
            logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, document[1:], reduction="none")[wanted[1:]])
    expected = torch.cat(losses).mean()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    loss = packed_loss(model, ids, learnt.bool(), positions, torch.float32, pad=PAD)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert difference < 2e-3, name


def test_balancing_term_counts_what_the_router_sends(rows):
    import torch
    from packed_loss import packed_loss
    from transformers import Qwen3_5MoeForCausalLM

    from packing import PAD

    model = Qwen3_5MoeForCausalLM.from_pretrained(SCRIPTS / "checkpoint", dtype=torch.float32).eval()
    ids, learnt, positions = (array[:1, :64] for array in rows)
    ids = ids.clamp(min=3)  # no padding, one document: transformers' own pass then computes the same
    positions = torch.arange(64)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss.item()
        losses = []
        for weight in (0.0, 1.0):
            model.config.router_aux_loss_coef = weight
            losses.append(packed_loss(model, ids, torch.ones_like(learnt).bool(), positions, torch.float32, pad=PAD))
    assert (losses[1] - losses[0]).item() == pytest.approx(expected, rel=1e-4)
