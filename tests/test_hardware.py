"The CUDA sources compile for the architectures we name, GPU or not; and the command line of the check."
import ctypes, subprocess, sys
import pytest, torch
from resnet_bk import hardware

@pytest.mark.skipif(hardware.find_nvcc() is None, reason='no nvcc here')
@pytest.mark.parametrize('name,symbol', [('CUDA_CORE', 'bk_scan_f32'), ('LAYER_SOURCE', 'bk_layer'), ('ATTENTION_SOURCE', 'bk_attention')])
def test_nvcc(name, symbol, tmp_path):
    said = hardware.compile_cuda(getattr(hardware, name), tmp_path/'k.so', ((8, 0), (9, 0)))
    assert 'warning' not in said
    lib = ctypes.CDLL(str(tmp_path/'k.so')); lib.bk_error.restype = ctypes.c_char_p
    assert hasattr(lib, symbol)
    if not torch.cuda.is_available():                       # the library loads and answers: there is no device
        e = lib.bk_device((ctypes.c_int64*1)(0)); assert e and b'no error' not in lib.bk_error(e)

@pytest.mark.skipif(hardware.find_nvcc() is None, reason='no nvcc here')
def test_nvcc_says_what_is_wrong(tmp_path):
    with pytest.raises(RuntimeError, match='nvcc.*error'): hardware.compile_cuda('int f( {', tmp_path/'k.so', ((9, 0),))

def test_check_command():
    r = subprocess.run([sys.executable, '-m', 'resnet_bk.hardware', 'check', '--emulate', '--sizes', '5', '100'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert 'largest error' in r.stdout
