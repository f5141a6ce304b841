"First use: an empty, damaged or forbidden cache, no home, several processes at once. And right values of small faults seen before."
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch.func import functional_call, grad, vmap
from resnet_bk.mixers import BKAttention, BKMixer

OP = '''
import torch
from resnet_bk.cpu_kernels import CORE
from resnet_bk.bk_core import resolvent_diag
assert torch.allclose(resolvent_diag(torch.zeros(1, 1, 2), 1j).imag, torch.tensor(.2), atol=1e-6)
print('kernel' if CORE[torch.float32].load() is not None else 'no kernel')
'''
def start(env, code=OP, **kw):
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)
def end(p):
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-2000:]
    return out, err

@pytest.fixture(scope='module')
def filled(tmp_path_factory): # a cache with the kernel of the op
    folder = tmp_path_factory.mktemp('cache')
    out, err = end(start({'TORCH_EXTENSIONS_DIR': str(folder)}))
    if 'no C++ compiler' in err: pytest.skip('no C++ compiler')
    assert 'no kernel' not in out and err.count('compiling') == 1, err
    return folder

def test_processes_starting_at_once_build_once(tmp_path):
    said = [end(p) for p in [start({'TORCH_EXTENSIONS_DIR': str(tmp_path)}) for _ in range(3)]]
    err = ''.join(e for _,e in said)
    assert all(o.strip() == 'kernel' for o,_ in said), err
    assert err.count(': compiling') == 1, err
    assert err.count('waiting') <= 2, err

@pytest.mark.parametrize('damage', ['empty', 'truncated', 'flipped', 'gone'])
def test_a_damaged_kernel_is_rebuilt_once(filled, damage):
    so, = Path(filled, 'resnet_bk').glob('bk_core_f32*.so')
    whole = so.read_bytes()
    broken = {'empty': b'', 'truncated': whole[:len(whole)//2], 'gone': None,
              'flipped': whole[:len(whole)//2] + bytes([whole[len(whole)//2] ^ 1]) + whole[len(whole)//2 + 1:]}[damage]
    so.unlink()
    if broken is not None: so.write_bytes(broken)
    out, err = end(start({'TORCH_EXTENSIONS_DIR': str(filled)}))
    assert out.strip() == 'kernel' and err.count(': compiling') == 1, err
    out, err = end(start({'TORCH_EXTENSIONS_DIR': str(filled)}))
    assert out.strip() == 'kernel' and 'compiling' not in err, err

def _one_line(err): return [l for l in err.splitlines() if 'resnet_bk:' in l and 'compiling' not in l and 'warnings.warn(' not in l]  # nor the line of the source

def test_a_cache_that_cannot_be_written(tmp_path):
    file = tmp_path/'a file'
    file.write_text('')
    out, err = end(start({'TORCH_EXTENSIONS_DIR': str(file/'below')}))
    assert out.strip() == 'kernel', err
    assert len(_one_line(err)) == 1 and 'not kept' in err and 'Not a directory' in err, err

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can become a user without a home')
def test_a_user_without_a_home(tmp_path):
    env = {k: v for k,v in os.environ.items() if k not in ('HOME', 'XDG_CACHE_HOME', 'TORCH_EXTENSIONS_DIR')}
    script = 'import os; os.setgroups([]); os.setgid(12345); os.setuid(12345)\n' + OP
    top = Path(__file__).resolve().parents[1]
    seen = subprocess.run([sys.executable, '-c', f'import os; os.setuid(12345); os.listdir({str(top)!r}); import torch'], env=env, capture_output=True)
    if seen.returncode: pytest.skip('other users cannot read this checkout or its Python')
    r = subprocess.run([sys.executable, '-c', script], env=env, cwd='/', capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout.strip() == 'kernel' and len(_one_line(r.stderr)) == 1, r.stderr[-2000:]

LAYERS = pytest.mark.parametrize('layer', [lambda: BKMixer(32), lambda: BKAttention(32)], ids=['BKMixer', 'BKAttention'])

@LAYERS
@pytest.mark.parametrize('with_grad', [True, False])
def test_a_wrong_cut_is_refused(layer, with_grad):
    m, x = layer(), torch.randn(2, 40, 32)
    cut = torch.zeros(2, 40, dtype=torch.bool)
    cut[:,20] = True
    with torch.set_grad_enabled(with_grad):
        assert torch.allclose(m(x, cut=cut)[:,20:], m(x[:,20:]), atol=1e-5)
        for wrong in (cut.long(), cut.byte(), cut.float(), cut[:1], cut[:,:39], cut[0], cut[...,None], cut.to('meta')):
            with pytest.raises(ValueError, match='cut'): m(x, cut=wrong)

@torch.no_grad()
def test_a_state_of_other_rows_or_sizes_is_refused():
    m, a, b = BKMixer(64), BKAttention(32), BKAttention(256, 1)
    _, s = m(torch.randn(2, 5, 64), return_state=True)
    with pytest.raises(ValueError, match='state'): m(torch.randn(5000, 3, 64), s)
    _, s = a(torch.randn(2, 5, 32), return_state=True)
    with pytest.raises(ValueError, match='state'): b(torch.randn(2, 3, 256), s)
    tail, chain = m(torch.randn(1, 5, 64), return_state=True)[1]
    with pytest.raises(ValueError, match='state'): m(torch.randn(1, 3, 64), (tail[:,:2], chain))

@LAYERS
def test_gradients_of_every_sample_equal_a_loop(layer):
    m, x = layer(), torch.randn(3, 8, 32)
    p = {k: v.detach() for k,v in m.named_parameters()}
    f = lambda p, a: functional_call(m, p, (a[None],)).square().sum()
    together = vmap(grad(f), (None, 0))(p, x)
    for i,a in enumerate(x):
        m.zero_grad()
        m(a[None]).square().sum().backward()
        for k,v in m.named_parameters(): assert torch.allclose(together[k][i], v.grad, rtol=1e-3, atol=1e-4), (i, k)
