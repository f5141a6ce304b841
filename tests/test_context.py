"Context parallelism on real processes: gloo, a free port for each run, the same numbers as one process."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='needs gloo')

def launch(n, args, cwd, timeout=300, **more):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **more}
    how = ['-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0'] if n > 1 else []
    p = subprocess.run([sys.executable, *how, *map(str, args)], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert p.returncode == 0, f'exit {p.returncode}\n{p.stdout[-3000:]}\n{p.stderr[-3000:]}'
    return p.stdout

EXACT = '''
import copy, os, torch, torch.distributed as dist
from torch.utils._pytree import tree_leaves
from resnet_bk.context import Processes, context_parallel
from resnet_bk.model import ModelConfig, ResNetBK
dist.init_process_group('gloo')
torch.manual_seed(0)
model = ResNetBK(ModelConfig(vocab_size=32, d_model=32, n_layers=2, n_heads=2, ffn='mlp'))
B, N, group = 2, 203, Processes()
ends = {2: [0, 90, N], 4: [0, 11, 11, 150, N]}[group.world] # uneven, and one part of nothing
x, cut = torch.randint(32, (B, N)), torch.zeros(B, N, dtype=torch.bool)
cut[0,ends[1]] = cut[1,ends[-2]-1] = cut[1,40] = True # documents end at a border, beside one, within
with torch.no_grad(): past = model(torch.randint(32, (B, 9)), return_state=True)[1]
a, b = ends[group.rank], ends[group.rank+1]
mine = copy.deepcopy(model)
def loss(logits, a, b): return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:,a:b].flatten(), reduction='sum')
want, end = model(x, past, cut, return_state=True)
loss(want, 0, N).backward()
with context_parallel(mine, group):
    got, mine_end = mine(x[:,a:b], past, cut[:,a:b], return_state=True)
    loss(got, a, b).backward()
def near(a, b): assert torch.linalg.vector_norm(a - b) <= 1e-5*torch.linalg.vector_norm(b) + 1e-7, ((a-b).norm()/b.norm()).item()
if b > a: near(got, want[:,a:b])
for s,t in zip(tree_leaves(mine_end), tree_leaves(end)): near(s, t)
for (n,p),q in zip(mine.named_parameters(), model.parameters()):
    g = torch.zeros_like(p) if p.grad is None else p.grad
    dist.all_reduce(g)
    near(g, q.grad)
if group.rank == 0: print('exact', group.sent)
dist.destroy_process_group()
'''

@pytest.mark.parametrize('n', [2, 4])
def test_processes_equal_one(n, tmp_path):
    "Logits, state and gradients to 1e-5; what is sent does not depend on the number of tokens"
    (tmp_path/'exact.py').write_text(EXACT)
    (tmp_path/'longer.py').write_text(EXACT.replace('203', '1203').replace('150', '650'))
    sent = [int(re.search(r'exact (\d+)', launch(n, [f], tmp_path)).group(1)) for f in ('exact.py', 'longer.py')]
    assert sent[0] == sent[1] > 0

STOP = """
import os
from resnet_bk.learner import Callback, CancelFit, by_default
@by_default
class Stop(Callback):
    order = 100
    def before_run(self): self.learn.log_every = 1
    def after_step(self):
        if self.learn.step == int(os.environ['STOP']): raise CancelFit('here')
"""

def train(n, folder, *args, stop=9):
    common = '--corpus text.txt --d_model 32 --n_layers 2 --context 33 --batch_size 2 --quiet --device cpu --use stop --steps 6'.split()
    return launch(n, ['-m', 'resnet_bk.cli', 'train', '--folder', folder, *(['--use', 'stop'] if '--resume' in args else common), *args], folder.parent, STOP=str(stop))

def losses(folder): return [json.loads(l)['loss_lm'] for l in (folder/'metrics.jsonl').read_text().splitlines()]

def test_training_equals_one_process(tmp_path):
    "bk_train --context_parallel with 2 processes, sharded or not, reads the batches and reaches the losses of one process; a run of 2 goes on with 4"
    (tmp_path/'stop.py').write_text(STOP)
    (tmp_path/'text.txt').write_text(" ".join(str(i*i) for i in range(3000)))
    train(1, tmp_path/'one')
    said = train(2, tmp_path/'two', '--context_parallel')
    assert '2×33 tokens a step' in said and '2 processes' in said
    train(2, tmp_path/'shard', '--context_parallel', '--shard')
    train(2, tmp_path/'more', '--context_parallel', stop=3)
    train(4, tmp_path/'more', '--resume')
    want = losses(tmp_path/'one')
    for name in ('two', 'shard', 'more'):
        got = losses(tmp_path/name)
        assert len(got) == len(want) == 6 and max(abs(a - b) for a,b in zip(got, want)) < 1e-5, (name, got, want)
