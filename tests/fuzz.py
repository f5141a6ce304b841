"""Every public op and layer with right and wrong input: the reference's value, or a ValueError that both raise.

python tests/fuzz.py --cases 10000 [--seed 1] [--only mix] [--sanitize]
"""
import argparse, collections, contextlib, functools, os, re, subprocess, sys, tempfile, time, traceback, warnings
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')      # threads that spin cost more than all the rest on a busy machine
import torch
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st
from resnet_bk.bk_core import (get_tridiagonal_inverse_diagonal, resolvent_diag, resolvent_mix, vmapped_get_diag)
from resnet_bk.mixers import BKAttention, BKMixer, resolvent_attention
from resnet_bk.sparsity import decimated_mix

TOL = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
REFUSED = (ValueError, TypeError)
# what PyTorch itself refuses with a RuntimeError: tensors of two devices in one operation, where one has no numbers
ALLOWED = re.compile('expected device meta|same device|same device type|device meta')
class Sub(torch.Tensor): "A subclass, as a user may bring it."

class Case:
    "What is drawn for one call: numbers, a list of what is unusual, and the modes it runs in."
    def __init__(self, draw):
        self.draw, self.odd = draw, []
        self.torch = torch.Generator().manual_seed(self.pick(*range(50)))
        self.faults = {0: 0, 1: 1, 2: 2}[self.pick(0, 0, 0, 1, 1, 2)]
    def pick(self, *options): return options[self.draw(_below(len(options)))]
    last = 'none'   # what came of it: value, shape (nothing else to compare) or error
    def note(self, what):
        self.odd.append(what)
        return True
    def some(self, percent, what=None): # unusual, and right all the same
        yes = self.pick(*range(100)) >= 100 - percent
        if yes and what: self.note(what)
        return yes
    def wrong(self, what): # uses up one fault
        if not self.faults or not self.some(25): return False
        self.faults -= 1
        return self.note(what)
    def randn(self, *shape, dtype=torch.float64): return torch.randn(shape, generator=self.torch, dtype=dtype, device='cpu')

    def modes(self):
        self.dtype = self.pick(torch.float32, torch.float32, torch.float64)
        self.grad = self.some(40)
        self.mode = 'inference' if not self.grad and self.some(20, 'inference') else 'grad' if self.grad or self.some(30) else 'no_grad'
        self.threads = self.pick(1, 1, 1, 2, 3)
        self.default = self.pick(*[torch.float32]*8, torch.float64, torch.bfloat16)
        if self.default != torch.float32: self.note(f'default {self.default}')
        self.fake = not self.grad and self.some(3, 'fake')
        self.meta = not self.grad and not self.fake and self.some(3, 'meta')
        self.autocast = self.some(10, 'autocast')

    def form(self, name, t, view=True): # another layout of the same numbers
        how = self.pick(*['plain']*6, 'transposed', 'sliced', 'stepped', 'offset', 'neg', 'conj', 'expanded', 'subclass')
        if t.ndim == 0 or how == 'plain': return t
        if how == 'transposed' and t.ndim > 1: t = t.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif how == 'sliced': t = torch.cat([t, t[...,:1], t[...,:1]], -1)[...,:t.shape[-1]]
        elif how == 'stepped': t = torch.stack([t, t], -1)[...,0]
        elif how == 'offset': t = torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[min(1, t.numel()):].view(t.shape)
        elif how == 'neg' and t.dtype != torch.bool: t = torch._neg_view(-t)
        elif how == 'conj' and t.is_complex(): t = t.conj().resolve_conj().conj()
        elif how == 'expanded' and t.numel(): t = t[:1].expand(t.shape)
        elif how == 'subclass': t = t.as_subclass(Sub)
        else: return t
        self.note(f'{name} {how}')
        return t

    def tensor(self, name, shape, dtype=None, positive=False, like=None):
        "A tensor argument, perhaps of a wrong shape or type."
        dtype = dtype or self.pick(*[self.dtype]*6, torch.float16, torch.bfloat16, torch.float32)
        if shape and self.wrong(f'{name} shape'):
            i = self.pick(*range(len(shape)))
            how = self.pick('one', 'more', 'less', 'dim', 'last')
            shape = list(shape)
            if how == 'dim': shape = [1, *shape]
            elif how == 'last': shape = shape[:-1]
            else: shape[i] = {'one': 1, 'more': shape[i] + 1, 'less': max(0, shape[i] - 1)}[how]
        if self.wrong(f'{name} dtype'): dtype = self.pick(torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint8, torch.int32)
        t = self.randn(*shape, dtype=torch.complex128 if dtype.is_complex else torch.float64)
        if positive and not dtype.is_complex:
            t = t.abs()
            if positive != 'always' and self.wrong(f'{name} negative'): t = t - 1
        t = self.form(name, t.to(dtype))
        if self.wrong(f'{name} meta'): t = t.to('meta')
        return t

    def leaf(self, t): # to be differentiated
        if not self.grad or not isinstance(t, torch.Tensor) or not (t.is_floating_point() or t.is_complex()) or t.is_meta: return t
        return t if self.some(30) else t.detach().requires_grad_()

@functools.lru_cache(None)
def _below(n): return st.sampled_from(range(n))

def double(x): # the same numbers: plain, contiguous, float64
    if isinstance(x, (tuple, list)): return type(x)(map(double, x))
    if not isinstance(x, torch.Tensor): return x
    needs, x = x.requires_grad, x.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    x = x.to(torch.complex128 if x.is_complex() else torch.float64 if x.is_floating_point() else x.dtype)
    return x.requires_grad_(needs)

def flat(x): return [t for e in x for t in flat(e)] if isinstance(x, (tuple, list)) else [x] if isinstance(x, torch.Tensor) else []

@contextlib.contextmanager
def modes(c, autocast=True):
    before = torch.get_default_dtype(), torch.get_num_threads()
    try:
        torch.set_default_dtype(c.default)
        torch.set_num_threads(c.threads)
        grad = torch.inference_mode() if c.mode == 'inference' else torch.set_grad_enabled(c.mode == 'grad')
        with grad, torch.autocast('cpu', dtype=torch.bfloat16, enabled=c.autocast and autocast): yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])

def run(c, f, args, params=(), autocast=True):
    "Values and gradients, or the exception."
    try:
        with modes(c, autocast):
            out = flat(f(*args))
            leaves = [t for t in (*flat(list(args)), *params) if t.requires_grad] if c.grad else []
            used = [o for o in out if o.requires_grad]
            grads = []
            if leaves and used:
                torch.manual_seed(7)
                g = [torch.randn(o.shape, dtype=torch.complex128 if o.is_complex() else torch.float64, device='cpu').to(o.dtype) for o in used]
                grads = torch.autograd.grad(used, leaves, g, allow_unused=True)
        return 'value', [o.detach() for o in out], [torch.zeros_like(l) if x is None else x for x,l in zip(grads, leaves)] if grads else []
    except Exception as e: return 'error', e, None

def allowed(c, e):
    meta = c.fake or c.meta or any(o.endswith('meta') or ' meta ' in o or o == 'cut' for o in c.odd)
    return isinstance(e, c.allowed) or (meta and isinstance(e, RuntimeError) and ALLOWED.search(str(e)))

def compare(c, got, want, tol, plain=None):
    "None, or what is wrong."
    c.last = 'shape' if got[0] == 'value' and (c.fake or c.meta) else got[0]
    if got[0] == 'error' and not allowed(c, got[1]): return f'{type(got[1]).__name__}: {str(got[1])[:150]}'
    if want[0] == 'error' and not allowed(c, want[1]): return f'reference: {type(want[1]).__name__}: {str(want[1])[-300:]}'
    if got[0] != want[0]:
        return f'{"refused" if got[0] == "error" else "accepted"}, unlike the reference: {repr(got[1] if got[0] == "error" else want[1])}'[:200]
    if got[0] == 'error': return None
    for what,a,b,p in (('value', got[1], want[1], plain and plain[1]), ('gradient', got[2], want[2], plain and plain[2])):
        if len(a) != len(b): return f'{what}: {len(a)} tensors, not {len(b)}'
        for i,(x,y) in enumerate(zip(a, b)):
            if x.shape != y.shape: return f'{what} {i}: shape {tuple(x.shape)}, not {tuple(y.shape)}'
            if x.is_meta or c.fake: continue
            x, y = (double(t.detach()) for t in (x, y))
            if not x.numel(): continue
            far = (x - y).norm().item()
            allow = tol*max(1. if tol > 1e-3 else 1e-2, y.norm().item())   # a gradient that cancels keeps bf16's rounding
            if p: allow = max(allow, 4*(double(p[i].detach()) - y).norm().item())
            if not far <= allow and y.isfinite().all(): return f'{what} {i}: off by {far:.2g} of {y.norm().item():.2g}'

def faked(c, args): # the same arguments without numbers
    from torch._subclasses.fake_tensor import FakeTensorMode
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    go = lambda x: type(x)(map(go, x)) if isinstance(x, (tuple, list)) else mode.from_tensor(x) if type(x) is torch.Tensor else x
    return mode, go(to_plain(args))

def to_plain(x): return type(x)(map(to_plain, x)) if isinstance(x, (tuple, list)) else x.as_subclass(torch.Tensor) if isinstance(x, Sub) else x

def to_meta(x): return type(x)(map(to_meta, x)) if isinstance(x, (tuple, list)) else x.to('meta') if isinstance(x, torch.Tensor) else x

def tolerance(args, dtype):
    real = [t.dtype for t in flat(list(args)) if t.is_floating_point()]
    if torch.float64 not in real: dtype = torch.float32 # what is computed in, without one of float64
    some = any(t.dtype in (torch.float32, torch.complex64) for t in flat(list(args)))     # their gradients are rounded
    return max([TOL[dtype], 1e-6*some] + [TOL[t.dtype] for t in flat(list(args)) if t.dtype in (torch.float16, torch.bfloat16)])

# ---- ops: a function draws (function of `backend`, arguments)
def _chain(c, state):
    B, N, C = c.pick(1, 2, 3, 0), c.pick(1, 2, 5, 9, 17, 33, 0), c.pick(1, 3, 4, 16, 17, 0)
    c.modes()
    z = c.pick(complex(-1, .5), complex(.3, .1), 'tensor', 'tensor', 'scalar')
    if c.wrong('z'): z = c.pick(1., complex(0, -1), complex(0, 0), torch.ones(C), torch.full((C + 1,), 1j), torch.full((), -1j), None)
    elif z == 'tensor': z = c.form('z', torch.complex(c.randn(C), c.randn(C).abs() + .2).to(c.dtype.to_complex()))
    elif z == 'scalar': z = torch.tensor(-.5 + .3j, dtype=torch.complex64)
    w = None if c.some(40) else c.tensor('absorb', (B, N, C), positive=True)
    shapes = [None, 1., 0., (C,), (B, max(N-1, 0), C), (1, max(N-1, 0), 1)] + ([(B, N, C)] if state else [])
    hop = c.pick(*shapes)
    if isinstance(hop, tuple): hop = c.tensor('hop', hop, positive=True)
    elif c.wrong('hop'): hop = c.pick(-1., torch.ones(C + 2), 'no', torch.ones(B + 1, N, C))
    s = None
    if state:
        dt = c.dtype.to_complex()
        make = lambda n: (c.tensor(n, (B, C), dt)*.3 - .3j if not c.wrong(f'{n} real') else c.randn(B, C, dtype=c.dtype))
        s = (make('g0'), make('y0'))
        if c.wrong('state form'): s = c.pick((s[0],), [], 3, (None, s[1]))
    return (B, N, C), z, w, hop, s

def diag(c):
    causal = c.some(50)
    shape, z, w, hop, s = _chain(c, causal and c.some(30))
    v = None if w is not None and c.some(20) else c.tensor('v', shape)
    if c.wrong('state two-sided'): causal = False
    s = s[0] if isinstance(s, tuple) and s else s
    def f(backend): return lambda v, z, w, hop, s: resolvent_diag(v, z, w, hop, causal, backend, s)
    return f, (v, z, w, hop, s)

def mix(c):
    causal = c.some(70)
    shape, z, w, hop, s = _chain(c, causal and c.some(30))
    v, u = None if c.some(30) else c.tensor('v', shape), c.tensor('u', shape)
    if c.wrong('u missing'): u = None
    keep = causal and c.some(40)
    def f(backend): return lambda v, u, z, w, hop, s: resolvent_mix(v, u, z, w, hop, causal, s, keep, backend)
    return f, (v, u, z, w, hop, s)

def decimated(c):
    (B, M, C), z, w, _, s = _chain(c, c.some(30))
    c.fake = c.meta = False                           # the gaps that occur are data
    v, u = None if c.some(30) else c.tensor('v', (B, M, C)), c.tensor('u', (B, M, C))
    gaps = torch.randint(c.pick(1, 3, 40), (B, M), generator=c.torch, dtype=c.pick(torch.int64, torch.int64, torch.int32))
    if c.some(10): gaps = gaps*10**6
    gaps = None if c.some(10) else c.form('gaps', gaps)
    if gaps is not None and c.wrong('gaps'): gaps = c.pick(gaps - 41, gaps.float(), gaps[:,:max(0, M-1)], gaps[...,None], gaps.to('meta'), gaps.short(), 3)
    cut = None if c.some(50) else c.form('cut', torch.rand(B, M, generator=c.torch, dtype=torch.float32) < .3)
    if c.wrong('cut'): cut = c.pick(torch.ones(B, M, dtype=torch.uint8), torch.ones(B + 1, M) > 0, [True], torch.ones(B, M, device='meta') > 0)
    free = None if c.some(30) else c.tensor('free', (C,), positive=True)
    if c.wrong('free'): free = c.pick(.5, torch.ones(C + 1), torch.ones(1, C), -torch.ones(C))
    keep = c.some(40)
    def f(backend): return lambda v, u, z, w, gaps, cut, free, s: decimated_mix(v, u, z, w, gaps, cut, free, s, keep, backend)
    return f, (v, u, z, w, gaps, cut, free, s)

def op(c, make):
    f, args = make(c)
    c.allowed = REFUSED
    if c.grad: args = tuple(c.leaf(a) if isinstance(a, torch.Tensor) else tuple(map(c.leaf, a)) if isinstance(a, tuple) else a for a in args)
    want = run(c, f('reference'), tuple(map(double, args)))
    if want[0] == 'value' and (c.fake or c.meta) and not any(t.is_meta for t in flat(list(args))): return _shapes(c, f(None), args, want)
    c.fake = False
    if want[0] == 'error': want2 = run(c, f('reference'), args)
    else: want2 = None
    return compare(c, run(c, f(None), args), want, tolerance(args, c.dtype), want2 if want2 and want2[0] == 'value' else None)

def _shapes(c, f, args, want):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if c.meta: return compare(c, run(c, f, to_meta(args)), want, 0)
        mode, args = faked(c, args)
        with mode: got = run(c, f, args)
    return compare(c, got, want, 0)

def tri(c, batched):
    B, N = c.pick(1, 2, 3), c.pick(1, 2, 5, 9, 33)
    c.modes()
    c.fake = c.meta = False
    lead = (B,) if batched else ()
    a, z = c.tensor('a', (*lead, N)), c.pick(1j, .5 + .3j)
    b = c.tensor('b', (*(lead if c.some(50) else ()), N-1), positive=c.some(50))
    d = c.tensor('c', b.shape, positive=c.some(50))
    if c.wrong('z'): z = c.pick(-1j, 1., None, 0j)
    bad = [o for o in c.odd if o.split()[-1] in ('shape', 'dtype', 'meta', 'z')]
    args = tuple(map(c.leaf, (a, b, d)))
    f = vmapped_get_diag if batched else get_tridiagonal_inverse_diagonal
    def dense(a, b, c):
        T = torch.diag_embed(a + 0j) + torch.diag_embed(b.expand(*a.shape[:-1], -1) + 0j, 1) + torch.diag_embed(c.expand(*a.shape[:-1], -1) + 0j, -1)
        return torch.linalg.inv(T - z*torch.eye(N, dtype=torch.complex128)).diagonal(dim1=-2, dim2=-1)
    c.allowed = REFUSED
    got = run(c, lambda *x: f(*x, z), args)
    if got[0] == 'error' and bad: return compare(c, got, got, 0)
    c.allowed = (Exception,)
    want = run(c, dense, tuple(map(double, args)), autocast=False)
    if bad and want[0] == 'error': return f'accepted {bad}'
    products = (b.double()*d.double()).min() < 0 if b.numel() and want[0] == 'value' else False
    c.allowed = REFUSED
    return compare(c, got, want, tolerance(args, c.dtype)*(300 if products else 1))

def attend(c):
    B, N, H, dk, dv = c.pick(1, 2, 0), c.pick(1, 2, 7, 19, 0), c.pick(1, 2), c.pick(1, 4, 8), c.pick(1, 4, 8)
    c.modes()
    c.fake = c.meta = c.autocast = False
    one = c.pick(torch.float32, torch.float64)
    c.dtype = one
    q, k, v = (c.tensor(n, (B, N, H, d), one) for n,d in (('q', dk), ('k', dk), ('v', dv)))
    g = c.tensor('g_abs', (B, N, H), one, positive='always') if not c.wrong('g_abs type') else None
    if g is not None and g.is_floating_point(): g = g.clamp(.2, .9)
    state = None if c.some(60) else c.tensor('state', (B, H, dk, dv), one)
    hop = None if c.some(60) else c.tensor('hop', (B, max(N-1, 0), H), one, positive='always')
    keep, chunk = c.some(40), c.pick(64, 4, 1, 5)
    args = tuple(map(c.leaf, (q, k, v, g, hop, state)))
    f = lambda q, k, v, g, hop, s: resolvent_attention(q, k, v, g, hop, s, keep, chunk)
    def one_by_one(q, k, v, g, hop, s): # S_i = g_i (t_i S_{i-1} + k_i v_iᵀ), y_i = q_i S_i
        B, N, H = g.shape
        t = torch.ones_like(g) if hop is None else hop.expand(B, -1, H)
        if t.shape[1] < N: t = torch.cat([torch.ones_like(g[:,:1]), t], 1)
        S, out = q.new_zeros(B, H, q.shape[-1], v.shape[-1]) if s is None else s, []
        for i in range(N):
            S = g[:,i,:,None,None]*(t[:,i,:,None,None]*S + k[:,i,:,:,None]*v[:,i,:,None])
            out.append((q[:,i,:,None] @ S)[:,:,0])
        y = torch.stack(out, 1) if N else v
        return (y, S) if keep else y
    c.allowed = REFUSED
    got = run(c, f, args)
    if got[0] == 'error':
        bad = any(o.split()[-1] in ('shape', 'dtype', 'type', 'meta') for o in c.odd)
        return compare(c, got, got, 0) or (None if bad else f'refused: {type(got[1]).__name__}: {got[1]}')
    c.allowed = (Exception,)
    return compare(c, got, run(c, one_by_one, tuple(map(double, args)), autocast=False), tolerance(args, one))

# ---- layers
MAKE = {'plain': lambda: BKMixer(16), 'wide': lambda: BKMixer(16, expand=2, potential='token'), 'odd width': lambda: BKMixer(5),
        'no conv': lambda: BKMixer(16, conv=0), 'one feature': lambda: BKMixer(16, features=1), 'no absorb': lambda: BKMixer(16, absorb=False),
        'conv 2': lambda: BKMixer(16, conv=2), 'two-sided': lambda: BKMixer(8, causal=False),
        'heads of 16': lambda: BKAttention(32, 2), 'heads of 8': lambda: BKAttention(16, 2), 'one head': lambda: BKAttention(32, 1, chunk=16),
        'attention without conv': lambda: BKAttention(32, 1, conv=0),
        'u1': lambda: BKMixer(8, gauge='u1'), 'so3': lambda: BKMixer(16, gauge='so3', potential='token', frame=True), 'so3 no conv': lambda: BKMixer(8, gauge='so3', conv=0),
        'u1 heads': lambda: BKAttention(32, 2, gauge='u1'), 'so3 heads': lambda: BKAttention(32, 2, gauge='so3'),
        'u1 wide head': lambda: BKAttention(80, 1, gauge='u1'), 'so3 no conv, heads of 8': lambda: BKAttention(16, 2, gauge='so3', conv=0)}

@functools.lru_cache(None)
def layer_of(kind, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    m = MAKE[kind]()
    torch.set_default_dtype(before)
    for p in m.parameters(): p.data += .1*torch.randn(p.shape, dtype=torch.float32)
    return m.to(dtype)

def layer_state(c, m, B):
    dt = c.dtype.to_complex()
    rows = B if not c.wrong('state rows') else B + 1
    C = lambda n, *s: (c.form(n, .3*c.randn(rows, *s, dtype=dt) - .5j) if not c.wrong(f'{n} real') else c.randn(rows, *s, dtype=c.dtype))
    def line(groups): # of a layer with a gauge
        if not hasattr(m, 'gauge'): return ()
        w = c.tensor('line', (rows, groups, *m.gauge.bond), torch.float64)
        return (w/w.norm(dim=-1, keepdim=True) if m.gauge.bond and w.is_floating_point() and w.ndim else w,)
    if isinstance(m, BKMixer):
        tail = m.conv and c.tensor('tail', (rows, m.conv.width - 1, m.mixed))
        s = (tail, (C('g0', m.channels), C('y0', m.channels), *line(m.chains)))
    else:
        d = m.d_model//m.n_heads
        s = (m.conv and c.tensor('tail', (rows, m.conv.width - 1, 3*m.d_model)), C('g0', m.n_heads), c.tensor('S', (rows, m.n_heads, d, d)), *(line(m.groups) if hasattr(m, 'gauge') else ()))
    return s if not c.wrong('state form') else c.pick(s[:1], [], 3, (None,)*len(s))

def leaves_of(c, s): return type(s)(leaves_of(c, x) for x in s) if isinstance(s, (tuple, list)) else c.leaf(s) if isinstance(s, torch.Tensor) else s

def layer(c, kinds):
    kind = c.pick(*kinds)
    B, N = c.pick(1, 2, 3, 0), c.pick(1, 2, 5, 17, 40, 70, 0)   # attention works in chunks of 64
    c.modes()
    if c.some(8, 'bf16 layer'): c.dtype = torch.bfloat16
    m, oracle = layer_of(kind, c.dtype), layer_of(kind, torch.float64)
    x = c.tensor('x', (B, N, m.d_model), c.dtype if not c.wrong('x type') else c.pick(torch.float16, torch.bfloat16, torch.float64, torch.float32))
    cut = None
    if c.some(40):
        cut = c.form('cut', torch.rand(B, N, generator=c.torch, dtype=torch.float32) < .3)
        if c.wrong('cut'): cut = c.pick(cut.to(torch.uint8), cut.long(), cut.float(), cut[:,:max(0, N-1)], cut[:1], cut[...,None], cut.to('meta'), [True])
    if c.dtype == torch.bfloat16: c.dtype = torch.float32; s = None if c.some(70) else layer_state(c, m, B); c.dtype = torch.bfloat16
    else: s = None if c.some(60) else layer_state(c, m, B)
    keep = c.some(40)
    if c.grad and s is not None and c.some(50): s = leaves_of(c, s)
    args = (c.leaf(x), s, cut)
    params = [p for p in m.parameters()] if c.grad else []
    def f(m, fused):
        def g(*a):
            m.fused = fused
            try: return m(*a, keep)
            finally: del m.fused
        return g
    c.allowed = REFUSED
    plain = run(c, f(m, False), args, params)
    if c.fake and plain[0] == 'value' and not any(t.is_meta for t in flat(list(args))): return _shapes(c, f(m, True), args, plain)
    c.fake = False
    got = run(c, f(m, True), args, params)
    if plain[0] == 'error': return compare(c, got, plain, 0)
    want = run(c, f(oracle, False), tuple(map(double, args)), list(oracle.parameters()) if c.grad else [], autocast=False)
    lossy = c.autocast and c.dtype != torch.float64
    return compare(c, got, want, TOL[torch.bfloat16] if lossy else tolerance(args, c.dtype), plain)

# ---- the model, token by token
@functools.lru_cache(None)
def model_of(experts=False, codes=False): # with a mixture of experts, with int8 weights
    from resnet_bk.model import ModelConfig, ResNetBK
    from resnet_bk.quantization import quantize
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    ffn = dict(ffn='moe', ffn_kw=dict(num_experts=3, top_k=2, mult=1)) if experts else {}
    m = ResNetBK(ModelConfig(vocab_size=11, d_model=32, n_layers=2, **ffn)).eval()
    if codes: quantize(m, 8, least=64)
    torch.set_default_dtype(before)
    return m

def step(c, decoder):
    from resnet_bk.decoder import CannotDecode, Decoder
    B = c.pick(1, 2, 3)
    c.modes()
    c.fake = c.meta = c.autocast = c.grad = False
    c.mode, c.dtype = c.pick('no_grad', 'inference'), torch.float32
    m = model_of(c.some(30), c.some(30)) if decoder else model_of()
    with torch.no_grad(): _, state = m(torch.randint(11, (B, 5), generator=c.torch), return_state=True)
    if c.some(30): state = None
    elif c.faults and c.some(60):
        c.faults -= 1
        i = c.pick(0, 1, 2, 3)
        wrong = [lambda t: torch.cat([t, t]), lambda t: t.long() if not t.is_complex() else t.real, lambda t: t[...,:-1], lambda t: t.to('meta')][i]
        at = c.pick(0, 1, 2, 3, 4, 5, 6, 7)
        n = [0]
        def go(s):
            if isinstance(s, torch.Tensor): n[0] += 1; return wrong(s) if n[0] == at + 1 else s
            return type(s)(map(go, s)) if isinstance(s, (tuple, list)) else s
        state = go(state)
        c.note(f'state {("rows", "type", "width", "meta")[i]} at {at}')
    else:
        def go(s): return c.form('state', s) if isinstance(s, torch.Tensor) else type(s)(map(go, s)) if isinstance(s, (tuple, list)) else s
        state = go(state)
    token = torch.randint(11, (B,), generator=c.torch)
    if c.wrong('token'): token = c.pick(token + 11, token - 12, token.float(), token[:,None], token.bool(), torch.cat([token, token]))
    c.allowed = (*REFUSED, IndexError)
    def plainly(t, s):
        for b in m.modules():
            if hasattr(type(b), 'fused'): b.fused = False
        try: return m.step(t, s)
        finally:
            for b in m.modules():
                if 'fused' in b.__dict__: del b.fused
    def decode(t, s):
        # a decoder is made for a number of rows and takes plain tensors
        batch = len(t) if s is None and t.ndim == 1 else B
        try: d = Decoder(m, to_plain(s), batch=batch, threads=c.threads)
        except CannotDecode as e: raise RuntimeError(f'cannot decode: {e}') from e
        return d.step(t), d.get_state()
    want = run(c, plainly, (token, state))
    return compare(c, run(c, decode if decoder else m.step, (token, state)), want, TOL[torch.float32])

MIXER, ATTN = [k for k in MAKE if isinstance(MAKE[k](), BKMixer)], [k for k in MAKE if isinstance(MAKE[k](), BKAttention)]
OPS = dict(diag=lambda c: op(c, diag), mix=lambda c: op(c, mix), decimated=lambda c: op(c, decimated), attention=attend, tridiagonal=lambda c: tri(c, False), vmapped=lambda c: tri(c, True),
           BKMixer=lambda c: layer(c, MIXER), BKAttention=lambda c: layer(c, ATTN), step=lambda c: step(c, False), Decoder=lambda c: step(c, True))
SHARE = dict(diag=4, mix=5, decimated=3, attention=2, tridiagonal=1, vmapped=1, BKMixer=6, BKAttention=5, step=1, Decoder=1)

def fuzz(cases, seed=0, only=None, seconds=None):
    "Runs the cases; (cases by op, values, errors, failures by signature)."
    counts, outcomes, failures = collections.Counter(), collections.Counter(), {}
    names = tuple(n for n in OPS for _ in range(SHARE[n]) if only in (None, n))
    @seeded(seed)
    @settings(max_examples=cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data):
        if time.monotonic() > end: raise KeyboardInterrupt          # passes through hypothesis at once
        c = Case(data.draw)
        name = c.pick(*names)
        if os.environ.get('FUZZ_TRACE'): print(counts.total(), name, file=sys.stderr, flush=True)
        try: said = OPS[name](c)
        except Exception as e: said = f'in the test: {type(e).__name__}: {e}\n{traceback.format_exc()[-900:]}'
        if c.last == 'none' and not said: said = 'nothing was compared'
        counts[name] += 1
        outcomes[c.last] += 1
        if said:
            key = name, ''.join(ch for ch in said if not ch.isdigit())[:60]
            if key not in failures or len(failures[key][1]) > len(c.odd): failures[key] = (said, c.odd, failures.get(key, (0, 0, 0))[2] + 1, f'{c.mode} grad={c.grad} threads={c.threads} {c.dtype}')
            else: failures[key] = (*failures[key][:2], failures[key][2] + 1, failures[key][3])
    torch.set_warn_always(False)
    kernels()
    warnings.simplefilter('ignore')
    end = time.monotonic() + (seconds or 1e9)
    with torch.random.fork_rng(), contextlib.suppress(KeyboardInterrupt): one()
    return counts, outcomes, failures

def kernels(): # all that is used, built side by side
    from resnet_bk import cpu_kernels, decoder, fused_layers, gauge, native, sparsity
    tables = cpu_kernels.CORE, sparsity.DECIMATED, gauge.GAUGE, gauge.GAUGE_LAYER, fused_layers.LAYER, fused_layers.ATTENTION, gauge.GAUGE_ATTENTION
    for t in (torch.float32, torch.float64): native.ready(*(table[t] for table in tables), quiet=True)
    half = [table[torch.bfloat16] for table in tables[4:]]
    if 'sanitize' not in os.environ.get('RESNET_BK_CXXFLAGS', ''): native.ready(*half, quiet=True)
    else:
        for l in half: l._lib = None                      # with sanitizers: float32 and float64
    native.ready(decoder.DECODE, quiet=True)

ASAN = '-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g1 -fno-omit-frame-pointer'

def sanitizer_env(folder):
    "The environment of a child whose kernels are watched."
    cxx = os.environ.get('CXX', 'g++')
    libs = [subprocess.run([cxx, f'-print-file-name=lib{n}.so'], capture_output=True, text=True).stdout.strip() for n in ('asan', 'ubsan')]
    return {**os.environ, 'LD_PRELOAD': ' '.join(libs), 'ASAN_OPTIONS': 'detect_leaks=0:halt_on_error=1:allocator_may_return_null=1',
            'UBSAN_OPTIONS': 'halt_on_error=1:print_stacktrace=1', 'RESNET_BK_CXXFLAGS': ASAN, 'TORCH_EXTENSIONS_DIR': str(folder), 'CXX': cxx}

BUILD = """
import subprocess, sys, torch
from resnet_bk import native, cpu_kernels, decoder, fused_layers, gauge, sparsity
tables = cpu_kernels.CORE, sparsity.DECIMATED, gauge.GAUGE, gauge.GAUGE_LAYER, fused_layers.LAYER, fused_layers.ATTENTION, gauge.GAUGE_ATTENTION
libs = [t[k] for k in (torch.float32, torch.float64) for t in tables] + [decoder.DECODE]
cxx, folder = native.find_compiler(), native.cache_folder()
def start(l):
    (folder/f'{l.name}.cpp').write_text(l.source)
    return subprocess.Popen([cxx, *native._usable(cxx, folder), '-fPIC', '-shared', str(folder/f'{l.name}.cpp'), '-o', str(folder/f'{l.name}.new')])
libs = [l for l in libs if not native._whole(l.path)]
while libs:
    now, libs = libs[:2], libs[2:]
    for l,p in [(l, start(l)) for l in now]:
        if p.wait() == 0: native._install(folder/f'{l.name}.new', l.path)
        else: print('does not compile:', l.name)
"""

def build(env):
    "Fill the cache without the sanitizer in the compiler's own process, where it would only cost time."
    r = subprocess.run([sys.executable, '-c', BUILD], env={k: v for k,v in env.items() if k != 'LD_PRELOAD'}, capture_output=True, text=True)
    return f'built with sanitizers: exit {r.returncode} {r.stdout}{r.stderr[-2000:]}'

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--cases', type=int, default=10000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--seconds', type=float, help='stop after so many, however many cases that were')
    p.add_argument('--only', choices=list(OPS))
    p.add_argument('--sanitize', action='store_true', help='in a child whose kernels are built with the address and undefined behaviour sanitizers')
    p.add_argument('--cache', help='folder for the kernels built with sanitizers')
    a = p.parse_args()
    if a.sanitize:
        with tempfile.TemporaryDirectory() as tmp:
            env = sanitizer_env(a.cache or tmp)
            said = build(env)
            print(said)
            cmd = [sys.executable, __file__, '--cases', str(a.cases), '--seed', str(a.seed), *(['--seconds', str(a.seconds)] if a.seconds else []), *(['--only', a.only] if a.only else [])]
            sys.exit(subprocess.run(cmd, env=env).returncode)
    counts, outcomes, failures = fuzz(a.cases, a.seed, a.only, a.seconds)
    print(f'{counts.total()} cases:', ', '.join(f'{n} {k}' for n,k in counts.items()))
    print(', '.join(f'{k} gave {n}s' for n,k in outcomes.items()))
    for (name, _), (said, odd, n, how) in sorted(failures.items(), key=lambda f: -f[1][2]): print(f'FAIL {name} ({n}x): {said}\n     with {odd} {how}')
    sys.exit(bool(failures))

if __name__ == '__main__': main()
