"The commands as a shell runs them: artefacts, streaming, Ctrl-C and resume, errors in one line."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

top = Path(__file__).resolve().parents[1]
env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(top), os.environ.get('PYTHONPATH', '')]), MPLBACKEND='Agg')
small = '--d_model 16 --n_layers 1 --context 32 --batch_size 4'.split()
def command(which, *args): return [sys.executable, '-c', f'from resnet_bk.cli import {which}_main; {which}_main()', *args]
def run(which, *args, cwd=None, **kw): return subprocess.run(command(which, *args), capture_output=True, text=True, env=env, cwd=cwd, timeout=300, **kw)

def test_train_then_generate(tmp_path):
    r = run('train', '--steps', '12', *small, cwd=tmp_path); assert r.returncode == 0, r.stderr
    assert {'unigram', 'bigram'} <= set(re.findall('unigram|bigram', r.stdout)) and 'tokens/s' in r.stdout and 'bits per byte' in r.stdout
    out = tmp_path/'bk_run'
    for f in ('model/model.safetensors', 'model/config.json', 'model/tokenizer.json', 'metrics.jsonl', 'loss.png', 'run.json'): assert (out/f).exists(), f
    assert all(json.loads(l) for l in (out/'metrics.jsonl').read_text().splitlines())
    a = run('generate', 'bk_run', '--prompt', 'def f', '--n', '20', '--seed', '1', cwd=tmp_path); assert a.returncode == 0 and a.stdout.startswith('def f'), a.stderr
    b = run('generate', 'bk_run', '--n', '20', '--seed', '1', cwd=tmp_path, input='def f'); assert b.stdout == a.stdout
    assert run('train', '--steps', '2', *small, cwd=tmp_path).returncode == 0 and (tmp_path/'bk_run-2').exists()   # a second run gets a folder of its own

def test_experts(tmp_path):
    r = run('train', '--steps', '8', '--experts', '4', '--top_k', '2', *small, cwd=tmp_path); assert r.returncode == 0 and 'experts unused' in r.stdout, r.stderr
    last = json.loads((tmp_path/'bk_run'/'metrics.jsonl').read_text().splitlines()[-1]); assert len(last['expert_usage'][0]) == 4 and last['routing_entropy'] > 0
    assert json.loads((tmp_path/'bk_run'/'model'/'config.json').read_text())['ffn_kw'] == {'num_experts': 4, 'top_k': 2}
    assert run('generate', 'bk_run', '--prompt', 'def f', '--n', '5', cwd=tmp_path).stdout.startswith('def f')
    r = run('train', '--steps', '2', '--experts', '2', '--top_k', '3', *small, cwd=tmp_path); assert r.returncode == 1 and 'top_k' in r.stderr and 'Traceback' not in r.stderr, r.stderr

def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    p = subprocess.Popen(command('train', '--steps', '100000', *small), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path)
    metrics, end = tmp_path/'bk_run'/'metrics.jsonl', time.time() + 120
    while time.time() < end and not (metrics.exists() and metrics.read_text().count('\n') >= 2): time.sleep(.2)
    p.send_signal(signal.SIGINT); out, _ = p.communicate(timeout=60)
    assert 'bk_train --resume --folder bk_run' in out, out
    at = int(re.search(r'stopped at step (\d+)', out).group(1)); assert at > 0
    r = run('train', '--resume', '--steps', str(at + 5), cwd=tmp_path); assert r.returncode == 0, r.stderr
    assert json.loads(metrics.read_text().splitlines()[-1])['step'] == at + 5

def test_mistakes_are_one_line(tmp_path):
    for which,args,says in (('train', ['--corpus', 'nowhere.txt'], 'nowhere.txt'), ('train', ['--resume'], 'nothing to resume'), ('train', ['--mixer', 'magic', '--steps', '1'], 'magic'),
                            ('generate', ['no_model', '--prompt', 'x'], 'no model'), ('train', ['--folder', '/proc/x', '--steps', '1'], 'cannot write')):
        r = run(which, *args, cwd=tmp_path); assert r.returncode == 1 and says in r.stderr and 'Traceback' not in r.stderr, (args, r.stderr)

def test_help_teaches():
    for which in ('train', 'generate'): r = run(which, '--help'); assert r.returncode == 0 and 'examples:' in r.stdout
