"""A package outside `resnet_bk` that adds a mixer, a feed-forward, a block with a loss of its own, two callbacks, a metric, options and a preset; `--use bk_outside` is all that says so."""
import torch
from torch import nn
from torch.nn import functional as F
from resnet_bk.learner import Callback, register_metric, register_option, register_preset
from resnet_bk.model import BLOCKS, FFNS, MIXERS, ResNetBKBlock

@MIXERS.register('decay')
class Decay(nn.Module):
    "An exponential average of what came before, with a rate per channel"
    def __init__(self, config, rate=.5):
        super().__init__()
        self.rate = nn.Parameter(torch.full((config.d_model,), rate))
    def forward(self, x, state=None, cut=None, return_state=False):
        h, out = torch.zeros_like(x[:,0]) if state is None else state, []
        for t in x.unbind(1):
            h = torch.lerp(h, t, self.rate.sigmoid())
            out.append(h)
        y = torch.stack(out, 1)
        return (y, h) if return_state else y

@FFNS.register('glu')
class GLU(nn.Module):
    def __init__(self, config, width=1):
        super().__init__()
        self.inp, self.out = nn.Linear(config.d_model, 2*width*config.d_model), nn.Linear(width*config.d_model, config.d_model)
    def forward(self, x): return self.out(F.glu(self.inp(x)))

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

register_metric('loss_quiet', 'mean square of what the blocks add')
register_metric('surprise', 'largest mean loss of a sequence in the last batch, nats')

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

register_option('gradient_noise', 0., 'noise on the gradients, as a share of their size', float, 'outside',
                cbs=lambda v, o: [Surprise()] + [NoisyGradient(v)]*(v > 0))
register_option('quiet_weight', 0., 'of the loss for small outputs; 0 = the plain block', float, 'outside',
                config=lambda v, o: dict(block='quiet', block_kw=dict(weight=v)) if v else {})
register_option('glu', 0, 'width of a gated feed-forward; 0 = none', int, 'outside', config=lambda v, o: dict(ffn='glu', ffn_kw=dict(width=v)) if v else {})
register_preset('outside', 'all that this package has', mixer='decay,resolvent', gradient_noise=.1, quiet_weight=.1, glu=2)
