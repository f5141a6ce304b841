"What a notebook cannot show of the operators: two processes, the command line, a run that goes on."
import json, os, subprocess, sys
from pathlib import Path
import pytest

top = Path(__file__).resolve().parents[1]
ARGS = ['--corpus', str(top/'resnet_bk'/'model.py'), '--d_model', '32', '--n_layers', '2', '--koopman', '48', '--steps', '12', '--context', '32',
        '--eval_every', '0', '--device', 'cpu']

def train(folder, *args, processes=0):
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(processes)] if processes else [sys.executable]
    r = subprocess.run([*start, '-m', 'resnet_bk.cli', 'train', *args, '--folder', str(folder)], capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-2000:]
    return [json.loads(l) for l in (folder/'metrics.jsonl').read_text().splitlines()]

def test_two_processes_train_as_one(tmp_path):
    one, two = train(tmp_path/'one', *ARGS, '--batch_size', '4'), train(tmp_path/'two', *ARGS, '--batch_size', '2', processes=2)
    assert [m['step'] for m in one] == [m['step'] for m in two]
    for a,b in zip(one, two): assert a['loss_lm'] == pytest.approx(b['loss_lm'], abs=2e-3)
    assert one[-1]['koopman_weight'] == two[-1]['koopman_weight'] > 0
    for m in (one[-1], two[-1]): assert 0 < m['koopman_prediction'] < 1

def test_bad_options_are_said_before_anything_is_written(tmp_path):
    for args,why in ((['--koopman', '32'], 'more observables than --d_model = 32'), (['--koopman', '-1'], '0 or more')):
        r = subprocess.run([sys.executable, '-m', 'resnet_bk.cli', 'train', *ARGS[:4], *args, '--folder', str(tmp_path/'x')], capture_output=True, text=True)
        assert r.returncode == 1 and why in r.stderr and not (tmp_path/'x').exists(), r.stderr
