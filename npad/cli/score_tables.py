"""Tables of scores: a row for each image, as CSV and as JSON, and a row for each region.

Every cell of the CSV tables is taken from the row of JSON: they can be made again from it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from npad.atomic_file import naming
from npad.cli.program import UsageError
from npad.file_names import shown

__all__ = ["REGIONS", "SCORES", "LiveTables", "ScoreTables"]

SCORES = ("scores.csv", "scores.jsonl")
REGIONS = "regions.csv"
COLUMNS = ("path", "score")
DECISION_COLUMNS = ("p_value", "threshold", "anomalous", "n_regions")
DRIFT_COLUMNS = ("drift", "drift_raised")
REGION_COLUMNS = ("path", "left", "top", "width", "height", "area", "peak", "peak_x", "peak_y")

Row = dict[str, Any]
Self = TypeVar("Self", bound="ScoreTables")


class ScoreTables:
    """Writer of the tables; as a context manager it closes them.

    Rows go to files whose names say "partial", until `finish` gives them their own. Where there was no
    row, no such file stays.

    Parameters
    ----------
    folder : is there
    decided : whether rows say what is decided, so that there is a table of regions

    Attributes
    ----------
    names : of the tables
    n_rows : written so far

    Raises
    ------
    OSError
        A table cannot be written. It is named.
    """

    def __init__(self, folder: Path, *, decided: bool) -> None:
        self.names = (*SCORES, REGIONS) if decided else SCORES
        self.n_rows = 0
        self._folder = folder
        self._columns = (*COLUMNS, *(DECISION_COLUMNS if decided else ()))
        self._tables: dict[str, TextIO] = {}

    def __enter__(self: Self) -> Self:
        with ExitStack() as stack:
            self._tables = {name: stack.enter_context(self._open(name)) for name in self.names}
            self._files = stack.pop_all()
        return self

    def _open(self, name: str) -> TextIO:
        return self._opened(name, "w")

    def _opened(self, name: str, mode: str) -> TextIO:
        """A table; with the names of its columns where it is empty."""
        # Names of files are bytes: what is no text goes out as it came in.
        how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        table: TextIO = self._path(name).open(mode, **how)  # type: ignore[call-overload]
        columns = {SCORES[0]: self._columns, REGIONS: REGION_COLUMNS}.get(name)
        if columns is not None and not os.fstat(table.fileno()).st_size:
            _write(table, columns)
        return table

    def _path(self, name: str) -> Path:
        stem, suffix = name.split(".")
        return self._folder / f"{stem}.partial.{suffix}"

    def write(self, row: Row) -> None:
        """Write what is known about an image."""
        with naming(self._path(SCORES[0])):
            self._write_csv(row)
            self._tables[SCORES[1]].write(json.dumps(row) + "\n")
        self.n_rows += 1

    def _write_csv(self, row: Row) -> None:
        _write(self._tables[SCORES[0]], [_cell(row, column) for column in self._columns])
        for region in row.get("regions", ()):
            place = (*region["box"], region["area"], repr(region["peak"]), *region["peak_at"])
            _write(self._tables[REGIONS], (row["path"], *place))

    def flush(self) -> None:
        """Hand all rows to the system."""
        with naming(self._path(SCORES[0])):
            for table in self._tables.values():
                table.flush()

    def finish(self) -> None:
        """Give the tables their names."""
        for name, table in self._tables.items():
            with naming(self._path(name)):
                table.flush()
                os.fsync(table.fileno())
                self._path(name).replace(self._folder / name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext():  # a full disk was reported already
            self._files.close()
        if not self.n_rows:
            for name in self.names:
                self._path(name).unlink(missing_ok=True)


class LiveTables(ScoreTables):
    """Tables that grow for months, under their own names, and go on after a kill at any moment.

    A row counts from when its line of JSON is whole. What a kill left beyond that is cut off, and the
    CSV tables are made again from the rows that came after `sizes` was last told.

    Parameters
    ----------
    folder, decided : as for `ScoreTables`
    sizes : bytes of each table, as `sync` told them; nothing of a table that is begun now

    Raises
    ------
    UsageError
        A table is shorter than it was.
    """

    def __init__(self, folder: Path, *, decided: bool, sizes: Mapping[str, int]) -> None:
        super().__init__(folder, decided=decided)
        if decided:
            self._columns = (*self._columns, *DRIFT_COLUMNS)
        self._sizes = {name: sizes.get(name, 0) for name in self.names}

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _open(self, name: str) -> TextIO:
        path, size = self._path(name), self._sizes[name]
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size < size:
                raise UsageError(
                    f"{shown(path)} has lost rows since it was written: put it back, or give another "
                    "folder with --output"
                )
            if name == SCORES[1]:
                size += sum(len(line) for line, _ in _whole(path, size))
            file.truncate(size)
        return self._opened(name, "a")

    def rows(self) -> Iterator[Row]:
        """All rows that are there."""
        return (row for _, row in _whole(self._path(SCORES[1]), 0))

    def catch_up(self) -> Iterator[Row]:
        """The rows that came after `sizes` was told, while the CSV tables are brought up to them."""
        for _, row in _whole(self._path(SCORES[1]), self._sizes[SCORES[1]]):
            self._write_csv(row)
            yield row

    def flush(self) -> None:
        """Have all rows on the disk."""
        super().flush()
        with naming(self._path(SCORES[1])):
            os.fsync(self._tables[SCORES[1]].fileno())

    def sync(self) -> dict[str, int]:
        """Have all tables on the disk, and tell their bytes."""
        self.flush()
        for name, table in self._tables.items():
            with naming(self._path(name)):
                os.fsync(table.fileno())
                self._sizes[name] = os.fstat(table.fileno()).st_size
        return dict(self._sizes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext():
            self._files.close()


def _whole(path: Path, start: int) -> Iterator[tuple[bytes, Row]]:
    """Lines of JSON from a byte on, up to the first that was cut short."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # after a power cut
                return
            if not isinstance(row, dict):
                return
            yield line, row


def _write(table: TextIO, cells: Any) -> None:
    csv.writer(table, lineterminator="\n").writerow(cells)


def _cell(row: Row, column: str) -> Any:
    value = len(row["regions"]) if column == "n_regions" else row[column]
    if isinstance(value, float):
        return repr(value)
    return int(value) if isinstance(value, bool) else value
