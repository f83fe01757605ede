"""L4-L8: hostile text and configs, bombs, log injection, secrets."""

import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.area_l import Victim, finished_run, victim
from reliability.console import Said, check_refusal, llmnorm
from reliability.harness import Trial, bar
from reliability.hostile import check_ended, singing, walls
from reliability.runs import corpus, words

_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "alias bomb": _ALIASES,
    "alias to itself": "a: &a [*a]\n",
    "merge key": "base: &b {x: 1}\nmodel: {<<: *b}\n",
    "5,000 lists": "[" * 5000,
    "5,000 maps": "{a: " * 5000,
    "5,000 items": "- " * 5000 + "x",
    "5,000 indents": "".join(f"{' ' * i}a:\n" for i in range(300)),
    "a key twice": "model: {preset: debug}\nmodel: {preset: 9m}\n",
    "python apply": "!!python/object/apply:os.system ['echo']\n",
    "python new": "!!python/object/new:os.system ['echo']\n",
    "python name": "model: !!python/name:os.system\n",
    "python module": "model: !!python/module:subprocess\n",
    "python object": "model: !!python/object:types.SimpleNamespace {}\n",
    "python tuple": "model: !!python/tuple [1]\n",
    "own tag": "model: !include /etc/passwd\n",
    "binary": "model: !!binary aGk=\n",
    "timestamp": "model: !!timestamp 2026-01-01\n",
    "two documents": "model: {}\n---\nmodel: {}\n",
    "1 MB": "# " + "x" * 2**20,
    "1 MB key": "x" * 2**20 + ": 1\n",
    "NUL": "model: a\0b\n",
    "escape": 'model: {preset: "\\x1b]0;owned\\x07"}\n',
    "UTF-16": "model: {}\n".encode("utf-16"),
    "UTF-7": "+AG0-odel: {}\n",
    "not UTF-8": b"model: \xff\xfe\n",
    "directive": "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !name:os.system\n",
    "number of 10,000 digits": "data: {seq_len: " + "9" * 10_000 + "}\n",
    "infinity": "optimizer: {lr: .inf}\n",
}
JSON = {
    "deep lists": "[" * 100_000,
    "deep maps": '{"a":' * 100_000,
    "NaN": '{"step": NaN, "tokens": Infinity}',
    "a number": "1e999",
    "a list": "[1, 2]",
    "null": "null",
    "number of 10,000 digits": '{"step": ' + "9" * 10_000 + "}",
    "half a surrogate": '{"a": "\\ud800"}',
    "not UTF-8": b'{"a": "\xff"}',
    "100 MB": '{"a": "' + "x" * 100 * 2**20 + '"}',
    "empty": "",
}
_JSON_FILES = (
    ("eval", "victim/final/config.json"),
    ("eval", "victim/final/tokenizer.json"),
    ("eval", "victim/final/tokenizer_config.json"),
    ("init", "victim/final/config.json"),
    ("preset", "victim/final/config.json"),
    ("compare", "victim/environment.json"),
    ("compare", "victim/metrics.jsonl"),
    ("data", "data/manifest.json"),
    ("continue", "victim/environment.json"),
    ("resume", "victim/checkpoints/step_00000002/state.json"),
    ("resume", "victim/checkpoints/step_00000002/manifest.json"),
)
_CASES_L4: list[tuple[str | bytes, str, str]] = [
    *((text, "validate", "run.yaml") for text in YAML.values()),
    *((text, reader, "victim/config.yaml") for text in YAML.values()
      for reader in ("eval", "compare", "continue")),
    *((text, reader, name) for text in JSON.values() for reader, name in _JSON_FILES),
]  # fmt: skip


def _read(trial: Trial, own: Victim, reader: str) -> Said:
    """Let a command read the victim."""
    new: dict[str, Any] = {"training__max_steps": 4, "checkpoint__interval_steps": 2}
    if reader == "validate":
        return llmnorm(trial.folder, "validate", trial.folder / "run.yaml")
    if reader == "compare":
        return llmnorm(trial.folder, "compare", own.run)
    if reader == "eval":
        options = ("--data", corpus(), "--max-documents", 2, "--seq-len", 32)
        return llmnorm(trial.folder, "eval", "perplexity", "--model", own.run, *options)
    if reader == "continue":
        shutil.rmtree(own.model)
        shutil.move(own.run, trial.folder / "new")
    changes = {
        "init": {"training__init_from": str(own.model)},
        "preset": {"model__preset": str(own.model), "model__overrides": {}},
        "data": {"data__path": str(own.data)},
        "resume": {"checkpoint__resume": str(own.run / "checkpoints" / "step_00000002")},
        "continue": {},
    }
    return llmnorm(trial.folder, "train", *words(trial.folder / "new", **new, **changes[reader]))


@bar("L4", "YAML and JSON bombs, tags and nonsense wherever text is read: refused in plain lines",
     total=len(_CASES_L4), ci=50, prepare=finished_run)  # fmt: skip
def text_bombs(trial: Trial) -> None:
    text, reader, name = _CASES_L4[trial.index]
    own = victim(trial)
    (trial.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with walls(trial.folder / "canary"):
        said = _read(trial, own, reader)
    harmless = reader in ("compare", "init") or name.endswith("tokenizer_config.json")
    check_ended(said, may_pass=harmless)
    assert said.seconds < 10


def _json_file(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def _auto_map(own: Victim, source: str, **extra: Any) -> None:
    """The model's own code replaced by code that sings."""
    for name in ("configuration_llmnorm.py", "modeling_llmnorm.py", "evil.py", "tokenizer.py"):
        (own.model / name).write_text(source)
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    _json_file(own.model / "config.json", auto_map=classes, **extra)


def _tokenizer_code(own: Victim, source: str) -> None:
    (own.model / "evil.py").write_text(source)
    auto_map = {"AutoTokenizer": ["evil.T", "evil.T"]}
    changes = {"auto_map": auto_map, "tokenizer_class": "EvilTokenizer"}
    _json_file(own.model / "tokenizer_config.json", **changes)


def _config(**changes: Any) -> Callable[[Victim, str], None]:
    return lambda own, source: _json_file(own.model / "config.json", **changes)


def _file(name: str) -> Callable[[Victim, str], None]:
    return lambda own, source: (own.model / name).write_text(source) and None


CODE: dict[str, Callable[[Victim, str], None]] = {
    "auto_map": _auto_map,
    "auto_map of a foreign type": lambda own, source: _auto_map(own, source, model_type="evil"),
    "auto_map to the hub": _config(auto_map={"AutoConfig": "evil/repo--evil.C"}, model_type="x"),
    "trust_remote_code": lambda own, source: _auto_map(own, source, trust_remote_code=True),
    "tokenizer code": _tokenizer_code,
    "attention kernel": _config(_attn_implementation_internal="evil/kernel"),
    "attention kernel, public": _config(attn_implementation="evil/kernel@main:run"),
    "attention kernel, nested": _config(text_config={"_attn_implementation": "evil/kernel"}),
    "expert kernel": _config(_experts_implementation_internal="evil/kernel"),
    "custom pipeline": _config(custom_pipelines={"text": {"impl": "evil.P", "pt": ["M"]}}),
    "custom generate": _file("custom_generate/generate.py".replace("/", "_")),
    "model file": _config(model_file="evil.py", transformers_weights="../evil.safetensors"),
    "weights elsewhere": _config(transformers_weights="/etc/passwd"),
    "adapter": lambda own, source: _json_file(
        own.model / "adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"
    ),
    "sitecustomize": _file("sitecustomize.py"),
    "conftest": _file("conftest.py"),
    "torch.py": _file("torch.py"),
    "chat template": lambda own, source: _json_file(
        own.model / "tokenizer_config.json",
        chat_template="{% for a in range(10**9) %}{{ ''.__class__.__mro__ }}{% endfor %}",
    ),
    "10**9 layers": _config(num_hidden_layers=10**9),
    "llama of 10**9 layers": _config(model_type="llama", num_hidden_layers=10**9),
    "quantizer": _config(quantization_config={"quant_method": "evil", "load_in_8bit": True}),
}
_CASES_L5 = [(trick, reader) for trick in CODE for reader in ("eval", "init", "preset", "cwd")]


@bar("L5", "a model's folder that names or carries code: none is run, none is fetched",
     total=len(_CASES_L5), ci=21, prepare=finished_run)  # fmt: skip
def carried_code(trial: Trial) -> None:
    trick, reader = _CASES_L5[trial.index]
    own, canary = victim(trial), trial.folder / "canary"
    CODE[trick](own, singing(canary))
    if reader == "cwd":
        os.chdir(own.model)
        reader = "eval"
    with walls(canary):
        check_ended(_read(trial, own, reader), may_pass=True)


@bar("L5b", "trust in code cannot be set from a run file, the environment or a checkpoint",
     total=6, ci=6, prepare=finished_run)  # fmt: skip
def no_trust(trial: Trial) -> None:
    own, canary = victim(trial), trial.folder / "canary"
    _auto_map(own, singing(canary), model_type="evil", trust_remote_code=True)
    os.environ.update(HF_HUB_TRUST_REMOTE_CODE="1", TRUST_REMOTE_CODE="true")
    key = ("model.trust_remote_code", "training.trust_remote_code", "model.overrides.auto_map")
    with walls(canary):
        if trial.index < 3:
            run = [*words(trial.folder / "new"), f"--{key[trial.index]}=true"]
            check_refusal(llmnorm(trial.folder, "train", *run), (2,))
        else:
            reader = ("eval", "init", "preset")[trial.index - 3]
            check_ended(_read(trial, own, reader), may_pass=reader == "init")  # weights alone


_ZEROS = bytes(2**20)


def _repeated(compress: Callable[[bytes], bytes], times: int) -> bytes:
    return compress(_ZEROS.replace(b"\0", b"a")) * times


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data, 19)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def _npy_that_claims(path: Path) -> None:
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,), }"
    text = header + b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))


def _megatron_that_claims(path: Path) -> None:
    path.write_bytes(bytes(64))
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    path.with_suffix(".idx").write_bytes(head + (2**60).to_bytes(8, "little") * 2)


_BOMBS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "gzip": ("text", "a.txt.gz", lambda p: p.write_bytes(_repeated(gzip.compress, 8000))),
    "xz": ("text", "a.txt.xz", lambda p: p.write_bytes(_repeated(lzma.compress, 8000))),
    "zstd": ("text", "a.txt.zst", lambda p: p.write_bytes(_repeated(_zstd, 50_000))),
    "zstd, one frame": ("text", "a.txt.zst", lambda p: p.write_bytes(_zstd(_ZEROS * 512))),
    "jsonl in gzip": ("jsonl", "a.jsonl.gz", lambda p: p.write_bytes(
        gzip.compress(b'{"text": "') + _repeated(gzip.compress, 8000))),
    "sparse text": ("text", "a.txt", _sparse),
    "sparse jsonl": ("jsonl", "a.jsonl", _sparse),
    "sparse tokens": ("nanogpt", "a.bin", _sparse),
    "npy larger than its file": ("olmo", "a.npy", _npy_that_claims),
    "index larger than its file": ("megatron", "a.bin", _megatron_that_claims),
    "deep jsonl": ("jsonl", "a.jsonl", lambda p: p.write_text('{"text": ' + "[" * 10**6)),
    "a zip called text": ("text", "a.txt", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99))),
}  # fmt: skip


@bar("L6", "files that grow when they are unpacked, or claim more than they hold: refused",
     total=len(_BOMBS), ci=len(_BOMBS))  # fmt: skip
def grown(trial: Trial) -> None:
    kind, name, make = list(_BOMBS.values())[trial.index]
    texts = trial.folder / "texts"
    texts.mkdir()
    make(texts / name)
    given: list[object] = ["--source", kind, "--path", texts, "--out", trial.folder / "out"]
    given += ["--tokenizer", corpus()]
    with walls(trial.folder / "canary"):
        said = llmnorm(trial.folder, "data", "prepare", *given)
    check_refusal(said, (2, 4))
    assert said.seconds < 5, f"refused after {said.seconds:.1f} s"


INJECTIONS = (
    "a\nERROR: all is lost", "a\rstep 9/9", "a\x1b[2J\x1b[31mred", "\u202egnp.evil", "a\x85b",
    "a\u2028b\u2029c", "%s %d %n {0} {x}", "[bold red]x[/bold red] [link=file:///]y[/link]",
    "\x00", "\x07\x08\x7f", "\ufeff\u200b\u200d", "x" * 2**20, "'\"`$(touch canary)`", "a\tb",
    "</script><script>alert(1)</script>", "{{ 7 * 7 }}", "\udcff", "\U0001f469\u200d\U0001f680",
    '{"step": 1}', "\x9b31m",
)  # fmt: skip


def _folder_name(text: str) -> str:
    return text.replace("/", "_").replace("\0", "")[:60]


def _say_by_run_name(trial: Trial, text: str) -> Said:
    name = trial.folder / f"run {_folder_name(text)}"
    run = words(name, training__max_steps=2, eval__interval_steps=0, checkpoint__interval_steps=1)
    return llmnorm(trial.folder, "train", *run)


def _say_by_key(trial: Trial, text: str) -> Said:
    return llmnorm(trial.folder, "train", *words(trial.folder / "run"), f"--model.{text}={text}")


def _say_by_document(trial: Trial, text: str) -> Said:
    folder = trial.folder / "texts"
    folder.mkdir()
    row = json.dumps({text: 1, "text": [text]})
    (folder / "a.jsonl").write_text(row, encoding="utf-8")
    given = ("--source", "jsonl", "--path", folder, "--out", trial.folder / "out")
    return llmnorm(trial.folder, "data", "prepare", *given)


def _say_by_model(trial: Trial, text: str) -> Said:
    folder = trial.folder / f"model {_folder_name(text)}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": text, text: text}))
    options = ("--data", corpus(), "--max-documents", 1)
    return llmnorm(trial.folder, "eval", "perplexity", "--model", folder, *options)


_SPEAKERS = (_say_by_run_name, _say_by_key, _say_by_document, _say_by_model)


@bar("L7", "control characters, markup and megabytes in names and texts: one record is one line",
     total=len(_SPEAKERS) * len(INJECTIONS), ci=20)  # fmt: skip
def injected(trial: Trial) -> None:
    which, index = divmod(trial.index, len(INJECTIONS))
    text = INJECTIONS[index]
    with walls(trial.folder / "canary"):
        said = _SPEAKERS[which](trial, text)
    for line in said.lines:
        assert line.isprintable(), f"control characters: {line!r:.300}"
        assert len(line) <= 2000, f"{len(line)} characters"
    assert not any(line.startswith("ERROR: all is lost") for line in said.lines)
    if said.code:
        check_refusal(said)
    for path in trial.folder.rglob("*.json*"):
        if path.parent.name.startswith("run "):
            for line in path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else ():
                json.loads(line)
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))


_SECRET = "s3cr3t-" + "0123456789abcdef" * 2
_SITUATIONS = ("finished", "refused", "damaged data", "crashed", "validated", "scored")


@bar("L8", "secrets of the environment: in no log, record, manifest or trace",
     total=len(_SITUATIONS), ci=len(_SITUATIONS), prepare=finished_run)  # fmt: skip
def secrets(trial: Trial) -> None:
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "GITHUB_TOKEN")
    os.environ.update(dict.fromkeys(names, _SECRET))
    situation, own = _SITUATIONS[trial.index], victim(trial)
    run = words(trial.folder / "new", training__max_steps=2)
    if situation == "damaged data":
        next(own.data.glob("train/tokens-*")).write_bytes(b"")
        run = words(trial.folder / "new", data__path=str(own.data))
    elif situation == "refused":
        run = words(trial.folder / "new", optimizer__lr=-1)
    elif situation == "crashed":
        run = words(trial.folder / "new", optimizer__name="reliability.hostile:Crashing")
    if situation == "scored":
        said = _read(trial, own, "eval")
    else:
        verb = "validate" if situation == "validated" else "train"
        said = llmnorm(trial.folder, verb, *run, "--debug")
    assert (said.code == 0) == (situation in ("finished", "validated", "scored")), said.err[-800:]
    for path in [*trial.folder.rglob("*")]:
        if path.is_file():
            assert _SECRET.encode() not in path.read_bytes(), f"{path} holds the secret"
