"Text, tokenisers, caches and batches under what users do: other encodings, cut characters, several processes, damage."
import gzip, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from resnet_bk.data import (Batches, BPETokenizer, ByteTokenizer, CharTokenizer, Corpus, Floors, LMData, Tokenizer, WordTokenizer,
                            get_tokenizer, hidden_bits, load_corpus, load_tokenizer, token_files)

TEXT = 'the cat sat on the mat\n'*900
NOT_TEXT = {'gz.txt': gzip.compress(TEXT.encode()), 'utf16.txt': TEXT.encode('utf-16'), 'nobom.txt': TEXT.encode('utf-16-le'), 'russian.txt': ('кот сидел на ковре\n'*99).encode('utf-16-be'),
            'zeros.bin': b'\0'*999, 'noise.bin': np.random.default_rng(1).bytes(5000)}

@pytest.mark.parametrize('name', NOT_TEXT)
def test_what_is_not_text_is_refused_however_it_is_given(name, tmp_path):
    good, bad = tmp_path/'good.txt', tmp_path/'folder'/name
    bad.parent.mkdir()
    good.write_text(TEXT)
    bad.write_bytes(NOT_TEXT[name])
    for given in (bad, str(bad), bad.parent, [bad], [good, bad], [good, bad.parent]):
        with pytest.raises(ValueError, match=name + ' is (compressed|UTF-16|binary)'): load_corpus(given)

def test_a_folder_leaves_other_files_out_and_says_so(tmp_path):
    (tmp_path/'a.txt').write_text(TEXT)
    for name,raw in NOT_TEXT.items(): (tmp_path/name).write_bytes(raw)
    with pytest.warns(UserWarning, match='6 of 7 files skipped'): c = load_corpus(tmp_path)
    assert c.train + c.valid == TEXT.encode()

@pytest.mark.parametrize('text', ['naïve café ψ\n', '中文\n', 'tab\tand\x0cfeed\x1b[0m\r\n'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'latin-1', 'gb18030'])
def test_text_is_taken_byte_for_byte(text, encoding, tmp_path):
    raw = (text*50).encode(encoding, 'replace')
    (tmp_path/'t.txt').write_bytes(raw)
    c = load_corpus(tmp_path/'t.txt')
    assert c.train + c.valid == raw

def test_no_name_is_no_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('t.txt').write_text(TEXT)
    for nothing in ('', '  ', None, [], 3):
        with pytest.raises(ValueError, match='no corpus'): load_corpus(nothing)
    for missing in (['t.txt', ''], ['no.txt'], 'no.txt'):
        with pytest.raises(FileNotFoundError, match='no file or folder'): load_corpus(missing)
    Path('empty.txt').touch()
    for empty in ('empty.txt', ['t.txt', 'empty.txt']):
        with pytest.raises(ValueError, match='empty.txt is empty'): load_corpus(empty)

# ---- tokenisers

KINDS = ['bytes', 'chars', 'words', 'bpe']
HUB = ['byte level', 'metaspace', 'wordpiece', 'byte fallback', 'suffix', 'plain'] # how vocabularies from elsewhere mark what is between words

def hub(kind): # small tokenisers of the `tokenizers` library, made like those on the Hub
    from tokenizers import Tokenizer, decoders as d, models, normalizers, pre_tokenizers as p
    letters = list('abcdeé語') + ['ab', 'the', '.', ',', '�']
    if kind == 'byte level': t = get_tokenizer('bpe', 'the café, the ψ'*50, 270).tok
    if kind == 'metaspace':
        t = Tokenizer(models.BPE({w: i for i,w in enumerate(['<unk>', '▁', '▁the', '▁▁'] + letters)}, [], unk_token='<unk>'))
        t.pre_tokenizer, t.decoder = p.Metaspace(), d.Metaspace()
    if kind == 'wordpiece':
        t = Tokenizer(models.WordPiece({w: i for i,w in enumerate(['[UNK]'] + letters + ['##' + w for w in letters])}, unk_token='[UNK]'))
        t.normalizer, t.pre_tokenizer, t.decoder = normalizers.Lowercase(), p.BertPreTokenizer(), d.WordPiece()
    if kind == 'byte fallback':
        t = Tokenizer(models.BPE({w: i for i,w in enumerate(['<unk>', '▁', '▁▁'] + [f'<0x{i:02X}>' for i in range(256)] + letters)}, [], unk_token='<unk>', byte_fallback=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        t.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(), d.Strip(' ', 1, 0)])
    if kind == 'suffix':
        t = Tokenizer(models.BPE({w: i for i,w in enumerate(['<unk>'] + letters + [w + '</w>' for w in letters])}, [], unk_token='<unk>', end_of_word_suffix='</w>'))
        t.pre_tokenizer, t.decoder = p.Whitespace(), d.BPEDecoder()
    if kind == 'plain':
        t = Tokenizer(models.WordLevel({w: i for i,w in enumerate(['<unk>'] + letters)}, unk_token='<unk>'))
        t.pre_tokenizer = p.Whitespace()
    t.add_special_tokens(['<|end of text|>', 'é!'])
    return BPETokenizer(t)

@pytest.fixture(scope='module')
def toks(): return {k: get_tokenizer(k, 'the café, the ψ and the 語 😀\n'*50 + 'abc\x00 \n\n  ', 300 if k == 'bpe' else None) for k in KINDS} | {k: hub(k) for k in HUB}

CUT = ['caf\udcc3', '\udc80', '\ud800', '\udfff x', 'a\ud83d', '\ud83d\ude00', b'caf\xc3', b'\xff\xfe', '']
@pytest.mark.parametrize('kind', KINDS + HUB)
@pytest.mark.parametrize('text', CUT, ids=ascii)
def test_a_cut_character_is_no_traceback(toks, kind, text):
    ids = toks[kind].encode(text)
    assert ids.dtype.kind in 'iu' and ids.ndim == 1
    toks[kind].decode(ids).encode('utf-8')

@pytest.mark.parametrize('text, raw', [('caf\udcc3', b'caf\xc3'), ('\udc80\udcff', b'\x80\xff'), (b'\xff\xfe', b'\xff\xfe'), ('a\ud800', 'a\ufffd'.encode()), ('\udc7f\udd00', '\ufffd\ufffd'.encode())], ids=ascii)
def test_bytes_are_taken_as_they_are(toks, text, raw): assert bytes(toks['bytes'].encode(text).tolist()) == raw

@pytest.mark.parametrize('kind', KINDS)
def test_a_vocabulary_from_cut_text(kind, tmp_path):
    t = get_tokenizer(kind, 'caf\udcc3 \ud800 noir\n'*9)
    t.save(tmp_path)
    assert load_tokenizer(tmp_path) == t
    assert t.encode('noir').size

@settings(max_examples=150, deadline=None)
@given(st.text())
def test_bytes_and_byte_pairs_give_every_text_back(toks, text):
    for k in ('bytes', 'bpe'):
        assert toks[k].decode(toks[k].encode(text)) == text
        assert toks[k].is_lossless_on(text)
    assert toks['words'].is_lossless_on(text) == (toks['words'].decode(toks['words'].encode(text)) == text)

def test_lossless_is_measured(toks):
    known, unknown = 'the café', 'the xyz'
    assert toks['chars'].is_lossless_on(known) and not toks['chars'].is_lossless_on(unknown)
    assert toks['words'].is_lossless_on('the and') and not toks['words'].is_lossless_on('the  and')
    assert toks['wordpiece'].is_lossless_on('the ab') and not toks['wordpiece'].is_lossless_on('THE ab')

# ---- streaming

def joined(tok, ids):
    d = tok.stream()
    return ''.join([d.push(i) for i in ids] + [d.flush()])

@pytest.mark.parametrize('kind', KINDS + HUB)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_stream_joins_up_to_decode(toks, kind, data):
    t = toks[kind]
    ids = data.draw(st.lists(st.integers(0, t.vocab_size - 1), max_size=40))
    d = t.stream()
    for part in (ids, ids[::-1]): # a decoder may be used again after flush
        assert ''.join([d.push(i) for i in part] + [d.flush()]) == t.decode(part)

@pytest.mark.parametrize('kind', KINDS + HUB)
@settings(max_examples=100, deadline=None)
@given(text=st.text('abcdéthe 語😀.,\n'))
def test_text_streams(toks, kind, text):
    ids = toks[kind].encode(text)
    assert joined(toks[kind], ids) == toks[kind].decode(ids)

@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'byte fallback'])
def test_a_character_comes_when_it_is_complete(toks, kind):
    d, t, seen, said = toks[kind].stream(), toks[kind], [], ''
    for i in t.encode('ab 😀 cd'):
        said += d.push(i)
        assert '�' not in said
    assert said.strip() + d.flush() == 'ab 😀 cd'

@pytest.mark.parametrize('kind', KINDS + HUB)
def test_the_cost_of_a_token_is_constant(toks, kind, monkeypatch):
    t, longest = toks[kind], []
    decode = type(t).decode
    monkeypatch.setattr(type(t), 'decode', lambda self, ids: longest.append(len(ids)) or decode(self, ids))
    d, ids = t.stream(), [i for i in range(t.vocab_size) if not (kind == 'byte fallback' and t.tok.id_to_token(i).startswith('<0x'))]
    for i in ids*20: d.push(np.int64(i))
    assert max(longest, default=0) <= 10 and len(d.held) <= 8

def test_a_tokeniser_of_ones_own_streams_too():
    class Bits(Tokenizer):
        name, vocab_size = 'bits', 2
        def encode(self, text): return np.unpackbits(np.frombuffer(text.encode(), np.uint8))
        def decode(self, ids): return np.packbits(self._ids(ids).astype(np.uint8)).tobytes().decode()
    assert joined(Bits(), Bits().encode('é bit')) == 'é bit'

@pytest.mark.parametrize('kind', KINDS + HUB)
def test_a_token_outside_the_vocabulary_is_refused(toks, kind):
    for i in (-1, toks[kind].vocab_size):
        with pytest.raises(ValueError, match='takes 0 to'): toks[kind].stream().push(i)
    assert joined(toks[kind], [torch.tensor(1), torch.tensor([2]), np.uint16(3)]) == toks[kind].decode([1, 2, 3])

# ---- bits per byte of a tokeniser that loses text

@settings(max_examples=200, deadline=None)
@given(text=st.text('ab cé\n\t \x1c\u2003\x85'))
def test_tokens_and_what_they_hide_give_the_text_back(text):
    words, chars = WordTokenizer(['a', 'ab', 'c']), CharTokenizer('ab c')
    gaps, unknown = words.hidden(text)
    spelled = [words.vocab[i-1] if i else unknown.pop(0) for i in words.encode(text)]
    assert ''.join(g + w for g,w in zip(gaps, spelled + [''])) == text and not unknown
    rest, = chars.hidden(text)
    assert ''.join(chars.vocab[i-1] if i else rest.pop(0) for i in chars.encode(text)) == text and not rest

@pytest.mark.parametrize('train', ['', 'xxyz', 'ééx z'])
def test_the_charge_is_the_length_of_a_code(train): # Kraft: lengths of a code that can be read sum to at most 1
    t = CharTokenizer('ab')
    strings = sorted(set(train)) + [chr(i) for i in range(0x20, 0x3000) if chr(i) not in train + 'ab']
    lengths = [hidden_bits(t, train, s) for s in strings]
    assert min(lengths) >= 0 and sum(2.**-n for n in lengths) <= 1

def test_a_small_vocabulary_of_words_does_not_look_good(tmp_path):
    c = load_corpus('stdlib')
    c = Corpus('part', c.train[:400_000], c.valid[:40_000])
    honest = LMData.from_corpus(c, 'bytes', cache=tmp_path).floors
    for vocab in (2, 50, 5000):
        d = LMData.from_corpus(c, 'words', vocab, cache=tmp_path)
        assert d.tokenizer.lossless is False
        assert d.report(0.)['bpb'] == d.floors.hidden > 1          # even a perfect model of the tokens pays for the text
        assert d.report(d.floors.unigram)['bpb'] > 2.5, vocab      # before: 0.13 for a vocabulary of 2
    assert honest.hidden == 0 and honest.bpb(1.) == pytest.approx(1/np.log(2))

def test_a_tokeniser_that_hides_an_unknown_part_has_no_bits_per_byte(toks, tmp_path):
    d = LMData.from_corpus(Corpus('caps', b'THE the ab\n'*99, b'THE ab\n'*20), toks['wordpiece'], context=8, cache=tmp_path)
    assert d.tokenizer.lossless is False and toks['wordpiece'].lossless is None
    assert d.report(1.)['bpb'] is None and d.report(1.)['nats'] == 1 and '—' in d.floors.table()

def test_what_comes_back_is_not_charged(toks, tmp_path):
    c = Corpus('plain', 'the café\n'.encode()*99, 'the é'.encode()*20)
    for k in ('bytes', 'chars', 'bpe'):
        d = LMData.from_corpus(c, toks[k], context=8, cache=tmp_path)
        assert d.tokenizer.lossless is True and d.floors.hidden == 0, k

# ---- token files

top = Path(__file__).resolve().parents[1]
LOADS = '''
import json, sys, time
from resnet_bk.data import (Batches, BPETokenizer, ByteTokenizer, CharTokenizer, Corpus, Floors, LMData, Tokenizer, WordTokenizer,
                            get_tokenizer, hidden_bits, load_corpus, load_tokenizer, token_files)
class Told(ByteTokenizer):
    def encode(self, text):
        print('made', flush=True)
        time.sleep(.5)
        return super().encode(text)
if __name__ == '__main__': print(json.dumps(LMData.from_corpus(load_corpus(sys.argv[1]), Told()).fingerprint()))
'''
def python(code, *args, env={}, **kw):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(top), **env}, **kw)
def end(p):
    out, err = (b.decode('utf-8') for b in p.communicate(timeout=120))
    assert p.returncode == 0, err[-2000:]
    return out, err

def test_processes_at_once_make_token_files_once(tmp_path):
    (tmp_path/'t.txt').write_text(TEXT)
    said = [end(p) for p in [python(LOADS, tmp_path/'t.txt', env={'RESNET_BK_CACHE': str(tmp_path/'cache')}) for _ in range(3)]]
    assert ''.join(o for o,_ in said).count('made') == 2, said                 # the training and the validation part, once each
    assert len({o.splitlines()[-1] for o,_ in said}) == 1
    assert ''.join(e for _,e in said).count('waiting') <= 2

def test_a_killed_process_blocks_nobody(tmp_path):
    (tmp_path/'t.txt').write_text(TEXT)
    p = python(LOADS, tmp_path/'t.txt', env={'RESNET_BK_CACHE': str(tmp_path/'cache')})
    p.stdout.readline()
    p.kill()
    p.communicate()
    assert list((tmp_path/'cache').glob('.new-*')) and not list((tmp_path/'cache').glob('*.json'))
    out, err = end(python(LOADS, tmp_path/'t.txt', env={'RESNET_BK_CACHE': str(tmp_path/'cache')}))
    assert out.count('made') == 2 and 'resnet_bk' not in err
    assert not list((tmp_path/'cache').glob('.new-*'))

def cut(raw): return raw[:len(raw)//2]
def flip(raw): return raw[:len(raw)//2] + bytes([raw[len(raw)//2] ^ 1]) + raw[len(raw)//2 + 1:]
@pytest.mark.parametrize('name', ['train.npy', 'valid.npy', 'tokenizer.json', 'meta.json', 'manifest.json'])
@pytest.mark.parametrize('damage', [cut, flip, lambda raw: b'', None], ids=['cut', 'flipped', 'empty', 'gone'])
def test_damaged_token_files_are_made_again_once(name, damage, tmp_path):
    c = Corpus('c', TEXT.encode(), TEXT.encode()[:500])
    load = lambda: LMData.from_corpus(c, 'chars', context=8, cache=tmp_path)
    before = load()
    folder = token_files(c, 'chars', cache=tmp_path)
    raw = (folder/name).read_bytes()
    (folder/name).unlink()
    if damage: (folder/name).write_bytes(damage(raw))
    with pytest.warns(UserWarning, match='are damaged') as said: after = load()
    assert len(said) == 1 and len(str(said[0].message).splitlines()) == 1
    assert after.fingerprint() == before.fingerprint() and after.floors == before.floors
    assert np.array_equal(after.train_tokens, before.train_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load()

CACHE = '''
import sys, warnings
from resnet_bk.data import (Batches, BPETokenizer, ByteTokenizer, CharTokenizer, Corpus, Floors, LMData, Tokenizer, WordTokenizer,
                            get_tokenizer, hidden_bits, load_corpus, load_tokenizer, token_files)
c = Corpus('c', b'abc'*99, b'abc'*9)
for _ in range(2): folder = token_files(c)
token_files(Corpus('d', b'abd'*99, b'abc'*9))
print(folder, (folder/'train.npy').exists())
'''
def about_cache(err): return [l for l in err.splitlines() if 'resnet_bk: token files' in l and 'warnings.warn(' not in l]

def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path/'file').touch()
    out, err = end(python(CACHE, env={'RESNET_BK_CACHE': str(tmp_path/'file'/'below')}))
    folder, there = out.split()
    assert there == 'True' and not Path(folder).parent.exists()               # private, and deleted at the end
    assert len(about_cache(err)) == 1 and 'Not a directory' in err and 'RESNET_BK_CACHE' in err, err

def test_no_home(tmp_path):
    code = "import pathlib\ndef home(*a): raise RuntimeError('Could not determine home directory.')\npathlib.Path.home = home\n" + CACHE
    env = {k: v for k,v in os.environ.items() if k != 'RESNET_BK_CACHE'}
    r = subprocess.run([sys.executable, '-c', code], env={**env, 'PYTHONPATH': str(top)}, capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.split()[1] == 'True' and len(about_cache(r.stderr)) == 1, r.stderr

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_a_full_cache_may_be_read_only(tmp_path):
    c = Corpus('c', b'abc'*99, b'abc'*9)
    folder = token_files(c, cache=tmp_path/'cache')
    (tmp_path/'cache').chmod(0o500)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert token_files(c, cache=tmp_path/'cache') == folder

def test_a_full_cache_needs_no_lock(tmp_path, monkeypatch):
    c = Corpus('c', b'abc'*99, b'abc'*9)
    folder = token_files(c, cache=tmp_path)
    monkeypatch.setattr('resnet_bk.data.FileLock', None)
    assert token_files(c, cache=tmp_path) == folder

def test_a_full_disk(tmp_path, monkeypatch):
    import resnet_bk.data as data
    save, calls = np.save, []
    def full(file, tokens):
        calls.append(file)
        if str(tmp_path) in str(file): raise OSError(28, 'No space left on device')
        save(file, tokens)
    monkeypatch.setattr(data.np, 'save', full)
    monkeypatch.setattr(data, '_temporary', {})
    with pytest.warns(UserWarning, match='No space left on device'): folder = token_files(Corpus('c', b'abc'*99, b'abc'*9), cache=tmp_path)
    assert (folder/'valid.npy').exists() and not [f for f in tmp_path.iterdir() if f.suffix != '.lock']

def test_a_changed_file_is_noticed(tmp_path):
    file = tmp_path/'t.txt'
    load = lambda: LMData.from_corpus(file, 'chars', context=8, cache=tmp_path/'cache')
    file.write_text(TEXT)
    a = load()
    file.write_text(TEXT.replace('cat', 'cab', 1))                             # same length, same name
    b = load()
    assert not np.array_equal(a.train_tokens, b.train_tokens) and a.fingerprint() != b.fingerprint()
    file.write_text(TEXT)
    assert load().fingerprint() == a.fingerprint()

# ---- which data, and where in it

def test_a_fingerprint_tells_every_difference(tmp_path):
    c = Corpus('c', TEXT.encode(), TEXT.encode()[:600])
    make = lambda c=c, tok='chars', **kw: LMData.from_corpus(c, tok, **{**dict(batch_size=3, context=8, cache=tmp_path), **kw})
    base = make().fingerprint()
    assert list(base) == ['name', 'bytes', 'tokens', 'train', 'valid', 'tokenizer', 'batch_size', 'context'] and json.loads(json.dumps(base)) == base
    assert base['bytes'] == len(TEXT) + 600 == base['tokens']
    differs = lambda d: {k for k,v in d.fingerprint().items() if v != base[k]}
    assert differs(make()) == differs(make(cache=tmp_path/'other')) == differs(make(batch_size=np.int32(3), context=np.int64(8))) == set()
    assert differs(make(batch_size=4)) == differs(make().rebatch(batch_size=4)) == {'batch_size'} and differs(make(context=9)) == differs(make().rebatch(context=9)) == {'context'}
    assert differs(make(Corpus('d', c.train, c.valid))) == {'name'}
    assert differs(make(Corpus('c', c.train, c.valid[:-1]))) == {'bytes', 'tokens', 'valid'}
    assert differs(make(Corpus('c', c.train[::-1], c.valid))) == {'train'}
    assert differs(make(tok='bytes')) == {'train', 'valid', 'tokenizer'}
    d = make()
    assert LMData(d.tokenizer, np.array(d.train_tokens, np.int64), d.valid_tokens.tolist(), d.floors, 'c', 3, 8, n_bytes=base['bytes']).fingerprint() == base

INHERITED = '''
import json, sys
from resnet_bk.data import (Batches, BPETokenizer, ByteTokenizer, CharTokenizer, Corpus, Floors, LMData, Tokenizer, WordTokenizer,
                            get_tokenizer, hidden_bits, load_corpus, load_tokenizer, token_files)
for kind in ('bytes', 'chars', 'words', 'bpe'):
    d = LMData.from_corpus(sys.argv[1], kind, 300 if kind == 'bpe' else None, context=16)
    d.tokenizer.save(sys.argv[2])
    assert load_tokenizer(sys.argv[2]) == d.tokenizer
    print(json.dumps(d.fingerprint()), json.dumps(vars(d.floors)), d.train.batch(3, 1)[0].sum().item())
'''
def test_what_a_process_inherits_changes_nothing(tmp_path):
    (tmp_path/'téxt').mkdir()
    for name in ('ä.txt', 'B.txt', 'a.txt', 'z語.txt'): (tmp_path/'téxt'/name).write_text(f'{name}: le café noir, une idée 語\n'*200, encoding='utf-8')
    c = {'LANG': 'C', 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'ascii'}
    envs = [{'LC_ALL': 'C.UTF-8'}, c, {'PYTHONHASHSEED': '1', 'OMP_NUM_THREADS': '1', 'RAYON_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}, {'PYTHONHASHSEED': '2', 'TZ': 'Asia/Tokyo'}]
    said = set()
    for i,env in enumerate(envs):
        (cwd := tmp_path/str(i)).mkdir()
        said.add(end(python(INHERITED, tmp_path/'téxt', cwd/'tok', env={**env, 'RESNET_BK_CACHE': 'cache'}, cwd=cwd))[0])
    assert len(said) == 1, said

def test_a_resumed_run_uses_the_saved_tokeniser(tmp_path):
    old, new = (Corpus('song', t*400, t*40) for t in (b'bad cab fed deaf\n', b'xad cax fed deaf\n'))
    for kind in ('chars', 'words', 'bpe'):
        first = LMData.from_corpus(old, kind, 260 if kind == 'bpe' else None, context=8, cache=tmp_path)
        first.tokenizer.save(tmp_path/kind)
        later = LMData.from_corpus(new, load_tokenizer(tmp_path/kind), context=8, cache=tmp_path)
        assert later.tokenizer == first.tokenizer and later.fingerprint()['tokenizer'] == first.fingerprint()['tokenizer']
        assert later.fingerprint()['train'] != first.fingerprint()['train']
        assert 'fed' in later.tokenizer.decode(later.train_tokens[:20]) and later.tokenizer.lossless is (kind == 'bpe')
    import tokenizers
    with pytest.raises(ValueError, match='BPETokenizer'): LMData.from_corpus(old, tokenizers.Tokenizer(tokenizers.models.BPE()), cache=tmp_path)

SEEDS = [3, np.int64(3), np.uint8(3), np.int32(3), torch.tensor(3), np.array(3)]
@pytest.mark.parametrize('seed', SEEDS, ids=lambda s: type(s).__name__)
def test_seeds_of_any_integer_type(seed):
    a, b = Batches(np.arange(1000), np.int64(4), np.int16(8), seed), Batches(np.arange(1000), 4, 8, 3)
    assert torch.equal(a.batch(0, 0)[0], b.batch(0, 0)[0]) and json.loads(json.dumps(a.state_dict())) == b.state_dict()
    for wrong in (1.5, '3', None, np.float64(3)):
        with pytest.raises(ValueError, match='seed=.*: give an integer'): Batches(np.arange(1000), 4, 8, wrong)
    assert not torch.equal(Batches(np.arange(1000), 4, 8, -1).batch(0, 0)[0], b.batch(0, 0)[0])

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=5), st.integers(30, 700), st.integers(1, 2))
def test_another_batch_size_goes_on_where_it_was(sizes, n, world):
    N, tokens = 4, np.arange(n)
    d = LMData(ByteTokenizer(), tokens, tokens, Floors(1., 1.), batch_size=sizes[0][0], context=N, seed=5, rank=world - 1, world=world)
    alone = Batches(tokens, 1, N, 5, rank=world - 1, world=world)                # every window of this process
    seen, epoch = [], 0
    for size,steps in sizes:
        d = d.rebatch(batch_size=size)
        for _ in range(steps):
            at = d.train.epoch
            if at > epoch: # the epoch before ended where no full batch was left
                seen, epoch = [], at
            x = d.train._next()[0]
            assert len(x) == min(size, alone.share)
            seen += x[:,0].tolist()
            assert seen == alone.starts(epoch)[:len(seen)].tolist()
            b = LMData(ByteTokenizer(), tokens, tokens, Floors(1., 1.), batch_size=size, context=N, seed=5, rank=world - 1, world=world).train
            b.load_state_dict(json.loads(json.dumps(d.train.state_dict())))     # and a checkpoint holds the place
            assert torch.equal(b.batch(b.epoch, b.index)[0], d.train.batch(d.train.epoch, d.train.index)[0])

def test_another_context_keeps_the_place():
    d = LMData(ByteTokenizer(), np.arange(10_000), np.arange(100), Floors(1., 1.), batch_size=4, context=16)
    for _ in range(40): d.train._next()                                        # 2560 of some 10 000 tokens
    e = d.rebatch(context=32)
    assert e.train.epoch == 0 and e.train.index*4*32 == 2560
    e = e.rebatch(context=64, batch_size=5)
    assert e.train.index*5*64 == 2560
    for _ in range(120): d.train._next()
    assert d.train.epoch == 1 and d.rebatch(batch_size=8, context=8).train.epoch == 1

# ---- what an installation brings

def test_extras(tmp_path):
    code = 'import json, setuptools; setuptools.setup = lambda **kw: print(json.dumps([kw["install_requires"], kw["extras_require"]])); exec(open("setup.py", encoding="utf-8").read(), {"__file__": "setup.py"})'
    needs, extras = json.loads(subprocess.run([sys.executable, '-c', code], cwd=top, capture_output=True, text=True, check=True).stdout)
    assert not any(r.startswith('datasets') for r in needs) and any(r.startswith('datasets') for r in extras['hub']) and set(extras['hub']) <= set(extras['dev'])
    assert {r for name,rs in extras.items() if name != 'all' for r in rs} == set(extras['all']) and {'hub', 'cuda', 'dev'} < set(extras)

def test_without_datasets_everything_but_the_hub_works(tmp_path):
    code = '''
import sys
for gone in ('datasets', 'pyarrow', 'pandas'): sys.modules[gone] = None
import resnet_bk.cli
from resnet_bk.data import LMData
for kind in ('bytes', 'bpe'): LMData.from_corpus(sys.argv[1], kind, context=8)
try: LMData.from_corpus('wikitext-2')
except ImportError as e: print(e)
'''
    (tmp_path/'t.txt').write_text(TEXT)
    out, _ = end(python(code, tmp_path/'t.txt', env={'RESNET_BK_CACHE': str(tmp_path/'cache'), 'RESNET_BK_DATA': str(tmp_path)}))
    assert out.splitlines() == ["'wikitext-2' is no path here, and text from the Hub needs the library datasets: pip install \"resnet_bk[hub]\""]
