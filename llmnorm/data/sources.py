"""Where text comes from: every source is a sequence of documents in a fixed order.

Text is taken as it is, with three exceptions, all for text files: a byte order mark is dropped,
CRLF line ends become LF, and a NUL byte is refused, since it means a binary or UTF-16 file.
Strings from JSON, parquet and the hub are verbatim. Tokens made by other tools: `foreign.py`.
"""

import json
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import DataError, EnvironmentProblem
from .files import decoded, files_identity, lines, list_files
from .reading import Stamp, stamp_of

_STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")
)


class Document(NamedTuple):
    """Text, or token ids (length,) without end-of-text; and the split where it is given."""

    content: str | np.ndarray
    split: str | None = None


class Source(ABC):
    """A sequence of documents that is the same every time it is read.

    Attributes:
        kind: the name on the command line.
        corpus: a short name for reports and tasks.
        total_bytes: size of the input for the progress bar, or None when unknown.
        tokenized: documents are token ids already.
    """

    kind: str
    corpus: str
    total_bytes: int | None = None
    tokenized: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the documents depend on: sources of equal identity give equal documents."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents in order."""

    def documents_from(self, start: int) -> Iterator[Document]:
        """The documents after the first ``start``."""
        return islice(self.documents(), start, None)

    @property
    def position(self) -> int:
        """Bytes of the input read so far, comparable with `total_bytes`."""
        return 0


class FileSource(Source):
    """Documents from files on disk, one file after another."""

    patterns: tuple[str, ...]

    def __init__(self, path: Path, pattern: str | None = None) -> None:
        self.path = path
        self.files = list_files(path, (pattern,) if pattern else self.patterns)
        self.corpus = path.resolve().name.partition(".")[0]
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        self._finished_bytes = 0
        self._raw: BinaryIO | None = None
        self._stamps: dict[Path, Stamp] = {}  # when the files were first opened

    def identity(self) -> dict[str, Any]:
        for file in self.files:
            with _open(file) as raw:
                self._check_unchanged(file, raw)
        return {"kind": self.kind, **files_identity(self.files, self.path)}

    def documents(self) -> Iterator[Document]:
        self._finished_bytes = 0
        for file in self.files:
            with _open(file) as self._raw:
                self._check_unchanged(file, self._raw)
                for document in self.read(file, self._raw):
                    yield document if isinstance(document, Document) else Document(document)
                self._check_unchanged(file, self._raw)
            self._raw = None
            self._finished_bytes += file.stat().st_size

    def _check_unchanged(self, file: Path, raw: BinaryIO) -> None:
        if self._stamps.setdefault(file, stamp_of(raw.fileno())) != stamp_of(raw.fileno()):
            raise DataError(
                f"{file} was written to while it was read; give the same command again when it is "
                "complete"
            )

    @abstractmethod
    def read(self, file: Path, raw: BinaryIO) -> Iterator[str | Document]:
        """The documents of one open file."""

    @property
    def position(self) -> int:
        return self._finished_bytes + (self._raw.tell() if self._raw else 0)


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be opened: {error.strerror}") from None


class PythonStdlib(FileSource):
    """The running interpreter's own standard library: real text that every Python has.

    One module a document, sorted by path; tests, idlelib, lib2to3 and installed packages left out.
    """

    kind = "python-stdlib"

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        if not (root / "os.py").is_file():
            raise EnvironmentProblem(
                f"{root} holds no standard library source, so this Python cannot be the corpus; "
                "use --source text --path FILE"
            )
        super().__init__(root, "*.py")
        self.files = [
            file
            for file in self.files
            if _STDLIB_LEFT_OUT.isdisjoint(file.relative_to(root).parts[:-1])
        ]
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        self.corpus = "python_stdlib"

    def read(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        try:
            with tokenize.open(file) as stream:  # honours the source's own encoding line
                yield stream.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not readable as Python source: {error}") from None


class Text(FileSource):
    """Plain text files, one document per stretch between blank lines, or one per file.

    A line of white space alone is blank. Blank lines are not part of a document, nor is the line
    end after its last line; with one document a file the content is kept whole.
    """

    kind = "text"
    patterns = ("*.txt", "*.txt.gz", "*.txt.xz", "*.txt.zst")

    def __init__(self, path: Path, pattern: str | None = None, *, whole_files: bool) -> None:
        super().__init__(path, pattern)
        self.whole_files = whole_files

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "document": "file" if self.whole_files else "blank-line"}

    def read(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        gathered: list[bytes] = []
        start = 0
        for offset, line in lines(raw, file):
            if self.whole_files or line.strip():
                start = start if gathered else offset
                gathered.append(line)
            elif gathered:
                yield self._document(gathered, file, start)
                gathered = []
        if gathered:
            yield self._document(gathered, file, start)

    def _document(self, gathered: list[bytes], file: Path, start: int) -> str:
        data = b"".join(gathered)
        if (nul := data.find(b"\0")) >= 0:
            raise DataError(
                f"{file}: byte {start + nul} is NUL, so this is a binary or UTF-16 file; "
                "expected UTF-8 text"
            )
        text = decoded(data, file, start).replace("\r\n", "\n")
        return text if self.whole_files else text.removesuffix("\n")


class Jsonl(FileSource):
    """JSON objects, one a line, the text in one field. Blank lines are skipped."""

    kind = "jsonl"
    patterns = tuple(
        f"*.{stem}{end}" for stem in ("jsonl", "json") for end in ("", ".gz", ".xz", ".zst")
    )

    def __init__(self, path: Path, pattern: str | None = None, *, text_column: str) -> None:
        super().__init__(path, pattern)
        self.text_column = text_column

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "text_column": self.text_column}

    def read(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        for number, (offset, line) in enumerate(lines(raw, file), start=1):
            if not line.strip():
                continue
            where = f"{file}: line {number} (byte {offset})"
            text = decoded(line, file, offset)
            try:
                row = json.loads(text)
            except RecursionError:
                raise DataError(f"{where} is JSON nested too deeply to read") from None
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} is a JSON {type(row).__name__}; expected an object")
            yield text_field(row, self.text_column, where)


def text_field(row: dict[str, Any], column: str, where: str) -> str:
    """The text of a row, checked.

    Raises:
        DataError: the field is missing, not a string, or holds half a surrogate pair.
    """
    if column not in row:
        fields = ", ".join(f"{name:.40}" for name in list(row)[:8]) or "none"
        fields = "".join(c if c.isprintable() else "?" for c in fields)
        raise DataError(f"{where} has no field {column!r} (fields: {fields}); see --text-column")
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {column!r} is {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {column!r} has half a surrogate pair at character {error.start}; "
            "it is not valid Unicode text"
        ) from None
    return text
