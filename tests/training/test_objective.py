"""The loss is a sum over target tokens, whatever the chunks."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from llmnorm import LlmNormForCausalLM, build_config, build_model
from llmnorm.training.objective import Objective

pytestmark = pytest.mark.fast

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _model(dtype: torch.dtype = torch.float64) -> LlmNormForCausalLM:
    return build_model(build_config(SHAPE), seed=0).to(dtype)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (3, 11), generator=generator)
    targets = torch.randint(64, (3, 11), generator=generator)
    targets[0, 4:] = -100
    return ids, targets


def test_loss_is_the_sum_of_minus_log_probabilities_of_counted_targets() -> None:
    model = _model()
    ids, targets = _batch()
    loss_sum, count = Objective(model)(ids, targets)
    log_p = torch.log_softmax(model(input_ids=ids).logits, dim=-1)
    counted = targets >= 0
    by_hand = -log_p[counted].gather(1, targets[counted][:, None]).sum()
    assert count.item() == counted.sum().item()
    torch.testing.assert_close(loss_sum, by_hand, rtol=1e-13, atol=0)


def test_chunks_of_tokens_change_neither_loss_nor_gradients() -> None:
    ids, targets = _batch()
    results = []
    for logits_per_chunk in (2**20, 64 * 7):  # all 33 tokens at once, and 7 at a time
        model = _model()
        loss_sum, _ = Objective(model, logits_per_chunk)(ids, targets)
        loss_sum.backward()
        results.append([loss_sum.detach(), *(p.grad for p in model.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=1e-14)


def test_a_batch_without_targets_has_zero_loss_and_no_nan() -> None:
    model = _model()
    ids, targets = _batch()
    loss_sum, count = Objective(model)(ids, torch.full_like(targets, -100))
    loss_sum.backward()
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_softmax_is_computed_in_float32_under_bfloat16_autocast() -> None:
    model = _model(torch.float32)
    ids, targets = _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum, _ = Objective(model)(ids, targets)
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss_sum.item() == pytest.approx(losses.item(), rel=1e-6)


def test_position_ids_that_restart_hide_the_document_before() -> None:
    model = _model()
    ids, targets = _batch()
    positions = torch.arange(11) - torch.where(torch.arange(11) >= 6, 6, 0)
    positions = positions.expand(3, -1)
    targets[:, :6] = -100
    one, _ = Objective(model)(ids, targets, positions)
    changed = ids.clone()
    changed[:, :6] = (changed[:, :6] + 1) % 64
    two, _ = Objective(model)(changed, targets, positions)
    torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
