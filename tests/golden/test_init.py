"""Fresh models start where the references do, or, where those err, where the papers say."""

from collections.abc import Callable

import pytest
from goldens.cases import Case, Manifest, entry_cases
from goldens.fresh import compare_fresh, fresh

from llmnorm import build_config, build_model
from llmnorm.modeling.initialization import expected_std
from llmnorm.modeling.norms import alpha_at

# Widths of the LLaMA sizes for which DyT's recipe is published.
WIDTHS = {"7B": 4096, "13B": 5120, "34B": 8192, "70B": 8192}


def golden_cases(manifests: list[Manifest]) -> list[Case]:
    return entry_cases(manifests, "init", "variants", "variant")


def test_fresh_model_starts_where_promised(
    case: Case, record_property: Callable[[str, object], None]
) -> None:
    """In the reference's distribution, but for the named deviations: there in the paper's."""
    wanted = fresh(case)
    model = build_model(wanted.stack.config, seed=case.manifest.content["seeds"][0])
    followed = compare_fresh(case, wanted, model.state_dict())
    for deviation in wanted.deviations:
        record_property("follows the paper", deviation.why)
    assert bool(followed) == bool(wanted.deviations)
    embedding = model.model.embed_tokens.weight
    assert embedding.any(dim=1).all(), "a row of the embedding is zero; llmnorm has no padding row"


def test_our_table_of_alphas_holds_the_published_ones(manifests: list[Manifest]) -> None:
    published = [
        entry["config"]
        for manifest in manifests
        if manifest.kind == "init"
        for entry in manifest.content["variants"]
        if "official_for" in entry["config"]
    ]
    if not published:
        pytest.skip("this folder has no published alphas")
    for config in published:
        for size in config["official_for"].split(" and "):
            for kind, name in (
                ("attn", "attn_alpha"),
                ("mlp", "ffn_alpha"),
                ("final", "dec_alpha"),
            ):
                assert alpha_at(kind, WIDTHS[size]) == config[name]


def test_default_embeddings_deviate_from_the_references() -> None:
    """std 0.02 (Mix-LN and GPAS: sqrt(2/5)); DyT's scale makes RMS 1 (its code: sqrt(width))."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    model = build_model(build_config(shape, norm="dyt", placement="pre_ln"))
    embedding = model.model.embed_tokens
    assert expected_std("model.embed_tokens", embedding, model.config) == 0.02
    assert model.model.embedding_scale.weight.item() == pytest.approx(1 / 0.02)
