"""Compare this package with outputs of the original code: `python tests/parity.py FOLDER`.

FOLDER is a checkpoint in official layout that also has inputs.npz, outputs.npz and meta.json (goldens/README.md says what is in them).
Prints the largest differences of each case; exits 1 beyond 1e-4 or on any other difference.
"""
import argparse, json, sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minicpmv_nb.batches import collate, picture_tensors
from minicpmv_nb.model import generate, load
from minicpmv_nb.prompts import Encoded, Processor, encode, image_bounds
from minicpmv_nb.samples import Picture, Turn

LIMIT, TINY_NORM = 1e-4, 1e-6


def batch_of(inputs, case:str)->dict:
    "The batch of a golden case, in our layout."
    ids = torch.from_numpy(inputs[f'{case}/input_ids']).long()
    rows, width = ids.shape
    bounds = [inputs[f'{case}/image_bound_{b}'] + b*width for b in range(rows)]
    sizes = [inputs[f'{case}/tgt_sizes_{b}'] for b in range(rows)]
    strips = [inputs[f'{case}/pixel_values_{b}_{k}'] for b in range(rows) for k in range(len(sizes[b]))]
    return dict(input_ids=ids, pixel_values=torch.from_numpy(np.concatenate(strips, -1))[None], target_sizes=torch.from_numpy(np.concatenate(sizes)).long(),
        image_bound=torch.from_numpy(np.concatenate(bounds)).long(), slices_per_sample=torch.tensor([len(s) for s in sizes]))

def record(model)->dict:
    "Keep what tower and resampler give."
    kept = {}
    model.vpm.register_forward_hook(lambda m, i, out: kept.update(vpm=out.detach().clone(), real=i[1].real))
    model.resampler.register_forward_hook(lambda m, i, out: kept.update(resampler=out.detach().clone()))
    return kept

def gap(ours, theirs)->float: return float((ours.detach().double() - torch.from_numpy(theirs).double()).abs().max())

def tower_gap(kept, theirs)->float:
    "Padding is compared too where the golden has it: the original attends to it."
    length = min(kept['vpm'].shape[1], theirs.shape[1])
    return gap(kept['vpm'][:, :length], theirs[:, :length])

def grad_gaps(model, norms:dict)->tuple[float,list[str],list[str]]:
    "Largest relative difference of gradient norms, the parameters left out, and those that have one here only or there only."
    ours = {n: None if p.grad is None else float(p.grad.double().norm()) for n, p in model.named_parameters()}
    out = [n for n, v in norms.items() if v is not None and v < TINY_NORM]
    differ = [n for n in ours.keys() | norms.keys() if (ours.get(n) is None) != (norms.get(n) is None) and n not in out]
    rel = [abs(ours[n] - v)/v for n, v in norms.items() if v is not None and n not in out and ours.get(n) is not None]
    return max(rel), out, differ

def train_case(model, kept, inputs, outputs, meta, case:str)->bool:
    batch = batch_of(inputs, case)
    targets, seen = torch.from_numpy(inputs[f'{case}/labels']).long(), torch.from_numpy(inputs[f'{case}/attention_mask']).bool()
    model.zero_grad(set_to_none=True)
    logits = model(**batch)['logits']
    loss = model(**batch, shift_labels=targets)['loss']
    loss.backward()
    found = dict(loss=abs(float(loss.detach()) - float(outputs[f'{case}/loss'])))
    if f'{case}/logits' in outputs: found['logits'] = gap(logits[seen], outputs[f'{case}/logits'][seen.numpy()])
    if f'{case}/resampler' in outputs: found['resampler'] = gap(kept['resampler'], outputs[f'{case}/resampler'])
    if f'{case}/vpm' in outputs: found['tower'] = tower_gap(kept, outputs[f'{case}/vpm'])
    found['gradient norms'], left_out, differ = grad_gaps(model, meta['grad_norms'][case])
    print(f'{case}: ' + ', '.join(f'{k} {v:.1e}' for k, v in found.items()))
    if left_out: print(f'  gradient norm below {TINY_NORM}, left out: {", ".join(left_out)}')
    if differ: print(f'  gradient on one side only: {", ".join(sorted(differ))}')
    return all(v <= LIMIT for v in found.values()) and not differ  # a NaN is not <= LIMIT

def chat_turns(prompt:str, pictures:dict, names)->tuple[list[Turn],list]:
    "The question of a golden prompt as parts."
    body = prompt.split('user', 1)[1].rsplit('<|eot_id|>', 1)[0].removeprefix('<|end_header_id|>\n\n')
    parts, shown = [], []
    for text in body.split('\n'):
        if text == '(<image>./</image>)': shown.append(pictures[next(names)]); parts.append(Picture('', *shown[-1].size))
        else: parts.append(text)
    return [Turn('user', tuple(parts))], shown

def infer_case(model, folder:Path, inputs, outputs, meta)->bool:
    processor = Processor.from_folder(folder)
    pictures = {k.removeprefix('image_'): Image.fromarray(inputs[k]) for k in inputs if k.startswith('image_') and '/' not in k}
    good, names = True, iter(sorted(pictures))
    for row, prompt in enumerate(meta['inference']['prompts']):
        turns, shown = chat_turns(prompt, pictures, names)
        encoded = encode(turns, processor, ask=True)
        ours = encoded.input_ids
        theirs, once = unpad(inputs['infer/input_ids'][row], processor, meta)
        same = ours == once
        encoded = Encoded(theirs, [-100]*len(theirs), image_bounds(theirs, processor), encoded.plans) # the original saw both BOS
        batch = collate([dict(encoded=encoded, **picture_tensors(shown, encoded.plans), id=str(row))], pad_id=0)
        kept = {k: v for k, v in batch.items() if k not in ('labels', 'ids')}
        with torch.no_grad(): last = gap(model(**kept)['logits'][0, -1], outputs['infer/last_logits'][row])
        want = outputs['infer/greedy_ids'][row].tolist()
        said = generate(model, kept, end_ids=[], max_new_tokens=len(want))
        print(f'infer {row}: prompt {"equal" if same else f"DIFFERS: {ours} instead of {once}"}, last logits {last:.1e}, greedy {"equal" if said == want else f"DIFFERS: {said} instead of {want}"}')
        good &= same and said == want and last <= LIMIT
    return good

def unpad(row:np.ndarray, processor:Processor, meta:dict)->tuple[list[int],list[int]]:
    "A golden row without left padding; and the same without the first of the two BOS that 2.5 has."
    ids = row.tolist()
    start = processor.special_ids.get('<|begin_of_text|>')
    ids = ids[ids.index(start):]
    return ids, ids[1:] if meta['version'] == '2.5' and ids[:2] == [start, start] else ids

def main(folder:Path)->bool:
    torch.set_default_dtype(torch.float32)
    inputs, outputs, meta = dict(np.load(folder/'inputs.npz')), dict(np.load(folder/'outputs.npz')), json.loads((folder/'meta.json').read_text())
    model = load(folder).train()
    kept = record(model)
    cases = [c for c in ('single0', 'single1') if f'{c}/input_ids' in inputs]
    results = [train_case(model, kept, inputs, outputs, meta, c) for c in cases]
    results.append(infer_case(model.eval(), folder, inputs, outputs, meta))
    print('parity holds' if all(results) else 'PARITY FAILS')
    return all(results)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    sys.exit(0 if main(parser.parse_args().folder) else 1)
