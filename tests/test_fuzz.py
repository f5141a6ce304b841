"Drawn input to every public op and layer; the same with sanitizers; and a fault put in by hand that these must catch."
import os, re, subprocess, sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from fuzz import build, sanitizer_env

here = Path(__file__).parent

@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    env = sanitizer_env(tmp_path_factory.mktemp('watched'))
    if not all(Path(p).is_absolute() for p in env['LD_PRELOAD'].split()): pytest.skip('this compiler has no sanitizers')
    return env

def side_by_side(cases, seconds, *more, env=None): # two processes with half of the cases each
    cmd = [sys.executable, here/'fuzz.py', '--cases', str(cases//2), '--seconds', str(seconds), *more]
    ps = [subprocess.Popen([*cmd, '--seed', str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    return [(p.returncode, out, err) for p,(out,err) in [(p, p.communicate()) for p in ps]]

def check(runs, least): # every case was compared or refused, and of both there were many
    for code,out,err in runs: assert code == 0, out[-6000:] + err[-2000:]
    n = {k: sum(int(m) for _,out,_ in runs for m in re.findall(rf'(\d+) gave {k}s', out)) for k in ('value', 'shape', 'error', 'none')}
    assert n['none'] == 0 and sum(n.values()) >= least, f'{n}: of so few cases nothing follows, or the machine is too slow'
    assert n['value'] > .4*least and n['error'] > .15*least, n

def test_every_case_gives_the_value_or_an_error(capfd):
    runs = side_by_side(10000, 400)
    with capfd.disabled(): print(*('\n' + out[-2000:] for _,out,_ in runs))
    check(runs, 10000)

def test_no_report_of_the_sanitizers(watched, capfd):
    assert 'exit 0' in build(watched)
    runs = side_by_side(2000, 240, env=watched)
    with capfd.disabled(): print(*('\n' + out[-2000:] for _,out,_ in runs))
    for _,_,err in runs: assert 'Sanitizer' not in err and 'runtime error' not in err, err[:6000]
    check(runs, 2000)

HUGE = '''
import sys, torch
from resnet_bk import native
source = native.CPP_LANES + native.Cpp("""
extern "C" int huge(const I* a) { return guarded([&] { std::vector<double> x((size_t)1 << a[0]); return (int)x[a[0]]; }); }
""")
lib = native.CppLibrary('bk_huge', source)
assert lib.load() is not None
try: native.Call().ints(46).enter(lib, 'huge')
except MemoryError: print('MemoryError')
'''

def test_a_huge_allocation_is_a_memory_error(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    r = subprocess.run([sys.executable, '-c', HUGE], capture_output=True, text=True)
    assert r.returncode == 0 and 'MemoryError' in r.stdout, r.stderr[-2000:]


# one kernel of the package that reads one number too far
OLD, NEW = 'g0[2 * q + 1]}', 'g0[2 * q + 2]}'
KERNEL = """
import subprocess, sys, torch
from resnet_bk import native, cpu_kernels
lib = cpu_kernels.CORE[torch.float32]
if sys.argv[1] == 'bad':
    source = lib.source.replace(OLD, NEW)
    assert source != lib.source, 'the text to be patched is not there'
    lib.source = native.Cpp(source)
if sys.argv[2] == 'build':
    cxx, folder = native.find_compiler(), native.cache_folder()
    (folder/'bad.cpp').write_text(lib.source)
    subprocess.run([cxx, *native._usable(cxx, folder), '-fPIC', '-shared', folder/'bad.cpp', '-o', folder/'bad.new'], check=True)
    native._install(folder/'bad.new', lib.path)
else:
    from resnet_bk.bk_core import resolvent_diag
    assert lib.load() is not None
    print(resolvent_diag(torch.ones(3, 7, 5), 1j, causal=True, state=torch.zeros(3, 5, dtype=torch.complex64)).shape)
"""

@pytest.mark.parametrize('what', ['good', 'bad'])
def test_a_bad_index_is_caught(what, watched):
    plain = {k: v for k,v in watched.items() if k != 'LD_PRELOAD'}
    built, ran = (subprocess.run([sys.executable, '-c', KERNEL.replace('OLD', repr(OLD)).replace('NEW', repr(NEW)), what, step],
                                 env=env, capture_output=True, text=True) for step, env in (('build', plain), ('run', watched)))
    assert built.returncode == 0, built.stderr[-2000:]
    if what == 'good': assert ran.returncode == 0 and '(3, 7, 5)' in ran.stdout.replace('[', '(').replace(']', ')'), ran.stderr[-2000:]
    else: assert ran.returncode != 0 and 'AddressSanitizer' in ran.stderr, ran.stderr[-2000:]
