"""A limit of time, which would leave an evaluation halfway."""

from argparse import Namespace

import pytest

from megaqwen.training import following


def test_time_is_not_up_within_an_evaluation() -> None:
    arguments = Namespace(exit_duration_in_mins=5)
    with pytest.raises(RuntimeError), following.whole_evaluation(arguments):
        assert arguments.exit_duration_in_mins is None
        raise RuntimeError
    assert arguments.exit_duration_in_mins == 5
