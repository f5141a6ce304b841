"One configuration for all: the ledger against what notebooks printed, presets on the command line, a light import."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from resnet_bk.configurable import CONFIGS, LEDGER

top = Path(__file__).resolve().parents[1]
env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(top), os.environ.get('PYTHONPATH', '')]), MPLBACKEND='Agg', ACCELERATE_USE_CPU='true')

def printed(notebook):
    outs = (o for c in json.loads((top/'nbs'/f'{notebook}.ipynb').read_text(encoding='utf8'))['cells'] for o in c.get('outputs', []))
    return '\n'.join(''.join(o.get('text', []) or o.get('data', {}).get('text/plain', [])) for o in outs)

@pytest.mark.parametrize('f', LEDGER, ids=lambda f: f.switch)
def test_the_ledger_says_what_a_notebook_printed(f):
    said = printed(f.where)
    assert f.said in said, f'{f.where} no longer prints {f.said!r}: bring the line of {f.switch} in the LEDGER of 13_configurable up to date'
    assert f.measured is None or f.measured > 0

@pytest.mark.parametrize('f', [f for f in LEDGER if f.measured is not None], ids=lambda f: f.switch)
def test_the_factor_comes_from_numbers_that_are_printed(f):
    ns = {float(n.replace(',', '')) for n in re.findall(r'\d[\d,]*\.?\d*', printed(f.where)) if n.strip(',')}
    in_line = [float(n.replace(',', '')) for n in re.findall(r'\d[\d,]*\.?\d*', f.said)]
    ratios = in_line + [a/b for a in ns for b in in_line if b] + [b/a for a in ns for b in in_line if a]
    assert any(abs(r - f.measured) < 1e-9*f.measured for r in ratios), f'{f.measured} is neither in the line nor a ratio with a number of it'

USE = ['--use', 'resnet_bk.configurable'] # as long as the package was not installed anew, its entry point is missing
SMALL = '--steps 2 --context 24 --batch_size 4 --d_model 16 --quiet --eval_every 0'.split()
def cli(*args, cwd): return subprocess.run([sys.executable, '-m', 'resnet_bk.cli', *args], capture_output=True, text=True, env=env, cwd=cwd, timeout=300)

@pytest.mark.parametrize('name', ['step2', 'full'])
def test_a_preset_trains_and_writes_from_the_command_line(name, tmp_path):
    (tmp_path/'text.txt').write_text('Had we but world enough, and time, this coyness, lady, were no crime. '*80)
    r = cli('train', *USE, '--preset', name, '--corpus', 'text.txt', '--prompt', 'Had', *SMALL, '--folder', 'run', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path/'run'/'model'/'config.json').read_text())['block'] == ('nested' if name == 'full' else 'prenorm')
    r = cli('generate', 'run', *USE, '--prompt', 'Had', '--n', '5', cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.startswith('Had'), r.stderr

def test_what_does_not_go_together_is_one_line(tmp_path):
    r = cli('train', *USE, '--switches', 'use_moe', '--experts', '2', '--dry_run', cwd=tmp_path)
    assert r.returncode == 1 and r.stderr.strip().splitlines()[-1].endswith('give one of them'), r.stderr

def test_import_brings_no_optional_package():
    code = 'import sys; from resnet_bk.configurable import *; print([m for m in ("torchao", "datasets", "accelerate", "transformers", "torch._dynamo") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True).stdout.strip() == '[]'

def test_every_preset_is_offered():
    from resnet_bk.learner import PRESETS
    assert set(CONFIGS) <= set(PRESETS)
