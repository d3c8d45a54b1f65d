"""What a library changes is put back, also where it fails."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

from shortstack.common.process_state import logging_at, same_random_state


def test_generators_are_left_as_they_were() -> None:
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())

    @same_random_state()
    def fails() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


def test_a_logger_gets_its_level_back() -> None:
    logger = logging.getLogger("shortstack.test.library")
    logger.setLevel(logging.INFO)

    @logging_at(logger.name, logging.ERROR)
    def fails() -> None:
        assert logger.level == logging.ERROR
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            fails()
        assert logger.level == logging.INFO
