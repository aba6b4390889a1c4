"Fine-tune MiniCPM-V vision-language models, one notebook at a time. Importing this loads neither torch nor transformers."
__version__ = "0.0.1"

import logging, sys
from importlib import import_module

# Importing bitsandbytes, which PEFT does wherever it is installed, warns of a kernel that is only used for generating on a CPU.
logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)

# Where each public name lives; it is imported when it is first used.
_HOMES = dict(
    config='Config lora qlora full recommended from_script', samples='Sample check DataError', prompts='Processor', model='load save tiny_checkpoint', batches='load_data', tuning='add_adapter part_table',
    quantizing='quantize', training='train', plots='plot_run plot_dashboard compare_runs', jobs='launch Run RunFailed find_runs', merging='merge', chat='Chat answer_file exact_match', estimating='estimate', diagnosis='doctor',
    data_panel='DataPanel', annotate_panel='AnnotatePanel', config_panel='ConfigPanel', run_panel='RunPanel', answer_panels='MergePanel ChatPanel', workbench='Workbench', errors='short_errors')
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    "Import a public name from its module."
    if name not in _HOME: raise AttributeError(f"module 'minicpmv_nb' has no attribute {name!r}")
    return getattr(import_module(f'.{_HOME[name]}', __name__), name)


def __dir__(): return __all__ + ['__version__']


# In IPython and Jupyter, errors of this package are shown in one sentence; `short_errors(False)` switches that off.
if 'IPython' in sys.modules: import_module('.errors', __name__).short_errors()
