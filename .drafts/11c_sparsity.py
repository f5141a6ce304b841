# %% [markdown]
# # Learned sparsity
#
# > A chain on chosen sites only: eliminating the sites between them is exact, costs one table row per gap length, and has a C++ kernel; what a layer that chooses its own sites is worth, measured

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/resnet-bk/resnet_bk/blob/main/nbs/11c_sparsity.ipynb)

# %%
#| hide
import sys
if 'google.colab' in sys.modules:
    get_ipython().run_line_magic('pip', 'install -q git+https://github.com/resnet-bk/resnet_bk')

# %%
#| default_exp sparsity

# %%
#| exports
import math, torch
from collections import namedtuple
from typing import List, Tuple
from torch import nn, Tensor
from torch.nn import functional as F
from fastcore.basics import patch, store_attr
from fastcore.meta import delegates
from resnet_bk.native import Call, Cpp, CppLibrary, find_kernel, op_namespace, register_kernel, unwatched
from resnet_bk.bk_core import OptT, _dense, _diagonal, _in_double, _inputs, _lanes, _raise, _refuse, _transformed
from resnet_bk.cpu_kernels import _PIECES, _CoreCall, _new, _sums
from resnet_bk.mixers import BKMixer, _check, _float, _normed
from resnet_bk.moe import ACTS, SparseMoE, grouped_rows, moe_layers
from resnet_bk.model import FFNS, MIXERS
from resnet_bk.learner import Callback, register_metric
from resnet_bk.adaptive import on_sites

# %%
import copy, numpy as np, matplotlib.pyplot as plt
from unittest import mock
from fastcore.test import test_eq, test_close, test_fail
from hypothesis import given, settings, strategies as st
from scipy.stats import t as student
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from resnet_bk.bk_core import dense_resolvent, resolvent_diag, resolvent_mix
from resnet_bk.data import LMData
from resnet_bk.learner import Learner, lm_loss
from resnet_bk.mixers import _check_pieces, check_mixer
from resnet_bk.model import ModelConfig, ResNetBK, take_aux_losses
from resnet_bk.moe import dense_moe, route
from resnet_bk.moe_training import MoEBalance
from resnet_bk.native import time_together

# %%
#| hide
torch.set_num_threads(1) # models this small are quicker with one, above all on a busy machine
torch.manual_seed(0);

# %%
def close(a, b, eps=1e-12): test_close(a.detach().numpy(), b.detach().numpy(), eps)
def refused(why, f, *args, **kw): test_fail(f, args=args, kwargs=kw, contains=why, exc=ValueError)

# %% [markdown]
# The original design notes claimed ×1.8 for *learned sparsity*: a small network says which tokens are important, a Gumbel-sigmoid makes that a mask, G is computed at the chosen sites only, and interpolated between them. Two questions are behind this. What is the resolvent
# at chosen sites, exactly, and is there anything to interpolate? And does a language model gain when a layer chooses its sites? The first has a beautiful answer, the second a sober one.
#
# ## Eliminating a run of sites
#
# Take the equations $(H-z)\,y = u$ and a run of $m$ neighbouring sites, $F$, between two sites $L$ and $R$ that are kept. If $F$ has no source, $u_F=0$, then $y_F = -A_F^{-1}(\text{bonds to } L, R)\,y$, and what remains is a smaller system with the Schur complement
#
# $$ a_L' = a_L - t_L^2\,(A_F^{-1})_{11},\qquad a_R' = a_R - t_R^2\,(A_F^{-1})_{mm},\qquad \tau = -\,t_L\,(A_F^{-1})_{1m}\,t_R, $$
#
# where $t_L$, $t_R$ are the bonds that the run hangs on. A run touches its two neighbours only, so **the operator on the kept sites is tridiagonal again**: each gap gives both neighbours a *self-energy* and joins them by an *effective hopping* $\tau$. And since a block of the
# inverse is the inverse of the Schur complement, *the resolvent between kept sites is that of the whole chain*. Nothing is left to interpolate. In physics this is decimation, a step of the real-space renormalisation group.
#
# In float64, with random sites, kept and eliminated, against the dense inverse of the whole:

# %%
#| export
def decimate(
    a:Tensor,     # (N,) complex diagonal of H - z
    t:Tensor,     # (N-1,) hopping amplitudes
    keep:Tensor,  # (N,) bool: the sites that stay
):                # (M,) diagonal and (M-1,) hopping of the operator on the kept sites, complex
    """Eliminate sites from a tridiagonal operator: the Schur complement, which is tridiagonal again. For
    gaps of any contents, by dense inverses of each run. `ValueError` for shapes that do not belong together."""
    if a.ndim != 1 or keep.shape != a.shape or t.shape != (max(len(a)-1, 0),) or keep.dtype != torch.bool:
        raise ValueError('want a (N,), t (N-1,) and keep (N,) bool; got '
                         f'{tuple(a.shape)}, {tuple(t.shape)}, {tuple(keep.shape)} {keep.dtype}')
    at = keep.nonzero()[:,0].tolist()
    diag, hop = [a[i] for i in at], []
    for n,(l,r) in enumerate(zip([-1, *at], [*at, len(a)])):
        A = torch.diag(a[l+1:r])
        if not len(A):
            if 0 < n < len(at): hop.append(t[l].to(a.dtype))
            continue
        off = torch.diag(t[l+1:r-1].to(a.dtype), 1)
        inv = torch.linalg.inv(A + off + off.mT)
        if n: diag[n-1] = diag[n-1] - t[l]**2*inv[0,0]
        if n < len(at): diag[n] = diag[n] - t[r-1]**2*inv[-1,-1]
        if 0 < n < len(at): hop.append(-t[l]*inv[0,-1]*t[r-1])
    stack = lambda x: torch.stack(x) if x else a[:0]
    return stack(diag), stack(hop)

# %%
def tridiagonal(a, t): return torch.diag(a) + torch.diag(t.to(a.dtype), 1) + torch.diag(t.to(a.dtype), -1)

@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def kept_block_of_the_resolvent(N, share, seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    a, t, keep = torch.complex(-4*r(N), -.1 - r(N)), r(max(N-1, 0)), torch.rand(N, generator=g) < share
    small = tridiagonal(*decimate(a, t, keep))
    close(torch.linalg.inv(small), torch.linalg.inv(tridiagonal(a, t))[keep][:,keep], 1e-10)
kept_block_of_the_resolvent()
refused('want a (N,)', decimate, torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.bool))

# %% [markdown]
# ### Free runs in closed form
#
# That costs as much as the whole chain, unless the eliminated sites are all alike. Give them no source, no potential, and per channel one absorption $w_0$: then their diagonal is one number, $a_0 = -2 - E - i(\eta + w_0)$, and with hopping 1 a run of $m$ is the $m$th power of
# one matrix. Let $U_m$ be the Chebyshev polynomial of the second kind at $a_0/2$, $U_m = a_0 U_{m-1} - U_{m-2}$ with $U_{-1}=0$, $U_0=1$; it is the determinant of $m$ free sites. So
#
# $$ (A_F^{-1})_{11} = (A_F^{-1})_{mm} = \frac{U_{m-1}}{U_m},\qquad \tau_m = \frac{(-1)^m}{U_m}. $$
#
# $U_m$ grows as $|\rho|^{-m}$, where $\rho$ and $1/\rho$ are the roots of $\rho + 1/\rho = a_0$, $|\rho|<1$ (the roots cannot both lie on the circle, as $\operatorname{Im} a_0 < 0$). What does not overflow is the geometric sum
#
# $$ s_m = \frac{1-\rho^{2m}}{1-\rho^2} = 1 + \rho^2 + \dots + \rho^{2(m-1)},\qquad U_m = \rho^{-m}\,s_{m+1},\qquad
# \frac{U_{m-1}}{U_m} = \frac{\rho\, s_m}{s_{m+1}},\qquad \tau_m = \frac{(-\rho)^m}{s_{m+1}}, $$
#
# with $s_{m+1} = 1 + \rho^2 s_m$. Two numbers per channel, $s_m$ and $p_m = (-\rho)^m$, say all about a run of $m$ sites. A table holds them for each gap length that occurs. It is made by PyTorch in double precision, so that $E$, $\eta$ and $w_0$ get their gradients through it.

# %%
#| export
Run = namedtuple('Run', 'rho s p') # rho (C,), s and p (G, C), complex128

def free_run(
    E:Tensor, eta:Tensor, # (C,) of z = E + iη
    absorb,               # (C,) absorption w₀ of a free site; None = 0
    gaps:Tensor,          # (G,) int: lengths of runs, 0 or more
)->Run:
    """What a run of free sites does, for each length: `ρ`, `s = (1 - ρ²ᵐ)/(1 - ρ²)` and `p = (-ρ)ᵐ`.
    Finite at any length; differentiable."""
    width = eta.double() if absorb is None else eta.double() + absorb.double()
    a = torch.complex(-2 - E.double(), -width)
    root = (a*a/4 - 1).sqrt()
    root = torch.where((a.conj()*root).real < 0, -root, root) # the two must not cancel
    rho = 1/(a/2 + root)
    log, m = rho.log(), gaps.double()[:,None]
    s = torch.expm1(2*m*log)/torch.expm1(2*log)
    sign = 1 - 2*(gaps[:,None] % 2)
    return Run(rho, s, sign*torch.exp(m*log))

def effective_hopping(run:Run)->Tensor: # (G, C) complex
    "The bond `(-1)ᵐ/U_m` that a run of m free sites leaves between its neighbours."
    return run.p/(1 + run.rho**2*run.s)

def self_energy(run:Run)->Tensor: # (G, C) complex
    "What a run of m free sites takes from the diagonal of each of its neighbours: `U_{m-1}/U_m`."
    return run.rho*run.s/(1 + run.rho**2*run.s)

# %% [markdown]
# Against the Schur complement, and at lengths where $U_m$ itself would overflow long ago:

# %%
E, eta, w0 = torch.tensor([-2., .3, -3.9, 0.]), torch.tensor([.01, .2, .05, 1e-4]), torch.tensor([.1, 0, 0, 0])
gaps = torch.tensor([0, 1, 2, 7, 10**6])
run = free_run(E, eta, w0, gaps)
a0 = torch.complex(-2 - E.double(), -eta.double() - w0.double())
close(run.rho + 1/run.rho, a0)
for c in range(4):
    for k,m in enumerate(gaps[:4].tolist()):
        keep = torch.tensor([True, *[False]*m, True])
        diag, hop = decimate(a0[c].expand(m+2), torch.ones(m+1), keep)
        close(hop[0], effective_hopping(run)[k,c], 1e-10)
        close(a0[c] - diag[0], self_energy(run)[k,c], 1e-10)
assert all(t.isfinite().all() for t in run) and (run.rho.abs() < 1).all()
close(self_energy(run)[4,:3], run.rho[:3]) # a half-infinite chain

# %% [markdown]
# The picture shows $|\tau_m|$, how strongly two kept sites feel each other across a gap. Inside the band it falls slowly, by $|\rho|$ per site, and more slowly the narrower $\eta$: a particle flies through. It also rises and falls, since waves are reflected at both ends of the gap. Outside the band ($E = 1$) the gap is a
# barrier to tunnel through.

# %%
m, fig, axs = torch.arange(0, 61), *plt.subplots(1, 2, figsize=(10, 3.2))
for e,width,label in ((-2., .02, 'centre, η = 0.02'), (-2., .2, 'centre, η = 0.2'), (-.3, .02, 'near the edge, η = 0.02'),
                      (1., .02, 'outside the band')):
    r = free_run(torch.tensor([e]), torch.tensor([width]), None, m)
    axs[0].semilogy(m, effective_hopping(r).abs(), label=label)
    axs[1].plot(m, self_energy(r).imag, label=label)
axs[0].set(xlabel='gap length m', ylabel='effective hopping |τ|', ylim=(1e-4, 60))
axs[1].set(xlabel='gap length m', ylabel='self-energy, imaginary part')
axs[0].legend()
fig.tight_layout();

# %% [markdown]
# The local density of states, $-\frac1\pi\operatorname{Im} G_{ii}(E)$, at the kept sites of a chain: of the whole chain, with all its sites, and of the decimated one. They are the same curve. If one simply leaves the other sites out, as if the kept ones were neighbours, the result is another physical
# system: a shorter chain has fewer states, elsewhere.

# %%
keep = torch.zeros(24, dtype=torch.bool)
keep[[2, 3, 9, 17, 20]] = True
energies, v = torch.linspace(-5, 2, 300), torch.zeros(24).double()
v[keep] = torch.tensor([.5, -.4, .8, -.2, .3]).double()
ldos = np.zeros((3, 300, 5))
for n,e in enumerate(energies):
    z = torch.complex(e.double(), torch.tensor(.08).double())
    whole = dense_resolvent(v[None,:,None], z)[0,0].diagonal()[keep]
    short = dense_resolvent(v[keep][None,:,None], z)[0,0].diagonal()
    small = torch.linalg.inv(tridiagonal(*decimate(-2 + v - z, torch.ones(23), keep))).diagonal()
    ldos[:,n] = [-g.imag/np.pi for g in (whole, small, short)]
test_close(ldos[0], ldos[1], 1e-10)
fig, axs = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax,k in zip(axs, (1, 2)):
    ax.plot(energies, ldos[0,:,k], lw=5, color='C1', alpha=.5, label='whole chain')
    ax.plot(energies, ldos[1,:,k], lw=1.5, color='C0', label='decimated')
    ax.plot(energies, ldos[2,:,k], ':', color='k', label='others left out')
    ax.set(xlabel='energy', title=f'site {keep.nonzero()[k].item()}')
axs[0].set(ylabel='local density of states')
axs[0].legend()
fig.tight_layout();

# %% [markdown]
# ### The causal form
#
# A language model needs the resolvent of the chain *cut after the site that speaks* (`01`): pivots $g_i = 1/(a_i - g_{i-1})$ and values $y_i = g_i\,(u_i - y_{i-1})$. Here the two-sided form above must not be used. It gives a kept site the self-energy of the run to its **right**, that is, it
# tells the site how long the gap will be until the next one is kept. That is a decision of the future: a leak. In the causal form a run acts on the kept site *behind* it only.
#
# At free sites $h \mapsto 1/(a_0 - h)$ is a Möbius map, so $m$ of them are one, too. With $h_0 = g$, the pivot of the kept site before the gap, and $\delta = \rho - g$,
#
# $$ h_m = \frac{U_{m-1} - g\,U_{m-2}}{U_m - g\,U_{m-1}} = \frac{g + s_m\,\delta}{1 + \rho\,s_m\,\delta},\qquad
# y_m = (-1)^m \prod_{k=1}^m h_k\; y_0 = \frac{p_m}{1 + \rho\,s_m\,\delta}\; y_0 =: c_m\, y_0. $$
#
# *Proof.* $h_k = D_{k-1}/D_k$ with $D_k = a_0 D_{k-1} - D_{k-2}$, $D_0 = 1$, $D_{-1} = g$; so $D_m = U_m - g\,U_{m-1} = \rho^{-m}(1 + \rho\, s_m \delta)$, and the product of the $h_k$ is $1/D_m$. $\square$ For $m\to\infty$, $h \to \rho$, the fixed point. An empty chain is $g=0$: $m$ free sites at the beginning of a
# document are no special case, $h_m = \rho s_m/(1+\rho^2 s_m)$ is their own pivot.
#
# So a step from one kept site to the next is
#
# $$ h = \frac{g + s\,\delta}{1 + \rho\,s\,\delta},\quad c = \frac{p}{1 + \rho\,s\,\delta},\qquad g' = \frac{1}{a - h},\qquad y' = g'\,(u - c\,y), $$
#
# one complex reciprocal more than a step of the ordinary chain, whatever the gap. With a gap of 0, $s=0$ and $p=1$, it *is* the ordinary step.

# %%
#| export
def cross_run(
    g:Tensor,   # complex: pivot of the site before the run
    rho:Tensor, s:Tensor, p:Tensor, # of the run, see `free_run`
):              # h, the pivot after it, and c, what a value is multiplied by
    "A pivot and a value carried causally over a run of free sites."
    d = rho - g
    D = 1/(1 + rho*s*d)
    return (g + s*d)*D, p*D

# %%
g = torch.complex(torch.randn(4), -torch.rand(4)).to(torch.complex128)
for k,m in enumerate(gaps[:4].tolist()):
    h, c = g, torch.ones_like(g)
    for _ in range(m):
        h = 1/(a0 - h)
        c = -h*c
    for got,want in zip(cross_run(g, run.rho, run.s[k], run.p[k]), (h, c)): close(got, want, 1e-10)
h, c = cross_run(g[:3], run.rho[:3], run.s[4,:3], run.p[4,:3])
close(h, run.rho[:3])
close(c.abs(), torch.zeros(3))
# %% [markdown]
# ## A mixer over gaps
#
# The reference: a loop over kept sites. `index` names the row of the table for the gap before each site, and its complement `~row` (a negative number) a site before which the chain is cut: there $g = y = 0$ before the run. As in `01`, it computes in double precision.

# %%
#| export
def _double(t):
    if t is None or not t.dtype.is_floating_point and not t.is_complex(): return t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)

def _rows(index): return torch.where(index < 0, ~index, index)

def _decimated_ref(v, w, u, E, eta, rho, s, p, index, g, y):
    "Pivots and values of the kept sites, (B, M, C) each."
    (B,M,C), dt = u.shape, torch.promote_types(E.dtype, torch.complex64)
    v, w, u, E, eta, g, y = map(_double, (v, w, u, E, eta, g, y))
    a, rows, gs, ys = _diagonal(v, w, E, eta).expand(B, M, C), _rows(index), [], []
    if g is None: g = a.new_zeros(B, C)
    if y is None: y = torch.zeros_like(g)
    for i in range(M):
        new = (index[:,i] < 0)[:,None]
        h, c = cross_run(g.masked_fill(new, 0), rho, s[rows[:,i]], p[rows[:,i]])
        g = 1/(a[:,i] - h)
        y = g*(u[:,i] - c*y.masked_fill(new, 0))
        gs.append(g)
        ys.append(y)
    stack = lambda x: torch.stack(x, 1).to(dt) if M else a.new_zeros(B, 0, C).to(dt)
    return stack(gs), stack(ys)

# %% [markdown]
# The adjoint runs from the last site to the first and carries $\bar g$ and $\bar y$, the cotangents of the pivot and value of the site before the gap (bars in the convention of `01`: $\bar x = \partial L/\partial\operatorname{Re}x + i\,\partial L/\partial\operatorname{Im}x$, so a holomorphic step multiplies by a conjugate). With $D = 1/(1+\rho s\delta)$, $n = g + s\delta$, so $h = nD$, $c = pD$:
#
# $$ P = \bar y'\, g'^*,\qquad \Lambda = -\bar g'\, g'^{*2} - y'^* P,\qquad \bar u = \operatorname{Re}P,\quad \bar v = \operatorname{Re}\Lambda,\quad \bar w = -\operatorname{Im}\Lambda, $$
# $$ \bar h = -\Lambda,\quad \bar c = -P\,y^*,\quad \bar y = -P\,c^*,\qquad \bar p = \bar c\, D^*,\quad q = -(\bar c\,p^* + \bar h\,n^*)\,D^{*2},\quad r = \bar h D^* + q\,\rho^*, $$
# $$ \bar s = \delta^* r,\qquad \bar\delta = s^* r,\qquad \bar\rho = \bar\delta + q\,(s\delta)^*,\qquad \bar g = \bar h D^* - \bar\delta. $$
#
# $q$ is the cotangent of the denominator, and $\Lambda$ that of $a$. Nothing has to be saved but the results $g$ and $y$.

# %%
#| export
def _decimated_backward_ref(g, y, gy, gg, rho, s, p, index, g0, y0):
    "P and Λ of every site, cotangents of ρ, s and p, and of the state before."
    (B,M,C), rows, none = g.shape, _rows(index), torch.zeros_like(g[:,:0].sum(1))
    g, y, gy, gg, g0, y0, G, Y = map(_double, (g, y, gy, gg, g0, y0, none, none))
    g0, y0 = none if g0 is None else g0, none if y0 is None else y0
    Ps, Ls, ss, ps, drho = [None]*M, [None]*M, [None]*M, [None]*M, torch.zeros_like(rho)
    for i in reversed(range(M)):
        new, S, p_ = (index[:,i] < 0)[:,None], s[rows[:,i]], p[rows[:,i]]
        before, yb = (t.masked_fill(new, 0) for t in ((g[:,i-1], y[:,i-1]) if i else (g0, y0)))
        gc = g[:,i].conj()
        P = Ps[i] = gc*((0 if gy is None else gy[:,i]) + Y)
        L = Ls[i] = -gc*gc*((0 if gg is None else gg[:,i]) + G) - y[:,i].conj()*P
        d = rho - before
        D = 1/(1 + rho*S*d)
        cb, Dc = -P*yb.conj(), D.conj()
        q = -(cb*p_.conj() - L*(before + S*d).conj())*Dc*Dc
        r = q*rho.conj() - L*Dc
        db = S.conj()*r
        ss[i], ps[i] = d.conj()*r, cb*Dc
        drho = drho + (db + q*(S*d).conj()).sum(0)
        G, Y = (t.masked_fill(new, 0) for t in (-L*Dc - db, -P*(p_*D).conj()))
    stack = lambda x: torch.stack(x, 1) if M else g
    table = lambda x: torch.zeros_like(s).index_add(0, rows.flatten(), stack(x).flatten(0, 1))
    return stack(Ps), stack(Ls), drho, table(ss), table(ps), G, Y

# %% [markdown]
# Checked by `gradcheck` against the loop itself, before anything is built on it. All inputs: v, w, u, E, η, the three tables, and the state.

# %%
def draw(B=2, M=5, C=3, G=4, dtype=torch.float64, state=True, seed=0):
    "Arguments of the scan, the tables arbitrary."
    gen = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    z = lambda *s: torch.complex(r(*s), r(*s))
    index = torch.randint(-G, G, (B, M), generator=gen)
    ts = [r(B, M, C), r(B, M, C).abs(), r(B, M, C), r(C) - 2, r(C).abs() + .1]
    ts = [t.to(dtype) for t in ts] + [.5*z(C), z(G, C), .5*z(G, C), index]
    return ts + ([(z(B, C)*.5).to(dtype.to_complex()) for _ in range(2)] if state else [None, None])

class ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *ts):
        g, y = _decimated_ref(*ts)
        ctx.save_for_backward(g, y, *ts[5:])
        return g, y
    @staticmethod
    def backward(ctx, gg, gy):
        g, y, rho, s, p, index, g0, y0 = ctx.saved_tensors
        P, L, drho, ds, dp, dg0, dy0 = _decimated_backward_ref(g, y, gy, gg, rho, s, p, index, g0, y0)
        return L.real, -L.imag, P.real, -L.real.sum((0, 1)), -L.imag.sum((0, 1)), drho, ds, dp, None, dg0, dy0

ts = [t.requires_grad_(t.is_floating_point() or t.is_complex()) for t in draw()]
assert (ts[8] < 0).any() and (ts[8] >= 0).any()
assert gradcheck(ByHand.apply, ts)

# %% [markdown]
# ### The kernel
#
# The sweeps of `01b` bring the layout, the SIMD lanes and the threads; what is new is a step, and a table row that each lane looks up. Where a tile is `direct`, its lanes are neighbouring channels of one row, so they share the gap and read the table side by side; otherwise each lane looks for itself. A row is
# never cut into chunks here. All arithmetic is in double precision: the tables are small, and stay in the cache.

# %%
#| export
#| echo: false
CPP_DECIMATED = Cpp(r'''
// h = (g + s d)/(1 + rho s d), c = p/(1 + rho s d), d = rho - g: over a run of free sites
template <class V> struct Crossing {
  Complex<V> d, D, n, h, c;
  BK_HD Crossing(Complex<V> g, Complex<V> rho, Complex<V> s, Complex<V> p) {
    d = rho - g;
    Complex<V> sd = s * d, e = rho * sd;
    e.re += 1;
    D = e.recip();
    n = g + sd;
    h = n * D;
    c = p * D;
  }
};
typedef Simd<double>::V V;
typedef Cx<double> CV;
struct Table {                      // rho (C), s and p (runs, C), all interleaved; index (B, M)
  const double *rho, *s, *p;
  const I* index;
  I runs, M, C;
  // Of row t of a tile: its runs, and 0 where a chain begins.
  void look(const Tile& l, I t, CV& S, CV& P, V& on, I* row) const {
    enum { W = Simd<double>::W };
    double a[2 * W] = {}, b[2 * W] = {};
    for (int j = 0; j < W; j++) on[j] = row[j] = 0;
    for (int j = 0; j < l.n; j++) {
      I q = index[l.b[j] * M + t], r = q < 0 ? ~q : q;
      on[j] = q >= 0;
      row[j] = 2 * (r * C + l.c[j]);
      if (l.direct) {
        S = ldc<double>(s + row[0]), P = ldc<double>(p + row[0]);
        on = V{} + (double)(q >= 0);
        return;
      }
''')
CPP_DECIMATED

# %%
#| export
#| echo: false
CPP_DECIMATED += r'''
      for (int k = 0; k < 2; k++) a[2 * j + k] = s[row[j] + k], b[2 * j + k] = p[row[j] + k];
    }
    S = ldc<double>(a), P = ldc<double>(b);
  }
  CV root(const Tile& l) const {
    double a[2 * Simd<double>::W] = {};
    for (int j = 0; j < l.n; j++)
      for (int k = 0; k < 2; k++) a[2 * j + k] = rho[2 * l.c[j] + k];
    return ldc<double>(a);
  }
  bool fits(I B) const {
    for (I i = 0; i < B * M; i++)
      if (index[i] < -runs || index[i] >= runs) return false;
    return true;
  }
};
static inline CV only(V on, CV x) { return {on != 0 ? x.re : V{}, on != 0 ? x.im : V{}}; }
static Job uncut(Job j) {
  j.K = 1, j.len = j.N, j.pad = 0;
  return j;
}
struct Decimated : Body {
  Stream v, w, u, g, y;
  Table table;
  int* bad;  // 1: absorb is negative, 2: a width is not positive, 4: no such run
  Decimated(int* bad) : Body(Simd<double>::W, 2, false), bad(bad) {}
  void report(int what) const {
#pragma omp atomic
    *bad |= what;
  }
'''
CPP_DECIMATED

# %%
#| export
#| echo: false
CPP_DECIMATED += r'''
  void block(Block& x, State& st_) const override {
    typedef double A;
    Rows rv = fetch(x, v), rw = fetch(x, w), ru = fetch(x, u), og = target(x, g), oy = target(x, y);
    CV gi = st_.get<A>(0), yi = st_.get<A>(1), rho = table.root(x.tile), S, P;
    V base = -2 - ld<A>(st_.e), eta = ld<A>(st_.eta), neg = {}, on = {};
    I row[MAXW];
    for (I i = 0; i < x.size(); i++) {
      V wi = ld<A>(rw.at(i));
      neg = wi < 0 ? V{} + 1 : neg;
      table.look(x.tile, x.t0 + i, S, P, on, row);
      Crossing<V> k(only(on, gi), rho, S, P);
      yi = -(k.c * only(on, yi));
      yi.re += ld<A>(ru.at(i));
      gi = pivot_step(CV{base + ld<A>(rv.at(i)), -(eta + wi)}, k.h);
      yi = gi * yi;
      stc<A>(og.at(i), gi);
      stc<A>(oy.at(i), yi);
    }
    st_.set<A>(0, gi);
    st_.set<A>(1, yi);
    flush(x, g, og), flush(x, y, oy);
    for (int i = 0; i < x.tile.n; i++) {
      if (neg[i] != 0) report(1);
      if (!(eta[i] > 0)) report(2);
    }
  }
};
static Table table_of(Args& r) {  // rho s p index runs
  Table t;
  t.rho = (const double*)r.pointer(), t.s = (const double*)r.pointer(), t.p = (const double*)r.pointer();
  t.index = (const I*)r.pointer(), t.runs = r.a[r.at++], t.M = r.job.N, t.C = r.job.C;
  return t;
}
'''
CPP_DECIMATED

# %%
#| export
#| echo: false
CPP_DECIMATED += r'''
static std::vector<Z> states(const Job& j, const T* g0, const T* y0) {  // g and y of every lane
  std::vector<Z> x(2 * j.B * j.C);
  for (size_t q = 0; q < x.size() / 2; q++) {
    if (g0) x[2 * q] = {g0[2 * q], g0[2 * q + 1]};
    if (y0) x[2 * q + 1] = {y0[2 * q], y0[2 * q + 1]};
  }
  return x;
}
static int decimated(const I* a) {  // v w u g y, table, g0 y0
  Args r(a);
  int bad = 0;
  Decimated s(&bad);
  s.v = r.in(REALS), s.w = r.in(REALS), s.u = r.in(REALS), s.g = r.out(COMPLEX), s.y = r.out(COMPLEX);
  s.table = table_of(r);
  if (!s.table.fits(r.job.B)) return 4;
  T *g0 = r.pointer(), *y0 = r.pointer();
  auto x = states(r.job, g0, y0);
  sweep(uncut(r.job), s, x.data());
  return bad;
}
ENTRY(decimated)
'''
CPP_DECIMATED

# %%
#| export
class _DecimatedCall(_CoreCall):
    "A call of one sweep over kept sites: what `_CoreCall` takes, and the tables."
    def table(self, rho, s, p, index):
        (B,M,C), G = self.shape, len(s)
        for n,t,shape in (('rho', rho, (C,)), ('s', s, (G, C)), ('p', p, (G, C))):
            self.dense(n, t, torch.complex128, shape)
        return self.dense('index', index, torch.int64, (B, M)).ints(G)
    def sweep(self, name): return self.enter(DECIMATED[self.real], f'bk_{name}')

def _refuse_decimated(bad, eta, w, index, G):
    if bad & 4: raise ValueError(f'index: want rows of a table of {G} runs (~row: the chain is cut before it); '
                                 f'got {index.min().item()} to {index.max().item()}')
    _raise(bad, eta, w, None)

def _decimated_cpp(v, w, u, E, eta, rho, s, p, index, g0, y0):
    shape = u.shape
    g, y = (_new(shape, E.dtype.to_complex()) for _ in range(2))
    c = _DecimatedCall(shape, E.dtype, E, eta).reals(v=v, absorb=w, u=u).complexes(g=g, y=y)
    bad = c.table(rho, s, p, index).ends(g0=g0, y0=y0).sweep('decimated')
    _refuse_decimated(bad, eta, w, index, len(s))
    return g, y

# %%
def libraries(source):
    return {t: CppLibrary(f'bk_decimated_{n}', Cpp(f'#define REAL {c}\n') + _PIECES + source)
            for t,n,c in ((torch.float32, 'f32', 'float'), (torch.float64, 'f64', 'double'))}
def far(a, b): return ((a - b).abs().max()/b.abs().max().clamp(min=1)).item() if a.numel() else 0.

DECIMATED = libraries(CPP_DECIMATED)
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 2, 33, 70]), st.sampled_from([0, 1, 3, 8, 17, 40]),
       st.integers(1, 5), st.sampled_from(list(DECIMATED)), st.booleans(), st.integers(0, 7), st.integers(0, 99))
def check_forward(B, M, C, G, dtype, state, use, seed):
    ts = draw(B, M, C, G, dtype, state, seed)
    ts = [None if use & (1 << i) and i < 2 else t for i,t in enumerate(ts)]
    for got,want in zip(_decimated_cpp(*ts), _decimated_ref(*ts)):
        assert far(got, want) < (1e-11 if dtype == torch.float64 else 1e-4)
check_forward()

# %% [markdown]
# The backward sweep. The cotangents of the tables are sums over all sites with that gap: one accumulator for each row of the batch, run and channel, which only the tile with that channel touches.

# %%
#| export
#| echo: false
CPP_DECIMATED_BACKWARD = Cpp(r'''
struct DecimatedBack : Body {
  Stream g, y, gy, gg, dv, dw, du;
  Table table;
  Sums sums;
  const T *g0, *y0;
  double *ds, *dp, *drho;  // (B, runs, C), (B, runs, C), (B, C); interleaved
  DecimatedBack() : Body(Simd<double>::W, 2, true) {}
  void begin(const Tile& l) const override { sums.clear(l); }
  // of the token before row 0
  static CV start(const Tile& l, const T* p, I C) {
    double a[2 * Simd<double>::W] = {};
    for (int j = 0; j < l.n && p; j++)
      for (int k = 0; k < 2; k++) a[2 * j + k] = p[2 * (l.b[j] * C + l.c[j]) + k];
    return ldc<double>(a);
  }
  void add(const Tile& l, double* to, const I* row, CV x) const {
    enum { W = Simd<double>::W };
    if (l.direct) {
      double* p = to + 2 * l.b[0] * table.runs * table.C + row[0];
      return stc<double>(p, ldc<double>(p) + x);
    }
    for (int j = 0; j < l.n; j++) {
      double* p = to + 2 * l.b[j] * table.runs * table.C + row[j];
      p[0] += x.re[j];
      p[1] += x.im[j];
    }
  }
''')
CPP_DECIMATED_BACKWARD

# %%
#| export
#| echo: false
CPP_DECIMATED_BACKWARD += r'''
  void block(Block& x, State& st_) const override {
    typedef double A;
    const Tile& l = x.tile;
    Rows rg = fetch(x, g), ry = fetch(x, y), rd = fetch(x, gy), re = fetch(x, gg);
    Rows bg = fetch(x, g, -1), by = fetch(x, y, -1), ov = target(x, dv), ow = target(x, dw), ou = target(x, du);
    CV G = st_.get<A>(0), Y = st_.get<A>(1), rho = table.root(l), rc = rho.conj(), S, p, R = {};
    V se = {}, sw = {}, on = {};
    I row[MAXW];
    for (I i = x.size() - 1; i >= 0; i--) {
      const bool first = x.t0 + i == 0;
      table.look(l, x.t0 + i, S, p, on, row);
      CV gp = only(on, first ? start(l, g0, table.C) : ldc<A>(bg.at(i)));
      CV yp = only(on, first ? start(l, y0, table.C) : ldc<A>(by.at(i)));
      CV gc = ldc<A>(rg.at(i)).conj(), P = gc * (ldc<A>(rd.at(i)) + Y);
      CV L = -(gc * gc * (ldc<A>(re.at(i)) + G)) - ldc<A>(ry.at(i)).conj() * P;
      Crossing<V> k(gp, rho, S, p);
      CV Dc = k.D.conj(), cb = -(P * yp.conj()), hd = -(L * Dc);
      CV q = (L * k.n.conj() - cb * p.conj()) * Dc * Dc, r = hd + q * rc, db = S.conj() * r;
      add(l, ds, row, k.d.conj() * r);
      add(l, dp, row, cb * Dc);
      R = R + db + q * (S * k.d).conj();
      G = only(on, hd - db);
      Y = only(on, -(P * k.c.conj()));
      if (ou.p) st<A>(ou.at(i), P.re);
      if (ov.p) st<A>(ov.at(i), L.re);
      if (ow.p) st<A>(ow.at(i), -L.im);
      se += L.re;
      sw -= L.im;
    }
'''
CPP_DECIMATED_BACKWARD

# %%
#| export
#| echo: false
CPP_DECIMATED_BACKWARD += r'''
    st_.set<A>(0, G);
    st_.set<A>(1, Y);
    sums.add<A>(x, se, sw);
    for (int j = 0; j < l.n; j++) drho[2 * l.lane[j]] += R.re[j], drho[2 * l.lane[j] + 1] += R.im[j];
    flush(x, dv, ov), flush(x, dw, ow), flush(x, du, ou);
  }
};
static void add_rows(const std::vector<double>& from, I B, double* to) {
  const I n = B ? from.size() / B : 0;
  for (I q = 0; q < (I)from.size(); q++) to[q % n] += from[q];
}
static int decimated_backward(const I* a) {  // g y gy gg dv dw du dE deta, table, g0 y0 ds dp drho ends
  Args r(a);
  DecimatedBack s;
  s.g = r.in(COMPLEX), s.y = r.in(COMPLEX), s.gy = r.in(COMPLEX), s.gg = r.in(COMPLEX);
  s.dv = r.out(REALS), s.dw = r.out(REALS), s.du = r.out(REALS);
  const Job j = uncut(r.job);
  LaneSums sums(j, r.sums());
  s.sums = sums.lanes();
  s.table = table_of(r);
  if (!s.table.fits(j.B)) return 4;
  s.g0 = r.pointer(), s.y0 = r.pointer();
  double *ds = (double*)r.pointer(), *dp = (double*)r.pointer(), *drho = (double*)r.pointer();
  T* ends = r.pointer();
  const I n = j.B * j.C;
  std::vector<double> as(2 * n * s.table.runs), ap(as.size()), ar(2 * n);
  s.ds = as.data(), s.dp = ap.data(), s.drho = ar.data();
'''
CPP_DECIMATED_BACKWARD

# %%
#| export
#| echo: false
CPP_DECIMATED_BACKWARD += r'''
  std::vector<Z> x(2 * n);
  sweep(j, s, nullptr, x.data());
  for (I q = 0; q < 2 * n; q++) {  // g of all lanes, then y
    T* e = ends + 2 * (q % 2 * n + q / 2);
    e[0] = x[q].real();
    e[1] = x[q].imag();
  }
  sums.fold();
  add_rows(as, j.B, ds), add_rows(ap, j.B, dp), add_rows(ar, j.B, drho);
  return 0;
}
ENTRY(decimated_backward)
'''
CPP_DECIMATED_BACKWARD

# %%
#| export
def _decimated_backward_cpp(g, y, gy, gg, rho, s, p, index, g0, y0, need):
    (B,M,C), real = g.shape, g.real.dtype
    dv, dw, du = (_new(g.shape, real, k) for k in need)
    sums, ends = _sums(C), torch.zeros(2, B, C, dtype=g.dtype, device='cpu')
    ds, dp, drho = (torch.zeros(t.shape, dtype=t.dtype, device='cpu') for t in (s, p, rho))
    c = _DecimatedCall(g.shape, real).complexes(g=g, y=y, gy=gy, gg=gg).reals(dv=dv, dw=dw, du=du).sums(sums)
    c.table(rho, s, p, index).ends(g0=g0, y0=y0)
    for n,t,of in (('ds', ds, s), ('dp', dp, p), ('drho', drho, rho)): c.dense(n, t, torch.complex128, of.shape)
    bad = c.dense('ends', ends, g.dtype, (2, B, C)).sweep('decimated_backward')
    _refuse_decimated(bad, None, None, index, len(s))
    return dv, dw, du, *(x.to(real, copy=True) for x in sums), drho, ds, dp, *ends.unbind(0)

# %%
DECIMATED = libraries(CPP_DECIMATED + CPP_DECIMATED_BACKWARD)

@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 2, 33, 70]), st.sampled_from([0, 1, 3, 8, 17, 40]),
       st.integers(1, 5), st.sampled_from(list(DECIMATED)), st.booleans(), st.integers(0, 7), st.integers(1, 3))
def check_backward(B, M, C, G, dtype, state, use, threads):
    *_, rho, s, p, index, g0, y0 = draw(B, M, C, G, dtype, state, M + C)
    g, y, gy, gg = torch.randn(4, B, M, C, dtype=dtype.to_complex()).mul(.5).unbind(0)
    gy, gg = None if use & 1 else gy, None if use & 2 else gg
    torch.set_num_threads(threads)
    got = _decimated_backward_cpp(g, y, gy, gg, rho, s, p, index, g0, y0, [not use & 4, True, True])
    torch.set_num_threads(1)
    P, L, *rest = _decimated_backward_ref(g, y, gy, gg, rho, s, p, index, g0, y0)
    want = [L.real, -L.imag, P.real, -L.real.sum((0, 1)), -L.imag.sum((0, 1)), *rest]
    for a,b in zip(got, want):
        if a is not None: assert far(a, b) < (1e-10 if dtype == torch.float64 else 1e-4)
check_backward()
# %% [markdown]
# ### The op
#
# Both sweeps become custom ops with an autograd rule, as in `01`. The dispatcher and `torch.compile` see shapes only.

# %%
#| export
OPS = op_namespace(__name__)
_DECIMATED = CPP_DECIMATED + CPP_DECIMATED_BACKWARD
DECIMATED = {t: CppLibrary(f'bk_decimated_{n}', Cpp(f'#define REAL {c}\n') + _PIECES + _DECIMATED)
             for t,n,c in ((torch.float32, 'f32', 'float'), (torch.float64, 'f64', 'double'))}

def _use_cpp(backend, x): # whether the kernel runs
    if backend not in ('', 'cpp', 'reference'):
        raise ValueError(f"backend must be 'cpp' or 'reference'; got {backend!r}")
    lib = DECIMATED.get(x.dtype) if x.device.type == 'cpu' and backend != 'reference' else None
    loads = lib is not None and lib.load() is not None
    if backend == 'cpp' and not loads:
        raise ValueError(f"backend 'cpp' cannot take a {x.dtype} tensor on {x.device}, "
                         'or its kernels could not be built')
    return loads

def _plain_args(*ts): return [_dense(t) for t in ts]

def _scan_kept(v, w, u, E, eta, rho, s, p, index, g0, y0, backend):
    cpp = _use_cpp(backend, E)
    if not cpp or 0 in u.shape:
        bad = 2*(not (eta > 0).all()) + (w is not None and (w < 0).any().item())
        if index.numel() and (index.min() < -len(s) or index.max() >= len(s)): bad |= 4
        _refuse_decimated(bad, eta, w, index, len(s))
    if not cpp: return _decimated_ref(v, w, u, E, eta, rho, s, p, index, g0, y0)
    args = [*map(_lanes, (v, w, u)), *_plain_args(E, eta, rho, s, p, index, g0, y0)]
    return _decimated_cpp(*args)

# %%
#| export
@torch.library.custom_op(f'{OPS}::decimated', mutates_args=())
def decimated_op(v:OptT, w:OptT, u:Tensor, E:Tensor, eta:Tensor, rho:Tensor, s:Tensor, p:Tensor, index:Tensor,
                 g0:OptT, y0:OptT, backend:str) -> Tuple[Tensor, Tensor]:
    "Pivots and mixed values of kept sites, the gaps between them in tables; complex (B, M, C)."
    return _scan_kept(v, w, u, E, eta, rho, s, p, index, g0, y0, backend)

@decimated_op.register_fake
def _(v, w, u, E, eta, rho, s, p, index, g0, y0, backend):
    dt = torch.complex128 if E.dtype == torch.float64 else torch.complex64
    return tuple(u.new_empty(u.shape, dtype=dt) for _ in range(2))

@torch.library.custom_op(f'{OPS}::decimated_backward', mutates_args=())
def decimated_backward_op(g:Tensor, y:Tensor, gy:OptT, gg:OptT, rho:Tensor, s:Tensor, p:Tensor, index:Tensor,
    g0:OptT, y0:OptT, need:List[bool], backend:str) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                             Tensor, Tensor, Tensor, Tensor]:
    "Adjoint of `decimated`: gradients of v, w, u, E, eta, rho, s, p, g0, y0 (empty where not needed)."
    real = g.real.dtype
    empty = lambda t: g.new_empty(0, dtype=real) if t is None else t.to(real).contiguous()
    if _use_cpp(backend, g.real):
        args = _plain_args(g, y, gy, gg, rho, s, p, index, g0, y0)
        dv, dw, du, *rest = _decimated_backward_cpp(*args, need)
        return empty(dv), empty(dw), empty(du), *(t.contiguous().clone() for t in rest)
    P, L, *tables, G, Y = _decimated_backward_ref(g, y, gy, gg, rho, s, p, index, g0, y0)
    parts = [x.clone() if k else None for x,k in zip((L.real, -L.imag, P.real), need)]
    sums = [-L.real.sum((0, 1)), -L.imag.sum((0, 1))]
    return *map(empty, parts), *map(empty, sums), *tables, G.to(g.dtype).clone(), Y.to(g.dtype).clone()

# %%
#| export
@decimated_backward_op.register_fake
def _(g, y, gy, gg, rho, s, p, index, g0, y0, need, backend):
    (B,M,C), real = g.shape, g.real.dtype
    parts = [g.new_empty(g.shape if k else 0, dtype=real) for k in need]
    sums = [g.new_empty(C, dtype=real) for _ in range(2)]
    return *parts, *sums, *map(torch.empty_like, (rho, s, p)), g.new_empty(B, C), g.new_empty(B, C)

def _decimated_setup(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[5:11])
    ctx.backend = inputs[11]
    ctx.set_materialize_grads(False)

def _decimated_autograd(ctx, gg, gy):
    if gg is None and gy is None: return (None,)*12
    g, y, *tables = ctx.saved_tensors
    n = ctx.needs_input_grad
    out = decimated_backward_op(g, y, gy, gg, *tables, [n[0], n[1], n[2]], ctx.backend)
    grads = [*out[:8], None, *out[8:]]
    return *(t if k else None for t,k in zip(grads, n)), None

torch.library.register_autograd(decimated_op, _decimated_autograd, setup_context=_decimated_setup)

# %%
tests = 'test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_static'
for backend in ('cpp', 'reference'):
    ts = [t.requires_grad_(t.is_floating_point() or t.is_complex()) for t in draw()]
    torch.library.opcheck(decimated_op, (*ts, backend), test_utils=tests)
    assert gradcheck(lambda *ts: decimated_op(*ts, backend), ts)
    refused('rows of a table of 4 runs', decimated_op, *ts[:8], ts[8] + 4, None, None, backend)
    refused('rows of a table of 4 runs', decimated_op, *ts[:8], ts[8] - 4, None, None, backend)
    refused('Im z > 0', decimated_op, *ts[:4], -ts[4], *ts[5:], backend)
    refused('absorb must be ≥ 0', decimated_op, ts[0], -ts[1], *ts[2:], backend)
refused("'cpp' or 'reference'", decimated_op, *ts, 'cuda')

# %% [markdown]
# And what a user calls. It finds the gap lengths that occur, makes the tables, and runs the op. In a training batch there are a few dozen lengths at most; at a share of kept sites $\kappa$ a gap longer than $m$ has the probability $(1-\kappa)^m$.

# %%
#| export
def _check_gaps(gaps, cut, free, u):
    B,M,C = u.shape
    for n,t in (('gaps', gaps), ('cut', cut)):
        want = 'int64 or int32' if n == 'gaps' else 'bool'
        if t is None and n == 'cut': continue
        if (not isinstance(t, Tensor) or t.shape != (B, M) or t.device != u.device
            or t.dtype not in ((torch.int64, torch.int32) if n == 'gaps' else (torch.bool,))):
            _refuse(n, f'{want} {(B, M)} on {u.device}', t)
    if gaps.numel() and gaps.min() < 0: raise ValueError(f'gaps must be ≥ 0; got {gaps.min().item()}')
    if free is None: return
    if not isinstance(free, Tensor) or not free.is_floating_point() or free.shape != (C,):
        _refuse('free', f'real ({C},)', free)
    if free.device != u.device: _refuse('free', f'on {u.device}, as u', free)
    if C and free.min() < 0: raise ValueError(f'free must be ≥ 0; its smallest entry is {free.min().item():.3g}')

def _pair(state):
    if state is not None and not (isinstance(state, (tuple, list)) and len(state) == 2):
        _refuse('state', 'a pair (g, y)', state)
    return state

# %%
#| export
def decimated_mix(
    v:Tensor,           # (B, M, C) real potential of the kept sites; None = 0
    u:Tensor,           # (B, M, C) real values of the kept sites
    z,                  # complex scalar or complex (C,), E + iη with η > 0
    absorb:Tensor=None, # (B, M, C) absorbing potential w ≥ 0 of the kept sites; None = 0
    gaps:Tensor=None,   # (B, M) int: free sites between each kept site and the one before; None = 0
    cut:Tensor=None,    # (B, M) bool: a new chain begins before the gap
    free:Tensor=None,   # (C,) absorption w₀ ≥ 0 of the free sites; None = 0
    state:tuple=None,   # (g, y), each (B, C) complex, of the last kept site before
    return_state:bool=False,
    backend:str=None,   # 'reference' or 'cpp'; None = the best that loads
):                      # complex (B, M, C), or ((B, M, C), state)
    """Causal resolvent mixing at the kept sites of a longer chain, as `resolvent_mix` of the whole chain has it
    there when all other sites are free: no value, no potential. What it costs depends on M only. Exact
    gradients to every input. `ValueError` as `resolvent_mix`, and for gaps that do not fit."""
    v, u, E, eta, w, _, state = _inputs(v, u, z, absorb, None, _pair(state))
    if u is None: raise ValueError('u, the values to mix, is missing')
    if gaps is None: gaps = torch.zeros(u.shape[:2], dtype=torch.int64, device=u.device)
    g, y = _mix_kept(v, u, E, eta, w, gaps, cut, free, state, backend)
    if not return_state: return y
    if y.shape[1]: return y, (g[:,-1], y[:,-1])
    return y, state or tuple(torch.zeros_like(y[:,:0].sum(1)) for _ in range(2))

def _mix_kept(v, u, E, eta, w, gaps, cut, free, state, backend=None): # g and y
    _check_gaps(gaps, cut, free, u)
    lengths, index = gaps.unique(return_inverse=True)
    index = index.view(gaps.shape)
    if cut is not None: index = torch.where(cut, ~index, index)
    args = (v, w, u, E, eta, *free_run(E, eta, free, lengths), index, *(state or (None, None)))
    if _transformed(): return _decimated_ref(*args)
    watched = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)
    if watched or not unwatched(*args): return decimated_op(*args, backend or '')
    return _scan_kept(*args, backend or '')

# %% [markdown]
# The test that matters: random sites of random documents are kept; the whole chain is computed with all its sites and looked at where they are kept. Values, state and the gradients of everything, also of $E$, $\eta$ and $w_0$, which reach the result through the tables.

# %%
def long_chain(keep, cut, ts, E, eta, w0):
    "v, u, w of the kept sites put into whole chains, all else free."
    B,N,C = *keep.shape, len(E)
    full = [torch.zeros(B, N, C, dtype=E.dtype) for _ in range(2)] + [w0.expand(B, N, C)]
    v, u, w = (torch.where(keep[...,None], t, f) for t,f in zip(ts, full))
    hop = (~cut[:,1:])[...,None].to(E).expand(-1, -1, C)
    return resolvent_mix(v, u, torch.complex(E, eta), w, hop)[keep]

def gaps_by_hand(keep, cut): # of the kept sites in their order; whether a chain begins before
    gaps, begins = [], []
    for row,c in zip(keep.tolist(), cut.tolist()):
        gap, new = 0, True
        for k,begin in zip(row, c):
            if begin: gap, new = 0, True
            if k:
                gaps.append(gap)
                begins.append(new)
            gap, new = (0, False) if k else (gap + 1, new)
    return torch.tensor(gaps, dtype=torch.long), torch.tensor(begins, dtype=torch.bool)

# %%
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.floats(0, 1), st.floats(0, .3),
       st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def decimated_is_the_whole_chain(B, N, C, share, cuts, seed):
    gen = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    keep, cut = torch.rand(B, N, generator=gen) < share, torch.rand(B, N, generator=gen) < cuts
    v, u, w, E, eta, w0 = r(B, N, C), r(B, N, C), r(B, N, C).abs(), r(C) - 2, r(C).abs() + .02, r(C).abs()
    leaves = [t.requires_grad_() for t in (v, u, w, E, eta, w0)]
    want = long_chain(keep, cut, leaves[:3], E, eta, w0)
    gaps, begins = gaps_by_hand(keep, cut)
    z, some = torch.complex(E, eta), lambda t: t[keep][None]
    got = decimated_mix(some(v), some(u), z, some(w), gaps[None], begins[None], w0)[0]
    close(got, want, 1e-9)
    ct = torch.view_as_complex(r(*want.shape, 2))
    gs = [torch.autograd.grad((y*ct).real.sum(), leaves, allow_unused=True) for y in (got, want)]
    for a,b in zip(*gs): close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b, 1e-7)
decimated_is_the_whole_chain()

# %% [markdown]
# In pieces, through the state, and with more than one row; a gap of a million sites, and gaps of zero, which make it `resolvent_mix`:

# %%
v, u, w = torch.randn(3, 2, 7, 5, dtype=torch.float64)
z, free = torch.complex(torch.rand(5).double() - 3, torch.rand(5).double() + .01), torch.rand(5).double()
gaps = torch.tensor([[3, 0, 1, 10**6, 2, 0, 0], [0, 0, 5, 1, 1, 1, 9]])
y, end = decimated_mix(v, u, z, w.abs(), gaps, free=free, return_state=True)
first, s = decimated_mix(v[:,:3], u[:,:3], z, w[:,:3].abs(), gaps[:,:3], free=free, return_state=True)
rest, s = decimated_mix(v[:,3:], u[:,3:], z, w[:,3:].abs(), gaps[:,3:], free=free, state=s, return_state=True)
close(torch.cat([first, rest], 1), y)
for a,b in zip(s, end): close(a, b)
close(decimated_mix(v, u, z, w.abs()), resolvent_mix(v, u, z, w.abs()))
test_eq(decimated_mix(None, u[:,:0], z, gaps=gaps[:,:0]).shape, (2, 0, 5))

# %%
refused('gaps must be ≥ 0; got -1', decimated_mix, v, u, z, gaps=gaps - 1)
refused('gaps must be int64 or int32 (2, 7)', decimated_mix, v, u, z, gaps=gaps.float())
refused('gaps must be int64 or int32 (2, 7)', decimated_mix, v, u, z, gaps=gaps[:,:5])
refused('cut must be bool (2, 7)', decimated_mix, v, u, z, gaps=gaps, cut=gaps)
refused('free must be real (5,)', decimated_mix, v, u, z, gaps=gaps, free=1.)
refused('free must be ≥ 0', decimated_mix, v, u, z, gaps=gaps, free=-free)
refused('u, the values', decimated_mix, v, None, z, gaps=gaps)
refused('a pair (g, y)', decimated_mix, v, u, z, gaps=gaps, state=s[0])
refused('Im z > 0', decimated_mix, v, u, z.conj(), gaps=gaps)

# %% [markdown]
# What the scan alone costs, forward and backward, against the whole chain by the kernel of `01b`. At a share of 1, the table look-up, the second reciprocal and double precision in the backward sweep make it dearer; below, it wins.

# %%
def scans(share, N=4096, C=128):
    keep = torch.rand(1, N) < share
    gaps, begins = (t[None] for t in gaps_by_hand(keep, torch.zeros_like(keep)))
    n, z = gaps.shape[1], torch.complex(torch.rand(C) - 3, torch.rand(C) + .01)
    u, w = (torch.rand(1, N, C).requires_grad_() for _ in range(2))
    us, ws = (torch.rand(1, n, C).requires_grad_() for _ in range(2))
    ct, cs = torch.randn(1, N, C, dtype=torch.complex64), torch.randn(1, n, C, dtype=torch.complex64)
    whole = lambda: torch.autograd.grad(resolvent_mix(None, u, z, w), [u, w], ct)
    kept = lambda: torch.autograd.grad(decimated_mix(None, us, z, ws, gaps, begins), [us, ws], cs)
    t = time_together(dict(whole=whole, kept=kept), 5)
    return t['kept']/t['whole']
print('time over that of the whole chain: ' + ', '.join(f'{scans(k):.2f} with {k:.0%} kept' for k in (1., .5, .25, .125)))
# %% [markdown]
# ## Which sites, and what lies between
#
# Given a mask of kept sites and the cuts between documents, the chain's book-keeping: the gap before each site, whether a document begins in it, and where each site looks back to. A document that begins with free sites begins with a gap. With a state, the first gap goes on from the sites that were free
# at the end of the piece before.

# %%
#| export
Sites = namedtuple('Sites', 'gap begins source distance rest over')

def chain_sites(
    keep:Tensor,      # (B, N) bool
    cut:Tensor=None,  # (B, N) bool, true where a new document begins
    gap:Tensor=None,  # (B,) int: free sites since the last kept one, or since the document began; None = 0
)->Sites:
    """Where the sites of a chain stand, all (B, N): `gap`, free sites between each one and the kept one before
    it; `begins`, whether its document began since; `source`, the newest kept site up to it, -1 for the state
    and -2 for none; `distance` to that. `rest`, (B,), is the gap that goes on; `over`, (B,), whether the
    last kept site's document has ended."""
    (B,N), i = keep.shape, torch.arange(keep.shape[1], device=keep.device)
    last = lambda t: torch.where(t, i, -1).cummax(1).values if N else i.expand(B, 0)
    kept, begin = last(keep), torch.full_like(keep, -1, dtype=torch.long) if cut is None else last(cut)
    before = F.pad(kept, (1, 0), value=-1)[:,:-1]
    start = torch.full((B, 1), -1, device=keep.device) if gap is None else -1 - gap[:,None]
    origin = lambda k: torch.where((k < 0) & (begin < 0), start, torch.maximum(k, begin - 1))
    own = torch.where((kept >= 0) & (kept >= begin), kept, torch.where(begin < 0, -1, -2))
    distance = i - origin(kept)
    rest = distance[:,-1] if N else -1 - start[:,0]
    over = begin[:,-1] > kept[:,-1] if N else torch.zeros(B, dtype=torch.bool, device=keep.device)
    return Sites(i - origin(before) - 1, begin > before, own, distance, rest, over)

# %%
@given(st.integers(1, 3), st.integers(1, 20), st.floats(0, 1), st.floats(0, .4), st.integers(0, 20), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def sites_are_counted(B, N, share, cuts, at, seed):
    gen = torch.Generator().manual_seed(seed)
    keep, cut = torch.rand(B, N, generator=gen) < share, torch.rand(B, N, generator=gen) < cuts
    at, s = min(at, N), chain_sites(keep, cut)
    gaps, begins = gaps_by_hand(keep, cut)
    first = keep & (keep.cumsum(1) == 1)
    test_eq(s.gap[keep], gaps)
    test_eq((s.begins | first)[keep], begins)
    test_eq(s.distance[keep].sum().item(), 0)
    old, doc = torch.arange(N).expand(B, N) - s.distance, cut.cumsum(1)
    mine = s.source >= 0
    test_eq(s.source[mine], old[mine])
    test_eq(doc.gather(1, s.source.clamp(min=0))[mine], doc[mine])
    a = chain_sites(keep[:,:at], cut[:,:at])
    b = chain_sites(keep[:,at:], cut[:,at:], a.rest)
    test_eq(torch.cat([a.gap, b.gap], 1), s.gap)
    test_eq(torch.cat([a.distance, b.distance], 1), s.distance)
    test_eq(b.rest, s.rest)
sites_are_counted()

# %% [markdown]
# ## Choosing sites
#
# A scalar per token and layer, $\ell_i$, linear in the layer's input, says how important site $i$ is. At inference it is kept where $\ell_i > 0$. That is a decision about one token, made from what that token has seen: causal, and the same in a stream as in a batch. Mixture-of-depths
# ([Raposo et al. 2024](https://arxiv.org/abs/2404.02258)) keeps the $k$ tokens of a sequence with the largest scores instead, which needs the whole sequence, so it must be trained to do without at inference; CoLT5 ([Ainslie et al. 2023](https://arxiv.org/abs/2303.09752)) routes in an encoder, where that is no
# obstacle.
#
# In training the choice is drawn, so that sites on either side of the threshold are tried out: keep where $\ell_i/\tau + L_i > 0$, with $L_i$ logistic noise, the difference of two Gumbel variables (Gumbel-softmax with two classes: [Maddison et al. 2017](https://arxiv.org/abs/1611.00712), [Jang et al. 2017](https://arxiv.org/abs/1611.01144)). The
# value is 0 or 1; the slope is that of $\sigma(\ell_i/\tau+L_i)$ (*straight-through*, [Bengio et al. 2013](https://arxiv.org/abs/1308.3432)). The usual form, $\sigma((\ell_i+L_i)/\tau)$, keeps a site with the probability $\sigma(\ell_i)$ at every temperature: the noise never leaves, and a model that kept a random quarter in training keeps, with $\ell<0$ everywhere, nothing at inference.
# With the noise outside, the choice becomes the threshold as $\tau \to 0$.

# %%
#| export
def logistic_noise(x:Tensor)->Tensor: # of x's shape
    "Independent standard logistic variables: differences of two Gumbel variables."
    u = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
    return u.log() - torch.log1p(-u)

def gumbel_sigmoid(
    logits:Tensor,      # any shape
    tau:float=1.,       # temperature
    noise:Tensor=None,  # of the same shape; None: drawn
)->Tensor:              # of the same shape: 0 or 1, with the slope of the sigmoid
    "A binary choice `l/τ + noise > 0`, straight-through. `ValueError` for a temperature that is not positive."
    if not tau > 0: raise ValueError(f'tau must be > 0; got {tau}')
    soft = torch.sigmoid(logits/tau + (logistic_noise(logits) if noise is None else noise))
    return (soft > .5).to(soft) + (soft - soft.detach())

# %%
l = torch.linspace(-3, 3, 7).requires_grad_()
m = gumbel_sigmoid(l.expand(20000, 7))
test_eq(m.detach().unique(), [0, 1])
test_close(m.detach().mean(0), l.detach().sigmoid(), .02)
test_eq(gumbel_sigmoid(l, .01, torch.ones(7)).detach(), l >= 0)
gumbel_sigmoid(l, .5, torch.zeros(7)).sum().backward()
test_close(l.grad, l.detach().mul(2).sigmoid()*(-2*l.detach()).sigmoid()*2, 1e-6)
refused('tau must be > 0', gumbel_sigmoid, l, 0)

# %% [markdown]
# ## The layer
#
# `SparseMixer` is a `BKMixer` on the chosen sites: projections, convolution, scan, gate and output projection run on these only. The convolution sees the kept sites before; the scan knows the gaps. What do the sites in between get?
#
# * `'skip'`: nothing. The residual stream passes them by.
# * `'hold'`: the output of the last kept site.
# * `'propagate'`: the chain's own state there. $y$ at a free site is $c_k\,y$ of the kept site before, one complex multiplication. This *is* the whole chain; only norm, gate (of the last kept site) and output projection have to run everywhere.
#
# A loss pulls the mean of $\sigma(\ell/\tau)$ over the batch towards the target share. The training loop finds it as `loss_sparsity`.

# %%
#| export
FILLS = 'skip', 'hold', 'propagate'

class SparseMixer(nn.Module):
    """`BKMixer` on sites that it chooses, token by token, O(kept sites). The others are free sites of the
    same chain, eliminated exactly. `ValueError` for a share or a fill that cannot be."""
    no_weight_decay = ('free_bias',)
    @delegates(BKMixer, but=['causal'])
    def __init__(self,
        d_model:int,            # D
        share:float=.5,         # of the sites to keep: what the loss aims at
        fill:str='propagate',   # what other sites get: 'skip', 'hold', 'propagate'
        gaps:bool=True,         # False: the kept sites are neighbours, as in `on_sites`
        weight:float=3.,        # of the loss
        tau:float=1.,           # temperature of the choice in training
        **kwargs
    ):
        super().__init__()
        if not 0 < share <= 1: raise ValueError(f'share: want 0 < share ≤ 1; got {share}')
        if fill not in FILLS: raise ValueError(f'fill must be one of {", ".join(map(repr, FILLS))}; got {fill!r}')
        if fill == 'propagate' and not gaps: raise ValueError("fill='propagate' wants gaps=True")
        self.d_model, self.share, self.fill, self.gaps = d_model, share, fill, gaps
        self.weight, self.tau = weight, tau
        self.mixer = BKMixer(d_model, **kwargs)
        if not self.mixer.causal: raise ValueError('SparseMixer is causal only')
        self.predict = nn.Linear(d_model, 1)
        at = torch.special.ndtri(torch.tensor(min(share, .999))) # the share of a normal variable above 0
        nn.init.normal_(self.predict.weight, std=d_model**-.5)
        nn.init.constant_(self.predict.bias, at.item())
        if gaps: self.free_bias = nn.Parameter(torch.full((self.mixer.channels,), -4.))
        self.kept = None                                    # share of sites kept in the last pass

    def extra_repr(self): return f'share={self.share}, fill={self.fill!r}, gaps={self.gaps}'

# %%
#| export
@patch
def choose(self:SparseMixer, x:Tensor): # (B, N, D) → (B, N) bool, and the choice with its slope, or None
    "The sites to keep: drawn in training, by a threshold otherwise."
    logits = _float(self.predict(x)[...,0])
    if not self.training: keep, slope = logits > 0, None
    else:
        slope = gumbel_sigmoid(logits, self.tau)
        keep = slope.detach() > .5
        mean = torch.sigmoid(logits/self.tau).mean() if logits.numel() else logits.sum()
        if torch.is_grad_enabled(): self.aux_losses = dict(loss_sparsity=((mean - self.share)**2, self.weight))
    self.kept = keep.detach().float().mean()
    return keep, slope

class _Places: # of the kept sites: one packed chain, or, with a state, a row for each row
    def __init__(self, keep, rows):
        self.keep, self.count, (B, N) = keep, keep.sum(1), keep.shape
        self.shape = (B, int(self.count.max()) if keep.numel() else 0) if rows else (1, int(keep.sum()))
        row = torch.arange(B, device=keep.device)[:,None]
        self.at = (row*self.shape[1] + keep.cumsum(1) - 1)[keep] if rows else None
    def put(self, t): # (B, N, …) → the kept ones, in the shape of the chain
        some = t[self.keep]
        if self.at is None: return some[None]
        B, M = self.shape
        return some.new_zeros(B*M, *some.shape[1:]).index_copy(0, self.at, some).unflatten(0, self.shape)
    def get(self, t): # back: (kept sites, …), row after row
        return t[0] if self.at is None else t.flatten(0, 1)[self.at]

# %% [markdown]
# The kept sites, as one packed chain in training; with a state, as a padded row for each row of the batch, since each has its own state. Padding stands at the end and is never read.

# %%
#| export
@patch
def _free(self:SparseMixer): return F.softplus(_float(self.free_bias))

@patch
def _run(self:SparseMixer, x, sites, places, state):
    "On kept sites: mixed values and pivots, gate, and what the convolution read."
    m, (tail, chain) = self.mixer, (None, None) if state is None else state[:2]
    begins = sites.begins if places.at is not None else sites.begins | (places.keep.cumsum(1) == 1)
    gaps, begins, h = places.put(sites.gap), places.put(begins), m.in_proj(places.put(x))
    n = m.n_in*m.channels
    read, gate = h.split([n, h.shape[-1] - n], -1)
    a = read if m.conv is None else m.conv(read, tail, begins)[0]
    u, w, v = m._parts(a)
    v, u, E, eta, w, _, chain = _inputs(v, u*m.scale, m.spectrum(), w, None, chain)
    g, y = _mix_kept(v, u, E, eta, w, gaps, begins, self._free(), chain)
    return g, y, gate, read, begins

@patch
def _out(self:SparseMixer, y, gate): # as `BKMixer` ends
    m = self.mixer
    y = torch.view_as_real(y) if m.features == 2 else y.real[...,None]
    y = _normed(m.norm, y.flatten(-2)).unflatten(-1, y.shape[-2:])*F.silu(_float(gate))[...,None]
    return m.out_proj(y.flatten(-2).to(gate.dtype))

# %% [markdown]
# `_spread` gives every site what belongs to its source: a kept site, the state, or zero.

# %%
#| export
def _spread(items, first, sites, keep): # (kept, F) and (B, F) or None → (B, N, F)
    B, N = keep.shape
    if first is None: first = items.new_zeros(B, items.shape[-1])
    table = torch.cat([first.to(items.dtype), items, items.new_zeros(1, items.shape[-1])])
    newest = B - 1 + keep.flatten().cumsum(0).view(B, N)       # in the table
    row = torch.arange(B, device=keep.device)[:,None].expand(B, N)
    at = torch.where(sites.source >= 0, newest, torch.where(sites.source == -1, row, len(table) - 1))
    return table[at]

@patch
def _propagated(self:SparseMixer, y, g, gate, sites, keep, state):
    "Output of every site: the chain's value at free sites is that of the kept one before, carried on."
    chain, held = (None, None) if state is None else state[1], None if state is None else state[3]
    g0, y0 = (None, None) if chain[0] is None else chain
    y, g, gate = (_spread(*a, sites, keep) for a in ((y, y0), (g, g0), (gate, held)))
    lengths, index = sites.distance.unique(return_inverse=True)
    E, eta = (t if t.dtype == torch.float64 else t.float() for t in torch.view_as_real(self.mixer.spectrum()).unbind(-1))
    run = [t.to(y.dtype) for t in free_run(E, eta, self._free(), lengths)]
    c = cross_run(g, run[0], run[1][index], run[2][index])[1]
    return self._out(c*y, gate)

# %%
#| export
def _end(t, count, first): # the last of each row's kept sites; where there is none, that of the state
    rows = torch.arange(len(t), device=t.device)
    first = t.new_zeros(len(t), t.shape[-1]) if first is None else first.to(t.dtype)
    if not t.shape[1]: return first
    return torch.where((count > 0)[:,None], t[rows,(count - 1).clamp(min=0)], first)

@patch
def _tail(self:SparseMixer, read, begins, tail, count): # what the convolution reads next
    if self.mixer.conv is None or self.mixer.conv.width == 1: return read[:,:0] if self.mixer.conv else None
    W = self.mixer.conv.width
    tail = read.new_zeros(len(read), W-1, read.shape[-1]) if tail is None else tail.to(read)
    at = count[:,None] + torch.arange(W-1, device=read.device)
    rows = torch.arange(len(read), device=read.device)[:,None]
    doc = F.pad(begins.long().cumsum(1), (W-1, 0))[rows,at]
    return torch.cat([tail, read], 1)[rows,at]*(doc == doc[:,-1:])[...,None]

@patch
def _new_state(self:SparseMixer, g, y, gate, out, read, begins, sites, places, state):
    tail, (g0, y0), _, held = (None, (None, None), None, None) if state is None else state
    n, alive = places.count, ~sites.over[:,None]
    last = dict(hold=out, propagate=gate).get(self.fill)
    tail = self._tail(read, begins, tail, n)
    return (None if tail is None else tail*alive[...,None], (_end(g, n, g0)*alive, _end(y, n, y0)*alive),
            sites.rest, None if last is None else _end(last, n, held)*alive)

# %% [markdown]
# The whole. With `gaps=False` the kept sites are neighbours, and the inner mixer with its fused kernel runs on them (`on_sites` of `11`).

# %%
#| export
@patch
def forward(self:SparseMixer,
    x:Tensor,               # (B, N, D)
    state:tuple=None,       # (conv tail, (g, y), free sites since the last kept one, what is held)
    cut:Tensor=None,        # (B, N) bool, true where a new document begins
    return_state:bool=False,
):                          # (B, N, D), with return_state also the new state
    _check(self.mixer, x, None, cut)
    if state is not None: self._check_state(state, x)
    keep, slope = self.choose(x)
    sites = chain_sites(keep, cut, None if state is None else state[2])
    if not self.gaps: return self._neighbours(x, keep, slope, sites, state, cut, return_state)
    places = _Places(keep, state is not None or return_state)
    g, y, gate, read, begins = self._run(x, sites, places, state)
    out = None
    if self.fill == 'propagate':
        full = self._propagated(*map(places.get, (y, g, gate)), sites, keep, state)
        if slope is not None: full = full*torch.where(keep, slope, 1).to(full)[...,None]
    else:
        out = self._out(y, gate)
        full = self._filled(places.get(out), keep, slope, sites, state)
    if not return_state: return full
    return full, self._new_state(g, y, gate, out, read, begins, sites, places, state)

@patch
def _filled(self:SparseMixer, out, keep, slope, sites, state):
    if slope is not None: out = out*slope[keep].to(out)[:,None]
    if self.fill == 'hold': return _spread(out, None if state is None else state[3], sites, keep)
    at = keep.flatten().nonzero()[:,0]
    return out.new_zeros(keep.numel(), out.shape[-1]).index_copy(0, at, out).unflatten(0, keep.shape)

# %%
#| export
@patch
def _neighbours(self:SparseMixer, x, keep, slope, sites, state, cut, return_state):
    inner = None if state is None else state[0]
    out = on_sites(self.mixer, x, keep, inner, cut, return_state)
    if return_state: out, inner = out
    full = self._filled(out, keep, slope, sites, state)
    if not return_state: return full
    held = None
    if self.fill == 'hold':
        places = _Places(keep, True)
        padded = out.new_zeros(len(x)*places.shape[1], out.shape[-1]).index_copy(0, places.at, out)
        held = _end(padded.unflatten(0, places.shape), places.count, None if state is None else state[3])
        held = held*~sites.over[:,None]
    return full, (inner, None, sites.rest, held)

@patch
def _check_state(self:SparseMixer, state, x):
    B, m, name = len(x), self.mixer, 'state'
    if not isinstance(state, (tuple, list)) or len(state) != 4:
        raise ValueError('state: want (conv tail, (g, y), gap, held), as `return_state` gave it')
    if self.gaps: m._check_state(state[:2], x)
    gap, held = state[2:]
    if not isinstance(gap, Tensor) or gap.dtype != torch.int64 or gap.shape != (B,):
        raise ValueError(f'gap of the state: want int64 ({B},); got {gap!r:.80}')
    width = dict(skip=None, hold=self.d_model, propagate=m.channels)[self.fill]
    if (held is None) != (width is None) or held is not None and held.shape != (B, width):
        raise ValueError(f'held part of the state: want {"None" if width is None else (B, width)}')
# %%
def sparse(d, share=.5, bias=None, **kw): # for checks: no draw, sites chosen by a threshold
    m = SparseMixer(d, share, **kw).eval()
    if bias is not None: nn.init.constant_(m.predict.bias, bias)
    return m
KINDS = [dict(fill=f, gaps=g) for f in FILLS for g in (True, False) if g or f != 'propagate']
for kw in KINDS: check_mixer(lambda d: sparse(d, bias=50., **kw))
full, plain = sparse(8, bias=50., fill='skip'), BKMixer(8)
plain.load_state_dict(full.mixer.state_dict())
x = torch.randn(2, 9, 8)
close(full(x), plain(x), 1e-5)

# %% [markdown]
# With all sites kept it is `BKMixer`, and holds all of a mixer's promises. With some of them kept, where the choice depends on the input, the gradient by later tokens is exactly zero. The values before a changed token may differ in the last bit, since a matrix product over another number of rows may add in another order.

# %%
def check_sparse(seed, **kw):
    torch.manual_seed(seed)
    m, x = sparse(16, **kw).double(), torch.randn(2, 23, 16, dtype=torch.float64)
    for p in m.parameters(): p.data += .1*torch.randn_like(p)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    y, keep = m(x), m.choose(x)[0]
    for i in range(23):
        x2 = x.clone()
        x2[:,i] += torch.randn(16).double()
        same(m(x2)[:,:i], y[:,:i])
        xg = x.clone().requires_grad_()
        m(xg)[:,i].square().sum().backward()
        assert xg.grad[:,i+1:].abs().max().item() == 0 if i < 22 else True
    short = x[:,:6].clone().requires_grad_()
    assert gradcheck(lambda x: m(x).sum((0, 1)), short, fast_mode=True)
    assert m(x[:0]).shape == (0, 23, 16) and m(x[:,:0]).shape == (2, 0, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad): _check_pieces(m, x, y, same)
    return keep
for kw in KINDS:
    shares = [check_sparse(s, share=share, **kw).double().mean().item() for s in range(3) for share in (.1, .6)]
    assert min(shares) < .25 < .5 < max(shares)

# %% [markdown]
# Empty pieces, pieces without a kept site, and pieces of any length, with cuts anywhere; the state's gap goes on through all of them.

# %%
@given(st.sampled_from(KINDS), st.floats(.05, .95), st.lists(st.integers(0, 20), max_size=4), st.floats(0, .4),
       st.integers(0, 999))
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def any_pieces(kw, share, ends, cuts, seed):
    torch.manual_seed(seed)
    m, x, cut = sparse(6, share, **kw).double(), torch.randn(3, 20, 6).double(), torch.rand(3, 20) < cuts
    want, out, s, ends = m(x, cut=cut), [], None, sorted(ends)
    for a,b in zip([0, *ends], [*ends, 20]):
        y, s = m(x[:,a:b], s, cut[:,a:b], True)
        out.append(y)
    close(torch.cat(out, 1), want, 1e-9)
any_pieces()

# %% [markdown]
# `'propagate'` is the whole chain: a plain mixer whose $u$ and potential are zero, and whose absorption is $w_0$, wherever a site is not kept, gives the same values. Here without the convolution, which sees kept sites only.

# %%
m, x = sparse(6, conv=0, fill='propagate').double(), torch.randn(2, 15, 6).double()
keep, b = m.choose(x)[0], m.mixer
h, gate = b.in_proj(x).split([12, 6], -1)
u, w, _ = b._parts(h)
u, w = u*keep[...,None], torch.where(keep[...,None], w, m._free())
y = resolvent_mix(None, u*b.scale, b.spectrum(), w)
at = chain_sites(keep).source.clamp(min=0)[...,None].expand(-1, -1, 6)
want = m._out(y, gate.gather(1, at))*(keep.cumsum(1) > 0)[...,None]
close(m(x), want, 1e-9)
assert 0 < keep.sum() < keep.numel()

# %%
s = m(x, return_state=True)[1]
refused('0 < share ≤ 1', SparseMixer, 8, 0)
refused("'skip', 'hold', 'propagate'; got 'mean'", SparseMixer, 8, fill='mean')
refused('wants gaps=True', SparseMixer, 8, fill='propagate', gaps=False)
refused('causal only', SparseMixer, 8, causal=False)
refused('want a floating tensor (B, N, 6)', m, x[0])
refused('cut: want bool', m, x, None, keep.long())
refused('as `return_state` gave it', m, x, s[:2])
refused('want int64 (2,)', m, x, (*s[:2], s[2].float(), s[3]))
refused('want (2, 6)', m, x, (*s[:3], None))
refused('g of the state', m, x, (s[0], (s[1][0][:1], s[1][1]), *s[2:]))
# %% [markdown]
# ## As many experts as a token needs
#
# The same idea for the feed-forward: instead of `top_k` experts for every token, take the likeliest ones until their probabilities add up to $p$ (*top-p routing*, 'Harder tasks need more experts', [Huang et al. 2024](https://arxiv.org/abs/2403.07652)). A router that is sure computes one expert; one that hesitates computes several. This is
# causal without further ado. The router could make everything cheap or dear by being flat or sharp, so its entropy is a loss (`loss_expert_entropy`): it must pay for hesitating. The load-balance loss of `MoEBalance` works as before. Only chosen experts are computed.

# %%
#| export
def top_p_choice(
    probs:Tensor,        # (T, E)
    p:float,             # 0 < p ≤ 1
    bias:Tensor=None,    # (E,) added to the probabilities for the order only
)->Tensor:               # (T, E) bool, at least one true in each row
    "The smallest set of likeliest experts with a probability of at least p. `ValueError` for another p."
    if not 0 < p <= 1: raise ValueError(f'want 0 < p ≤ 1; got {p}')
    order = torch.argsort(probs if bias is None else probs + bias, dim=-1, descending=True, stable=True)
    s = probs.gather(-1, order)
    take = s.cumsum(-1) - s < p
    take[...,0] = True
    return torch.zeros_like(take).scatter(-1, order, take)

# %%
probs = torch.tensor([[.5, .3, .15, .05], [.1, .6, .2, .1], [.25, .25, .25, .25]])
test_eq(top_p_choice(probs, .6), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]).bool())
test_eq(top_p_choice(probs, .61).sum(-1), [2, 2, 3])
test_eq(top_p_choice(probs, 1.).sum(-1), [4, 4, 4])
test_eq(top_p_choice(probs, 1e-6).sum(-1), [1, 1, 1])
test_eq(top_p_choice(probs, .2, torch.tensor([0, 0, 0, 1.])).sum(-1), [2, 2, 1]) # the favoured one comes first
refused('0 < p ≤ 1', top_p_choice, probs, 0)

# %%
#| export
class TopPMoE(SparseMoE):
    """Mixture of experts in which each token computes as many as its router needs to be sure: the likeliest ones,
    up to a probability of `p`; gates are the probabilities (Huang et al. 2024)."""
    @delegates(SparseMoE, but=['top_k', 'router'])
    def __init__(self,
        d_model:int,          # D
        num_experts:int=4,    # E
        p:float=.5,           # probability that the chosen experts must have together
        weight:float=1e-2,    # of the entropy loss
        mult:float=1,         # hidden width of an expert over D
        **kwargs
    ):
        if not 0 < p <= 1: raise ValueError(f'want 0 < p ≤ 1; got {p}')
        if kwargs.get('router', 'softmax') != 'softmax': raise ValueError("TopPMoE has router='softmax'")
        super().__init__(d_model, num_experts, 1, mult, **kwargs)
        self.p, self.weight, self.mean_experts = p, weight, None

    def _mix(self, x, ws, noise):
        router, w1, b1, w2, b2 = ws
        logits = F.linear(_float(x), _float(router))
        probs = (logits/self.tau).softmax(-1)
        chosen = top_p_choice(probs.detach(), self.p, self.balance)
        expert, token = chosen.t().nonzero(as_tuple=True)         # sorted by expert
        counts = chosen.sum(0)
        h = ACTS[self.act][0](grouped_rows(x.index_select(0, token), w1, counts, b1))
        f = grouped_rows(h, w2, counts, b2)*probs[token,expert][:,None].to(x.dtype)
        self.mean_experts = counts.sum()/max(1, len(x))
        if self.training and torch.is_grad_enabled() and len(x):
            entropy = torch.special.entr(probs).sum(-1).mean()
            self.aux_losses = dict(loss_expert_entropy=(entropy, self.weight))
        return torch.zeros_like(x).index_add(0, token, f), logits, counts

    def extra_repr(self): return f'{self.d_model}, num_experts={self.num_experts}, p={self.p}'

@FFNS.register('top_p_moe', init=True)
@delegates(TopPMoE)
def top_p_ffn(config, **kwargs)->TopPMoE:
    "The feed-forward 'top_p_moe'; it takes the arguments of `TopPMoE`."
    return TopPMoE(config.d_model, **kwargs)

# %% [markdown]
# Against all experts computed and masked; with $p=1$, all of them; with a tiny $p$, the likeliest one.

# %%
m, x = TopPMoE(6, 5, p=.6, bias=True).double(), torch.randn(3, 7, 6).double()
nn.init.normal_(m.b1)
def all_of_them(x):
    probs = F.linear(x, m.router.weight).softmax(-1)
    f = torch.einsum('...eh,ehd->...ed', F.gelu(torch.einsum('...d,edh->...eh', x, m.w1) + m.b1), m.w2) + m.b2
    return ((probs*top_p_choice(probs, m.p))[...,None]*f).sum(-2)
for p in (1e-3, .6, .9, 1.):
    m.p, ps = p, [x.requires_grad_(), *m.parameters()]
    close(m(x), all_of_them(x))
    for a,b in zip(*[torch.autograd.grad(f(x).sin().sum(), ps) for f in (m, all_of_them)]): close(a, b)
    print(f'p = {p:.3f}: {m.mean_experts:.2f} experts a token')
test_eq(m.mean_experts.item(), 5)
test_eq(m(x[:0]).shape, (0, 7, 6))
assert set(m.aux_losses) == {'loss_expert_entropy'}
refused('0 < p ≤ 1', TopPMoE, 6, p=2)
refused("router='softmax'", TopPMoE, 6, router='gumbel')
refused('want (..., 6)', m, x[...,:3])

# %% [markdown]
# ## In a model
#
# `mixer='sparse'` in a config, on its own or in some layers. The callback lowers the temperature and logs what share of the sites was computed.

# %%
#| export
@MIXERS.register('sparse', init=True)
@delegates(SparseMixer)
def sparse_mixer(config, **kwargs)->SparseMixer:
    "The mixer 'sparse'; it takes the arguments of `SparseMixer`."
    expand = 2 if config.expand is None else config.expand
    if not config.causal: raise ValueError("mixer 'sparse' is causal only; for causal=False use 'resolvent'")
    return SparseMixer(config.d_model, **{'expand': expand, **kwargs})

register_metric('loss_sparsity', 'squared distance of the mean choice from the target share, added over the layers')
register_metric('sparsity_ratio', 'share of the sites that sparse mixers computed, mean over the layers')
register_metric('loss_expert_entropy', 'entropy of the routers that choose how many, nats, added over the layers')
register_metric('mean_experts', 'experts that a token computed, mean over tokens and layers')

def _of_kind(model, *kinds): return [m for m in model.modules() if isinstance(m, kinds)]

class SparseTraining(Callback):
    """Lowers the temperature of every `SparseMixer` geometrically from `start` to `end`, and logs
    `sparsity_ratio` and, for `TopPMoE`, `mean_experts`. `ValueError` for a model without either."""
    order = -15 # before the Recorder
    def __init__(self,
        start:float=1., # temperature at the beginning
        end:float=.1,   # temperature at the end of the budget
    ):
        if not (start > 0 and end > 0): raise ValueError(f'want temperatures > 0; got {start}, {end}')
        store_attr()
    def before_fit(self):
        self.mixers, self.experts = (_of_kind(self.learn.model, k) for k in (SparseMixer, TopPMoE))
        if not self.mixers and not self.experts:
            raise ValueError("SparseTraining wants a model with sparse mixers or experts, e.g. "
                             "ModelConfig(mixer='sparse') or ModelConfig(ffn='top_p_moe')")
    def before_step(self):
        for m in self.mixers: m.tau = self.start*(self.end/self.start)**min(1., self.learn.spent)
    def after_loss(self):
        if self.mixers: self.learn.log(sparsity_ratio=torch.stack([m.kept for m in self.mixers]).mean())
        if self.experts: self.learn.log(mean_experts=torch.stack([m.mean_experts for m in self.experts]).mean())
# %% [markdown]
# A model with both kinds of choice: in training the losses and shares are logged, in evaluation the model is causal, streams, and is saved and loaded like any other.

# %%
data = LMData.from_corpus('stdlib', batch_size=4, context=33)
cfg = ModelConfig(256, 16, 3, mixer=('resolvent', 'sparse'), mixer_kw={'sparse': dict(share=.4)},
                  ffn='top_p_moe', ffn_kw=dict(num_experts=3, mult=1))
torch.manual_seed(0)
model, cb = ResNetBK(cfg), SparseTraining(1., .2)
learn = Learner(model, data, cbs=[cb, MoEBalance()], eval_every=0, progress=False, log_every=1)
learn.fit(steps=3)
a, b = learn.history[0], learn.history[-1]
assert 0 < a.sparsity_ratio < 1 and 1 <= a.mean_experts <= 3 and a.loss_sparsity >= 0 < a.loss_expert_entropy
test_close(model.blocks[1].mixer.tau, .2**(2/3), 1e-6)
total = a.loss_lm + 3.*a.loss_sparsity + .01*a.loss_expert_entropy + .01*a.loss_balance + 1e-3*a.loss_router_z
test_close(a.loss_total, total, 1e-4)

# %%
model.double().eval()
x = torch.randint(256, (2, 19))
y, s, out = model(x), None, []
for i in range(19):
    o, s = model.step(x[:,i], s)
    out.append(o)
close(torch.stack(out, 1), y, 1e-9)
test_eq(take_aux_losses(model), {})
model.float()
test_eq(model.generate(x, 4, seed=0).shape, (2, 23))
test_eq(ResNetBK(copy.deepcopy(cfg)).blocks[2].mixer.share, .4)
def no_parts(): Learner(ResNetBK(ModelConfig(256, 8, 1)), data, cbs=SparseTraining(), progress=False).fit(steps=1)
refused('wants a model with sparse', no_parts)
refused('temperatures > 0', SparseTraining, 0)
refused('causal only', ResNetBK, ModelConfig(256, 8, 1, mixer='sparse', causal=False))
refused("takes no 'shares'", ModelConfig, 256, 8, 1, mixer='sparse', mixer_kw={'sparse': dict(shares=.4)})
