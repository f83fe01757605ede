"""New operations start where they are nearest to the norms that they replace."""

import pytest
import torch
from schemes import tokens
from wiring import model_of

from llmnorm import build_config
from llmnorm.errors import ConfigError
from llmnorm.export.conversion.fit import fit_site, fit_sites
from llmnorm.export.conversion.rewire import changed_sites, rewired, with_weights_of
from llmnorm.modeling.norms import Derf, DyT, LayerNorm, RMSNorm, TaperNorm

DIM, TOKENS = 16, 400


def features(spread: float = 0.0) -> torch.Tensor:
    """Tokens (tokens, dim) of RMS near 3, or of sizes that differ by factors of e^spread."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)
    size = torch.randn(TOKENS, 1, generator=generator, dtype=torch.float64).mul(spread).exp()
    return x * size


@pytest.mark.parametrize(("op", "bias"), [(DyT, False), (DyT, True), (Derf, True)])
def test_a_function_of_the_family_is_found_again(op: type, bias: bool) -> None:
    """The target is itself such a function, under another constant scale."""
    truth, found = (op(DIM, bias=bias, scale=scale).double() for scale in (1.0, 0.5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        truth.alpha.fill_(0.37)
        truth.weight.copy_(torch.randn(DIM, generator=generator))
        if bias:
            truth.bias.copy_(torch.randn(DIM, generator=generator))
    x = features()
    fitted = fit_site("here", truth, found, x, truth(x))
    assert fitted.error < 2e-3
    assert found.alpha.item() == pytest.approx(0.37, rel=0.02)
    torch.testing.assert_close(0.5 * found.weight, truth.weight, rtol=0.02, atol=1e-3)


def test_gain_is_the_least_squares_of_each_feature_and_alpha_the_best_of_all() -> None:
    norm, found = RMSNorm(DIM).double(), DyT(DIM).double()
    x = features(spread=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, DIM))
        y = norm(x)
    fitted = fit_site("here", norm, found, x, y)
    f = torch.tanh(found.alpha.detach() * x)
    best = torch.stack([torch.linalg.lstsq(f[:, [i]], y[:, i]).solution[0] for i in range(DIM)])
    torch.testing.assert_close(found.weight.detach(), best, rtol=1e-5, atol=1e-6)
    left = (f * found.weight.detach() - y).norm() / y.norm()
    assert fitted.error == pytest.approx(left.item(), rel=1e-6)
    for factor in (0.7, 0.9, 1.1, 1.4):
        other = torch.tanh(factor * found.alpha.detach() * x)
        weight = (other * y).sum(0) / other.square().sum(0)
        assert (other * weight - y).norm() / y.norm() > left


def test_what_begins_as_a_norm_computes_the_same() -> None:
    norm, taper = RMSNorm(DIM, scale=0.5).double(), TaperNorm(DIM, scale=2.0).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, DIM))
    x = features(spread=1.0)
    assert fit_site("here", norm, taper, x, norm(x)).error < 1e-12
    biased = LayerNorm(DIM).double()
    with torch.no_grad():
        biased.bias.fill_(1)
    with pytest.raises(ConfigError, match="here has a bias, which TaperNorm has not"):
        fit_site("here", biased, taper, x, biased(x))


@pytest.mark.parametrize("placement", ["pre_ln", "peri_ln", "lns", "post_ln", "normformer"])
def test_every_site_of_a_placement_is_fitted_and_all_else_is_kept(placement: str) -> None:
    model = model_of(placement, norm="rmsnorm").eval()
    config = rewired(model.config, {"op": "dyt"})
    sites = changed_sites(model.config, config)
    converted = with_weights_of(model, config).double()
    fitted = fit_sites(model, converted, sites, tokens())
    assert sorted(site.site for site in fitted) == sorted(sites)
    assert all(0 < site.error < 1 for site in fitted)
    assert config.embedding_spec() == model.config.embedding_spec()
    kept = {n for n, _ in model.named_parameters()} & {n for n, _ in converted.named_parameters()}
    kept = {n for n in kept if n.rpartition(".")[0] not in sites}
    for name in kept:
        assert torch.equal(converted.get_parameter(name), model.get_parameter(name)), name


def test_sites_are_fitted_to_what_the_converted_sites_before_them_make() -> None:
    model = model_of("pre_ln", norm="rmsnorm").eval()
    config = rewired(model.config, {"op": "derf"})
    converted = with_weights_of(model, config).double()
    fit_sites(model, converted, sites := changed_sites(model.config, config), tokens())
    seen: dict[str, torch.Tensor] = {}
    site = sites[-1]
    converted.get_submodule(site).register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0], y=output)
    )
    norm, again = model.get_submodule(site), Derf(model.config.hidden_size).double()
    with torch.no_grad():
        converted(tokens())
        fit_site(site, norm, again, seen["x"], norm(seen["x"]))
        torch.testing.assert_close(again(seen["x"]), seen["y"])


def test_wiring_by_hand_keeps_its_slots_and_qk_norm_stays() -> None:
    config = build_config(
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2},
        placement="lns",
        qk_norm="per_head",
    )
    by_rule = rewired(config, {"op": "dyt"})
    config.norm = config.placement = None
    config.qk_norm = "none"
    config.wiring = config.seal()
    by_hand = rewired(config, {"op": "dyt"})
    assert by_hand.residuals == by_rule.residuals
    assert by_hand.final_norm == by_rule.final_norm
    assert by_hand.residuals[1]["attn"]["q"]["op"] == "rmsnorm"
    assert by_hand.residuals[1]["mlp"]["pre"]["scale"] == pytest.approx(2**-0.5)


def test_a_model_without_such_norms_is_refused() -> None:
    model = model_of("pre_ln", norm="dyt")
    with pytest.raises(ConfigError, match="nothing to convert"):
        changed_sites(model.config, rewired(model.config, {"op": "dyt"}))
    with pytest.raises(ConfigError, match="holds dyt; expected one of rmsnorm, layernorm"):
        changed_sites(model.config, rewired(model.config, {"op": "derf"}))
