"What several test modules use: drawn data, runs in other processes, the golden checkpoint."
import importlib.util, json, os, shutil, socket, subprocess, sys
from pathlib import Path

from PIL import Image, ImageDraw

TESTS = Path(__file__).resolve().parent
GOLDENS, SCRIPTS = TESTS/'goldens', TESTS/'scripts'
QUESTION = 'Which colour is the dot?'
# Of clearly unequal length, so that a mean of means is not the mean over all tokens.
ANSWERS = ['Red.', 'A blue dot on white paper.', 'It is green, I would say, though the light is poor and nobody here can tell for sure.', 'Black!']
SIZES = [(120, 90), (100, 100), (60, 200), (300, 100)]  # from one to several pieces at scale 112

def talk(answer='Red.', question=f'<image>\n{QUESTION}'):
    "The conversations of an entry with one question."
    return [dict(role='user', content=question), dict(role='assistant', content=answer)]

def entry(id='0', image='dot.png', conversations=None, **other):
    "An entry of a data file; good unless something is replaced."
    return dict(id=id, image=image, conversations=talk() if conversations is None else conversations) | other

def write_data(folder, entries, name='data.json'):
    "A data file beside a picture dot.png."
    Image.new('RGB', (60, 40), 'red').save(folder/'dot.png')
    (folder/name).write_text(json.dumps(entries), encoding='utf-8')
    return folder/name

def draw_data(folder, n, name='train.json'):
    "A data file of `n` samples with answers and pictures of unequal sizes."
    def sample(i):
        picture = Image.new('RGB', SIZES[i % 4], 'white')
        ImageDraw.Draw(picture).ellipse((10 + i % 6, 15, 60, 65), fill=['red', 'blue', 'green', 'black'][i % 4])
        picture.save(folder/f'{i}.png')
        return entry(f's{i}', f'{i}.png', talk(ANSWERS[i*7 % 4] + '?'*(i % 3)))
    (folder/name).write_text(json.dumps([sample(i) for i in range(n)]), encoding='utf-8')
    return folder/name

def draw_mixed(folder, n, name='train.json', pictures=None):
    "A data file of `n` samples that show no picture, one or two; `pictures`: how many each shows, in turn."
    draw_data(folder, 4)
    pictures = pictures or [0, 1, 2]
    def sample(i):
        shown = pictures[i % len(pictures)]
        names = {f'<image_{k:02}>': f'{(i+k) % 4}.png' for k in range(shown)}
        more = dict(image=names) if shown else {}
        return dict(id=f'm{i}', conversations=talk(ANSWERS[i*7 % 4] + '?'*(i % 3), ''.join(f'{tag}\n' for tag in names) + QUESTION), **more)
    (folder/name).write_text(json.dumps([sample(i) for i in range(n)]), encoding='utf-8')
    return folder/name

def flags(**values):
    "Settings as command-line flags."
    return [part for name, value in values.items() for part in (f'--{name}', str(value))]

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def run_ranks(argv, ranks=1, script=('-m', 'minicpmv_nb.training'), check=True):
    "Train in processes of their own, as torchrun starts them. `script`: another program that takes the same flags."
    from minicpmv_nb.jobs import _extensions
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])  # DeepSpeed looks for ninja there
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(ranks), '--master_port', str(free_port()), *script, *argv]
    done = subprocess.run(command, env=os.environ | dict(PATH=path, OMP_NUM_THREADS='1', TORCH_EXTENSIONS_DIR=str(_extensions())), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check: assert done.returncode == 0, done.stdout[-6000:]
    return done

def golden_checkpoint(folder, version='2.5'):
    "A golden checkpoint folder with its inputs and outputs, as parity.py reads it."
    spec = importlib.util.spec_from_file_location('golden_weights', GOLDENS/'weights.py')
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    from safetensors.torch import save_file
    shutil.copytree(GOLDENS/version, folder, dirs_exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in weights.golden_state_dict(version).items()}
    save_file(state, folder/'model.safetensors', metadata=dict(format='pt'))
    return folder
