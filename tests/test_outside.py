"A package outside `resnet_bk` adds every kind of part; a run with them is killed, resumed to the same losses, saved, loaded and writes."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

top = Path(__file__).resolve().parents[1]
env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(top), str(top/'tests/outside'), os.environ.get('PYTHONPATH', '')]), MPLBACKEND='Agg', ACCELERATE_USE_CPU='true')
args = '--use bk_outside --preset outside --d_model 16 --n_layers 2 --context 32 --batch_size 4 --steps 40 --checkpoint_every 10'.split() + ['--corpus', str(top/'resnet_bk/model.py')]
def start(which, *args, env=env): return subprocess.Popen([sys.executable, '-m', 'resnet_bk.cli', which, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
def good(*a, **k):
    p = start(*a, **k)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    return out
def losses(folder): return [[m[k] for k in ('step', 'loss_total', 'loss_quiet', 'surprise', 'grad_norm')] for m in map(json.loads, (folder/'metrics.jsonl').read_text().splitlines())]

def test_a_run_with_parts_from_outside(tmp_path):
    assert '--gradient_noise' in good('train', '--use', 'bk_outside', '--help') and '--gradient_noise' not in good('train', '--help')
    out = good('train', *args, '--folder', tmp_path/'whole')
    assert 'batches looked at: 40' in out and len(losses(tmp_path/'whole')) == 4
    cut = tmp_path/'cut'
    p = start('train', *args, '--folder', cut)
    end = time.time() + 240
    while time.time() < end and not list(cut.glob('checkpoints/step-00000020*')): time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (cut/'model').exists(), 'it ended before it was killed'
    assert 'resumed from step-' in good('train', '--resume', '--folder', cut, '--use', 'bk_outside')
    assert losses(cut) == losses(tmp_path/'whole')

    config = json.loads((cut/'model/config.json').read_text())
    assert (config['parts'], config['block'], config['ffn'], config['mixer'][0]) == (['bk_outside'], 'quiet', 'glu', 'decay')
    use = ['--use', 'bk_outside']
    text = good('generate', cut, *use, '--prompt', 'def f', '--n', 8, '--temperature', 0)
    assert text.startswith('def f') and text == good('generate', tmp_path/'whole', *use, '--prompt', 'def f', '--n', 8, '--temperature', 0)
    for which in (['generate', cut, '--prompt', 'def f'], ['train', '--resume', '--folder', cut]): # no file decides what is imported
        p = start(*which)
        _, err = p.communicate(timeout=120)
        assert p.returncode == 1 and 'bk_outside' in err and 'Traceback' not in err, err

def test_no_room_knows_it():
    "The rooms that hold the model, the loop and the commands name neither this package nor the experts"
    for name in ('model', 'learner', 'checkpoints', 'stability', 'cli'):
        text = (top/f'resnet_bk/{name}.py').read_text()
        assert not re.search(r'bk_outside|quiet_weight|gradient_noise|\bmoe\b|moe_|MoE', text), name
