"""Whole tiny runs, for tests that need a real checkpoint."""

from tests.train.conftest import corpus as corpus
from tests.train.conftest import tiny as tiny
