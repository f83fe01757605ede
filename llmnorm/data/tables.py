"""Text in tables: parquet files, and any dataset of the Hugging Face hub through `datasets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .sources import Document, FileSource, Source, text_field

_PARQUET_ROWS = 1024  # rows read at a time


class Parquet(FileSource):
    """One row a document, the text in one column."""

    kind = "parquet"
    patterns = ("*.parquet",)

    def __init__(self, path: Path, pattern: str | None = None, *, text_column: str) -> None:
        super().__init__(path, pattern)
        self.text_column = text_column

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "text_column": self.text_column}

    def read(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if self.text_column not in names:
                raise DataError(
                    f"{file} has no column {self.text_column!r} (columns: {', '.join(names)}); "
                    "see --text-column"
                )
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[self.text_column]):
                for value in batch.to_pylist():
                    yield text_field(value, self.text_column, f"{file}: row {row}")
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{file}: damaged parquet, near row {row}: {reason}") from None


class HubDataset(Source):
    """A dataset by its hub name (or a local folder), loaded by `datasets`.

    Args:
        name: as `datasets.load_dataset` takes it.
        subset: its configuration, such as "sample-10BT".
        split: which rows, such as "train" or, without streaming, "train[:1%]".
        text_column: the field that holds the text.
        streaming: read over the network as needed instead of downloading everything first.
        revision: branch, tag or commit.

    Raises:
        DataError: the dataset cannot be found or reached.
    """

    kind = "hf"

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        split: str = "train",
        text_column: str = "text",
        streaming: bool = False,
        revision: str | None = None,
    ) -> None:
        import datasets

        self.name, self.subset, self.split, self.revision = name, subset, split, revision
        self.text_column, self.streaming = text_column, streaming
        self.corpus = name.rstrip("/").rpartition("/")[2]
        try:
            builder = datasets.load_dataset_builder(name, subset, revision=revision)
        except Exception as error:  # of many kinds: hub, network, file system, format
            raise self._failure("cannot be loaded", error) from None
        self.fingerprint = builder.hash

    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "subset": self.subset,
            "split": self.split,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "text_column": self.text_column,
        }

    def documents(self) -> Iterator[Document]:
        return self.documents_from(0)

    def documents_from(self, start: int) -> Iterator[Document]:
        number = start
        try:
            for row in self._rows(start):
                where = f"dataset {self.name}: row {number} of {self.split}"
                yield Document(text_field(row, self.text_column, where))
                number += 1
        except DataError:
            raise
        except Exception as error:  # of many kinds: hub, network, file system, format
            raise self._failure(f"fails at row {number} of {self.split}", error) from None

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        import datasets

        rows = datasets.load_dataset(
            self.name,
            self.subset,
            split=self.split,
            streaming=self.streaming,
            revision=self.revision,
        )
        if self.text_column in (rows.column_names or ()):
            rows = rows.select_columns([self.text_column])
        return iter(rows.skip(start))

    def _failure(self, what: str, error: Exception) -> DataError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return DataError(f"dataset {self.name} {what}: {reason}")
