"""More than one process: resumed on another number of them, killed from outside and while saving, launched from a notebook. See also test_resume.py."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest
import torch
from resnet_bk import distributed
from resnet_bk.checkpoints import check_checkpoint, list_checkpoints, newest_checkpoint
from resnet_bk.cli import find_model

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='needs gloo'),
              pytest.mark.skipif(sys.platform != 'linux', reason='needs fork and SIGKILL'),
              pytest.mark.skipif(distributed._storage() is None, reason='shards want PyTorch 2.8')]

# Everything that is imported is imported once; the processes of each part of a test are forked from this one.
COMMON = '''
import io, json, os, signal, sys, time
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np, torch
import torch._dynamo, torch.distributed.checkpoint as dcp, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
from resnet_bk.moe_training import MoEBalance
from resnet_bk.distributed import ShardedFormat, consolidate, on_processes
from resnet_bk.checkpoints import list_checkpoints
from resnet_bk.data import ByteTokenizer, Floors, LMData
from resnet_bk.learner import Callback, CancelFit, Learner, LostProcess
from resnet_bk.model import ModelConfig, ResNetBK
torch.set_num_threads(1)
ids = np.cumsum(np.random.default_rng(0).integers(1, 4, 40_000)) % 256

class StopAt(Callback):
    def __init__(self, step): self.step = step
    def before_step(self):
        if self.learn.step == self.step: raise CancelFit
class Count(Callback): # a state of its own
    n = 0
    def after_step(self): self.n += 1
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, d): self.n = d['n']

def learner(folder, batches=4, shard=False, cfg={}, cbs=(), uneven=True, lr=1e-2, **kw):
    torch.manual_seed(0)
    model = ResNetBK(ModelConfig(**dict(vocab_size=256, d_model=16, n_layers=2, n_heads=1) | cfg))
    data = LMData(ByteTokenizer(), ids[:30_000], ids[30_000:], Floors(5.5, 1.1), 'counting', 2, 32)
    each = data.train.forever
    def forever():
        for i,(x,y) in enumerate(each()): yield x, torch.where(torch.arange(32) < 3, y, -100) if uneven and i % 2 else y
    data.train.forever = forever
    world = int(os.environ['WORLD_SIZE'])
    return Learner(model, data, lr=lr, folder=folder, accumulate=batches//world, shard=shard and world > 1, cbs=[Count(), *cbs],
                   **dict(eval_every=8, eval_batches=2, checkpoint_every=0, log_every=3, progress=False) | kw)

def part(folder, stop=None, steps=16, **kw):
    learn = learner(folder, cbs=[StopAt(stop), *kw.pop('cbs', ())], **kw)
    learn.fit(**dict(resume=True) if list_checkpoints(folder/'checkpoints') else dict(steps=steps))
    own = lambda t: t.full_tensor() if hasattr(t, 'full_tensor') else t
    w = torch.cat([own(p).detach().flatten() for p in learn.model.parameters()]) # all processes gather together
    return [(m.step, m.loss_total, m.grad_norm, m.valid_nats) for m in learn.history], w, learn.find_cbs(Count)[0].n
def equal(a, b, eps=1e-5, weights=1e-5): # Adam divides by the gradient: where that is nearly zero, rounding shows in the weights
    assert [r[0] for r in a[0]] == [r[0] for r in b[0]], (a[0], b[0])
    for p,q in zip(a[0], b[0]): # step, loss, norm (rounding shows most there), validation
        assert all(abs((x or 0) - (y or 0)) < e for x,y,e in zip(p, q, (eps, eps, 100*eps, eps))), (p, q)
    assert (a[1] - b[1]).abs().max() < weights and a[2] == b[2], ((a[1] - b[1]).abs().max(), a[2], b[2])
box = Path(sys.argv[1])
'''
def env(**kw): return {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}', 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', **kw}

def script(tmp_path, code, ok=True):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', COMMON + code, str(tmp_path)], env=env(), capture_output=True, text=True, timeout=280)
    assert not ok or r.returncode == 0, r.stdout + r.stderr
    return r

CHAIN = '''
straight = on_processes(1, part, box/'straight')[0]
for shard in (False, True):
    name = 'sharded' if shard else 'copies'
    for stop,W in ((4, 1), (7, 2), (11, 4), (None, 1)): # 7 and 11 are in the middle of a record
        out = on_processes(W, lambda: part(box/name, stop, shard=shard))
        if stop == 11: # shards that four processes wrote
            assert len(list((box/name/'checkpoints/step-00000011/shards').glob('*'))) == 4 if shard else True
    equal(out[0], straight)
    assert straight[0][-1][1] < straight[0][0][1] - .1 and straight[2] == 16
    print(name, [round(r[1], 6) for r in out[0][0]])
'''
def test_one_two_four_one(tmp_path):
    "The same global batch on 1, 2, 4 and 1 processes: the losses, gradient norms, evaluations and weights are those of one process that went straight through, 1e-5; whole copies and shards"
    r = script(tmp_path, CHAIN)
    assert r.stdout.count('the checkpoint is of 4 process(es), this run has 1') == 2

ODD = '''
kinds = dict(tie=dict(tie=True), experts=dict(ffn='moe', ffn_kw=dict(num_experts=3)), attention=dict(mixer='attention', d_model=15, n_heads=3))
for name,cfg in kinds.items(): # tied weights; experts; sizes that four do not divide
    more = lambda: [MoEBalance(bias_rate=.01)] if name == 'experts' else []
    one = on_processes(1, lambda: part(box/f'{name}1', steps=6, cfg=cfg, cbs=more()))[0]
    four = on_processes(4, lambda: part(box/f'{name}4', 3, steps=6, cfg=cfg, shard=True, cbs=more()))[0]
    rest = on_processes(2, lambda: part(box/f'{name}4', cfg=cfg, shard=True, cbs=more()))[0]
    equal(rest, one, weights=1e-3)
    with redirect_stdout(io.StringIO()):
        model = ResNetBK.from_pretrained(consolidate(box/f'{name}4/checkpoints/step-00000006', box/f'{name}m'))
    assert (torch.cat([p.detach().flatten() for p in model.parameters()]) - one[1]).abs().max() < 1e-3
    print('ok', name)
'''
def test_other_models(tmp_path):
    "Tied weights, a mixture of experts with its balance loss, odd sizes: four processes, then two, and a model made of the shards"
    assert script(tmp_path, ODD).stdout.count('ok ') == 3

EXACT = '''
def dropout(folder, stop=None, **kw):
    class Drop(Callback):
        def before_run(self): self.learn.model.blocks[0].drop.p = .3
    return part(folder, stop, shard=True, cbs=[Drop()], **kw)
whole = on_processes(2, dropout, box/'whole')
on_processes(2, dropout, box/'cut', 7)
rest = on_processes(2, dropout, box/'cut')
assert rest[0][0] == whole[0][0], (rest[0][0], whole[0][0])
for a,b in zip(rest, whole): assert torch.equal(a[1], b[1]) and a[2] == b[2] == 16
def other(**kw):
    try: part(box/'cut', **kw)
    except ValueError as e: return str(e)
said = on_processes(2, lambda: other(batches=8, shard=True, steps=20))
assert all('batches per step was 4, is 8' in s for s in said), said
'''
def test_dropout_goes_on_exactly(tmp_path):
    "On the same number of processes a resumed sharded run is the same to the last bit, random numbers of every process included; another global batch is refused"
    script(tmp_path, EXACT)

# One run under torchrun, and what it says; or under torchrun's own agent with forked workers, which import nothing again
RUN = COMMON + '''
mode, world = sys.argv[2], int(sys.argv[3])
class Slow(Callback):
    def before_step(self):
        if self.learn.step >= 5: time.sleep(.2)
class DiesSaving(Callback): # in the middle of its shard
    def before_step(self):
        if self.learn.step == 11 and self.learn.parallel.rank == int(mode[-1]):
            from torch.distributed.checkpoint import HuggingFaceStorageWriter as W
            def half(self, plan, planner):
                (Path(self.path)/'shard-half.safetensors').write_bytes(b'x'*999)
                os.kill(os.getpid(), signal.SIGKILL)
            W.write_data = half
def main():
    cbs = [Slow()] if mode == 'slow' else [DiesSaving()] if mode.startswith('saving') else []
    print('pid', os.environ['RANK'], os.getpid(), flush=True)
    learner(box, shard='ddp' not in sys.argv, cbs=cbs, checkpoint_every=4, log_every=1).fit(**dict(resume=True) if mode == 'resume' else dict(steps=16))
if 'RANK' in os.environ: main()
elif __name__ == '__main__':
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    elastic_launch(LaunchConfig(1, 1, world, run_id=str(os.getpid()), rdzv_backend='c10d', rdzv_endpoint='localhost:0', start_method='fork', max_restarts=0), main)()
'''
def torchrun(folder, mode, world=2, *more, agent='torchrun'):
    folder.mkdir(exist_ok=True)
    (folder.parent/'run.py').write_text(RUN)
    own = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={world}'] if agent == 'torchrun' else []
    cmd = [sys.executable, '-W', 'ignore', *own, str(folder.parent/'run.py'), str(folder), mode, str(world), *more]
    return subprocess.Popen(cmd, env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def losses(folder): return [(m['step'], m['loss_total']) for m in map(json.loads, (folder/'metrics.jsonl').read_text().splitlines())]
def same(a, b): assert [s for s,_ in a] == [s for s,_ in b] and np.abs(np.subtract([l for _,l in a], [l for _,l in b])).max() < 1e-5, (a, b)

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    script(folder, "on_processes(1, lambda: learner(box/'run', log_every=1).fit(steps=16) and None)")
    return losses(folder/'run')

def goes_on(folder, world, last, straight):
    "The newest checkpoint is whole, and a run that goes on from it on `world` processes gives the losses of one that was not killed"
    have = list_checkpoints(folder/'checkpoints')
    assert have[0].name == last and all(check_checkpoint(p) == '' for p in have), have
    p = torchrun(folder, 'resume', world, agent='forked')
    out, err = p.communicate(timeout=200)
    assert p.returncode == 0 and f'resumed from {last}' in out, out + err
    same(losses(folder), straight)
    assert not list((folder/'checkpoints').glob('tmp-*')) and newest_checkpoint(folder/'checkpoints').name == 'step-00000016'

@pytest.mark.parametrize('world, victim, how, agent', [(2, 1, 'fsdp', 'torchrun'), (4, 0, 'fsdp', 'forked'), (2, 0, 'ddp', 'forked')])
def test_killed_from_outside(tmp_path, straight, world, victim, how, agent):
    "kill -9 of one worker in mid-run: the job ends within seconds, not zero, the others say why in one line; the run goes on from the last checkpoint"
    folder = tmp_path/'run'
    p = torchrun(folder, 'slow', world, *['ddp'][:how == 'ddp'], agent=agent)
    end, f = time.time() + 120, folder/'metrics.jsonl'
    while not (f.exists() and len(f.read_text().splitlines()) >= 9): # the checkpoint of step 8 may be on its way
        assert time.time() < end and p.poll() is None, p.communicate()
        time.sleep(.02)
    os.set_blocking(p.stdout.fileno(), False)
    said = p.stdout.read()
    os.set_blocking(p.stdout.fileno(), True)
    os.kill(int(re.search(rf'pid {victim} (\d+)', said).group(1)), signal.SIGKILL)
    t = time.time()
    out, err = p.communicate(timeout=60)
    t = time.time() - t
    print(f'the job ended {t:.1f} s after the kill')
    assert p.returncode != 0 and t < 40, (p.returncode, t)
    lost = [l for l in err.splitlines() if l.startswith('another process of this run has gone, so this one ends at step ')]
    assert lost and all('start again with resume=True' in l for l in lost) and len(lost) <= world - 1, err
    assert '-9' in err or 'SIGKILL' in err, err # torchrun says who it was
    goes_on(folder, 2, 'step-00000008', straight)

@pytest.mark.parametrize('victim', [0, 1])
def test_killed_while_writing_its_shard(tmp_path, straight, victim):
    "SIGKILL of the main process, and of another, when half of a shard of step 12 is on the disk: the checkpoint of step 8 is the newest"
    folder = tmp_path/'run'
    p = torchrun(folder, f'saving{victim}', agent='forked')
    out, err = p.communicate(timeout=120)
    assert p.returncode != 0 and 'another process of this run has gone' in err, out + err
    halves = list((folder/'checkpoints').glob('tmp-*/shards/shard-half*'))
    assert len(halves) == (victim == 0) # the main process tidies up unless it is the one that died
    goes_on(folder, 2, 'step-00000008', straight)

def test_bk_train(tmp_path):
    "`bk_train --shard` writes shards, `--resume` goes on from them, and what it ends with is a model; the package announces its parts as an installed one does"
    info = tmp_path/'lib/announced-1.0.dist-info'
    info.mkdir(parents=True)
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[resnet_bk.parts]\ndistributed=resnet_bk.distributed\n')
    (tmp_path/'text.txt').write_text('what goes on here? ' * 2000)
    (tmp_path/'stop.py').write_text("from resnet_bk.learner import Callback, by_default\nimport os, signal\n@by_default\nclass Stop(Callback):\n    def after_step(self):\n"
                                    "        if self.learn.step == 11 and 'STOP' in os.environ: os.kill(os.getpid(), signal.SIGTERM)\n")
    small = '--corpus text.txt --d_model 16 --n_layers 2 --context 32 --batch_size 2 --steps 40 --shard --quiet --checkpoint_every 8 --folder run --use stop'.split()
    path = os.pathsep.join([str(tmp_path/'lib'), str(tmp_path), str(ROOT), os.environ.get('PYTHONPATH', '')])
    def train(*args, world=2, **kw):
        cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={world}', '-m', 'resnet_bk.cli', 'train', *args]
        return subprocess.run(cmd, env=env(PYTHONPATH=path, **kw), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    r = train(*small, STOP='1')
    assert r.returncode == 0 and 'go on with:  bk_train --resume' in r.stdout, r.stdout + r.stderr
    found = newest_checkpoint(tmp_path/'run/checkpoints')
    assert len(list((found/'shards').iterdir())) == 2 and not (found/'model.safetensors').exists()
    with pytest.raises(ValueError, match='step-0000.* is in shards.*consolidate'): find_model(tmp_path/'run')
    again = '--resume', '--folder', 'run', '--use', 'stop'
    r = train(*again, world=1)
    assert r.returncode != 0 and 'batches per step was 2, is 1' in r.stderr, r.stdout + r.stderr
    r = train(*again, '--accumulate', '2', world=1)
    assert r.returncode == 0 and f'resumed from {found.name}' in r.stdout, r.stdout + r.stderr
    assert (tmp_path/'run/model/model.safetensors').exists() and (newest_checkpoint(tmp_path/'run/checkpoints')/'model.safetensors').exists()

LAUNCH = '''
import os, sys, torch
exec(CELL)
launch(sys.argv[1])
'''
def test_notebook_launcher(tmp_path):
    "The cell for Colab and Kaggle, as it stands in the notebook, on two processes of the CPU"
    pytest.importorskip('accelerate')
    nb = json.loads((ROOT/'nbs/12c_distributed.ipynb').read_text(encoding='utf8'))
    cell = next(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code' and 'import notebook_launcher' in ''.join(c['source']))
    assert cell.startswith('#| notest')
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', LAUNCH.replace('CELL', repr(cell)), str(tmp_path/'run')], env=env(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert r.returncode == 0, r.stdout + r.stderr
    records = [json.loads(l) for l in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert len(records) == 20 and records[-1]['tokens'] == 2*20*8*128 and records[-1]['loss_total'] < records[0]['loss_total']
