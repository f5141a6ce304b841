"What no notebook can test of 16_hub: a process without transformers, a fresh one without a network, a folder that names foreign code, a real run."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch

pytest.importorskip('transformers')
from resnet_bk.data import get_tokenizer
from resnet_bk.hub import ResNetBKForCausalLM, ResNetBKTokenizer, export_hf
from resnet_bk.model import ModelConfig, ResNetBK

top = Path(__file__).resolve().parents[1]

def python(code, *args, **env): # what a fresh process without a network prints
    env = dict(os.environ, HF_HUB_OFFLINE='1', PYTHONPATH=str(top), OMP_NUM_THREADS='1') | env
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)

def answer(code, *args, **env):
    p = python(code, *args, **env)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.strip().splitlines()[-1])

CONFIGS = (dict(), dict(tie=True), dict(ffn='moe', ffn_kw=dict(num_experts=3)),
           dict(mixer='resolvent', expand=1, mixer_kw=dict(resolvent=dict(gauge='so3'))))

def save(folder, **kw): # folder, logits, ids, greedy text
    torch.manual_seed(0)
    model = ResNetBK(ModelConfig(256, 32, 2, **kw)).eval()
    with torch.no_grad():
        for p in model.parameters(): p += .1*torch.randn_like(p)
    tok = ResNetBKTokenizer(tokenizer=get_tokenizer('bytes'))
    ResNetBKForCausalLM.from_resnet_bk(model, pad_token_id=tok.pad_token_id).save_pretrained(folder)
    tok.save_pretrained(folder)
    ids = torch.as_tensor(get_tokenizer('bytes').encode('def é'))[None]
    with torch.no_grad(): y = model(ids)
    return folder, y, ids, get_tokenizer('bytes').decode(model.generate(ids, 9, temperature=0)[0])

@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save(tmp_path_factory.mktemp('hf'))

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in sys.argv[1:]: raise ModuleNotFoundError('blocked')
sys.meta_path.insert(0, Blocked())
import resnet_bk.model, resnet_bk.cli
try: import resnet_bk.hub
except ImportError as e: print(e)
"""
def test_without_transformers_the_import_says_what_to_install():
    p = python(BLOCKED, 'transformers')
    assert p.returncode == 0 and "pip install 'resnet_bk[hf]'" in p.stdout and 'transformers' in p.stdout, p.stdout + p.stderr

def test_the_import_needs_transformers_alone():
    p = python(BLOCKED + 'print("model" if resnet_bk.hub.ResNetBKForCausalLM else "")', 'peft', 'lm_eval', 'datasets')
    assert p.stdout.strip().endswith('model'), p.stderr[-2000:]

LOAD = """
import json, sys, torch
import resnet_bk.hub
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
def load(folder):
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tok('def é', return_tensors='pt').input_ids
    with torch.no_grad(): y = model(ids).logits
    text = pipeline('text-generation', model=model, tokenizer=tok)('def é', max_new_tokens=9, do_sample=False)
    return dict(y=y.tolist(), ids=ids.tolist(), text=text[0]['generated_text'], model=type(model).__name__,
                tok=type(tok).__name__, evil=sorted(m for m in sys.modules if 'evil' in m))
print(json.dumps([load(f) for f in sys.argv[1:]]))
"""
def same(got, y): return torch.allclose(torch.tensor(got), y, rtol=0, atol=1e-5)

def test_a_fresh_process_without_a_network(saved, tmp_path):
    told = [saved] + [save(tmp_path/str(i), **kw) for i,kw in enumerate(CONFIGS[1:])]
    for (_,y,ids,text),got in zip(told, answer(LOAD, *(t[0] for t in told))):
        assert same(got['y'], y) and got['ids'] == ids.tolist() and got['text'] == text

def test_without_our_import_the_error_names_the_model(saved):
    p = python("import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])", saved[0])
    assert p.returncode and 'resnet_bk' in p.stderr.splitlines()[-1] + p.stderr

def test_foreign_code_is_not_run(saved, tmp_path):
    folder = tmp_path/'folder'
    folder.mkdir()
    for f in saved[0].iterdir(): (folder/f.name).write_bytes(f.read_bytes())
    mark = tmp_path/'ran'
    evil = f'open({str(mark)!r}, "w").close()\nclass Evil: pass\n'
    for place in (folder/'evil.py', tmp_path/'evil.py'): place.write_text(evil)
    change = lambda name, **kw: (folder/name).write_text(json.dumps(json.loads((folder/name).read_text()) | kw))
    names = {k: 'evil.Evil' for k in ('AutoConfig', 'AutoModel', 'AutoModelForCausalLM')}
    change('config.json', parts=['evil'], auto_map=names)
    change('tokenizer_config.json', auto_map={'AutoTokenizer': ['evil.Evil', 'evil.Evil']})
    change('generation_config.json', auto_map=names)
    got, = answer(LOAD, folder, PYTHONPATH=f'{top}{os.pathsep}{tmp_path}')
    assert not mark.exists() and not got['evil'] and same(got['y'], saved[1])
    assert (got['model'], got['tok']) == ('ResNetBKForCausalLM', 'ResNetBKTokenizer')
    change('config.json', mixer=['evil'])
    p = python(LOAD, folder, PYTHONPATH=f'{top}{os.pathsep}{tmp_path}')
    assert p.returncode and "no mixer 'evil'" in p.stderr and not mark.exists()

def test_a_run_of_bk_train(tmp_path):
    (tmp_path/'text.txt').write_text('def f(x): return x\n'*2000)
    run = [sys.executable, '-m', 'resnet_bk.cli', 'train', '--corpus', 'text.txt', '--steps', '3', '--d_model', '32', '--n_layers', '2', '--context', '32',
           '--batch_size', '4', '--folder', 'run', '--tokenizer', 'bpe', '--vocab_size', '270']
    p = subprocess.run(run, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(top), OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    folder = export_hf(tmp_path/'run', tmp_path/'hf')
    own = ResNetBK.from_pretrained(tmp_path/'run'/'model').eval()
    got, = answer(LOAD, folder)
    with torch.no_grad(): y = own(torch.tensor(got['ids']))
    assert same(got['y'], y)
    card = (folder/'README.md').read_text()
    assert 'bits per byte' in card and 'import resnet_bk.hub' in card and 'load_tokenizer' not in card
