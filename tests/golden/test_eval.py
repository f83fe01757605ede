"""Our evaluation gives the exact mean over tokens; the biased conventions of the field do not."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from goldens.adapters import adapt
from goldens.cases import Case, Manifest, NotImplementedCaseError, assert_equal, stack_cases
from goldens.stack import reference_of
from torch import Tensor

from llmnorm import LlmNormForCausalLM
from llmnorm.evaluation.perplexity import score_documents, token_nats

EXACT = "exact_token_mean"


def golden_cases(manifests: list[Manifest]) -> list[Case]:
    """One case a convention; `overrides` carries the model's stack."""
    stacks = {case.manifest.name: case for case in stack_cases(manifests) if case.variant == "f64"}
    found = []
    for manifest in manifests:
        if manifest.kind == "eval":
            named = re.search(r"stacks/\w+", manifest.content["model"])
            stack = {"stack": stacks.get(named.group()) if named else None}
            entry = partial(Case, manifest=manifest, fields=manifest.content, overrides=stack)
            found += [entry(name=name) for name in manifest.content["conventions"]]
    return found


def test_evaluation_convention(case: Case) -> None:
    """The exact one is ours; any other is computed from the same losses, and is another number."""
    model = load(case)
    tolerance, loss = case.fields["tolerance"], recorded(case, case.name)
    if case.name == EXACT:
        assert_equal("masked loss", masked_loss(case, model), loss, tolerance)
        assert_equal("scored documents", scored(case, model), loss, tolerance)
        return
    if case.name not in CONVENTIONS:
        raise NotImplementedCaseError(f"convention {case.name}")
    biased = CONVENTIONS[case.name](case, model)
    assert_equal(case.name, biased, loss, tolerance)
    with pytest.raises(AssertionError):
        assert_equal(case.name, biased, recorded(case, EXACT), tolerance)


def load(case: Case) -> LlmNormForCausalLM:
    """Our model with the stored weights, in float64."""
    origin = case.overrides["stack"]
    if origin is None:
        raise NotImplementedCaseError(f"no vectors of the model ({case.fields['model']})")
    stack = adapt(origin)
    model = stack.model(torch.float64)
    state = stack.to_ours(reference_of(origin))
    model.load_state_dict({name: value.detach() for name, value in state.items()})
    return model


def recorded(case: Case, convention: str) -> Tensor:
    return torch.tensor(case.fields["conventions"][convention]["loss"], dtype=torch.float64)


def rows(batch: dict) -> tuple[Tensor, Tensor]:
    """Ids (batch, seq), and a mask of the tokens that are not padding."""
    ids = torch.tensor(batch["input_ids"])
    return ids, torch.arange(ids.shape[1]) < torch.tensor(batch["lengths"])[:, None]


@torch.no_grad()
def masked_loss(case: Case, model: LlmNormForCausalLM) -> Tensor:
    """Our model's own loss, padding masked, divided by the targets of all batches."""
    total = sum(batch["target_tokens"] for batch in case.fields["batches"])
    loss = torch.zeros((), dtype=torch.float64)
    for batch in case.fields["batches"]:
        ids, real = rows(batch)
        labels = ids.masked_fill(~real, -100)
        loss += model(ids, attention_mask=real, labels=labels, num_items_in_batch=total).loss
    return loss


def scored(case: Case, model: LlmNormForCausalLM) -> Tensor:
    """`score_documents`, each sequence's first token standing for the end-of-text before it."""
    nats, targets = 0.0, 0
    for batch in case.fields["batches"]:
        for ids, length in zip(batch["input_ids"], batch["lengths"], strict=True):
            document = (np.array(ids[1:length]), 0)
            result = score_documents(model, [document], eos_token_id=ids[0], seq_len=length)
            nats, targets = nats + result.loss * result.tokens, targets + result.tokens
    assert targets == case.fields["target_tokens"]
    return torch.tensor(nats / targets, dtype=torch.float64)


@torch.no_grad()
def nats(case: Case, model: LlmNormForCausalLM) -> list[tuple[Tensor, Tensor]]:
    """Of every batch -log p of all shifted positions, and which of them are real targets."""
    found = []
    for batch in case.fields["batches"]:
        ids, real = rows(batch)
        logits = model(ids, use_cache=False).logits[:, :-1]
        values = token_nats(logits.flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1)
        for row, length, stored in zip(values, batch["lengths"], batch["token_nll"], strict=True):
            wanted = torch.tensor(stored, dtype=torch.float64)
            assert_equal("token_nll", row[: length - 1], wanted, case.fields["tolerance"])
        found.append((values, real[:, 1:]))
    return found


def batch_means(case: Case, model: LlmNormForCausalLM) -> Tensor:
    return torch.stack([values[real].mean() for values, real in nats(case, model)])


def galore(case: Case, model: LlmNormForCausalLM) -> Tensor:
    """The batch counter of that lineage starts at 1."""
    means = batch_means(case, model)
    return means.sum() / (len(means) + 1)


def galore_on_ranks(case: Case, model: LlmNormForCausalLM) -> Tensor:
    means = batch_means(case, model)
    ranks = case.fields["conventions"][case.name]["rank_batches"]
    return torch.stack([means[held].sum() / (len(held) + 1) for held in ranks]).mean()


def sequence_means(case: Case, model: LlmNormForCausalLM) -> Tensor:
    found = nats(case, model)
    means = [
        row[kept].mean()
        for values, real in found
        for row, kept in zip(values, real, strict=True)
        if kept.any()
    ]
    return torch.stack(means).mean()


def over_inputs(case: Case, model: LlmNormForCausalLM) -> Tensor:
    """Divided by all tokens, first ones included, which are no targets."""
    inputs = sum(sum(batch["lengths"]) for batch in case.fields["batches"])
    return torch.stack([values[real].sum() for values, real in nats(case, model)]).sum() / inputs


def padding_counted(case: Case, model: LlmNormForCausalLM) -> Tensor:
    return torch.cat([values.flatten() for values, _ in nats(case, model)]).mean()


CONVENTIONS = {
    "mean_of_batch_means": lambda case, model: batch_means(case, model).mean(),
    "galore_lineage": galore,
    "galore_lineage_two_ranks": galore_on_ranks,
    "mean_of_sequence_means": sequence_means,
    "sum_over_input_tokens": over_inputs,
    "padding_counted": padding_counted,
}
