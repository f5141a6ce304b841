"Parts of a model that come from another package: registered, saved, loaded, announced."
import copy, os, subprocess, sys
from pathlib import Path
import torch
from resnet_bk.learner import param_groups
from resnet_bk.model import ModelConfig, ResNetBK

top = Path(__file__).resolve().parents[1]

MINE = '''
import torch
from torch import nn
from resnet_bk.model import BLOCKS, FFNS, MIXERS, ResNetBKBlock

@MIXERS.register('mean')
class Mean(nn.Module): # of all tokens so far
    def __init__(self, config, gain=1.):
        super().__init__()
        self.gain = nn.Parameter(torch.full((config.d_model,), gain))
    def forward(self, x, state=None, cut=None, return_state=False):
        total, n = (0., 0) if state is None else state
        sums = x.cumsum(1) + total
        count = n + torch.arange(1, x.shape[1] + 1)[:,None]
        y = self.gain*sums/count
        return (y, (sums[:,-1:], n + x.shape[1])) if return_state else y

@FFNS.register('gate')
def gate(config, layer): return nn.Sequential(nn.Linear(config.d_model, config.d_model), nn.Sigmoid()) if layer else None

@BLOCKS.register('scaled')
def scaled(config, mixer, ffn, by=1.):
    block = ResNetBKBlock(config.d_model, mixer, ffn)
    nn.init.constant_(block.norm1.weight, by)
    return block
'''
SAVE = '''
import sys, torch, mine
from resnet_bk.model import ModelConfig, ResNetBK
cfg = ModelConfig(65, 16, 3, mixer=('mean', 'resolvent'), mixer_kw={'mean': {'gain': .5}}, ffn='gate', block='scaled', block_kw={'by': .25})
assert cfg.parts == ('mine',), cfg.parts
m = ResNetBK(cfg).eval()
assert (m.blocks[0].norm1.weight == .25).all() and (m.blocks[0].mixer.gain == .5).all() and m.blocks[0].ffn is None and m.blocks[2].ffn is not None
m.save_pretrained(sys.argv[1])
torch.save(m.generate(torch.tensor([[1, 2, 3]]), 8, temperature=0), sys.argv[1] + '/text.pt')
'''
LOAD = '''
import copy, sys, torch
if len(sys.argv) > 2: import mine
from resnet_bk.model import ModelConfig, ResNetBK
m = ResNetBK.from_pretrained(sys.argv[1])
for n in (m, copy.deepcopy(m), ResNetBK(m.config)): assert n.config.parts == ('mine',) and type(n.blocks[0].mixer).__name__ == 'Mean'
assert torch.equal(copy.deepcopy(m).generate(torch.tensor([[1, 2, 3]]), 8, temperature=0), torch.load(sys.argv[1] + '/text.pt'))
'''
def run(code, *args, path=(), **kw):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, path), str(top), os.environ.get('PYTHONPATH', '')]))
    return subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code, *map(str, args)], capture_output=True, text=True, env=env, timeout=300, **kw)

def test_a_model_of_outside_parts_is_saved_and_loaded_once_they_are_imported(tmp_path):
    (tmp_path/'lib').mkdir(); (tmp_path/'lib'/'mine.py').write_text(MINE)
    r = run(SAVE, tmp_path/'model', path=[tmp_path/'lib']); assert r.returncode == 0, r.stderr
    r = run(LOAD, tmp_path/'model', 'mine', path=[tmp_path/'lib']); assert r.returncode == 0, r.stderr
    r = run(LOAD, tmp_path/'model', path=[tmp_path/'lib']); said = r.stderr.strip().splitlines()[-1] # no file decides what is imported
    assert r.returncode == 1 and said.startswith("ValueError: no mixer 'mean'; have ") and 'takes parts from mine: import that' in said, r.stderr

def announce(folder, name, entries):
    info = folder/f'{name}-1.0.dist-info'; info.mkdir(parents=True)
    (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[resnet_bk.parts]\n' + entries)

FOUND = '''
import sys, warnings
from resnet_bk.model import FFNS, MIXERS, ModelConfig, load_parts
MIXERS.register('mean', mine := lambda config: None)
ModelConfig()
assert 'announced' not in sys.modules
with warnings.catch_warnings(record=True) as ws:
    warnings.simplefilter('always')
    assert ModelConfig(ffn='gate').parts == ('announced',)
assert [str(w.message) for w in ws] == ["resnet_bk: no parts of nowhere (ModuleNotFoundError: No module named 'nowhere')"], ws
assert MIXERS['mean'] is mine                  # what was registered by hand stays
sys.modules.pop('announced')
try: ModelConfig(ffn='gat')
except ValueError as e: assert str(e).startswith("no ffn 'gat'; have ['gate', "), e
assert 'announced' not in sys.modules           # once
'''
def test_a_package_announces_parts(tmp_path):
    (tmp_path/'announced.py').write_text(MINE)
    announce(tmp_path, 'outside', 'a=announced\nb=nowhere\n')
    r = run(FOUND, path=[tmp_path]); assert r.returncode == 0, r.stderr

EXPERTS = '''
import sys
from resnet_bk.model import ModelConfig, ResNetBK
m = ResNetBK(ModelConfig(65, 16, 2))
assert 'resnet_bk.moe' not in sys.modules and 'accelerate' not in sys.modules
m = ResNetBK(ModelConfig(65, 16, 2, ffn='moe', ffn_kw={'num_experts': 3}))
assert m.config.parts == () and m.blocks[1].ffn.num_experts == 3
'''
def test_this_package_announces_its_experts(tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '-e', tmp_path], cwd=top, check=True, capture_output=True)
    r = run(EXPERTS, path=[tmp_path]); assert r.returncode == 0, r.stderr

def test_weight_decay_spares_what_is_a_place():
    import resnet_bk.moe_training                      # the experts, installed or not
    for kw in ({}, dict(mixer='attention', tie=True), dict(mixer='diag'), dict(ffn='moe', ffn_kw=dict(bias=True))):
        m = ResNetBK(ModelConfig(65, 16, 2, **kw))
        for m in (m, copy.deepcopy(m)):
            names = {id(p): n for n,p in m.named_parameters()}
            (yes, no) = ([names[id(p)] for p in g['params']] for g in param_groups(m))
            assert {n.split('.')[-1] for n in yes} <= {'weight', 'w1', 'w2'} and all(dict(m.named_parameters())[n].ndim > 1 for n in yes)
            assert len(yes) + len(no) == len(names) and any(n.endswith('conv.taps') for n in no)
            assert any(n.endswith('ffn.b1') for n in no) == ('ffn' in kw)

def test_hidden_states_of_a_compiled_model_and_of_one_in_a_wrapper():
    from resnet_bk.model import hidden_states
    torch._dynamo.reset()
    torch.manual_seed(0)
    m, x = ResNetBK(ModelConfig(65, 16, 2, recompute=True)), torch.randint(65, (2, 9))
    with hidden_states(m) as want: y = m(x)
    for wrapped in (torch.compile(m, backend='aot_eager'), torch.nn.ModuleDict(dict(a=m))):
        if isinstance(wrapped, torch.nn.ModuleDict): wrapped.module, wrapped.forward = m, m.forward
        torch.testing.assert_close(wrapped(x), y)
        with hidden_states(wrapped) as got: wrapped(x).sum().backward()
        assert len(got) == 2 and m._hidden is None
        for a,b in zip(got, want): torch.testing.assert_close(a, b)
        wrapped(x); assert len(got) == 2
