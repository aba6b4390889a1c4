"Fixtures that several test modules share."
import os, signal

# The models are tiny: a second thread costs more than it brings, and far more beside another process. Read when torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# A shell that starts the tests in the background has Ctrl-C ignored, here and in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from support import ANSWERS, QUESTION, draw_data, golden_checkpoint

COLLECTED = pytest.StashKey() # Ids of all tests in the files that were read, the slow ones too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items): config.stash[COLLECTED] = [item.nodeid for item in items]

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A tiny random checkpoint in official layout."
    from minicpmv_nb.model import tiny_checkpoint
    return tiny_checkpoint(tmp_path_factory.mktemp('model')/'tiny', [QUESTION, *ANSWERS])

@pytest.fixture(scope='session')
def bases(tmp_path_factory):
    "A tiny checkpoint of each family, by name."
    from minicpmv_nb.families import FAMILIES
    from minicpmv_nb.model import tiny_checkpoint
    folder = tmp_path_factory.mktemp('bases')
    return {name: tiny_checkpoint(folder/name, [QUESTION, *ANSWERS], name) for name in FAMILIES}

@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    "A data file of 24 drawn samples."
    return draw_data(tmp_path_factory.mktemp('drawn'), 24)

@pytest.fixture(scope='session')
def golden(tmp_path_factory):
    "The golden checkpoint of 2.5."
    return golden_checkpoint(tmp_path_factory.mktemp('golden')/'2.5')
