"The commands as a shell runs them: artefacts, streaming, interruption and resume, broken pipes, odd surroundings, errors in one line."
import gzip, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

top = Path(__file__).resolve().parents[1]
env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(top), os.environ.get('PYTHONPATH', '')]), MPLBACKEND='Agg',
           ACCELERATE_USE_CPU='true')
small = '--d_model 16 --n_layers 1 --context 32 --batch_size 4'.split()
TEXT = str(top/'resnet_bk/model.py') # a short text: the whole validation part is read at the end of each run
def command(which, *args):
    text = ['--corpus', TEXT] if which == 'train' and not {'--corpus', '--resume', '--help'} & set(args) else []
    return [sys.executable, '-m', 'resnet_bk.cli', which, *text, *args]
def run(which, *args, cwd=None, **kw):
    kw = dict(capture_output=True, text=True, env=env, cwd=cwd, timeout=300) | kw
    return subprocess.run(command(which, *args), **kw)
def good(which, *args, **kw):
    r = run(which, *args, **kw)
    assert r.returncode == 0, r.stderr
    return r
def metrics(folder): return [json.loads(l) for l in (folder/'metrics.jsonl').read_text().splitlines()]
def bpb(out): return float(re.search(r'text: model ([\d.]+)', out).group(1))

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of 12 steps, and what it printed"
    at = tmp_path_factory.mktemp('trained')
    r = good('train', '--steps', '12', *small, cwd=at)
    return at/'bk_run', r.stdout

def test_train_then_generate(trained, tmp_path):
    run_, out = trained
    assert {'unigram', 'bigram'} <= set(re.findall('unigram|bigram', out)) and 'tokens/s' in out and 'bits per byte' in out
    for f in ('model/model.safetensors', 'model/config.json', 'model/tokenizer.json', 'model/README.md', 'metrics.jsonl', 'loss.png', 'run.json'): assert (run_/f).exists(), f
    card = (run_/'model/README.md').read_text()
    assert all(w in card for w in ('bigram floor', f'{bpb(out):.3f}', 'license: unknown', 'load_tokenizer'))
    a = good('generate', run_, '--prompt', 'def f', '--n', '20', '--seed', '1')
    assert a.stdout.startswith('def f')
    assert good('generate', run_, '--n', '20', '--seed', '1', input='def f').stdout == a.stdout
    assert good('generate', run_/'checkpoints/step-00000012', '--prompt', 'def f', '--n', '20', '--seed', '1').stdout == a.stdout
    code = re.search('```python\n(.*?)```', card, re.S).group(1).replace('FOLDER', str(run_/'model'))
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.returncode == 0 and 'def ' in r.stdout, r.stderr

def test_generate_ends_quietly_when_nobody_reads(trained):
    p = subprocess.Popen(command('generate', str(trained[0]), '--prompt', 'def f', '--n', '100000'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    p.stdout.read(5)
    p.stdout.close()
    err = p.stderr.read().decode()
    assert p.wait(60) == 0 and 'Traceback' not in err and 'rror' not in err, err

@pytest.mark.parametrize('encoding', ['utf-8:strict', 'utf-8:surrogateescape', 'ascii:strict', 'latin-1'])
def test_cut_characters_and_narrow_terminals(tmp_path, encoding):
    "A prompt that ends in half a character, read by whatever encoding the process inherits"
    (tmp_path/'novel.txt').write_text('a café noir, une idée.\n'*3000, encoding='utf-8')
    for kind in ('bytes', 'bpe') if encoding == 'utf-8:strict' else ('bytes',):
        good('train', '--corpus', 'novel.txt', '--tokenizer', kind, '--steps', '4', '--folder', kind, *small, cwd=tmp_path)
        r = run('generate', kind, '--n', '3', cwd=tmp_path, input='a café'.encode()[:6], text=False, env=env | dict(PYTHONIOENCODING=encoding))
        assert r.returncode == 0 and b'Traceback' not in r.stderr and r.stdout.startswith(b'a caf'), r.stderr

def test_trains_on_when_nobody_reads(tmp_path):
    "Standard output is closed before the first step, and in mid-run: the model is saved all the same"
    for lines in (1, 6):
        folder = tmp_path/f'run{lines}'
        p = subprocess.Popen(command('train', '--steps', '60', '--folder', str(folder), *small), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        for _ in range(lines): p.stdout.readline()
        p.stdout.close()
        err = p.stderr.read().decode()
        assert p.wait(120) == 0 and 'Traceback' not in err, err
        assert (folder/'model/model.safetensors').exists() and metrics(folder)[-1]['step'] == 60

def test_experts(tmp_path):
    r = good('train', '--steps', '8', '--experts', '4', '--top_k', '2', *small, cwd=tmp_path)
    assert 'experts unused' in r.stdout
    last = metrics(tmp_path/'bk_run')[-1]
    assert len(last['expert_usage'][0]) == 4 and last['routing_entropy'] > 0
    config = json.loads((tmp_path/'bk_run/model/config.json').read_text())
    assert (config['ffn'], config['ffn_kw']) == ('moe', {'num_experts': 4, 'top_k': 2})
    assert good('generate', 'bk_run', '--prompt', 'def f', '--n', '5', cwd=tmp_path).stdout.startswith('def f')

def test_energy(tmp_path):
    two = [*small, '--n_layers', '2']
    r = good('train', '--steps', '8', '--mixer', 'physics', '--energy', '1e-4', *two, cwd=tmp_path)
    assert 'energy drift: multiplier' in r.stdout
    last = metrics(tmp_path/'bk_run')[-1]
    assert last['energy_drift'] > 0 and last['lagrange_multiplier'] >= 0 and last['loss_energy'] > 0
    assert good('generate', 'bk_run', '--prompt', 'def f', '--n', '5', cwd=tmp_path).stdout.startswith('def f')

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopped_saved_resumed(tmp_path, sig):
    "Ctrl-C and a scheduler: a checkpoint that can write, and a run that goes on"
    p = subprocess.Popen(command('train', '--steps', '100000', *small), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path)
    file, end = tmp_path/'bk_run/metrics.jsonl', time.time() + 120
    while time.time() < end and not (file.exists() and file.read_text().count('\n') >= 2): time.sleep(.2)
    p.send_signal(sig)
    out, _ = p.communicate(timeout=60)
    assert p.returncode == 0 and 'bk_train --resume --folder bk_run' in out, out
    at = int(re.search(r'stopped at step (\d+)', out).group(1))
    assert at > 0
    assert good('generate', 'bk_run', '--prompt', 'def f', '--n', '5', cwd=tmp_path).stdout.startswith('def f')
    good('train', '--resume', '--steps', str(at + 5), cwd=tmp_path)
    assert metrics(tmp_path/'bk_run')[-1]['step'] == at + 5

def test_killed_before_the_first_checkpoint(tmp_path):
    "The stored budget is used, and the run begins anew"
    p = subprocess.Popen(command('train', '--steps', '30', '--folder', 'run', *small), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=tmp_path)
    file, end = tmp_path/'run/metrics.jsonl', time.time() + 120
    while time.time() < end and not (file.exists() and file.read_text()): time.sleep(.02)
    p.kill()
    p.communicate()
    r = good('train', '--resume', '--folder', 'run', cwd=tmp_path)
    assert metrics(tmp_path/'run')[-1]['step'] == 30, r.stdout

def test_two_at_once_take_two_folders(tmp_path):
    start = lambda seed: subprocess.Popen(command('train', '--steps', '20', '--seed', seed, '--tokenizer', 'chars', *small), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    for p in [start('1'), start('2')]: assert p.wait(240) == 0, p.stderr.read()
    for name in ('bk_run', 'bk_run-2'): assert [m['step'] for m in metrics(tmp_path/name)] == [10, 20]
    assert {json.loads((tmp_path/n/'run.json').read_text())['seed'] for n in ('bk_run', 'bk_run-2')} == {1, 2}

def test_changed_text(tmp_path):
    "The tokenizer of the run is used, and a text that has changed is refused"
    text = tmp_path/'t.txt'
    text.write_text('bad cab fed deaf\n'*4000)
    good('train', '--corpus', 't.txt', '--tokenizer', 'chars', '--steps', '40', '--lr', '0.02', '--folder', 'run', *small, cwd=tmp_path)
    text.write_text(text.read_text().replace('b', 'x'))
    r = run('train', '--resume', '--folder', 'run', '--steps', '50', cwd=tmp_path)
    assert r.returncode == 1 and 'this is not the run of the checkpoint' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    text.write_text(text.read_text().replace('x', 'b'))
    good('train', '--resume', '--folder', 'run', '--steps', '50', cwd=tmp_path)

def test_no_sample_where_none_can_be_written(tmp_path):
    r = run('train', '--mixer', 'diag', '--steps', '4', *small, cwd=tmp_path)
    assert r.returncode == 0 and (tmp_path/'bk_run/model/config.json').exists() or r.returncode == 1 and not (tmp_path/'bk_run').exists(), r.stderr
    assert 'Traceback' not in r.stderr

def test_mistakes_are_one_line_and_write_nothing(tmp_path):
    text = 'the cat sat on the mat\n'*900
    (tmp_path/'a.txt.gz').write_bytes(gzip.compress(text.encode()))
    (tmp_path/'u.txt').write_bytes(text.encode('utf-16'))
    before = set(tmp_path.iterdir())
    cases = (
            ('train', ['--corpus', 'nowhere.txt'], 'nowhere.txt'), ('train', ['--resume'], 'nothing to resume'),
            ('train', ['--mixer', 'magic', '--steps', '1'], 'magic'), ('generate', ['no_model', '--prompt', 'x'], 'no model'),
            ('train', ['--folder', '/proc/x', '--steps', '1'], 'cannot write'), ('train', ['--steps', '0'], 'positive number of steps'),
            ('train', ['--corpus', 'a.txt.gz', '--steps', '2'], 'a.txt.gz'), ('train', ['--corpus', 'u.txt', '--steps', '2'], 'u.txt'),
            ('train', ['--corpus', '', '--steps', '2'], 'corpus'), ('train', ['--prompt', '', '--steps', '2'], 'prompt is empty'),
            ('train', ['--preset', 'huge'], "no preset 'huge'"), ('train', ['--use', 'no_such_module'], '--use no_such_module'),
            ('train', ['--experts', '2', '--top_k', '3', '--steps', '2'], 'top_k'),
            ('train', ['--experts', '2', '--ffn_mult', '3', '--steps', '2'], '--experts'),
            ('train', ['--energy', '0.1', '--steps', '2'], 'two or more PhysicsInformedBKLayers'),
            ('train', ['--energy', '-1', '--steps', '2'], '--energy wants 0 or more'))
    r = subprocess.run([sys.executable, '-c', MISTAKES, json.dumps(cases)], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert r.returncode == 0 and r.stdout.split('\n')[-2] == f'{len(cases)} refused', r.stdout + r.stderr
    assert set(tmp_path.iterdir()) == before
    r = run('train', '--corpus', 'nowhere.txt', cwd=tmp_path)
    assert r.returncode == 1 and 'nowhere.txt' in r.stderr and 'Traceback' not in r.stderr

# one process, since most of a command that fails is the import of torch
MISTAKES = '''
import json, sys
from pathlib import Path
from resnet_bk.cli import generate_main, train_main
before, cases = set(Path('.').iterdir()), json.loads(sys.argv[1])
for which, args, says in cases:
    try: dict(train=train_main, generate=generate_main)[which](args)
    except SystemExit as e: assert isinstance(e.code, str) and says in e.code and '\\n' not in e.code.strip(), (args, e.code)
    else: raise AssertionError(f'{args} passed')
    assert set(Path('.').iterdir()) == before, args
print(f'{len(cases)} refused')
'''

def test_options_with_resume(trained):
    r = run('train', '--resume', '--folder', str(trained[0]), '--lr', '5', '--d_model', '64', '--steps', '20')
    assert r.returncode == 1 and '--lr 5.0 (it has 0.003), --d_model 64 (it has 16)' in r.stderr, r.stderr

def test_damaged_weights(trained, tmp_path):
    import shutil
    shutil.copytree(trained[0]/'model', tmp_path/'model')
    with open(tmp_path/'model/model.safetensors', 'r+b') as f: f.truncate(99)
    r = run('generate', str(tmp_path/'model'), '--prompt', 'x')
    assert r.returncode == 1 and 'model.safetensors' in r.stderr and 'Traceback' not in r.stderr, r.stderr

def test_torchrun(tmp_path):
    "Two processes: one folder, one model, the losses of one process with the same global batch"
    args = command('train', '--steps', '20', '--quiet', *small)[1:]
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', *args], capture_output=True, text=True, cwd=tmp_path,
                       env=env | dict(OMP_NUM_THREADS='1'), timeout=300)
    assert r.returncode == 0, r.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['bk_run'] and r.stdout.count('bits per byte') == 1 and '2 processes' in r.stdout
    good('train', '--steps', '20', '--quiet', '--accumulate', '2', '--folder', 'one', *small, cwd=tmp_path)
    for p,q in zip(metrics(tmp_path/'bk_run'), metrics(tmp_path/'one')): assert abs(p['loss_total'] - q['loss_total']) < 1e-5

def test_a_carried_state(tmp_path):
    "Two processes, each with its own lanes, read as one does; a pair goes on as one process; what cannot be is one line, before anything is written"
    args = ['--carry_state', '--steps', '20', '--checkpoint_every', '10', '--eval_every', '10', '--quiet', '--folder', 'two', *small]
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', *command('train', *args)[1:]], capture_output=True, text=True, cwd=tmp_path,
                       env=env | dict(OMP_NUM_THREADS='1'), timeout=300)
    assert r.returncode == 0, r.stderr
    good('train', *[{'two': 'one'}.get(a, a) for a in args], '--accumulate', '2', cwd=tmp_path)
    for folder, more in (('two', ['--accumulate', '2']), ('one', [])): good('train', '--resume', '--folder', folder, '--steps', '30', '--quiet', *more, cwd=tmp_path)
    a, b = (metrics(tmp_path/f) for f in ('one', 'two'))
    assert len(a) == len(b) == 3
    for p,q in zip(a, b):
        for k in ('loss_total', 'valid_nats'): assert abs(p[k] - q[k]) < 1e-5, k
    good('train', '--carry_state', '--lanes', '16', '--steps', '3', '--quiet', '--folder', 'more', *small, cwd=tmp_path)
    for bad, why in (('--carry_state --mixer diag', 'keeps no state'), ('--lanes 8', 'wants --carry_state'), ('--carry_state --lanes 6', 'lanes=6: give a multiple of 4'),
                     ('--carry_state --lanes 40000', 'do not fill 40000 lanes')):
        r = run('train', *bad.split(), '--steps', '3', '--folder', 'bad', *small, cwd=tmp_path)
        assert r.returncode == 1 and why in r.stderr and 'Traceback' not in r.stderr and not (tmp_path/'bad').exists(), r.stderr

def test_dry_run(tmp_path):
    r = good('train', '--dry_run', '--minutes', '2', *small, cwd=tmp_path)
    assert all(w in r.stdout for w in ('ms a step', 'peak memory', 'nothing was written', 'bigram')) and not list(tmp_path.iterdir())

def test_tracking(tmp_path):
    pytest.importorskip('tensorboard')
    good('train', '--steps', '20', '--track', 'tensorboard', '--folder', 'run', *small, cwd=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path/'run/resnet_bk')).Reload()
    assert [e.step for e in events.Scalars('loss_lm')] == [10, 20]

def test_help_teaches():
    for which in ('train', 'generate'):
        r = good(which, '--help')
        assert 'examples:' in r.stdout
