"""`llmnorm export`: a complete folder that others load, or one line and nothing at all."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from saved import END, byte_tokenizer, save, save_run, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    pipeline,
)

from llmnorm.cli import run_command
from llmnorm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    LlmNormError,
    ParityError,
)
from llmnorm.export import command, pushing, writing

REAL_HUB = huggingface_hub.HfApi
GOOD = {"passed": True, "summary": ["parity passed"], "failures": []}


def export(*words: object) -> int:
    return run_command(command, "llmnorm export", [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "stories", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """What the command makes of the run, proven in a process of its own."""
    out = run.parent / "deep" / "stories-hf"
    export(run, "--out", out, "--dtype", "bf16", "--shard-size", "40KB")
    return out


@pytest.fixture
def unproven(monkeypatch) -> dict:
    """Exports without the other process; what it was asked to compare."""
    asked: dict = {}

    def certify(folder, source, fit, dtype, text, **options):
        asked.update(folder=folder, source=source, fit=fit, dtype=dtype, text=text, **options)
        (folder / "parity.json").write_text(json.dumps(asked.get("answer", GOOD)))
        return asked.get("answer", GOOD)

    monkeypatch.setattr(command, "certify", certify)
    return asked


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_as_a_whole_folder_of_a_stock_class(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config
    assert not list(exported.glob("*.py"))
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert shards == {path.name for path in exported.glob("*.safetensors")}
    assert all((exported / shard).stat().st_size < 41_000 for shard in shards)
    assert json.loads((exported / "parity.json").read_text())["passed"] is True
    assert left_in(exported.parent) == {exported.name}  # nothing hidden stays


def test_the_folder_loads_generates_and_chats_as_any_other(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.eos_token == END
    chat = [{"role": "user", "content": "hello"}]
    said = pipeline("text-generation", str(exported))(chat, max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"][0] == chat[0]


def test_what_was_done_is_told(run, unproven, tmp_path, capsys):
    export(run, "--out", tmp_path / "out", "--dtype", "bf16")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LlamaForCausalLM: the first class that holds this model")
    assert lines[-2] == "parity passed"
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert lines[-1] == (
        f"written to {tmp_path / 'out'}: model.safetensors, {size:,} bytes, bfloat16"
    )


def test_an_untied_head_is_told_with_its_size(unproven, tmp_path, capsys):
    model = save(tmp_path / "model", "peri_ln", tie_word_embeddings=True, qk_norm="none")
    export(model, "--out", tmp_path / "out")
    assert f"untied the head ({257 * 32:,} parameters more)" in capsys.readouterr().out


def test_the_asked_class_is_written_and_the_saved_precision_kept(unproven, tmp_path):
    tiny("pre_ln", qk_norm="per_head").bfloat16().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "--target", "qwen3", "--out", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is Qwen3ForCausalLM
    assert model.dtype == torch.bfloat16
    assert unproven["text_source"].startswith("random ids")


def test_the_source_and_its_text_reach_the_certificate(run, unproven, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("Once upon a time there was a cat. " * 9)
    export(run, "--out", tmp_path / "out", "--text", text)
    assert unproven["source"].dtype == torch.float64
    assert unproven["trust_remote_code"] is False
    told = byte_tokenizer().decode(unproven["text"][0])
    assert text.read_text().startswith(told)
    before = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float64).state_dict()
    for name, tensor in unproven["source"].state_dict().items():  # folds leave it as it was
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--target", "lama"], ConfigError, "did you mean llama?"),
        (["--dtype", "int3"], ConfigError, "invalid choice: 'int3'"),
        (["--shard-size", "big"], ConfigError, "expected such as 5GB or 500MB"),
        (["--shard-size", "0GB"], ConfigError, "expected such as 5GB or 500MB"),
        (["--target", "llama", "--fold-pointwise"], ConfigError, "is for --target custom"),
        (["--private"], ConfigError, "--private is for --push USER/NAME"),
        (["--push", "a/b/c"], ConfigError, "--push a/b/c: expected USER/NAME"),
        (["--text", "no.txt"], DataError, "no.txt"),
        (["--target", "olmo2"], ConfigError, "Olmo2ForCausalLM"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line(words, error, said, run, unproven, tmp_path):
    with pytest.raises(error, match=said.replace("?", r"\?")) as caught:
        export(run, "--out", tmp_path / "out", *words)
    assert len(str(caught.value).splitlines()) <= 1 + (error is ConfigError and "--target" in words)
    assert left_in(tmp_path) == set()


def test_a_folder_that_exists_is_refused_before_anything_is_read(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match="out exists already"):
        export(run, "--out", tmp_path / "out")
    assert left_in(tmp_path / "out") == {"mine.txt"}


def test_an_unfinished_run_and_a_stock_model_are_refused(run, tmp_path):
    (tmp_path / "half").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "half")
    with pytest.raises(CheckpointError, match="is an unfinished run"):
        export(tmp_path / "half", "--out", tmp_path / "out")
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "ll")
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM, not an llmnorm model"):
        export(tmp_path / "ll", "--out", tmp_path / "out")
    assert left_in(tmp_path) == {"half", "ll"}


def test_a_value_beyond_float16_is_refused_by_name(unproven, tmp_path):
    model = tiny("lns")
    with torch.no_grad():
        model.model.layers[1].mlp_residual.pre.weight[3] = 1e5
    model.save_pretrained(tmp_path / "model")
    name = r"model.layers.1.post_attention_layernorm.weight reaches 7.071e\+04"
    with pytest.raises(ConfigError, match=f"{name}, beyond the 65504 of float16; use --dtype bf16"):
        export(tmp_path / "model", "--out", tmp_path / "out", "--dtype", "fp16")
    assert left_in(tmp_path) == {"model"}
    export(tmp_path / "model", "--out", tmp_path / "out", "--dtype", "bf16")


def test_values_that_are_no_numbers_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, value])}
        with pytest.raises(CheckpointError, match="bad has values that are not finite"):
            writing.write_weights(tmp_path, tensors, torch.float32, "5GB")
    assert left_in(tmp_path) == set()


def test_a_full_disk_is_one_line_and_leaves_nothing(run, unproven, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(EnvironmentProblem, match="bytes are needed and 1,000 are free"):
            export(run, "--out", tmp_path / "out")
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(writing, "save_file", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
        export(run, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == set()


def test_a_stop_halfway_leaves_no_folder(run, unproven, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        assert "config.json" in left_in(tmp_path / ".out.writing")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run, "--out", tmp_path / "out")
    assert left_in(tmp_path) == set()


def test_a_folder_that_computes_something_else_is_kept_aside(run, unproven, tmp_path):
    unproven["answer"] = {"passed": False, "summary": ["parity failed: layer 1"], "failures": ["x"]}
    for _ in range(2):
        with pytest.raises(ParityError, match=r"parity failed: layer 1; .*out\.failed") as caught:
            export(run, "--out", tmp_path / "out")
    assert caught.value.exit_code == 1
    assert left_in(tmp_path) == {"out.failed"}
    kept = left_in(tmp_path / "out.failed")
    assert {"parity.json", "model.safetensors", "config.json", "README.md"} <= kept


class Hub:
    """Stands for HfApi, with its signatures."""

    endpoint = "https://hub.example"
    seen: ClassVar[list] = []
    refuses: ClassVar[Exception | None] = None

    def __init__(self, **_options):
        self.seen.clear()

    def __getattr__(self, name):
        signature = inspect.signature(getattr(REAL_HUB, name))

        def call(*args, **options):
            bound = signature.bind(self, *args, **options)
            if self.refuses is not None:
                raise self.refuses
            self.seen.append((name, bound.arguments))

        return call


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: False)
    monkeypatch.setattr(Hub, "refuses", None)
    return Hub


def test_push_uploads_what_was_proven(run, unproven, hub, tmp_path, capsys):
    export(run, "--out", tmp_path / "out", "--push", "me/stories", "--private")
    (made, repository), (sent, upload) = hub.seen
    assert (made, sent) == ("create_repo", "upload_folder")
    assert (repository["repo_id"], repository["private"]) == ("me/stories", True)
    assert (upload["repo_id"], upload["folder_path"]) == ("me/stories", tmp_path / "out")
    assert capsys.readouterr().out.endswith("uploaded to https://hub.example/me/stories\n")
    assert 'from_pretrained("me/stories")' in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_uploaded_that_is_not_proven(run, unproven, hub, tmp_path):
    unproven["answer"] = {"passed": False, "summary": ["parity failed"], "failures": ["x"]}
    hub.seen.clear()
    with pytest.raises(ParityError):
        export(run, "--out", tmp_path / "out", "--push", "me/stories")
    assert hub.seen == []


@pytest.mark.parametrize(
    "refusal",
    [ConnectionError("no route\nto the hub"), ValueError("403 Forbidden"), OSError()],
    ids=lambda error: type(error).__name__,
)
def test_a_refused_upload_is_one_line_and_the_folder_stays(
    refusal, run, unproven, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(Hub, "refuses", refusal)
    with pytest.raises(EnvironmentProblem, match="--push me/stories: ") as caught:
        export(run, "--out", tmp_path / "out", "--push", "me/stories")
    assert "\n" not in str(caught.value)
    assert "hf upload me/stories" in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_push_that_cannot_succeed_is_refused_first(run, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(EnvironmentProblem, match="run `hf auth login` first"):
        export(run, "--out", tmp_path / "out", "--push", "me/stories")
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: True)
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE"):
        export(run, "--out", tmp_path / "out", "--push", "me/stories")
    assert left_in(tmp_path) == set()
    assert issubclass(EnvironmentProblem, LlmNormError)
