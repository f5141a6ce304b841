"Model, loop and decoder together: what no notebook can test alone."
import copy, subprocess, sys
import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from resnet_bk.data import LMData
from resnet_bk.decoder import CannotDecode, Decoder
from resnet_bk.mixers import BKAttention, BKMixer
from resnet_bk.model import ModelConfig, ResNetBK
from resnet_bk.native import find_kernel, register_kernel

@pytest.fixture(scope='module')
def data():
    d = LMData.from_corpus('stdlib')
    return LMData(d.tokenizer, d.train_tokens[:50_000], d.valid_tokens[:3000], d.floors, d.name, 8, 64)

@pytest.fixture
def model():
    torch.manual_seed(0)
    m = ResNetBK(ModelConfig(64, 32, 2)).eval()
    for p in m.parameters(): p.data += .1*torch.randn_like(p)
    return m

@pytest.fixture
def x(): return torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))

def follows(m, x, n=6): # greedy text is what `forward` says
    t = m.generate(x, n, temperature=0)
    for i in range(x.shape[1], x.shape[1] + n): assert torch.equal(t[:,i], m(t[:,:i])[:,-1].argmax(-1))

def test_a_bidirectional_model_is_refused(data):
    from resnet_bk.learner import Learner
    def fit(**kw):
        model = ResNetBK(ModelConfig(256, 16, 1, causal=False, **kw))
        Learner(model, data, progress=False).fit(steps=1)
    with pytest.raises(ValueError, match='see the next one'): fit()
    fit(allow_leak=True)

def test_the_default_model_beats_the_unigram_floor_and_survives_a_round_trip(data, tmp_path):
    from resnet_bk.learner import Learner
    model = ResNetBK(ModelConfig(256, 32, 2)).init_unigram(data.train_tokens)
    learn = Learner(model, data, lr=1e-2, progress=False, eval_every=0).fit(steps=60)
    nats = learn.evaluate()['nats']
    assert nats < data.floors.unigram - .2
    model.save_pretrained(tmp_path)
    again = Learner(ResNetBK.from_pretrained(tmp_path), data, progress=False).evaluate()['nats']
    assert abs(again - nats) < 1e-6

DEFAULT_DTYPE = '''
import sys, torch
from resnet_bk.model import ModelConfig, ResNetBK
torch.manual_seed(0)
m, x = ResNetBK(ModelConfig(64, 64, 3)).eval(), torch.randint(0, 64, (2, 9))
want = m.generate(x, n=12, temperature=0)
for name in ('float64', 'bfloat16', 'float16'):
    torch.set_default_dtype(getattr(torch, name))
    for _ in range(5): assert torch.equal(m.generate(x, n=12, temperature=0), want), name
torch.set_default_dtype(torch.float32)
torch.set_default_device('meta')
assert torch.equal(m.generate(x, n=12, temperature=0), want)
'''
def test_global_defaults_do_not_change_the_text():
    subprocess.run([sys.executable, '-c', DEFAULT_DTYPE], check=True)

def test_importing_the_model_does_not_import_the_compiler():
    code = "import sys, resnet_bk.model; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)

# compiled equals eager

def nested(s): # tensors of a state
    if isinstance(s, torch.Tensor): yield s
    elif s is not None:
        for t in s: yield from nested(t)

def test_a_compiled_model_keeps_and_uses_its_state(model, x):
    c = torch.compile(model, backend='eager')
    with torch.no_grad():
        (y, s), (yc, sc) = model(x, return_state=True), c(x, return_state=True)
        assert (y - yc).abs().max() < 1e-4
        assert len(list(nested(s))) == len(list(nested(sc)))
        for a,b in zip(nested(s), nested(sc)): assert (a - b).abs().max() < 1e-4
        a, b = (f(x[:,:1], t, return_state=True)[0] for f,t in ((model, s), (c, sc)))
        assert (a - b).abs().max() < 1e-4

def test_compiled_modules_generate_the_same_text(model, x):
    want = model.generate(x, n=8, temperature=0)
    model.forward = torch.compile(model.forward, backend='eager')
    assert torch.equal(model.generate(x, n=8, temperature=0), want)
    del model.forward
    model.compile(backend='eager')
    assert torch.equal(model.generate(x, n=8, temperature=0), want)
    again = torch.compile(copy.deepcopy(model), backend='eager')
    assert torch.equal(again.generate(x, n=8, temperature=0), want)

# here and not in 02c: PyTorch keeps the first `__main__` that it sees, and a test worker has one per notebook
@pytest.mark.parametrize('kind,gauge', [(BKMixer, 'so3'), (BKAttention, 'u1'), (BKAttention, 'so3')])
def test_a_compiled_gauged_layer_is_one_graph(kind, gauge):
    layer, x = kind(16, gauge=gauge), torch.randn(2, 9, 16)
    y = torch.compile(layer, fullgraph=True, backend='aot_eager')(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)

# the head is called

def test_hooks_on_the_head(model, x):
    seen = []
    model.head.register_forward_hook(lambda m, i, o: (seen.append(1), -o)[1])
    y = model(x)
    assert seen
    with pytest.raises(CannotDecode): Decoder(model)
    follows(model, x[:,:5])
    assert not torch.equal(y, model.head.forward(torch.zeros(2, 40, 32)))

@pytest.mark.parametrize('tie', (False, True))
def test_another_head_with_a_bias(tie, x):
    model = ResNetBK(ModelConfig(64, 32, 2, tie=tie)).eval()
    new, y = nn.Linear(32, 64), model(x)
    new.weight = model.embed.weight if tie else model.head.weight
    new.bias.data[:] = 5
    model.head = new
    assert torch.allclose(model(x) - y, torch.tensor(5.), atol=1e-4)
    new.bias.data[7] = 50
    assert model.generate(x, 3, temperature=0)[:,-3:].eq(7).all()
    follows(model, x[:,:5])
    model.head = nn.Linear(32, 64, bias=False)
    follows(model, x[:,:5])

class LoRA(nn.Module):
    def __init__(self, base, r=4):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(torch.randn(r, 32)), nn.Parameter(torch.randn(64, r))
    def forward(self, h): return self.base(h) + h @ self.a.T @ self.b.T

@pytest.mark.parametrize('tie', (False, True))
def test_an_adapter_on_the_head(tie, x):
    model = ResNetBK(ModelConfig(64, 32, 2, tie=tie)).eval()
    y = model(x)
    model.head = LoRA(model.head)
    assert (model(x) - y).abs().max() > .1
    follows(model, x[:,:5])
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    assert model.head.a.grad.abs().max() > 0

def test_pruning_and_parametrisation_of_the_head(model, x):
    prune.l1_unstructured(model.head, 'weight', amount=.5)
    model.train()
    for _ in range(2): F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    follows(model.eval(), x[:,:5])
    prune.remove(model.head, 'weight')
    follows(model, x[:,:5])
    class Twice(nn.Module):
        def forward(self, w): return 2*w
    parametrize.register_parametrization(model.head, 'weight', Twice())
    follows(model, x[:,:5])

def test_dynamic_quantisation(model, x):
    y, q = model(x), torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(q.head) is not nn.Linear
    assert 0 < (q(x) - y).abs().max() < 1
    follows(q, x[:,:5], 2)

def test_a_tied_head_follows_its_embedding(tmp_path, x):
    m = ResNetBK(ModelConfig(64, 32, 2, tie=True)).eval()
    twin = copy.deepcopy(m)
    assert twin.head.weight is twin.embed.weight and twin.embed.weight is not m.embed.weight
    assert [k for k in m.state_dict() if k.startswith(('embed', 'head'))] == ['embed.weight', 'head.bias']
    m.save_pretrained(tmp_path)
    assert torch.equal(ResNetBK.from_pretrained(tmp_path).eval()(x), m(x))
    y = torch.func.functional_call(m, {'embed.weight': 3*m.embed.weight.detach()}, (x,))
    with torch.no_grad(): m.embed.weight *= 3
    assert torch.allclose(y, m(x), atol=1e-4)

# states

def damage(state):
    part = lambda i, f: [*state[:i], f(state[i]), *state[i+1:]]
    yield state[:1]
    yield part(1, lambda s: None) + state[:1]
    yield part(1, lambda s: s[:1])
    yield part(1, lambda s: (s[0][:1], s[1]))
    yield part(1, lambda s: (s[0][:,1:], s[1]))
    yield part(1, lambda s: (s[0].long(), s[1]))
    yield part(1, lambda s: (s[0], (s[1][0].real, s[1][1])))
    yield part(1, lambda s: (s[0], (s[1][0][:,1:], s[1][1])))
    yield part(0, lambda s: s[:1])
    yield part(0, lambda s: ((*s[0][:2], s[0][2][...,1:]), s[1]))

def test_a_damaged_state_is_refused(model, x):
    with torch.no_grad(): _, state = model(x, return_state=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for bad in damage(state):
                with pytest.raises(ValueError): model(x, bad)
                with pytest.raises(ValueError): model.step(x[:,0], bad)
                with pytest.raises(ValueError): Decoder(model, bad)
    follows(model, x)

def test_decoder_and_plain_loop_write_the_same_text(model, x):
    kernel = find_kernel('decode', 'cpu')
    text = model.generate(x, 20, temperature=0)
    assert type(kernel(model, model(x, return_state=True)[1])) is Decoder
    try:
        register_kernel('decode', 'cpu', None)
        assert torch.equal(model.generate(x, 20, temperature=0), text)
    finally: register_kernel('decode', 'cpu', kernel)
