"""Find a class that holds a model exactly, or say what stands in the way and what would fold."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmnorm.errors import ConfigError
from llmnorm.export.form import Form
from llmnorm.export.hosts import HOSTS, Host
from llmnorm.export.options import OPTIONS
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
            in the way, options with which it would, and the targets that hold it as it is.
    """
    if target != "auto" and target not in HOSTS:
        raise ConfigError(f"--target {target}: expected auto, custom or one of {', '.join(HOSTS)}")
    hosts = list(HOSTS.values()) if target == "auto" else [HOSTS[target]]
    for host, one in prepared(form, hosts):
        if not (obstacles := host.obstacles(one)):
            return Fit(host, one)
    if target == "auto":
        return None
    raise ConfigError(_refusal(form, host, obstacles))


def nearest(form: Form) -> tuple[Host, list[str]]:
    """The host in whose way the least stands, and what that is (see `Host.obstacles`).

    Of several, the first that an option of the scheme would let hold it.
    """
    pairs = prepared(form, HOSTS.values())
    obstacles = {host.name: host.obstacles(one) for host, one in pairs}
    fewest = min(map(len, obstacles.values()))
    near = [name for name, found in obstacles.items() if len(found) == fewest]
    name = next((name for name in near if options_to_hold(form, HOSTS[name])), near[0])
    return HOSTS[name], obstacles[name]


def holding(form: Form) -> list[str]:
    """Names of all hosts that hold a form, in the order of `HOSTS`."""
    pairs = prepared(form, HOSTS.values())
    return [host.name for host, one in pairs if not host.obstacles(one)]


def options_to_hold(form: Form, host: Host) -> list[str]:
    """Options of the scheme, such as `qk_norm: none`, each of which alone lets a host hold it."""
    simple, found = simplify(form, embedding=host.embedding == "raw"), []
    for words, change in OPTIONS.items():
        changed = simple.copy()
        change(changed)
        host.prepare(changed)
        if not host.obstacles(changed):
            found.append(words)
    return found


def prepared(form: Form, hosts: Iterable[Host]) -> Iterator[tuple[Host, Form]]:
    """Copies of a form, simplified and rewritten as each host wants it; one at a time."""
    simple: dict[bool, Form] = {}
    for host in hosts:
        baked = host.embedding == "raw"
        if baked not in simple:
            simple[baked] = simplify(form, embedding=baked)
        one = simple[baked].copy()
        host.prepare(one)
        yield host, one


def explain(form: Form) -> str:
    """Why no class holds a form, in one line: the nearest class, and what would fold."""
    host, obstacles = nearest(form)
    return f"No class holds this model; nearest is {_nearest(host, obstacles)}{_advice(form, host)}"


def _nearest(host: Host, obstacles: list[str]) -> str:
    return f"{host.architecture} ({host.name}), which {'; it '.join(obstacles)}."


def _refusal(form: Form, host: Host, obstacles: list[str]) -> str:
    why = f"{host.architecture} {'; it '.join(obstacles)}."
    text = f"--target {host.name}: {why}\n{_advice(form, host).lstrip()}"
    if others := holding(form):
        return f"{text} These hold the model as it is: {', '.join(others)}."
    near, in_the_way = nearest(form)
    beside = f"; nearest is {_nearest(near, in_the_way)}" if near != host else "."
    return f"{text} No class holds the model as it is{beside} Use --target custom."


def _advice(form: Form, host: Host) -> str:
    """What a host is made for, and the options with which it would hold a form."""
    options = options_to_hold(form, host)
    would = f", and would hold this model with {' or '.join(options)}" if options else ""
    return f" It is made for {host.holds}{would}."
