"""Find a class that holds a model exactly, or say what stands in the way."""

from dataclasses import dataclass

from llmnorm.errors import ConfigError
from llmnorm.export.form import Form
from llmnorm.export.hosts import HOSTS, Host
from llmnorm.export.simplify import simplify


@dataclass(frozen=True)
class Fit:
    """A host and the form that it holds."""

    host: Host
    form: Form


def fit(form: Form, target: str) -> Fit | None:
    """Rewrite a form until the target holds it.

    Args:
        form: any form.
        target: name of a host, or `auto`: the first of `HOSTS` that holds it.

    Returns:
        None if the target is `auto` and no host holds the form.

    Raises:
        ConfigError: for an unknown target, or one that cannot hold the form: it names what stands
            in the way, and the targets that would do.
    """
    if target != "auto" and target not in HOSTS:
        raise ConfigError(f"--target {target}: expected auto, custom or one of {', '.join(HOSTS)}")
    simple = simplify(form)
    fits = {name: prepared(simple, host) for name, host in HOSTS.items()}
    obstacles = {name: HOSTS[name].obstacles(one) for name, one in fits.items()}
    holding = [name for name in HOSTS if not obstacles[name]]
    if target == "auto":
        return Fit(HOSTS[holding[0]], fits[holding[0]]) if holding else None
    if target in holding:
        return Fit(HOSTS[target], fits[target])
    raise ConfigError(_refusal(target, obstacles, holding))


def nearest(form: Form) -> tuple[Host, list[str]]:
    """The host that least stands in the way of, and what that is."""
    simple = simplify(form)
    obstacles = {name: host.obstacles(prepared(simple, host)) for name, host in HOSTS.items()}
    name = min(obstacles, key=lambda name: len(obstacles[name]))
    return HOSTS[name], obstacles[name]


def prepared(form: Form, host: Host) -> Form:
    """A copy of a simplified form, rewritten as the host wants it."""
    form = form.copy()
    host.prepare(form)
    return form


def _refusal(target: str, obstacles: dict[str, list[str]], holding: list[str]) -> str:
    what = "; ".join(obstacles[target])
    text = f"--target {target}: {HOSTS[target].architecture} cannot hold {what}."
    if holding:
        return f"{text} Holding this model: {', '.join(holding)}"
    near = min(obstacles, key=lambda name: len(obstacles[name]))
    beside = "" if near == target else f"; nearest is {near}, without {'; '.join(obstacles[near])}"
    return f"{text} No class holds it{beside}; use --target custom"
