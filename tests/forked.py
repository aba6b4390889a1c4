"""Ranks that start quickly: each is a process of its own with the environment that torchrun gives, forked off one that has imported everything and never made a model.

torchrun itself is at work in other tests; its start would add the imports to each run.
"""
import multiprocessing, os, sys, time
from multiprocessing.connection import wait
from pathlib import Path

from minicpmv_nb.jobs import _extensions
from minicpmv_nb.surviving import clear_locks
from support import free_port

IMPORTED = ['minicpmv_nb.training', 'minicpmv_nb.jobs', 'deepspeed', 'bitsandbytes', 'forked']
PATIENCE = 600 # seconds; on a new machine DeepSpeed compiles first
ENVIRONMENT = dict(DS_ACCELERATOR='cpu', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', MASTER_ADDR='localhost')

def forking():
    "What makes such processes; the one that has imported everything starts with the first."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context

def _rank(work, number, ranks, port, log, args):
    with open(log, 'ab', buffering=0) as said: os.dup2(said.fileno(), 1); os.dup2(said.fileno(), 2)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]) # DeepSpeed looks for ninja there
    place = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
    os.environ |= ENVIRONMENT | dict(PATH=path, TORCH_EXTENSIONS_DIR=str(_extensions())) | {k: str(v) for k, v in place.items()}
    work(*args)

def train(argv):
    "What most ranks do: `minicpmv_nb.training` with these flags."
    from minicpmv_nb import training
    training.main(argv)

def fork_ranks(work, ranks, log, *args):
    "Call `work(*args)` on every rank; all must end well. What they print goes into the file `log`."
    clear_locks(_extensions()) # of compilers that were killed
    context, port, end = forking(), free_port(), time.monotonic() + PATIENCE
    processes = [context.Process(target=_rank, args=(work, number, ranks, port, str(log), args)) for number in range(ranks)]
    for p in processes: p.start()
    while (left := [p for p in processes if p.is_alive()]) and time.monotonic() < end and not any(p.exitcode for p in processes): wait([p.sentinel for p in left], 1)
    codes = [p.exitcode for p in processes]
    for p in processes: p.kill(); p.join()
    assert codes == [0]*ranks, f'exit codes {codes}\n' + Path(log).read_text(errors='replace')[-6000:]
