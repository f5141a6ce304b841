"The fused layers' kernels with narrower vectors than this machine's, against the plain form; and for another architecture, compiled only."
import os, platform, shutil, subprocess, sys
import pytest
from resnet_bk import cpu_kernels, decoder, fused_layers, gauge, native, sparsity

CHECK = '''
import torch
from resnet_bk.fused_layers import LAYER, ATTENTION
from resnet_bk.gauge import GAUGE_ATTENTION, GAUGE_LAYER
from resnet_bk.mixers import BKMixer, BKAttention
from resnet_bk.native import ready
assert ready(*(l[t] for l in (LAYER, ATTENTION, GAUGE_LAYER, GAUGE_ATTENTION) for t in (torch.float32, torch.float64)))
torch.manual_seed(0)
for dtype, tol in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
    for make, gauge in ((BKMixer, 'none'), (BKAttention, 'none'), (BKMixer, 'u1'), (BKAttention, 'u1'), (BKMixer, 'so3'), (BKAttention, 'so3')):
        for B,N,D in ((1, 1, 32), (3, 70, 32), (2, 200, 64), (1, 33, 48)):
            for cutting in (False, True):
                m, res = make(D, gauge=gauge).to(dtype), []
                x, ct = torch.randn(B, N, D, dtype=dtype, requires_grad=True), torch.randn(B, N, D, dtype=dtype)
                cut = torch.rand(B, N) < .2 if cutting else None
                for m.fused in (True, False):
                    y = m(x, cut=cut)
                    res.append([y, *torch.autograd.grad(y, [x, *m.parameters()], ct)])
                for a,b in zip(*res): assert (a - b).norm() <= tol*max(1e-2, b.norm().item()), (dtype, make, gauge, B, N, D, cutting)
print('equal')
'''

@pytest.mark.parametrize('march', ['-march=x86-64', '-march=x86-64-v3'])
def test_narrow_vectors(march, tmp_path):
    if platform.machine() != 'x86_64': pytest.skip('these are builds for x86')
    if 'v3' in march and 'avx2' not in str(native._cpu_key()): pytest.skip('this CPU has no AVX2')
    env = {**os.environ, 'TORCH_EXTENSIONS_DIR': str(tmp_path), 'RESNET_BK_CXXFLAGS': march}      # the last -march counts
    r = subprocess.run([sys.executable, '-c', CHECK], env=env, capture_output=True, text=True)
    assert r.returncode == 0 and 'equal' in r.stdout, r.stderr[-2000:]

LIBRARIES = [*cpu_kernels.CORE.values(), *sparsity.DECIMATED.values(), *gauge.GAUGE.values(), *gauge.GAUGE_LAYER.values(), *gauge.GAUGE_ATTENTION.values(), *fused_layers.LAYER.values(), *fused_layers.ATTENTION.values(), decoder.DECODE]
@pytest.mark.parametrize('library', LIBRARIES, ids=lambda l: l.name)
def test_compiles_for_aarch64(library, tmp_path):
    cxx = shutil.which('aarch64-linux-gnu-g++')
    if not cxx: pytest.skip('no cross compiler (Debian: g++-aarch64-linux-gnu)')
    (tmp_path/'k.cpp').write_text(library.source)
    r = subprocess.run([cxx, *native._FLAGS, '-fopenmp', '-fPIC', '-shared', str(tmp_path/'k.cpp'), '-o', str(tmp_path/'k.so')], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
