"""What a notebook cannot test of the learner: a real SIGKILL, Ctrl-C from outside, a full disk, a log file instead of a terminal, several processes."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from resnet_bk.checkpoints import FolderLock, check_checkpoint, newest_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[1]
gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='needs gloo')
posix = pytest.mark.skipif(os.name != 'posix', reason='needs POSIX signals and limits')

# One small run, as a script of its own. Extra callbacks come from `cbs` in EXTRA, which each test writes.
SCRIPT = '''
import json, os, resource, signal, sys, time
import numpy as np, torch
from torch import nn
from resnet_bk import checkpoints
from resnet_bk.data import LMData, ByteTokenizer, Floors
from resnet_bk.learner import Learner, Callback
from resnet_bk.stability import NumericalStabilityMonitor
torch.set_num_threads(1); torch.manual_seed(0)
rng, cbs = np.random.default_rng(0), []
ids = np.cumsum(rng.integers(1, 4, 60_000)) % 256
data = LMData(ByteTokenizer(), ids[:50_000], ids[50_000:], Floors(5.5, 1.1), 'steps', batch_size=4, context=32)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.drop, self.rnn, self.head = nn.Embedding(256, 32), nn.Dropout(0.1), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 256)
    def forward(self, x): return self.head(self.drop(self.rnn(self.emb(x))[0]))
kw = dict(eval_every=8, eval_batches=3, checkpoint_every=10, log_every=1)
resume, folder = sys.argv[1] == 'resume', sys.argv[2]
EXTRA
learn = Learner(net if 'net' in globals() else Net(), data, folder=folder, cbs=cbs, **kw)
learn.fit(**({} if resume else dict(steps=30)), resume=resume)
AFTER
'''

def script(extra='', after=''): return SCRIPT.replace('EXTRA', extra).replace('AFTER', after)
def env(**kw): return {**os.environ, 'PYTHONPATH': str(ROOT), 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', **kw}

def start(folder, extra='', mode='new', after=''):
    return subprocess.Popen([sys.executable, '-c', script(extra, after), mode, str(folder)], env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def finish(p, code=0):
    out, err = p.communicate(timeout=300)
    assert p.returncode == code, f'exit {p.returncode}\n{out}\n{err}'
    return out, err

def losses(folder):
    keys = ('step', 'loss_total', 'grad_norm', 'learning_rate', 'valid_nats', 'tokens')
    return [{k: m.get(k) for k in keys} for m in map(json.loads, (Path(folder)/'metrics.jsonl').read_text().splitlines())]

def wait_for(p, folder, step):
    "Until the run has recorded `step`"
    end = time.time() + 240
    while time.time() < end and p.poll() is None:
        f = Path(folder)/'metrics.jsonl'
        if f.exists() and len(f.read_text().splitlines()) >= step: return
        time.sleep(0.01)
    pytest.fail(f'the run did not reach step {step}: {finish(p)}')

SLOW = '''
class Slow(Callback):
    def before_step(self): time.sleep(0.1)
cbs = [Slow()]
'''

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The records of a run that nothing happens to"
    folder = tmp_path_factory.mktemp('run')/'straight'
    _, err = finish(start(folder))
    assert len(losses(folder)) == 30
    assert len(err.splitlines()) < 8 and err.count('\r') < 8, 'the progress bar floods a log file'
    return losses(folder)

@posix
def test_killed_and_resumed(straight, tmp_path):
    "SIGKILL at an arbitrary moment after step 13; the resumed run equals the one that was not killed, bit for bit"
    p = start(tmp_path, SLOW)
    wait_for(p, tmp_path, 13)
    p.kill(); finish(p, -signal.SIGKILL)
    out, _ = finish(start(tmp_path, mode='resume'))
    assert 'resumed from step-00000010' in out
    assert losses(tmp_path) == straight

@posix
def test_killed_while_saving(straight, tmp_path):
    "SIGKILL in the middle of writing the checkpoint of step 20: it does not exist, the one of step 10 does"
    finish(start(tmp_path, '''
seal = checkpoints._seal
def kill(tmp): seal(tmp) if learn.step == 10 else os.kill(os.getpid(), signal.SIGKILL)
checkpoints._seal = kill
'''), -signal.SIGKILL)
    box = tmp_path/'checkpoints'
    (whole, half) = sorted(d.name for d in box.iterdir())
    assert whole == 'step-00000010' and half.startswith('tmp-')
    finish(start(tmp_path, mode='resume'))
    assert losses(tmp_path) == straight
    assert [d.name for d in sorted(box.iterdir())] == ['step-00000020', 'step-00000030']

@posix
def test_altered_checkpoint(straight, tmp_path):
    "One byte of the newest checkpoint is changed: said in one line, and the one before it gives the same run"
    finish(start(tmp_path))
    f = tmp_path/'checkpoints/step-00000030/state.pt'
    raw = bytearray(f.read_bytes()); raw[-1] ^= 1; f.write_bytes(raw)
    out, _ = finish(start(tmp_path, mode='resume'))
    assert 'checkpoint step-00000030 is damaged: state.pt was altered (sha256 differs); using step-00000020' in out
    assert losses(tmp_path) == straight

@posix
def test_interrupted(straight, tmp_path):
    "Ctrl-C: a checkpoint, one line that says how to go on, and a clean end"
    p = start(tmp_path, SLOW, after='print("clean", learn.interrupted)')
    wait_for(p, tmp_path, 4)
    p.send_signal(signal.SIGINT)
    out, _ = finish(p)
    assert 'interrupted at step' in out and 'fit(resume=True)' in out and 'clean True' in out
    finish(start(tmp_path, mode='resume'))
    assert losses(tmp_path) == straight

@posix
def test_full_disk(straight, tmp_path):
    "From step 15 on no file may grow beyond 20 kB, as on a full disk: a clear error, and the last good checkpoint is whole"
    _, err = finish(start(tmp_path, '''
class Full(Callback):
    def before_step(self):
        if self.learn.step == 15: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cbs = [Full()]
'''), 1)
    last = err.strip().splitlines()[-1]
    assert last.startswith('OSError: the checkpoint of step 20 could not be written') and 'the last good one is step-00000010' in last
    box = tmp_path/'checkpoints'
    assert [d.name for d in box.iterdir()] == ['step-00000010'] and check_checkpoint(box/'step-00000010') == ''
    finish(start(tmp_path, mode='resume'))
    assert losses(tmp_path) == straight

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk_for_records(tmp_path):
    "The disk is full when a record is written (ENOSPC from /dev/full)"
    (tmp_path/'metrics.jsonl').symlink_to('/dev/full')
    _, err = finish(start(tmp_path), 1)
    assert err.strip().splitlines()[-1].startswith('OSError: step 1 could not be recorded in')

@posix
@pytest.mark.parametrize('where', ['file/run', '/proc/resnet_bk/run'])
def test_unwritable(tmp_path, where):
    "A folder beneath a file, and one in /proc, which not even root can write"
    if where.startswith('/proc') and not Path('/proc').is_dir(): pytest.skip('no /proc')
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='could not be written'):
        write_checkpoint(tmp_path/where, 1, lambda d: (d/'a').write_text('a'))
    with pytest.raises(OSError, match='cannot write to .*: give a folder'): FolderLock(tmp_path/where)

AFTER2 = '''
w = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
np.save(folder + f'/w{os.environ.get("RANK", "")}.npy', w.numpy())
if learn.is_main: print('main', learn.world)
ev = learn.evaluate(20)
if learn.is_main: json.dump(ev, open(folder + '/eval.json', 'w'))
'''
NODROP = '''
net = Net(); net.drop = nn.Identity() # each process has its own random numbers
each = data.train.forever
def forever(): # every other batch has few targets: a mean of means would be wrong
    for i,(x,y) in enumerate(each()): yield x, y if i % 2 else torch.where(torch.arange(32) < 3, y, -100)
data.train.forever = forever
kw |= dict(opt=lambda ps, lr: torch.optim.SGD(ps, lr=lr*100))
'''

STOP = '''
class Stop(Callback):
    def before_step(self):
        if self.learn.step == 15: self.learn.parallel.wait(); os._exit(3)
cbs = [Stop()]
'''

def torchrun(folder, extra='', mode='new', after='', collect=AFTER2):
    folder.mkdir(exist_ok=True)
    (folder/'run.py').write_text(script(extra, collect + after))
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(folder/'run.py'), mode, str(folder)]
    return subprocess.Popen(cmd, env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@gloo
def test_two_processes(tmp_path):
    "Two processes take the batches in turn, so they do what one does with `accumulate=2`; and a resumed pair goes on as one that was not stopped"
    import numpy as np
    one, two, cut = tmp_path/'one', tmp_path/'two', tmp_path/'cut'
    finish(start(one, NODROP + 'kw |= dict(accumulate=2)', after=AFTER2))
    out, _ = finish(torchrun(two, NODROP))
    assert out.count('main 2') == 1 and out.count('step 30:') == 1, out
    a, b, w = np.load(two/'w0.npy'), np.load(two/'w1.npy'), np.load(one/'w.npy')
    assert (a == b).all() and np.abs(a - w).max() < 1e-5
    for p,q in zip(losses(one), losses(two)): assert {k: v or 0 for k,v in p.items()} == pytest.approx({k: v or 0 for k,v in q.items()}, rel=1e-4)
    assert json.loads((one/'eval.json').read_text()) == pytest.approx(json.loads((two/'eval.json').read_text()), rel=1e-4)

    finish(torchrun(cut, STOP), 1)
    finish(torchrun(cut, mode='resume'))
    finish(torchrun(tmp_path/'whole'))
    assert newest_checkpoint(cut/'checkpoints').name == 'step-00000030'
    assert losses(cut) == losses(tmp_path/'whole')

# A recurrent model whose state goes on, over two groups of lanes; dropout only where the random numbers are the same
CARRY = """
from resnet_bk.carried_state import CarryState
class Carrying(Net):
    def forward(self, x, state=None, return_state=False):
        h, state = self.rnn(self.emb(x), state)
        return (self.head(self.drop(h)), state) if return_state else self.head(self.drop(h))
net = Carrying()
data, cbs = data.rebatch(lanes=LANES), [CarryState()]
kw |= dict(opt=lambda ps, lr: torch.optim.SGD(ps, lr=lr*100))
""" # lanes of many windows, in both texts
STILL = 'net.drop = nn.Identity()\n'

@posix
@pytest.mark.parametrize('lanes, accumulate', [(4, 1), (8, 3)])
def test_a_carried_state_goes_on(tmp_path, lanes, accumulate):
    "Killed after step 13: the run that goes on is, bit for bit, the one that was not killed"
    extra = CARRY.replace('LANES', str(lanes)) + f'kw |= dict(accumulate={accumulate})\n'
    finish(start(tmp_path/'whole', extra))
    p = start(tmp_path/'cut', extra + SLOW.replace('cbs = ', 'cbs += '))
    wait_for(p, tmp_path/'cut', 13)
    p.kill(); finish(p, -signal.SIGKILL)
    finish(start(tmp_path/'cut', extra, 'resume'))
    assert losses(tmp_path/'cut') == losses(tmp_path/'whole')

@gloo
@pytest.mark.parametrize('lanes', [8, 16])
def test_a_carried_state_on_two_processes(tmp_path, lanes):
    "Each of two processes has its own lanes: they do what one does with twice the batches, a resumed pair goes on as one that was not stopped, and one process goes on where two stopped"
    import numpy as np
    one, two, cut, fewer = (tmp_path/n for n in ('one', 'two', 'cut', 'fewer'))
    extra = CARRY.replace('LANES', str(lanes)) + STILL
    half, full = extra + 'kw |= dict(accumulate=2)\n', extra + 'kw |= dict(accumulate=4)\n'
    finish(start(one, full, after=AFTER2))
    finish(torchrun(two, half))
    a, b, w = np.load(two/'w0.npy'), np.load(two/'w1.npy'), np.load(one/'w.npy')
    assert (a == b).all() and np.abs(a - w).max() < 1e-5
    near = lambda p, q: {k: v or 0 for k,v in p.items()} == pytest.approx({k: v or 0 for k,v in q.items()}, rel=1e-4)
    assert all(near(p, q) for p,q in zip(losses(one), losses(two), strict=True))
    assert json.loads((one/'eval.json').read_text()) == pytest.approx(json.loads((two/'eval.json').read_text()), rel=1e-5)

    finish(torchrun(cut, half + STOP.replace('cbs = ', 'cbs += ')), 1)
    shutil.copytree(cut, fewer)
    finish(torchrun(cut, half, 'resume'))
    assert losses(cut) == losses(two)
    finish(start(fewer, full, 'resume'))
    assert all(near(p, q) for p,q in zip(losses(fewer), losses(one), strict=True))

@gloo
def test_a_carried_state_with_spread_weights(tmp_path):
    "Weights spread over two processes: the losses and the evaluations of two whole copies"
    extra = CARRY.replace('LANES', '8').replace('kw |= dict(opt=lambda ps, lr: torch.optim.SGD(ps, lr=lr*100))', '') + STILL
    extra += 'kw |= dict(eval_batches=40)\nfor p in net.rnn.parameters(): p.data.mul_(3)\n' # many states, which matter
    finish(torchrun(tmp_path/'whole', extra))
    finish(torchrun(tmp_path/'shards', extra + 'kw |= dict(shard=True)', collect=''))
    for p,q in zip(losses(tmp_path/'whole'), losses(tmp_path/'shards'), strict=True):
        for k in ('loss_total', 'valid_nats'): assert p.get(k) is None or p[k] == pytest.approx(q[k], rel=1e-4)

@gloo
def test_lanes_that_do_not_go_round(tmp_path):
    _, err = finish(torchrun(tmp_path/'odd', CARRY.replace('LANES', '4')), 1)
    assert '4 lanes in batches of 4 do not go round 2 processes: give a multiple of 8 lanes' in err, err

@gloo
def test_one_bad_process(tmp_path):
    "Only one process sees a NaN: both drop the step, take the same remedies, name the same culprit, and stay equal"
    import numpy as np
    out, _ = finish(torchrun(tmp_path, NODROP + '''
class Bad(Callback):
    def __init__(self, at): self.at = at
    def after_pred(self):
        if self.learn.step in self.at and self.learn.parallel.rank == 1: self.learn.preds = self.learn.preds*float('nan')
mon = NumericalStabilityMonitor(calm=4)
net.v_max = 3.
cbs = [Bad((11, 12, 13)), mon]
''', after='import atexit; json.dump([learn.lr_scale, net.v_max, mon.events], open(folder + f"/mon{os.environ[\'RANK\']}.json", "w"))'))
    a, b = (json.loads((tmp_path/f'mon{i}.json').read_text()) for i in (0, 1))
    assert a == b and a[:2] == [1., 3.] and (np.load(tmp_path/'w0.npy') == np.load(tmp_path/'w1.npy')).all()
    assert 'NaN in logits of process 1' in a[2][0] and 'back at step-00000010' in a[2][2], a[2]

@gloo
def test_sharded(tmp_path):
    "Weights spread over two processes: the losses are those of two whole copies, and the checkpoint is a whole model"
    from safetensors.torch import load_file
    net = NODROP.replace("opt=lambda ps, lr: torch.optim.SGD(ps, lr=lr*100)", "")
    finish(torchrun(tmp_path/'whole', net))
    finish(torchrun(tmp_path/'shards', net + 'kw |= dict(shard=True)', collect=''))
    for p,q in zip(losses(tmp_path/'whole'), losses(tmp_path/'shards')): assert p['loss_total'] == pytest.approx(q['loss_total'], rel=1e-4)
    a, b = (load_file(tmp_path/f'{n}/checkpoints/step-00000030/model.safetensors') for n in ('whole', 'shards'))
    assert set(a) == set(b)
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-3)
    finish(torchrun(tmp_path/'cut', net + 'kw |= dict(shard=True)' + STOP, collect=''), 1)
    finish(torchrun(tmp_path/'cut', net + 'kw |= dict(shard=True)', 'resume', collect=''))
    assert losses(tmp_path/'cut') == losses(tmp_path/'shards')

@gloo
@posix
def test_a_killed_process_ends_all(tmp_path):
    "One process is killed: the other says so and ends, instead of waiting for ever"
    _, err = finish(torchrun(tmp_path, '''
class Killed(Callback):
    def before_step(self):
        if self.learn.step == 15 and self.learn.parallel.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
cbs = [Killed()]
'''), 1)
    assert 'another process of this run has gone, so this one ends at step 15; start again with resume=True' in err, err


# Counts what a process asks of the file system, and ends it at request number n: a write is then half done, anything else not at all.
SHIM = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
static long seen, stop;
void faults_stop_at(long n) { seen = 0; stop = n; }
long faults_seen(void) { return seen; }
static int last(void) { return ++seen == stop; }
#define WRAP(T, name, params, args) T name params { \
  static T (*f) params; \
  if (!f) f = dlsym(RTLD_NEXT, #name); \
  if (last()) _exit(9); \
  return f args; }
#define HALF(name, params, args, half) ssize_t name params { \
  static ssize_t (*f) params; \
  if (!f) f = dlsym(RTLD_NEXT, #name); \
  if (last()) { f half; _exit(9); } \
  return f args; }
#define OPEN(name) int name(const char* p, int flags, ...) { \
  static int (*f)(const char*, int, ...); \
  if (!f) f = dlsym(RTLD_NEXT, #name); \
  va_list v; va_start(v, flags); int mode = va_arg(v, int); va_end(v); \
  if (last()) _exit(9); \
  return f(p, flags, mode); }
OPEN(open) OPEN(open64)
int openat(int d, const char* p, int flags, ...) {
  static int (*f)(int, const char*, int, ...);
  if (!f) f = dlsym(RTLD_NEXT, "openat");
  va_list v; va_start(v, flags); int mode = va_arg(v, int); va_end(v);
  if (last()) _exit(9);
  return f(d, p, flags, mode);
}
HALF(write, (int a, const void* b, size_t n), (a, b, n), (a, b, n / 2))
HALF(pwrite, (int a, const void* b, size_t n, off_t o), (a, b, n, o), (a, b, n / 2, o))
HALF(pwrite64, (int a, const void* b, size_t n, off64_t o), (a, b, n, o), (a, b, n / 2, o))
WRAP(ssize_t, writev, (int a, const struct iovec* b, int n), (a, b, n))
WRAP(int, fsync, (int a), (a))
WRAP(int, ftruncate, (int a, off_t n), (a, n))
WRAP(int, ftruncate64, (int a, off64_t n), (a, n))
WRAP(int, close, (int a), (a))
WRAP(int, chmod, (const char* p, mode_t m), (p, m))
WRAP(int, mkdir, (const char* p, mode_t m), (p, m))
WRAP(int, mkdirat, (int d, const char* p, mode_t m), (d, p, m))
WRAP(int, rename, (const char* a, const char* b), (a, b))
WRAP(int, renameat, (int d, const char* a, int e, const char* b), (d, a, e, b))
WRAP(int, unlink, (const char* p), (p))
WRAP(int, unlinkat, (int d, const char* p, int g), (d, p, g))
WRAP(int, rmdir, (const char* p), (p))
'''
FAULTS = '''
shim = ctypes.CDLL(os.environ['LD_PRELOAD'])
shim.faults_seen.restype = ctypes.c_long
def save(at, stop): # in a child: the save of a checkpoint, ended at its request number `stop`
    learn.folder = at
    shim.faults_stop_at(ctypes.c_long(stop))
    learn.save()
    os._exit(0)
from pathlib import Path
whole = Path(folder)
for step in (31, 30): # a new step, and one that is there already
    learn.step, learn.keep, found, asked, stop = step, 1, [], set(), 0
    while True:
        stop += 1
        at = whole.parent/f'{step}-{stop}'
        shutil.copytree(whole, at)
        if not (pid := os.fork()): save(at, stop)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        new = checkpoints.newest_checkpoint(at/'checkpoints', lambda s: None)
        assert new is not None, f'step {step}: no checkpoint after request {stop}'
        found.append(new.name)
        shutil.rmtree(at)
        if code == 0: break
        assert code == 9, code
    turn = found.index(found[-1])
    assert found == ['step-00000030']*turn + found[-1:]*(len(found) - turn) and len(found) > 40, found
    print(f'step {step}: ended at each of {stop - 1} requests, {found[-1]} from number {turn + 1} on')
'''

@pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('cc'), reason='needs LD_PRELOAD and a C compiler')
def test_ended_at_every_request_to_the_file_system(tmp_path):
    "A real save (weights, optimiser, manifest) is ended at each of its system calls in turn, writes half done: a whole checkpoint is there after each"
    (tmp_path/'shim.c').write_text(SHIM)
    subprocess.run(['cc', '-shared', '-fPIC', '-O1', '-o', tmp_path/'shim.so', tmp_path/'shim.c', '-ldl'], check=True)
    code = script('import ctypes, shutil\nkw |= dict(keep=1)', FAULTS)
    r = subprocess.run([sys.executable, '-c', code, 'new', str(tmp_path/'run')], env=env(LD_PRELOAD=str(tmp_path/'shim.so')), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and r.stdout.count('ended at each of') == 2, r.stdout + r.stderr
