"Text, tokenisers, caches and batches under what users do: other encodings, cut characters, several processes, damage."
import gzip, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from resnet_bk.data import BPETokenizer, CharTokenizer, Corpus, LMData, Tokenizer, WordTokenizer, get_tokenizer, hidden_bits, load_corpus, load_tokenizer

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
