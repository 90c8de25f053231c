"""A stream that calibration has begun, read again by the training."""

import itertools

import pytest
import torch
from datasets import Dataset

from dipnet_hf.replay import Replayed, may_be_read_once


class Stream(torch.utils.data.IterableDataset):
    """Six numbers that come once, or every time."""

    def __init__(self, once):
        self.rows = iter(range(6)) if once else range(6)
        self.epoch = 3

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return 6


@pytest.mark.parametrize(("once", "third"), [(True, []), (False, list(range(6)))])
def test_the_second_reading_is_whole(once, third):
    stream = Replayed(Stream(once))
    assert list(itertools.islice(stream, 2)) == [0, 1]
    assert list(stream) == list(range(6))
    assert list(stream) == third
    assert (len(stream), stream.epoch) == (6, 3)


def test_streams_of_datasets_begin_anew_by_themselves():
    rows = Dataset.from_list([{"number": 1}])
    assert may_be_read_once(Stream(True))
    assert not may_be_read_once(rows) and not may_be_read_once(rows.to_iterable_dataset())
