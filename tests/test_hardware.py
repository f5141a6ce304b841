"The CUDA sources compile for the architectures we name, GPU or not; and the command line of the check."
import ctypes, os, subprocess, sys
import pytest, torch
from resnet_bk import gauge_cuda, hardware, native

@pytest.mark.skipif(hardware.find_nvcc() is None, reason='no nvcc here')
@pytest.mark.parametrize('module,name,symbol', [(hardware, 'CUDA_CORE', 'bk_scan_f32'), (hardware, 'LAYER_SOURCE', 'bk_layer'),
                                                (hardware, 'ATTENTION_SOURCE', 'bk_attention'), (gauge_cuda, 'GAUGE_SOURCE', 'bk_gauge_in')])
def test_nvcc(module, name, symbol, tmp_path):
    said = hardware.compile_cuda(getattr(module, name), tmp_path/'k.so', ((8, 0), (9, 0)))
    assert 'warning' not in said
    lib = ctypes.CDLL(str(tmp_path/'k.so'))
    assert hasattr(lib, symbol)
    if not torch.cuda.is_available():                       # the library loads and answers: there is no device
        e = native.Call().ints(0).enter(lib, 'bk_device')
        assert e > 0 and 'CUDA' in hardware._error_text(lib, e)

@pytest.mark.skipif(hardware.find_nvcc() is None, reason='no nvcc here')
def test_nvcc_says_what_is_wrong(tmp_path):
    with pytest.raises(native.BuildError, match='error: expected'): hardware.compile_cuda('int f( {', tmp_path/'k.so', ((9, 0),))

@pytest.mark.skipif(hardware.find_nvcc() is None, reason='no nvcc here')
def test_a_gpu_that_fails(tmp_path, monkeypatch):
    "Built, kept and opened as on a machine with a GPU; what the driver says is one warning, and then the reference runs."
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    lib = hardware.CudaLibrary('k', native.CPP_COMPLEX + native.CPP_GUARD + hardware.CUDA_LAUNCH, [(9, 0)])
    with pytest.warns(UserWarning, match='no CUDA kernel k .*CUDA'): assert lib.load() is None
    assert native._whole(lib.path)

SMOKE = '''
__global__ void k(float* p) { p[threadIdx.x] += 1; }
extern "C" int f(float* p) { k<<<1, 32>>>(p); return (int)cudaGetLastError(); }
'''

@pytest.mark.skipif(hardware._nvcc_of_wheels() is None, reason='the wheels of the extra cuda are not installed')
def test_nvcc_of_wheels(tmp_path, monkeypatch):
    "The wheels alone compile: neither CUDA_HOME nor the PATH holds an nvcc."
    path = [p for p in os.environ['PATH'].split(':') if not os.path.exists(f'{p}/nvcc')]
    monkeypatch.setenv('PATH', ':'.join(path))
    monkeypatch.delenv('CUDA_HOME', raising=False)
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', None)
    assert hardware.find_nvcc() == hardware._nvcc_of_wheels()
    hardware.compile_cuda(SMOKE, tmp_path/'k.so', ((9, 0),))
    assert hasattr(ctypes.CDLL(str(tmp_path/'k.so')), 'f')

def test_check_command():
    r = subprocess.run([sys.executable, '-m', 'resnet_bk.hardware', 'check', '--emulate', '--sizes', '5', '100'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert 'largest error' in r.stdout
