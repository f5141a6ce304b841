"What holds the house together: floors between notebooks, README from index, names the package promises, no machine's paths."
import importlib, importlib.util, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

top = Path(__file__).resolve().parents[1]
notebooks = {p: json.loads(p.read_text(encoding='utf8')) for p in sorted((top/'nbs').glob('[0-9][0-9]_*.ipynb'))}
code = {p: '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code') for p,nb in notebooks.items()}
made_in = {re.search(r'#\|\s*default_exp\s+(\w+)', s).group(1): p for p,s in code.items()}

UPWARDS = {('01_bk_core', 'hardware'), ('10_hardware', 'benchmarks')}   # looked up when called, never imported with the module: a backend's plug-in, the rivals of a command

def test_a_notebook_imports_only_lower_ones():
    assert len(made_in) >= 7
    for p,s in code.items():
        for m in set(re.findall(r'resnet_bk\.(\w+)', s)):
            if m in made_in and made_in[m] != p and (p.stem, m) not in UPWARDS: assert made_in[m].name < p.name, f'{p.name} imports {m} from {made_in[m].name}'
    for stem,m in UPWARDS:
        found = [l for p,s in code.items() if p.stem == stem for l in s.splitlines() if f'resnet_bk.{m}' in l and 'python -m' not in l]
        assert found and all('import_module' in l for l in found), f'{stem} names {m} other than at the call: {found}'

def test_readme_is_the_index_notebook():
    spec = importlib.util.spec_from_file_location('readme', top/'.ci'/'readme.py'); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    assert (top/'README.md').read_text(encoding='utf8') == m.readme(), 'run: python .ci/readme.py'

def test_every_notebook_shows_something():
    for p,nb in notebooks.items():
        cells = [c for c in nb['cells'] if c['cell_type'] == 'code']; out = [o for c in cells for o in c['outputs']]
        assert any('image/png' in o.get('data', {}) for o in out), f'{p.name} has no saved picture'
        assert not any(o['output_type'] == 'error' for o in out), f'{p.name} was saved with an error'
        assert max(len(''.join(c['source']).splitlines()) for c in cells) <= 40, f'{p.name} has a cell of more than 40 lines'
        assert 'colab' in json.dumps(nb['cells'][:3]).lower(), f'{p.name} has no Colab badge'
        slow = [c for c in cells if re.search(r'^#\|\s*slow', ''.join(c['source']), re.M)]
        assert all(c['outputs'] or 'plt' not in ''.join(c['source']) for c in slow), f'{p.name}: a slow cell with a plot was never run'

@pytest.mark.parametrize('module, names', [
    ('bk_core', 'resolvent_diag resolvent_mix get_tridiagonal_inverse_diagonal vmapped_get_diag'), ('mixers', 'BKMixer BKAttention resolvent_attention'),
    ('moe', 'SparseMoE AnalyticMoELayer AnalyticMoEFunction validate_analytic_gradients MoEResNetBKLayer'),
    ('gradients', 'BKCoreFunction GradBlendOptimizer GradBlendResult MixedPrecisionBKCoreFunction validate_mixed_precision_accuracy benchmark_mixed_precision BatchedAnalyticBKCoreFunction MemoryOptimizedBKCoreFunction profile_batched_gradient'),
    ('hardware', 'CUDAOptimizedBKCore MixedPrecisionTrainer gpu_check gpu_benchmark'),
    ('model', 'ModelConfig ResNetBK ResNetBKBlock Decoder'), ('learner', 'Learner TrainingMetrics NumericalStabilityMonitor'), ('data', 'LMData get_tokenizer'), ('cli', 'bk_train bk_generate')])
def test_promised_names(module, names):
    m = importlib.import_module(f'resnet_bk.{module}')
    for n in names.split(): assert (getattr(m, n).__doc__ or '').strip(), f'{module}.{n} is missing or undocumented'

def test_titles_stand_alone():
    for p,nb in notebooks.items():
        title = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
        assert re.fullmatch(r'# [^\n]+\n+> [^\n]+', title.strip()), f'{p.name}: the docs drop whatever shares a cell with the title'

def test_settings():
    cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini', encoding='utf8'); cfg = cfg['DEFAULT']
    assert cfg['tst_flags'].split() == ['notest', 'slow', 'cuda'] and 'torch>=2.6,<2.14' in cfg['requirements'].split() and 'nbdev==2.4.14' in cfg['dev_requirements'].split()
    assert (top/'nbs'/'_quarto.yml').is_symlink() and (top/'resnet_bk'/'py.typed').exists()

def test_no_paths_of_a_machine():
    files = subprocess.run(['git', 'ls-files'], cwd=top, capture_output=True, text=True).stdout.split()
    for f in files:
        if f.endswith(('.png', '.svg')) or f == 'tests/test_package.py': continue
        text = re.sub(r'"image/png": "[^"]*"', '', (top/f).read_text(encoding='utf8', errors='ignore'))     # base64 may spell anything
        assert not re.search(r'/(home|Users|root|work|opt)/\w', text), f'{f} names a path of somebody\'s machine'
