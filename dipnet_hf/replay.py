"""A stream of training rows that calibration may read without taking them from the training."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


def may_be_read_once(dataset: Any) -> bool:
    """Whether a dataset is a stream that may not begin anew; those of `datasets` do."""
    return isinstance(dataset, IterableDataset) and type(dataset).__module__.partition(".")[0] != "datasets"


class Replayed(IterableDataset):
    """A stream whose second reading begins with what the first has read, and goes on where that ended.

    Args:
        stream (`IterableDataset`): read by calibration, by the first epoch, and then as it is.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._num_readings = 0
        self._rows: Iterator = iter(())
        self._read: list = []

    def __iter__(self) -> Iterator:
        self._num_readings += 1
        if self._num_readings == 1:
            self._rows = iter(self._stream)
            for row in self._rows:
                self._read.append(row)
                yield row
        elif self._num_readings == 2:
            yield from self._read
            self._read = []
            yield from self._rows
        else:
            yield from self._stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_stream"), name)
