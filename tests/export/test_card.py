"""The model card: what is known is said, what is not known is left out."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from saved import byte_tokenizer, save, save_run, tiny

from llmnorm.evaluation.loading import load
from llmnorm.export.card import Exported, model_card

FOLDED = Exported(
    architecture="LlamaForCausalLM",
    notes=["untied the head (8,224 parameters more): for a reason"],
    parity={"passed": True, "summary": ["parity passed: lns", "  float32: 1.3e-06"]},
    dtype="bfloat16",
    place="me/stories",
)


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> str:
    run = save_run(tmp_path_factory.mktemp("runs") / "stories", qk_norm="per_head")
    return model_card(load(str(run)), FOLDED)


def has_row(card: str, *cells: str) -> bool:
    return re.search(r"\| *" + r" *\| *".join(map(re.escape, cells)) + r" *\|", card) is not None


def test_the_front_matter_is_what_the_hub_reads(card, tmp_path):
    data = ModelCard(card).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmnorm", "lns", "rmsnorm"],
    }
    loaded = load(str(save(tmp_path / "model", "mix_ln")))
    exported = SimpleNamespace(
        **{**vars(FOLDED), "architecture": "LlmNormForCausalLM", "license_id": "mit"}
    )
    own = model_card(loaded, exported)
    assert ModelCard(own).data.license == "mit"
    assert "custom_code" in ModelCard(own).data.tags


def test_scheme_recipe_data_and_scores_of_the_run_are_told(card):
    assert card.count("# stories\n") == 1
    assert has_row(card, "placement", "`lns`")
    assert has_row(card, "norm", "`rmsnorm`", "Divide by the root mean square of the features.")
    assert has_row(card, "qk_norm", "`per_head`")
    for row in (
        ("steps", "1,200"),
        ("tokens", "614,400"),
        ("sequences a step", "16"),
        ("optimizer", "adamw"),
        ("learning rate", "0.003"),
        ("seed", "7"),
        ("stories", "100 %", "307,200", "2.00", f"`{'f' * 64}`"),
        ("validation loss, nats a token", "3.2500"),
        ("bits a byte", "1.1250"),
    ):
        assert has_row(card, *row), row
    assert has_row(card, "cats, acc", "0.5000 ± 0.1250", "chance 0.2500")
    assert "arXiv:2502.05795" in card
    assert "parity passed: lns\n  float32: 1.3e-06" in card
    assert "- untied the head (8,224 parameters more)" in card


def test_a_bare_folder_has_a_scheme_and_no_more(tmp_path):
    card = model_card(load(str(save(tmp_path / "model", "mix_ln"))), FOLDED)
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == ["Use", "Scheme", "Export", "Papers"]
    assert "None" not in card
    assert "tokenizer" not in model_card(
        load(str(save(tmp_path / "bare", "mix_ln", tokenizer=False))), FOLDED
    )


def test_a_wiring_made_by_hand_has_no_name(tmp_path):
    model = tiny("mix_ln")
    model.config.norm = model.config.placement = None
    model.config.qk_norm = "none"
    model.save_pretrained(tmp_path / "model")
    card = model_card(load(str(tmp_path / "model")), FOLDED)
    assert ModelCard(card).data.tags == ["llmnorm"]
    assert "Zhang and Sennrich" in card
    assert not has_row(card, "placement", "`None`")


def test_the_code_in_the_card_runs(card, tmp_path, capsys):
    folder = save(tmp_path / "model", "lns")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("me/stories", str(folder)), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert byte_tokenizer().decode([0]) not in code
