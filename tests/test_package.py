"What holds the house together: floors between notebooks, README from index, names the package promises, no machine's paths."
import ast, importlib, importlib.util, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

top = Path(__file__).resolve().parents[1]
notebooks = {p: json.loads(p.read_text(encoding='utf8')) for p in sorted((top/'nbs').glob('[0-9][0-9]*_*.ipynb'))}
cells = {p: [(c['cell_type'], ''.join(c['source'])) for c in nb['cells']] for p,nb in notebooks.items()}
code = {p: '\n'.join(s for kind,s in cs if kind == 'code') for p,cs in cells.items()}
made_in = {m[1]: p for p,s in code.items() if (m := re.search(r'#\|\s*default_exp\s+(\w+)', s))}     # some are pages without a module
modules = {m: ast.parse((top/'resnet_bk'/f'{m}.py').read_text(encoding='utf8')) for m in made_in}

def floor(p): # 04b -> (4, 'b')
    n, letter = re.match(r'(\d+)([a-z]*)_', p.name).groups()
    return int(n), letter

def test_a_notebook_imports_only_lower_ones():
    assert len(made_in) >= 10
    for p,s in code.items():
        for l in s.splitlines():
            if l.lstrip().startswith(('!', '#')) or 'python -m' in l: continue
            for m in re.findall(r'resnet_bk\.(\w+)', l):
                if m in made_in and made_in[m] != p: assert floor(made_in[m]) < floor(p), f'{p.name} imports {m} from {made_in[m].name}'
    for m,tree in modules.items():
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module in made_in:
                assert floor(made_in[n.module]) < floor(made_in[m]), f'{m} imports {n.module} from above'

@pytest.mark.parametrize('module', list(modules))
def test_no_name_of_another_module_is_rebound(module):
    tree, imported = modules[module], set()
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.level and n.module is None: imported |= {a.asname or a.name for a in n.names}
        if isinstance(n, ast.ImportFrom) and n.module == 'resnet_bk': imported |= {a.asname or a.name for a in n.names}
    for n in ast.walk(tree):
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, (ast.AugAssign, ast.AnnAssign)) else []
        for t in (t for target in targets for t in ast.walk(target)):
            if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name): assert t.value.id not in imported, f'{module}, line {n.lineno}: {ast.unparse(t)} is another module\'s'
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == 'setattr' and isinstance(n.args[0], ast.Name):
            assert n.args[0].id not in imported, f'{module}, line {n.lineno}: setattr on {n.args[0].id}'

@pytest.mark.parametrize('p', list(notebooks), ids=lambda p: p.stem)
def test_lines_and_cells_fit_a_page(p):
    for kind,s in cells[p]:
        if kind != 'code' or not s.strip(): continue
        lines = s.splitlines()
        assert len(lines) <= 40, f'{p.name}: a cell of {len(lines)} lines: {lines[0]}'
        long = [l for l in lines if len(l) > 110]
        assert not long, f'{p.name}: {len(long)} lines of more than 110 columns in a cell, the widest {max(map(len, long))}: {long[0][:80]}'

@pytest.mark.parametrize('p', [*notebooks, top/'nbs'/'index.ipynb', top/'README.md'], ids=lambda p: p.stem)
def test_words_of_the_reader(p):
    text = p.read_text(encoding='utf8')
    if p.suffix == '.ipynb': text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    assert not re.search(r'\|\s*wanted\b', text), f'{p.name} has a column "wanted"'
    assert not re.search(r'\bthe seeds\b|\bseeds\' ', text, re.I), f'{p.name} speaks of "the seeds"'

IMPORT = 'import time, torch; t = time.perf_counter(); import resnet_bk.model, sys; print(time.perf_counter() - t, "torch._dynamo" in sys.modules)'
def test_importing_the_model_is_quick():
    said = [subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert all(dynamo == 'False' for _,dynamo in said), 'torch._dynamo is imported'
    assert sorted(float(t) for t,_ in said)[1] < .8, f'seconds after torch: {[t for t,_ in said]}'

def test_readme_is_the_index_notebook():
    spec = importlib.util.spec_from_file_location('readme', top/'.ci'/'readme.py'); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    assert (top/'README.md').read_text(encoding='utf8') == m.readme(), 'run: python .ci/readme.py'

def test_every_notebook_shows_something():
    for p,nb in notebooks.items():
        codes = [c for c in nb['cells'] if c['cell_type'] == 'code']
        out = [o for c in codes for o in c['outputs']]
        assert any('image/png' in o.get('data', {}) for o in out), f'{p.name} has no saved picture'
        assert not any(o['output_type'] == 'error' for o in out), f'{p.name} was saved with an error'
        assert 'colab' in json.dumps(nb['cells'][:3]).lower(), f'{p.name} has no Colab badge'
        slow = [c for c in codes if re.search(r'^#\|\s*slow', ''.join(c['source']), re.M)]
        assert all(c['outputs'] or 'plt' not in ''.join(c['source']) for c in slow), f'{p.name}: a slow cell with a plot was never run'

@pytest.mark.parametrize('module, names', [
    ('native', 'Cpp CppLibrary Call ready check_tensor unwatched register_kernel find_kernel keep_memory'), ('cpu_kernels', 'CppKernels'),
    ('transport', 'transmission scattering ldos lyapunov lead_self_energy'),
    ('bk_core', 'resolvent_diag resolvent_mix get_tridiagonal_inverse_diagonal vmapped_get_diag'), ('mixers', 'BKMixer BKAttention BKFeatureMixer resolvent_attention'), ('fused_layers', 'fused_layer'), ('gauge', 'wilson_line to_frame from_frame BondProjection GaugeMixer GaugeAttention gauge_layer'), ('decoder', 'Decoder'),
    ('moe', 'SparseMoE AnalyticMoELayer AnalyticMoEFunction validate_analytic_gradients MoEResNetBKLayer'),
    ('gradients', 'BKCoreFunction GradBlendOptimizer GradBlendResult MixedPrecisionBKCoreFunction validate_mixed_precision_accuracy benchmark_mixed_precision BatchedAnalyticBKCoreFunction MemoryOptimizedBKCoreFunction profile_batched_gradient'),
    ('dmd', 'dmd spectrum mode_amplitudes continuous hard_threshold optimized_dmd StreamingDMD StateBuffer monomials bumps'),
    ('koopman', 'KoopmanOperator KoopmanResNetBKLayer KoopmanResNetBKBlock KoopmanLanguageModel HybridKoopmanTrainer KoopmanTraining koopman_tail koopman_terms koopman_weight'),
    ('equilibrium', 'EquilibriumPropagationTrainer EquilibriumBKLayer EquilibriumNet EquilibriumLM EquilibriumPropagation KeepBounds TokenFields chain_solve chain_pivots chain_gap gap_bound chain_energy Relaxed'),
    ('quantization', 'pack unpack squeeze unsqueeze choose_scales error_feedback PackedTensor QuantizedLinear QuantizedEmbedding QuantizedMoE quantize second_moments FactoredEmbedding factor_embedding QAT WeightAverage QuantizedBKCore bits_per_parameter promised_bytes'),
    ('pruning', 'prunable importance choose prune Pruning PrunedMoELayer prune_optimizer kept_share measure_energy unit_costs'),
    ('distillation', 'distillation_loss feature_loss layer_map Distillation DistillationTrainer adapt_teacher compare_alone load_teacher'),
    ('compression', 'CompressionPipeline Loaders plan report plot_pareto n_weights bytes_on_disk speed'),
    ('adaptive', 'ACT AdaptiveResNetBKBlock Looped early_exit generate_early ExitLosses on_sites layers_executed'), ('multiscale', 'MultiScaleResNetBKBlock CausalDown CausalUp'), ('sparsity', 'decimated_mix decimate SparseMixer SparseTraining gumbel_sigmoid chain_sites TopPMoE top_p_choice'),
    ('browser', 'Js Html Css browser_file read_browser_file export_browser read_browser_page'), ('system', 'Curriculum Selection TokenNoise Transfer difficulty PacedBatches compare_fixed_compute'), ('gradient_cache', 'cached_backward WholeStepBalance GradientReuse signature'),
    ('distributed', 'on_processes step_bytes scale_table BytesSent ShardedFormat'), ('context', 'context_parallel ContextParallel Processes across part_of split check_context'),
    ('configurable', 'ResNetBKConfig ConfigurableResNetBK switch_callbacks BenchmarkResults benchmark CostEstimate FlopCount Guest CachedGradients BlendedMixer continue_diag nested_block parse_switches'), ('hardware', 'CUDAOptimizedBKCore gpu_check'), ('gauge_cuda', 'FrameKernels'), ('benchmarks', 'gpu_benchmark'), ('checkpoints', 'Checkpointer write_checkpoint newest_checkpoint'), ('stability', 'NumericalStabilityMonitor first_bad_module'),
    ('model', 'Registry ModelConfig ResNetBK ResNetBKBlock load_parts hidden_states take_aux_losses'), ('moe_training', 'MoEBalance'), ('carried_state', 'CarryState detached'), ('physics', 'PhysicsInformedBKLayer EnergyConstraint DualAscent SymplecticSGD leapfrog velocity wave_energy expect_energy prefix_response schrodinger_step energy_layers energy_drift physics_mixer'), ('own_loop', 'MixedPrecisionTrainer capture_step undone'),
    ('learner', 'Learner TrainingMetrics Callback Parallel register_metric register_option'), ('data', 'LMData get_tokenizer Lanes Place'), ('cli', 'bk_train bk_generate bk_compress')])
def test_promised_names(module, names):
    m = importlib.import_module(f'resnet_bk.{module}')
    for n in names.split(): assert (getattr(m, n).__doc__ or '').strip(), f'{module}.{n} is missing or undocumented'

def test_titles_stand_alone():
    for p,nb in notebooks.items():
        title = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
        assert re.fullmatch(r'# [^\n]+\n+> [^\n]+', title.strip()), f'{p.name}: the docs drop whatever shares a cell with the title'

ANNOUNCED = """
import importlib, sys
from resnet_bk import native
for line in sys.argv[1:]:
    name, module = line.split('=')
    importlib.import_module(module)
    assert native._KERNELS.get(tuple(name.split('.'))) is not None, line
"""
def test_kernels_are_where_they_are_announced():
    cfg = ConfigParser(delimiters=['=']); cfg.read(top/'settings.ini', encoding='utf8')
    lines = [l.strip() for l in cfg['DEFAULT']['kernels'].splitlines()]
    assert {'ops.cuda', 'layers.cuda', 'frames.cuda', 'gauge.so3'} <= {l.split('=')[0] for l in lines}
    subprocess.run([sys.executable, '-c', ANNOUNCED, *lines], check=True)

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

@pytest.mark.parametrize('p', [p for p in notebooks if p.stem != 'index'], ids=lambda p: p.stem)
def test_imports_stand_alone(p):
    "Making the site runs every cell that holds an import, however deep, and nothing of what stands before it"
    for kind,s in cells[p]:
        if kind != 'code' or 'google.colab' in s or re.search(r'^#\|\s*eval:\s*false', s, re.M): continue
        body = ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', s, flags=re.M)).body
        imports = lambda n: isinstance(n, (ast.Import, ast.ImportFrom))
        made = re.search(r'^#\|\s*exports?\b', s, re.M) # exported cells run in order
        if not any(map(imports, body)) and (made or not any(map(imports, (m for n in body for m in ast.walk(n))))): continue
        harmless = lambda n: imports(n) or ast.unparse(n).startswith('torch.') or isinstance(n, ast.FunctionDef) and not (made or n.decorator_list)
        odd = [n for n in body if not harmless(n)]
        assert not odd, f'{p.name}: an import beside {ast.unparse(odd[0])[:80]}'

def test_no_page_ends_with_a_shown_export():
    "nbdev looks at the cell after each `exports` cell for its documentation, and fails where there is none"
    for p,cs in cells.items():
        kind, last = cs[-1]
        assert kind != 'code' or not re.search(r'^#\|\s*exports\b', last, re.M), f'{p.name}: use #| export for the last cell'
