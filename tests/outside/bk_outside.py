"""A package outside `resnet_bk` that adds a mixer with a compiled kernel, a feed-forward, a block with a loss of its own, a metric, two callbacks, options, a preset and a benchmark. `pip install` announces them by the entry points in pyproject.toml; without that, `--use bk_outside` is all that says so."""
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from resnet_bk.bench import register_bench
from resnet_bk.learner import Callback, register_metric, register_option, register_preset
from resnet_bk.model import BLOCKS, FFNS, MIXERS, ModelConfig, ResNetBKBlock
from resnet_bk.native import CPP_GUARD, Call, CppLibrary, find_kernel, register_kernel, time_together, unwatched

# A mixer
def average(x, r, h, cut=None): # (B, N, D) and the last (B, D), from (B, N, D), (D,), (B, D), (B, N)
    "h ← h + r(x_i - h), token by token, in plain PyTorch; at a cut h begins at zero"
    out = []
    for i,t in enumerate(x.unbind(1)):
        if cut is not None: h = h.masked_fill(cut[:,i,None], 0)
        h = torch.lerp(h, t, r)
        out.append(h)
    return torch.stack(out, 1) if out else x

@MIXERS.register('decay')
class Decay(nn.Module):
    "An exponential average of what came before, with a rate per channel"
    fused = True # False: always the plain form
    def __init__(self, config, rate=.5):
        super().__init__()
        self.rate = nn.Parameter(torch.full((config.d_model,), rate))
    def forward(self, x, state=None, cut=None, return_state=False):
        r, h = self.rate.sigmoid().to(x.dtype), x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
        kernel = find_kernel('decay', x.device.type) if self.fused and unwatched(x, r, h, cut) else None
        y = average(x, r, h, cut) if kernel is None or not kernel.takes(x) else kernel(x, r, h, cut)
        return (y, y[:,-1] if x.shape[1] else h) if return_state else y

# A compiled kernel
CPP = CPP_GUARD + r'''
#include <vector>
template <class T> int average(const I* a) {
  I B = a[0], N = a[1], D = a[2];
  const T *x = (const T*)a[3], *r = (const T*)a[4], *h = (const T*)a[5];
  const bool* cut = (const bool*)a[6];
  T* y = (T*)a[7];
  for (I b = 0; b < B; b++)
    for (I i = b * N; i < (b + 1) * N; i++) {
      const T* last = i > b * N ? y + (i - 1) * D : h + b * D;
      T keep = cut && cut[i] ? 0 : 1;
      for (I c = 0; c < D; c++) y[i * D + c] = keep * last[c] + r[c] * (x[i * D + c] - keep * last[c]);
    }
  return 0;
}
template <class T> int adjoint(const I* a) {  // y and its gradient g; gradients of x, r and h
  I B = a[0], N = a[1], D = a[2];
  const T *x = (const T*)a[3], *r = (const T*)a[4], *h = (const T*)a[5];
  const bool* cut = (const bool*)a[6];
  const T *y = (const T*)a[7], *g = (const T*)a[8];
  T *dx = (T*)a[9], *dr = (T*)a[10], *dh = (T*)a[11];
  std::vector<double> sum(D, 0.);
  for (I b = 0; b < B; b++) {
    T* d = dh + b * D;
    for (I c = 0; c < D; c++) d[c] = 0;
    for (I i = (b + 1) * N - 1; i >= b * N; i--) {
      const T* last = i > b * N ? y + (i - 1) * D : h + b * D;
      T keep = cut && cut[i] ? 0 : 1;
      for (I c = 0; c < D; c++) {
        T e = d[c] + g[i * D + c];
        dx[i * D + c] = r[c] * e;
        sum[c] += e * (x[i * D + c] - keep * last[c]);
        d[c] = keep * (1 - r[c]) * e;
      }
    }
  }
  for (I c = 0; c < D; c++) dr[c] = (T)sum[c];
  return 0;
}
#define BOTH(NAME, T) \
  extern "C" int NAME##_average(const I* a) { return guarded([&] { return average<T>(a); }); } \
  extern "C" int NAME##_adjoint(const I* a) { return guarded([&] { return adjoint<T>(a); }); }
BOTH(float32, float)
BOTH(float64, double)
'''
LIBRARY = CppLibrary('bk_outside_decay', CPP)

def _call(x, r, h, cut): # every tensor is checked on its way into C++
    (B, N, D), t = x.shape, x.dtype
    return (Call().ints(B, N, D).dense('x', x, t, (B, N, D)).dense('rate', r, t, (D,)).dense('state', h, t, (B, D))
            .dense('cut', cut, torch.bool, (B, N)))

class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, r, h, cut):
        y = torch.empty_like(x)
        _call(x, r, h, cut).dense('y', y, x.dtype, x.shape).enter(LIBRARY, f'{str(x.dtype)[6:]}_average')
        ctx.save_for_backward(x, r, h, cut, y)
        return y
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, r, h, cut, y = ctx.saved_tensors
        out, c = [torch.empty_like(t) for t in (x, r, h)], _call(x, r, h, cut)
        for t in (y, g.contiguous(), *out): c.dense('a gradient', t, x.dtype, t.shape)
        c.enter(LIBRARY, f'{str(x.dtype)[6:]}_adjoint')
        return *out, None

def kernel(x, r, h, cut): return _Average.apply(*(t if t is None else t.contiguous() for t in (x, r, h, cut)))
kernel.takes = lambda x: x.dtype in (torch.float32, torch.float64) and LIBRARY.load() is not None
register_kernel('decay', 'cpu', kernel)

# A feed-forward
@FFNS.register('glu')
class GLU(nn.Module):
    def __init__(self, config, width=1):
        super().__init__()
        self.inp, self.out = nn.Linear(config.d_model, 2*width*config.d_model), nn.Linear(width*config.d_model, config.d_model)
    def forward(self, x): return self.out(F.glu(self.inp(x)))

# A block
@BLOCKS.register('quiet')
class QuietBlock(ResNetBKBlock):
    "Asks for small outputs by an auxiliary loss"
    def __init__(self, config, mixer, ffn, weight=.1):
        super().__init__(config.d_model, mixer, ffn, config.dropout)
        self.weight = weight
    def forward(self, x, *args, **kw):
        y = super().forward(x, *args, **kw)
        h = y[0] if isinstance(y, tuple) else y
        if self.training: self.aux_losses = {'loss_quiet': ((h - x).square().mean(), self.weight)}
        return y

# Metrics
register_metric('loss_quiet', 'mean square of what the blocks add')
register_metric('surprise', 'largest mean loss of a sequence in the last batch, nats')

# Callbacks
class Surprise(Callback):
    "Looks at the losses of the sequences before the gradients are made"
    order = -30
    def __init__(self): self.seen = 0
    def before_backward(self):
        self.seen += 1
        self.learn.log(surprise=self.learn.example_losses.max())
    def state_dict(self): return dict(seen=self.seen)
    def load_state_dict(self, d): self.seen = d['seen']
    def summary(self): return f'batches looked at: {self.seen}'

class NoisyGradient(Callback):
    "Does the learner's backward pass, and adds noise to the gradients"
    def __init__(self, size): self.size = size
    def backward(self):
        self.learn.backward()
        for p in self.learn.model.parameters():
            if p.grad is not None: p.grad += self.size*torch.randn_like(p)*p.grad.abs().mean()

# Options of bk_train
register_option('gradient_noise', 0., 'noise on the gradients, as a share of their size', float, 'outside',
                cbs=lambda v, o: [Surprise()] + [NoisyGradient(v)]*(v > 0))
register_option('quiet_weight', 0., 'of the loss for small outputs; 0 = the plain block', float, 'outside',
                config=lambda v, o: dict(block='quiet', block_kw=dict(weight=v)) if v else {})
register_option('glu', 0, 'width of a gated feed-forward; 0 = none', int, 'outside', config=lambda v, o: dict(ffn='glu', ffn_kw=dict(width=v)) if v else {})
register_preset('outside', 'all that this package has', mixer='decay,resolvent', gradient_noise=.1, quiet_weight=.1, glu=2)

# A benchmark
@register_bench('decay', 'the compiled average against its plain form, forward and backward', ['N'], speed=True)
def _decay(quick):
    for N in (64,) if quick else (64, 512, 4096):
        m, x = Decay(ModelConfig(2, 128)), torch.randn(8192//N, N, 128, requires_grad=True)
        def run(fused):
            m.fused = fused
            torch.autograd.grad(m(x).sum(), [x, m.rate])
        t = time_together({'kernel': lambda: run(True), 'plain': lambda: run(False)}, 3)
        yield {'N': N, 'kernel ms': t['kernel'], 'plain ms': t['plain'], 'times as fast': t['plain']/t['kernel']}
