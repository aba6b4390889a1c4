"The original code's outputs are ours; and the comparison notices when they are not."
import dataclasses, json

import numpy as np
import pytest
import torch
from torch import nn

import parity
from support import GOLDENS, golden_checkpoint
from minicpmv_nb import vision
from minicpmv_nb.model import MiniCPMV, load
from minicpmv_nb.tuning import add_adapter

ADAPTER = GOLDENS/'adapter_2.5'


@pytest.fixture(scope='module')
def golden26(tmp_path_factory): return golden_checkpoint(tmp_path_factory.mktemp('golden')/'2.6', '2.6')

@pytest.mark.parametrize('version', ['2.0', '2.5', '2.6', '4.0', '4.5'])
def test_parity_holds(tmp_path, version): assert parity.main(golden_checkpoint(tmp_path, version)) is True

# Each of these is a plausible mistake with finite outputs of the right shape.

def test_leaving_out_the_padding_of_the_tower_is_noticed(golden, monkeypatch):
    # What the later families do, with positions along one line; the original 2.5 has padding up to the longest piece, and attends to it.
    own = lambda sizes, per_sample, side: [vision.side_positions(h*w, side) for h, w in sizes]
    monkeypatch.setitem(vision.PLACES, 'strip', own)
    assert parity.main(golden) is False

def test_padding_in_a_later_family_is_noticed(golden26, monkeypatch):
    def padded(sizes, per_sample, side):
        longest = max(h*w for h, w in sizes)
        return [nn.functional.pad(p, (0, longest-len(p))) for p in vision.grid_places(sizes, per_sample, side)]
    monkeypatch.setitem(vision.PLACES, 'grid', padded)
    assert parity.main(golden26) is False

def test_the_other_gelu_is_noticed(golden, monkeypatch):
    built = MiniCPMV.__init__
    def erf(self, config):
        built(self, config)
        for layer in self.vpm.encoder['layers']: layer.mlp.act = nn.GELU()
    monkeypatch.setattr(MiniCPMV, '__init__', erf)
    assert parity.main(golden) is False

def test_swapped_sides_of_the_resampler_are_noticed(golden, monkeypatch):
    straight = vision.patch_positions
    monkeypatch.setattr(vision, 'patch_positions', lambda l, dim: straight(dataclasses.replace(l, rows=l.cols, cols=l.rows), dim))
    assert parity.main(golden) is False

def test_positions_in_two_dimensions_are_noticed(golden, monkeypatch):
    # What the later families do: row and column of a patch, not its place in the strip.
    def grid(sizes, per_sample, side):
        longest = max(h*w for h, w in sizes)
        return [nn.functional.pad(p, (0, longest-len(p))) for p in vision.grid_places(sizes, per_sample, side)]
    monkeypatch.setitem(vision.PLACES, 'strip', grid)
    assert parity.main(golden) is False

def test_swapped_sides_of_the_tower_are_noticed(golden26, monkeypatch):
    swapped = lambda sizes, per_sample, side: [(vision.side_positions(h, side)[:, None] + vision.side_positions(w, side)*side).flatten() for h, w in sizes]
    monkeypatch.setitem(vision.PLACES, 'grid', swapped)
    assert parity.main(golden26) is False

@pytest.mark.parametrize('key, value', [('scale_emb', 1), ('scale_depth', 1.0), ('dim_model_base', 256)])
def test_a_missing_scale_of_2_0_is_noticed(tmp_path, key, value):
    folder = golden_checkpoint(tmp_path, '2.0')
    config = json.loads((folder/'config.json').read_text())
    assert config[key] != value
    (folder/'config.json').write_text(json.dumps(config | {key: value}))
    assert parity.main(folder) is False

def test_frames_without_time_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, 'frame_positions', lambda l, dim: torch.zeros(len(l.times), dim))
    assert parity.main(golden_checkpoint(tmp_path, '4.5')) is False

@pytest.mark.parametrize('step', [-1, 1])
def test_shifted_labels_are_noticed(golden, monkeypatch, step):
    straight = MiniCPMV.forward
    def shifted(self, *args, shift_labels=None, **kwargs):
        if shift_labels is not None: shift_labels = torch.roll(shift_labels, step, 1)
        return straight(self, *args, shift_labels=shift_labels, **kwargs)
    monkeypatch.setattr(MiniCPMV, 'forward', shifted)
    assert parity.main(golden) is False

def test_nan_is_noticed(golden, monkeypatch):
    straight = MiniCPMV.forward
    monkeypatch.setattr(MiniCPMV, 'forward', lambda self, *a, **k: {n: t*float('nan') for n, t in straight(self, *a, **k).items()})
    assert parity.main(golden) is False

def test_frozen_parameter_is_noticed(golden, monkeypatch):
    # Losses and logits agree; only the gradient is missing.
    loaded = parity.load
    def frozen(folder, **kw):
        model = loaded(folder, **kw)
        model.resampler.query.requires_grad_(False)
        return model
    monkeypatch.setattr(parity, 'load', frozen)
    assert parity.main(golden) is False

def test_labels_are_compared_with_the_next_token(golden):
    # parity.py gives shifted labels; training gives unshifted ones. Here every token is taught.
    batch = parity.batch_of(np.load(golden/'inputs.npz'), 'single1')
    model, ids = load(golden), batch['input_ids']
    with torch.no_grad(): loss, logits = model(**batch, labels=ids)['loss'], model(**batch)['logits']
    assert torch.allclose(loss, nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]), atol=1e-6)


# --- an adapter of the official script -------------------------------------------------------------------------------

def with_plain_peft(model, folder):
    from peft import PeftModel
    return PeftModel.from_pretrained(model, folder).eval()

@pytest.mark.parametrize('put_on', [add_adapter, with_plain_peft])
def test_official_adapter_gives_its_logits(golden, put_on):
    inputs, expected = np.load(golden/'inputs.npz'), np.load(ADAPTER/'expected.npz')
    model = put_on(load(golden), ADAPTER)
    for case in ('single0', 'single1'):
        with torch.no_grad(): logits = model(**parity.batch_of(inputs, case))['logits']
        assert parity.gap(logits, expected[f'{case}/adapter_logits']) < 1e-4

def test_official_adapter_after_merging(golden):
    inputs, expected = np.load(golden/'inputs.npz'), np.load(ADAPTER/'expected.npz')
    merged = add_adapter(load(golden), ADAPTER).merge_and_unload()
    for case in ('single0', 'single1'):
        with torch.no_grad(): logits = merged(**parity.batch_of(inputs, case))['logits']
        assert parity.gap(logits, expected[f'{case}/merged_logits']) < 1e-4
    state = merged.state_dict()
    tensors = [k.removeprefix('merged/') for k in expected if k.startswith('merged/')]
    assert tensors and all(parity.gap(state[n], expected[f'merged/{n}']) < 1e-5 for n in tensors)

def test_folder_without_an_adapter(tmp_path, golden):
    with pytest.raises(FileNotFoundError, match='has no adapter_config.json, so it holds no adapter that can be read'): add_adapter(load(golden), tmp_path)

def test_adapter_that_is_a_pickle(tmp_path, golden):
    (tmp_path/'adapter_config.json').write_text('{}')
    (tmp_path/'adapter_model.bin').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match='has no adapter_model.safetensors'): add_adapter(load(golden), tmp_path)
