"A package outside `resnet_bk` adds every kind of part; a run with them is killed, resumed to the same losses, saved, loaded and writes."
import importlib.util, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from resnet_bk.mixers import check_mixer
from resnet_bk.model import ModelConfig

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

@pytest.fixture(scope='module')
def outside():
    spec = importlib.util.spec_from_file_location('bk_outside', top/'tests/outside/bk_outside.py')
    sys.modules['bk_outside'] = m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

@pytest.mark.parametrize('fused', [True, False])
def test_its_mixer_keeps_the_promises_of_one(outside, fused):
    def make(d):
        m = outside.Decay(ModelConfig(2, d))
        m.fused = fused
        return m
    check_mixer(make)

def test_its_kernel_is_the_plain_form(outside):
    if outside.LIBRARY.load() is None: pytest.skip('no compiler')
    torch.manual_seed(0)
    for B,N,D in ((2, 9, 5), (1, 1, 1), (3, 0, 4), (0, 4, 2)):
        x, r, h = torch.randn(B, N, D).double(), torch.rand(D).double(), torch.randn(B, D).double()
        for cut in (None, torch.rand(B, N) < .4):
            ins = [t.clone().requires_grad_() for t in (x, r, h)]
            y, plain = outside.kernel(*ins, cut), outside.average(*ins, cut)
            torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
            if N and B: assert torch.autograd.gradcheck(lambda *a: outside.kernel(*a, cut), ins)
            y32 = outside.kernel(x.float(), r.float(), h.float(), cut)
            torch.testing.assert_close(y32, plain.float(), rtol=1e-5, atol=1e-5)
    for wrong in ((x.float(), r, h), (x, r[:1], h), (x, r, torch.randn(1, 2).double()), (x, r, h, torch.zeros(0, 3, dtype=torch.bool)), (x, r, h, torch.zeros(0, 4))):
        with pytest.raises(ValueError, match='want'): outside.kernel(*wrong, *[None]*(4 - len(wrong)))

def test_an_installed_package_needs_no_use(tmp_path):
    "Its entry points announce it to every command"
    shutil.copytree(top/'tests/outside', tmp_path/'source', ignore=shutil.ignore_patterns('__pycache__'))
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--no-index', '--disable-pip-version-check', '--target', tmp_path/'site', tmp_path/'source']
    subprocess.run(pip, check=True, capture_output=True)
    here = dict(env, PYTHONPATH=os.pathsep.join([str(top), str(tmp_path/'site')]))
    assert '--gradient_noise' in good('train', '--help', env=here)
    run = lambda *a: subprocess.run([sys.executable, *a], env=here, capture_output=True, text=True, check=True).stdout
    assert run('-c', "from resnet_bk.native import find_kernel; print(find_kernel('decay', 'cpu').__module__)").strip() == 'bk_outside'
    assert re.search(r'^decay +the compiled average', run('-m', 'resnet_bk.bench', 'list'), re.M)
    run('-m', 'resnet_bk.bench', 'decay', '--quick', '--threads', '1', '--out', str(tmp_path/'bench.json'))
    (row,) = json.loads((tmp_path/'bench.json').read_text())['results']['decay']['rows']
    assert row['N'] == 64 and row['kernel ms'] > 0 and row['plain ms'] > 0
    mine = args[2:]                                                              # without --use
    good('train', *mine, '--steps', 2, '--folder', tmp_path/'run', env=here)
    assert good('generate', tmp_path/'run', '--prompt', 'def f', '--n', 4, env=here).startswith('def f')
