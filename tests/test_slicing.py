"Pictures are cut as the official code cuts them."
import math, random

import numpy as np
import pytest
from PIL import Image

from support import GOLDENS
from minicpmv_nb.slicing import cut, plan, to_strip

INPUTS = np.load(GOLDENS/'2.5'/'inputs.npz')


# --- the official algorithm, ported line by line ---------------------------------------------------------------------

def ensure_divide(length, patch_size): return max(round(length / patch_size) * patch_size, patch_size)

def find_best_resize(size, scale, patch_size, allow_upscale=False):
    width, height = size
    if (width * height > scale * scale) or allow_upscale:
        r = width / height
        height = int(scale / math.sqrt(r))
        width = int(height * r)
    return ensure_divide(width, patch_size), ensure_divide(height, patch_size)

def get_refine_size(size, grid, scale, patch_size):
    width, height = size
    grid_x, grid_y = grid
    refine_width, refine_height = ensure_divide(width, grid_x), ensure_divide(height, grid_y)
    best = find_best_resize((refine_width / grid_x, refine_height / grid_y), scale, patch_size, allow_upscale=True)
    return best[0] * grid_x, best[1] * grid_y

def official(width, height, max_slice_nums, scale, patch_size):
    "(size of the overview, grid, size of the enlarged picture), the last two None without slices."
    log_ratio = math.log(width / height)
    multiple = min(math.ceil(width * height / (scale * scale)), max_slice_nums)
    if multiple <= 1: return find_best_resize((width, height), scale, patch_size, allow_upscale=True), None, None
    candidates = [n for n in (multiple - 1, multiple, multiple + 1) if not (n == 1 or n > max_slice_nums)]
    grids = [[m, n // m] for n in candidates for m in range(1, n + 1) if n % m == 0]
    best_grid, min_error = [1, 1], float('inf')
    for grid in grids:
        error = abs(log_ratio - math.log(grid[0] / grid[1]))
        if error < min_error: best_grid, min_error = grid, error
    return find_best_resize((width, height), scale, patch_size), tuple(best_grid), get_refine_size((width, height), best_grid, scale, patch_size)


def random_sizes(n):
    "Of all shapes: a third of them thin, sides from 1 to 4000."
    draw = random.Random(0)
    side = lambda: int(math.exp(draw.uniform(0, math.log(4000))))
    return [(side(), side()) if i % 3 == 0 else (draw.randint(1, 2000), draw.randint(1, 2000)) for i in range(n)]

def ours(width, height, *settings):
    p = plan(width, height, *settings)
    return p.overview, p.grid, p.grid and (p.slice[0]*p.grid[0], p.slice[1]*p.grid[1])

@pytest.mark.parametrize('max_slices', [1, 2, 5, 9, 16])
@pytest.mark.parametrize('scale', [448, 112])
def test_plan_is_the_official_one(max_slices, scale):
    settings = (max_slices, scale, 14)
    differ = [size for size in random_sizes(3000) if ours(*size, *settings) != official(*size, *settings)]
    assert not differ

@pytest.mark.parametrize('size', [(448, 448), (449, 448), (448, 449), (1, 1), (1, 5000), (5000, 1), (896, 896), (1344, 1344), (6000, 4000)])
def test_plan_at_the_borders(size): assert ours(*size, 9, 448, 14) == official(*size, 9, 448, 14)

def test_every_piece_is_whole_patches():
    for size in random_sizes(3000):
        p = plan(*size)
        assert all(side > 0 and side % 14 == 0 for side in (*p.overview, *(p.slice or ())))
        assert p.pieces <= 1 + 9 and len(p.patch_sizes) == p.pieces

def test_patch_sizes_are_height_then_width():
    p = plan(1000, 200)
    assert p.patch_sizes[0] == (p.overview[1]//14, p.overview[0]//14) and p.patch_sizes[0][1] > p.patch_sizes[0][0]


# --- pixels ----------------------------------------------------------------------------------------------------------

# Which pictures the cases of goldens/2.5 show, sample by sample (meta.json, "cases").
SHOWN = {'case0': ['a', 'bc'], 'case1': ['d', 'e'], 'single0': ['a'], 'single1': ['bc']}

def pieces_of(name):
    picture = Image.fromarray(INPUTS[f'image_{name}'])
    p = plan(*picture.size, 9, 112, 14)
    return cut(picture, p), p

@pytest.mark.parametrize('case, row, names', [(case, row, names) for case, rows in SHOWN.items() for row, names in enumerate(rows)])
def test_pixels_are_the_official_ones(case, row, names):
    found = [pieces_of(name) for name in names]
    strips = [to_strip(piece) for pieces, _ in found for piece in pieces]
    sizes = [size for _, p in found for size in p.patch_sizes]
    assert sizes == [tuple(s) for s in INPUTS[f'{case}/tgt_sizes_{row}'].tolist()]
    for k, strip in enumerate(strips):
        pixels = ((strip.astype(np.float32)/np.float32(255)) - np.float32(0.5))/np.float32(0.5)
        assert np.array_equal(pixels, INPUTS[f'{case}/pixel_values_{row}_{k}'])  # bit by bit

def test_goldens_cover_the_shapes_that_matter():
    grids = {name: pieces_of(name)[1].grid for name in 'abcde'}
    assert None in grids.values() and any(g and g[0] > 1 and g[1] > 1 for g in grids.values())

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1', 'I;16'])
def test_any_mode_becomes_rgb(mode):
    picture = Image.fromarray(INPUTS['image_a']).convert(mode.replace('I;16', 'L')).convert(mode)
    assert {piece.mode for piece in cut(picture, plan(*picture.size, 9, 112, 14))} == {'RGB'}

def test_slices_are_row_by_row():
    # A picture whose brightness grows to the right, and much more to the bottom.
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    picture = Image.fromarray(np.repeat((x*0.1 + y)[..., None], 3, -1).astype(np.uint8))
    p = plan(300, 200, 9, 112, 14)
    means = [np.asarray(piece).mean() for piece in cut(picture, p)[1:]]
    assert p.grid == (3, 2) and means == sorted(means)
