"Fixtures that several test modules share."
import os

# The models are tiny: a second thread costs more than it brings, and far more beside another process. Read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

from support import ANSWERS, QUESTION, draw_data, golden_checkpoint


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A tiny random checkpoint in official layout."
    from minicpmv_nb.model import tiny_checkpoint
    return tiny_checkpoint(tmp_path_factory.mktemp('model')/'tiny', [QUESTION, *ANSWERS])

@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    "A data file of 24 drawn samples."
    return draw_data(tmp_path_factory.mktemp('drawn'), 24)

@pytest.fixture(scope='session')
def golden(tmp_path_factory):
    "The golden checkpoint of 2.5."
    return golden_checkpoint(tmp_path_factory.mktemp('golden')/'2.5')
