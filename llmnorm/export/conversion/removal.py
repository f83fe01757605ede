"""Norms that are removed while the model trains on: how it begins, and what is left at the end."""

from llmnorm.errors import ConfigError
from llmnorm.export.conversion.rewire import kind_of, with_slots
from llmnorm.export.conversion.schedule import removal_steps
from llmnorm.export.form import Form, Held, Sublayer
from llmnorm.export.removed import OP, has_bias, obstacle
from llmnorm.export.simplify import simplify
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.residual import NormSpec


def with_removals(config: LlmNormConfig, steps: int, penalty: float) -> LlmNormConfig:
    """Return a config in which each norm is one that is removed, at a step of its own.

    Args:
        config: of a model with layernorms or rmsnorms.
        steps: of the training that follows.
        penalty: of the final norm (`FixedStd`).

    Raises:
        ConfigError: if there are too few steps, or no norms.
    """
    sites: list[str] = []

    def collect(site: str, held: NormSpec) -> NormSpec:
        sites.append(site)
        return held

    with_slots(config, collect)
    at, uniform = removal_steps(sites, steps)

    def instead(site: str, held: NormSpec) -> NormSpec:
        options = {**NormSpec(op=held.op, options=held.options).at("final", 1).options}
        if options.get("eps_placement") == "outside":
            raise ConfigError(f"{site} adds eps outside its root, which {OP} does not")
        centre = held.op == "layernorm"
        affine = options["elementwise_affine"]
        return NormSpec(
            op=OP,
            options={
                "eps": options["eps"],
                "centre": centre,
                "bias": bool(affine and options["bias"]),
                "remove_step": at[site],
                "uniform_step": uniform,
                "penalty": penalty if kind_of(site) == "final" else 0.0,
            },
        ).at("final", config.hidden_size)

    return with_slots(config, instead)


def fold_removed(form: Form) -> Form:
    """The same function without the norms that were removed or have faded.

    Raises:
        ConfigError: if a norm is still there, or stands where no linear layer reads it alone.
    """
    for sub in form.sublayers():
        for slot, spec in sub.spec.slots().items():
            if spec.op == OP:
                _check_removed(f"the norm in slot {slot} of {sub.name}", sub.get(slot))
    if form.final is not None and form.final.op == OP:
        final = form.get_final()
        _check_removed("the final norm", final)
        assert final is not None
        if has_bias(final):
            raise ConfigError("the final norm has a bias, which no head can take")
    form = simplify(form)
    left = [f"{sub.name} has {spec.op}" for sub in form.sublayers() for spec in _norms(sub)]
    left += [] if form.final is None else [f"before the head stands {form.final.op}"]
    if left:
        raise ConfigError(f"not all norms are removed: {left[0]}, and {len(left) - 1} more")
    return form


def _check_removed(name: str, held: Held | None) -> None:
    """Raise ConfigError unless a FixedStd divides every position by one number."""
    assert held is not None
    if (why := obstacle(held)) is not None:
        raise ConfigError(f"{name} {why}: train on, for as many steps as it was converted for")


def _norms(sub: Sublayer) -> list[NormSpec]:
    """What of a sublayer's joint is neither a gain nor a constant."""
    plain = ("gain", "constant", "none")
    joint = {"entry", "pre", "post", "skip", "out", "inner"}
    return [s for slot, s in sub.spec.slots().items() if slot in joint and s.op not in plain]
