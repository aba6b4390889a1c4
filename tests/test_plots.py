"Figures of runs: nothing is lost, nothing hidden, and no global state touched."
import json, math, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from minicpmv_nb.config import lora, save_config, write_json
from minicpmv_nb.plots import DASHBOARD, DASHES, MARKERS, RUN_COLOURS, Record, compare_runs, draw, plot_dashboard, plot_metrics, plot_run, rate_names, read_record, running_mean, thin, worked


def line(n, start=100.0, **also): return [dict(step=s, time=start+s, loss=2/s, learning_rate=1e-4, **also) for s in range(1, n+1)]

def write(folder, metrics, log='', **status):
    "A run folder with these numbers."
    folder.mkdir(exist_ok=True)
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(m) + '\n' for m in metrics))
    if log: (folder/'log.txt').write_text(log)
    if status: write_json(folder/'status.json', status)
    return folder

def labels(ax): return ax.get_legend_handles_labels()[1]

def drawn_points(ax, label): return next(l for l in ax.lines if l.get_label() == label).get_xydata()


def test_a_running_mean_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=500)
    for reach in (0, 1, 7, 600):
        r = [min(reach, i, 499-i) for i in range(500)]
        assert np.allclose(running_mean(values, reach), [values[i-k:i+k+1].mean() for i, k in enumerate(r)])

def test_a_long_run_is_thinned_and_keeps_its_peaks(tmp_path):
    metrics = [dict(step=s, loss=1.0) for s in range(100_000)]
    metrics[54_321]['loss'], metrics[54_400]['loss'] = 9.0, .01
    fig = plot_metrics(metrics, show=['loss'], smooth=0)
    points = drawn_points(fig.axes[0], 'training, each logged step')
    assert len(points) <= 2000 and [54_321, 9.0] in points.tolist() and [54_400, .01] in points.tolist()
    fig.save(tmp_path/'long.svg')
    assert (tmp_path/'long.svg').stat().st_size < 200_000
    assert [len(x) for x in thin(range(2000), range(2000))] == [2000, 2000] # nothing to do

def test_what_has_no_place_is_marked():
    metrics = [dict(step=1, loss=1.0), dict(step=2, loss=math.nan), dict(step=3, loss=0.0), dict(step=4, loss=math.inf)]
    ax = plot_metrics(metrics, show=['loss'], log=True).axes[0]
    assert drawn_points(ax, 'not a number')[:, 0].tolist() == [2, 4] and drawn_points(ax, 'zero or below')[:, 0].tolist() == [3]
    linear = plot_metrics(metrics, show=['loss']).axes[0]
    assert 'zero or below' not in labels(linear) and drawn_points(linear, 'training, each logged step').tolist() == [[1, 1], [3, 0]]

@pytest.mark.parametrize('metrics', [[dict(step=1, loss=.5)], [dict(step=7, eval_loss=.5)], [dict(step=1, loss=0.0)], [dict(step=1, loss=math.nan)]])
@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('resumed', [[], [1]])
def test_small_and_odd_runs_are_drawn(metrics, log, resumed, recwarn):
    assert draw([Record('r', metrics, resumed=resumed)], log=log)._repr_png_().startswith(b'\x89PNG')
    assert not recwarn.list

def test_a_single_point_can_be_seen():
    assert plot_metrics(line(1)).axes[0].lines[0].get_marker() == '.'

def test_nothing_logged_is_an_error_in_words(tmp_path):
    (tmp_path/'new').mkdir()
    for call in (plot_run, plot_dashboard):
        with pytest.raises(ValueError, match='Nothing is logged yet'): call(tmp_path/'new')
    with pytest.raises(FileNotFoundError, match='There is no folder'): plot_run(tmp_path/'gone')
    with pytest.raises(ValueError, match='no curve lsos: choose among loss'): plot_metrics(line(3), show=['lsos'])
    with pytest.raises(ValueError, match='over step or time'): plot_metrics(line(3), x='epoch')

@pytest.mark.parametrize('kind,begins', [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_kinds_of_files(tmp_path, kind, begins):
    plot_dashboard(write(tmp_path/'run', line(50, grad_norm=1.0)), tmp_path/f'all.{kind}')
    assert (tmp_path/f'all.{kind}').read_bytes().startswith(begins)

def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match='written as .png, .svg or .pdf'): plot_run(write(tmp_path/'run', line(5)), tmp_path/'loss.doc')

def test_marks_come_from_the_folder(tmp_path):
    folder = write(tmp_path/'run', line(10) + [dict(step=6, time=106, eval_loss=.4), dict(step=10, time=110, eval_loss=.5)], 'resuming from /x/checkpoint-4\nsaid: resuming from checkpoint-9 is possible\n', state='done', best_step=6)
    for name in ('checkpoint-4', 'checkpoint-8', 'checkpoint-old'): (folder/name).mkdir()
    record = read_record(folder)
    assert (record.resumed, record.saved, record.best) == ([4], [4, 8], 6)
    ax = plot_run(folder).axes[0]
    assert {'resumed', 'checkpoint', 'best evaluation'} <= set(labels(ax)) and drawn_points(ax, 'best evaluation').tolist() == [[6, .4]]
    assert not {'resumed', 'checkpoint', 'best evaluation'} & set(labels(plot_metrics(line(10)).axes[0]))

def test_a_pause_is_no_work():
    metrics = [dict(step=s, time=s + (1000 if s > 4 else 0), loss=1) for s in range(1, 8)]
    assert worked(metrics, [4])[-1] == 5 and worked(metrics)[-1] == 1006
    ends = [draw([Record('r', metrics, resumed)], ['loss'], x='time').axes[0].lines[0].get_xdata()[-1] for resumed in ([4], [])]
    assert ends == pytest.approx([5/60, 1006/60])

def test_rates_are_named_by_the_configuration(tmp_path):
    cfg = lora('m', 't', learning_rate=1e-4, vision_learning_rate=2e-6, resampler_learning_rate=1e-5, loraplus_ratio=16)
    assert rate_names([5e-7, 1e-6, 2.5e-6, 8e-4, 5e-5][1:], cfg) == {'language model, B': 2, 'language model': 3, 'resampler': 1, 'vision tower': 0}
    folder = write(tmp_path/'run', line(5, learning_rates=[1e-4, 1e-5, 1e-5, 2e-6]))
    assert labels(plot_run(folder).axes[1]) == ['group 0', 'group 1, 2', 'group 3']
    save_config(lora('m', 't', learning_rate=1e-4, vision_learning_rate=2e-6, resampler_learning_rate=1e-5), folder/'config.json')
    assert labels(plot_run(folder).axes[1]) == ['language model', 'resampler', 'vision tower']
    assert labels(plot_metrics(line(5)).axes[1]) == []

def test_runs_side_by_side_differ_without_colour(tmp_path):
    folders = [write(tmp_path/f'run{i}', line(60+i) + [dict(step=30, time=1, eval_loss=.1)]) for i in range(6)]
    ax = compare_runs(folders).axes[0]
    curves = [l for l in ax.lines if l.get_label().startswith('run')]
    assert [l.get_label() for l in curves] == [f'run{i}' for i in range(6)]
    assert len({(str(l._unscaled_dash_pattern)) for l in curves}) == 6 and len({l.get_marker() for l in curves}) == 6
    grey = sorted(np.dot(to_rgb(c), (.299, .587, .114)) for c in RUN_COLOURS)
    assert grey[-1] < .75 and len(set(RUN_COLOURS)) == 7 # dark enough for white paper
    assert len({(RUN_COLOURS[i % 7], MARKERS[i % 8], DASHES[i % 6]) for i in range(40)}) == 40

def test_a_run_without_numbers_is_named(tmp_path):
    (tmp_path/'new').mkdir()
    assert 'new: nothing logged' in labels(compare_runs([write(tmp_path/'run', line(5)), tmp_path/'new']).axes[0])

def test_names_are_not_formulas(tmp_path):
    folders = [write(tmp_path/name, line(5)) for name in ('_a_$x^$', 'cost_$', 'x'*90)]
    fig = compare_runs(folders)
    fig._repr_png_()
    shown = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert shown[:2] == ['_a_$x^$', 'cost_$'] and len(shown[2]) == 32
    plot_run(folders[0])._repr_png_()

def test_threads_draw_the_same_figure():
    metrics = line(300, grad_norm=1.0, tokens_per_second=5.0, memory_gb=2.0)
    with ThreadPoolExecutor(4) as pool: pictures = list(pool.map(lambda _: plot_metrics(metrics, show=DASHBOARD)._repr_png_(), range(4)))
    assert len(set(pictures)) == 1

def test_pyplot_is_left_alone():
    code = "import sys; from minicpmv_nb.plots import plot_metrics; plot_metrics([dict(step=1, loss=1.0)])._repr_png_(); print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['False', 'False']

def test_one_curve_by_its_name():
    metrics = [dict(step=i, loss=1/i, time=float(i)) for i in (1, 2, 3)]
    assert [ax.get_ylabel() for ax in plot_metrics(metrics, show='loss').axes] == ['loss per taught token']
    with pytest.raises(ValueError, match='There is no curve los: choose among loss'): plot_metrics(metrics, show='los')
