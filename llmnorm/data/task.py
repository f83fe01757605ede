"""An lm-eval task from the validation split: which of four texts goes on after this one?

One choice is the true continuation, three begin at random words of other validation documents.
All begin with a space and a word and end at a word's end, so only the content tells them apart;
chance is 0.25. The items are a function of the prepared data alone.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TypedDict

from ..durable import write_durably
from ..errors import DataError
from .prepared import Prepared
from .tokenizer import Encoder
from .workspace import remove

CONTEXT_CHARACTERS = 240
SHORTEST_CONTEXT = 40
CONTINUATION_CHARACTERS = 60
CHOICES = 4
_WORD_START = re.compile(r"(?<=\S) (?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?=\s|\Z)")

_YAML = """\
# The true continuation of a validation text among four; chance is 0.25.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
custom_dataset: !function {name}.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
num_fewshot: 0
metadata:
  version: 1.0
"""

_LOADER = '''\
"""Rows of the task beside this file, from any current directory."""

import json
from pathlib import Path

import datasets


def load(data_files, **_):
    """Read {split: file name} beside this file into {split: Dataset}."""
    folder = Path(__file__).resolve().parent
    splits = {}
    for split, name in data_files.items():
        with (folder / name).open(encoding="utf-8") as rows:
            splits[split] = datasets.Dataset.from_list([json.loads(row) for row in rows])
    return datasets.DatasetDict(splits)
'''


class Item(TypedDict):
    """A question: the text so far, four continuations, and which of them is true."""

    context: str
    choices: list[str]
    label: int


def task_name(prepared: Prepared) -> str:
    """`<corpus>_continuation`, in letters that lm-eval and Python accept."""
    corpus = re.sub(r"\W+", "_", prepared.manifest.corpus.lower(), flags=re.ASCII).strip("_")
    return f"{corpus or 'corpus'}_continuation"


def write_task(prepared: Prepared, items: int = 200) -> Path:
    """Write the task into `tasks/` of the prepared folder, replacing an earlier one.

    Returns:
        the folder to give lm-eval as include path.

    Raises:
        DataError: fewer than four validation documents are long enough.
    """
    name = task_name(prepared)
    rows = continuation_items(prepared, items)
    folder = prepared.path / "tasks"
    folder.mkdir(exist_ok=True)
    remove(folder / f"{name}.yaml")  # written last: the task appears when it is whole
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_durably(folder / f"{name}.jsonl", text)
    write_durably(folder / f"{name}.py", _LOADER)
    write_durably(folder / f"{name}.yaml", _YAML.format(name=name))
    return folder


def continuation_items(prepared: Prepared, items: int) -> list[Item]:
    """Up to ``items`` questions; fewer when the documents are too short for so many."""
    documents = _usable_documents(prepared)
    if len(documents) < CHOICES:
        raise DataError(
            f"{prepared.path}: {len(documents)} validation documents have "
            f"{SHORTEST_CONTEXT + CONTINUATION_CHARACTERS} characters of text, a task needs "
            f"{CHOICES}; prepare more text or raise --val-fraction"
        )
    rows: dict[tuple[int, int], Item] = {}
    for number in range(2 * items):  # some draws repeat a place and are left out
        first = number % len(documents)
        begin = documents[first][1][_draw(len(documents[first][1]), number, "place")]
        if (first, begin) not in rows and len(rows) < items:
            row = _row(documents, number, first, begin)
            if len(set(row["choices"])) == CHOICES:
                rows[first, begin] = row
    return list(rows.values())


def _usable_documents(prepared: Prepared) -> list[tuple[str, list[int]]]:
    """Texts with the places where a continuation may begin."""
    documents = [tokens for tokens, _ in prepared.split("val").documents_for_scoring()]
    result = []
    for text in Encoder(prepared.tokenizer()).decode(documents):
        last = len(text) - CONTINUATION_CHARACTERS
        starts = [m.start() for m in _WORD_START.finditer(text, SHORTEST_CONTEXT, max(last, 0))]
        if starts:
            result.append((text, starts))
    return result


def _row(documents: list[tuple[str, list[int]]], number: int, first: int, begin: int) -> Item:
    text = documents[first][0]
    choices = []
    others = [i for i in range(len(documents)) if i != first]
    for turn in range(CHOICES - 1):
        other, starts = documents[others.pop(_draw(len(others), number, f"document {turn}"))]
        choices.append(_continuation(other, starts[_draw(len(starts), number, f"start {turn}")]))
    label = _draw(CHOICES, number, "label")
    choices.insert(label, _continuation(text, begin))
    cut = max(begin - CONTEXT_CHARACTERS, 0)
    if cut and (word := _WORD_START.search(text, cut, begin)):
        cut = word.end()
    return {"context": text[cut:begin], "choices": choices, "label": label}


def _continuation(text: str, begin: int) -> str:
    end = _WORD_END.search(text, begin + CONTINUATION_CHARACTERS)
    return text[begin : end.start() if end else len(text)].rstrip()


def _draw(count: int, number: int, what: str) -> int:
    """A fixed choice below ``count`` for item ``number``."""
    digest = hashlib.blake2b(f"{what}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count
