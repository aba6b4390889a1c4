"""Compare this package with outputs of the original code: `python tests/parity.py FOLDER`, on a GPU with `--device cuda`.

FOLDER is a checkpoint in official layout that also has inputs.npz, outputs.npz and meta.json (goldens/README.md says what is in them).
Prints the largest differences of each case; exits 1 beyond 1e-4 or on any other difference. The batched cases of 2.5 are left out:
there the original lets the pictures of different samples influence each other.
"""
import argparse, json, re, sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minicpmv_nb.batches import collate, picture_tensors
from minicpmv_nb.model import generate, load
from minicpmv_nb.prompts import Encoded, Processor, encode, image_bounds
from minicpmv_nb.samples import Picture, Turn

LIMIT, TINY_NORM, PATCH, CASES = 1e-4, 1e-6, 14, ('single0', 'single1', 'case0', 'case1')


def strip_of(piece:np.ndarray)->np.ndarray:
    "A piece as patches side by side: 2.0 keeps it as a picture (3, H, W), later versions as a strip already."
    if piece.shape[1] == PATCH: return piece
    h, w = piece.shape[1]//PATCH, piece.shape[2]//PATCH
    return piece.reshape(3, h, PATCH, w, PATCH).transpose(0, 2, 1, 3, 4).reshape(3, PATCH, h*w*PATCH)

def batch_of(inputs, case:str)->dict:
    "The batch of a golden case, in our layout."
    ids = torch.from_numpy(inputs[f'{case}/input_ids']).long()
    rows, width = ids.shape
    bounds = [inputs[f'{case}/image_bound_{b}'] + b*width for b in range(rows)]
    pieces = [[inputs[f'{case}/pixel_values_{b}_{k}'] for k in range(len(bounds[b]))] for b in range(rows)]
    sizes = [inputs[f'{case}/tgt_sizes_{b}'] if len(inputs[f'{case}/tgt_sizes_{b}']) else np.array([(p.shape[1]//PATCH, p.shape[2]//PATCH) for p in pieces[b]]) for b in range(rows)]
    return dict(input_ids=ids, pixel_values=torch.from_numpy(np.concatenate([strip_of(p) for row in pieces for p in row], -1))[None],
        target_sizes=torch.from_numpy(np.concatenate(sizes)).long(), image_bound=torch.from_numpy(np.concatenate(bounds)).long(), slices_per_sample=torch.tensor([len(s) for s in sizes]))

def record(model)->dict:
    "Keep what tower and resampler give."
    kept = {}
    model.vpm.register_forward_hook(lambda m, i, out: kept.update(vpm=out.detach().clone(), layout=i[1]))
    model.resampler.register_forward_hook(lambda m, i, out: kept.update(resampler=out.detach().clone()))
    return kept

def beside(model, batch:dict)->dict:
    "A batch on the model's device."
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

def gap(ours, theirs)->float: return float((ours.detach().double().cpu() - torch.from_numpy(theirs).double()).abs().max())

def tower_gap(kept, theirs:list[np.ndarray])->float:
    "Piece by piece. Places without a patch are compared where the tower has them: the original attends to them, too."
    l = kept['layout']
    lengths = [places for n, places in l.runs for _ in range(n)]
    first = l.source[torch.tensor([0, *np.cumsum(lengths)[:-1]])].tolist() # a piece's first patch tells which piece it is
    pieces = dict(zip(first, kept['vpm'].split(lengths)))
    return max(gap(pieces[f], full[:len(pieces[f])]) for f, full in zip(sorted(pieces), theirs, strict=True))

def golden_parts(outputs, name:str)->list[np.ndarray]|None:
    "One array per piece, however the golden keeps them."
    if name in outputs: return list(outputs[name])
    return [outputs[f'{name}_{k}'][0] for k in range(sum(key.startswith(f'{name}_') and key.removeprefix(f'{name}_').isdigit() for key in outputs))] or None

def grad_gaps(model, norms:dict)->tuple[float,list[str],list[str]]:
    "Largest relative difference of gradient norms, the parameters left out, and those that have one here only or there only."
    ours = {n: None if p.grad is None else float(p.grad.double().norm()) for n, p in model.named_parameters()}
    out = [n for n, v in norms.items() if v is not None and v < TINY_NORM]
    differ = [n for n in ours.keys() | norms.keys() if (ours.get(n) is None) != (norms.get(n) is None) and n not in out]
    rel = [abs(ours[n] - v)/v for n, v in norms.items() if v is not None and n not in out and ours.get(n) is not None]
    return max(rel), out, differ

def train_case(model, kept, inputs, outputs, meta, case:str)->bool:
    batch = beside(model, batch_of(inputs, case))
    targets, seen = torch.from_numpy(inputs[f'{case}/labels']).long(), torch.from_numpy(inputs[f'{case}/attention_mask']).bool()
    model.zero_grad(set_to_none=True)
    logits = model(**batch)['logits']
    loss = model(**batch, **beside(model, dict(shift_labels=targets)))['loss']
    loss.backward()
    found = dict(loss=abs(float(loss.detach()) - float(outputs[f'{case}/loss'])))
    if f'{case}/logits' in outputs: found['logits'] = gap(logits.cpu()[seen], outputs[f'{case}/logits'][seen.numpy()])
    if (parts := golden_parts(outputs, f'{case}/resampler')) is not None: found['resampler'] = gap(kept['resampler'], np.stack(parts))
    if (parts := golden_parts(outputs, f'{case}/vpm')) is not None: found['tower'] = tower_gap(kept, parts)
    found['gradient norms'], left_out, differ = grad_gaps(model, meta['grad_norms'][case])
    print(f'{case}: ' + ', '.join(f'{k} {v:.1e}' for k, v in found.items()))
    if left_out: print(f'  gradient norm below {TINY_NORM}, left out: {", ".join(left_out)}')
    if differ: print(f'  gradient on one side only: {", ".join(sorted(differ))}')
    return all(v <= LIMIT for v in found.values()) and not differ  # a NaN is not <= LIMIT

def chat_turns(prompt:str, template, pictures:dict, names)->tuple[list[Turn],list]:
    "The turns of a golden prompt, without the system prompt that the template adds, and the pictures shown in them."
    roles = {template.opening(r): r for r in ('user', 'assistant', 'system')}
    pieces = re.split(f"({'|'.join(map(re.escape, roles))})", prompt)[1:-2] # behind the last opening the model answers
    turns, shown = [], []
    for opening, text in zip(pieces[::2], pieces[1::2], strict=True):
        parts = []
        for part in text.rsplit(template.close, 1)[0].split('\n'):
            if part == '(<image>./</image>)': shown.append(pictures[next(names)])
            parts.append(Picture('', *shown[-1].size) if part == '(<image>./</image>)' else part)
        turns.append(Turn(roles[opening], tuple(parts)))
    return turns[1:] if turns[0] == Turn('system', (template.default_system,)) else turns, shown

def infer_case(model, folder:Path, inputs, outputs, meta)->bool:
    processor = Processor.from_folder(folder)
    pictures = {k.removeprefix('image_'): Image.fromarray(inputs[k]) for k in inputs if k.startswith('image_') and '/' not in k}
    good, names = True, iter(sorted(pictures))
    for row, prompt in enumerate(meta['inference']['prompts']):
        turns, shown = chat_turns(prompt, processor.family.template, pictures, names)
        encoded = encode(turns, processor, ask=True)
        ours = encoded.input_ids
        theirs, once = unpad(inputs['infer/input_ids'][row], meta)
        same = ours == once
        encoded = Encoded(theirs, [-100]*len(theirs), image_bounds(theirs, processor), encoded.plans) # of 2.5 the original saw two BOS
        batch = collate([dict(encoded=encoded, **picture_tensors(shown, encoded.plans), id=str(row))], pad_id=0)
        kept = beside(model, {k: v for k, v in batch.items() if k not in ('labels', 'ids')})
        with torch.no_grad(): last = gap(model(**kept)['logits'][0, -1], outputs['infer/last_logits'][row])
        want = outputs['infer/greedy_ids'][row].tolist()
        said = generate(model, kept, end_ids=[], max_new_tokens=len(want))
        print(f'infer {row}: prompt {"equal" if same else f"DIFFERS: {ours} instead of {once}"}, last logits {last:.1e}, greedy {"equal" if said == want else f"DIFFERS: {said} instead of {want}"}')
        good &= same and said == want and last <= LIMIT
    return good

def unpad(row:np.ndarray, meta:dict)->tuple[list[int],list[int]]:
    "A golden row without the zeros on its left; and the same without the first of the two BOS that 2.5 has."
    ids = row.tolist()[int(np.argmax(row != 0)):]
    return ids, ids[1:] if meta['version'] == '2.5' and ids[0] == ids[1] else ids

def video_case(model, inputs, outputs, meta)->bool:
    "Frames in groups, alone and beside a picture (the first of `single1`), and the groups placed among tokens of id 0."
    groups, number = meta['inference']['temporal_groups'], model.checkpoint_config['query_num']
    frames, sizes = [inputs[f'video/pixel_values_{k}'] for k in range(len(inputs['video/tgt_sizes']))], inputs['video/tgt_sizes'].tolist()
    batch = lambda pieces, sizes: beside(model, dict(pixel_values=torch.from_numpy(np.concatenate(pieces, -1))[None], target_sizes=torch.tensor(sizes), slices_per_sample=torch.tensor([len(sizes)])))
    look = lambda b, times: model.look(b['pixel_values'], model.lay_out(b['target_sizes'], b['slices_per_sample'], times))
    with torch.no_grad():
        alone, mixed = batch(frames, sizes), batch([inputs['single1/pixel_values_0_0'], *frames], [inputs['single1/tgt_sizes_0'][0].tolist(), *sizes])
        placed = model.embed(**beside(model, dict(input_ids=torch.zeros(1, 2*number+4, dtype=torch.long), image_bound=torch.tensor([[1, 1+number], [2+number, 2+2*number]]))), **alone, frame_times=groups)
        found = dict(resampler=gap(look(alone, groups), outputs['video/resampler_batch_infer_True']), beside_a_picture=gap(look(mixed, [[-1], *groups]), outputs['video/mixed_resampler_batch_infer_True']),
            embeddings=gap(placed, outputs['video/inputs_embeds']))
    print('video: ' + ', '.join(f'{k} {v:.1e}' for k, v in found.items()))
    return all(v <= LIMIT for v in found.values())

def main(folder:Path, device:str='cpu')->bool:
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.allow_tf32 = False # the convolution that makes patches would lose digits on a GPU
    inputs, outputs, meta = dict(np.load(folder/'inputs.npz')), dict(np.load(folder/'outputs.npz')), json.loads((folder/'meta.json').read_text())
    model = load(folder, device=device).train()
    kept = record(model)
    cases = [c for c in CASES if f'{c}/input_ids' in inputs and not (c.startswith('case') and meta['version'] == '2.5')]
    results = [train_case(model, kept, inputs, outputs, meta, c) for c in cases]
    model.eval()
    if 'infer/input_ids' in inputs: results.append(infer_case(model, folder, inputs, outputs, meta))
    if 'video/tgt_sizes' in inputs: results.append(video_case(model, inputs, outputs, meta))
    print('parity holds' if all(results) else 'PARITY FAILS')
    return all(results)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    sys.exit(0 if main(args.folder, args.device) else 1)
