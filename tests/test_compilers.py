"All C++ of the package with every compiler of the list that is installed, with and without OpenMP; a value from another than the usual one."
import os, shutil, subprocess, sys
import pytest, torch
from resnet_bk import native, cpu_kernels, decoder, fused_layers, gauge, gauge_cuda, hardware, sparsity

NAMES = [f'g++-{n}' for n in range(9, 15)] + [f'clang++-{n}' for n in range(14, 20)]
found = [c for c in NAMES if shutil.which(c)] or [c for c in ('g++', 'clang++') if shutil.which(c)]
LIBRARIES = [*cpu_kernels.CORE.values(), *fused_layers.LAYER.values(), *fused_layers.ATTENTION.values(), decoder.DECODE]
LIBRARIES += [l for table in (gauge.GAUGE, gauge.GAUGE_LAYER, gauge.GAUGE_ATTENTION, sparsity.DECIMATED) for l in table.values()]
LIBRARIES += [gauge_cuda.EMULATED_FRAMES.library, hardware.HOST, *(k['cpu'].library for k in (hardware.LAYER_KERNELS, hardware.ATTENTION_KERNELS))]

def _takes(cxx, flag, folder): return native._compiles(cxx, [flag], folder)

def test_which_compilers(capfd):
    with capfd.disabled(): print(f'\ncompilers tried: {", ".join(found)}; not here: {", ".join(c for c in NAMES if c not in found)}')
    if not found: pytest.skip('no C++ compiler')

# without OpenMP the code is the same but for a few lines: the oldest and the newest will do
@pytest.mark.parametrize('cxx, openmp', [(c, True) for c in found] + [(c, False) for c in sorted({found[0], found[-1]})] if found else [])
def test_compiles(cxx, openmp, tmp_path):
    if openmp and not _takes(cxx, '-fopenmp', tmp_path): pytest.skip(f'{cxx} has no OpenMP here')
    flags = [f for f in native._FLAGS if f != '-O3'] + ['-O0', '-fsyntax-only', *(['-fopenmp'] if openmp else [])]
    flags += [native._NATIVE] if _takes(cxx, native._NATIVE, tmp_path) else []
    failed = []
    for l in LIBRARIES:
        (tmp_path/'k.cpp').write_text(l.source)
        r = subprocess.run([cxx, *flags, 'k.cpp'], cwd=tmp_path, capture_output=True, text=True)
        if r.returncode: failed.append(f'{l.name}: {next((e for e in r.stderr.splitlines() if "error" in e), r.stderr[:300])}')
    assert not failed, f'{cxx}: ' + '\n'.join(failed)

VALUE = '''
import torch
from resnet_bk import cpu_kernels
from resnet_bk.bk_core import dense_resolvent, resolvent_diag
assert cpu_kernels.CORE[torch.float64].load() is not None
v = torch.randn(2, 9, 5, dtype=torch.float64)
want = dense_resolvent(v, .3 + .5j).diagonal(dim1=-2, dim2=-1).movedim(1, 2)
assert (resolvent_diag(v, .3 + .5j, backend='cpp') - want).abs().max() < 1e-12
print('equal')
'''

# the rest of the tests runs with the compiler of this machine: here another one, if there is one
@pytest.mark.parametrize('cxx', [c for c in found if native._version(c) != native._version(native.find_compiler())][-1:] or found[:1])
def test_value(cxx, tmp_path):
    env = {**os.environ, 'CXX': shutil.which(cxx), 'TORCH_EXTENSIONS_DIR': str(tmp_path)}
    r = subprocess.run([sys.executable, '-c', VALUE], env=env, capture_output=True, text=True)
    assert r.returncode == 0 and 'equal' in r.stdout, r.stderr[-2000:]
